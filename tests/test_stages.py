"""What a stage depends on, and what leaves a finished one alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import stages
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.runs import Run, content_hash, write_json
from helpers.training import trainer as train


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "model"},
        {"recipe": "mine"},
        {"grpo__learning_rate": 1e-3},
        {"rewards": {"correctness": 2.0}},
        {"grpo_minutes": 7},
        {"grpo_held_out": 2},
        {"evaluation__max_new_tokens": 9},
        {"inference": {"temperature": 0.5}},
        {"save_minutes": 1},
        {"stages": ["sft"]},
        {"sft__report_to": "tensorboard"},
        {"sft__logging_steps": 3},
        {"sft__save_steps": 7},
        {"data__test_rows": 5},
    ],
)
def test_what_sft_does_not_depend_on_leaves_it_alone(
    run_factory: Callable[..., Run], change: dict[str, Any]
) -> None:
    run = run_factory()
    data.prepare(run)
    before = stages.made_from(run, "sft")
    assert stages.made_from(run_factory(**change), "sft") == before


def test_what_is_logged_counts_where_it_chooses_the_adapter(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(best_by="loss")
    data.prepare(run)
    before = stages.made_from(run, "sft")
    edited = run_factory(best_by="loss", sft__logging_steps=3)
    assert stages.made_from(edited, "sft") != before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sft__learning_rate": 3e-3}, "sft.learning_rate"),
        ({"lora__r": 2}, "lora.r"),
        ({"weights": "4bit"}, "weights"),
        ({"loss_on": "last"}, "loss_on"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_changed_input_is_named_and_the_former_result_set_aside(
    run_factory: Callable[..., Run],
    change: dict[str, Any],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_factory()
    data.prepare(run)
    stages.open_stage(run, "sft")
    stages.finish(run, "sft")
    edited = run_factory(**change)
    assert not stages.is_finished(edited, "sft")
    stages.open_stage(edited, "sft")
    assert f"sft: {name} changed since" in capsys.readouterr().out
    assert (run.path / "sft.before-1").is_dir()


def test_rows_of_other_content_are_another_input(
    run_factory: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_factory()
    data.prepare(run)
    stages.open_stage(run, "sft")
    stages.finish(run, "sft")
    report = run.report()
    report["data"]["fingerprints"]["train"] = "others"
    write_json(run.path / "report.json", report)
    assert not stages.is_finished(run, "sft")
    stages.open_stage(run, "sft")
    assert "data.train changed since it was trained" in capsys.readouterr().out


def test_grpo_depends_on_the_sft_that_it_starts_from(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory()
    data.prepare(run)
    before = stages.made_from(run, "grpo")
    assert stages.made_from(run_factory(sft__learning_rate=1e-5), "grpo") != before
    assert stages.made_from(run_factory(sampler="model"), "grpo") != before
    assert stages.made_from(run_factory(best_by="loss"), "grpo") != before


def test_an_adapter_or_a_model_is_known_by_its_content(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    assert content_hash(copy) == content_hash(tiny_model_folder)
    config = copy / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert content_hash(copy) != content_hash(tiny_model_folder)
    assert content_hash("owner/name") == "owner/name"


def test_a_run_with_fewer_problems_than_a_step_takes_is_refused_before_training(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(
        data__eval=None,
        data__eval_share=0.2,
        grpo_held_out=32,
        grpo__per_device_train_batch_size=64,
        grpo__gradient_accumulation_steps=512,
        grpo__num_generations=8,
    )
    data.prepare(run)
    with pytest.raises(ConfigError, match="would take no step: .* a step takes 4096"):
        train.train_stage(run, "sft")
    assert not stages.is_finished(run, "sft")


def test_a_stage_without_a_step_is_not_finished(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_factory(stages=["sft"])
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    trainer = train.build_sft(run, model, tokenizer)
    monkeypatch.setattr(trainer, "train", lambda **_: None)
    with pytest.raises(ConfigError, match="sft took no optimiser step, .* 4?.*rows"):
        train.fit(run, "sft", trainer)
    assert "sft" not in run.report() and not stages.is_finished(run, "sft")


def test_a_template_file_is_known_by_its_content(
    run_factory: Callable[..., Run], tmp_path: Path, tokenizer: Any
) -> None:
    from helpers.evaluation.evaluator import model_print

    file = tmp_path / "mine.jinja"
    file.write_text(tokenizer.chat_template)
    run = run_factory(template=str(file))
    data.prepare(run)
    before = stages.made_from(run, "sft"), model_print(run.config, None)
    file.write_text(tokenizer.chat_template + "{# another #}")
    after = stages.made_from(run, "sft"), model_print(run.config, None)
    assert before[0] != after[0] and before[1] != after[1]
