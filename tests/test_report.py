"""The schema of report.json: what is written today fits, a misspelt part does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import runs
from helpers.files import read_json, write_json
from helpers.runs import Run

PUBLISHED = sorted((Path(__file__).parent.parent / "results").glob("demo_*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_reports_of_earlier_versions_fit(path: Path, tmp_path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    parts = {k: v for k, v in values.items() if k not in ("command", "conditions")}
    file = tmp_path / "report.json"
    write_json(file, parts)
    assert runs.check_report(read_json(file), file) == parts


@pytest.mark.parametrize(
    ("part", "values", "fault"),
    [
        ("evals", {}, r"evals: .* not permitted.*; did you mean 'eval'\?"),
        ("sft", {"steps": "40"}, "sft.steps: Input should be a valid integer, found"),
        ("eval", {"base": {"accuracy": 0.5}}, "eval.base.accuracy: .*found 0.5"),
        ("data", {"fingerprints": {"test": 3}}, "data.fingerprints.test: .*string"),
        ("environment", "cpu", "environment: .*found 'cpu'"),
    ],
)
def test_a_misspelt_part_or_a_wrong_type_is_refused_and_nothing_written(
    run: Run, part: str, values: Any, fault: str
) -> None:
    before = run.report()
    with pytest.raises(ValueError, match=f"(?s)report.json does not fit.*{fault}"):
        run.write_part(part, values)
    assert run.report() == before
