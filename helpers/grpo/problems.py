"""The problems of GRPO: what is trained on, and what is held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.config import complete
from helpers.data import preparation as data
from helpers.data.formats import ask
from helpers.errors import ConfigError
from helpers.grpo.answers import parse_gold
from helpers.masking.templates import render
from helpers.runs import Run, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_problems(run: Run) -> tuple[list[data.Row], list[data.Row]]:
    """Returns the problems to train on and those held out, `{"prompt", "gold"}` each.

    Held out are the first of the run's eval rows that end in a gold answer, which SFT
    did not train on either; where there are none, the last of the problems.

    Args:
        run: with `data/` prepared.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
    """
    config, held_out = run.config, []
    rows = data.read_rows(run.require("data/problems.jsonl"))
    questions = [(row["question"], row["gold"]) for row in rows]
    if "eval" in data.parts_of(config.data):
        for row in data.read_rows(run.require("data/eval.jsonl")):
            question, answer = row["messages"][-2:]
            gold = parse_gold(answer["content"])
            if gold is not None:
                held_out.append((question["content"], str(gold)))
    if not held_out:
        cut = max(1, len(questions) - config.grpo_held_out)
        questions, held_out = questions[:cut], questions[cut:]
    problems = [
        {"prompt": ask(question, config.system_prompt), "gold": gold}
        for question, gold in questions + held_out[: config.grpo_held_out]
    ]
    return problems[: len(questions)], problems[len(questions) :]


def training_prompts(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[data.Row]:
    """Returns the problems to train on, those with overlong prompts left out.

    These are counted in `grpo/prompts.json`.

    Args:
        run: with `data/` prepared, and a `max_prompt_length` in tokens.
        tokenizer: of the model.

    Raises:
        ConfigError: every prompt is longer.
    """
    problems, _ = split_problems(run)
    rows, limit = problems, run.config.max_prompt_length
    if limit:
        texts = [render(tokenizer, row["prompt"], for_generation=True) for row in rows]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [row for row, i in zip(rows, ids, strict=True) if len(i) <= limit]
        if not rows:
            raise ConfigError(
                f"max_prompt_length={limit} leaves none of {len(problems)} problems: "
                f"the shortest prompt has {min(map(len, ids))} tokens; raise it"
            )
    counts = {"prompts": len(rows), "left_out": len(problems) - len(rows)}
    write_json(run.path / "grpo" / "prompts.json", counts)
    return rows


def require_prompts(run: Run) -> None:
    """Raises ConfigError when problems do not fill one optimiser step of GRPO.

    TRL drops an incomplete batch, so that such a run would end without a step.
    """
    import torch
    from trl import GRPOConfig

    if not (run.path / "data" / "problems.jsonl").exists():
        return
    values, count = complete(run.config, "grpo"), len(split_problems(run)[0])
    names = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    names += ["num_generations", "steps_per_generation", "generation_batch_size"]
    sizes = {name: values[name] for name in names}
    # on this machine's device: accelerate keeps the last one for the whole process
    cpu = not torch.cuda.is_available()
    settings = GRPOConfig(use_cpu=cpu, bf16=False, report_to="none", **sizes)
    needed = settings.generation_batch_size // settings.num_generations
    if count < needed:
        raise ConfigError(
            f"GRPO would take no step: {count} problems are left to train on, and a "
            f"step takes {needed} ({settings.generation_batch_size} answers, "
            f"{settings.num_generations} to each); give more problems, or lower "
            "grpo_held_out, grpo.per_device_train_batch_size or "
            "grpo.gradient_accumulation_steps"
        )
