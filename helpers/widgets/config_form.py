"""An ipywidgets form over a run's config: edit, check, estimate, save; headless too.

Types, defaults and explanations come from pydantic and from the libraries' classes.
"""

from __future__ import annotations

import html
import json
import math
import tomllib
from collections import defaultdict
from functools import partial
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
from IPython.display import display

from helpers import checks, estimate, recipes
from helpers.config import (
    DataConfig,
    RunConfig,
    check_config,
    defaults,
    library_fields,
)
from helpers.errors import ConfigError, UnknownArchitecture
from helpers.runs import Run, open_run, save_run

DATA = "data.train data.eval data.problems data.test"
LORA = "lora.r lora.lora_alpha lora.target_modules"
PAGES = {  # what a notebook asks about; all the rest is set as TOML
    "setup": "name model engine weights dtype stages max_length system_prompt seed "
    f"{DATA} data.train_rows {LORA} inference.max_new_tokens inference.temperature",
    "sft": f"max_length loss_on template best_by data.train data.eval {LORA} "
    "lora.lora_dropout sft.max_steps sft.num_train_epochs sft.learning_rate "
    "sft.warmup_steps sft.per_device_train_batch_size sft.gradient_accumulation_steps "
    "sft.packing sft.gradient_checkpointing sft.optim",
    "grpo": "sampler grpo_minutes grpo_held_out max_prompt_length rewards sft_adapter "
    f"data.problems data.test {LORA} grpo.max_steps grpo.learning_rate "
    "grpo.num_generations grpo.per_device_train_batch_size "
    "grpo.gradient_accumulation_steps grpo.max_completion_length grpo.temperature",
}
GROUPS = ("data", "evaluation", "inference", "lora", "sft", "grpo")
dump = partial(json.dumps, ensure_ascii=False)
MORE = "more settings (TOML)"
COLORS = {"error": "#d32f2f", "warning": "#b26a00", "hint": "gray", "fits": "#2e7d32"}


