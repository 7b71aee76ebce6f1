"""The configuration of one run; the libraries' classes know what they take."""

import importlib
import json
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, Field

from helpers.errors import ConfigError, nearest

Stage = Literal["sft", "grpo"]
Gguf = Literal["gguf:f16", "gguf:q8_0", "gguf:q4_k_m"]
Format = Literal["adapter", "merged", Gguf, "w4a16", "awq", "space"]
HELD_OUT = ("test", "test_new", "test_chat", "eval", "general")  # problems, then chats
SETS = ("eval", "problems", "test", "test_new", "general")  # with sources of their own
SYSTEM_PROMPT = "Solve step by step. End with a line like this: #### 42"
CLASSES = {"sft": "trl.SFTConfig", "grpo": "trl.GRPOConfig", "lora": "peft.LoraConfig"}
CLASSES |= {"inference": "transformers.GenerationConfig"}  # take a group's values
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Source(BaseModel, extra="forbid", frozen=True):
    """Rows of a file or of a hub dataset, with options."""

    path: str = Field(min_length=1)  # or owner/name[/config][:split] on the hub
    rows: Count | None = None  # at most
    weight: Positive | None = None  # share of the mix
    format: str | None = None  # null = detected
    stream: bool = False  # a hub set: nothing is stored on disk

    def __str__(self) -> str:
        return self.path


Rows = str | Source


class DataConfig(BaseModel, extra="forbid", validate_assignment=True):
    train: list[Rows] = Field([], description="SFT rows, one path (or {...}) a line")
    eval: Rows | None = Field(None, description="rows for the eval loss alone")
    eval_share: Share | None = Field(None, description="of train, instead of eval")
    test_share: Share | None = Field(None, description="of train, for metrics alone")
    problems: Rows | None = Field(None, description="questions with answers, for GRPO")
    test: Rows | None = Field(None, description="held-out problems like training's")
    test_new: Rows | None = Field(None, description="held-out problems of another kind")
    general: Rows | None = Field(None, description="not trained for: was it forgotten?")
    train_rows: Count | None = Field(None, description="cap a source; null = all")
    drop_unusable: bool = Field(False, description="leave bad rows out, counted")
    ignore: list[str] = Field([], description="columns and fields to leave out: tools")
    max_chars: Count | None = Field(None, description="leave longer rows out, counted")
    eval_rows: Count | None = None
    test_rows: Count | None = None
    test_new_rows: Count | None = None
    general_rows: Count | None = None


class EvaluationConfig(BaseModel, extra="forbid", validate_assignment=True):
    batch_size: Count | None = Field(None, description="null = by machine and model")
    max_new_tokens: Count = Field(256, description="answers are cut here")
    text_rows: Count = Field(100, description="held-out conversations to answer")
    general_tokens: Count = Field(
        16, description="answers to data.general are cut here"
    )
    labels: list[str] | None = Field(None, min_length=1)  # classes of the answers


