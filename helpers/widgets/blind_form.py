"""A blind comparison by people: which of two answers is better, what each is like."""

from __future__ import annotations

import html
import json
import random
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from helpers.data.formats import Row
from helpers.evaluation.metrics import proportion
from helpers.evaluation.tables import percent
from helpers.files import fingerprint, read_rows
from helpers.llm_judge.pairwise import CELL, count_wins, read_pairs
from helpers.runs import Run

ORDER = ("first", "second")  # of the models
MARKS = ("coherent", "relevant", "creative", "biased")
VERDICTS = {"A": "A is better", "B": "B is better", "tie": "about the same"}


def open_pairs(run: Run, models: tuple[str, str]) -> tuple[Path, list[Row]]:
    """Returns the file of two models' ratings, and the pairs with their fingerprint."""
    pairs = read_pairs(run, models)[1].to_dict("records")
    for pair in pairs:
        outputs = pair["output_first"], pair["output_second"]
        pair["answers"] = fingerprint(pair["question"], *outputs)
    return run.path / "blind" / f"{'_'.join(models)}.jsonl", pairs


def read_ratings(path: Path) -> dict[str, Row]:
    """Returns the last rating of each pair, by the fingerprint of its answers."""
    rows = read_rows(path) if path.exists() else []
    return {row["answers"]: row for row in rows}


class BlindForm(widgets.VBox):
    """A form over pairs of two models' answers; name it last in a cell.

    Every rating is saved at once, and a later session goes on where one stopped.

    Args:
        run: with both models evaluated; its seed draws pairs and sides.
        models: two labels, `base` and `sft` say.
        count: of pairs; those whose answers are the same are never shown.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """

    def __init__(self, run: Run, models: tuple[str, str], count: int = 20) -> None:
        self.path, pairs = open_pairs(run, models)
        pairs = [p for p in pairs if p["output_first"] != p["output_second"]]
        self.seed, self.place = run.config.seed, 0
        random.Random(self.seed).shuffle(pairs)
        self.pairs = pairs[:count]
        self.question = widgets.HTML()
        self.texts = {side: widgets.HTML() for side in "AB"}
        self.marks: dict[str, dict[str, widgets.Checkbox]] = {}
        self.verdicts = {v: widgets.Button(description=VERDICTS[v]) for v in VERDICTS}
        for verdict, button in self.verdicts.items():
            button.on_click(lambda _, verdict=verdict: self.rate(verdict))
        columns = []
        for side, text in self.texts.items():
            boxes = [widgets.Checkbox(description=m, indent=False) for m in MARKS]
            self.marks[side] = dict(zip(MARKS, boxes, strict=True))
            columns.append(widgets.VBox([text, *boxes], layout={"flex": "1 1 280px"}))
        answers = widgets.HBox(columns, layout={"flex_flow": "row wrap"})
        buttons = widgets.HBox([*self.verdicts.values()])
        super().__init__([self.question, answers, buttons])
        self.show_next()

    def show_next(self) -> None:
        """Shows the first pair without a rating."""
        ratings = read_ratings(self.path)
        rated = [pair["answers"] in ratings for pair in self.pairs]
        over = all(rated)
        self.place = len(rated) if over else rated.index(False)
        for box in [*self.marks["A"].values(), *self.marks["B"].values()]:
            box.value = False
        for button in self.verdicts.values():
            button.disabled = over
        text, texts = "Every pair is rated, or both models gave the same answers.", {}
        if not over:
            pair = self.pairs[self.place]
            text = pair["question"]
            text += f"\nexpected: {pair['gold']}" if pair["gold"] else ""
            texts = {s: pair[f"output_{model}"] for s, model in self.sides().items()}
        text = f"{sum(rated)} of {len(rated)} rated\n\n{text}"
        self.question.value = CELL.format(html.escape(text))
        for side, field in self.texts.items():
            answer = CELL.format(html.escape(texts.get(side, "")))
            field.value = f"<b>{side}</b>{answer}"

    def sides(self) -> dict[str, str]:
        """Returns the model on each side of the shown pair: `first` or `second`."""
        draw = random.Random(f"{self.seed} {self.pairs[self.place]['id']}")
        return dict(zip("AB", draw.sample(ORDER, 2), strict=True))

    def rate(self, verdict: str) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next."""
        pair, sides = self.pairs[self.place], self.sides()
        rating = {"id": pair["id"], "answers": pair["answers"], "verdict": verdict}
        rating["winner"] = sides.get(verdict, "tie")
        rating["marks"] = {
            model: [mark for mark, box in self.marks[side].items() if box.value]
            for side, model in sides.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rating) + "\n")
        self.show_next()


def blind_results(run: Run, models: tuple[str, str]) -> pd.DataFrame:
    """Returns what people said so far, a column per model; writes it to the report.

    Ratings of answers that a later training run replaced stay in the file, uncounted.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """
    path, pairs = open_pairs(run, models)
    current = read_ratings(path)
    ratings = [current[p["answers"]] for p in pairs if p["answers"] in current]
    if not ratings:
        return pd.DataFrame(columns=models)
    counts = count_wins(row["winner"] for row in ratings)
    rows, wins = {}, counts["wins"]
    if wins:
        lost = f"{counts['losses']}/{wins['n']}"
        rows["wins (ties excluded)"] = [lost, percent(wins)]
    marks = {}
    for mark in MARKS:
        marked = [sum(mark in row["marks"][m] for row in ratings) for m in ORDER]
        marks[mark] = [proportion(k, len(ratings)) for k in marked]
        rows[mark] = [percent(share) for share in marks[mark]]
    rows |= {"rated pairs": [str(len(ratings))] * 2, "ties": [str(counts["ties"])] * 2}
    counts |= {"models": models, "rated": len(ratings), "marks": marks}
    run.write_part("blind", {**run.report().get("blind", {}), path.stem: counts})
    return pd.DataFrame.from_dict(rows, orient="index", columns=models)