class ConfigForm:
    """The form: name it last in a cell to display it; *Save* writes `config.json`.

    Attributes:
        run: the run as last saved.
        fields: the widgets by dotted name; `MORE` holds all other settings.
        notes: what stands beside each field, by the same names.
    """

    def __init__(self, run: Run | str | None = None, page: str = "setup") -> None:
        """Shows a run's config.

        Args:
            run: or its name, or a recipe's; by default the current run.
            page: `setup`, `sft` or `grpo`: which fields are shown.
        """
        self.run = run if isinstance(run, Run) else open_run(run)
        self.gpu = estimate.this_gpu()
        self.fields = {name: make_field(name) for name in [*PAGES[page].split(), MORE]}
        beside = {"flex": "1 1 200px"}
        self.notes = {name: widgets.HTML(layout=beside) for name in self.fields}
        self.recipe = widgets.Dropdown(description="start from")
        self.summary, self.advice, self.message = (widgets.HTML() for _ in range(3))
        self.button = widgets.Button(description="Save", button_style="primary")
        wrap = {"flex_flow": "row wrap"}
        pairs = zip(self.fields.values(), self.notes.values(), strict=True)
        rows = [widgets.HBox(pair, layout=wrap) for pair in pairs]
        last = [self.summary, self.advice, widgets.HBox([self.button, self.message])]
        self.widget = widgets.VBox([self.recipe, *rows, *last])
        self.show_run()
        self.button.on_click(lambda _: self.save())
        for field in self.fields.values():
            field.observe(lambda _: self.check(), names="value")
        self.recipe.observe(lambda change: self.choose(change.new), names="value")

    def show_run(self) -> None:
        """Shows the run as it was saved, and offers the recipes besides."""
        saved = (f"{self.run.config.name}, as saved", "")
        self.recipe.options = [saved, *((name, name) for name in recipes.NAMES)]
        self.recipe.value = ""  # ipywidgets 8 leaves it open, 7.7.1 takes the first
        self.choose("")

    def choose(self, recipe: str) -> None:
        """Fills the fields with a recipe, or with the saved run; writes nothing."""
        self.base = recipes.load(recipe) if recipe else self.run.config
        values = flatten(self.base.model_dump(exclude_defaults=True))
        values[MORE] = "\n".join(
            f"{name} = {dump(value, separators=(', ', ' = '))}"  # as TOML has it
            for name, value in values.items()
            if name not in self.fields and value is not None
        )
        self.shown: dict[str, Any] = {}  # a check sees all the new values or none
        shown = {name: show(values.get(name), name) for name in self.fields}
        for name, field in self.fields.items():
            field.value = shown[name]
        self.shown = shown
        self.check()

    @property
    def config(self) -> RunConfig:
        """The config that the form shows.

        Raises:
            ConfigError: a line for each field that holds what the config does not take.
        """
        base = flatten(self.base.model_dump(exclude_defaults=True))
        # TOML has no null
        pairs = {n: v for n, v in base.items() if n in self.fields or v is None}
        more, faults = {}, []
        for name, field in self.fields.items():
            try:
                if name == MORE:
                    more = flatten(tomllib.loads(field.value))
                elif field.value != self.shown[name]:
                    pairs[name] = parse(field.value, name)
            except ValueError as error:
                faults.append(f"{name}: cannot be read: {error}")
        for name in more:
            if name in self.fields or name in GROUPS:
                faults.append(f"{MORE}: {name} has a field above, or is a group")
        if faults:
            raise ConfigError("\n".join(faults))
        values: dict[str, Any] = {"data": {}}
        for name, value in (pairs | more).items():
            group, _, leaf = name.rpartition(".")
            holder = values.setdefault(group, {}) if group else values
            if value is not None or name not in self.fields:  # else it has a default
                holder[leaf] = value
        return check_config(values)

    def check(self) -> list[checks.Advice]:
        """Shows what is wrong beside its field, and what the config amounts to.

        Returns:
            The errors; while there are any, nothing can be saved.
        """
        if not self.shown:
            return []
        summary, message = "", "edited, not saved yet"
        try:
            config = self.config
        except ConfigError as error:
            lines = [line.partition(": ") for line in str(error).splitlines()]
            advice = [checks.Advice("error", n, text or n) for n, _, text in lines]
        else:
            prepared = self.run.report().get("data", {})
            rows = prepared if config.data == self.run.config.data else {}
            advice = checks.advise(config, rows=rows.get("train"))
            place = self.run.path.with_name(config.name) / "config.json"
            if config.name != self.run.config.name and place.exists():
                text = f"Save replaces {place}, of a run of that name; give it another"
                advice.append(checks.Advice("warning", "name", text))
            if all(item.level != "error" for item in advice):
                summary = summarize(config, rows, self.gpu)
            if config == self.run.config:
                message = ""
        beside = defaultdict(list)
        for level, name, text in advice:
            owner = name
            while owner and owner not in self.fields:  # data.train.0 is of data.train
                owner = owner.rpartition(".")[0]
            text = text if owner or not name else f"{name}: {text}"
            beside[owner].append(remark(level, text))
        for name, note in self.notes.items():
            note.value = "".join(beside[name]) or remark("hint", describe(name)[2])
        self.advice.value = "".join(beside[""])
        errors = [item for item in advice if item.level == "error"]
        if errors:
            names = dict.fromkeys(item.field for item in errors)
            message = f"cannot be saved; to correct: {', '.join(names)}"
        self.button.disabled = bool(errors)
        self.message.value = remark("error" if errors else "hint", message)
        self.summary.value = summary
        return errors

    def save(self) -> Run:
        """Writes the config to the run folder and returns the run.

        Raises:
            ConfigError: the config has errors.
        """
        config = self.config
        checks.require(self.check())
        self.run = save_run(config)
        self.show_run()
        place = self.run.path / "config.json"
        self.message.value = remark("fits", f"saved to {place}")
        return self.run

    def _ipython_display_(self) -> None:
        display(self.widget)


def describe(name: str) -> tuple[Any, Any, str]:
    """Returns a field's type (None: a library's), its default, and what it means."""
    group, _, leaf = name.rpartition(".")
    if name == MORE:
        return str, "", "any other field, like sft.weight_decay = 0.01"
    if group in ("", "data"):
        field = (DataConfig if group else RunConfig).model_fields[leaf]
        default = None if field.is_required() else field.get_default()
        help = (field.description or "").replace("null", "empty")
        return field.annotation, default, help
    option = library_fields(group).get(leaf)  # GenerationConfig has none
    help = option.metadata.get("help", "") if option else ""
    return None, defaults(group).get(leaf), help.partition(". ")[0]


