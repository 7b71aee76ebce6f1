"""The validated, JSON-round-trippable configuration of one run.

Holds our few fields; what belongs to TRL and PEFT is handed to them unchanged, in
`sft`, `grpo` and `lora`. It is not a second list of their fields.
"""

from __future__ import annotations

import json
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

# Fields of earlier versions, by dotted name: the values that changed nothing (None:
# any value), and what replaced the field. Saved configs still name them.
RETIRED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "evaluation.protocol": (("ours",), "notebook 04 shows lm-evaluation-harness's own"),
    "evaluation.samples": ((0,), "pass@k and maj@k are no longer measured"),
    "evaluation.temperature": (None, "held-out rows are answered greedily"),
    "evaluation.minutes": (None, "nothing reads it"),
}


class Source(BaseModel):
    """Rows of a file or of a hub dataset, where a path alone does not say it all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1, description="a file, or owner/name[/config][:split] on the hub"
    )
    rows: int | None = Field(None, ge=1, description="at most so many are read")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="part of the mix, by proportion"
    )
    format: str | None = Field(None, description="of the rows; null = detected")
    stream: bool = Field(False, description="of a hub set: store nothing on disk")

    def __str__(self) -> str:
        return self.path

    @field_validator("format")
    @classmethod
    def format_exists(cls, value: str | None) -> str | None:
        """Refuses a format that is not known."""
        from helpers.data.formats import find_format

        return value and find_format(value).name


TAGS = ("<path>", "<source>")  # in pydantic's errors; `check_config` leaves them out
Rows = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[Source, Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[not isinstance(value, str)]),
]


class DataConfig(BaseModel):
    """Where the rows come from: a path, to the letter, or a `Source` with options."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    train: list[Rows] = Field(
        [],
        description='SFT rows, one path a line, or {"path": ..., "rows": 500, '
        '"weight": 2, "format": "dolly"}',
    )
    eval: Rows | None = Field(
        None, description="rows for the eval loss, not trained on"
    )
    eval_share: float | None = Field(
        None, gt=0, lt=1, description="instead of eval: this share of the train rows"
    )
    test_share: float | None = Field(
        None, gt=0, lt=1, description="share of the train rows held out for metrics"
    )
    problems: Rows | None = Field(None, description="questions with answers, for GRPO")
    test: Rows | None = Field(None, description="held-out problems like training's")
    test_new: Rows | None = Field(None, description="held-out problems of another kind")
    train_rows: int | None = Field(None, ge=1, description="cap a source; null = all")
    drop_unusable: bool = Field(False, description="leave bad rows out, counted")
    ignore: list[str] = Field(
        [], description="columns and fields of turns to leave out, like tools"
    )
    max_chars: int | None = Field(
        None, ge=1, description="leave longer conversations out, counted"
    )
    eval_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)
    test_new_rows: int | None = Field(None, ge=1)

    @field_validator("eval", "problems", "test", "test_new")
    @classmethod
    def is_not_mixed(cls, value: str | Source | None) -> str | Source | None:
        """Refuses a weight where nothing is mixed."""
        if isinstance(value, Source) and value.weight is not None:
            raise ValueError("a weight is of data.train alone, which is mixed")
        return value


