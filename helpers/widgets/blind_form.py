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
from helpers.evaluation.results import percent
from helpers.evaluation.stats import proportion
from helpers.llm_judge.pairwise import SWAPPED, count_wins, read_pairs
from helpers.runs import Run, fingerprint

MARKS = ("coherent", "relevant", "creative", "biased")
VERDICTS = {"A": "A is better", "B": "B is better", "tie": "about the same"}
TEXT = '<div style="white-space:pre-wrap;line-height:1.45">{}</div>'


def read_ratings(path: Path) -> dict[str, Row]:
    """Returns the ratings of a file by the fingerprint of what was rated."""
    rows = read_rows(path) if path.exists() else []
    return {row["answers"]: row for row in rows}


class BlindForm:
    """The form over the rows of `read_pairs`; works without a browser.

    Attributes:
        pairs: to rate, in the order of the form.
        place: of the pair that is shown; their number when all are rated.
        texts: the answers, by side.
        marks: the tick boxes, by side and mark.
        verdicts: the buttons, by `A`, `B` and `tie`.
    """

    def __init__(self, path: Path, pairs: list[Row], seed: int) -> None:
        self.path, self.pairs, self.seed = path, pairs, seed
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
        column = {"flex": "1 1 280px", "margin": "0 8px 0 0"}
        columns = [
            widgets.VBox(
                [self.texts[s], *(self.marks[s, m] for m in MARKS)], layout=column
            )
            for s in "AB"
        ]
        self.widget = widgets.VBox(
            [
                self.question,
                widgets.HBox(columns, layout={"flex_flow": "row wrap"}),
                widgets.HBox([*self.verdicts.values()]),
            ]
        )
        self.show()

    def show(self) -> None:
        """Shows the first pair without a rating."""
        ratings = read_ratings(self.path)
        rated = [pair["answers"] in ratings for pair in self.pairs]
        self.place = rated.index(False) if False in rated else len(rated)
        message = f"{sum(rated)} of {len(rated)} rated"
        for box in self.marks.values():
            box.value = False
        for button in self.verdicts.values():
            button.disabled = self.place == len(rated)
        if self.place == len(rated):
            message += ". <b>Every pair is rated.</b> Run the next cell."
            self.texts["A"].value = self.texts["B"].value = ""
        else:
            pair = self.pairs[self.place]
            gold = f"\nexpected: {pair['gold']}" if pair["gold"] else ""
            message += TEXT.format(html.escape(f"\n{pair['question']}{gold}"))
            for side, model in self.sides().items():
                answer = TEXT.format(html.escape(pair[f"output_{model}"]))
                self.texts[side].value = f"<b>{side}</b>{answer}"
        self.question.value = message

    def sides(self) -> dict[str, str]:
        """Returns which answer of the shown pair, `first` or `second`, is on a side."""
        draw = random.Random(f"{self.seed} {self.pairs[self.place]['id']}")
        model = draw.choice(("first", "second"))
        return {"A": model, "B": SWAPPED[model]}

    def rate(self, verdict: str) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next."""
        if self.place == len(self.pairs):
            return
        pair, sides = self.pairs[self.place], self.sides()
        marks = {
            model: [mark for mark in MARKS if self.marks[side, mark].value]
            for side, model in sides.items()
        }
        rating = {"id": pair["id"], "answers": pair["answers"], "verdict": verdict}
        rating |= {"winner": sides.get(verdict, "tie"), "marks": marks}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rating) + "\n")
        self.show()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


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


def rate_blind(
    run: Run,
    models: tuple[str, str],
    part: str | None = None,
    *,
    count: int = 20,
    seed: int | None = None,
) -> BlindForm:
    """Returns the form over pairs of two models' answers; name it last in a cell.

    Args:
        run: with both models evaluated.
        models: two labels, `base` and `sft` say.
        part: a held-out set; by default the first that both have answered.
        count: of pairs; those whose answers are the same are never shown.
        seed: draws pairs and sides; the run's by default.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`; all answers are the same.
    """
    seed = run.config.seed if seed is None else seed
    path, pairs = open_pairs(run, models, part)
    different = [p for p in pairs if p["output_first"] != p["output_second"]]
    random.Random(seed).shuffle(different)
    return BlindForm(path, different[:count], seed)


def blind_results(
    run: Run, models: tuple[str, str], part: str | None = None
) -> pd.DataFrame:
    """Returns what people said so far, a column per model; writes it to the report.

    Ratings of answers that a later training run replaced stay in the file, uncounted.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """
    path, pairs = open_pairs(run, models, part)
    current = {pair["answers"] for pair in pairs}
    ratings = [r for key, r in read_ratings(path).items() if key in current]
    counts: dict[str, Any] = {"models": models, "rated": len(ratings)}
    counts |= count_wins(row["winner"] for row in ratings)
    sides = [row["verdict"] for row in ratings if row["verdict"] != "tie"]
    counts["a_wins"] = proportion(sides.count("A"), len(sides)) if sides else None
    columns = list(zip(models, ("first", "second"), strict=True))
    counts["marks"] = {
        mark: {
            label: proportion(sum(mark in r["marks"][m] for r in ratings), len(ratings))
            for label, m in columns
        }
        for mark in (MARKS if ratings else ())
    }
    table = pd.DataFrame(index=pd.Index([], name="by people"), columns=models)
    if not ratings:
        return table
    run.write_part("blind", run.report().get("blind", {}) | {path.stem: counts})
    if wins := counts["wins"]:
        losses = f"{counts['losses']}/{wins['n']}"
        table.loc["wins (ties excluded)"] = [losses, percent(wins)]
        table.loc["wins on side A"] = ["", percent(counts["a_wins"])]
    for mark, shares in counts["marks"].items():
        table.loc[mark] = [percent(share) for share in shares.values()]
    table.loc["rated pairs"] = [len(ratings)] * 2
    table.loc["about the same"] = [counts["ties"]] * 2
    return table
