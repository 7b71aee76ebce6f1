"""The benchmark of evaluation's speed, with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def test_the_loop_and_our_batches_give_the_same_answers_and_verdicts(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import eval_speed

    out = tmp_path / "speed.json"
    size = ["--items", "6", "--tokens", "5", "--loop-items", "4", "--out", str(out)]
    found = eval_speed.main(["--model", str(tiny_model_folder), *size])
    assert json.loads(out.read_text()) == found
    assert found["compared"] == found["same_outputs"] == 4
    assert set(found["same_verdicts"].values()) == {4}
    assert found["runs"]["ours"]["items"] == 6
    assert min(found["ours"], found["loop"]) > 0
    assert found["conditions"]["max_new_tokens"] == 5
