"""What people said of two models' answers, blind: kept, counted, with intervals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.evaluation.results import STAGES, Table, percent
from helpers.llm_judge.pairwise import Pair, count_wins, read_pairs
from helpers.runs import Run, fingerprint

MARKS = ("coherent", "relevant", "creative", "biased")


def key_of(pair: Pair) -> str:
    """Returns what a rating belongs to: the question and both answers as they are."""
    return fingerprint(pair.question, pair.first["output"], pair.second["output"])


def path_of(run: Run, models: tuple[str, str]) -> Path:
    """Returns where the ratings of two models lie, a line a pair."""
    return run.path / "blind" / f"{'_'.join(models)}.jsonl"


def choose_pairs(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """Returns pairs to rate, drawn by the seed from those whose answers differ.

    A larger count adds pairs and keeps the former ones.
    """
    differ = [p for p in pairs if p.first["output"] != p.second["output"]]
    random.Random(seed).shuffle(differ)
    return differ[:count]


def on_side_a(pair: Pair, seed: int) -> str:
    """Returns which model's answer is shown as A: `first` or `second`."""
    return random.Random(f"{seed} {pair.id}").choice(("first", "second"))


def read_ratings(
    run: Run, models: tuple[str, str], part: str | None = None
) -> list[Row]:
    """Returns the ratings of answers as they are now; empty where nobody has rated.

    Ratings of answers that a later training replaced stay in the file, uncounted.

    Raises:
        MissingInput: a model has not been evaluated.
    """
    path = path_of(run, models)
    now = {key_of(pair) for pair in read_pairs(run, models, part)}
    rows = data.read_rows(path) if path.exists() else []
    return [row for row in rows if row["answers"] in now]


def count(ratings: list[Row], models: tuple[str, str]) -> dict[str, Any]:
    """Returns the second model's wins and each model's marks, with 95 % intervals.

    `wins` is a share of the decided pairs, ties apart; `a_wins` says how often side A
    won them, which should be about half.

    >>> row = {"winner": "second", "verdict": "A",
    ...        "marks": {"first": [], "second": ["coherent"]}}
    >>> counts = count([row, row], ("base", "sft"))
    >>> percent(counts["wins"]), counts["ties"], counts["a_wins"]["k"]
    ('2/2 = 100.0 % [34.2, 100.0]', 0, 2)
    >>> percent(counts["marks"]["coherent"]["base"])
    '0/2 = 0.0 % [0.0, 65.8]'
    """
    from helpers.evaluation.stats import proportion

    decided = [row["verdict"] for row in ratings if row["verdict"] != "tie"]
    marks = {
        mark: {
            label: proportion(
                sum(mark in row["marks"][which] for row in ratings), len(ratings)
            )
            for label, which in zip(models, ("first", "second"), strict=True)
        }
        for mark in MARKS
        if ratings
    }
    a_wins = proportion(decided.count("A"), len(decided)) if decided else None
    counts = count_wins([row["winner"] for row in ratings])
    return {"rated": len(ratings), **counts, "a_wins": a_wins, "marks": marks}


def result(run: Run, models: tuple[str, str], part: str | None = None) -> Table:
    """Returns the table of what people said so far, and writes it to the report.

    Raises:
        MissingInput: a model has not been evaluated.
    """
    counts = count(read_ratings(run, models, part), models)
    if counts["rated"]:
        former = run.report().get("blind", {})
        run.write_part(
            "blind", former | {"_".join(models): {"models": models} | counts}
        )
    return table(counts, models)


def table(counts: dict[str, Any], models: tuple[str, str]) -> Table:
    """Returns the counts of blind ratings as a table, a column a model."""
    first, second = (STAGES.get(label, label) for label in models)
    wins = counts["wins"]
    rows = []
    if wins:
        lost = f"{counts['losses']}/{wins['n']}"
        rows.append(["better, of the decided", lost, percent(wins)])
    for mark, found in counts["marks"].items():
        rows.append([mark, *(percent(found[label]) for label in models)])
    notes = [f"{counts['rated']} pairs rated blind, {counts['ties']} about the same"]
    if counts["a_wins"]:
        notes.append(f"side A was better in {percent(counts['a_wins'])} of the decided")
    return Table(["by people", first, second], rows, notes)
