"""Held-out accuracy, loss and text metrics of models, which answer the same prompts."""

import logging
import math
import time
from datetime import date
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig
from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.errors import DataError, MissingInput
from helpers.evaluation import metrics, tables
from helpers.files import fingerprint, read_json, read_rows, write_json
from helpers.inference.decoder import set_attention
from helpers.inference.generation import generate_batches, inference, read_start
from helpers.inference.items import answer_rows, find_adapters, model_print
from helpers.masking.dataset import NO_LOSS, Example, mask_conversations
from helpers.models import adapters
from helpers.models import load as models
from helpers.runs import Run, writes

log = logging.getLogger(__name__)


def held_out(config: RunConfig) -> list[str]:
    return [name for name in data.parts_of(config.data) if name in HELD_OUT]


def read_sets(run: Run) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Returns the held-out rows of a run, and the prompts of the sets to answer."""
    config, labels = run.config, run.config.evaluation.labels
    names = held_out(config)
    sets = {name: read_rows(run.require(f"data/{name}.jsonl")) for name in names}
    if {*sets} - {"eval", "general"}:  # else eval is the last resort
        names = [name for name in names if name != "eval"]
    if not sets or (labels and {*names} <= {*tables.PROBLEMS, "general"}):
        remedy = "set data.eval_share, data.test_share, data.eval or data.test"
        text = "has no held-out rows, or none for evaluation.labels"
        raise DataError(f"run {config.name!r} {text}: {remedy}")
    return sets, {name: data.to_prompts(config, sets[name], name) for name in names}


def response_losses(model: Any, rows: list[Example]) -> list[tuple[float, int]]:
    """Returns each row's sum of cross-entropies, in nats, and its supervised tokens."""
    losses = []
    learn = [[n for n, x in enumerate(r["labels"]) if n and x != NO_LOSS] for r in rows]
    with inference(model):
        # the token before the first learnt one predicts it
        ends = (min(places, default=1) - 1 for places in learn)
        begins = [r["input_ids"][:end] for r, end in zip(rows, ends, strict=True)]
        start, cache = read_start(model, begins)
        # one at a time: no padding, and logits of one row in memory
        for row, tokens in zip(runtime.progress(rows, "loss"), learn, strict=True):
            ids = torch.tensor([row["input_ids"][start:]], device=model.device)
            labels = torch.tensor([row["labels"][start:]], device=model.device)
            mean = model(input_ids=ids, labels=labels, past_key_values=cache).loss
            total = float(mean) * len(tokens) if tokens else 0.0
            losses.append((total, len(tokens)))
            if cache is not None:
                cache.crop(-ids.shape[1])
    return losses


