"""An ipywidgets form over a config: edit, validate, save; works headless too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.config import ConfigError, RunConfig, changed
from helpers.runs import Run, save_run

if TYPE_CHECKING:
    import ipywidgets

# the knobs that people turn, by group: path into the config, label
KNOBS: dict[str, dict[str, str]] = {
    "model": {"model": "base model", "max_length": "max length, tokens"},
    "data": {
        "data__train_rows": "train rows, at most",
        "data__test_rows": "test problems",
        "seed": "seed",
    },
    "LoRA": {"lora__r": "rank", "lora__lora_alpha": "alpha"},
    "SFT": {
        "sft__max_steps": "steps",
        "sft__learning_rate": "learning rate",
        "sft__per_device_train_batch_size": "rows a micro-batch",
        "sft__gradient_accumulation_steps": "micro-batches a step",
    },
    "GRPO": {
        "grpo__max_steps": "steps",
        "grpo__learning_rate": "learning rate",
        "grpo__num_generations": "answers a prompt",
        "grpo__max_completion_length": "answer length, tokens",
    },
}

OPTIONAL = {"data__train_rows", "data__test_rows"}  # empty = all


class Panel:
    """A form over the run's config; *Save* writes `config.json` and says so.

    Attributes:
        run: the run as last saved.
        fields: the widgets, by their path into the config.
    """

    def __init__(self, run: Run) -> None:
        import ipywidgets as widgets

        self.run = run
        values = run.config.model_dump()
        self.fields: dict[str, ipywidgets.Widget] = {}
        boxes = []
        for group, knobs in KNOBS.items():
            rows = [widgets.HTML(f"<b>{group}</b>")]
            for path, label in knobs.items():
                self.fields[path] = widgets.Text(
                    value=show(read(values, path)),
                    description=label,
                    continuous_update=False,
                    style={"description_width": "150px"},
                    layout={"width": "330px"},
                )
                self.fields[path].observe(self.check, names="value")
                rows.append(self.fields[path])
            boxes.append(widgets.VBox(rows, layout={"margin": "0 16px 8px 0"}))
        self.message = widgets.HTML()
        self.button = widgets.Button(description="Save", button_style="primary")
        self.button.on_click(lambda _: self.save())
        self.widget = widgets.VBox(
            [
                widgets.HBox(boxes, layout={"flex_flow": "row wrap"}),
                widgets.HBox([self.button, self.message]),
            ]
        )
        self.check()

    @property
    def config(self) -> RunConfig:
        """The config that the form shows.

        Raises:
            ConfigError: a field holds what the config does not take.
        """
        edited = {}
        before = self.run.config.model_dump()
        for path, field in self.fields.items():
            old = read(before, path)
            if field.value.strip() != show(old):
                edited[path] = parse(field.value, old, path)
        return changed(self.run.config, **edited)

    def check(self, *_: Any) -> bool:
        """Shows under the form what is wrong, or what a step holds."""
        import html

        try:
            config = self.config
        except ConfigError as error:
            self.message.value = f"<b>Not saved:</b> {html.escape(str(error))}"
            self.button.disabled = True
            return False
        rows = config.sft.get("per_device_train_batch_size", 8)
        batch = rows * config.sft.get("gradient_accumulation_steps", 1)
        self.message.value = f"{batch} rows an optimiser step"
        self.button.disabled = False
        return True

    def save(self) -> Run:
        """Writes the config to the run folder and returns the run."""
        self.run = save_run(self.config)
        self.message.value = f"saved to {self.run.path / 'config.json'}"
        return self.run

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def read(values: dict[str, Any], path: str) -> Any:
    """Returns the value at a path like `sft__max_steps`, None when there is none."""
    for key in path.split("__"):
        values = values.get(key) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def show(value: Any) -> str:
    """Returns a value as the form shows it; nothing for None."""
    return "" if value is None else str(value)


def parse(text: str, old: Any, path: str) -> Any:
    """Returns what a field's text means, by the type it replaces.

    >>> parse("1e-3", 2e-4, "sft__learning_rate"), parse("", 5, "data__train_rows")
    (0.001, None)

    Raises:
        ConfigError: the text is no number where one is expected.
    """
    text, where = text.strip(), path.replace("__", ".")
    if isinstance(old, str):
        return text
    if not text and path in OPTIONAL:
        return None
    kind = "a number" if isinstance(old, float) else "a whole number"
    try:
        value = float(text) if isinstance(old, float) else int(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is not {kind}") from None
    if path.partition("__")[0] in ("lora", "sft", "grpo") and not 0 < value < 1e9:
        raise ConfigError(f"{where}: {text} found, {kind} above 0 expected")
    return value


def form(run: Run) -> Panel:
    """Returns the form over a run's config; display it by naming it last in a cell."""
    return Panel(run)
