"""Our Unsloth calls, run for real under its CPU backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from helpers import data
from helpers.runs import Run

ROOT = Path(__file__).resolve().parent.parent
SERIES = """
from helpers import evaluation, export, runs, train

run = runs.open_run("test")
for stage in ("sft", "grpo"):
    print(train.train_stage(run, stage))
evaluation.evaluate(run, "grpo", run.path / "grpo" / "adapter")
print(export.export(run, "grpo", prompts=2))
"""


def test_the_series_runs_with_unsloth_as_the_engine(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    # the real model: Unsloth's loader wants a real architecture's complete folder
    run = run_factory(
        model="smollm2-135m-offline",
        engine="unsloth",
        max_length=128,
        sft__max_steps=2,
        sft__eval_steps=2,
        grpo__max_steps=1,
        grpo__max_completion_length=8,
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    done = subprocess.run(
        [sys.executable, "-c", SERIES],
        cwd=ROOT,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Unsloth" in done.stdout + done.stderr
    report = run.report()
    assert report["environment"]["engine"] == "unsloth"
    assert report["sft"]["steps"] == 2 and report["sft"]["loss_last"] > 0
    assert report["export"]["adapter"]["greedy_agreement"] == 1.0
