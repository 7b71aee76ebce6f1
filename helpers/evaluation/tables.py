"""Tables and bars of reports: the models of a run, their differences, several runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers import recipes
from helpers.config import HELD_OUT
from helpers.data.formats import Row
from helpers.errors import DataError
from helpers.evaluation import gsm8k, text_metrics
from helpers.runs import Run, open_run, runs_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

STAGES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
ACCURACIES = {"test": "accuracy", "test_new": "accuracy_new"}
MEASURES = [*gsm8k.VERDICTS, "macro_f1", "no_label", *text_metrics.OF_ITEMS]
MEASURES += ["bleu", "chrf", "stop_rate"]
# of a stage's part of the report, in the table of runs
COSTS = ["steps", "loss_first", "loss_last", "loss_best", "eval_loss_best"]
COSTS += ["reward_first", "reward_last", "seconds", "peak_memory_gb"]


def percent(part: dict[str, float]) -> str:
    """Returns `k/n = p % [low, high]` of a proportion.

    >>> percent({"k": 45, "n": 100, "low": 0.356, "high": 0.548})
    '45/100 = 45.0 % [35.6, 54.8]'
    """
    k, n = part["k"], part["n"]
    low, high = 100 * part["low"], 100 * part["high"]
    return f"{k}/{n} = {100 * k / n:.1f} % [{low:.1f}, {high:.1f}]"


def show(value: Any) -> str | None:
    """Returns a measure as text: a proportion, a mean with its interval, a score."""
    if not isinstance(value, dict):
        return None if value is None else f"{value:.3g}"
    if "k" in value:
        return percent(value)
    form = "{score:.1f}" if "score" in value else "{mean:.3f} [{low:.3f}, {high:.3f}]"
    return form.format(**value)


def show_difference(values: dict[str, float]) -> str:
    """Returns a difference with its interval, of proportions in percentage points.

    >>> show_difference({"difference": 0.375, "low": 0.31, "high": 0.44, "p": 0.001})
    '+37.5 points [+31.0, +44.0]'
    """
    if "mean" in values:
        return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**values)
    points = (100 * values[name] for name in ("difference", "low", "high"))
    return "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*points)


def to_frame(rows: list[dict[str, Any]], index: list[str]) -> pd.DataFrame:
    """Returns rows as a table: `-` for what is missing, no column where all is."""
    frame = pd.DataFrame(rows, columns=None if rows else index, dtype=object)
    return frame.set_index(index).dropna(axis=1, how="all").fillna("-")


def evaluated(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of the models that were evaluated, not only judged."""
    return {k: part for k, part in report.get("eval", {}).items() if "seconds" in part}


def losses(part: dict[str, Any]) -> dict[str, float | None]:
    """Returns the losses of a model by their names in tables."""
    chats = part.get("test_chat", {})
    return {"eval loss": part.get("eval_loss"), "test_chat loss": chats.get("loss")}


def results_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns accuracies, losses and costs, a row a model."""
    rows = []
    for label, part in evaluated(report).items():
        stage = report.get(label, {})
        row: dict[str, Any] = {"model": STAGES.get(label, label)}
        for name, key in ACCURACIES.items():
            row[f"{name}: right [95 %]"] = show(part.get(key))
        for name, loss in losses(part).items():
            row[name] = None if loss is None else f"{loss:.3f}"
        row["train min"] = f"{stage['seconds'] / 60:.1f}" if stage else None
        row["eval min"] = f"{part['seconds'] / 60:.1f}"
        peak = max(part["peak_memory_gb"], stage.get("peak_memory_gb", 0.0))
        rows.append({**row, "peak GB": f"{peak:.2f}"})
    return to_frame(rows, ["model"])


def scores_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns every verdict, class rate and text metric, a row a model and set.

    Rates have 95 % Wilson intervals, means (0 to 1) bootstrap intervals; BLEU and chrF
    are of the whole set, 0 to 100. *Strict match* and *flexible extract* are
    lm-evaluation-harness's verdicts.
    """
    rows = []
    for label, part in evaluated(report).items():
        for name in HELD_OUT:
            values = part.get("eval_text" if name == "eval" else name, {})
            if "stop_rate" in values:  # answered, not only a loss
                classes = values.get("labels", {})
                right = part.get(ACCURACIES.get(name, ""), classes.get("accuracy"))
                values = {**values, **classes, "correct": right}
                row: Row = {"model": STAGES.get(label, label), "set": name}
                rows.append(row | {m: show(values.get(m)) for m in MEASURES})
    return to_frame(rows, ["model", "set"])


def compared_sets(report: dict[str, Any]) -> Iterator[tuple[dict[str, str], Row]]:
    """Yields the cells that name a compared set, and its measures."""
    for models, sets in report.get("comparisons", {}).items():
        names = " -> ".join(STAGES.get(label, label) for label in models.split(" -> "))
        yield from (({"models": names, "set": s}, values) for s, values in sets.items())


