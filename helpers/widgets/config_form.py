"""A form over a run's config, made of what pydantic and the libraries' classes say."""

import html
import json
import math
import tomllib
from functools import partial
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
import pandas as pd

from helpers import checks, estimate, recipes
from helpers.config import DataConfig, RunConfig, check_config, defaults, library_fields
from helpers.errors import ConfigError, TunebookError, UnknownArchitecture
from helpers.runs import Run, open_run, save_run

LORA = "lora.r lora.lora_alpha lora.target_modules"
PAGES = {  # what a notebook asks about; all the rest is set as TOML
    "setup": "name model engine weights dtype stages max_length system_prompt seed "
    f"data.train data.eval data.problems data.test data.train_rows {LORA} "
    "inference.max_new_tokens inference.temperature",
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
SAVED, MORE = "as saved", "more settings (TOML)"
COLORS = {"error": "#d32f2f", "warning": "#b26a00", "hint": "gray", "fits": "#2e7d32"}
to_json = partial(json.dumps, ensure_ascii=False)


class ConfigForm(widgets.VBox):
    """The form: name it last in a cell to display it; *Save* writes `config.json`.

    `fields` has the widgets by dotted name, `notes` what stands beside each.

    Args:
        run: or its name, or a recipe's; by default the current run.
        page: `setup`, `sft` or `grpo`: which fields are shown.
    """

    def __init__(self, run: Run | str | None = None, page: str = "setup") -> None:
        self.run = run if isinstance(run, Run) else open_run(run)
        self.fields = {name: make_field(name) for name in [*PAGES[page].split(), MORE]}
        beside = {"flex": "1 1 200px"}
        self.notes = {name: widgets.HTML(layout=beside) for name in self.fields}
        self.recipe = widgets.Dropdown(description="start from")
        self.recipe.options, self.recipe.value = [SAVED, *recipes.NAMES], SAVED
        self.data = widgets.Text(description="or my data", continuous_update=False)
        self.data.placeholder = "a file, or owner/name of a hub dataset"
        self.button = widgets.Button(description="Save", button_style="primary")
        self.message = widgets.HTML()
        self.choose(SAVED)
        self.button.on_click(lambda _: self.save())
        for field in self.fields.values():
            field.observe(lambda _: self.check(), names="value")
        self.recipe.observe(lambda change: self.choose(change.new), names="value")
        self.data.observe(lambda change: self.choose_data(change.new), names="value")
        pairs = zip(self.fields.values(), self.notes.values(), strict=True)
        rows = [widgets.HBox(pair, layout={"flex_flow": "row wrap"}) for pair in pairs]
        super().__init__([self.recipe, self.data, *rows, self.button, self.message])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Adds a table, which stands for the form where no kernel answers."""
        values = {n: field.value for n, field in self.fields.items() if field.value}
        style = {"white-space": "pre-wrap", "text-align": "left"}
        table = pd.Series(values, name="value").to_frame().style.format(escape="html")
        page = table.set_properties(**style).to_html()
        return super()._repr_mimebundle_(**options) | {"text/html": page}

    def choose(self, recipe: str) -> None:
        self.fill(self.run.config if recipe == SAVED else recipes.load(recipe))

    def choose_data(self, path: str) -> None:
        try:
            self.fill(recipes.for_data(path.strip()))
        except TunebookError as error:
            self.message.value = remark("error", str(error))

    def fill(self, config: RunConfig) -> None:
        self.base = flatten(config.model_dump(exclude_defaults=True))
        lines = [
            f"{name} = {to_json(value, separators=(', ', ' = '))}"  # as TOML has it
            for name, value in self.base.items()
            if name not in self.fields and value is not None
        ]
        values = flatten(config.model_dump()) | self.base | {MORE: "\n".join(lines)}
        self.shown: dict[str, Any] = {}  # a check sees all the new values or none
        for name, field in self.fields.items():
            field.value = show(values.get(name), name)
        self.shown = {name: field.value for name, field in self.fields.items()}
        self.check()

    @property
    def config(self) -> RunConfig:
        """The config that the form shows; a ConfigError has a line for each fault."""
        # TOML has no null
        values = {n: v for n, v in self.base.items() if n in self.fields or v is None}
        for name, field in self.fields.items():
            if field.value != self.shown[name] and name != MORE:
                values[name] = parse(field.value, name)
        try:
            values |= flatten(tomllib.loads(self.fields[MORE].value))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{MORE}: cannot be read: {error}") from None
        nested: dict[str, Any] = {"data": {}}
        for name, value in values.items():
            group, _, leaf = name.rpartition(".")
            if value is not None or name not in self.fields:  # else it has its default
                (nested.setdefault(group, {}) if group else nested)[leaf] = value
        return check_config(nested)

    def check(self) -> list[checks.Advice]:
        """Shows faults beside their fields, and the estimate; returns the errors."""
        if not self.shown:
            return []
        try:
            config = self.config
        except ConfigError as error:
            lines = [line.partition(": ") for line in str(error).splitlines()]
            advice = [checks.Advice("error", name, text) for name, _, text in lines]
        else:
            prepared = self.run.report().get("data", {})
            rows = prepared if config.data == self.run.config.data else {}
            advice = checks.advise(config, rows=rows.get("train"))
            place = self.run.path.with_name(config.name) / "config.json"
            if config.name != self.run.config.name and place.exists():
                text = f"Save replaces {place}, of a run of that name; give it another"
                advice.append(checks.Advice("warning", "name", text))
        beside = dict.fromkeys(self.fields, "")
        for level, name, text in advice:
            # data.train.0 is of data.train; what has no field is of the last one
            owners = [f for f in self.fields if f"{name}.".startswith(f"{f}.")]
            text = text if owners else f"{name}: {text}".rstrip(": ")
            beside[owners[0] if owners else MORE] += remark(level, text)
        for name, note in self.notes.items():
            note.value = beside[name] or remark("hint", describe(name)[2])
        errors = [item for item in advice if item.level == "error"]
        self.button.disabled = bool(errors)
        if errors:
            names = ", ".join(dict.fromkeys(item.field for item in errors))
            page = remark("error", f"cannot be saved; to correct: {names}")
        else:
            is_new = config != self.run.config
            page = remark("hint", "edited, not saved yet") if is_new else ""
            page += summarize(config, rows)
        self.message.value = page
        return errors

    def save(self) -> Run:
        """Writes the config to the run folder; ConfigError while it has errors."""
        checks.require(self.check())
        self.run = save_run(self.config, current=True)
        self.recipe.value = SAVED
        self.choose(SAVED)
        saved = remark("fits", f"saved to {self.run.path / 'config.json'}")
        self.message.value = saved + self.message.value
        return self.run


def describe(name: str) -> tuple[Any, Any, str]:
    """Returns a field's type (None: a library's), a library's default, and its help."""
    group, _, leaf = name.rpartition(".")
    if name == MORE:
        return str, None, "any other field, like sft.weight_decay = 0.01"
    if group in ("", "data"):
        field = (DataConfig if group else RunConfig).model_fields[leaf]
        text = field.description or ""
        return field.annotation, None, text.replace("null", "empty")
    option = library_fields(group).get(leaf)  # GenerationConfig has none
    text = option.metadata.get("help", "") if option else ""
    return None, defaults(group).get(leaf), text.partition(". ")[0]


