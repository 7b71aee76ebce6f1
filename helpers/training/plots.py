"""Curves of what a trainer logged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REWARDS = "reward by component (band: spread)"
PANELS = {
    "loss": ["loss", "eval_loss"],
    REWARDS: ["eval_reward"],
    "share of groups": ["frac_reward_zero_std", "groups/all_wrong", "groups/all_right"],
    "completion length, tokens": ["completions/mean_length", "completions/max_length"],
    "share of answers cut off": ["completions/clipped_ratio"],
    "nats a token": ["entropy", "kl"],
    "learning rate": ["learning_rate"],
    "optimiser": ["grad_norm", "skipped_steps"],
}


def draw_diagnostics(history: list[dict[str, Any]], path: Path | None = None) -> Figure:
    """Returns the curves of all that was logged, over the optimiser steps.

    Args:
        history: of the trainer's state.
        path: saves the figure there, too.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    logged = pd.DataFrame(history).groupby("step").first().dropna(axis=1, how="all")
    means = [n for n in logged if n.startswith("rewards/") and n.endswith("/mean")]
    panels = PANELS | {REWARDS: means + PANELS[REWARDS]}
    names = {title: [n for n in ns if n in logged] for title, ns in panels.items()}
    # GRPO's loss is zero by construction
    shown = {t: ns for t, ns in names.items() if ns and not (means and t == "loss")}
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(3.8 * columns, 5.6), layout="constrained")
    for number, (title, values) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(2, columns, number, title=title)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        for name in values:
            curve = logged[name].dropna()
            label = name.removeprefix("rewards/").removesuffix("/mean")
            axes.plot(curve, label=label, marker="o" if len(curve) < 20 else None)
            if name in means and (spread := f"rewards/{label}/std") in logged:
                low, high = curve - logged[spread], curve + logged[spread]
                axes.fill_between(logged.index, low, high, alpha=0.12)
        axes.legend(fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure
