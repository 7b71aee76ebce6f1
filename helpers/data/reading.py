"""Reads many rows of a format: filters them, counts and shows what it leaves out.

Bad rows are refused by number and reason. What a format is lies in `formats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from helpers.data.formats import (
    Fields,
    Format,
    Messages,
    Row,
    check_messages,
    detect_format,
    find_format,
    is_empty,
    is_solved,
    kind_of,
    read_row,
    text_of,
)
from helpers.errors import DataError
from helpers.grpo.answers import MARKER, parse_gold, parse_number
from helpers.runs import fingerprint

PEEK = 20  # rows that the format is detected from
SHOWN = 3  # examples of what was left out, for each reason
# never a reason to refuse all
FILTERS = ("empty answer", "no answer is learnt", "over-long", "duplicate")


LeftOut = dict[str, dict[str, Any]]  # `rows`, a number, and `examples`, by reason


def leave_out(left_out: LeftOut, reason: str, example: str) -> None:
    """Counts what is left out for a reason, and keeps the first few as examples."""
    part = left_out.setdefault(reason, {"rows": 0, "examples": []})
    part["rows"] += 1
    if len(part["examples"]) < SHOWN:
        part["examples"].append(example)


@dataclass
class Reader:
    """Reads one source's rows into conversations; says afterwards how that went.

    A row may be a `DataError`, which says why the source could not read it.
    """

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
    fields: Fields = field(default_factory=Fields)
    """What became of columns and fields that the format does not need."""

    why: str = "asked for"
    """How the format was found."""
    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Conversations made of them."""
    left_out: LeftOut = field(default_factory=dict)
    """`{"rows": 3, "examples": ["row 7: ..."]}` by reason."""

    def report(self, used: int) -> Row:
        """Returns what the run's report says of the source.

        Args:
            used: how many of its rows are used.
        """
        return {
            "format": self.form,
            "why": self.why,
            "read": self.rows,
            "rows": used,
            "unused": dict(self.fields.unused),
            "adjusted": dict(self.fields.adjusted),
        }

    def read(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Messages]:
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
            samples = [row for _, row in first]
            if all(isinstance(row, DataError) for row in samples):
                raise DataError(f"{self.source}, row {first[0][0]}: {samples[0]}")
            self.form, self.why = detect_format(samples, self.source)
        form = find_format(self.form)
        for number, row in chain(first, rows):
            self.rows += 1
            try:
                messages = self.check_row(form, row)
            except DataError as error:
                self.leave_out(number, error)
                continue
            own = form.name != "gsm8k" or messages[0]["role"] == "system"
            if self.system_prompt and not own:
                if is_solved(messages[-1]["content"]):
                    first_turn = {"role": "system", "content": self.system_prompt}
                    messages.insert(0, first_turn)
                else:
                    self.fields.adjusted["no #### number, so no system prompt"] += 1
            self.kept += 1
            yield messages
        self.refuse_unusable(asked)

    def check_row(self, form: Format, row: Any) -> Messages:
        """Returns a row's messages.

        Raises:
            DataError: it is left out; the reason stands before the first colon.
        """
        if isinstance(row, DataError):
            raise row
        messages = read_row(form, row, self.fields)
        if fault := check_messages(messages):
            raise DataError(fault)
        question = next(m["content"] for m in messages if m["role"] == "user")
        opening = " ".join(question.split())[:60]
        length = sum(len(m["content"]) for m in messages)
        if self.max_chars and length > self.max_chars:
            raise DataError(f"over-long: {length:,} characters: {opening}")
        key = int(fingerprint(messages), 16)
        if key in self.seen:
            raise DataError(f"duplicate: {opening}")
        self.seen.add(key)
        return messages

    def problems(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Yields numbered rows as problems, `{"id", "question", "answer", "gold"}`.

        Raises:
            DataError: rows have no question or no gold answer and are not dropped.
        """
        self.form = "problems with a gold answer"
        golds: dict[str, str] = {}
        ids: dict[str, str] = {}
        for number, row in rows:
            self.rows += 1
            try:
                problem = to_problem(row, self.fields)
                question, gold = problem["question"], problem["gold"]
                if golds.setdefault(question, gold) != gold:
                    raise DataError(
                        f"two gold answers to one question: {gold} and "
                        f"{golds[question]}: {question[:60]}"
                    )
                if ids.setdefault(problem["id"], question) != question:
                    problem["id"] = fingerprint(question)  # pass rates go by it
            except DataError as error:
                self.leave_out(number, error)
                continue
            self.kept += 1
            yield problem
        self.refuse_unusable(False)

    def leave_out(self, number: int, error: DataError) -> None:
        """Counts a row that is left out for what an error says before a colon."""
        reason, _, details = str(error).partition(": ")
        shown = details if reason in ("duplicate", "over-long") else str(error)
        leave_out(self.left_out, reason, f"row {number}: {shown}")

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
            remedy += "; without format in the source the format is detected"
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
) -> tuple[list[Messages], LeftOut]:
    """Returns the rows as conversations, and what was left out, by reason.

    The options and the errors are those of `Reader`; rows are numbered from 1.

    >>> to_conversations([{"prompt": "Hi?", "completion": ""}] + 2 * [
    ...     {"prompt": "Hi?", "completion": "Hi."}])[1]["duplicate"]
    {'rows': 1, 'examples': ['row 3: Hi?']}
    """
    reader = Reader(source, system_prompt=system_prompt, **options)
    return list(reader.read(enumerate(rows, start=1))), reader.left_out


def to_problem(row: Any, fields: Fields) -> Row:
    """Returns a row as a problem, `{"id", "question", "answer", "gold"}`.

    Raises:
        DataError: it has no question, or no gold answer.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"a row is not an object: it is {kind_of(row)}")
    row = fields.strip(row)
    if any(is_empty(row.get(name)) for name in ("question", "answer")):
        raise DataError(
            f"question or answer is missing: the row has {', '.join(map(str, row))}"
        )
    question = text_of(row["question"], "question")
    answer = text_of(row["answer"], "answer")
    if MARKER not in answer and parse_number(answer.strip()) is not None:
        answer = f"{MARKER} {answer.strip()}"
    gold = parse_gold(answer)
    if gold is None:
        raise DataError(
            f"no gold number: the answer ends in {answer[-40:]!r}; a line "
            f"`{MARKER} <number>` or a number alone is expected"
        )
    fields.count(row, {"id", "question", "answer"})
    key = str(row.get("id") or fingerprint(question))
    return {"id": key, "question": question, "answer": answer, "gold": str(gold)}


def to_problems(rows: Iterable[Any], source: str = "the rows") -> list[Row]:
    """Returns the rows as problems; the errors are those of `Reader.problems`."""
    return list(Reader(source).problems(enumerate(rows, start=1)))
