"""The schema of `report.json`: one part for each stage, written by that stage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from helpers.errors import TunebookError, nearest


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


def check(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the parts of a report, unchanged; refuses those of another schema."""
    try:
        Report.model_validate(values, strict=True)
    except ValidationError as error:
        lines = [f"{path} does not fit the schema of helpers/report.py:"]
        for fault in error.errors():
            field = ".".join(map(str, fault["loc"]))
            hint = nearest(field, Report.model_fields)
            lines.append(f"{field}: {fault['msg']}, found {fault['input']!r:.80}{hint}")
        raise TunebookError("\n".join(lines)) from None
    return values