def make_field(name: str) -> widgets.Widget:
    """Returns the empty widget of a field."""
    kind, default, _ = describe(name)
    arguments = {
        "description": name,
        "style": {"description_width": "240px"},
        "layout": {"width": "520px", "max_width": "99%"},
    }
    if isinstance(default, bool):
        return widgets.Checkbox(**arguments)
    if get_origin(kind) is Literal:
        return widgets.Dropdown(options=get_args(kind), **arguments)
    if default and default != -1:
        arguments["placeholder"] = f"{default}, by default"
    if get_origin(kind) is list or name in ("system_prompt", MORE):
        rows = 10 if name == MORE else 2
        return widgets.Textarea(rows=rows, continuous_update=False, **arguments)
    return widgets.Text(continuous_update=False, **arguments)


def show(value: Any, name: str) -> str | bool:
    """Returns a value as its widget shows it: our lists by line, else JSON."""
    kind, default, _ = describe(name)
    if isinstance(default, bool):
        return bool(default if value is None else value)
    if value is None:
        return default if kind is str or get_origin(kind) is Literal else ""
    if get_origin(kind) is list:
        return "\n".join(str(show(each, MORE)) for each in value)
    return value if isinstance(value, str) else dump(value)


def parse(text: str | bool, name: str) -> Any:
    """Returns the value that a field's text means, None where it is empty."""
    kind = describe(name)[0]
    if isinstance(text, bool):
        return text
    text = text.strip()
    if kind is str:
        return text
    if get_origin(kind) is list:
        lines = filter(None, map(str.strip, text.splitlines()))
        return [json.loads(each) if each[0] == "{" else each for each in lines]
    try:  # pydantic reads the numbers of our fields, but no objects
        return text or None if kind and text[:1] != "{" else json.loads(text)
    except json.JSONDecodeError:
        if text[:1] == "{":
            raise
        return text or None


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values by dotted name: `sft.max_steps`."""
    pairs: dict[str, Any] = {}
    for name, value in values.items():
        group = name in GROUPS and isinstance(value, dict)
        pairs |= (
            {f"{name}.{k}": v for k, v in value.items()} if group else {name: value}
        )
    return pairs


def remark(level: str, text: str) -> str:
    """Returns a text as HTML in the colour of its level; nothing for no text."""
    style = f"line-height:1.4;color:{COLORS[level]}"
    return f'<div style="{style}">{html.escape(text)}</div>' if text else ""


def summarize(config: RunConfig, rows: dict[str, Any], gpu: estimate.Gpu | None) -> str:
    """Returns as HTML the parameters, steps, minutes and memory that a config takes."""
    card, place = gpu or estimate.T4, gpu or estimate.CPU
    try:
        tuned = estimate.skeleton(config.model, config.lora)
        peaks = [estimate.estimate_memory(config, card, s) for s in config.stages]
    except UnknownArchitecture as error:
        return remark("hint", f"The memory cannot be estimated: {error}")
    trained, total = tuned.get_nb_trainable_parameters()
    share = f"{trained:,} of {total:,} ({trained / total:.2%})"
    page = remark("hint", f"LoRA trains {share} parameters.")
    for peak in peaks:
        stage, gb, most_gb = peak.stage, peak.peak_gb, card.memory_gb
        count = rows.get("train" if stage == "sft" else "problems")
        steps = estimate.count_steps(config, stage, count)
        text = f"{stage.upper()}: {estimate.step_rows(config, stage)} rows a step, "
        text += f"{steps:,} steps" if steps else "steps unknown until data are prepared"
        if stage == "sft" and (minutes := estimate.sft_minutes(config, place, count)):
            text += f", roughly {math.ceil(minutes):,} minutes on {place.name}"
        text += f", {gb:.1f} of {most_gb:.1f} GiB of {card.name}"
        text += "" if gb <= most_gb else ": does not fit"
        page += remark("fits" if gb <= most_gb else "error", text)
        page += f'<meter max="{most_gb}" value="{gb}"></meter>'
        parts = ", ".join(f"{name} {size:.2f}" for name, size in peak.parts.items())
        page += remark("hint", parts)
    return page
