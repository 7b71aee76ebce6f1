"""Reads the numbered rows of a source into conversations or problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from helpers.data.formats import (
    Fields,
    Messages,
    Row,
    check_messages,
    detect_format,
    find_format,
    is_solved,
    read_problem,
    read_row,
)
from helpers.errors import DataError
from helpers.files import fingerprint

PEEK = 20  # rows that the format is detected from
SHOWN = 3  # examples of what was left out, for each reason
# never a reason to refuse all
FILTERS = ("empty answer", "no answer is learnt", "over-long", "duplicate")
LeftOut = dict[str, dict[str, Any]]  # `rows`, a number, and `examples`, by reason


@dataclass
class Reader:
    """Reads the numbered rows of one source; counts and shows what it leaves out.

    No row stays in memory, but about 100 bytes of each to know it again.
    """

    source: str = "the rows"  # for messages
    form: str | None = None  # the name of the format; None = detected
    system_prompt: str = ""  # put before problems, as in evaluation
    max_chars: int | None = None  # conversations with more are over-long
    drop_unusable: bool = False  # leave them out and count them, do not refuse all
    seen: set[int] = field(default_factory=set)  # hashes of other sources' rows, too
    fields: Fields = field(default_factory=Fields)

    why: str = "asked for"  # how the format was found
    rows: int = 0
    kept: int = 0
    left_out: LeftOut = field(default_factory=dict)

    def report(self, used: int) -> Row:
        """Returns the source's part of the run's report; `used` rows are used."""
        self.fields.report(self.source)
        part = {"format": self.form, "why": self.why, "read": self.rows, "rows": used}
        counts = {"unused": self.fields.unused, "adjusted": self.fields.adjusted}
        return part | {name: dict(count) for name, count in counts.items()}

    def read(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Messages]:
        """Yields the conversations of numbered rows, one by one."""
        rows = iter(rows)
        first = list(islice(rows, PEEK))
        if self.form is None:
            samples = [row for _, row in first]
            self.form, self.why = detect_format(samples, self.source)
        find_format(self.form)
        return self.convert(chain(first, rows), self.to_messages)

    def problems(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Yields numbered rows as problems, `{"id", "question", "answer", "gold"}`."""
        self.form = "problems with a gold answer"
        golds: dict[str, str] = {}
        ids: dict[str, str] = {}

        def to_problem(row: Any) -> Row:
            problem = read_problem(row, self.fields)
            question, gold, key = (problem[n] for n in ("question", "gold", "id"))
            if golds.setdefault(question, gold) != gold:
                raise DataError(
                    f"two gold answers to one question: {gold} and "
                    f"{golds[question]}: {question[:60]}"
                )
            if not key or ids.setdefault(key, question) != question:
                problem["id"] = fingerprint(question)  # pass rates go by it
            return problem

        return self.convert(rows, to_problem)

    def convert(
        self, rows: Iterable[tuple[int, Any]], function: Callable[[Any], Any]
    ) -> Iterator[Any]:
        """Yields what a function makes of each row; counts those that it refuses."""
        for number, row in rows:
            self.rows += 1
            try:
                result = function(row)
            except DataError as error:
                reason = str(error).partition(": ")[0]
                part = self.left_out.setdefault(reason, {"rows": 0, "examples": []})
                part["rows"] += 1
                if part["rows"] <= SHOWN:
                    part["examples"].append(f"row {number}: {error}")
                continue
            self.kept += 1
            yield result
        reasons = [name for name in self.left_out if name not in FILTERS]
        if not self.kept or (reasons and not self.drop_unusable):
            parts = [self.left_out[name] for name in reasons or self.left_out]
            shown = [example for part in parts for example in part["examples"]][:SHOWN]
            raise DataError(
                f"{self.source}: {sum(part['rows'] for part in parts)} of {self.rows} "
                f"rows cannot be used as {self.form}; {'; '.join(shown)} (data."
                f"drop_unusable leaves such rows out; this format: {self.why})"
            )

    def to_messages(self, row: Any) -> Messages:
        """Returns a row's messages; DataError gives the reason before a colon."""
        messages = read_row(self.form or "", row, self.fields)
        if fault := check_messages(messages):
            raise DataError(fault)
        opening = next(m["content"] for m in messages if m["role"] == "user")
        opening = " ".join(opening.split())[:60]
        length = sum(len(m["content"]) for m in messages)
        if self.max_chars and length > self.max_chars:
            raise DataError(f"over-long: {length:,} characters: {opening}")
        key = int(fingerprint(messages), 16)
        if key in self.seen:
            raise DataError(f"duplicate: {opening}")
        self.seen.add(key)
        system, is_first = self.system_prompt, messages[0]["role"] == "user"
        if self.form == "gsm8k" and system and is_first:
            if is_solved(messages[-1]["content"]):
                return [{"role": "system", "content": system}, *messages]
            self.fields.adjusted["no #### number, so no system prompt"] += 1
        return messages


def to_conversations(
    rows: Iterable[Any],
    system_prompt: str = "",
    source: str = "the rows",
    **options: Any,
) -> tuple[list[Messages], LeftOut]:
    """Returns the rows as conversations, and what was left out, by reason.

    Args:
        rows: of any format, numbered from 1 in messages.
        system_prompt: put before problems that end in `#### <number>`.
        source: what the rows are called in messages.
        options: `form`, the name of their format; `max_chars`, past which they are
            over-long; `drop_unusable`, to leave out what cannot be read.

    Raises:
        DataError: rows cannot be read and are not to be dropped, or none is left.
    """
    reader = Reader(source, system_prompt=system_prompt, **options)
    return list(reader.read(enumerate(rows, start=1))), reader.left_out


def to_problems(rows: Iterable[Any], source: str = "the rows") -> list[Row]:
    """Returns the rows as problems, with their gold numbers."""
    return list(Reader(source).problems(enumerate(rows, start=1)))
