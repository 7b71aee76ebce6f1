"""Held-out accuracy, loss and text metrics of base and tuned models: all answer the
same prompts with the same greedy decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig
from helpers.data import preparation as data
from helpers.data.formats import Row, ask
from helpers.errors import DataError
from helpers.evaluation import metrics
from helpers.evaluation.tables import ACCURACIES, results_table
from helpers.files import fingerprint, read_rows
from helpers.inference.generation import generate_batches, inference
from helpers.inference.items import answer_rows, find_adapters, model_print
from helpers.masking.dataset import NO_LOSS, Example, mask_conversations
from helpers.models import load as models
from helpers.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


def held_out(config: RunConfig) -> list[str]:
    """Returns the names of the sets that a config holds out."""
    return [name for name in data.parts_of(config.data) if name in HELD_OUT]


def to_prompts(config: RunConfig, rows: list[Row]) -> list[Row]:
    """Returns problems with their `prompt`, or the first turns of conversations."""
    if "question" in rows[0]:
        system = config.system_prompt
        return [{**row, "prompt": ask(row["question"], system)} for row in rows]
    prompts = []
    for row in rows[: config.evaluation.text_rows]:
        prompt = data.first_question(row["messages"])
        answer = data.first_answer(row["messages"])["content"]
        texts = {"question": prompt[-1]["content"], "reference": answer}
        prompts.append({"id": row["id"], "prompt": prompt, **texts})
    return prompts


def judge(text: str, row: Row, labels: list[str] | None) -> Row:
    """Returns the verdicts on an answer to a problem, or its text metrics."""
    if "gold" in row:
        return {"question": row["question"], **metrics.check_answer(text, row)}
    texts = {name: row[name] for name in ("question", "reference")}
    if labels:
        return {**texts, "correct": text.strip() == row["reference"].strip()}
    return {**texts, **metrics.score(text, row["reference"])}


def summarise(items: list[Row], labels: list[str] | None) -> dict[str, Any]:
    """Returns the rates or text metrics of a set, and how many answers were cut off."""
    n = len(items)
    if "gold" in items[0]:
        hits = {name: sum(i[name] for i in items) for name in metrics.VERDICTS}
        rates = {name: metrics.proportion(k, n) for name, k in hits.items()}
    elif labels:
        rates = metrics.summarise_labels(items, labels)
    else:
        rates = metrics.summarise_texts(items)
    stopped = sum(item["stopped"] for item in items)
    ends = {"answers": n, "stop_rate": round(stopped / n, 4), "truncated": n - stopped}
    return {**rates, **ends, "tokens": sum(item["tokens"] for item in items)}


def check_labels(run: Run) -> None:
    """Refuses `evaluation.labels` that some right answer is not among."""
    labels = [label.strip() for label in run.config.evaluation.labels or []]
    names = [n for n in data.answered(held_out(run.config)) if n not in ACCURACIES]
    files = [run.require(f"data/{name}.jsonl") for name in names if labels]
    rows = [row for file in files for row in read_rows(file)]
    answers = [data.first_answer(row["messages"])["content"].strip() for row in rows]
    unknown = [answer for answer in answers if answer not in labels]
    if labels and (unknown or not answers):
        raise DataError(
            f"{len(unknown)} of {len(answers)} right answers in held-out conversations "
            f"are not among evaluation.labels, such as {unknown[:1]}: add the missing "
            "ones, set data.test_share if no conversations are held out, or leave the "
            "labels out if this is not a classification"
        )


def response_loss(model: PreTrainedModel, rows: Iterable[Example]) -> float:
    """Returns the mean cross-entropy, in nats, over all supervised tokens of rows."""
    import torch

    total, count = 0.0, 0
    with inference(model):
        for row in rows:  # one at a time: no padding, and logits of one row in memory
            ids = torch.tensor([row["input_ids"]], device=model.device)  # (1, seq)
            labels = torch.tensor([row["labels"]], device=model.device)
            tokens = int((labels[:, 1:] != NO_LOSS).sum())
            if tokens:
                total += float(model(input_ids=ids, labels=labels).loss) * tokens
                count += tokens
    return total / count


def evaluate(run: Run, label: str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Evaluates a model on the run's held-out sets and returns its part of the report.

    Conversations (`eval`, `test_chat`) give a loss; the sets of `data.answered` are
    answered too, into `eval/<label>/<set>.jsonl`: after a kill the same call goes on.
    """
    import torch

    config, labels = run.config, run.config.evaluation.labels
    files = [run.require(f"data/{name}.jsonl") for name in held_out(config)]
    sets = {file.stem: read_rows(file) for file in files}
    if not sets:
        raise DataError(
            f"run {config.name!r} has no held-out rows: set data.eval_share or "
            "data.test_share (a part of the training rows), data.eval, or data.test"
        )
    check_labels(run)
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    options = models.options(config)
    model, tokenizer = models.load_model(config.model, adapter=adapter, **options)
    part: dict[str, Any] = {"model_print": model_print(config, adapter)}
    for name in [name for name in sets if name not in ACCURACIES]:
        chats = [row["messages"] for row in sets[name]]
        limits, drop = (config.loss_on, config.max_length), config.data.drop_unusable
        masked = mask_conversations(tokenizer, chats, *limits, drop=drop)
        loss = response_loss(model, masked.rows)
        measures = {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3)}
        if name == "eval":
            measures["eval_loss"] = measures.pop("loss")
        part |= measures if name == "eval" else {name: measures}
    seconds = time.perf_counter() - started
    decoding = config.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
    settings = fingerprint(part["model_print"], decoding["max_new_tokens"])
    for name in data.answered(sets):
        items = answer_rows(
            run.path / "eval" / label / f"{name}.jsonl",
            to_prompts(config, sets[name]),
            settings,
            partial(generate_batches, model, tokenizer, **decoding),
            partial(judge, labels=labels),
        )
        seconds += sum(item["seconds"] for item in items)  # those of former calls too
        summary = summarise(items, labels)
        if name in ACCURACIES:
            part[ACCURACIES[name]] = summary["correct"]
        key = "eval_text" if name == "eval" else name
        part[key] = summary | part.get(key, {})
    del model
    runtime.free_memory()
    part["seconds"] = round(seconds, 1)
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    parts = run.report().get("eval", {})
    former = parts.get(label, {})
    if former.get("model_print", part["model_print"]) != part["model_print"]:
        former = {}  # its judgments are of another model
    run.write_part("eval", parts | {label: former | part})
    return part


