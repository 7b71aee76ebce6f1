"""The run folder `runs/<name>/`: the only thing that notebooks hand to each other.

Nothing here trains or measures anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from helpers import recipes
from helpers.config import RunConfig, read_config
from helpers.errors import MissingInput, TunebookError, nearest
from helpers.files import read_json, write_json, write_text
from helpers.runtime import current_run, runs_folder

MADE_BY = {
    "config.json": "00_setup",
    "data": "01_data_prep",
    "sft": "02_sft_qlora",
    "grpo": "03_grpo_gsm8k",
    "eval": "04_evaluation",
    "export": "05_export",
}


class Part(BaseModel, extra="allow"):
    """A part, with the types of the fields that are read again; others are allowed."""

    device: str = ""
    fingerprints: dict[str, str] = {}
    made_from: str = ""
    inputs: dict[str, str] = {}
    steps: int = 0
    seconds: float = 0.0
    peak_memory_gb: float = 0.0
    model_print: str = ""
    accuracy: dict[str, float] | None = None
    accuracy_new: dict[str, float] | None = None
    eval_loss: float | None = None


class Report(BaseModel, extra="forbid"):
    """The whole file."""

    run: dict[str, str] = {}
    environment: Part = Part()
    data: Part = Part()
    sft: Part = Part()
    grpo: Part = Part()
    eval: dict[str, Part] = {}
    comparisons: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    blind: dict[str, dict[str, Any]] = {}
    export: dict[str, Any] = {}
    notebooks: dict[str, dict[str, float]] = {}


def check_report(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the parts of a report, unchanged; refuses those of another schema."""
    try:
        Report.model_validate(values, strict=True)
    except ValidationError as error:
        lines = [f"{path} does not fit the schema of helpers/runs.py:"]
        for fault in error.errors():
            field = ".".join(map(str, fault["loc"]))
            hint = nearest(field, Report.model_fields)
            lines.append(f"{field}: {fault['msg']}, found {fault['input']!r:.80}{hint}")
        raise TunebookError("\n".join(lines)) from None
    return values


@dataclass(frozen=True)
class Run:
    """A run folder and its config."""

    path: Path
    config: RunConfig

    def require(self, relative: str) -> Path:
        """Returns the path of something in the folder; MissingInput names its maker."""
        path = self.path / relative
        if path.exists():
            return path
        maker = MADE_BY.get(relative.split("/")[0], "00_setup")
        raise MissingInput(f"{path} is missing: run notebook {maker} with this run")

    def write_part(self, part: str, values: dict[str, Any]) -> None:
        """Writes one stage's part of `report.json`, leaving the other parts alone."""
        path = self.path / "report.json"
        write_json(path, check_report(self.report() | {part: values}, path))

    def report(self) -> dict[str, Any]:
        """Returns `report.json` as it stands, empty before the first stage."""
        path = self.path / "report.json"
        return check_report(read_json(path), path)


def save_run(config: RunConfig) -> Run:
    """Returns the run of a config: written to its folder, and now the current one."""
    run = Run(runs_folder() / config.name, config)
    write_text(run.path / "config.json", config.model_dump_json(indent=1) + "\n")
    write_text(runs_folder() / "current", config.name + "\n")
    run.write_part("run", config.model_dump(include={"name", "recipe", "model"}))
    return run


def open_run(name: str | None = None) -> Run:
    """Returns a run, by default the current one; a recipe's name makes its run.

    Raises:
        ConfigError: the run's config is missing or not valid.
    """
    name = name or current_run() or recipes.default_name()
    folder = runs_folder() / name
    if name in recipes.NAMES and not folder.exists():
        return save_run(recipes.load(name))
    return Run(folder, read_config(folder / "config.json"))