def make_field(name: str) -> widgets.Widget:
    kind, default, _ = describe(name)
    options: dict[str, Any] = {"description": name, "layout": {"width": "520px"}}
    options["style"] = {"description_width": "240px"}
    if isinstance(default, bool):
        return widgets.Checkbox(**options)
    if get_origin(kind) is Literal:
        return widgets.Dropdown(options=get_args(kind), **options)
    options["continuous_update"] = False
    if default and default != -1:
        options["placeholder"] = f"{default}, by default"
    if get_origin(kind) is list or name in ("system_prompt", MORE):
        return widgets.Textarea(rows=10 if name == MORE else 2, **options)
    return widgets.Text(**options)


def show(value: Any, name: str) -> str | bool:
    """Returns a value as its widget shows it: our lists by line, else JSON."""
    kind, default, _ = describe(name)
    if value is None:
        return default if isinstance(default, bool) else ""
    if get_origin(kind) is list:
        return "\n".join(str(show(each, MORE)) for each in value)
    return value if isinstance(value, str | bool) else to_json(value)


def parse(text: str | bool, name: str) -> Any:
    kind = describe(name)[0]
    if isinstance(text, bool):
        return text
    if kind is str:
        return text.strip()
    if get_origin(kind) is list:
        return [parse(line, "data.eval") for line in text.splitlines() if line.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip() or None


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    groups = {group: values.pop(group, {}) for group in GROUPS}
    pairs = {f"{g}.{k}": v for g, inner in groups.items() for k, v in inner.items()}
    return values | pairs


def remark(level: str, text: str) -> str:
    return f'<div style="color:{COLORS[level]}">{html.escape(text)}</div>'


def summarize(config: RunConfig, rows: dict[str, Any]) -> str:
    gpu = estimate.this_gpu()
    card, place = gpu or estimate.T4, gpu or estimate.CPU
    try:
        tuned = estimate.skeleton(config.model, config.lora)
        peaks = [estimate.estimate_memory(config, card, s) for s in config.stages]
    except (UnknownArchitecture, AttributeError) as error:
        return remark("hint", f"The memory cannot be estimated: {error}")
    trained, total = tuned.get_nb_trainable_parameters()
    page = remark("hint", f"LoRA trains {trained:,} of {total:,} parameters.")
    for stage, peak in zip(config.stages, peaks, strict=True):
        count = rows.get("train" if stage == "sft" else "problems")
        steps = estimate.count_steps(config, stage, count)
        text = f"{stage.upper()}: {estimate.step_rows(config, stage)} rows a step, "
        text += f"{steps:,} steps" if steps else "steps unknown until data are prepared"
        if stage == "sft" and (minutes := estimate.sft_minutes(config, place, count)):
            text += f", roughly {math.ceil(minutes):,} minutes on {place.name}"
        text += f", {peak.sum():.1f} of {card.memory_gb:.1f} GiB of {card.name}"
        fits = peak.sum() <= card.memory_gb
        page += remark("fits", text) if fits else remark("error", f"{text}: too large")
        page += remark("hint", ", ".join(f"{n} {gb:.2f}" for n, gb in peak.items()))
    return page
