"""What a config amounts to, as HTML: batch, steps, parameters, minutes and memory."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from typing import TYPE_CHECKING

from helpers.config import RunConfig, Stage, complete
from helpers.runs import Run

if TYPE_CHECKING:
    from helpers.gpus import Gpu
    from helpers.memory import Prediction

COLORS = {"error": "#d32f2f", "warning": "#b26a00", "hint": "gray", "fits": "#2e7d32"}
SIGNS = {"error": "✗", "warning": "⚠", "hint": "", "fits": "✓"}


def remark(level: str, text: str) -> str:
    """Returns a text as HTML, in the colour of its level; nothing for no text.

    >>> remark("hint", "a < b")
    '<div style="line-height:1.4;color:gray">a &lt; b</div>'
    """
    if not text:
        return ""
    text = f"{SIGNS[level]} {html.escape(text)}".strip()
    return f'<div style="line-height:1.4;color:{COLORS[level]}">{text}</div>'


def summarize(config: RunConfig, run: Run, gpu: Gpu | None) -> str:
    """Returns what a config amounts to, as a table with a column for each stage.

    Args:
        config: without errors, see `checks.advise`.
        run: whose data may be prepared.
        gpu: to predict for; a T4 stands in for None.
    """
    rows, exact = count_rows(config, run)
    lines: dict[str, list[str]] = defaultdict(list)
    for stage in config.stages:
        values = complete(config, stage)
        epoch, total = count_steps(config, stage, rows)
        # packed rows are fewer than the conversations in them; how many is not known
        most = "" if exact and not values.get("packing") else "at most "
        fixed = "" if values["max_steps"] > 0 else most
        unknown = "unknown until the data are prepared"
        column = {
            "": f"<b>{stage.upper()}</b>",
            "effective batch": describe_batch(config, stage),
            "steps an epoch": f"{most}{epoch:,}" if epoch else unknown,
            "steps in all": f"{fixed}{total:,}" if total else unknown,
        }
        minutes, bar = predict(config, stage, gpu, total, fixed)
        column["predicted minutes"] = minutes or unknown
        column["predicted peak memory"] = bar
        for label, text in column.items():
            lines[label].append(text)
    cell = '<td style="padding:0 24px 0 0;vertical-align:top">'
    body = "".join(
        f"<tr>{cell}{label.replace(' ', '&nbsp;')}</td>"
        f"{''.join(f'{cell}{text}</td>' for text in texts)}</tr>"
        for label, texts in lines.items()
    )
    body += f"<tr>{cell}trainable parameters</td>"
    body += f'<td colspan="2">{count_trainable(config)}</td></tr>'
    return f'<table style="line-height:1.5;margin:4px 0">{body}</table>'


def count_rows(config: RunConfig, run: Run) -> tuple[dict[str, int], bool]:
    """Returns the rows of the data's parts, as far as known, and whether exactly.

    Exactly where the run's data are prepared from the same settings; otherwise the
    most that the caps let through, and nothing without a cap.
    """
    data = config.data
    if run.config.name == config.name and run.config.data == data:
        found = run.report().get("data")
        if found:
            return {p: found[p] for p in ("train", "problems") if p in found}, True
    if data.train_rows is None:
        return {}, False
    kept = 1 - (data.eval_share or 0) - (data.test_share or 0)
    return {"train": math.ceil(len(data.train) * data.train_rows * kept)}, False


def count_steps(
    config: RunConfig, stage: Stage, rows: dict[str, int]
) -> tuple[int | None, int | None]:
    """Returns the optimiser steps an epoch and in all, None where unknown.

    >>> from helpers import recipes
    >>> count_steps(recipes.load("guanaco-llama2-7b"), "sft", {"train": 1000})
    (125, 1250)
    """
    from helpers import timing

    values = {**complete(config, stage), "packing": False}
    count = rows.get("train" if stage == "sft" else "problems")
    if count and stage == "grpo":
        count *= values["num_generations"]
    once = {**values, "max_steps": -1, "num_train_epochs": 1}
    return timing.count_steps(once, count), timing.count_steps(values, count)


def describe_batch(config: RunConfig, stage: Stage) -> str:
    """Returns what an optimiser step holds, and in how many micro-batches.

    >>> from helpers import recipes
    >>> describe_batch(recipes.load("guanaco-llama2-7b"), "sft")
    '8 rows (1 x 8)'
    """
    from helpers import timing

    values = complete(config, stage)
    size, count = timing.step_rows(values), values["gradient_accumulation_steps"]
    text = f"{size} {'row' if size == 1 else 'rows'}"
    if stage == "grpo":
        text = f"{size} answers, {values['num_generations']} to a problem"
    return text if count == 1 else f"{text} ({size // count} x {count})"


def count_trainable(config: RunConfig) -> str:
    """Returns the parameters that LoRA trains, of all with them, in words.

    >>> from helpers import recipes
    >>> count_trainable(recipes.load("finetome-llama32-1b"))
    '11,272,192 of 1,247,086,592 (0.90 %)'
    """
    from helpers import shapes

    try:
        trained, total, *_ = shapes.count_lora(config.model, config.lora)
    except shapes.UnknownArchitecture as error:
        return remark("hint", f"unknown: {error}")
    return f"{trained:,} of {total:,} ({100 * trained / total:.2f} %)"


def predict(
    config: RunConfig, stage: Stage, gpu: Gpu | None, steps: int | None, most: str = ""
) -> tuple[str, str]:
    """Returns the minutes of a stage, nothing where unknown, and its memory as a bar.

    Args:
        config: of the form.
        stage: `sft` or `grpo`.
        gpu: to predict for; without one a T4, and the minutes of this CPU besides.
        steps: of the optimiser, None when their number is not known.
        most: put before the minutes, where it is only known how many steps at most.
    """
    from helpers import gpus, memory, shapes, timing

    card = gpu or gpus.T4
    try:
        found = memory.predict(config, card, stage, steps=steps)
        minutes = {card.name: found.minutes}
        if gpu is None:
            here = timing.training_minutes(config, None, stage, steps)
            minutes["this CPU"] = here
    except shapes.UnknownArchitecture:
        return "unknown", "unknown"
    said = [
        f"{'under 1' if count < 1 else f'{count:,.0f}'} on {html.escape(name)}"
        for name, count in minutes.items()
        if count is not None
    ]
    return ", ".join(most + text for text in said), draw_bar(found)


def draw_bar(found: Prediction) -> str:
    """Returns a bar of the GPU's memory, green, or red past it, and what fills it."""
    fits, peak, memory = found.fits, found.peak_gb, found.gpu.memory_gb
    color = COLORS["fits" if fits else "error"]
    text = f"{peak:.1f} of {memory:.1f} GiB of {html.escape(found.gpu.name)}"
    text += "" if fits else ": does not fit"
    share = min(1, peak / memory)
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in found.parts.items())
    parts += f"; besides, CUDA context {found.context_gb:.2f}"
    return (
        '<div style="width:240px;height:12px;margin:5px 0 2px;background:#8884">'
        f'<div style="width:{share:.0%};height:100%;background:{color}">'
        f'</div></div><b style="color:{color}">{text}</b>{remark("hint", parts)}'
    )
