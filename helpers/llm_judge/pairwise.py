"""Two models' answers to the same questions: paired, decided, set side by side."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from helpers.config import HELD_OUT
from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.errors import DataError
from helpers.evaluation.results import STAGES, render
from helpers.runs import Run

METRICS = ("correct", "rougeL")
DECIDED_BY = {"correct": "right answers", "rougeL": "ROUGE-L", "judge": "a judge"}
Piece = tuple[str, bool]


class Pair(NamedTuple):
    """The answers of two models to one question, as `eval/<model>/*.jsonl` has them."""

    id: str
    question: str
    gold: str
    """What was expected: the right answer, or a reference; may be empty."""
    first: Row
    second: Row


def read_pairs(
    run: Run, models: tuple[str, str], part: str | None = None, other: Run | None = None
) -> list[Pair]:
    """Returns the questions that two models answered, with both answers.

    Args:
        run: of the first model.
        models: two labels of evaluated models, `base` and `sft` say.
        part: a held-out set; by default the first that both have answered.
        other: the run of the second model, where it is another one.

    Raises:
        DataError: the models answered no question in common, or other questions
            under the same id.
        MissingInput: a model has not been evaluated.
    """
    part = part or shared_part(run, models, other)
    first, second = (
        {row["id"]: row for row in data.read_rows(home.require(path))}
        for home, path in zip(
            (run, other or run),
            (f"eval/{label}/{part}.jsonl" for label in models),
            strict=True,
        )
    )
    found = []
    for n, row in first.items():
        if n in second:
            if row["question"] != second[n]["question"]:
                raise DataError(
                    f"{n} of {part} is another question for {models[1]} than for "
                    f"{models[0]}: the data changed between the evaluations, evaluate "
                    "both again"
                )
            gold = str(row.get("gold") or row.get("reference") or "")
            found.append(Pair(n, row["question"], gold, row, second[n]))
    if not found:
        raise DataError(f"{models[0]} and {models[1]} share no question of {part}")
    return found


def shared_part(run: Run, models: tuple[str, str], other: Run | None = None) -> str:
    """Returns the first held-out set that two models have answered, by HELD_OUT."""
    first = run.require(f"eval/{models[0]}")
    second = (other or run).require(f"eval/{models[1]}")
    for part in HELD_OUT:
        if all((folder / f"{part}.jsonl").exists() for folder in (first, second)):
            return part
    raise DataError(
        f"{models[0]} and {models[1]} answered no set in common (of "
        f"{', '.join(HELD_OUT)}): evaluate both on the same data"
    )


def find_winners(found: list[Pair], by: str) -> list[str | None]:
    """Returns whose answer is better by a value of the items: `first`, `second`, `tie`.

    None where an item lacks the value.

    Args:
        found: see `read_pairs`.
        by: a value of the items, the higher the better: `correct` or `rougeL`, say.

    >>> pair = Pair("1", "1 + 1?", "2", {"correct": False}, {"correct": True})
    >>> find_winners([pair], by="correct")
    ['second']
    """
    winners: list[str | None] = []
    for pair in found:
        a, b = pair.first.get(by), pair.second.get(by)
        if a is None or b is None:
            winners.append(None)
        else:
            winners.append("tie" if a == b else "first" if a > b else "second")
    return winners


def read_verdicts(
    run: Run, found: list[Pair], models: tuple[str, str], part: str
) -> list[str | None]:
    """Returns a judge's verdict on each pair, from the file that `duels` writes.

    None where the judge gave none, or judged answers that are others by now.

    Raises:
        MissingInput: no judge has compared these models.
    """
    path = run.require(f"eval/{models[1]}/{part}_against_{models[0]}.jsonl")
    rows = {row["id"]: row for row in data.read_rows(path)}
    winners = []
    for pair in found:
        row = rows.get(pair.id, {})
        judged = row.get("first"), row.get("second")
        now = pair.first["output"], pair.second["output"]
        winners.append(row["winner"] if judged == now else None)
    return winners


def count_wins(winners: Sequence[str | None]) -> dict[str, Any]:
    """Returns wins of the second over the first, ties apart, with a 95 % interval.

    `wins` is a share of the decided pairs, None where none is decided.

    >>> counts = count_wins(["second", "second", "first", "tie", None])
    >>> counts["wins"]["k"], counts["wins"]["n"], counts["ties"], counts["missing"]
    (2, 3, 1, 1)
    """
    from helpers.evaluation.stats import proportion

    found = Counter(winners)
    decided = found["first"] + found["second"]
    wins = proportion(found["second"], decided) if decided else None
    counts = {"losses": found["first"], "ties": found["tie"], "missing": found[None]}
    return {"wins": wins, **counts}


def word_differences(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Returns both texts in pieces: a text and whether the other lacks it.

    >>> word_differences("5 eggs left", "7 eggs left")
    ([('5', True), (' eggs left', False)], [('7', True), (' eggs left', False)])
    """
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second)]
    matcher = difflib.SequenceMatcher(str.isspace, words[0], words[1], autojunk=False)
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, *places in matcher.get_opcodes():
        for side, text, (start, end) in zip(
            sides, words, (places[:2], places[2:]), strict=True
        ):
            if end > start:
                side.append(("".join(text[start:end]), kind != "equal"))
    return sides


