"""Reads many rows of a format: filters them, counts and shows what it leaves out.

Bad rows are refused by number and reason. What a format is lies in `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from helpers.formats import (
    DataError,
    Messages,
    Row,
    check_messages,
    detect_format,
    find_format,
)
from helpers.runs import fingerprint

PEEK = 20  # rows that the format is detected from
SHOWN = 3  # examples of what was left out, for each reason
FILTERS = ("empty answer", "over-long", "duplicate")  # never a reason to refuse all


@dataclass
class Reader:
    """Reads one source's rows into conversations; says afterwards how that went."""

    source: str = "the rows"
    """Where the rows come from, for messages."""
    form: str | None = None
    """The name of the rows' format; None = detected from the first rows."""
    system_prompt: str = ""
    """Put before problems (GSM8K format): training and evaluation ask alike."""
    max_chars: int | None = None
    """Conversations with more characters are over-long."""
    drop_unusable: bool = False
    """Leave unusable rows out and count them, instead of refusing all."""
    seen: set[int] = field(default_factory=set)
    """Hashes of the conversations known already, other sources' too."""

    why: str = "asked for"
    """How the format was found."""
    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Conversations made of them."""
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`{"rows": 3, "examples": ["row 7: ..."]}` by reason."""

    def read(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Messages]:
        """Yields the conversations of numbered rows, one by one.

        Empty answers, duplicates and over-long conversations are always left out. No
        row stays in memory, but about 100 bytes of each to know it again.

        Raises:
            DataError: rows lack an expected field or break the turn order (numbers and
                reasons are given) and are not to be dropped, or no row is left.
        """
        rows = iter(rows)
        first = list(islice(rows, PEEK))
        if not first:
            raise DataError(f"{self.source} holds no rows")
        asked = self.form is not None
        if self.form is None:
            self.form, self.why = detect_format([row for _, row in first])
        convert = find_format(self.form).convert
        for number, row in chain(first, rows):
            self.rows += 1
            messages, fault, shown = self.check_row(convert, row)
            if fault:
                self.leave_out(fault, f"row {number}: {shown}")
                continue
            if self.form == "gsm8k" and self.system_prompt:
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            self.kept += 1
            yield messages
        self.refuse_unusable(asked)

    def check_row(
        self, convert: Callable[[Row], Messages], row: Row
    ) -> tuple[Messages, str, str]:
        """Returns a row's messages, why it is left out (or ""), and the details."""
        try:
            messages = convert(row)
            fault = check_messages(messages)
        except (KeyError, TypeError, AttributeError, DataError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            return (
                [],
                f"unreadable as {self.form}",
                f"unreadable as {self.form}: {said}",
            )
        if fault:
            return [], fault.partition(":")[0], fault
        question = next(m["content"] for m in messages if m["role"] == "user")
        opening = " ".join(question.split())[:60]
        length = sum(len(m["content"]) for m in messages)
        if self.max_chars and length > self.max_chars:
            return [], "over-long", f"{length:,} characters: {opening}"
        key = int(fingerprint(messages), 16)
        if key in self.seen:
            return [], "duplicate", opening
        self.seen.add(key)
        return messages, "", ""

    def leave_out(self, reason: str, example: str) -> None:
        """Counts a row that is left out, and keeps the first few as examples."""
        found = self.left_out.setdefault(reason, {"rows": 0, "examples": []})
        found["rows"] += 1
        if len(found["examples"]) < SHOWN:
            found["examples"].append(example)

    def refuse_unusable(self, asked: bool) -> None:
        """Raises DataError for rows that cannot be used, or when none is left.

        Args:
            asked: whether the format was asked for, not detected.
        """
        shown = [e for part in self.left_out.values() for e in part["examples"]]
        counts = {reason: part["rows"] for reason, part in self.left_out.items()}
        unusable = {reason: n for reason, n in counts.items() if reason not in FILTERS}
        remedy = "data.drop_unusable in the config leaves such rows out"
        if asked:
            remedy += "; without format= in the source the format is detected"
        if unusable and not self.drop_unusable:
            shown = [e for r in unusable for e in self.left_out[r]["examples"]]
            raise DataError(
                f"{self.source}: {sum(unusable.values())} of {self.rows} rows cannot "
                f"be used as {self.form}; {'; '.join(shown[:SHOWN])} ({remedy})"
            )
        if not self.kept:
            said = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise DataError(
                f"{self.source}: no row is left of {self.rows} ({said}): "
                f"{'; '.join(shown[:SHOWN])}; correct these rows, or give others"
            )


def to_conversations(
    rows: Iterable[Row],
    system_prompt: str = "",
    source: str = "the rows",
    **options: Any,
) -> tuple[list[Messages], dict[str, dict[str, Any]]]:
    """Returns the rows as conversations, and what was left out, by reason.

    The options and the errors are those of `Reader`; rows are numbered from 1.

    >>> to_conversations([{"prompt": "Hi?", "completion": ""}] + 2 * [
    ...     {"prompt": "Hi?", "completion": "Hi."}])[1]["duplicate"]
    {'rows': 1, 'examples': ['row 3: Hi?']}
    """
    reader = Reader(source, system_prompt=system_prompt, **options)
    return list(reader.read(enumerate(rows, start=1))), reader.left_out


def to_problems(rows: list[Row], source: str = "the rows") -> list[Row]:
    """Returns problems as `{"id", "question", "answer", "gold"}`.

    Args:
        rows: GSM8K-format rows; `answer` ends in a line `#### <number>`.

    Raises:
        DataError: a row has no question, or no gold answer after `####`.
    """
    from helpers.answers import parse_gold

    problems, faults = [], []
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not question or not answer:
            faults.append(f"row {number}: question or answer is missing")
            continue
        if not isinstance(question, str) or not isinstance(answer, str):
            faults.append(f"row {number}: question or answer is not text")
            continue
        gold = parse_gold(answer)
        if gold is None:
            faults.append(f"row {number}: answer has no `#### <number>` line")
            continue
        key = str(row.get("id") or fingerprint(question))
        problems.append(
            {"id": key, "question": question, "answer": answer, "gold": str(gold)}
        )
    if faults:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows)} rows are no problems with a gold "
            "answer; " + "; ".join(faults[:3])
        )
    return problems
