"""A blind comparison by people: which of two answers is better, what each is like.

A seed decides which model stands on which side; the form shows no model's name. Every
rating is saved at once, and a later session goes on where one stopped.
"""

from __future__ import annotations

import html
import json
import random
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd

from helpers.data.formats import Row
from helpers.data.preparation import read_rows
from helpers.evaluation.stats import proportion
from helpers.evaluation.tables import percent
from helpers.llm_judge.pairwise import CELL, SWAPPED, count_wins, read_pairs
from helpers.runs import Run, fingerprint

MARKS = ("coherent", "relevant", "creative", "biased")
VERDICTS = {"A": "A is better", "B": "B is better", "tie": "about the same"}
SAME = "Both models gave the same answers: there is nothing to compare."


def open_pairs(
    run: Run, models: tuple[str, str], part: str | None
) -> tuple[Path, list[Row]]:
    """Returns the file of two models' ratings, and the pairs with their fingerprint."""
    _, frame = read_pairs(run, models, part)
    pairs = frame.to_dict("records")
    for pair in pairs:
        outputs = pair["output_first"], pair["output_second"]
        pair["answers"] = fingerprint(pair["question"], *outputs)
    return run.path / "blind" / f"{'_'.join(models)}.jsonl", pairs


def read_ratings(path: Path) -> dict[str, Row]:
    """Returns the last rating of each pair, by the fingerprint of its answers."""
    rows = read_rows(path) if path.exists() else []
    return {row["answers"]: row for row in rows}


class BlindForm:
    """A form over pairs of two models' answers; name it last in a cell.

    Args:
        run: with both models evaluated.
        models: two labels, `base` and `sft` say.
        part: a held-out set; by default the first that both have answered.
        count: of pairs; those whose answers are the same are never shown.
        seed: draws pairs and sides; the run's by default.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """

    def __init__(
        self,
        run: Run,
        models: tuple[str, str],
        part: str | None = None,
        *,
        count: int = 20,
        seed: int | None = None,
    ) -> None:
        self.seed = run.config.seed if seed is None else seed
        self.path, pairs = open_pairs(run, models, part)
        pairs = [p for p in pairs if p["output_first"] != p["output_second"]]
        random.Random(self.seed).shuffle(pairs)
        self.pairs, self.place = pairs[:count], 0
        self.question = widgets.HTML()
        self.texts = {side: widgets.HTML() for side in "AB"}
        self.marks = {
            (side, mark): widgets.Checkbox(description=mark, indent=False)
            for side in "AB"
            for mark in MARKS
        }
        self.verdicts = {v: widgets.Button(description=VERDICTS[v]) for v in VERDICTS}
        for verdict, button in self.verdicts.items():
            button.on_click(lambda _, verdict=verdict: self.rate(verdict))
        columns = [
            widgets.VBox([self.texts[side], *(self.marks[side, m] for m in MARKS)])
            for side in "AB"
        ]
        for column in columns:
            column.layout.flex = "1 1 280px"
        answers = widgets.HBox(columns, layout={"flex_flow": "row wrap"})
        buttons = widgets.HBox([*self.verdicts.values()])
        self.widget = widgets.VBox([self.question, answers, buttons])
        self.show()

    def show(self) -> None:
        """Shows the first pair without a rating."""
        ratings = read_ratings(self.path)
        rated = [pair["answers"] in ratings for pair in self.pairs]
        over = all(rated)
        self.place = len(rated) if over else rated.index(False)
        for box in self.marks.values():
            box.value = False
        for button in self.verdicts.values():
            button.disabled = over
        text = "Every pair is rated. Run the next cell." if rated else SAME
        texts = {"A": "", "B": ""}
        if not over:
            pair = self.pairs[self.place]
            gold = f"\nexpected: {pair['gold']}" if pair["gold"] else ""
            text = pair["question"] + gold
            texts = {s: pair[f"output_{model}"] for s, model in self.sides().items()}
        self.question.value = f"{sum(rated)} of {len(rated)} rated"
        self.question.value += CELL.format(html.escape(text))
        for side, answer in texts.items():
            self.texts[side].value = f"<b>{side}</b>{CELL.format(html.escape(answer))}"

    def sides(self) -> dict[str, str]:
        """Returns the model on each side of the shown pair: `first` or `second`."""
        draw = random.Random(f"{self.seed} {self.pairs[self.place]['id']}")
        model = draw.choice(("first", "second"))
        return {"A": model, "B": SWAPPED[model]}

    def rate(self, verdict: str) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next."""
        if self.place == len(self.pairs):
            return
        pair, sides = self.pairs[self.place], self.sides()
        rating = {"id": pair["id"], "answers": pair["answers"], "verdict": verdict}
        rating["winner"] = sides.get(verdict, "tie")
        rating["marks"] = {
            model: [mark for mark in MARKS if self.marks[side, mark].value]
            for side, model in sides.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rating) + "\n")
        self.show()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def blind_results(
    run: Run, models: tuple[str, str], part: str | None = None
) -> pd.DataFrame:
    """Returns what people said so far, a column per model; writes it to the report.

    Ratings of answers that a later training run replaced stay in the file, uncounted.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """
    path, pairs = open_pairs(run, models, part)
    current = read_ratings(path)
    ratings = [current[p["answers"]] for p in pairs if p["answers"] in current]
    count, rows = len(ratings), {}
    counts: dict[str, Any] = {"models": models, "rated": count, "a_wins": None}
    counts |= count_wins(row["winner"] for row in ratings)
    counts["marks"] = {
        mark: {
            label: proportion(sum(mark in row["marks"][m] for row in ratings), count)
            for label, m in zip(models, ("first", "second"), strict=True)
        }
        for mark in (MARKS if ratings else ())
    }
    if wins := counts["wins"]:
        on_a = sum(row["verdict"] == "A" for row in ratings)
        counts["a_wins"] = proportion(on_a, wins["n"])
        losses = f"{counts['losses']}/{wins['n']}"
        rows["wins (ties excluded)"] = [losses, percent(wins)]
        rows["wins on side A"] = ["", percent(counts["a_wins"])]
    for mark, shares in counts["marks"].items():
        rows[mark] = [percent(share) for share in shares.values()]
    if ratings:
        rows["rated pairs"] = [f"{count}"] * 2
        rows["ties"] = [f"{counts['ties']}"] * 2
        former = run.report().get("blind", {})
        run.write_part("blind", {**former, path.stem: counts})
    return pd.DataFrame.from_dict(rows, orient="index", columns=models)
