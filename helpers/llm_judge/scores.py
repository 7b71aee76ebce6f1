"""Mean ratings of MT-Bench, by turn and category, as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.data.formats import Row
from helpers.evaluation import stats as intervals
from helpers.evaluation.results import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Returns the mean scores of judgments: in all, by turn, by category and turn.

    Missing scores are left out and counted. `low` and `high` are a 95 % interval over
    questions: the two turns of one are no independent measurements.

    >>> row = {"question_id": 81, "category": "writing"}
    >>> rows = [{**row, "turn": 1, "score": 8.0}, {**row, "turn": 2, "score": None}]
    >>> found = summarise(rows)
    >>> found["score"], found["turn_2"], found["missing"], found["by_category"]
    (8.0, None, 1, {'writing': {'score': 8.0, 'turn_1': 8.0, 'turn_2': None}})
    """
    rated = [row for row in rows if row["score"] is not None]
    questions = defaultdict(list)
    for row in rated:
        questions[row["question_id"]].append(row["score"])
    found: dict[str, Any] = dict(means(rated))
    if questions:
        each = intervals.mean([statistics.fmean(some) for some in questions.values()])
        found |= {"low": each["low"], "high": each["high"]}
    found |= {"judged": len(rated), "missing": len(rows) - len(rated)}
    found["by_category"] = {
        name: means([row for row in rated if row["category"] == name])
        for name in dict.fromkeys(row["category"] for row in rows)
    }
    return found


def means(rated: list[Row]) -> dict[str, float | None]:
    """Returns the mean scores in all and by turn, None where there are none."""
    scores = {"score": [row["score"] for row in rated]}
    for turn in (1, 2):
        scores[f"turn_{turn}"] = [r["score"] for r in rated if r["turn"] == turn]
    return {k: round(statistics.fmean(v), 3) if v else None for k, v in scores.items()}


def by_category(parts: dict[str, dict[str, Any]]) -> dict[str, list[float | None]]:
    """Returns each category's mean scores, one a model, in the questions' order."""
    names = dict.fromkeys(n for part in parts.values() for n in part["by_category"])
    return {
        name: [p["by_category"].get(name, {}).get("score") for p in parts.values()]
        for name in names
    }


def draw_radar(parts: dict[str, dict[str, Any]], path: Path) -> Figure:
    """Draws the score of each category, a line a model, and saves the picture.

    Args:
        parts: by the model's label, from `summarise`.
        path: of a .png file.
    """
    from matplotlib.figure import Figure

    found = by_category(parts)
    angles = [2 * math.pi * n / len(found) for n in range(len(found))]
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for label, column in zip(parts, zip(*found.values(), strict=True), strict=True):
        scores = [math.nan if score is None else score for score in column]
        line = axes.plot([*angles, angles[0]], [*scores, scores[0]], "o-", label=label)
        axes.fill(angles, scores, color=line[0].get_color(), alpha=0.1)
    axes.set_xticks(angles, list(found))
    axes.set_ylim(0, 10)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.15, -0.1))
    axes.set_title("MT-Bench, mean rating of 1 to 10")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure


def show_scores(parts: dict[str, dict[str, Any]]) -> Table:
    """Returns the scores of models by category, as a table with a column a model."""
    found = by_category(parts)
    for name, key in {"turn 1": "turn_1", "turn 2": "turn_2", "all": "score"}.items():
        found[name] = [part[key] for part in parts.values()]
    rows = [
        [name, *("-" if score is None else f"{score:.2f}" for score in scores)]
        for name, scores in found.items()
    ]
    rows.append(["not rated", *(str(part["missing"]) for part in parts.values())])
    return Table(["category", *parts], rows)
