"""A blind comparison by people: which of two answers is better, what each is like.

A seed decides which model stands on which side; the form shows no model's name. Every
verdict is written at once, and a later session goes on where one stopped.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.llm_judge.pairwise import Pair, read_pairs
from helpers.runs import Run
from helpers.widgets.ratings import MARKS, choose_pairs, key_of, on_side_a, path_of

if TYPE_CHECKING:
    import ipywidgets

MARK_KEYS = {"A": "qwer", "B": "asdf"}
VERDICTS = {"A": "A is better", "B": "B is better", "tie": "about the same"}
VERDICT_KEYS = {"1": "A", "2": "B", "3": "tie"}
BACK_KEY = "0"
ANSWER = (
    "white-space:pre-wrap;overflow:auto;max-height:320px;line-height:1.45;"
    "padding:8px;border:1px solid rgba(128,128,128,.45);overflow-wrap:anywhere"
)


class Blind:
    """A form over pairs of answers, for mouse and keyboard; works headless.

    The keys work in the field below the buttons: each acts as it is typed.

    Attributes:
        pairs: to rate, in the order of the form.
        ratings: by `key_of` their pair; those of answers that changed stay in the file.
        verdicts: the three buttons, by `A`, `B` and `tie`.
        marks: the boxes, by side and mark.
    """

    def __init__(
        self, run: Run, models: tuple[str, str], pairs: list[Pair], seed: int
    ) -> None:
        import ipywidgets as widgets

        self.path, self.pairs, self.seed = path_of(run, models), pairs, seed
        self.ratings = self.read()
        self.place, self.typed = 0, ""

        self.status, self.question = widgets.HTML(), widgets.HTML()
        self.texts = {side: widgets.HTML() for side in MARK_KEYS}
        self.marks: dict[tuple[str, str], ipywidgets.Checkbox] = {}
        columns = [self.add_side(side) for side in MARK_KEYS]
        self.verdicts: dict[str, ipywidgets.Button] = {}
        for key, verdict in VERDICT_KEYS.items():
            button = widgets.Button(description=f"{VERDICTS[verdict]} ({key})")
            button.on_click(lambda _, verdict=verdict: self.rate(verdict))
            self.verdicts[verdict] = button
        self.back = widgets.Button(description=f"back ({BACK_KEY})")
        self.back.on_click(lambda _: self.go_back())
        self.keys = widgets.Text(
            description="keys",
            placeholder="click here and type 1, 2 or 3 (marks: q w e r, a s d f)",
            layout={"width": "480px", "max_width": "99%"},
        )
        self.keys.observe(lambda change: self.type_keys(change.new), names="value")
        wrapped = {"flex_flow": "row wrap"}
        self.widget = widgets.VBox(
            [
                self.status,
                self.question,
                widgets.HBox(columns, layout=wrapped),
                widgets.HBox([*self.verdicts.values(), self.back], layout=wrapped),
                self.keys,
            ]
        )
        self.show(self.next_place())

    def add_side(self, side: str) -> ipywidgets.Widget:
        """Returns the column of a side: its answer and a box for each mark."""
        import ipywidgets as widgets

        for mark, key in zip(MARKS, MARK_KEYS[side], strict=True):
            box = widgets.Checkbox(description=f"{mark} ({key})", indent=False)
            box.layout.width = "110px"
            self.marks[side, mark] = box
        boxes = [self.marks[side, mark] for mark in MARKS]
        row = widgets.HBox(boxes, layout={"flex_flow": "row wrap"})
        layout = {"flex": "1 1 0%", "min_width": "280px", "margin": "0 8px 0 0"}
        return widgets.VBox([self.texts[side], row], layout=layout)

    def read(self) -> dict[str, Row]:
        """Returns the ratings of the file, by what they belong to."""
        rows = data.read_rows(self.path) if self.path.exists() else []
        return {row["answers"]: row for row in rows}

    def next_place(self) -> int:
        """Returns the place of the first pair without a rating, or their number."""
        places = range(len(self.pairs))
        unrated = (n for n in places if key_of(self.pairs[n]) not in self.ratings)
        return next(unrated, len(self.pairs))

    def show(self, place: int) -> None:
        """Shows a pair, with its marks if it has been rated before."""
        self.place = place
        done = sum(key_of(pair) in self.ratings for pair in self.pairs)
        self.status.value = f"{done} of {len(self.pairs)} rated"
        over = place == len(self.pairs)
        for button in self.verdicts.values():
            button.disabled = over
        self.back.disabled = place == 0
        if over:
            rated = "<b>Every pair is rated.</b> Run the next cell."
            same = "Both models gave the same answers: there is nothing to compare."
            self.question.value = rated if self.pairs else same
            for text in self.texts.values():
                text.value = ""
            self.set_marks({})
            return
        pair = self.pairs[place]
        said = f"<b>{html.escape(pair.question)}</b>"
        gold = f"<br>expected: {html.escape(pair.gold)}" if pair.gold else ""
        self.question.value = f'<div style="line-height:1.45">{said}{gold}</div>'
        for side, which in self.sides().items():
            output = html.escape(getattr(pair, which)["output"])
            self.texts[
                side
            ].value = f'<b>{side}</b><div tabindex="0" style="{ANSWER}">{output}</div>'
        self.set_marks(self.ratings.get(key_of(pair), {}).get("marks", {}))

    def sides(self) -> dict[str, str]:
        """Returns which answer of the shown pair stands on which side."""
        a = on_side_a(self.pairs[self.place], self.seed)
        return {"A": a, "B": "second" if a == "first" else "first"}

    def set_marks(self, marks: dict[str, list[str]]) -> None:
        """Ticks the boxes of the shown pair: marks by `first` and `second`."""
        sides = self.sides() if marks else {}
        for (side, mark), box in self.marks.items():
            box.value = mark in marks.get(sides.get(side, ""), [])

    def rate(self, verdict: str) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next.

        Args:
            verdict: `A`, `B` or `tie`.
        """
        if self.place == len(self.pairs):
            return
        pair, sides = self.pairs[self.place], self.sides()
        given = {
            which: [mark for mark in MARKS if self.marks[side, mark].value]
            for side, which in sides.items()
        }
        rating: Row = {
            "id": pair.id,
            "answers": key_of(pair),
            "verdict": verdict,
            "winner": sides.get(verdict, "tie"),
            "marks": given,
        }
        # read anew: the form may be open a second time
        self.ratings = self.read() | {rating["answers"]: rating}
        data.write_rows(self.path, list(self.ratings.values()))
        self.show(self.next_place())

    def go_back(self) -> None:
        """Shows the pair before; a new verdict on it replaces the old one."""
        if self.place:
            self.show(self.place - 1)

    def type_keys(self, text: str) -> None:
        """Acts on the keys that were typed since the last call."""
        new = text.removeprefix(self.typed) if text.startswith(self.typed) else ""
        self.typed = text
        for key in new.lower():
            if key in VERDICT_KEYS:
                self.rate(VERDICT_KEYS[key])
            elif key == BACK_KEY:
                self.go_back()
            for side, keys in MARK_KEYS.items():
                if key in keys:
                    box = self.marks[side, MARKS[keys.index(key)]]
                    box.value = not box.value

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def form(
    run: Run,
    models: tuple[str, str],
    part: str | None = None,
    *,
    count: int = 20,
    seed: int | None = None,
) -> Blind:
    """Returns the form over pairs of two models' answers; name it last in a cell.

    Args:
        run: with both models evaluated.
        models: two labels, `base` and `sft` say.
        part: a held-out set; by default the first that both have answered.
        count: of pairs; those whose answers are the same are never shown.
        seed: draws pairs and sides; the run's by default.

    Raises:
        DataError: the models answered no question in common.
        MissingInput: a model has not been evaluated.
    """
    seed = run.config.seed if seed is None else seed
    pairs = read_pairs(run, models, part)
    chosen = choose_pairs(pairs, count, seed)
    return Blind(run, models, chosen, seed)
