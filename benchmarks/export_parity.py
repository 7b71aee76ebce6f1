"""Writes how exported formats of a run behave beside the trained model.

    python benchmarks/export_parity.py demo "two x86-64 CPU cores, AVX-512"
    python benchmarks/export_parity.py demo MACHINE --format merged --format gguf:f16

Reads the `export` part of the run's report, after exporting the formats named. The rows
go to results/export_parity.json, in place of those of the same model, format and
machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.markdown import to_markdown  # noqa: E402

TABLE = ROOT / "results" / "export_parity.json"
FIGURES = ["tokens_agree", "stop_rate", "perplexity", "mb", "tokens_per_second"]
KEY = ["machine", "model", "format"]


def to_rows(report: dict[str, Any], machine: str) -> list[dict[str, Any]]:
    """Returns a row a format of a run's report, None for what was not measured."""
    rows = []
    for name, part in report["export"].items():
        if isinstance(part, dict) and "perplexity" in part:
            row = {"machine": machine, "model": report["run"]["model"], "format": name}
            row["prompts_equal"] = part.get("prompts_equal")
            row |= {figure: part.get(figure) for figure in FIGURES}
            right = part.get("right", {})
            rows.append(row | {key: right.get(key) for key in ("k", "n")})
    return rows


def merge_rows(
    old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns new rows after those of others."""
    keys = [[row[key] for key in KEY] for row in new]
    return [row for row in old if [row[key] for key in KEY] not in keys] + new


def section() -> list[str]:
    """Returns the section of results/README.md."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        same = row["prompts_equal"]
        row["prompts_equal"] = f"{same['k']}/{same['n']}" if same else None
    return [
        "By `python benchmarks/export_parity.py`: exported files in plain transformers",
        "and llama.cpp, beside the trained model. `tokens_agree`: its greedy tokens up",
        "to each answer's first other one; k of n answers that end are right.",
        *("", to_markdown(rows)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("machine", help="in words")
    parser.add_argument("--format", action="append", dest="formats", default=[])
    options = parser.parse_args()
    from helpers import export
    from helpers.errors import ModelError
    from helpers.files import read_json, write_json
    from helpers.runs import open_run

    run = open_run(options.run)
    if options.formats:
        try:
            export.export(run, formats=options.formats)
        except ModelError as error:  # the report has the figures all the same
            print(error)
    rows = to_rows(run.report(), options.machine)
    if not rows:
        sys.exit(f"{run.path} has no export to report: name formats by --format")
    rows = merge_rows(read_json(TABLE).get("rows", []), rows)
    write_json(TABLE, {"machine": options.machine, "rows": rows})


if __name__ == "__main__":
    main()
