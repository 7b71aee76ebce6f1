"""Export: what is reloaded answers as what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import data, evaluation, export, train
from helpers.runs import MissingInput, Run


@pytest.mark.parametrize("weights", ["16bit", "4bit"])
def test_adapter_and_merged_model_answer_as_trained(
    run_factory: Callable[..., Run], weights: str
) -> None:
    run = run_factory(
        weights=weights,
        sft__max_steps=3,
        sft__eval_steps=3,
        sft__learning_rate=5e-3,
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    train.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=6)
    assert part["adapter"]["greedy_agreement"] == 1.0
    assert part["merged"]["greedy_agreement"] == 1.0
    assert (Path(part["merged"]["path"]) / "chat_template.jinja").exists()
    assert run.report()["export"] == part


def test_the_evaluation_writes_every_item_and_its_part_of_the_report(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(evaluation__max_new_tokens=6)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")
    assert part["accuracy"]["n"] == 6 and part["accuracy_new"]["n"] == 4
    items = data.read_rows(run.path / "eval" / "base" / "test.jsonl")
    problems = data.read_rows(run.path / "data" / "test.jsonl")
    assert [i["id"] for i in items] == [p["id"] for p in problems]
    assert set(items[0]) >= {"question", "output", "extracted", "gold", "correct"}
    assert run.report()["eval"]["base"] == part
    assert "base" in repr(evaluation.examples(run))


def test_exporting_what_was_not_trained_names_the_notebook(run: Run) -> None:
    with pytest.raises(MissingInput, match="run notebook 03_grpo_gsm8k"):
        export.export(run)
