"""Shows a report: the table of all models, bars with intervals, answers to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.runs import Run, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
ACCURACIES = {"accuracy": "test", "accuracy_new": "test_new"}
TEXTS = {"test_chat": "test_chat", "eval_text": "eval"}
METRICS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "token_f1": "token F1",
}
VERDICTS = {
    "correct": "right",
    "strict_match": "strict match",
    "flexible_extract": "flexible extract",
    "strict_format": "format",
}


def percent(part: dict[str, float]) -> str:
    """Returns `k/n = p % [low, high]` of a proportion.

    >>> percent({"k": 45, "n": 100, "low": 0.356, "high": 0.548})
    '45/100 = 45.0 % [35.6, 54.8]'
    """
    k, n = part["k"], part["n"]
    low, high = 100 * part["low"], 100 * part["high"]
    return f"{k}/{n} = {100 * k / n:.1f} % [{low:.1f}, {high:.1f}]"


class Table:
    """Rows of text, with notes below: aligned in a terminal, a table in a notebook."""

    def __init__(
        self, header: list[str], rows: list[list[str]], notes: Sequence[str] = ()
    ) -> None:
        self.header, self.rows, self.notes = header, rows, notes

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*aligned, *self.notes])

    def _repr_html_(self) -> str:
        return render("table.html", table=self)


def render(template: str, **values: Any) -> str:
    """Returns a template of this folder filled in; values are escaped, none is absent.

    Args:
        template: the name of an `.html` file here, in Jinja's language.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(values)


