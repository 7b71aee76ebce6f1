"""Held-out accuracy and loss of base and tuned models, with intervals.

Every model answers the same prompts with the same greedy decoding. An answer counts
when the flexibly extracted number is right, so that a model is not scored on format;
the format has a rate of its own.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import data, models, rewards, runtime
from helpers.config import RunConfig
from helpers.masking import NO_LOSS, Example, mask_conversations
from helpers.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ = 4  # conversations that are answered where there are no problems


def proportion(k: int, n: int) -> dict[str, float]:
    """Returns `{"k", "n", "low", "high"}`: a count and its 95 % Wilson interval.

    >>> {name: round(value, 3) for name, value in proportion(45, 100).items()}
    {'k': 45, 'n': 100, 'low': 0.356, 'high': 0.548}
    """
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {"k": k, "n": n, "low": round(low, 4), "high": round(high, 4)}


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[data.Row],
    system_prompt: str,
    *,
    batch_size: int | None = None,
    max_new_tokens: int = 256,
) -> list[data.Row]:
    """Returns one item a problem: question, output, extracted answer, verdicts.

    Args:
        problems: `id`, `question` and `gold` each, from `data.to_problems`.
        system_prompt: the one used in training.
        batch_size: problems a batch; see `generation.generate`.
        max_new_tokens: answers are cut here.
    """
    from helpers.generation import generate

    answers = generate(
        model,
        tokenizer,
        [data.ask(problem["question"], system_prompt) for problem in problems],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    items = []
    for problem, answer in zip(problems, answers, strict=True):
        extracted = rewards.extract_answer(answer.text)
        items.append(
            {
                "id": problem["id"],
                "question": problem["question"],
                "output": answer.text,
                "extracted": None if extracted is None else str(extracted),
                "gold": problem["gold"],
                "correct": rewards.is_correct(answer.text, problem["gold"]),
                "strict_format": rewards.has_strict_format(answer.text),
                "tokens": answer.tokens,
                "stopped": answer.stopped,
            }
        )
    return items


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

    from helpers.generation import inference

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


def summarise(items: list[data.Row]) -> dict[str, Any]:
    """Returns accuracy, format rate and stop rate of solved problems."""
    n = len(items)
    return {
        "accuracy": proportion(sum(i["correct"] for i in items), n),
        "strict_format": proportion(sum(i["strict_format"] for i in items), n),
        "stop_rate": round(sum(i["stopped"] for i in items) / n, 4),
        "tokens": sum(i["tokens"] for i in items),
    }


def held_out(config: RunConfig) -> list[str]:
    """Returns the sets that a config holds out, in the order of `data.PARTS`."""
    sets = ("eval", "test_chat", "test", "test_new")
    return [name for name in data.parts_of(config.data) if name in sets]


def chat_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    rows: list[data.Row],
) -> tuple[float, float]:
    """Returns the loss on held-out conversations, in nats, and the perplexity."""
    masked = mask_conversations(
        tokenizer,
        [row["messages"] for row in rows],
        config.loss_on,
        config.max_length,
    )
    loss = response_loss(model, tokenizer, masked.rows)
    return round(loss, 4), round(math.exp(loss), 3)


def evaluate(run: Run, label: str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Evaluates one model on the run's held-out sets and returns its report part.

    Problems (`test`, `test_new`) are answered, conversations (`eval`, `test_chat`)
    give a loss. Where a run has no problems, the first conversations are answered for
    reading. Writes `eval/<label>/<set>.jsonl`, one line an answer.

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
        raise data.DataError(
            f"run {config.name!r} holds no rows out to measure on: set data.eval_share "
            "or data.test_share (a part of the training rows), data.eval, or data.test"
        )
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model, tokenizer = models.load_model(
        config.model, adapter=adapter, **models.options(config)
    )
    part: dict[str, Any] = {}
    for name, key in (("test", "accuracy"), ("test_new", "accuracy_new")):
        if name in sets:
            items = solve(
                model,
                tokenizer,
                sets[name],
                config.system_prompt,
                batch_size=config.evaluation.batch_size,
                max_new_tokens=config.evaluation.max_new_tokens,
            )
            data.write_rows(run.path / "eval" / label / f"{name}.jsonl", items)
            part[name] = summarise(items)
            part[key] = part[name].pop("accuracy")
    if "eval" in sets:
        loss, perplexity = chat_loss(model, tokenizer, config, sets["eval"])
        part |= {"eval_loss": loss, "perplexity": perplexity}
    if "test_chat" in sets:
        loss, perplexity = chat_loss(model, tokenizer, config, sets["test_chat"])
        part["test_chat"] = {"loss": loss, "perplexity": perplexity}
    if "accuracy" not in part and "accuracy_new" not in part:
        name = "test_chat" if "test_chat" in sets else "eval"
        rows = sets[name][:READ]
        items = answer_chats(model, tokenizer, config, rows)
        data.write_rows(run.path / "eval" / label / f"{name}.jsonl", items)
    del model
    runtime.free_memory()
    part["seconds"] = round(time.perf_counter() - started, 1)
    part["peak_memory_gb"] = round(runtime.peak_memory_gb(), 3)
    run.write_part("eval", {**run.report().get("eval", {}), label: part})
    return part


def answer_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    rows: list[data.Row],
) -> list[data.Row]:
    """Returns the answers to the first questions of conversations, for reading."""
    from helpers.generation import generate

    answers = generate(
        model,
        tokenizer,
        [data.first_question(row["messages"]) for row in rows],
        batch_size=config.evaluation.batch_size,
        max_new_tokens=config.evaluation.max_new_tokens,
    )
    return [
        {
            "id": row["id"],
            "question": data.questions_of(row["messages"])[0],
            "reference": next(
                m["content"] for m in row["messages"] if m["role"] == "assistant"
            ),
            "output": answer.text,
            "stopped": answer.stopped,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
