"""Forms over answers: a chat with base and tuned model, and a blind comparison."""

import html
import json
import random
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets as widgets
import pandas as pd

from helpers.config import RunConfig
from helpers.data.formats import Messages, Row, ask
from helpers.errors import ModelError
from helpers.evaluation.metrics import proportion
from helpers.evaluation.tables import percent
from helpers.files import fingerprint, read_rows
from helpers.inference.chat import START
from helpers.inference.generation import stream_answer
from helpers.llm_judge.pairwise import CELL, count_wins, read_pairs
from helpers.runs import Run, writes
from helpers.widgets.config_form import STYLE, remark

COLUMN = """<b>{}</b><div style="display:flex;flex-direction:column-reverse;
max-height:400px;overflow:auto"><div style="white-space:pre-wrap;line-height:1.4;
overflow-wrap:anywhere">{}</div></div><i>{}</i>"""
REDRAW = 3  # tokens; a redraw sends all turns, and Jupyter's server drops over 1 MB a s
ORDER = ("first", "second")  # of the models
NOTES = ("coherent", "relevant", "creative", "biased")
CHOICES = ("A is better", "B is better", "about the same")


class ChatForm(widgets.VBox):
    """The form: name it last in a cell to display it; it closes the one of before.

    Args:
        model, tokenizer: with an adapter, which is turned off when the base answers.
        config: its `inference` and `system_prompt` are the first values of the fields.

    Raises:
        ModelError: the model has no adapter.
    """

    opened: ClassVar["ChatForm | None"] = None

    def __init__(self, model: Any, tokenizer: Any, config: RunConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        if not hasattr(model, "disable_adapter"):
            raise ModelError("the model has no adapter: give `load_model` the run's")
        if former := ChatForm.opened:  # ipywidgets would keep it, and it the model
            former.clear()
            former.model = None
            former.close()
        self.halt, self.worker = threading.Event(), threading.Thread()
        self.worker.start()  # and has ended
        self.sampling = START | config.inference
        self.sliders = {
            "temperature": widgets.FloatSlider(max=2, step=0.05),
            "top_p": widgets.FloatSlider(max=1, step=0.05),
            "max_new_tokens": widgets.IntSlider(min=1, max=1024),
        }
        for name, slider in self.sliders.items():
            slider.max, slider.description = max(slider.max, self.sampling[name]), name
            slider.value = self.sampling[name]
        self.system = widgets.Textarea(config.system_prompt, description="system")
        self.message = widgets.Textarea(description="message")
        for field in (*self.sliders.values(), self.system, self.message):
            field.layout = {"flex": "1 1 300px", "min_width": "0"}
            field.style.description_width = "115px"
            field.continuous_update = False
        layout = {"flex": "1 1 280px", "min_width": "0"}
        self.columns = {name: widgets.HTML(layout=layout) for name in ("base", "tuned")}
        self.alone = widgets.Checkbox(description="tuned model alone", indent=False)
        shown = (self.columns["base"].layout, "display")
        widgets.dlink((self.alone, "value"), shown, lambda on: "none" if on else "flex")
        calls = {"Send": self.start, "Stop": self.stop, "New conversation": self.clear}
        self.buttons = {name: widgets.Button(description=name) for name in calls}
        for name, button in self.buttons.items():
            button.on_click(calls[name])
        self.status = widgets.HTML()
        rows = [self.sliders.values(), [self.system], self.columns.values()]
        rows += [[self.message], [*self.buttons.values(), self.alone]]
        rows += [[self.status, widgets.HTML(STYLE)]]
        wrap = {"flex_flow": "row wrap"}
        super().__init__([widgets.HBox([*row], layout=wrap) for row in rows])
        self.clear()
        ChatForm.opened = self

    def send(self, text: str) -> dict[str, Messages]:
        """Returns `turns`, both conversations; ModelError with what the form says."""
        self.worker.join()
        self.halt.clear()
        if fault := self.answer(text):
            raise ModelError(fault)
        return self.turns

    def start(self, _: Any) -> None:
        if self.worker.is_alive():
            text = "an answer is being written: wait for it, or press Stop"
            self.status.value = remark("error", text)
        elif text := self.message.value.strip():
            self.halt.clear()
            self.worker = threading.Thread(target=self.answer, args=[text], daemon=True)
            self.worker.start()

    def answer(self, text: str) -> str:
        self.message.value = self.status.value = fault = ""
        sampling = self.sampling | {n: s.value for n, s in self.sliders.items()}
        try:
            for label in ["tuned"] if self.alone.value else ["tuned", "base"]:
                if not self.halt.is_set():
                    self.add_answer(label, ask(text, self.system.value), sampling)
        except Exception as error:  # whatever the model raises
            fault = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
            if "memory" in str(error):
                fault += "; lower max_new_tokens, or start a new conversation"
            self.message.value, self.status.value = text, remark("error", fault)
        return fault

    def add_answer(self, label: str, prompt: Messages, sampling: dict) -> None:
        answer = {"role": "assistant", "content": ""}
        turns = [*self.turns[label], prompt[-1], answer]
        messages = [*prompt[:-1], *turns[:-1]]
        count, start = 0, time.perf_counter()
        self.show(label, turns, "is answering ...")
        work = self.model, self.tokenizer, messages, sampling, label == "tuned"
        try:
            for count, text in enumerate(stream_answer(*work), start=1):
                answer["content"], self.turns[label] = text, turns
                if count % REDRAW == 1:
                    self.show(label, turns, "is answering ...")
                if self.halt.is_set():
                    break
            self.turns[label] = turns
        finally:
            rate = count / (time.perf_counter() - start)
            self.show(label, self.turns[label], f"{count} tokens, {rate:.1f} tokens/s")

    def show(self, label: str, turns: Messages, note: str) -> None:
        cells = (f"<b>{t['role']}</b>\n{html.escape(t['content'])}\n\n" for t in turns)
        self.columns[label].value = COLUMN.format(label, "".join(cells), note)

    def stop(self, _: Any = None) -> None:
        self.halt.set()
        self.worker.join()

    def clear(self, _: Any = None) -> None:
        self.stop()
        self.status.value = ""
        self.turns: dict[str, Messages] = {label: [] for label in self.columns}
        for label in self.turns:
            self.show(label, [], "")


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
        narrow: Any = {"layout": {"width": "auto", "max_width": "150px"}}
        box = partial(widgets.Checkbox, indent=False, **narrow)
        self.marks = [[box(description=mark) for mark in NOTES] for _ in "AB"]
        self.verdicts = [widgets.Button(description=v, **narrow) for v in CHOICES]
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
        count = len(self.pairs)
        texts[0] = f"{count - len(rest)} of {count} rated\n\n{texts[0]}"
        for field, text in zip(self.texts, texts, strict=True):
            field.value = CELL.format(html.escape(text))
        for box in self.marks[0] + self.marks[1]:
            box.value = False
        for button in self.verdicts:
            button.disabled = not rest

    def rate(self, button: widgets.Button) -> None:
        """Saves a verdict on the shown pair, with its marks, and shows the next."""
        pair = next(pair for pair in self.pairs if not pair["rating"])
        winner = dict(zip(CHOICES, pair["sides"], strict=False))  # else a tie
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
    for mark in NOTES:
        marked = [sum(mark in row["marks"][m] for row in ratings) for m in ORDER]
        counts["marks"][mark] = [proportion(k, len(ratings)) for k in marked]
        rows[mark] = [percent(share) for share in counts["marks"][mark]]
    rows |= {"rated pairs": [str(len(ratings))] * 2, "ties": [str(counts["ties"])] * 2}
    run.write_part("blind", {**run.report().get("blind", {}), path.stem: counts})
    return pd.DataFrame.from_dict(rows, orient="index", columns=models)
