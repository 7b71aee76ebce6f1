"""A run's report as one HTML page: settings, curves, results, answers; all in one file.

    python -m helpers page demo

Everything comes from the run folder; no tracker is needed, and the page loads nothing.
"""

from __future__ import annotations

import argparse
import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.errors import DataError, MissingInput
from helpers.evaluation import comparison, results
from helpers.evaluation.results import STAGES, Table
from helpers.llm_judge import pairwise as pairs
from helpers.runs import Run, write_text
from helpers.widgets import ratings

EXAMPLES = 12
MEASURED = {*results.ACCURACIES, *results.ACCURACIES.values(), *results.TEXTS}


@dataclass
class Section:
    """A part of the page: a title, and whatever there is to show below it."""

    title: str
    text: str = ""
    tables: list[tuple[str, Table]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    answers: pairs.SideBySide | None = None
    details: list[tuple[str, Table]] = field(default_factory=list)


def flatten(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Returns nested values as rows of name and text; shares come with intervals.

    >>> flatten({"steps": 4, "loss": {"first": 1.5}, "by": []})
    [['steps', '4'], ['loss first', '1.5'], ['by', '']]
    """
    rows: list[list[str]] = []
    for name, value in values.items():
        label = f"{prefix} {name.replace('_', ' ')}".strip()
        if isinstance(value, dict) and {"k", "n", "low", "high"} <= value.keys():
            rows.append([label, results.percent(value)])
        elif isinstance(value, dict):
            rows += flatten(value, label)
        elif isinstance(value, list):
            rows.append([label, ", ".join(map(str, value))])
        else:
            rows.append([label, f"{value:,}" if type(value) is int else str(value)])
    return rows


def facts(values: dict[str, Any]) -> Table:
    """Returns a part of the report as a table of names and values."""
    return Table(["what", "value"], flatten(values))


def embed(path: Path) -> str:
    """Returns a PNG file as an address that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def pictures(folder: Path, caption: str) -> list[tuple[str, str]]:
    """Returns the pictures that lie in a folder, with captions."""
    return [
        (f"{caption}: {path.stem.replace('_', ' ')}", embed(path))
        for path in sorted(folder.glob("*.png"))
    ]


def results_section(run: Run, report: dict[str, Any]) -> Section:
    """Returns the models' table and bars, every measured value in the details."""
    results.draw_results(report, run.path / "results.png")
    parts = results.evaluated(report).items()
    shown = [results.results_table, results.rates_table]
    shown += [results.labels_table, results.texts_table]
    return Section(
        "Results",
        "The same held-out rows, prompts and decoding for every model; counts with "
        "95 % Wilson intervals.",
        [("", show(report)) for show in shown],
        pictures(run.path, "the models"),
        details=[
            (f"All values of {STAGES.get(label, label)}", facts(part))
            for label, part in parts
        ],
    )


def comparison_section(report: dict[str, Any]) -> Section:
    """Returns the paired tests, and how much of a gain is format only."""
    text = "The same items, so that each model is its own control. Gained and lost are "
    text += "the items that only the second, and only the first, model gets."
    gains = ("Format gain or reasoning gain, in items", comparison.gain_table(report))
    tables = [("", comparison.differences_table(report, brief=True)), gains]
    every = ("By every verdict or metric", comparison.differences_table(report))
    return Section("Models in pairs", text, tables, details=[every])


def answers_section(run: Run, report: dict[str, Any]) -> Section | None:
    """Returns the first model's answers beside the last one's, where both have any."""
    labels = list(results.evaluated(report))
    if len(labels) < 2:
        return None
    try:
        table = pairs.side_by_side(run, (labels[0], labels[-1]), count=EXAMPLES)
    except (DataError, MissingInput):
        return None  # nothing was answered, only losses measured
    text = f"The first {EXAMPLES} items in the set's own order, none picked."
    return Section("Answers side by side", text, answers=table)


def stage_section(run: Run, report: dict[str, Any], stage: str) -> Section:
    """Returns what a stage reports, and its curves, drawn now if they never were."""
    history = run.path / stage / "log_history.json"
    curves = run.path / stage / "curves.png"
    if history.exists() and not curves.exists():
        from helpers.training.plots import draw_losses

        draw_losses(json.loads(history.read_text(encoding="utf-8")), curves)
    title = f"Training: {stage.upper()}"
    found = pictures(run.path / stage, stage.upper())
    return Section(title, tables=[("", facts(report[stage]))], pictures=found)


def people_section(report: dict[str, Any]) -> Section:
    """Returns what people said of pairs of answers without knowing the models."""
    section = Section("Rated by people, blind")
    for counts in report["blind"].values():
        first, second = counts["models"]
        table = ratings.table(counts, (first, second))
        section.tables.append((f"{first} against {second}", table))
    return section


def judges_section(run: Run, report: dict[str, Any]) -> Section:
    """Returns each result of a model that its evaluation did not measure itself.

    They are judges': AlpacaEval, MT-Bench and pairs of models, under whatever name.
    """
    tables = [
        (f"{STAGES.get(label, label)}: {name.replace('_', ' ')}", facts(values))
        for label, part in report.get("eval", {}).items()
        for name, values in part.items()
        if isinstance(values, dict) and name not in MEASURED
    ]
    drawn = pictures(run.path / "eval", "judged")
    return Section("Judged by a model", tables=tables, pictures=drawn)


def data_section(report: dict[str, Any]) -> Section:
    """Returns rows and fingerprints of the data's parts, and their sources."""
    part = report["data"]
    prints = part.get("fingerprints", {})
    rows = [[name, f"{part[name]:,}", prints[name]] for name in prints]
    rest = {k: v for k, v in part.items() if k not in (*prints, "fingerprints")}
    return Section(
        "Data",
        tables=[("", Table(["part", "rows", "fingerprint"], rows))],
        details=[("Sources and rows left out", facts(rest))],
    )


def sections(run: Run) -> list[Section]:
    """Returns the sections of a run's page: those that the run has something for."""
    report = run.report()
    found: list[Section | None] = []
    if results.evaluated(report):
        found.append(results_section(run, report))
        found.append(comparison_section(report) if "comparisons" in report else None)
        found.append(answers_section(run, report))
    judged = judges_section(run, report)
    found.append(judged if judged.tables else None)
    if report.get("blind"):
        found.append(people_section(report))
    found += [stage_section(run, report, s) for s in ("sft", "grpo") if s in report]
    if "export" in report:
        text = "Share of held-out prompts that the reloaded model answers letter for "
        text += "letter as the trained one did."
        found.append(Section("Export", text, [("", facts(report["export"]))]))
    if "data" in report:
        found.append(data_section(report))
    if "environment" in report:
        table = facts(report["environment"])
        found.append(Section("Environment", tables=[("", table)]))
    return [section for section in found if section]


def write(run: Run) -> Path:
    """Writes `report.html` of a run and returns its path.

    What the run has not done yet is not on the page.

    Raises:
        MissingInput: the run has no report yet.
    """
    run.require("report.json")
    config, device = run.config, run.report().get("environment", {}).get("device", "")
    what = f"{config.model}, recipe {config.recipe}, {' then '.join(config.stages)}"
    path = run.path / "report.html"
    write_text(
        path,
        results.render(
            "page.html",
            name=config.name,
            what=f"{what}, {device}".strip(", "),
            sections=sections(run),
            config=config.model_dump_json(indent=1),
        ),
    )
    return path


def main(arguments: list[str]) -> None:
    """Writes the page of a run, the current one by default, and prints its path.

    Raises:
        SystemExit: the run is not there; the message says what to do.
    """
    from helpers.errors import ConfigError
    from helpers.runs import open_run

    parser = argparse.ArgumentParser(prog="python -m helpers page")
    parser.add_argument("run", nargs="?", help="a run's name; the current one if none")
    with runtime.exit_on(ConfigError, OSError):
        print(write(open_run(parser.parse_args(arguments).run)))  # noqa: T201
