"""The configuration of one run.

`sft`, `grpo`, `lora` and `inference` are handed unchanged to the libraries' classes:
their fields and defaults are asked of these classes, never listed here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from helpers.errors import ConfigError, nearest

Stage = Literal["sft", "grpo"]
# held-out sets in the order of their tables: problems, then conversations
HELD_OUT = ("test", "test_new", "test_chat", "eval")
SYSTEM_PROMPT = "Solve step by step. End with a line like this: #### 42"
CLASSES = {  # take the values of a group
    "sft": ("trl", "SFTConfig"),
    "grpo": ("trl", "GRPOConfig"),
    "lora": ("peft", "LoraConfig"),
    "inference": ("transformers", "GenerationConfig"),
}

# Fields of earlier versions, by dotted name: the values that changed nothing (None:
# any value), and what replaced the field. Saved configs still name them.
RETIRED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "few_shot": ((0,), "prompts hold no solved examples"),
    "probe_samples": ((0,), "all problems are trained on"),
    "probe_problems": (None, "all problems are trained on"),
    "evaluation.protocol": (("ours",), "notebook 04 runs lm-evaluation-harness itself"),
    "evaluation.samples": ((0,), "pass@k and maj@k are no longer measured"),
    "evaluation.temperature": (None, "held-out rows are answered greedily"),
    "evaluation.minutes": (None, "nothing read it"),
}


STRICT = ConfigDict(extra="forbid", validate_assignment=True)
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Source(BaseModel):
    """Rows of a file or of a hub dataset, where a path alone does not say it all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)  # or owner/name[/config][:split] on the hub
    rows: Count | None = None  # at most
    weight: Positive | None = None  # share of the mix
    format: str | None = None  # null = detected
    stream: bool = False  # a hub set: nothing is stored on disk

    def __str__(self) -> str:
        return self.path


TAGS = ("<path>", "<source>")  # in pydantic's errors; `check_config` leaves them out
Rows = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[Source, Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[not isinstance(value, str)]),
]


class DataConfig(BaseModel):
    """Where the rows come from: a path, to the letter, or a `Source` with options."""

    model_config = STRICT

    train: list[Rows] = Field([], description="SFT rows, one path (or {...}) a line")
    eval: Rows | None = Field(None, description="rows for the eval loss alone")
    eval_share: Share | None = Field(None, description="of train, instead of eval")
    test_share: Share | None = Field(None, description="of train, for metrics alone")
    problems: Rows | None = Field(None, description="questions with answers, for GRPO")
    test: Rows | None = Field(None, description="held-out problems like training's")
    test_new: Rows | None = Field(None, description="held-out problems of another kind")
    train_rows: Count | None = Field(None, description="cap a source; null = all")
    drop_unusable: bool = Field(False, description="leave bad rows out, counted")
    ignore: list[str] = Field([], description="columns and fields to leave out: tools")
    max_chars: Count | None = Field(None, description="leave longer rows out, counted")
    eval_rows: Count | None = None
    test_rows: Count | None = None
    test_new_rows: Count | None = None

    @field_validator("eval", "problems", "test", "test_new")
    @classmethod
    def is_not_mixed(cls, value: str | Source | None) -> str | Source | None:
        """Refuses a weight where nothing is mixed."""
        if isinstance(value, Source) and value.weight is not None:
            raise ValueError("a weight is of data.train alone, which is mixed")
        return value


class EvaluationConfig(BaseModel):
    """How held-out problems and conversations are answered: greedy, in batches."""

    model_config = STRICT

    batch_size: Count | None = Field(None, description="null = by machine and model")
    max_new_tokens: Count = Field(256, description="answers are cut here")
    text_rows: Count = Field(100, description="held-out conversations to answer")
    labels: list[str] | None = Field(None, description="classes of held-out answers")

    @field_validator("labels")
    @classmethod
    def labels_differ(cls, value: list[str] | None) -> list[str] | None:
        """Refuses labels that are none, or no names of different classes."""
        names = {label.strip() for label in value or []} - {""}
        if value is not None and len(names) < max(1, len(value)):
            raise ValueError("one or more different labels expected, or null")
        return value


