"""An ipywidgets form over a config: edit, validate, predict, save; headless too."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from helpers import recipes
from helpers.config import RunConfig, Source, check_config
from helpers.errors import ConfigError
from helpers.runs import Run, save_run
from helpers.widgets import summary
from helpers.widgets.knobs import (
    BY_PATH,
    KNOBS,
    default,
    hint,
    parse,
    read,
    show,
    write,
)

if TYPE_CHECKING:
    import ipywidgets

    from helpers.checks import Advice

LABEL, SHORT, LONG, WIDE = "180px", "400px", "500px", "700px"
BESIDE = {"flex": "1 1 0%", "min_width": "170px", "margin": "0 0 0 12px"}
BELOW = {"flex": "1 1 100%", "margin": "0 0 0 188px"}


class Panel:
    """A form over the run's config; *Save* writes `config.json` and says so.

    Attributes:
        run: the run as last saved.
        fields: the widgets, by their path into the config.
        notes: what stands beside each field, by the same paths.
        summary: what the config amounts to: batch, steps, parameters, memory, minutes.
    """

    def __init__(self, run: Run) -> None:
        import ipywidgets as widgets

        from helpers import gpus

        self.run = run
        self.gpu = gpus.this_gpu()
        self.fields: dict[str, ipywidgets.Widget] = {}
        self.notes: dict[str, ipywidgets.HTML] = {}
        self.recipe = widgets.Dropdown(**labelled("start from"))
        self.recipe.layout.margin = "2px 2px 8px 18px"  # as the fields' in their page
        self.tabs = widgets.Tab([self.add_group(group) for group in KNOBS])
        self.summary, self.advice, self.message = (widgets.HTML() for _ in range(3))
        self.button = widgets.Button(description="Save", button_style="primary")
        self.button.on_click(lambda _: self.save())
        self.button.layout.flex = "0 0 auto"  # a narrow page does not cut its text
        buttons = widgets.HBox(
            [self.button, self.message], layout={"align_items": "center"}
        )
        self.widget = widgets.VBox(
            [self.recipe, self.tabs, self.summary, self.advice, buttons]
        )
        self.show_run()
        self.recipe.observe(lambda change: self.choose(change.new), names="value")

    def add_group(self, group: str) -> ipywidgets.Widget:
        """Returns the page of a group: a row with field and note for each knob."""
        import ipywidgets as widgets

        rows = []
        for path in KNOBS[group]:
            self.fields[path] = make_field(path)
            self.fields[path].observe(self.check, names="value")
            place = BELOW if KNOBS[group][path].wide else BESIDE
            self.notes[path] = widgets.HTML(layout=place)
            row = [self.fields[path], self.notes[path]]
            layout = {"flex_flow": "row wrap", "align_items": "center"}
            rows.append(widgets.HBox(row, layout=layout))
        return widgets.VBox(rows)

    def show_run(self) -> None:
        """Shows the run as it was saved, and offers the recipes besides."""
        saved = f"{self.run.config.name}, as saved"
        self.recipe.options = [(saved, ""), *((n, n) for n in recipes.NAMES)]
        self.recipe.value = ""  # ipywidgets 8 leaves it open, 7.7.1 takes the first
        self.show_config(self.run.config)

    def choose(self, recipe: str) -> None:
        """Shows a recipe's values, or the saved run's; writes nothing."""
        self.show_config(recipes.load(recipe) if recipe else self.run.config)

    def show_config(self, config: RunConfig) -> None:
        """Fills the fields with a config's values."""
        self.filling = True  # a check sees all the new values or none
        self.base = config
        values = config.model_dump()
        self.shown = {path: as_shown(read(values, path), path) for path in BY_PATH}
        for path, field in self.fields.items():
            value = self.shown[path]
            if BY_PATH[path].choices and value not in dict(field.options).values():
                field.options = [*field.options, (value, value)]
            field.value = value
        self.filling = False
        self.check()

    @property
    def config(self) -> RunConfig:
        """The config that the form shows.

        Raises:
            ConfigError: fields hold what the config does not take, a line for each.
        """
        values = self.base.model_dump()
        faults = []
        for path, field in self.fields.items():
            if field.value != self.shown[path]:
                try:
                    write(values, path, parse(field.value, path))
                except ConfigError as error:
                    faults.append(str(error))
        if faults:
            raise ConfigError("\n".join(faults))
        return check_config(values)

    def check(self, *_: Any) -> list[Advice]:
        """Shows what is wrong beside its field, and what the config amounts to.

        Returns:
            The errors; while there are any, nothing can be saved.
        """
        from helpers.checks import Advice, advise

        if self.filling:
            return []
        try:
            config = self.config
        except ConfigError as error:
            advice = [Advice("error", *locate(n)) for n in str(error).splitlines()]
        else:
            rows, exact = summary.count_rows(config, self.run)
            advice = advise(config, rows=rows.get("train") if exact else None)
            place = self.run.path.with_name(config.name) / "config.json"
            if config.name != self.run.config.name and place.exists():
                text = f"Save replaces {place}, of a run of that name; give it another"
                advice.append(Advice("warning", "name", text))
            for path, field in self.fields.items():
                stage = path.partition("__")[0]
                field.disabled = stage in ("sft", "grpo") and stage not in config.stages
        self.show_advice(advice)
        errors = [item for item in advice if item.level == "error"]
        self.button.disabled = bool(errors)
        if errors:
            names = dict.fromkeys(item.field or "the config" for item in errors)
            text = f"cannot be saved; to correct: {', '.join(names)}"
            self.message.value = summary.remark("error", text)
            self.summary.value = ""
        else:
            self.summary.value = summary.summarize(config, self.run, self.gpu)
            text = "" if config == self.run.config else "edited, not saved yet"
            self.message.value = summary.remark("hint", text)
        return errors

    def show_advice(self, advice: list[Advice]) -> None:
        """Puts advice beside its field, and into a list what belongs to none."""
        beside = defaultdict(list)
        for item in advice:
            path = item.field.replace(".", "__")
            while path and path not in self.fields:  # data.train.0 is of data.train
                path = path.rpartition("__")[0]
            beside[path].append(item)
        for path, note in self.notes.items():
            said = [summary.remark(item.level, item.text) for item in beside[path]]
            note.value = "".join(said) or summary.remark("hint", hint(path))
        for index, (group, knobs) in enumerate(KNOBS.items()):
            levels = sorted(item.level for path in knobs for item in beside[path])
            mark = f" {summary.SIGNS[levels[0]]}" if levels else ""
            self.tabs.set_title(index, group + mark)
        self.advice.value = "".join(
            summary.remark(item.level, f"{item.field}: {item.text}".removeprefix(": "))
            for item in beside[""]
        )

    def save(self) -> Run:
        """Writes the config to the run folder and returns the run.

        Raises:
            ConfigError: the config has errors.
        """
        from helpers import checks

        config = self.config
        checks.require(self.check())
        self.run = save_run(config)
        self.show_run()
        text = f"saved to {self.run.path / 'config.json'}"
        self.message.value = summary.remark("fits", text)
        return self.run

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def labelled(label: str, width: str = SHORT) -> dict[str, Any]:
    """Returns the arguments of a widget whose label lines up with the others'."""
    return {
        "description": label,
        "style": {"description_width": LABEL},
        "layout": {"width": width, "max_width": "99%"},
    }


