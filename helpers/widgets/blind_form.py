"""A blind comparison by people: which of two answers is better, what each is like."""

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
from helpers.runs import Run, writes

ORDER = ("first", "second")  # of the models
MARKS = ("coherent", "relevant", "creative", "biased")
VERDICTS = ("A is better", "B is better", "about the same")


def open_pairs(run: Run, models: tuple[str, str]) -> tuple[Path, list[Row]]:
    """Returns the file of ratings, and all pairs with the last `rating` of each."""
    path = run.path / "blind" / f"{'_'.join(models)}.jsonl"
    ratings = {r["answers"]: r for r in (read_rows(path) if path.exists() else [])}
    pairs = read_pairs(run, models).to_dict("records")
    for pair in pairs:
        outputs = pair["output_first"], pair["output_second"]
        pair["answers"] = fingerprint(pair["question_first"], *outputs)
        pair["rating"] = ratings.get(pair["answers"])
    return path, pairs


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
        draw = random.Random(run.config.seed)
        draw.shuffle(pairs)
        self.pairs = [p | {"sides": draw.sample(ORDER, 2)} for p in pairs][:count]
        self.texts = [widgets.HTML() for _ in range(3)]  # of the question, A and B
        self.marks = [[widgets.Checkbox(description=m) for m in MARKS] for _ in "AB"]
        self.verdicts = [widgets.Button(description=text) for text in VERDICTS]
        for button in self.verdicts:
            button.on_click(self.rate)
        columns = zip(self.texts[1:], self.marks, self.verdicts, strict=False)
        sides = [widgets.VBox([text, *boxes, end]) for text, boxes, end in columns]
        super().__init__([self.texts[0], widgets.HBox(sides), self.verdicts[2]])
        self.show_next()

    def show_next(self) -> None:
        """Shows the first pair without a rating."""
        rest = [pair for pair in self.pairs if not pair["rating"]]
        texts = ["Every pair is rated, or both models gave the same answers.", "", ""]
        if rest:
            outputs = [rest[0][f"output_{model}"] for model in rest[0]["sides"]]
            texts = [rest[0]["title"], *outputs]
        rated = f"{len(self.pairs) - len(rest)} of {len(self.pairs)} rated\n\n"
        for field, text in zip(self.texts, [rated + texts[0], *texts[1:]], strict=True):
            field.value = CELL.format(html.escape(text))
        for box in self.marks[0] + self.marks[1]:
            box.value = False
        for button in self.verdicts:
            button.disabled = not rest

    def rate(self, button: widgets.Button) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next."""
        pair = next(pair for pair in self.pairs if not pair["rating"])
        winner = dict(zip(VERDICTS, pair["sides"], strict=False))  # else a tie
        rating: Row = {"id": pair["id"], "answers": pair["answers"], "marks": {}}
        rating["winner"] = winner.get(button.description, "tie")
        for model, boxes in zip(pair["sides"], self.marks, strict=True):
            rating["marks"][model] = [box.description for box in boxes if box.value]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rating) + "\n")
        pair["rating"] = rating
        self.show_next()


@writes
def blind_results(run: Run, models: tuple[str, str]) -> pd.DataFrame:
    """Returns what people said so far, a column per model; writes it to the report.

    Ratings of answers that a later training run replaced stay in the file, uncounted.

    Raises:
        DataError, MissingInput: see `pairwise.read_pairs`.
    """
    path, pairs = open_pairs(run, models)
    ratings = [pair["rating"] for pair in pairs if pair["rating"]]
    if not ratings:
        return pd.DataFrame(columns=models)
    counts = count_wins(row["winner"] for row in ratings)
    counts |= {"models": models, "rated": len(ratings), "marks": {}}
    rows = {}
    if wins := counts["wins"]:
        rows["wins (ties excluded)"] = [str(wins["n"] - wins["k"]), percent(wins)]
    for mark in MARKS:
        marked = [sum(mark in row["marks"][m] for row in ratings) for m in ORDER]
        counts["marks"][mark] = [proportion(k, len(ratings)) for k in marked]
        rows[mark] = [percent(share) for share in counts["marks"][mark]]
    rows |= {"rated pairs": [str(len(ratings))] * 2, "ties": [str(counts["ties"])] * 2}
    run.write_part("blind", {**run.report().get("blind", {}), path.stem: counts})
    return pd.DataFrame.from_dict(rows, orient="index", columns=models)
