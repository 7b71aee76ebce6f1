"""Curves of what a training logged: losses, and GRPO's diagnostics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers.grpo.diagnostics import SKIPPED, Entry
from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_losses(entries: list[Entry], path: Path) -> None:
    """Draws loss, eval loss and reward over the steps, whichever were logged."""
    from matplotlib.figure import Figure

    panels = [
        [name for name in names if any(name in entry for entry in entries)]
        for names in (["loss", "eval_loss"], ["reward"], ["learning_rate"])
    ]
    panels = [names for names in panels if names]
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for number, names in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name in names:
            points = [(e["step"], e[name]) for e in entries if name in e]
            marker = "o" if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(names[0].replace("_", " "))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=110)


def component_names(entries: list[Entry]) -> list[str]:
    """Returns the names of the rewards that were logged.

    >>> component_names([{"rewards/correctness/mean": 0.5, "loss": 0}])
    ['correctness']
    """
    names = [
        key.split("/")[1]
        for entry in entries
        for key in entry
        if key.startswith("rewards/") and key.endswith("/mean")
    ]
    return list(dict.fromkeys(names))


def draw_diagnostics(entries: list[Entry], path: Path | None = None) -> Figure:
    """Draws the diagnostics over the steps, and saves them where a path is given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for name in component_names(entries):
        line(axes[0], entries, f"rewards/{name}/mean", name, f"rewards/{name}/std")
    line(axes[0], entries, "eval_reward", "held out (greedy)", marker="D")
    axes[0].set_title("reward by component (band: spread)")
    line(axes[1], entries, "frac_reward_zero_std", "no spread")
    line(axes[1], entries, ALL_WRONG, "all wrong")
    line(axes[1], entries, ALL_RIGHT, "all right")
    axes[1].set_title("share of groups without gradient")
    axes[1].set_ylim(-0.03, 1.03)
    line(axes[2], entries, "completions/mean_length", "mean")
    line(axes[2], entries, "completions/max_length", "longest")
    axes[2].set_title("completion length, tokens")
    line(axes[3], entries, "completions/clipped_ratio", "cut at the limit")
    axes[3].set_title("share of answers cut off")
    axes[3].set_ylim(-0.03, 1.03)
    line(axes[4], entries, "entropy", "entropy")
    line(axes[4], entries, "kl", "KL from the start")
    has_kl = any(e.get("kl") is not None for e in entries)
    axes[4].set_title("nats a token" + ("" if has_kl else " (no KL: beta is 0)"))
    line(axes[5], entries, "grad_norm", "gradient norm")
    line(axes[5], entries, SKIPPED, "skipped fp16 steps")
    axes[5].set_title("optimiser")
    for place in axes:
        place.set_xlabel("optimiser step")
        place.grid(alpha=0.3)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure


def line(
    axes: Axes,
    entries: list[Entry],
    name: str,
    label: str,
    spread: str | None = None,
    marker: str | None = None,
) -> None:
    """Draws a logged value, with a band of its spread where that was logged."""
    points = [e for e in entries if e.get(name) is not None]
    if not points:
        return
    steps, values = [e["step"] for e in points], [e[name] for e in points]
    if marker is None and len(points) < 20:
        marker = "o"
    drawn = axes.plot(steps, values, label=label, marker=marker, markersize=4)[0]
    if spread is not None:
        width = [e.get(spread) or 0.0 for e in points]
        low = [v - w for v, w in zip(values, width, strict=True)]
        high = [v + w for v, w in zip(values, width, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.12, color=drawn.get_color())