def evaluate_run(run: Run, labels: list[str] | None = None) -> pd.DataFrame:
    """Evaluates the base model and the trained stages of a run; returns their table.

    Args:
        run: with its data prepared and its stages trained.
        labels: some of `base`, `sft` and `grpo`; by default all that the run has.

    Raises:
        DataError: nothing is held out, or the labels do not fit the run or its data.
        MissingInput: the data or an adapter is missing.
    """
    for label, adapter in find_adapters(run, labels).items():
        evaluate(run, label, adapter)
    return results_table(run.report())


def compare(run: Run, first: str, second: str) -> dict[str, Any]:
    """Returns how two evaluated models differ on the same items, set by set.

    See `metrics.paired_difference` and `metrics.split_gain`. The result goes to the
    report's part `comparisons` too.

    Args:
        run: with both models evaluated.
        first, second: their labels, such as `base` and `sft`.

    Raises:
        DataError: they answered different rows, or under other `evaluation.labels`.
        MissingInput: a model has not been evaluated.
    """
    sets: dict[str, Any] = {}
    folders = [run.require(f"eval/{label}") for label in (first, second)]
    for name in HELD_OUT:
        files = [folder / f"{name}.jsonl" for folder in folders]
        if not all(file.exists() for file in files):
            continue
        a, b = (read_rows(file) for file in files)
        measures = [k for k in (*metrics.VERDICTS, *metrics.OF_ITEMS) if k in a[0]]
        same = [item["question"] for item in a] == [item["question"] for item in b]
        if not same or any(key not in b[0] for key in measures):
            raise DataError(
                f"{first} and {second} answered {name} with other data or other "
                "evaluation.labels: evaluate both again"
            )
        sets[name] = metrics.split_gain(a, b) if "strict_match" in a[0] else {}
        for key in measures:
            values = [[item[key] for item in items] for items in (a, b)]
            sets[name][key] = metrics.paired_difference(*values)
    parts = run.report().get("comparisons", {})
    run.write_part("comparisons", {**parts, f"{first} -> {second}": sets})
    return sets
