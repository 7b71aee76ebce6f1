"""Adapter and merged model, each reloaded and compared with the trained one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig, Stage
from helpers.data.preparation import parts_of
from helpers.evaluation.evaluator import to_prompts
from helpers.export.parity import ask_plainly, compare_answers
from helpers.files import new_folder, read_rows
from helpers.inference.generation import generate
from helpers.masking.templates import answer_marks, stop_token_ids
from helpers.models import adapters, load
from helpers.runs import Run
from helpers.training.inputs import require_stage


def export(run: Run, stage: Stage | None = None, prompts: int = 16) -> dict[str, Any]:
    """Returns the report part of a stage's exported model, and writes its files.

    Args:
        run: with the stage trained.
        stage: the run's last one by default.
        prompts: the number of prompts that both are asked in plain transformers, in
            another process. `greedy_agreement` is the share answered as by the trained
            model, `stop_rate` that of answers that end; `reloaded` compares logits.

    Raises:
        ConfigError, MissingInput: the run has no such stage, or has not trained it.
        ModelError: the exported files do not work without this project.
    """
    config, folder = run.config, run.path / "export"
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    trained, options = run.require(f"{stage}/adapter"), load.options(config)
    names = [*HELD_OUT, "train", "problems"]
    part = next(name for name in names if name in parts_of(config.data))
    rows = to_prompts(config, read_rows(run.require(f"data/{part}.jsonl"))[:prompts])
    questions = [row["prompt"] for row in rows]
    gold = [row["gold"] for row in rows if "gold" in row]
    limits = config.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
    merge(config, trained, folder / "merged")
    plain = options | {"weights": "16bit"}
    merged, _ = load.load_model(str(folder / "merged"), **plain)
    reloaded = {"merged": adapters.compare_saved(merged, trained)}
    del merged
    model, tokenizer = load.load_model(config.model, adapter=trained, **options)
    reloaded["adapter"] = adapters.compare_saved(model, trained)
    answers = generate(model, tokenizer, questions, **limits)
    expected = [(answer.text, answer.stopped) for answer in answers]
    write_stops(tokenizer, model.generation_config)
    with new_folder(folder / "adapter") as scratch:
        for item in (model, tokenizer, model.generation_config):
            item.save_pretrained(scratch)
    base = model.config.to_dict()  # an adapter needs the weights it was trained on
    loading = {n: base[n] for n in ("dtype", "quantization_config") if n in base}
    del model
    runtime.free_memory()
    report: dict[str, Any] = {"trained": {"prompts": len(rows)}}
    report["trained"] |= compare_answers("trained", expected, expected, gold)
    for name, how in (("adapter", loading), ("merged", {})):
        texts = ask_plainly(folder / name, how, questions, limits["max_new_tokens"])
        report[name] = {"path": str(folder / name), "reloaded": reloaded[name]}
        report[name] |= compare_answers(name, texts, expected, gold)
    report["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("export", report)
    return report


def merge(config: RunConfig, adapter: Path | str, folder: Path) -> None:
    """Writes base and adapter as one model in 16 bit (fp32 on a CPU)."""
    options = {**load.options(config), "engine": "transformers"}
    base, tokenizer = load.load_model(config.model, **options)
    if load.resolve_weights(config.weights) != "16bit":  # what it was trained on
        base = base.dequantize(dtype=base.dtype)
    tuned = load.load_adapter(base, adapter, engine="transformers")
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in ends]
    # PEFT would change both of tied weights where the adapter changes one alone
    if plain != ends and plain[0].weight is plain[1].weight:
        plain[1].weight = copy.deepcopy(plain[1].weight)
    model = tuned.merge_and_unload()
    write_stops(tokenizer, model.generation_config)
    model.config.eos_token_id = tokenizer.eos_token_id
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def write_stops(tokenizer: Any, settings: Any) -> None:
    """Writes the end of an answer into what is exported, for other programs."""
    stops = settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in stops]
    # some stop at the tokenizer's EOS alone, which its template may print elsewhere
    elsewhere = "eos_token" in tokenizer.chat_template
    if ends and tokenizer.eos_token_id not in ends and not elsewhere:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