class EvaluationConfig(BaseModel):
    """How held-out problems and conversations are answered: greedy, in batches."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    batch_size: int | None = Field(
        None, ge=1, description="null = 32 on a CPU, by the model's size on a GPU"
    )
    max_new_tokens: int = Field(256, ge=1, description="answers are cut here")
    text_rows: int = Field(
        100, ge=1, description="held-out conversations answered for ROUGE, BLEU, ..."
    )
    labels: list[str] | None = Field(
        None, description="classes of held-out conversations; null = they are texts"
    )

    @field_validator("labels")
    @classmethod
    def labels_differ(cls, value: list[str] | None) -> list[str] | None:
        """Refuses labels that are none, or no names of different classes."""
        names = [label.strip() for label in value or []]
        if value is not None and (not all(names) or len({*names}) < max(1, len(names))):
            raise ValueError(
                "one or more different labels expected, none of them empty; null where "
                "the held-out conversations are no classification"
            )
        return value


class RunConfig(BaseModel):
    """One run: model, data, and how both are put together."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the folder below runs/")
    recipe: str = Field("", description="the recipe it started from")
    model: str = Field(
        min_length=1, description="hub id, local folder, or smollm2-135m-offline"
    )
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    stages: list[Stage] = Field(["sft", "grpo"], min_length=1)
    weights: Literal["auto", "4bit", "8bit", "16bit"] = Field(
        "auto", description="auto = 4bit on a GPU; 16bit = this machine's own dtype"
    )
    double_quant: bool = Field(
        True, description="4bit: quantise the scales too, 0.4 bit a weight less"
    )
    dtype: Literal["auto", "float16", "bfloat16"] = Field(
        "auto", description="of arithmetic; bfloat16 needs a GPU newer than a T4"
    )
    template: str = Field(
        "own", description="own = the tokenizer's; instruction, llama-2, or a file"
    )
    pad_token: str | None = Field(
        None, description="null = chosen; eos is refused with a warning"
    )
    max_length: int = Field(1024, ge=16, description="tokens a (packed) row")
    max_prompt_length: int | None = Field(
        None, ge=1, description="GRPO: problems with longer prompts are left out"
    )
    few_shot: int = Field(
        0, ge=0, description="solved examples in each prompt, of the problems' first"
    )
    probe_samples: int = Field(
        0, ge=0, description="GRPO: drop what none or all of so many answers solve"
    )
    probe_problems: int | None = Field(
        None, ge=1, description="GRPO: probe and train on so many; null = all"
    )
    grpo_minutes: float | None = Field(
        None, gt=0, description="GRPO: fit the steps into this time; null = max_steps"
    )
    grpo_held_out: int = Field(
        32, ge=1, description="GRPO: held-out problems that choose the best adapter"
    )
    sampler: Literal["auto", "copy", "model", "vllm"] = Field(
        "auto", description="GRPO: auto = from a 16-bit copy where a GPU holds it"
    )
    loss_on: Literal["all", "assistant", "last"] = "assistant"
    system_prompt: str = SYSTEM_PROMPT
    seed: int = Field(3407, ge=0)
    best_by: Literal["eval_loss", "loss"] = "eval_loss"
    save_minutes: float = Field(10.0, gt=0, description="most work lost to a kill")
    sft_adapter: str | None = Field(
        None, description="adapter folder or hub id to use instead of training SFT"
    )
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: dict[str, Any] = Field(
        default_factory=dict, description="-> GenerationConfig, for prompts of yours"
    )
    lora: dict[str, Any] = Field(default_factory=dict, description="-> LoraConfig")
    sft: dict[str, Any] = Field(default_factory=dict, description="-> SFTConfig")
    grpo: dict[str, Any] = Field(default_factory=dict, description="-> GRPOConfig")
    rewards: dict[str, float] = Field(
        default_factory=lambda: {"correctness": 1.0}, description="name -> weight"
    )

    @field_validator("template")
    @classmethod
    def template_exists(cls, value: str) -> str:
        """Refuses what is neither a known template nor a file."""
        from helpers.masking.templates import template_text

        template_text(value)
        return value

    @model_validator(mode="after")
    def stages_have_data(self) -> RunConfig:
        """Refuses a stage without rows, and an eval loss without eval rows."""
        data = self.data
        if "sft" in self.stages and not data.train and not self.sft_adapter:
            raise ValueError("the sft stage needs data.train")
        if "grpo" in self.stages and not data.problems:
            raise ValueError("the grpo stage needs data.problems")
        if self.few_shot and not data.problems:
            raise ValueError("few_shot takes its examples from data.problems")
        if self.probe_samples == 1:
            raise ValueError("probe_samples=1 tells nothing; give 2 or more, or 0")
        if data.eval and data.eval_share:
            raise ValueError("give data.eval or data.eval_share, not both")
        if "sft" in self.stages and not (data.eval or data.eval_share):
            if self.best_by == "eval_loss":
                raise ValueError(
                    "best_by='eval_loss' needs data.eval or data.eval_share; "
                    "without them use best_by='loss'"
                )
            if self.sft.get("eval_strategy") not in (None, "no"):
                raise ValueError("sft.eval_strategy needs data.eval or data.eval_share")
        return self


def check_config(values: dict[str, Any]) -> RunConfig:
    """Returns the config of a dictionary.

    Raises:
        ConfigError: one line a fault: the field, what was found, what is expected,
            and for an unknown field the nearest known one.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        known = {
            "": RunConfig.model_fields,
            "data": DataConfig.model_fields,
            "evaluation": EvaluationConfig.model_fields,
        }
        lines = []
        for fault in error.errors():
            places = [str(part) for part in fault["loc"] if part not in TAGS]
            where = ".".join(places)
            if fault["type"] == "extra_forbidden":
                parent, _, leaf = where.rpartition(".")
                inner = Source.model_fields if parent.startswith("data.") else ()
                hint = nearest(leaf, known.get(parent, inner))
                lines.append(f"{where} is no field of the config{hint}")
            else:
                found = f" (found {repr(fault['input'])[:80]})" if where else ""
                message = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{where}: {message}{found}".removeprefix(": "))
        raise ConfigError("\n".join(lines)) from None


def read_config(path: Path) -> RunConfig:
    """Returns the config that a JSON file holds.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds no valid config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {path}; run notebook 00_setup, or save one with "
            "recipes.load('demo')"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    return check_config(values)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns a copy with fields changed; `sft__max_steps=5` reaches into a group.

    >>> from helpers import recipes
    >>> changed(recipes.load("demo"), sft__max_steps=5).sft["max_steps"]
    5

    Raises:
        ConfigError: the copy would not be valid.
    """
    values = config.model_dump()
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        place = values
        for group in groups:
            inner = place.get(group)
            if not isinstance(inner, dict):
                hint = nearest(group, [k for k in place if isinstance(place[k], dict)])
                raise ConfigError(f"{key}: {group!r} is no group of the config{hint}")
            place = inner
        place[leaf] = value
    return check_config(values)
