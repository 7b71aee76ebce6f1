"""Adapter and merged model, each reloaded and compared with the trained one."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig, Stage
from helpers.data import preparation as data
from helpers.data.formats import Messages, ask
from helpers.errors import ModelError
from helpers.files import read_rows
from helpers.grpo.answers import is_correct
from helpers.inference.generation import generate
from helpers.masking.templates import answer_marks, render, stop_token_ids
from helpers.models import adapters, load
from helpers.models.hub import new_folder
from helpers.runs import Run
from helpers.training.inputs import require_stage

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Answers = list[tuple[str, bool]]  # texts, and whether they ended by themselves
LOST_STOPS = 0.2  # share of the answers that may end in the trained model alone


def export(run: Run, stage: Stage | None = None, prompts: int = 16) -> dict[str, Any]:
    """Returns the report part of a stage's exported model, and writes its files.

    `reloaded` compares their logits with the trained model's. In another process they
    answer held-out prompts in plain transformers: `greedy_agreement` is the share of
    answers equal to the trained model's, `stop_rate` that of answers that end.

    Args:
        run: with the stage trained.
        stage: the run's last one by default.
        prompts: how many prompts are compared.

    Raises:
        ConfigError, MissingInput: the run has no such stage, or has not trained it.
        ModelError: the exported files do not work without this project.
    """
    config, folder = run.config, run.path / "export"
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    trained = run.require(f"{stage}/adapter")
    options, length = load.options(config), config.evaluation.max_new_tokens
    weights, half = load.resolve_weights(config.weights), load.half_of(config)
    questions, gold = held_out_prompts(run, prompts)
    model, tokenizer = load.load_model(config.model, adapter=trained, **options)
    reloaded = {"adapter": adapters.compare_saved(model, trained, half, weights)}
    decoding = {"max_new_tokens": length, "batch_size": config.evaluation.batch_size}
    answers = generate(model, tokenizer, questions, **decoding)
    expected = [(answer.text, answer.stopped) for answer in answers]
    write_stops(tokenizer, model.generation_config)
    with new_folder(folder / "adapter") as scratch:
        ours = shutil.ignore_patterns(adapters.WITNESS)
        shutil.copytree(trained, scratch, ignore=ours, dirs_exist_ok=True)
        tokenizer.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
    del model
    runtime.free_memory()
    merge(config, trained, folder / "merged")
    alone = {"weights": "16bit", "template": "own", "pad_token": None}
    model, _ = load.load_model(str(folder / "merged"), **options | alone)
    reloaded["merged"] = adapters.compare_saved(model, trained, half, weights)
    del model
    runtime.free_memory()

    part: dict[str, Any] = compare_answers(trained, expected, expected, gold)
    part = {"trained": {"prompts": len(questions), **part}}
    # the adapter was trained on the weights as they were loaded
    dtype, _ = runtime.choose_dtype(runtime.find_machine(), config.dtype)
    quantised = load.quantization(weights, dtype, config.double_quant)
    own = str(dtype).removeprefix("torch."), quantised
    for name, loading in (("adapter", own), ("merged", ("auto", None))):
        texts = ask_plainly(folder / name, *loading, questions, length)
        values = compare_answers(folder / name, texts, expected, gold)
        places = {"path": str(folder / name), "reloaded": reloaded[name]}
        part[name] = places | values
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("export", part)
    return part


def held_out_prompts(run: Run, count: int) -> tuple[list[Messages], list[str]]:
    """Returns prompts to compare answers to, and their gold answers where known."""
    parts = data.parts_of(run.config.data)
    name = next(name for name in (*HELD_OUT, *parts) if name in parts)
    rows = read_rows(run.require(f"data/{name}.jsonl"))[:count]
    if "gold" not in rows[0]:
        return [data.first_question(row["messages"]) for row in rows], []
    system = run.config.system_prompt
    return [ask(r["question"], system) for r in rows], [r["gold"] for r in rows]


def merge(config: RunConfig, adapter: Path | str, folder: Path) -> None:
    """Writes base and adapter as one model in 16 bit (fp32 on a CPU).

    The adapter was trained on the weights as loaded, so these are dequantised first.
    """
    options = {**load.options(config), "engine": "transformers"}
    model, tokenizer = load.load_model(config.model, **options)
    if load.resolve_weights(config.weights) != "16bit":
        model = model.dequantize(dtype=model.dtype)
    model = load.load_adapter(model, adapter, engine="transformers")
    model = adapters.merge_adapter(model)
    write_stops(tokenizer, model.generation_config)
    model.config.eos_token_id = tokenizer.eos_token_id
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    del model
    runtime.free_memory()


def write_stops(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> None:
    """Writes the end of an answer into what is exported, for other programs.

    Some of them stop at the tokenizer's EOS alone: it becomes the token that ends an
    answer, unless the template prints EOS elsewhere.
    """
    settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant")]
    text, before = render(tokenizer, turns), tokenizer.eos_token
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in settings.eos_token_id]
    if ends and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        if render(tokenizer, turns) != text:
            tokenizer.eos_token = before


def answer_plainly(
    folder: str, dtype: str, quantised: Any, prompts: list[Any], max_tokens: int
) -> Answers:
    """Returns greedy answers in plain transformers and PEFT, and whether they ended.

    Only its source is run, in another process, where nothing of this project makes up
    for what the files lack. PEFT loads adapters: transformers 5.17 loses parts of some.
    """
    import os

    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    adapter = os.path.exists(f"{folder}/adapter_config.json")
    loader = AutoPeftModelForCausalLM if adapter else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=quantised and transformers.BitsAndBytesConfig(**quantised),
    ).eval()
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.update(max_new_tokens=max_tokens, do_sample=False)
    form = {"padding": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **form)
    output = model.generate(**inputs.to(model.device), generation_config=settings)
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        stops = (n for n, token in enumerate(row) if token in settings.eos_token_id)
        end = next(stops, None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        answers.append((text.strip(), end is not None))
    return answers


def ask_plainly(folder: Path, *arguments: Any) -> Answers:
    """Returns what `answer_plainly` does, run in a process without this project."""
    source = inspect.getsource(answer_plainly)
    script = f"from __future__ import annotations\nimport json, sys\n{source}\n"
    script += "print(json.dumps(answer_plainly(*json.load(sys.stdin))))"
    request = json.dumps([str(folder), *arguments])
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2][:300]
        raise ModelError(f"{folder} cannot be used in plain transformers: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_answers(
    folder: Path, answers: Answers, expected: Answers, gold: list[str]
) -> dict[str, float]:
    """Returns shares of answers; ModelError where they run on, unlike the expected."""
    count, stopped = len(answers), sum(ended for _, ended in answers)
    lost = sum(ended for _, ended in expected) - stopped
    if lost > max(1, LOST_STOPS * count):
        raise ModelError(
            f"{folder}: {lost} of {count} answers end by themselves in the trained "
            "model but run on elsewhere: its template or stop tokens are lost"
        )
    same = sum(a[0] == e[0] for a, e in zip(answers, expected, strict=True))
    values = {"greedy_agreement": same / count, "stop_rate": stopped / count}
    if gold:
        values["right"] = sum(map(is_correct, [text for text, _ in answers], gold))
    return values
