"""What is wrong with a config, or will disappoint, in words, before anything is loaded.

`config` refuses what cannot be read; here a readable config is judged: against the
libraries' fields, the machine, the data's size, and what usually works.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from helpers import runtime, shapes
from helpers.config import ConfigError, RunConfig, nearest
from helpers.timing import count_steps, evaluation_minutes, step_rows

# the rates that LoRA is usually trained with; we warn ten times outside of them
USUAL_RATES = {
    "sft": (1e-5, 5e-4, "QLoRA, arXiv:2305.14314, takes 1e-4 and 2e-4"),
    "grpo": (1e-6, 5e-5, "TRL's default is 1e-6, Unsloth's notebooks take 5e-6"),
}
# what chat models end an answer with
ENDS = ["eos", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"]
ENDS += ["<end_of_turn>", "<|end|>"]
MAX_CUT_SHARE = 0.01  # of the answers

# where the libraries declare their fields: reading takes 0.1 s, importing ten
TRAINING = ["trl/trainer/base_config.py", "transformers/training_args.py"]
SOURCES = {
    "sft": ["trl/trainer/sft_config.py", *TRAINING],
    "grpo": ["trl/trainer/grpo_config.py", *TRAINING],
    "lora": ["peft/tuners/lora/config.py", "peft/config.py"],
    "inference": ["transformers/generation/configuration_utils.py"],
}
CLASSES = ["SFTConfig", "GRPOConfig", "_BaseConfig", "TrainingArguments"]
CLASSES += ["LoraConfig", "PeftConfig", "PeftConfigMixin", "GenerationConfig"]
# what the libraries also take, or took, but the rest of the config decides
ELSEWHERE = {
    "sft.max_length": "max_length",
    "sft.max_seq_length": "max_length",
    "sft.output_dir": "name",
    "grpo.output_dir": "name",
    "grpo.max_prompt_length": "max_prompt_length",
    "grpo.reward_weights": "rewards",
}
POSITIVE = ["learning_rate", "num_train_epochs", "num_generations", "eval_steps"]
POSITIVE += ["per_device_train_batch_size", "gradient_accumulation_steps"]
POSITIVE += ["temperature"]  # at 0 the answers of a group are all the same
NUMBERS = [*POSITIVE, "warmup_steps", "max_steps", "save_steps"]


class Advice(NamedTuple):
    """One fault of a config, and its remedy."""

    level: Literal["error", "warning"]
    """An error stops the run; with a warning it runs, and may disappoint."""
    field: str
    """Dotted path into the config, `sft.warmup_steps`."""
    text: str
    """What was found, why it matters, what to do."""


def advise(
    config: RunConfig,
    *,
    machine: runtime.Machine | None = None,
    rows: int | None = None,
) -> list[Advice]:
    """Returns the faults of a config, errors first; none when it is sound.

    Args:
        config: of a recipe, a file or a panel.
        machine: the machine it is to run on; this one by default.
        rows: conversations to train on, once the data are prepared.
    """
    machine = machine or runtime.find_machine()
    found = [*check_names(config), *check_dtype(config, machine), *check_pad(config)]
    for stage in config.stages:
        values = getattr(config, stage)
        wrong = list(check_numbers(stage, values))
        found += wrong or check_stage(stage, values, rows if stage == "sft" else None)
        if stage == "grpo" and not wrong:
            found += [*check_groups(values), *check_rewards(config)]
    try:
        arch = shapes.find_architecture(config.model)
    except shapes.UnknownArchitecture:
        return sorted(found)
    found += check_targets(config.lora.get("target_modules"), arch)
    if all(advice.level == "warning" for advice in found):
        found += check_minutes(config, machine, arch, rows)
    return sorted(found)


def report(advice: list[Advice]) -> str:
    """Returns one line a fault, for a terminal or a notebook.

    >>> report([Advice("warning", "pad_token", "'eos' is refused. Leave it null.")])
    "warning: pad_token: 'eos' is refused. Leave it null."
    >>> report([])
    'The config is sound.'
    """
    return "\n".join(": ".join(a) for a in advice) or "The config is sound."


def require(advice: list[Advice]) -> None:
    """Raises ConfigError with all errors among the faults; warnings pass."""
    errors = [f"{a.field}: {a.text}" for a in advice if a.level == "error"]
    if errors:
        raise ConfigError("\n".join(errors))


def check_lengths(ends: list[int], max_length: int) -> Advice | None:
    """Returns a warning when `max_length` cuts more than 1 % of the answers.

    >>> check_lengths([100, 200, 300], 256).text
    '256 tokens cut 1 of 3 answers (33.3 %): their ends are not learnt. Set it to 320, \
which cuts at most 1 %, or leave the long rows out.'

    Args:
        ends: tokens of each conversation up to its last supervised one, uncut.
        max_length: tokens that are kept.
    """
    allowed = int(MAX_CUT_SHARE * len(ends))
    cut = sum(end > max_length for end in ends)
    if cut <= allowed:
        return None
    enough = 64 * math.ceil(sorted(ends)[-1 - allowed] / 64)
    text = (
        f"{max_length} tokens cut {cut} of {len(ends)} answers "
        f"({100 * cut / len(ends):.1f} %): their ends are not learnt. Set it to "
        f"{enough}, which cuts at most 1 %, or leave the long rows out."
    )
    return Advice("warning", "max_length", text)


@cache
def known_fields(group: str) -> frozenset[str]:
    """Returns the names that a group of the config may hold, empty when unknown.

    Args:
        group: `sft`, `grpo`, `lora` or `inference`.
    """
    names: set[str] = set()
    for place in SOURCES[group]:
        package, _, inner = place.partition("/")
        spec = importlib.util.find_spec(package)
        file = Path(spec.origin if spec and spec.origin else "").parent / inner
        if not file.exists():
            return frozenset()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for kind in tree.body:
            if isinstance(kind, ast.ClassDef) and kind.name in CLASSES:
                names |= declared(kind)
    return frozenset(name for name in names if not name.startswith("_"))


def declared(kind: ast.ClassDef) -> set[str]:
    """Returns the annotated fields of a class, and the kwargs that `__init__` takes."""
    names, nodes = set(), list[ast.AST](kind.body)
    for member in kind.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            nodes += ast.walk(member)
    for node in nodes:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names


def check_names(config: RunConfig) -> Iterator[Advice]:
    """Finds names in `sft`, `grpo`, `lora`, `inference` that their library lacks."""
    for group in SOURCES:
        known = known_fields(group)
        for name in getattr(config, group):
            field = f"{group}.{name}"
            if field in ELSEWHERE:
                text = f"the config's own {ELSEWHERE[field]} decides it. Remove it."
                yield Advice("error", field, text)
            # Unsloth adds fields of its own to TRL's configs
            elif known and name not in known and not name.startswith("unsloth_"):
                hint = nearest(name, known) or "; remove it"
                yield Advice("error", field, f"the library has no such field{hint}")


def check_dtype(config: RunConfig, machine: runtime.Machine) -> Iterator[Advice]:
    """Finds a dtype that the machine has no units for, and flags that fight with it."""
    flags = {"bf16": "bfloat16", "fp16": "float16"}
    stages = {stage: getattr(config, stage) for stage in config.stages}
    by_hand = [(s, f) for s, v in stages.items() for f in flags if v.get(f) is not None]
    if config.dtype != "bfloat16" and not by_hand:
        return  # nothing to judge, and torch need not be loaded
    dtype, reason = runtime.choose_dtype(machine, config.dtype)
    taken = str(dtype).removeprefix("torch.")
    if config.dtype == "bfloat16" and taken != "bfloat16":
        text = f"bfloat16, but {taken} is used on {machine.name}: {reason}. "
        yield Advice("warning", "dtype", text + "Set it to auto, or take a newer GPU.")
    for stage, flag in by_hand:
        if stages[stage][flag] != (machine.device == "cuda" and taken == flags[flag]):
            text = (
                f"{stages[stage][flag]}, but the model computes in {taken} on "
                f"{machine.name}. Remove it: dtype and the machine decide."
            )
            yield Advice("error", f"{stage}.{flag}", text)


def check_pad(config: RunConfig) -> Iterator[Advice]:
    """Finds padding with the token that ends answers."""
    if config.pad_token in ENDS:
        text = (
            f"{config.pad_token!r} ends answers, and no loss is taken on padding: the "
            "model would never learn to stop. Leave it null, and another token pads."
        )
        yield Advice("warning", "pad_token", text)


def check_numbers(stage: str, values: dict[str, Any]) -> Iterator[Advice]:
    """Finds values that should be numbers and are not, or must be above 0."""
    for name in NUMBERS:
        value = values.get(name, 1)
        if name == "eval_steps" and value is None:
            continue
        number = isinstance(value, int | float) and math.isfinite(value)
        if isinstance(value, bool) or not number:
            text = f"found {value!r}; expected a number, without quotes"
            yield Advice("error", f"{stage}.{name}", text)
        elif name in POSITIVE and not value > 0:
            text = f"found {value}; expected more than 0"
            yield Advice("error", f"{stage}.{name}", text)


def check_stage(
    stage: str, values: dict[str, Any], rows: int | None
) -> Iterator[Advice]:
    """Finds a rate, a warm-up, a length or saves that defeat the training."""
    low, high, source = USUAL_RATES[stage]
    rate = values.get("learning_rate", low)
    if round(rate / low, 6) < 0.1 or round(rate / high, 6) > 10:
        text = (
            f"{rate:g} is more than ten times outside the {low:g} to {high:g} usual "
            f"for LoRA ({source}): likely nothing is learnt, or training diverges. "
            "Choose a rate in that range."
        )
        yield Advice("warning", f"{stage}.learning_rate", text)

    steps, warmup = count_steps(values, rows), values.get("warmup_steps", 0)
    if steps and values.get("lr_scheduler_type") != "constant":
        # below 1 it is a share of the run, as in transformers' get_warmup_steps
        length = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
        if length >= steps:
            text = (
                f"{warmup} in a run of {steps} steps: the rate never reaches its peak. "
                f"Set it to {steps // 10}, or raise the number of steps."
            )
            yield Advice("warning", f"{stage}.warmup_steps", text)

    counts = rows and values.get("max_steps", -1) > 0 and not values.get("packing")
    seen, a_step = values.get("max_steps", 0) * step_rows(values), step_rows(values)
    if rows and counts and seen < rows:
        text = (
            f"{steps} steps of {a_step} rows see {seen} of {rows} "
            f"({100 * seen / rows:.0f} %). One epoch needs "
            f"{math.ceil(rows / a_step)}; or take fewer rows by data.train_rows."
        )
        yield Advice("warning", f"{stage}.max_steps", text)

    save, every = values.get("save_steps", 500), values.get("eval_steps")
    best = values.get("load_best_model_at_end") and every
    if best and round(save / every, 6) % 1:  # both may be shares of the run
        text = f"{save} is no multiple of eval_steps={every}: the best step may not be "
        yield Advice("error", f"{stage}.save_steps", f"{text}saved. Set it to {every}.")


def check_groups(values: dict[str, Any]) -> Iterator[Advice]:
    """Finds GRPO batches that do not hold whole groups of answers to a prompt."""
    group = values.get("num_generations", 8)
    accumulation = values.get("gradient_accumulation_steps", 1)
    rounds = values.get("steps_per_generation") or accumulation
    batch = step_rows(values) // accumulation * rounds
    batch = values.get("generation_batch_size") or batch
    if group < 2:
        text = f"{group}, but an answer is judged against others. Set it to 2 or more."
        yield Advice("error", "grpo.num_generations", text)
    elif batch % group:
        text = (
            f"{group}, but {batch} answers are generated at a time, no multiple of it. "
            f"Set per_device_train_batch_size to {group}, or change this."
        )
        yield Advice("error", "grpo.num_generations", text)


def check_rewards(config: RunConfig) -> Iterator[Advice]:
    """Yields a warning when the rewards may pay a wrong answer more than a right one.

    >>> from helpers import recipes
    >>> list(check_rewards(recipes.load("demo")))
    []
    """
    from helpers.rewards import margin

    least = margin(config.rewards)
    if least <= 0:
        yield Advice(
            "warning",
            "rewards",
            f"with these weights the worst right answer gets {-least:.2f} less than "
            "the best wrong one, or the same: training may prefer wrong ones. Raise "
            "the weight of correctness.",
        )


def check_targets(targets: Any, arch: shapes.Architecture) -> Iterator[Advice]:
    """Finds target modules that the model lacks; patterns are left to PEFT."""
    layer = shapes.linear_shapes(arch)
    known = [*layer, "lm_head", "embed_tokens"]
    for target in targets if isinstance(targets, list) else []:
        if str(target).rpartition(".")[2] not in known:
            hint = nearest(str(target), known)
            text = f"the model has no {target!r}{hint} (it has {', '.join(layer)})"
            yield Advice("error", "lora.target_modules", text)


def check_minutes(
    config: RunConfig,
    machine: runtime.Machine,
    arch: shapes.Architecture,
    rows: int | None,
) -> Iterator[Advice]:
    """Finds held-out sets that take longer than `evaluation.minutes`."""
    budget = config.evaluation.minutes
    for name, part in evaluation_minutes(config, machine, arch, rows).items():
        if part.minutes > budget:
            text = (
                f"{part.rows} held-out rows, {part.times} times, take up to "
                f"{part.minutes:.0f} minutes on {machine.name}; evaluation.minutes is "
                f"{budget:g}. Hold out about {int(part.rows * budget / part.minutes)}, "
                "or allow more minutes."
            )
            yield Advice("warning", f"data.{name}_rows", text)