def make_field(path: str) -> ipywidgets.Widget:
    """Returns the empty widget of a knob: a list to choose from, a box, or text."""
    import ipywidgets as widgets

    knob = BY_PATH[path]
    if knob.kind is bool:
        return widgets.Checkbox(indent=True, **labelled(knob.label))
    if knob.choices:
        options = [(choice, choice) for choice in knob.choices]
        if default(path) is not None:
            options.insert(0, (f"{default(path)}, by default", ""))
        return widgets.Dropdown(options=options, **labelled(knob.label))
    unset = default(path)
    unset = "not set" if unset in (None, -1) else f"{unset}, by default"
    arguments = {"placeholder": unset, "continuous_update": False}
    if knob.wide:
        return widgets.Textarea(rows=3, **arguments, **labelled(knob.label, WIDE))
    width = LONG if knob.kind in (str, Source) else SHORT
    return widgets.Text(**arguments, **labelled(knob.label, width))


def as_shown(value: Any, path: str) -> str | bool:
    """Returns a value of the config as its widget shows it."""
    knob = BY_PATH[path]
    if knob.kind is bool:
        return bool(default(path) if value is None else value)
    return show(value, "\n" if knob.kind == list[Source] else ", ")


def locate(fault: str) -> tuple[str, str]:
    """Returns field and text of a line of a ConfigError; no field, the whole line.

    >>> locate("seed: 'x' is not a whole number"), locate("nothing to train")
    (('seed', "'x' is not a whole number"), ('', 'nothing to train'))
    """
    field, _, text = fault.partition(": ")
    if not text or " " in field:
        return "", fault
    return field, text


def form(run: Run) -> Panel:
    """Returns the form over a run's config; display it by naming it last in a cell."""
    return Panel(run)
