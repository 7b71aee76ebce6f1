"""Our Unsloth calls, run for real under its CPU backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.data import preparation as data
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
    run_factory: Callable[..., Run], run_python: Any
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
    done = run_python("-c", SERIES)
    assert "Unsloth" in done.stdout + done.stderr
    assert "should be imported before" not in done.stderr
    assert "we will set it" not in done.stdout  # but what the config says
    report = run.report()
    assert report["environment"]["engine"] == "unsloth"
    assert report["sft"]["steps"] == 2 and report["sft"]["loss_last"] > 0
    assert report["export"]["adapter"]["greedy_agreement"] == 1.0


WEIGHTS = """
import json, sys, warnings
from helpers import models

found = {}
for bits in ("4bit", "16bit"):
    model, _ = models.load_model(
        "smollm2-135m-offline", engine="unsloth", weights=bits, dtype="bfloat16"
    )
    found[bits] = str(model.model.layers[0].mlp.up_proj.weight.dtype)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    models.load_model(
        "smollm2-135m-offline", engine="unsloth", weights="4bit", double_quant=False
    )
found["single scales"] = [str(w.message) for w in caught]
try:
    models.load_model("smollm2-135m-offline", engine="unsloth", weights="8bit")
except models.ModelError as error:
    found["8bit"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def weights(run_python: Any) -> tuple[dict[str, Any], str]:
    """What Unsloth's CPU backend loads when asked for each kind of weights."""
    done = run_python("-c", WEIGHTS)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_unsloth_loads_four_and_sixteen_bit_weights(weights: Any) -> None:
    found, _ = weights
    assert (found["4bit"], found["16bit"]) == ("torch.uint8", "torch.float32")


def test_unsloth_without_a_gpu_says_that_it_loads_no_eight_bit_weights(
    weights: Any,
) -> None:
    found, _ = weights
    assert "weights='8bit' cannot be loaded here" in found["8bit"]


def test_unsloth_without_a_gpu_says_that_it_quantises_the_scales(weights: Any) -> None:
    found, _ = weights
    said = [text for text in found["single scales"] if "double_quant" in text]
    assert said and "double_quant=False is not followed" in said[0]


def test_unsloth_is_imported_before_transformers(weights: Any) -> None:
    _, stderr = weights
    assert "should be imported before" not in stderr
