"""Held-out accuracy and loss of base and tuned models, with intervals.

Every model answers the same prompts with the same greedy decoding. An answer counts
when the flexibly extracted number is right, so that a model is not scored on format;
the format has a rate of its own.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import data, models, rewards, runtime
from helpers.masking import NO_LOSS, Example, mask_conversations
from helpers.runs import Run, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}


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


def evaluate(run: Run, label: str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Evaluates one model on the run's held-out sets and returns its report part.

    Writes `eval/<label>/test.jsonl` and `test_new.jsonl`, one line an item.

    Args:
        run: with `data/` prepared.
        label: `base`, `sft`, `grpo` or a name of yours; the part's key in the report.
        adapter: the adapter to put on the base model; None evaluates the base.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ModelError: model or adapter cannot be loaded.
    """
    import torch

    config = run.config
    sets = {
        name: data.read_rows(run.require(f"data/{name}.jsonl"))
        for name in ("test", "test_new", "eval")
    }
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model, tokenizer = models.load_model(
        config.model,
        engine=config.engine,
        weights=config.weights,
        max_length=config.max_length,
        adapter=adapter,
    )
    masked = mask_conversations(
        tokenizer,
        [row["messages"] for row in sets["eval"]],
        config.loss_on,
        config.max_length,
    )
    loss = response_loss(model, tokenizer, masked.rows)
    parts = {}
    for name in ("test", "test_new"):
        items = solve(
            model,
            tokenizer,
            sets[name],
            config.system_prompt,
            batch_size=config.evaluation.batch_size,
            max_new_tokens=config.evaluation.max_new_tokens,
        )
        data.write_rows(run.path / "eval" / label / f"{name}.jsonl", items)
        parts[name] = summarise(items)
    del model
    runtime.free_memory()
    part = {
        "accuracy": parts["test"].pop("accuracy"),
        "accuracy_new": parts["test_new"].pop("accuracy"),
        "eval_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "test": parts["test"],
        "test_new": parts["test_new"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(), 3),
    }
    run.write_part("eval", {**run.report().get("eval", {}), label: part})
    return part


def percent(part: dict[str, float]) -> str:
    """Returns `k/n = p % [low, high]` of a proportion.

    >>> percent({"k": 45, "n": 100, "low": 0.356, "high": 0.548})
    '45/100 = 45.0 % [35.6, 54.8]'
    """
    k, n = part["k"], part["n"]
    low, high = 100 * part["low"], 100 * part["high"]
    return f"{k}/{n} = {100 * k / n:.1f} % [{low:.1f}, {high:.1f}]"


class Table:
    """Rows of text: aligned in a terminal, a table in a notebook."""

    def __init__(self, header: list[str], rows: list[list[str]]) -> None:
        self.header, self.rows = header, rows

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        import html

        def row(cells: list[str], tag: str) -> str:
            inner = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{''.join(inner)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table>{row(self.header, 'th')}{body}</table>"


def results_table(report: dict[str, Any]) -> Table:
    """Returns the table of a report: one row a model, conditions in the header."""
    header = ["model", "test: right [95 %]", "test_new: right [95 %]", "eval loss"]
    header += ["train min", "eval min", "peak GB"]
    rows = []
    for label, part in report["eval"].items():
        trained = report.get(label, {})
        peak = max(part["peak_memory_gb"], trained.get("peak_memory_gb", 0.0))
        minutes = f"{trained['seconds'] / 60:.1f}" if trained else "-"
        rows.append(
            [
                STAGES.get(label, label),
                percent(part["accuracy"]),
                percent(part["accuracy_new"]),
                f"{part['eval_loss']:.3f}",
                minutes,
                f"{part['seconds'] / 60:.1f}",
                f"{peak:.2f}",
            ]
        )
    return Table(header, rows)


def draw_results(report: dict[str, Any], path: Path) -> Figure:
    """Draws accuracy with intervals, one group of bars a held-out set; saves it too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    labels = list(report["eval"])
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        part = report["eval"][label]
        parts = [part["accuracy"], part["accuracy_new"]]
        middle = [100 * p["k"] / p["n"] for p in parts]
        spread = [
            [m - 100 * p["low"] for m, p in zip(middle, parts, strict=True)],
            [100 * p["high"] - m for m, p in zip(middle, parts, strict=True)],
        ]
        places = [group + number * width for group in range(2)]
        bars = axes.bar(
            places,
            middle,
            0.9 * width,
            yerr=[[max(0.0, x) for x in side] for side in spread],
            capsize=4,
            label=STAGES.get(label, label),
        )
        axes.bar_label(bars, [f"{m:.1f}" for m in middle], padding=2)
    names = ["test (templates of training)", "test_new (unseen templates)"]
    if report["run"]["recipe"] not in ("demo", "smoke"):
        names = ["test", "test_new"]
    centre = (len(labels) - 1) * width / 2
    axes.set_xticks([centre, 1 + centre], names)
    axes.set_ylabel("right answers, % (bars: 95 % interval)")
    axes.set_ylim(0, 100)
    axes.legend()
    figure.savefig(path, dpi=110)
    return figure


def examples(run: Run, count: int = 3) -> Table:
    """Returns a table of problems of `test` with each model's answer to them.

    Problems that the base model failed and the last model solved come first.
    """
    labels = list(run.report()["eval"])
    items = {
        label: data.read_rows(run.require(f"eval/{label}/test.jsonl"))
        for label in labels
    }
    order = sorted(
        range(len(items[labels[0]])),
        key=lambda i: (
            items[labels[0]][i]["correct"],
            not items[labels[-1]][i]["correct"],
        ),
    )
    rows = []
    for i in order[:count]:
        first = items[labels[0]][i]
        cells = [f"{first['question']} (gold {first['gold']})"]
        for label in labels:
            item = items[label][i]
            mark = "right" if item["correct"] else "wrong"
            cells.append(f"{mark}: {item['output'][:220]}")
        rows.append(cells)
    return Table(["problem", *(STAGES.get(label, label) for label in labels)], rows)


def print_report(run: Run) -> None:
    """Prints the run's table, for `make demo`, and writes it beside the report."""
    table = repr(results_table(run.report()))
    write_text(run.path / "results.txt", table + "\n")
    environment = json.dumps(run.report().get("environment", {}).get("device", ""))
    print(f"run {run.config.name} on {environment}\n{table}")  # noqa: T201