@writes
def evaluate(run: Run, label: str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Returns a model's part of the report; after a kill the same call goes on."""
    config, labels = run.config, run.config.evaluation.labels
    sets, prompts = read_sets(run)
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    options = models.options(config)
    model, tokenizer = models.load_model(config.model, adapter=adapter, **options)
    set_attention(model)
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if exact and hasattr(model, "merge_and_unload"):  # LoRA takes half of a CPU's time
        model = adapters.merge(model)
    part: dict[str, Any] = {"model_print": model_print(config, adapter)}
    drop = config.data.drop_unusable
    for name in [name for name in sets if name not in tables.PROBLEMS]:
        chats, general = [row["messages"] for row in sets[name]], name == "general"
        way = "last" if general else config.loss_on
        longest = None if general else config.max_length
        masked = mask_conversations(tokenizer, chats, way, longest, drop=drop)
        if masked.dropped:
            log.info("the loss of %s: %s", name, masked.dropped)
        losses = response_losses(model, masked.rows)
        if general:
            if not masked.dropped:  # so that each loss has its item
                for item, (total, count) in zip(prompts[name], losses, strict=True):
                    item["loss"] = round(total / count, 4)
            continue
        total, count = map(sum, zip(*losses, strict=True))
        key = "eval_loss" if name == "eval" else "loss"
        values = {key: round(total / count, 4)}
        values["perplexity"] = round(math.exp(total / count), 3)
        part |= values if name == "eval" else {name: values}
    seconds = time.perf_counter() - started
    for name, rows in prompts.items():
        decoding, general = config.evaluation, name == "general"
        classes = None if general else labels
        limit = decoding.general_tokens if general else decoding.max_new_tokens
        settings = fingerprint(part["model_print"], limit)
        options = {"max_new_tokens": limit, "batch_size": decoding.batch_size}
        answer = partial(generate_batches, model, tokenizer, **options)
        path = run.path / "eval" / label / f"{name}.jsonl"
        judge = partial(metrics.judge, labels=classes)
        items = answer_rows(path, rows, settings, answer, judge)
        seconds += sum(item["seconds"] for item in items)  # those of former calls too
        summary = metrics.summarise(items, classes)
        key = "eval_text" if name == "eval" else name
        part[key] = summary | part.get(key, {})
    del model, answer
    runtime.free_memory()
    part["seconds"] = round(seconds, 1)
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    parts = run.report().get("eval", {})
    former = parts.get(label, {})
    if former.get("model_print", part["model_print"]) == part["model_print"]:
        # judgments of this model stay; what was measured of other sets does not
        judged = [n for n, x in former.items() if isinstance(x, dict) and "judge" in x]
        part = {name: former[name] for name in judged} | part
    run.write_part("eval", parts | {label: part})
    return part


def evaluate_run(run: Run, labels: list[str] | None = None) -> pd.DataFrame:
    """Evaluates the base model and the trained stages of a run; returns their table.

    Args:
        run: with its data prepared and its stages trained.
        labels: some of `base`, `sft` and `grpo`; by default all that the run has.

    Raises:
        DataError, MissingInput: nothing is held out, labels do not fit, or files lack.
    """
    for label, adapter in find_adapters(run, labels).items():
        evaluate(run, label, adapter)
    return tables.results_table(run.report())


def board_row(run: Run) -> Row:
    """Returns what a run cost and gave, from its report: a row of a board of runs."""
    config, label = run.config, run.config.stages[-1]
    report = run.report()
    costs = [report[stage] for stage in config.stages if stage in report]
    if not costs or not {"base", label} <= report.get("eval", {}).keys():
        text = f"run {config.name!r} has no trained stage, or base and {label} are not"
        raise MissingInput(f"{text} evaluated: train it, then evaluate {config.name}")
    lost = compare(run, "base", label).get("general", {})
    base, tuned = (report["eval"][name] for name in ("base", label))
    part = next((name for name in tables.COUNTED[:-1] if tables.right(tuned, name)), "")
    row: Row = {"recipe": config.recipe or config.name, "model": config.model}
    row |= {"machine": report["environment"]["device"], "date": str(date.today())}
    row |= {"minutes": round(sum(cost["seconds"] for cost in costs) / 60, 1)}
    row |= {"gib": max(cost["peak_memory_gb"] for cost in costs)}
    row |= {"base": tables.right(base, part), "right": tables.right(tuned, part)}
    return row | {"general": lost.get("correct", lost.get("exact_match"))}


def report(run: Run, board: bool = False) -> Run:
    """Returns a run, to show its tables; `board` writes its row to the board first.

    The board is `results/board.json` of the project. A row replaces the former one of
    the same recipe, model and machine.
    """
    if board:
        path, row = runtime.HOME / "results" / "board.json", board_row(run)
        place = itemgetter("recipe", "model", "machine")
        rows = [x for x in read_json(path).get("rows", []) if place(x) != place(row)]
        write_json(path, {"rows": sorted([*rows, row], key=place)})
        log.info("%s has the run's row", path)
    return run


@writes
def compare(run: Run, first: str, second: str) -> dict[str, Any]:
    """Returns how two models differ on the same items; in the report, `comparisons`.

    Args:
        run, first, second: with two models evaluated, of these labels: `base`, `sft`.

    Raises:
        DataError: they answered different rows, or under other `evaluation.labels`.
    """
    sets: dict[str, Any] = {}
    for name in held_out(run.config):
        files = [run.require(f"eval/{x}") / f"{name}.jsonl" for x in (first, second)]
        if not all(file.exists() for file in files):
            continue
        a, b = (pd.DataFrame(read_rows(file)) for file in files)
        measures = [k for k in metrics.MEASURES if k in a]
        if [*a["question"]] != [*b["question"]] or not {*measures} <= {*b}:
            text = f"answered {name} with other data or other evaluation.labels"
            raise DataError(f"{first} and {second} {text}: evaluate both again")
        sets[name] = metrics.split_gain(a, b) if "strict_match" in a else {}
        for key in measures:
            sets[name][key] = metrics.paired_difference([*a[key]], [*b[key]])
    parts = run.report().get("comparisons", {})
    run.write_part("comparisons", parts | {f"{first} -> {second}": sets})
    return sets
