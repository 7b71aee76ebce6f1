"""Tables and bars of reports: the models of a run, their differences, several runs."""

from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from helpers import recipes
from helpers.config import HELD_OUT
from helpers.data.formats import Row
from helpers.evaluation import metrics
from helpers.files import fingerprint, read_json
from helpers.runtime import runs_folder

STAGES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
PROBLEMS = ("test", "test_new")
COUNTED = (*PROBLEMS, "test_chat", "general")  # sets with a rate of right answers
RESULTS = [f"{name}: right [95 %]" for name in COUNTED]
RESULTS += ["eval loss", "test_chat loss", "train min", "eval min", "peak GB"]
TRAINING = ["steps", "loss_first", "loss_last", "loss_best", "eval_loss_best"]
TRAINING += ["reward_first", "reward_last", "device", "held-out rows"]
SCORES = [*metrics.MEASURES, "macro_f1", "no_label", "bleu", "chrf", "stop_rate"]
DIFFERENCES = ["only_first", "only_second", "difference", "n", "low", "high", "p"]


def percent(part: dict[str, float]) -> str:
    """Returns `k/n = p % [low, high]` of a proportion."""
    k, n, low, high = part["k"], part["n"], 100 * part["low"], 100 * part["high"]
    return f"{k}/{n} = {100 * k / n:.1f} % [{low:.1f}, {high:.1f}]"


def to_cell(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "k" in value:
        return percent(value)
    form = "{score:.1f}" if "score" in value else "{mean:.3f} [{low:.3f}, {high:.3f}]"
    return form.format(**value)


def to_frame(rows: list[Row], index: list[str], columns: list[str]) -> pd.DataFrame:
    """Returns rows as a table: `-` for what is missing, none where all is missing."""
    frame = pd.DataFrame(rows, columns=index + columns, dtype=object)  # ints stay ints
    frame = frame.set_index(index).dropna(how="all").dropna(axis=1, how="all")
    return frame.fillna("-").map(to_cell)


def right(part: Row, name: str) -> Row | None:
    """Returns a set's rate of right answers, of a model's part of the report."""
    values = part.get(name, {})
    exact = values.get("exact_match") if name == "general" else None
    return values.get("correct", exact)


def to_row(label: str, stage: Row, part: Row) -> Row:
    """Returns what a model's training cost and its evaluation gave."""
    row = {"model": STAGES.get(label, label), **stage}
    values: list[Any] = [right(part, name) for name in COUNTED]
    values += [part.get("eval_loss"), part.get("test_chat", {}).get("loss")]
    for costs in stage, part:
        values.append(f"{costs['seconds'] / 60:.1f}" if "seconds" in costs else None)
    values.append(max(p.get("peak_memory_gb", 0.0) for p in (stage, part)) or None)
    return row | dict(zip(RESULTS, values, strict=True))


def results_table(report: Row) -> pd.DataFrame:
    """Returns a report's accuracies [95 %], losses and costs, a row a model."""
    parts = report.get("eval", {})
    rows = [to_row(label, report.get(label, {}), parts[label]) for label in parts]
    return to_frame(rows, ["model"], RESULTS)


def scores_table(report: Row) -> pd.DataFrame:
    """Returns every verdict and text metric of answers, a row a model and set.

    Intervals are Wilson's (rates) or of the bootstrap (means, 0 to 1); BLEU and chrF
    are of the whole set, 0 to 100.
    """
    rows = [
        {"model": STAGES.get(label, label), "set": name}
        | part.get("eval_text" if name == "eval" else name, {})
        for label, part in report.get("eval", {}).items()
        for name in HELD_OUT
    ]
    return to_frame(rows, ["model", "set"], SCORES)


def differences_table(report: Row) -> pd.DataFrame:
    """Returns how models differ on the same items, measured by `evaluation.compare`.

    *By format* and *by reasoning* are the two parts of a gain under the strict match.
    """
    rows: list[Row] = []
    for models, sets in report.get("comparisons", {}).items():
        for name, measures in sets.items():
            for measure, values in measures.items():
                row = {"models": models, "set": name, "measure": measure, **values}
                rows.append(row | {"p": f"{row['p']:.3g}"} if "p" in row else row)
    return to_frame(rows, ["models", "set", "measure"], DIFFERENCES)


def plot_results(report: Row, path: Path) -> Figure:
    """Returns bars of accuracies with intervals, else of losses; saves the picture."""
    parts = report.get("eval", {}).items()
    found = {STAGES.get(k, k): {n: right(x, n) for n in PROBLEMS} for k, x in parts}
    rates = pd.DataFrame(found).dropna(axis=1, how="all").dropna()
    bars = results_table(report).filter(like=" loss").replace("-", None).T.astype(float)
    options: dict[str, Any] = {"ylabel": "loss in nats (lower is better)"}
    if rates.size:
        bars = 100 * rates.map(lambda rate: rate["k"] / rate["n"])
        low, high = (100 * rates.map(itemgetter(end)) for end in ("low", "high"))
        errors = [[bars[m] - low[m], high[m] - bars[m]] for m in bars]
        options = {"ylabel": "right answers, % (bars: 95 % interval)", "yerr": errors}
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    bars.plot.bar(ax=figure.add_subplot(), rot=0, width=0.8, capsize=4, **options)
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    return figure


def runs_table() -> pd.DataFrame:
    """Returns costs, losses and accuracies of all trained runs, a row a run and stage.

    Compare only rows of the same machine and held-out rows. The last ones are what the
    sources of the recipes published.
    """
    rows, published = [], {}
    for path in sorted(runs_folder().glob("*/report.json")):
        report = read_json(path)
        device = report.get("environment", {}).get("device")
        prints = report.get("data", {}).get("fingerprints", {})
        held_out = fingerprint([prints.get(name) for name in HELD_OUT])
        names = {"run": path.parent.name, "device": device, "held-out rows": held_out}
        for stage in [stage for stage in STAGES if stage in report]:
            part = report.get("eval", {}).get(stage, {})
            rows.append(names | to_row(stage, report[stage], part))
            recipe = report.get("run", {}).get("recipe", "")
            published[recipe] = recipes.RECIPES.get(recipe, {}).get("published", {})
    for recipe, figures in published.items():
        rows.append({"run": f"{recipe}, published", **to_row("sft", figures, {})})
    return to_frame(rows, ["run", "model"], [*TRAINING, *RESULTS])