@dataclass(frozen=True)
class SideBySide:
    """Pairs of answers to scroll through, with the words that differ marked."""

    names: tuple[str, str]
    pairs: list[Pair]
    winners: list[str | None]
    """Counted as a whole, whatever is shown."""
    by: str
    """What decided."""
    count: int
    """Of pairs that are shown, in the order of the held-out set."""
    only: str | None = None
    height: str = "480px"

    def summary(self) -> str:
        """Returns wins, losses and ties of the second model in words."""
        counts = count_wins(self.winners)
        if not counts["wins"] and not counts["ties"]:
            return (
                f"{self.names[0]} and {self.names[1]}: nothing decides which is better"
            )
        wins = counts["wins"]["k"] if counts["wins"] else 0
        said = f"{self.names[1]}: better than {self.names[0]} in {wins}, worse in "
        said += f"{counts['losses']}, equal in {counts['ties']} of {len(self.pairs)}"
        said += f", undecided {n}" if (n := counts["missing"]) else ""
        return f"{said}, by {DECIDED_BY.get(self.by, self.by)}"

    def shown(self) -> list[dict[str, Any]]:
        """Returns the rows to show, their answers in pieces."""
        better = {"first": self.names[0], "second": self.names[1], "tie": "equal"}
        decided = zip(self.pairs, self.winners, strict=True)
        kept = [(p, w) for p, w in decided if self.only in (None, w)]
        rows: list[dict[str, Any]] = []
        for pair, winner in kept[: self.count]:
            texts = pair.first["output"], pair.second["output"]
            row = dict(zip(("first", "second"), word_differences(*texts), strict=True))
            said = better.get(winner or "", "-")
            rows.append(
                {**row, "question": pair.question, "gold": pair.gold, "better": said}
            )
        return rows

    def __repr__(self) -> str:
        lines = [self.summary()]
        for row in self.shown():
            lines += ["", f"{row['question']} (expected: {row['gold']})"]
            for name, side in zip(self.names, ("first", "second"), strict=True):
                text = "".join(piece for piece, _ in row[side])
                lines.append(f"  {name}: {text}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return render("side_by_side.html", table=self)


def side_by_side(
    run: Run,
    models: tuple[str, str],
    part: str | None = None,
    *,
    by: str | None = None,
    count: int = 20,
    only: str | None = None,
    other: Run | None = None,
) -> SideBySide:
    """Returns two models' answers to the same questions, as a table to scroll.

    Args:
        run: of the first model.
        models: labels of two evaluated models.
        part: a held-out set; by default the first that both have answered.
        by: what decides: a value of the items, by default the first of `METRICS` that
            they have; or `judge`, whose verdicts the command `judge-pairs` writes.
        count: of pairs shown.
        only: `first`, `second` or `tie`: shows only the pairs so decided.
        other: the run of the second model, where it is another one.

    Raises:
        DataError: see `read_pairs`.
        MissingInput: see `read_pairs` and `read_verdicts`.
    """
    part = part or shared_part(run, models, other)
    found = read_pairs(run, models, part, other)
    by = by or next((name for name in METRICS if name in found[0].first), METRICS[0])
    if by == "judge":
        winners = read_verdicts(other or run, found, models, part)
    else:
        winners = find_winners(found, by)
    first, second = (STAGES.get(label, label) for label in models)
    if other:
        first, second = f"{run.config.name} {first}", f"{other.config.name} {second}"
    return SideBySide((first, second), found, winners, by, count, only)