def differences_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns how models differ on the same items, measured by `evaluation.compare`."""
    rows = [
        {
            **cells,
            "measure": key,
            "gained": values.get("only_second"),
            "lost": values.get("only_first"),
            "difference [95 %]": show_difference(values),
            "McNemar's exact p": show(values.get("p")),
        }
        for cells, measures in compared_sets(report)
        for key, values in measures.items()
        if key != "gain"
    ]
    return to_frame(rows, ["models", "set", "measure"])


def gain_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns the gains under the strict match, split by `gsm8k.split_gain`."""
    kinds = {"strict_match": "strict match", "format": "of it format"}
    kinds["reasoning"] = "of it reasoning"
    rows = [
        cells | {title: f"{measures['gain'][key]:+d}" for key, title in kinds.items()}
        for cells, measures in compared_sets(report)
        if "gain" in measures
    ]
    return to_frame(rows, ["models", "set"])


def plot_results(report: dict[str, Any], path: Path) -> Figure:
    """Returns bars of all models for each held-out set, and saves them as a picture.

    Accuracies with their intervals; losses where no problems are held out.
    """
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

    parts = {STAGES.get(k, k): part for k, part in evaluated(report).items()}
    rates = pd.DataFrame(
        {m: {s: p.get(k) for s, k in ACCURACIES.items()} for m, p in parts.items()}
    ).dropna()
    if rates.empty:
        heights = pd.DataFrame({m: losses(p) for m, p in parts.items()}).dropna()
        options: dict[str, Any] = {"ylabel": "loss, nats a token (lower is better)"}
    else:
        heights = 100 * rates.map(lambda rate: rate["k"] / rate["n"])
        below = heights - 100 * rates.map(lambda rate: rate["low"])
        above = 100 * rates.map(lambda rate: rate["high"]) - heights
        errors = [[below[m].clip(0), above[m].clip(0)] for m in rates]
        options = {"yerr": errors, "capsize": 4, "ylim": (0, 100)}
        options["ylabel"] = "right answers, % (bars: 95 % interval)"
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    heights.plot.bar(ax=axes, rot=0, width=0.8, **options)
    for bars in axes.containers:
        if isinstance(bars, BarContainer):
            axes.bar_label(bars, fmt="%.4g", padding=2)
    figure.savefig(path, dpi=110)
    return figure


def trained_runs() -> list[Run]:
    """Returns the runs of the run folder with a trained stage; logs unreadable ones."""
    runs = []
    for path in sorted(runs_folder().glob("*/report.json")):
        try:
            run = open_run(path.parent.name)
            if any(stage in run.report() for stage in run.config.stages):
                runs.append(run)
        except ValueError as error:
            log.info("left out: %s", error)
    return runs


def runs_table(runs: Sequence[Run] | None = None) -> pd.DataFrame:
    """Returns losses, accuracies and costs, a row a run and stage.

    Below them are the figures that the sources of their recipes published. Logs what
    cannot be compared: other held-out rows, other machines.

    Args:
        runs: by default all of the run folder that are trained.

    Raises:
        DataError: none of the runs is trained.
    """
    runs = trained_runs() if runs is None else runs
    reports = {run.config.name: run.report() for run in runs}
    rows = []
    for run in runs:
        report = reports[run.config.name]
        for stage in [stage for stage in run.config.stages if stage in report]:
            measured = report.get("eval", {}).get(stage, {})
            row: Row = {"run": run.config.name, "model": STAGES[stage]}
            row |= {name: report[stage].get(name) for name in COSTS}
            row["eval_loss"] = measured.get("eval_loss")
            row |= {s: show(measured.get(key)) for s, key in ACCURACIES.items()}
            rows.append(row)
    if not rows:
        names = ", ".join(reports) or "no run"
        raise DataError(f"no stage of {names} is trained: train one first")
    for name in dict.fromkeys(run.config.recipe for run in runs):
        if published := recipes.describe(name).get("published"):
            log.info("%s, published: of its source's held-out rows, on a T4", name)
            source = {"run": f"{name}, published", "model": STAGES["sft"]}
            steps = recipes.load(name).sft["max_steps"]
            rows.append({**source, "steps": steps, **published})
    for name in HELD_OUT:
        parts = [r.get("data", {}).get("fingerprints", {}) for r in reports.values()]
        if len({part[name] for part in parts if name in part}) > 1:
            log.info("%s: the runs' held-out rows differ, do not compare", name)
    machines = [r["environment"] for r in reports.values() if "environment" in r]
    places = {machine["device"] for machine in machines}
    if len(places) > 1:
        log.info("seconds and memory are of %s", ", ".join(sorted(places)))
    return to_frame(rows, ["run", "model"])
