"""A chat with a model as it was before training and after it, side by side."""

import html
import threading
import time
from typing import Any, ClassVar

import ipywidgets as widgets

from helpers.config import RunConfig
from helpers.data.formats import Messages, ask
from helpers.errors import ModelError
from helpers.inference.chat import START
from helpers.inference.generation import stream_answer
from helpers.widgets.config_form import remark

COLUMN = """<b>{}</b><div style="display:flex;flex-direction:column-reverse;
max-height:400px;overflow:auto"><div style="white-space:pre-wrap;line-height:1.4;
overflow-wrap:anywhere">{}</div></div><i>{}</i>"""
REDRAW = 3  # tokens; a redraw sends all turns, and Jupyter's server drops over 1 MB a s


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
            field.layout, field.style.description_width = {"flex": "1 1 300px"}, "115px"
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
        rows += [[self.message], [*self.buttons.values(), self.alone], [self.status]]
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
        messages = [*prompt[:-1], *self.turns[label], prompt[-1]]
        answer = {"role": "assistant", "content": ""}
        turns = [*self.turns[label], prompt[-1], answer]
        count, start = 0, time.perf_counter()
        self.show(label, turns, "is answering ...")
        work = self.model, self.tokenizer, messages, sampling, label == "tuned"
        try:
            for text in stream_answer(*work):
                answer["content"], count, self.turns[label] = text, count + 1, turns
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
