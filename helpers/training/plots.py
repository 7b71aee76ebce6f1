"""Curves of what a trainer logged: losses, and GRPO's diagnostics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {
    "loss": ["loss", "eval_loss"],
    "reward": ["reward"],
    "learning rate": ["learning_rate"],
}
DIAGNOSTICS = {
    "share of groups without gradient": [
        "frac_reward_zero_std",
        "groups/all_wrong",
        "groups/all_right",
    ],
    "completion length, tokens": ["completions/mean_length", "completions/max_length"],
    "share of answers cut off": ["completions/clipped_ratio"],
    "nats a token": ["entropy", "kl"],
    "optimiser": ["grad_norm", "skipped_steps"],
}


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Saves the curves of losses, reward and learning rate, whichever were logged."""
    draw_curves(history, LOSSES).savefig(path, dpi=110)


def draw_diagnostics(history: list[dict[str, Any]], path: Path | None = None) -> Figure:
    """Returns the curves of GRPO's diagnostics, and saves them at a path."""
    names = {name: None for entry in history for name in entry}
    rewards = [n for n in names if n.startswith("rewards/") and n.endswith("/mean")]
    panels = {"reward by component (band: spread)": [*rewards, "eval_reward"]}
    figure = draw_curves(history, panels | DIAGNOSTICS)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure


def draw_curves(history: list[dict[str, Any]], panels: dict[str, list[str]]) -> Figure:
    """Returns a figure of the logged values, over the optimiser steps.

    Args:
        history: of the trainer's state.
        panels: a title, and the values below it; empty ones are left out.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    logged = pd.DataFrame(history).groupby("step").first()
    logged = logged.dropna(axis="columns", how="all")
    names = {title: [n for n in ns if n in logged] for title, ns in panels.items()}
    names = {title: ns for title, ns in names.items() if ns}
    rows = 1 + (len(names) > 3)
    columns = -(-len(names) // rows)
    figure = Figure(figsize=(3.8 * columns, 3 * rows), layout="constrained")
    for number, (title, values) in enumerate(names.items(), start=1):
        axes = figure.add_subplot(rows, columns, number, title=title)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        for name in values:
            curve = logged[name].dropna()
            label = name.removeprefix("rewards/").removesuffix("/mean")
            axes.plot(curve, label=label, marker="o" if len(curve) < 20 else None)
            width = logged.get(name.replace("/mean", "/std"))
            if width is not None and name.endswith("/mean"):
                low, high = curve - width[curve.index], curve + width[curve.index]
                axes.fill_between(curve.index, low, high, alpha=0.12)
        axes.legend(fontsize=8)
    return figure
