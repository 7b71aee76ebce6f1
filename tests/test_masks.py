"""Tests of benchmarks/masks.py: every shipped chat template is masked as it should be.

Unsloth patches the libraries when it is imported, so the program runs in a process of
its own; a few of trl's templates are asked about in this one too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chats, masks
from helpers.models.load import load_tokenizer

COMMITTED = json.loads(masks.RESULTS.read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in COMMITTED["templates"]}
# their ends differ, their prompts open a thought, they leave out or refuse something
WITHOUT_UNSLOTH = ["llama3", "gptoss", "qwen3", "deepseek_r1_distill", "gemma"]


@pytest.fixture(scope="module")
def base() -> Any:
    return load_tokenizer("smollm2-135m-offline")


def test_nine_of_ten_templates_equal_the_oracle_and_the_others_have_a_reason() -> None:
    assert len(ROWS) == len(COMMITTED["templates"]) >= 85
    for column in ("oracle", "unsloth", "trl"):
        for name, row in ROWS.items():
            kind, _, reason = row[column].partition(": ")
            known = (
                ("unsupported",) if column == "oracle" else ("unsupported", "differs")
            )
            assert kind == "equal" or (kind in known and reason), name
    equal = sum(row["oracle"] == "equal" for row in ROWS.values())
    assert equal >= 0.9 * len(ROWS)


def test_the_committed_table_is_what_the_program_finds_today(
    tmp_path: Path, run_python: Any
) -> None:
    run_python("benchmarks/masks.py", str(tmp_path / "masks.json"))
    today = json.loads((tmp_path / "masks.json").read_text(encoding="utf-8"))
    assert today["templates"] == COMMITTED["templates"]


@pytest.mark.parametrize("name", WITHOUT_UNSLOTH)
def test_the_same_is_found_where_unsloth_has_patched_nothing(
    base: Any, name: str
) -> None:
    template = next(t for t in chats.trl_templates() if t.names[0] == f"trl/{name}")
    row = masks.compare(base, template, {"trl"})
    assert row == {column: ROWS[row["name"]][column] for column in row}
