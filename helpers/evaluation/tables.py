"""Tables and bars of reports: the models of a run, their differences, several runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers import recipes
from helpers.config import HELD_OUT
from helpers.errors import DataError, TunebookError
from helpers.evaluation import metrics
from helpers.runs import open_run, runs_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

STAGES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
ACCURACIES = {"test": "accuracy", "test_new": "accuracy_new"}
MEASURES = [*metrics.VERDICTS, "macro_f1", "no_label", *metrics.OF_ITEMS]
MEASURES += ["bleu", "chrf", "stop_rate"]
COSTS = ["steps", "loss_first", "loss_last", "loss_best", "eval_loss_best"]
COSTS += ["reward_first", "reward_last", "seconds", "peak_memory_gb"]


def percent(part: dict[str, float]) -> str:
    """Returns `k/n = p % [low, high]` of a proportion."""
    k, n, low, high = part["k"], part["n"], 100 * part["low"], 100 * part["high"]
    return f"{k}/{n} = {100 * k / n:.1f} % [{low:.1f}, {high:.1f}]"


def show(value: Any) -> str | None:
    """Returns a measure as text: a proportion, a mean with its interval, a score."""
    if not isinstance(value, dict):
        return None if value is None else f"{value:.4g}"
    if "k" in value:
        return percent(value)
    form = "{score:.1f}" if "score" in value else "{mean:.3f} [{low:.3f}, {high:.3f}]"
    return form.format(**value)


def to_frame(rows: list[dict[str, Any]], *index: str) -> pd.DataFrame:
    """Returns rows as a table: `-` for what is missing, no column where all is."""
    frame = pd.DataFrame(rows, columns=None if rows else index, dtype=object)
    return frame.set_index([*index]).dropna(axis=1, how="all").fillna("-")


def evaluated(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of the models that were evaluated, not only judged."""
    return {k: part for k, part in report.get("eval", {}).items() if "seconds" in part}


def results_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns accuracies with 95 % intervals, losses and costs, a row a model.

    Args:
        report: of a run; so for the other tables.
    """
    rows = []
    for label, part in evaluated(report).items():
        stage = report.get(label, {})
        row: dict[str, Any] = {"model": STAGES.get(label, label)}
        row |= {f"{s}: right [95 %]": show(part.get(k)) for s, k in ACCURACIES.items()}
        row["eval loss"] = show(part.get("eval_loss"))
        row["test_chat loss"] = show(part.get("test_chat", {}).get("loss"))
        row["train min"] = f"{stage['seconds'] / 60:.1f}" if stage else None
        row["eval min"] = f"{part['seconds'] / 60:.1f}"
        peak = max(part["peak_memory_gb"], stage.get("peak_memory_gb", 0.0))
        rows.append({**row, "peak GB": f"{peak:.2f}"})
    return to_frame(rows, "model")


def scores_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns every verdict and text metric of answers, a row a model and set.

    Intervals are Wilson's (rates) or of the bootstrap (means, 0 to 1); BLEU and chrF
    are of the whole set, 0 to 100.
    """
    rows = []
    for label, part in evaluated(report).items():
        for name in HELD_OUT:
            values = part.get("eval_text" if name == "eval" else name, {})
            if "stop_rate" in values:  # answered, not only a loss
                row: dict[str, Any] = {"model": STAGES.get(label, label), "set": name}
                rows.append(row | {m: show(values.get(m)) for m in MEASURES})
    return to_frame(rows, "model", "set")


def differences_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns how models differ on the same items, measured by `evaluation.compare`.

    *By format* and *by reasoning* are the two parts of a gain under the strict match.
    """
    rows = []
    for models, sets in report.get("comparisons", {}).items():
        names = " -> ".join(STAGES.get(label, label) for label in models.split(" -> "))
        for name, measures in sets.items():
            cells = {"models": names, "set": name}
            rows += [cells | {"measure": key} | measures[key] for key in measures]
    return to_frame(rows, "models", "set", "measure")


def plot_results(report: dict[str, Any], path: Path) -> Figure:
    """Returns bars of all models for each held-out set, and saves them as a picture.

    Accuracies with their intervals; losses where no problems are held out.
    """
    from matplotlib.figure import Figure

    parts = pd.DataFrame(evaluated(report)).rename(columns=STAGES)
    rates = parts.reindex(ACCURACIES.values()).set_axis([*ACCURACIES]).dropna()
    options: dict[str, Any] = {"ylabel": "loss, nats a token (lower is better)"}
    heights = results_table(report).filter(like=" loss").replace("-", None).T
    heights = heights.astype(float)
    if len(rates):
        heights = 100 * rates.map(lambda rate: rate["k"] / rate["n"])
        below = heights - 100 * rates.map(lambda rate: rate["low"])
        above = 100 * rates.map(lambda rate: rate["high"]) - heights
        options = {"ylabel": "right answers, % (bars: 95 % interval)"}
        options |= {"yerr": [[below[m], above[m]] for m in rates], "ylim": (0, 100)}
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    heights.plot.bar(ax=figure.add_subplot(), rot=0, width=0.8, capsize=4, **options)
    figure.savefig(path, dpi=110)
    return figure


def runs_table() -> pd.DataFrame:
    """Returns costs, losses and accuracies of all trained runs, a row a run and stage.

    Below them are the figures that the sources of their recipes published. Logs what
    cannot be compared: other held-out rows, other machines.

    Raises:
        DataError: no run is trained.
    """
    rows, published, conditions = [], {}, []
    for path in sorted(runs_folder().glob("*/report.json")):
        try:
            run = open_run(path.parent.name)
            report = run.report()
        except TunebookError as error:
            log.info("left out: %s", error)
            continue
        recipe, data = run.config.recipe, report.get("data", {})
        for stage in [stage for stage in run.config.stages if stage in report]:
            part = report.get("eval", {}).get(stage, {})
            row: dict[str, Any] = {"run": run.config.name, "model": STAGES[stage]}
            row |= {cost: report[stage].get(cost) for cost in COSTS}
            row |= {s: show(part.get(key)) for s, key in ACCURACIES.items()}
            rows.append({**row, "eval_loss": part.get("eval_loss")})
            device = report.get("environment", {}).get("device")
            conditions.append({**data.get("fingerprints", {}), "device": device})
            names = {"run": f"{recipe}, published", "model": STAGES["sft"]}
            published[recipe] = names | recipes.describe(recipe).get("published", {})
    if not rows:
        raise DataError(f"no run in {runs_folder()} is trained: train one first")
    for name, values in pd.DataFrame(conditions).items():
        if name in ("device", *HELD_OUT) and values.nunique() > 1:
            log.info("the runs differ in %s: do not compare what depends on it", name)
    rows += [figures for figures in published.values() if len(figures) > 2]
    return to_frame(rows, "run", "model")
