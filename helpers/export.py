"""Adapter and merged model, each reloaded and compared with the trained one."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig, Stage
from helpers.data import preparation as data
from helpers.data.formats import Messages
from helpers.errors import ModelError
from helpers.grpo.prompts import to_prompts
from helpers.inference.generation import Answer, generate
from helpers.masking.templates import answer_marks, render, stop_token_ids
from helpers.models import load as models
from helpers.runs import Run
from helpers.stages import require_stage

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

LOST_STOPS = 0.2  # share of the answers that may end in the trained model alone


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
    write_stops(tokenizer, merged.generation_config)
    merged.config.eos_token_id = tokenizer.eos_token_id
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    merged.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    del model, merged
    runtime.free_memory()


def write_stops(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> None:
    """Writes into what is exported how an answer ends, for programs that are not ours.

    All tokens that end a turn go into the generation config. The tokenizer's EOS, by
    which other programs stop, becomes the token that the template ends an answer with,
    unless the template prints EOS elsewhere.
    """
    settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant")]
    text, before = render(tokenizer, turns), tokenizer.eos_token
    _, closing = answer_marks(tokenizer)
    ids = tokenizer(closing, add_special_tokens=False).input_ids
    ends = [i for i in ids if i in settings.eos_token_id]
    if ends and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        if render(tokenizer, turns) != text:
            tokenizer.eos_token = before


def ask_plainly(
    folders: dict[Path, dict[str, Any]], prompts: list[Messages], max_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns the answers of exported folders in plain transformers, by folder.

    Args:
        folders: and how each is loaded, see `ask_exported.ask`.
        prompts: conversations that end in a user turn.
        max_tokens: answers are cut here.

    Raises:
        ModelError: a folder cannot be loaded or asked without this project.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        request: dict[str, Any] = {"prompts": prompts, "max_tokens": max_tokens}
        request |= {"folders": {str(k): v for k, v in folders.items()}, "out": str(out)}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("ask_exported.py"))],
            input=json.dumps(request),
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(
                "the exported files cannot be used in plain transformers: "
                f"{reason[:300]}"
            )
        return json.loads(out.read_text(encoding="utf-8"))


def compare_plain(
    folder: Path, expected: list[Answer], plain: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns how exported files answer in plain transformers.

    `agreement` is the share of answers equal to the trained model's, `stop_rate` that
    of answers that end by themselves, both 0 to 1.

    Raises:
        ModelError: answers of the trained model end, and those of the files do not.
    """
    same = sum(a.text == b["text"] for a, b in zip(expected, plain, strict=True))
    stopped = sum(answer["stopped"] for answer in plain)
    lost = sum(answer.stopped for answer in expected) - stopped
    if lost > max(1, LOST_STOPS * len(expected)):
        raise ModelError(
            f"{folder}: {lost} of {len(expected)} answers end by themselves in the "
            "trained model but run on in plain transformers; its template or its stop "
            "tokens do not reach other programs"
        )
    rates = {"agreement": same / len(plain), "stop_rate": stopped / len(plain)}
    return {name: round(rate, 4) for name, rate in rates.items()}


def held_out_prompts(run: Run, count: int) -> tuple[list[Messages], list[str]]:
    """Returns prompts to compare answers to, and their gold answers where known.

    Held-out problems; in a run without them the first questions of conversations,
    held-out ones first.
    """
    parts = data.parts_of(run.config.data)
    name = next(name for name in (*HELD_OUT, *data.PARTS) if name in parts)
    rows = data.read_rows(run.require(f"data/{name}.jsonl"))[:count]
    if "gold" in rows[0]:
        asked = to_prompts(run, rows)
        return [row["prompt"] for row in asked], [row["gold"] for row in asked]
    return [data.first_question(row["messages"]) for row in rows], []


def export(run: Run, stage: Stage | None = None, prompts: int = 16) -> dict[str, Any]:
    """Exports a stage's model and returns the report part, agreement measured.

    Writes `export/adapter` and `export/merged`. Both are loaded again from disk and
    answer held-out prompts greedily; `greedy_agreement` is the share of answers that
    equal the trained model's, letter for letter, `reloaded` how far their logits are
    from it (`models.compare_saved`). `plain` says the same of the files
    in plain transformers, see `compare_plain`.

    Args:
        run: with the stage trained.
        stage: `sft` or `grpo`; the run's last one by default.
        prompts: how many prompts are compared.

    Raises:
        ConfigError: the run has no such stage.
        MissingInput: the stage has not been trained.
        ModelError: the exported files do not work without this project.
    """
    config = run.config
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    trained = run.require(f"{stage}/adapter")
    folder = run.path / "export"
    folder.mkdir(exist_ok=True)
    options = models.options(config)
    bits, half = models.resolve_weights(config.weights), models.half_of(config)
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
    settings = copy.deepcopy(model.generation_config)
    del model
    runtime.free_memory()
    own = {name: options[name] for name in ("template", "pad_token")}
    written = models.load_tokenizer(config.model, **own)
    write_stops(written, settings)
    written.save_pretrained(folder / "adapter")
    settings.save_pretrained(folder / "adapter")

    stopped = sum(a.stopped for a in expected) / len(expected)
    trained_part = {"prompts": len(asked), "stop_rate": round(stopped, 4)}
    part: dict[str, Any] = {"trained": trained_part}
    model, tokenizer = models.load_model(
        config.model, adapter=folder / "adapter", **options
    )
    part["adapter"] = {
        "path": str(folder / "adapter"),
        "greedy_agreement": agreement(expected, answer(model, tokenizer)),
        "reloaded": models.compare_saved(model, trained, half, bits),
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
        "reloaded": models.compare_saved(model, trained, half, bits),
    }
    if gold:
        part["trained"]["right"] = count_right(expected, gold)
        part["merged"]["right"] = count_right(merged_answers, gold)
    del model
    runtime.free_memory()
    # the adapter was trained on the weights as they were loaded
    arithmetic = runtime.choose_dtype(runtime.find_machine(), config.dtype)[0]
    quantised = models.quantization(bits, arithmetic, config.double_quant)
    values = quantised and quantised.to_diff_dict()
    values = values and {k: v for k, v in values.items() if not k.startswith("_")}
    dtype = str(arithmetic).removeprefix("torch.")
    folders: dict[Path, dict[str, Any]] = {
        folder / "adapter": {"dtype": dtype, "quantised": values},
        folder / "merged": {"dtype": "auto"},
    }
    plain = ask_plainly(folders, asked, config.evaluation.max_new_tokens)
    for path in folders:
        part[path.name]["plain"] = compare_plain(path, expected, plain[str(path)])
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("export", part)
    return part


def count_right(answers: list[Answer], gold: list[str]) -> int:
    """Returns how many answers are right."""
    from helpers.grpo.rewards import is_correct

    return sum(is_correct(a.text, g) for a, g in zip(answers, gold, strict=True))
