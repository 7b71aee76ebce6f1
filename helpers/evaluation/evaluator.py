"""Held-out accuracy, loss and text metrics of base and tuned models, with intervals.

Every model answers the same prompts with the same greedy decoding. An answer counts
when the number in it is right, so that a model is not scored on format; the format has
a rate of its own, and so have lm-evaluation-harness's verdicts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import runtime
from helpers.config import RunConfig
from helpers.data import preparation as data
from helpers.data.formats import Row
from helpers.errors import DataError
from helpers.evaluation import gsm8k as verdict_rules
from helpers.evaluation import protocols
from helpers.evaluation import stats as intervals
from helpers.evaluation import text_metrics as metrics
from helpers.evaluation.items import answer_rows
from helpers.masking.dataset import NO_LOSS, Example, mask_conversations
from helpers.masking.templates import template_text
from helpers.models import load as models
from helpers.runs import Run, content_hash, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.inference.generation import Answer, Prompt

HELD_OUT = ("eval", "test_chat", "test", "test_new")


class Subject(NamedTuple):
    """A model that is evaluated in a run."""

    run: Run
    label: str
    adapter: Path | str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def answer(
    subject: Subject,
    name: str,
    rows: list[Row],
    judge: Any,
    *,
    until: list[str] | None = None,
    sampling: dict[str, Any] | None = None,
) -> list[Row]:
    """Returns the items of `eval/<label>/<name>.jsonl`; what is there is not redone.

    Args:
        subject: who answers.
        name: of the file.
        rows: see `items.answer_rows`, and so `judge`.
        judge: gives an item's verdicts.
        until: texts that end an answer.
        sampling: how answers are drawn; greedy by default.
    """
    from helpers.inference.generation import generate_batches

    config = subject.run.config

    def generate(prompts: list[Prompt]) -> Iterator[dict[int, Answer]]:
        if sampling:  # after a kill other numbers than those drawn already
            runtime.seed_everything(config.seed + len(rows) - len(prompts))
        return generate_batches(
            subject.model,
            subject.tokenizer,
            prompts,
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.batch_size,
            sampling=sampling,
            until=until or [],
        )

    path = subject.run.path / "eval" / subject.label / f"{name}.jsonl"
    model = model_print(config, subject.adapter)
    settings = fingerprint(model, config.evaluation.max_new_tokens, until, sampling)
    return answer_rows(path, rows, settings, generate, judge)


def model_print(config: RunConfig, adapter: Path | str | None) -> str:
    """Returns the fingerprint of a model as it answers: weights, adapter, template."""
    options: dict[str, Any] = models.options(config)
    options |= {
        "engine": models.resolve_engine(config.engine),
        "weights": models.resolve_weights(config.weights),
        "dtype": str(runtime.choose_dtype(runtime.find_machine(), config.dtype)[0]),
        "max_length": None,
        "template": template_text(config.template),
    }
    return fingerprint(content_hash(config.model), options, content_hash(adapter))


def solve(subject: Subject, name: str, problems: list[Row]) -> dict[str, Any]:
    """Returns the rates of one model on problems, see `verdicts.summarise`.

    With `evaluation.samples` also pass@k and maj@k of so many drawn answers each.
    """
    settings = subject.run.config.evaluation
    asked = protocols.ask(subject.run, subject.tokenizer, problems)
    rows = [
        {"prompt": prompt, **problem}
        for prompt, problem in zip(asked.prompts, problems, strict=True)
    ]

    def judge(text: str, row: Row) -> Row:
        found = verdict_rules.judge(text, row, settings.protocol)
        return {"question": row["question"], **found}

    items = answer(subject, name, rows, judge, until=asked.until)
    part = verdict_rules.summarise(items)
    part["item_seconds"] = sum(item["seconds"] for item in items)
    if settings.samples:
        many = [
            {**row, "id": f"{row['id']}/{number}"}
            for row in rows
            for number in range(settings.samples)
        ]
        drawn = answer(
            subject,
            f"{name}.samples",
            many,
            judge,
            until=asked.until,
            sampling={"temperature": settings.temperature},
        )
        count = settings.samples
        groups = [drawn[at : at + count] for at in range(0, len(drawn), count)]
        part["samples"] = verdict_rules.summarise_samples(groups)
        part["samples"]["temperature"] = settings.temperature
        part["item_seconds"] += sum(item["seconds"] for item in drawn)
    return part


def answer_chats(subject: Subject, name: str, rows: list[Row]) -> dict[str, Any]:
    """Returns text metrics of answers to the first questions of conversations.

    At most `evaluation.text_rows` of them, the first ones. Where `evaluation.labels`
    are set, rates of classes instead, in `labels`.
    """
    labels = subject.run.config.evaluation.labels
    asked = [
        {
            "id": row["id"],
            "prompt": data.first_question(row["messages"]),
            "question": data.first_question(row["messages"])[-1]["content"],
            "reference": data.first_answer(row["messages"])["content"],
        }
        for row in rows[: subject.run.config.evaluation.text_rows]
    ]

    def judge(text: str, row: Row) -> Row:
        texts = {name: row[name] for name in ("question", "reference")}
        if labels:
            return {**texts, "correct": metrics.same_label(text, row["reference"])}
        return {**texts, **metrics.score(text, row["reference"])}

    items = answer(subject, name, asked, judge)
    stopped = sum(item["stopped"] for item in items)
    return {
        "answers": len(items),
        **({"labels": metrics.classify(items, labels)} if labels else {}),
        **({} if labels else metrics.summarise(items)),
        "stop_rate": round(stopped / len(items), 4),
        "item_seconds": sum(item["seconds"] for item in items),
    }


def check_labels(config: RunConfig, sets: dict[str, list[Row]]) -> None:
    """Refuses right answers that `evaluation.labels` do not name.

    Args:
        config: the run's.
        sets: the rows of the conversations that are answered, by name.

    Raises:
        DataError: there is such an answer, or there are no conversations.
    """
    labels = {label.strip() for label in config.evaluation.labels or []}
    if labels and not sets:
        raise DataError(
            "evaluation.labels name classes, but no held-out conversations are answered"
            ": set data.test_share, or leave the labels out"
        )
    for name, rows in sets.items() if labels else ():
        answers = {
            row["id"]: data.first_answer(row["messages"])["content"] for row in rows
        }
        rest = [key for key, text in answers.items() if text.strip() not in labels]
        if rest:
            raise DataError(
                f"{len(rest)} of {len(rows)} right answers of {name} are not among "
                f"evaluation.labels, the first is {answers[rest[0]][:80]!r} (row "
                f"{rest[0]}): add the missing labels, or leave evaluation.labels "
                "out if this is no classification"
            )


def response_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    batch_size: int = 8,
) -> float:
    """Returns the mean cross-entropy, in nats, over all supervised tokens of the rows.

    Token-weighted: batch size and padding do not change it.

    Args:
        rows: `input_ids` and `labels` each, from `masking`; the first token of a row
            is never predicted.
        batch_size: rows a batch.
    """
    import torch

    from helpers.inference.generation import inference

    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    with inference(model):
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            width = len(batch[-1]["input_ids"])
            pad = [width - len(row["input_ids"]) for row in batch]
            columns = {
                "input_ids": (tokenizer.pad_token_id, [r["input_ids"] for r in batch]),
                "labels": (NO_LOSS, [r["labels"] for r in batch]),
                "attention_mask": (0, [[1] * len(r["input_ids"]) for r in batch]),
            }
            inputs = {
                name: torch.tensor(
                    [v + [fill] * n for v, n in zip(values, pad, strict=True)],
                    device=model.device,
                )
                for name, (fill, values) in columns.items()
            }
            tokens = int((inputs["labels"][:, 1:] != NO_LOSS).sum())
            total += float(model(**inputs).loss) * tokens
            count += tokens
    return total / count


def held_out(config: RunConfig) -> list[str]:
    """Returns the sets that a config holds out, in the order of `data.PARTS`."""
    return [name for name in data.parts_of(config.data) if name in HELD_OUT]


def chat_loss(subject: Subject, rows: list[Row]) -> tuple[float, float]:
    """Returns the loss on held-out conversations, in nats, and the perplexity."""
    config = subject.run.config
    masked = mask_conversations(
        subject.tokenizer,
        [row["messages"] for row in rows],
        config.loss_on,
        config.max_length,
        drop=config.data.drop_unusable,
    )
    loss = response_loss(subject.model, subject.tokenizer, masked.rows)
    return round(loss, 4), round(math.exp(loss), 3)


def evaluate(run: Run, label: str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Evaluates one model on the run's held-out sets and returns its report part.

    Problems (`test`, `test_new`) are answered, conversations (`eval`, `test_chat`)
    give a loss. Conversations are answered, for text metrics and for reading, where
    they are a test set, or where a run has no problems. Writes
    `eval/<label>/<set>.jsonl`, one line an answer, as they come: after a kill the same
    call goes on.

    Args:
        run: with `data/` prepared.
        label: `base`, `sft`, `grpo` or a name of yours; the part's key in the report.
        adapter: the adapter to put on the base model; None evaluates the base.

    Raises:
        DataError: the config holds no rows out.
        MissingInput: notebook 01 has not prepared the data.
        ModelError: model or adapter cannot be loaded.
    """
    import torch

    config = run.config
    sets = {
        name: data.read_rows(run.require(f"data/{name}.jsonl"))
        for name in held_out(config)
    }
    if not sets:
        raise DataError(
            f"run {config.name!r} holds no rows out to measure on: set data.eval_share "
            "or data.test_share (a part of the training rows), data.eval, or data.test"
        )
    solved = [name for name in ("test", "test_new") if name in sets]
    answered = data.answered(sets)
    check_labels(config, {n: sets[n] for n in answered if n not in solved})
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loaded = models.load_model(config.model, adapter=adapter, **models.options(config))
    subject = Subject(run, label, adapter, *loaded)
    part: dict[str, Any] = {
        "protocol": config.evaluation.protocol,
        "model_print": model_print(config, adapter),
    }
    now, in_all = 0.0, 0.0  # seconds of answering: in this call, and with former ones
    chats = [name for name in ("test_chat", "eval") if name in sets]
    for name in answered:
        clock = time.perf_counter()
        found = (solve if name in solved else answer_chats)(subject, name, sets[name])
        in_all += found.pop("item_seconds")
        now += time.perf_counter() - clock
        part["eval_text" if name == "eval" else name] = found
    for name, key in (("test", "accuracy"), ("test_new", "accuracy_new")):
        if name in solved:
            part[key] = part[name].pop("accuracy")
    for name in chats:
        loss, perplexity = chat_loss(subject, sets[name])
        if name == "eval":
            part |= {"eval_loss": loss, "perplexity": perplexity}
        else:
            part[name] |= {"loss": loss, "perplexity": perplexity}
    del subject, loaded
    runtime.free_memory()
    part["seconds"] = round(time.perf_counter() - started - now + in_all, 1)
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    parts = run.report().get("eval", {})
    former = parts.get(label, {})
    if former.get("model_print", part["model_print"]) != part["model_print"]:
        former = {}  # with what judges said of another model
    run.write_part("eval", {**parts, label: {**former, **part}})
    return part


