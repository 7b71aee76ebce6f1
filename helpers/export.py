"""Adapter and merged model, each reloaded and compared with the trained one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import data, models, runtime
from helpers.config import RunConfig, Stage
from helpers.formats import Messages
from helpers.generation import Answer, generate
from helpers.runs import Run
from helpers.stages import require_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def agreement(ours: list[Answer], theirs: list[Answer]) -> float:
    """Returns the share of prompts that two models answer with the same text, 0 to 1.

    >>> a, b = Answer("4", 1, True), Answer("5", 1, True)
    >>> agreement([a, b], [a, a])
    0.5
    """
    same = sum(x.text == y.text for x, y in zip(ours, theirs, strict=True))
    return same / len(ours)


def merge(config: RunConfig, adapter: Path | str, folder: Path) -> None:
    """Writes base + adapter as one ordinary model of 16 (on a CPU 32) bits a weight.

    The adapter was trained on top of the weights as loaded. Where those were 4 or 8
    bit they are dequantised first, so that the merged model computes what was trained
    and not the adapter on weights it never saw.

    Args:
        config: names the base model and how it was loaded in training.
        adapter: the adapter's folder or hub id.
        folder: where the model goes, with tokenizer and chat template.
    """
    options = {**models.options(config), "engine": "transformers"}
    model, tokenizer = models.load_model(config.model, **options)
    if models.resolve_weights(config.weights) != "16bit":
        model = model.dequantize(dtype=model.dtype)
    model = models.load_adapter(model, adapter, engine="transformers")
    merged = models.merge_adapter(model)
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    merged.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    del model, merged
    runtime.free_memory()


def held_out_prompts(run: Run, count: int) -> tuple[list[Messages], list[str]]:
    """Returns prompts to compare answers to, and their gold answers where known.

    Held-out problems; in a run without them the first questions of conversations,
    held-out ones first.
    """
    parts = data.parts_of(run.config.data)
    order = ("test", "test_new", "test_chat", "eval", "train", "problems")
    name = next(name for name in order if name in parts)
    rows = data.read_rows(run.require(f"data/{name}.jsonl"))[:count]
    if "gold" in rows[0]:
        system = run.config.system_prompt
        prompts = [data.ask(row["question"], system) for row in rows]
        return prompts, [row["gold"] for row in rows]
    return [data.first_question(row["messages"]) for row in rows], []


def export(run: Run, stage: Stage | None = None, prompts: int = 16) -> dict[str, Any]:
    """Exports a stage's model and returns the report part, agreement measured.

    Writes `export/adapter` and `export/merged`. Both are loaded again from disk and
    answer held-out prompts greedily; `greedy_agreement` is the share of answers that
    equal the trained model's, letter for letter.

    Args:
        run: with the stage trained.
        stage: `sft` or `grpo`; the run's last one by default.
        prompts: how many prompts are compared.

    Raises:
        ConfigError: the run has no such stage.
        MissingInput: the stage has not been trained.
    """
    config = run.config
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    trained = run.require(f"{stage}/adapter")
    folder = run.path / "export"
    folder.mkdir(exist_ok=True)
    options = models.options(config)
    asked, gold = held_out_prompts(run, prompts)

    def answer(model: PreTrainedModel, tokenizer: Any) -> list[Answer]:
        return generate(
            model,
            tokenizer,
            asked,
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.batch_size,
        )

    model, tokenizer = models.load_model(config.model, adapter=trained, **options)
    expected = answer(model, tokenizer)
    models.save_adapter(model, folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    del model
    runtime.free_memory()

    part: dict[str, Any] = {"trained": {"prompts": len(asked)}}
    model, tokenizer = models.load_model(
        config.model, adapter=folder / "adapter", **options
    )
    part["adapter"] = {
        "path": str(folder / "adapter"),
        "greedy_agreement": agreement(expected, answer(model, tokenizer)),
    }
    del model
    runtime.free_memory()

    merge(config, folder / "adapter", folder / "merged")
    # the template and the pad token come with it
    options |= {"weights": "16bit", "template": "own", "pad_token": None}
    model, tokenizer = models.load_model(str(folder / "merged"), **options)
    merged_answers = answer(model, tokenizer)
    part["merged"] = {
        "path": str(folder / "merged"),
        "greedy_agreement": agreement(expected, merged_answers),
    }
    if gold:
        part["trained"]["right"] = count_right(expected, gold)
        part["merged"]["right"] = count_right(merged_answers, gold)
    del model
    runtime.free_memory()
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("export", part)
    return part


def count_right(answers: list[Answer], gold: list[str]) -> int:
    """Returns how many answers are right."""
    from helpers.rewards import is_correct

    return sum(is_correct(a.text, g) for a, g in zip(answers, gold, strict=True))
