"""The schema of `report.json`: one part for each stage, written by that stage alone.

Fields named here have the type they are read with. A part may hold more of them, such
as the results of judges; the report may not hold other parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from helpers.errors import TunebookError, nearest


class Part(BaseModel):
    """A part: each field may be absent, further ones are allowed."""

    model_config = ConfigDict(extra="allow")


class Proportion(BaseModel):
    """A count of n with its 95 % interval."""

    k: int
    n: int
    low: float
    high: float


class Environment(Part):
    """The machine and the libraries of the last training or setup."""

    engine: str = ""
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = {}


class Data(Part):
    """Sources and fingerprints of the rows; their counts are further fields."""

    sources: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, str] = {}
    made_from: str = ""
    inputs: dict[str, str] = {}


class Training(Part):
    """The costs of a stage; losses and rewards are further fields."""

    steps: int = 0
    seconds: float = 0.0
    peak_memory_gb: float = 0.0
    stopped: str = ""


class Evaluation(Part):
    """The measures of one model; results of judges are further fields."""

    model_print: str = ""
    accuracy: Proportion | None = None
    accuracy_new: Proportion | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    peak_memory_gb: float = 0.0


class Report(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    run: dict[str, str] = {}
    environment: Environment = Environment()
    data: Data = Data()
    sft: Training = Training()
    grpo: Training = Training()
    eval: dict[str, Evaluation] = {}
    comparisons: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    blind: dict[str, dict[str, Any]] = {}
    export: dict[str, Any] = {}
    notebooks: dict[str, dict[str, float]] = {}


def read(path: Path) -> dict[str, Any]:
    """Returns the parts of a report file, empty where there is no file."""
    return check(json.loads(path.read_text("utf-8")) if path.exists() else {}, path)


def check(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the parts of a report, unchanged.

    Raises:
        ValueError: a part is unknown, or a field has another type; one line a fault.
    """
    try:
        Report.model_validate(values, strict=True)
    except ValidationError as error:
        lines = [f"{path} does not fit the schema of helpers/report.py:"]
        for fault in error.errors():
            field = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                hint = nearest(field, Report.model_fields)
                lines.append(f"{field!r} is not a part of a report{hint}")
            else:
                lines.append(f"{field}: {fault['msg']}, found {fault['input']!r:.80}")
        raise TunebookError("\n".join(lines)) from None
    return values