def compare(run: Run, first: str, second: str) -> dict[str, Any]:
    """Returns how two evaluated models differ on the same items, set by set.

    Problems: for each verdict McNemar's test and the difference with its interval, and
    where a gain comes from (`verdicts.gain`). Class labels: the test of right ones.
    Conversations: the mean difference of each text metric. Writes it to the report's
    part `comparisons`.

    Args:
        run: with both evaluated.
        first: a label, `base` say.
        second: another.

    Raises:
        DataError: they answered different rows, or one text and the other labels.
        MissingInput: a model has not been evaluated.
    """
    found: dict[str, Any] = {}
    folders = [run.require(f"eval/{label}") for label in (first, second)]
    for name in HELD_OUT:
        files = [folder / f"{name}.jsonl" for folder in folders]
        if not all(file.exists() for file in files):
            continue
        a, b = (data.read_rows(file) for file in files)
        if [item["question"] for item in a] != [item["question"] for item in b]:
            raise DataError(
                f"{first} and {second} answered other questions of {name}: the data "
                "changed between the evaluations; evaluate both again"
            )
        decided = "correct" in a[0]
        if decided != ("correct" in b[0]):
            raise DataError(
                f"{first} and {second} answered {name} under other evaluation.labels: "
                "evaluate both again"
            )
        known = verdict_rules.VERDICTS if decided else metrics.OF_ITEMS
        values = {
            key: [(x[key], y[key]) for x, y in zip(a, b, strict=True)]
            for key in known
            if key in a[0]
        }
        if decided:
            found[name] = {
                key: intervals.compare(*zip(*v, strict=True))
                for key, v in values.items()
            }
            if "strict_match" in values:
                found[name]["gain"] = verdict_rules.gain(a, b)
        else:
            found[name] = {
                key: intervals.mean([y - x for x, y in v]) for key, v in values.items()
            }
    parts = run.report().get("comparisons", {})
    run.write_part("comparisons", {**parts, f"{first} -> {second}": found})
    return found
