"""The curves of a training, and the panel in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.training import plots as curves


def entries(**columns: list[float]) -> list[dict[str, Any]]:
    """Logged values: one entry a step."""
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return [{"step": n, **row} for n, row in enumerate(rows, start=1)]


def test_the_panel_is_one_piece_of_html_with_picture_sentences_and_answers() -> None:
    logged = entries(reward=[0.1, 0.2], **{"rewards/style/mean": [0.1, 0.3]})
    row = {"question": "q", "answer": "4", "rewards": {}, "reward": 1, "advantage": 1}
    page = curves.to_html("step 1", logged, ["a < b"], [row])
    assert page.startswith("<p><b>step 1</b></p>")
    assert '<img src="data:image/png;base64,' in page
    assert "<li>a &lt; b</li>" in page
    assert '<td style="text-align:left;white-space:pre-wrap">4</td>' in page


def test_the_picture_has_a_curve_for_each_component_with_its_spread(
    tmp_path: Path,
) -> None:
    columns = {}
    for name in ("correctness", "style"):
        columns |= {f"rewards/{name}/{k}": [0.1, 0.3] for k in ("mean", "std")}
    figure = curves.draw_diagnostics(
        entries(reward=[0.1, 0.2], kl=[0.0, 0.1], **columns), tmp_path / "d.png"
    )
    first, *_, nats, _ = figure.axes
    assert [line.get_label() for line in first.lines] == ["correctness", "style"]
    assert len(first.collections) == 2
    assert nats.get_title() == "nats a token"
    assert (tmp_path / "d.png").stat().st_size > 0


def test_the_picture_says_that_there_is_no_kl() -> None:
    figure = curves.draw_diagnostics(entries(reward=[0.1], entropy=[1.0]))
    assert figure.axes[4].get_title() == "nats a token (no KL: beta is 0)"
