"""A form over a run's config, made of what pydantic and the libraries' classes say."""

import html
import json
import math
import tomllib
from collections.abc import Callable
from functools import partial
from itertools import groupby
from logging.handlers import BufferingHandler
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets
import pandas as pd
from IPython.display import display

from helpers import checks, estimate, recipes
from helpers.config import RunConfig, check_config, defaults, flatten, library_fields
from helpers.errors import ConfigError, TunebookError, UnknownArchitecture
from helpers.grpo.rewards import REWARDS, punish_overlong
from helpers.runs import Run, open_run, save_run

LORA = "lora.r lora.lora_alpha lora.target_modules"
PAID = REWARDS | {"overlong": punish_overlong}
PAGES = {  # what a notebook asks about; all the rest is set as TOML
    "setup": "name model engine weights dtype stages max_length system_prompt seed "
    f"data.train data.eval data.problems data.test data.train_rows {LORA} "
    "grpo.max_completion_length grpo.temperature "
    "inference.max_new_tokens inference.temperature "
    "evaluation.max_new_tokens evaluation.batch_size",
    "sft": f"max_length loss_on template best_by layout data.train data.eval {LORA} "
    "lora.lora_dropout sft.max_steps sft.num_train_epochs sft.learning_rate "
    "sft.warmup_steps sft.per_device_train_batch_size sft.gradient_accumulation_steps "
    "sft.packing sft.gradient_checkpointing sft.optim",
    "grpo": "sampler grpo_minutes grpo_held_out max_prompt_length sft_adapter "
    f"data.problems data.test {LORA} grpo.max_steps grpo.learning_rate "
    "grpo.num_generations grpo.per_device_train_batch_size "
    "grpo.gradient_accumulation_steps grpo.max_completion_length grpo.temperature "
    + " ".join(f"rewards.{name}" for name in PAID),
}
MORE = "more settings (TOML)"
TITLES = {"data": "Data", "lora": "LoRA", "sft": "SFT", "grpo": "GRPO", MORE: ""}
TITLES |= {"rewards": "Rewards", "inference": "Chat", "evaluation": "Evaluation"}
COSTS = {  # where the library's own words say nothing of it
    "r": "higher learns more and takes memory",
    "lora_alpha": "the update counts alpha / r",
    "target_modules": "more of them learn more and take memory",
    "lora_dropout": "above 0 less is memorised, and learnt more slowly",
    "max_steps": "time grows with the steps",
    "num_train_epochs": "time grows with them; many memorise the rows",
    "learning_rate": "too low learns little, too high makes the loss jump",
    "warmup_steps": "without them the first steps may do harm",
    "per_device_train_batch_size": "memory grows with it",
    "gradient_accumulation_steps": "time a step grows with them, memory does not",
    "optim": "8-bit ones take less memory",
    "num_generations": "more compare better and take time",
    "max_completion_length": "memory and time grow with it; shorter cuts answers",
    "max_new_tokens": "answers are cut here; time grows with it",
    "temperature": "higher varies more; a chat may take 0, the likeliest token",
}
WRAP = {"flex_flow": "row wrap"}
FIELD = WRAP | {"flex": "1 1 300px", "min_width": "0", "max_width": "520px"}
FIELD["height"] = "auto"  # on a phone the label stands above
# which ipywidgets 7, Colab's, would put below its label
STYLE = "<style>.widget-textarea textarea {flex: 1 1 100px; width: 100px}</style>"
TITLE = f"""<b>%s</b>{STYLE}<style>
.as-table {{display: none}} /* the form itself is there */
.widget-dropdown select {{height: 28px}}
@media (max-width: 600px) {{.widget-label {{text-align: left !important}}}}</style>"""
HELD = "not saved yet: Save or Discard, then go on to the next cell or another recipe"
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
        self.saved = run if isinstance(run, Run) else open_run(run)
        self.fields = {name: make_field(name) for name in [*PAGES[page].split(), MORE]}
        beside = {"flex": "1 1 200px"}
        self.notes = {name: widgets.HTML(layout=beside) for name in self.fields}
        self.recipe = widgets.Dropdown(description="start from")
        self.recipe.options = [("as saved", ""), *((n, n) for n in recipes.NAMES)]
        self.data = widgets.Text(description="or my data", continuous_update=False)
        self.data.placeholder = "a file, or owner/name of a hub dataset"
        sources = (self.recipe, recipes.load), (self.data, recipes.for_data)
        self.button = widgets.Button(description="Save", button_style="primary")
        self.undo = widgets.Button(description="Discard")
        self.message, self.table = widgets.HTML(), None
        self.discard()
        self.button.on_click(lambda _: self.save())
        self.undo.on_click(lambda _: self.discard())
        for field in self.fields.values():
            field.observe(lambda _: self.check(), names="value")
        for source, make in sources:
            source.observe(lambda c, m=make: self.choose(m, c.new.strip()), "value")
            source.layout = {"width": "auto", "max_width": "520px"}
        rows: list[widgets.Widget] = [self.recipe, self.data]
        titles = {n: TITLES.get(n.partition(".")[0], "Run") for n in self.fields}
        for title, names in groupby(titles, titles.get):
            rows.append(widgets.HTML(TITLE % title))
            pairs = ([self.fields[name], self.notes[name]] for name in names)
            rows += [widgets.HBox(pair, layout=WRAP) for pair in pairs]
        super().__init__([*rows, widgets.HBox([self.button, self.undo]), self.message])

    def _ipython_display_(self) -> None:
        """Displays the form and a table, which shows where no kernel has the form."""
        self.table = display(self.tabulate(), raw=True, display_id=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        bundle = {"application/vnd.jupyter.widget-view+json": view}
        display(bundle | {"text/plain": "Run this cell for the form."}, raw=True)

    def tabulate(self) -> dict[str, str]:
        values = {n: field.value for n, field in self.fields.items() if field.value}
        table = pd.DataFrame({"value": values}).style.format(escape="html")
        style = {"white-space": "pre-wrap", "text-align": "left"}
        page = table.set_properties(**style).to_html()
        text = recipes.differences(self.saved.config)
        return {"text/html": f'<div class="as-table">{page}</div>', "text/plain": text}

    @property
    def run(self) -> Run:
        """The run as it is saved; ConfigError while the form shows something else."""
        if self.is_edited:
            raise ConfigError(f"the form is {HELD}")
        return self.saved

    def choose(self, make: Callable[[str], RunConfig], source: str) -> None:
        """Shows a recipe or what is made of one's rows, unless edits would be lost."""
        if self.recipe.disabled:
            return
        words = BufferingHandler(capacity=100)  # of what was made of the rows
        recipes.log.addHandler(words)
        try:
            self.fill(make(source) if source else self.saved.config)
        except TunebookError as error:
            self.message.value = remark("error", str(error))
        finally:
            recipes.log.removeHandler(words)
        lines = [record.getMessage() for record in words.buffer]
        self.message.value = remark("hint", "\n".join(lines)) + self.message.value

    def discard(self) -> None:
        self.fill(self.saved.config)
        self.recipe.value = self.data.value = ""

    def fill(self, config: RunConfig) -> None:
        self.origin = config
        values = config.model_dump(exclude_defaults=True)
        self.base = flatten(values | {"rewards": config.rewards})  # not default + edits
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
            prepared = self.saved.report().get("data", {})
            rows = prepared if config.data == self.saved.config.data else {}
            advice = checks.advise(config, rows=rows.get("train"))
            place = self.saved.path.with_name(config.name) / "config.json"
            if config.name != self.saved.config.name and place.exists():
                text = f"Save replaces {place}, of a run of that name; give it another"
                advice.append(checks.Advice("warning", "name", text))
        beside = dict.fromkeys(self.fields, "")
        for level, name, text in advice:
            # data.train.0 is of data.train, rewards of the first; the rest of the last
            path = f"{name}."
            owners = [f for f in self.fields if path.startswith(f"{f}.") or path in f]
            text = text if owners else f"{name}: {text}".rstrip(": ")
            beside[owners[0] if owners else MORE] += remark(level, text)
        for name, note in self.notes.items():
            note.value = beside[name] or remark("hint", describe(name)[2])
        errors = [item for item in advice if item.level == "error"]
        edits = [n for n, value in self.shown.items() if self.fields[n].value != value]
        self.is_edited = bool(edits) or self.origin != self.saved.config
        self.button.disabled, self.undo.disabled = bool(errors), not self.is_edited
        self.recipe.disabled = self.data.disabled = bool(edits)
        if errors:
            names = ", ".join(dict.fromkeys(item.field for item in errors))
            page = remark("error", f"cannot be saved; to correct: {names}")
        else:
            page = summarize(config, rows)
        self.message.value = remark("warning", HELD) * self.is_edited + page
        return errors

    def save(self) -> Run:
        """Writes the config to the run folder; ConfigError while it has errors."""
        checks.require(self.check())
        self.saved = save_run(self.config, current=True)
        self.discard()
        page = remark("fits", f"saved to {self.saved.path / 'config.json'}")
        page += remark("hint", recipes.differences(self.saved.config))
        self.message.value = page + self.message.value
        if self.table:
            self.table.update(self.tabulate(), raw=True)
        return self.saved


def describe(name: str) -> tuple[Any, Any, str]:
    """Returns a field's type (None: a library's), a library's default, and its help."""
    group, _, leaf = name.rpartition(".")
    if name == MORE:
        return str, None, "any other field, like sft.weight_decay = 0.01"
    owner: Any = RunConfig.model_fields[group].annotation if group else RunConfig
    if hasattr(owner, "model_fields"):
        field = owner.model_fields[leaf]
        return field.annotation, None, field.description.replace("null", "empty")
    if group == "rewards":
        return None, None, str(PAID[leaf].__doc__).replace("Returns", "weight; pays")
    option = library_fields(group).get(leaf)  # GenerationConfig has none
    text = option.metadata.get("help", "") if option else ""
    words = [text.partition(". ")[0].rstrip("."), COSTS.get(leaf)]
    return None, defaults(group).get(leaf), "; ".join(filter(None, words))


def make_field(name: str) -> widgets.Widget:
    kind, default, _ = describe(name)
    options: dict[str, Any] = {"description": name, "layout": FIELD}
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


def remark(level: str, text: str) -> str:
    style = f"color:{COLORS[level]};white-space:pre-wrap;line-height:1.5"
    return f'<div style="{style}">{html.escape(text)}</div>'


def summarize(config: RunConfig, rows: dict[str, Any]) -> str:
    card = estimate.this_gpu() or estimate.CPU
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
        if stage == "sft" and (minutes := estimate.sft_minutes(config, card, count)):
            text += f", roughly {math.ceil(minutes):,} minutes on {card.name}"
        memory = "RAM" if card == estimate.CPU else card.name
        text += f", {peak.sum():.1f} of {card.memory_gb:.1f} GiB of {memory}"
        fits = peak.sum() <= card.memory_gb
        page += remark("fits", text) if fits else remark("error", f"{text}: too large")
        page += remark("hint", ", ".join(f"{n} {gb:.2f}" for n, gb in peak.items()))
    return page
