"""Adapter and merged model, each reloaded and compared with the trained one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import data, models, runtime
from helpers.generation import Answer, generate
from helpers.runs import Run

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


def merge(name: str, adapter: Path | str, weights: str, folder: Path) -> None:
    """Writes base + adapter as one ordinary model of 16 (on a CPU 32) bits a weight.

    The adapter was trained on top of the weights as loaded. Where those were 4 or 8
    bit they are dequantised first, so that the merged model computes what was trained
    and not the adapter on weights it never saw.

    Args:
        name: the base model.
        adapter: the adapter's folder or hub id.
        weights: `4bit`, `8bit` or `16bit`, as in training.
        folder: where the model goes, with tokenizer and chat template.
    """
    model, tokenizer = models.load_model(name, engine="transformers", weights=weights)
    if weights != "16bit":
        model = model.dequantize(dtype=model.dtype)
    model = models.load_adapter(model, adapter, engine="transformers")
    merged = model.merge_and_unload()
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    merged.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    del model, merged
    runtime.free_memory()


def export(run: Run, stage: str = "grpo", prompts: int = 16) -> dict[str, Any]:
    """Exports a stage's model and returns the report part, agreement measured.

    Writes `export/adapter` and `export/merged`. Both are loaded again from disk and
    answer held-out problems greedily; `greedy_agreement` is the share of answers that
    equal the trained model's, letter for letter.

    Args:
        run: with the stage trained.
        stage: `sft` or `grpo`.
        prompts: how many problems of `test` are compared.

    Raises:
        MissingInput: the stage has not been trained.
    """
    config = run.config
    trained = run.require(f"{stage}/adapter")
    folder = run.path / "export"
    folder.mkdir(exist_ok=True)
    bits = models.resolve_weights(config.weights)
    options: dict[str, Any] = {"engine": config.engine, "max_length": config.max_length}
    as_trained = {**options, "weights": bits}
    problems = data.read_rows(run.require("data/test.jsonl"))[:prompts]
    asked = [data.ask(p["question"], config.system_prompt) for p in problems]

    def answer(model: PreTrainedModel, tokenizer: Any) -> list[Answer]:
        return generate(
            model,
            tokenizer,
            asked,
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.batch_size,
        )

    model, tokenizer = models.load_model(config.model, adapter=trained, **as_trained)
    # brings transformers in, which Unsloth wants imported after itself
    from helpers.callbacks import save_adapter

    expected = answer(model, tokenizer)
    save_adapter(model, folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    del model
    runtime.free_memory()

    part: dict[str, Any] = {}
    model, tokenizer = models.load_model(
        config.model, adapter=folder / "adapter", **as_trained
    )
    part["adapter"] = {
        "path": str(folder / "adapter"),
        "greedy_agreement": agreement(expected, answer(model, tokenizer)),
    }
    del model
    runtime.free_memory()

    merge(config.model, folder / "adapter", bits, folder / "merged")
    model, tokenizer = models.load_model(
        str(folder / "merged"), weights="16bit", **options
    )
    merged_answers = answer(model, tokenizer)
    gold = [p["gold"] for p in problems]
    part["merged"] = {
        "path": str(folder / "merged"),
        "greedy_agreement": agreement(expected, merged_answers),
        "right": count_right(merged_answers, gold),
    }
    part["trained"] = {"right": count_right(expected, gold), "prompts": len(problems)}
    del model
    runtime.free_memory()
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("export", part)
    return part


def count_right(answers: list[Answer], gold: list[str]) -> int:
    """Returns how many answers are right."""
    from helpers.rewards import is_correct

    return sum(is_correct(a.text, g) for a, g in zip(answers, gold, strict=True))