def evaluated(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of the models that were evaluated, not only judged."""
    return {k: part for k, part in report.get("eval", {}).items() if "seconds" in part}


def losses(part: dict[str, Any]) -> dict[str, float]:
    """Returns the losses of a model's part of the report, by their names in tables."""
    found = {"eval loss": part.get("eval_loss")}
    found["test_chat loss"] = part.get("test_chat", {}).get("loss")
    return {name: loss for name, loss in found.items() if loss is not None}


def results_table(report: dict[str, Any]) -> Table:
    """Returns the table of a report: one row a model, conditions in the header.

    Only what was measured has a column.
    """
    columns: dict[str, list[str]] = {}
    parts = evaluated(report)
    for key, name in ACCURACIES.items():
        if any(key in part for part in parts.values()):
            columns[f"{name}: right [95 %]"] = [
                percent(part[key]) if key in part else "-" for part in parts.values()
            ]
    for name in ("eval loss", "test_chat loss"):
        found = [losses(part).get(name) for part in parts.values()]
        if any(loss is not None for loss in found):
            columns[name] = ["-" if loss is None else f"{loss:.3f}" for loss in found]
    trained = [report.get(label, {}) for label in parts]
    columns["train min"] = [
        f"{stage['seconds'] / 60:.1f}" if stage else "-" for stage in trained
    ]
    columns["eval min"] = [f"{part['seconds'] / 60:.1f}" for part in parts.values()]
    columns["peak GB"] = [
        f"{max(part['peak_memory_gb'], stage.get('peak_memory_gb', 0.0)):.2f}"
        for part, stage in zip(parts.values(), trained, strict=True)
    ]
    names = [STAGES.get(label, label) for label in parts]
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Table(["model", *columns], rows)


def rates_table(report: dict[str, Any]) -> Table:
    """Returns every verdict's rate of each model on each set of problems.

    *Right* and *format* are ours; strict match and flexible extract are
    lm-evaluation-harness's, by its own rules.
    """
    rows = []
    for label, part in evaluated(report).items():
        for key, name in ACCURACIES.items():
            if key in part:
                found = {**part.get(name, {}), "correct": part[key]}
                rates = [percent(found[v]) if v in found else "-" for v in VERDICTS]
                cut = str(found.get("truncated", "-"))
                rows.append([STAGES.get(label, label), name, *rates, cut])
    return Table(["model", "set", *VERDICTS.values(), "cut off"], rows)


def texts_table(report: dict[str, Any]) -> Table:
    """Returns the text metrics of each model's answers to held-out conversations.

    ROUGE, exact match and F1 are means from 0 to 1 with 95 % bootstrap intervals; BLEU
    and chrF are of the whole set, 0 to 100.
    """
    rows = []
    for label, part in evaluated(report).items():
        for key, name in TEXTS.items():
            found = part.get(key, {})
            if "bleu" in found:
                means = [
                    "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found[m])
                    for m in METRICS
                ]
                scores = [f"{found[m]['score']:.1f}" for m in ("bleu", "chrf")]
                rows.append([STAGES.get(label, label), name, *means, *scores])
    return Table(["model", "set", *METRICS.values(), "BLEU", "chrF"], rows)


def labels_table(report: dict[str, Any]) -> Table:
    """Returns accuracy and macro F1 of each model on held-out class labels."""
    rows = []
    for label, part in evaluated(report).items():
        for key, name in TEXTS.items():
            if rates := part.get(key, {}).get("labels"):
                shares = [percent(rates["accuracy"]), f"{rates['macro_f1']:.3f}"]
                missed = str(rates["no_label"])
                rows.append([STAGES.get(label, label), name, *shares, missed])
    header = [
        "model",
        "set",
        "right labels [95 %]",
        "macro F1",
        "answers without label",
    ]
    return Table(header, rows)


def draw_results(report: dict[str, Any], path: Path) -> Figure:
    """Draws the models side by side, one group of bars a held-out set; saves it too.

    Accuracies with their intervals; losses where no problems were held out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    parts = evaluated(report).values()
    groups = [key for key in ACCURACIES if all(key in part for part in parts)]
    names = [ACCURACIES[key] for key in groups]
    if not groups:
        names = list(losses(next(iter(parts))))
        heights = [[losses(part)[name] for name in names] for part in parts]
        draw_bars(axes, report, names, heights, None, "%.3f")
        axes.set_ylabel("loss, nats a token (lower is better)")
    else:
        if report["run"]["recipe"] in ("demo", "smoke"):
            said = {"test": "templates of training", "test_new": "unseen templates"}
            names = [f"{name} ({said[name]})" for name in names]
        found = [[part[key] for key in groups] for part in parts]
        heights = [[100 * p["k"] / p["n"] for p in row] for row in found]
        spread = [[(100 * p["low"], 100 * p["high"]) for p in row] for row in found]
        draw_bars(axes, report, names, heights, spread, "%.1f")
        axes.set_ylabel("right answers, % (bars: 95 % interval)")
        axes.set_ylim(0, 100)
    axes.legend()
    figure.savefig(path, dpi=110)
    return figure


def draw_bars(
    axes: Axes,
    report: dict[str, Any],
    names: list[str],
    heights: list[list[float]],
    spread: list[list[tuple[float, float]]] | None,
    number: str,
) -> None:
    """Draws one bar a model in each group, with its value and its interval.

    Args:
        axes: to draw on.
        report: names the models.
        names: of the groups.
        heights: (models, groups).
        spread: low and high end of each bar's interval, (models, groups).
        number: the format of the values.
    """
    width = 0.8 / len(heights)
    for place, (label, row) in enumerate(zip(evaluated(report), heights, strict=True)):
        ends = spread[place] if spread else [(h, h) for h in row]
        below = [max(0.0, h - low) for h, (low, _) in zip(row, ends, strict=True)]
        above = [max(0.0, high - h) for h, (_, high) in zip(row, ends, strict=True)]
        bars = axes.bar(
            [group + place * width for group in range(len(names))],
            row,
            0.9 * width,
            yerr=[below, above] if spread else None,
            capsize=4,
            label=STAGES.get(label, label),
        )
        axes.bar_label(bars, fmt=number, padding=2)
    middle = (len(heights) - 1) * width / 2
    axes.set_xticks([group + middle for group in range(len(names))], names)


def print_report(run: Run) -> None:
    """Prints the run's table, for `make demo`, and writes it beside the report."""
    table = repr(results_table(run.report()))
    write_text(run.path / "results.txt", table + "\n")
    environment = json.dumps(run.report().get("environment", {}).get("device", ""))
    print(f"run {run.config.name} on {environment}\n{table}")  # noqa: T201
