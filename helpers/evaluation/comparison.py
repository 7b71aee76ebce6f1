"""Models and runs against each other: paired differences, gains, costs, in tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from helpers import recipes
from helpers.errors import ConfigError, DataError
from helpers.evaluation.results import (
    ACCURACIES,
    METRICS,
    STAGES,
    VERDICTS,
    Table,
    percent,
)
from helpers.runs import Run, open_run, runs_folder


def differences_table(report: dict[str, Any], brief: bool = False) -> Table:
    """Returns how models differ on the same items, from `evaluation.compare`.

    A row a verdict, or a text metric where no problems are held out.

    Args:
        report: of a run.
        brief: shows only right answers, or ROUGE-L, of each set.
    """
    rows = []
    for models, part, name, found in compared_sets(report):
        if brief and name not in ("correct", "rougeL"):
            continue
        if "p" in found:
            counts = [str(found["only_second"]), str(found["only_first"])]
            values = [*counts, as_points(found), f"{found['p']:.2g}"]
        elif "mean" in found:
            low, high = found["low"], found["high"]
            mean = f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
            values = ["-", "-", mean, "-"]
        else:
            continue
        what = {**VERDICTS, **METRICS}.get(name, name)
        rows.append([models, part, what, *values])
    header = ["models", "set", "what", "gained", "lost", "difference [95 %]"]
    return Table([*header, "McNemar's exact p"], rows)


def compared_sets(
    report: dict[str, Any],
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields models, set, name of what is compared (`gain` too), and its values."""
    for models, sets in report.get("comparisons", {}).items():
        said = " -> ".join(STAGES.get(m, m) for m in models.split(" -> "))
        for part, found in sets.items():
            for name, values in found.items():
                yield said, part, name, values


def as_points(found: dict[str, float]) -> str:
    """Returns a difference of shares in percentage points, with its interval.

    >>> as_points({"difference": 0.375, "low": 0.31, "high": 0.44})
    '+37.5 points [+31.0, +44.0]'
    """
    middle, low, high = (100 * found[n] for n in ("difference", "low", "high"))
    return f"{middle:+.1f} points [{low:+.1f}, {high:+.1f}]"


def gain_table(report: dict[str, Any]) -> Table:
    """Returns how much of a gain under the strict match is format, how much reasoning.

    Format: the other model had the right number too, written another way. The two
    columns add up to the gain.
    """
    rows = []
    for models, part, name, found in compared_sets(report):
        if name == "gain":
            kinds = [f"{found[n]:+d}" for n in ("strict_match", "format", "reasoning")]
            rows.append([models, part, *kinds])
    gains = ["strict match", "of it format", "of it reasoning"]
    return Table(["models", "set", *gains], rows)


def trained_runs() -> list[Run]:
    """Returns the runs of the run folder that have trained a stage, by name.

    Those whose config is not valid any more are left out, with a printed word.
    """
    found = []
    for path in sorted(runs_folder().glob("*/report.json")):
        try:
            run = open_run(path.parent.name)
        except ConfigError as error:
            print(f"left out: {error}")  # noqa: T201
            continue
        if any(stage in run.report() for stage in run.config.stages):
            found.append(run)
    return found


def runs_table(compared: Sequence[Run]) -> Table:
    """Returns a table of runs: losses, accuracy, time and memory, a row a stage.

    Below them what the sources of their recipes published. Only what was measured has
    a column. Where runs held out other rows, or ran on other machines, a note says
    which columns cannot be set against each other.

    Raises:
        DataError: none of the runs is trained.
    """
    rows = []
    for run in compared:
        report = run.report()
        for stage in run.config.stages:
            if stage in report:
                values = stage_values(report, stage)
                rows.append({"run": run.config.name, **values})
    if not rows:
        names = ", ".join(run.config.name for run in compared)
        raise DataError(f"no stage of {names or 'no run'} is trained: train one first")
    header = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    published = list(published_rows(compared))
    rows += published
    reports = [run.report() for run in compared]
    notes = []
    if published:
        notes.append("published: the source's own run, of its held-out rows, on a T4")
    for part, columns in {
        "eval": "train and eval loss",
        **{part: f"{part}: right" for part in ACCURACIES.values()},
    }.items():
        prints = [r.get("data", {}).get("fingerprints", {}) for r in reports]
        if len({found[part] for found in prints if part in found}) > 1:
            notes.append(f"{columns}: the runs' held-out rows differ, do not compare")
    machines = {r["environment"]["device"] for r in reports if "environment" in r}
    if len(machines) > 1:
        notes.append(
            f"seconds and peak GB: of different machines, {', '.join(sorted(machines))}"
        )
    return Table(header, [[row[name] for name in header] for row in rows], notes)


def published_rows(compared: Sequence[Run]) -> Iterator[dict[str, str]]:
    """Yields the cells, by column, of each recipe whose source published any."""
    for name in dict.fromkeys(run.config.recipe for run in compared):
        found = recipes.describe(name).get("published")
        if found:
            trained = {"steps": recipes.load(name).sft["max_steps"], **found}
            cells = stage_values({"sft": trained}, "sft")
            yield {"run": f"{name}, published", **cells}


def stage_values(report: dict[str, Any], stage: str) -> dict[str, str]:
    """Returns the cells of a trained stage in the table of runs, by column."""
    trained, measured = report[stage], report.get("eval", {}).get(stage, {})

    def cell(form: str, *values: float | None) -> str:
        return "-" if None in values else form.format(*values)

    def ends(name: str) -> str:
        found = [trained.get(f"{name}_{end}") for end in ("first", "last")]
        if None in found:
            return cell("{:.3f} at best", trained.get(f"{name}_best"))
        return cell("{:.3f} to {:.3f}", *found)

    loss = measured.get("eval_loss", trained.get("eval_loss_best"))
    rows = report.get("data", {}).get("problems" if stage == "grpo" else "train")
    return {
        "model": STAGES.get(stage, stage),
        "rows": cell("{:,}", rows),
        "steps": str(trained["steps"]),
        "train loss": ends("loss"),
        "reward": ends("reward"),
        "eval loss": cell("{:.3f}", loss),
        **{
            f"{part}: right [95 %]": percent(measured[key]) if key in measured else "-"
            for key, part in ACCURACIES.items()
        },
        "seconds": cell("{:.1f}", trained.get("seconds")),
        "peak GB": cell("{:.2f}", trained.get("peak_memory_gb")),
    }