class RunConfig(
    BaseModel, extra="forbid", validate_assignment=True, use_attribute_docstrings=True
):
    """One run: model, data, and how both are put together."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the folder below runs/")
    recipe: str = Field("", description="the recipe it started from")
    model: str = Field(min_length=1, description="hub id or folder; size takes memory")
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    "unsloth is faster and takes less memory; auto: that, on a GPU that has it"
    stages: list[Stage] = Field(["sft", "grpo"], min_length=1)
    "one a line: sft learns from answers, grpo from rewards, which takes longer"
    weights: Literal["auto", "4bit", "8bit", "16bit"] = "auto"
    "of the frozen model: fewer bits save memory and lose precision; auto: 4, on a GPU"
    double_quant: bool = Field(True, description="4bit: quantise the scales too")
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    "of arithmetic: float16 may overflow; auto: what this GPU computes fast"
    template: str = Field("own", description="own, instruction, llama-2, or a file")
    thinking: bool | None = Field(None, description="null = as the template does")
    pad_token: str | None = Field(None, description="null = chosen; never eos")
    special_tokens: Literal["neutralise", "refuse", "keep"] = "neutralise"  # in texts
    trust_remote_code: bool = Field(False, description="run Python of the model's")
    max_length: int = Field(1024, ge=16, description="tokens a row; takes memory")
    max_prompt_length: Count | None = Field(None, description="longer ones are dropped")
    grpo_minutes: Positive | None = Field(None, description="null = by max_steps")
    grpo_held_out: Count = Field(32, description="problems to choose by; take time")
    sampler: Literal["auto", "copy", "model"] = "auto"
    "copy: 16-bit weights on a GPU are faster and take memory; auto: if they fit"
    loss_on: Literal["all", "assistant", "last"] = "assistant"
    "whose words are learnt: everybody's, the assistant's, or its last answer's"
    system_prompt: str = SYSTEM_PROMPT
    "stands before every conversation, here and later; its tokens take time"
    seed: int = Field(3407, ge=0, description="of all that is drawn by chance")
    best_by: Literal["eval_loss", "loss"] = "eval_loss"
    "the adapter with the lowest is kept; an eval loss takes time, and is honest"
    layout: Literal["auto", "pinned", "compiled"] = "auto"
    "of a step's rows: auto tries which is fastest, pinned does not, compiled packs"
    save_minutes: Positive = Field(10.0, description="minutes between checkpoints")
    sft_adapter: str | None = Field(None, description="to use instead of training SFT")
    export: list[Format] = Field([], description="formats that `train` ends in")
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    # handed unchanged to the libraries' classes
    inference: dict[str, Any] = {}  # for chats
    lora: dict[str, Any] = {}
    sft: dict[str, Any] = {}
    grpo: dict[str, Any] = {}
    rewards: dict[str, pydantic.FiniteFloat] = {"correctness": 1.0}  # name -> weight

    @pydantic.model_validator(mode="after")
    def fits_together(self) -> Self:
        if uploads := [name for name in (*self.sft, *self.grpo) if "hub" in name]:
            text = "a config uploads nothing; remove it, and use `export --push`"
            raise ValueError(f"{uploads[0]}: {text}")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages: each once expected (found {self.stages})")
        data, labels = self.data, self.evaluation.labels
        has_sft, has_eval = "sft" in self.stages, bool(data.eval or data.eval_share)
        if has_sft and not data.train and not self.sft_adapter:
            raise ValueError("the sft stage needs data.train")
        if "grpo" in self.stages and not data.problems:
            raise ValueError("the grpo stage needs data.problems")
        if self.layout == "compiled" and self.engine != "transformers":
            raise ValueError("layout='compiled' needs engine='transformers'")
        if data.eval and data.eval_share:
            raise ValueError("give data.eval or data.eval_share, not both")
        if has_sft and self.best_by == "eval_loss" and not has_eval:
            needs = "best_by='eval_loss' needs data.eval or data.eval_share"
            raise ValueError(f"{needs}; or use best_by='loss'")
        for name in SETS:
            if getattr(getattr(data, name), "weight", None) is not None:
                raise ValueError(f"data.{name}: a weight is of data.train alone")
        if labels is not None and len({x.strip() for x in labels} - {""}) < len(labels):
            raise ValueError("evaluation.labels: different labels expected, or null")
        return self


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a dumped config's values by dotted name, like `sft.max_steps`."""
    groups = {k: v for k, v in values.items() if isinstance(v, dict)}
    pairs = {f"{g}.{k}": v for g, inner in groups.items() for k, v in inner.items()}
    return {k: v for k, v in values.items() if k not in groups} | pairs


def check_config(values: dict[str, Any]) -> RunConfig:
    """Returns the config of a dictionary; ConfigError has a line for each fault."""
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        # a path that is no string may still be a Source: that fault says more
        faults = [fault for fault in error.errors() if "str" not in fault["loc"]]
    lines, kinds = [], (RunConfig, DataConfig, EvaluationConfig, Source)
    known = [name for kind in kinds for name in kind.model_fields]
    for fault in faults:
        path = [str(part) for part in fault["loc"] if part != "Source"]
        field, text = ".".join(path), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            text = f"{field} is not a field of the config{nearest(path[-1], known)}"
        elif field:
            text = f"{field}: {text} (found {repr(fault['input'])[:80]})"
        lines.append(text)
    raise ConfigError("\n".join(lines))


def read_config(path: Path) -> RunConfig:
    try:
        return check_config(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        text = f"no config at {path}; run notebook 00_setup, or train"
        raise ConfigError(text) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns a copy with fields changed; `sft__max_steps=5` reaches into a group."""
    values = config.model_dump()
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")  # an unknown group is refused below
        holder = values.setdefault(group, {}) if group else values
        if not isinstance(holder, dict):
            raise ConfigError(f"{key}: {group} is one field, without others in it")
        holder[leaf] = value
    return check_config(values)


def library_class(group: str) -> Any:
    package, name = CLASSES[group].split(".")
    kind = getattr(importlib.import_module(package), name)
    # Unsloth puts subclasses with other defaults in the place of TRL's own
    return next(k for k in kind.__mro__ if k.__module__.startswith(f"{package}."))


def library_fields(group: str) -> dict[str, Any]:
    return getattr(library_class(group), "__dataclass_fields__", {})


def defaults(group: str) -> dict[str, Any]:
    """Returns the defaults of a group's class, which takes ten seconds to import."""
    fields = library_fields(group).values()
    values = {f.name: f.default for f in fields if f.default is not MISSING}
    # TRL's fused AdamW hides from accelerate the steps that fp16 skips
    return values | ({"optim": "adamw_torch"} if "optim" in values else {})


def complete(config: RunConfig, stage: Stage) -> dict[str, Any]:
    return {**defaults(stage), **getattr(config, stage)}