class RunConfig(BaseModel):
    """One run: model, data, and how both are put together."""

    model_config = STRICT

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the folder below runs/")
    recipe: str = Field("", description="the recipe it started from")
    model: str = Field(min_length=1, description="hub id or folder")
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    stages: list[Stage] = Field(["sft", "grpo"], min_length=1)
    weights: Literal["auto", "4bit", "8bit", "16bit"] = "auto"  # auto: 4bit on a GPU
    double_quant: bool = Field(True, description="4bit: quantise the scales too")
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"  # of arithmetic
    template: str = Field("own", description="own, instruction, llama-2, or a file")
    pad_token: str | None = Field(None, description="null = chosen; never eos")
    max_length: int = Field(1024, ge=16, description="tokens a (packed) row")
    max_prompt_length: Count | None = Field(None, description="for problems, in tokens")
    grpo_minutes: Positive | None = Field(None, description="null = by max_steps")
    grpo_held_out: Count = Field(32, description="problems to choose the adapter by")
    sampler: Literal["auto", "copy", "model"] = "auto"  # copy: 16-bit, on a GPU
    loss_on: Literal["all", "assistant", "last"] = "assistant"
    system_prompt: str = SYSTEM_PROMPT
    seed: int = Field(3407, ge=0)
    best_by: Literal["eval_loss", "loss"] = "eval_loss"
    save_minutes: Positive = Field(10.0, description="minutes between checkpoints")
    sft_adapter: str | None = Field(None, description="to use instead of training SFT")
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: dict[str, Any] = {}  # for chats
    lora: dict[str, Any] = {}
    sft: dict[str, Any] = {}
    grpo: dict[str, Any] = {}
    rewards: dict[str, float] = {"correctness": 1.0}  # name -> weight

    @model_validator(mode="before")
    @classmethod
    def drop_retired(cls, values: Any) -> Any:
        """Leaves out retired fields that changed nothing, and refuses the others."""
        for name, (inert, replacement) in RETIRED.items():
            group, _, leaf = name.rpartition(".")
            holder = values.get(group) if group and type(values) is dict else values
            if type(holder) is not dict or leaf not in holder:
                continue
            if inert is not None and holder[leaf] not in inert:
                found = f"{name}={holder[leaf]!r}"
                raise ValueError(f"{found} no longer exists: {replacement}")
            holder = {key: value for key, value in holder.items() if key != leaf}
            values = values | {group: holder} if group else holder
        return values

    @model_validator(mode="after")
    def stages_have_data(self) -> RunConfig:
        """Refuses a stage without rows, and an eval loss without eval rows."""
        data, has_sft = self.data, "sft" in self.stages
        if has_sft and not data.train and not self.sft_adapter:
            raise ValueError("the sft stage needs data.train")
        if "grpo" in self.stages and not data.problems:
            raise ValueError("the grpo stage needs data.problems")
        if data.eval and data.eval_share:
            raise ValueError("give data.eval or data.eval_share, not both")
        by_eval = self.best_by == "eval_loss" and not (data.eval or data.eval_share)
        if has_sft and by_eval:
            text = "best_by='eval_loss' needs data.eval or data.eval_share; or use "
            raise ValueError(text + "best_by='loss'")
        return self


def check_config(values: dict[str, Any]) -> RunConfig:
    """Returns the config of a dictionary.

    Raises:
        ConfigError: one line a fault: the field, what is expected, what was found.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
    kinds = (RunConfig, DataConfig, EvaluationConfig, Source)
    known = [name for kind in kinds for name in kind.model_fields]
    lines = []
    for fault in faults:
        field = ".".join(str(part) for part in fault["loc"] if part not in TAGS)
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            hint = nearest(field.rpartition(".")[2], known)
            lines.append(f"{field} is not a field of the config{hint}")
        elif field:
            lines.append(f"{field}: {text} (found {repr(fault['input'])[:80]})")
        else:
            lines.append(text)
    raise ConfigError("\n".join(lines))


def read_config(path: Path) -> RunConfig:
    """Returns the config that a JSON file holds; ConfigError where it holds none."""
    try:
        return check_config(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; run notebook 00_setup") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns a copy with fields changed; `sft__max_steps=5` reaches into a group.

    Raises:
        ConfigError: the copy would not be valid.
    """
    values = config.model_dump()
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        holder = values
        for group in groups:  # an unknown one is refused below
            holder = holder.setdefault(group, {})
        holder[leaf] = value
    return check_config(values)


@cache
def library_class(group: str) -> Any:
    """Returns the class that takes a group's values.

    Unsloth puts subclasses with other defaults in the place of TRL's own.
    """
    package, name = CLASSES[group]
    kind = getattr(importlib.import_module(package), name)
    return next(k for k in kind.__mro__ if k.__module__.startswith(f"{package}."))


def library_fields(group: str) -> dict[str, Any]:
    """Returns the dataclass fields of a group's class; GenerationConfig has none."""
    return getattr(library_class(group), "__dataclass_fields__", {})


@cache
def defaults(group: str) -> dict[str, Any]:
    """Returns the defaults of a group's class; GenerationConfig names none.

    But AdamW is not TRL's fused one, which hides from accelerate the steps that fp16
    skips. The first question imports the library, which takes ten seconds.
    """
    fields = library_fields(group).values()
    values = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return values | ({"optim": "adamw_torch"} if "optim" in values else {})


def complete(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Returns a stage's values, with TRL's defaults where the config is silent."""
    return {**defaults(stage), **getattr(config, stage)}
