"""The curves of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.training import plots


def entries(**columns: list[float]) -> list[dict[str, Any]]:
    """Logged values: one entry a step."""
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return [{"step": n, **row} for n, row in enumerate(rows, start=1)]


def test_losses_are_drawn_though_steps_log_them_in_entries_of_their_own(
    tmp_path: Path,
) -> None:
    history = entries(loss=[2.0, 1.0]) + [{"step": 2, "eval_loss": 1.5}]
    (axes,) = plots.draw_diagnostics(history, tmp_path / "curves.png").axes
    assert (tmp_path / "curves.png").stat().st_size > 0
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points == {"loss": [[1, 2], [2, 1]], "eval_loss": [[2, 1.5]]}


def test_the_diagnostics_have_a_curve_for_each_reward_with_its_spread(
    tmp_path: Path,
) -> None:
    columns = {}
    for name in ("correctness", "style"):
        columns |= {f"rewards/{name}/{k}": [0.1, 0.3] for k in ("mean", "std")}
    logged = entries(reward=[0.1, 0.2], entropy=[1.0, 0.9], **columns)
    figure = plots.draw_diagnostics(logged, tmp_path / "d.png")
    first, nats = figure.axes
    assert [line.get_label() for line in first.lines] == ["correctness", "style"]
    assert len(first.collections) == 2 and nats.get_title() == "nats a token"
    assert (tmp_path / "d.png").stat().st_size > 0
