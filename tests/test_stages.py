"""What a stage depends on, what leaves a finished one alone, what is trained first."""

import math
import shutil

import pytest

from helpers import estimate, files, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.training import inputs


@pytest.fixture
def fingerprint(run_factory):
    """Makes the fingerprint of a stage in a run with prepared data and changes."""
    data.prepare(run_factory())
    return lambda stage, **changes: files.fingerprint(
        inputs.inputs_of(run_factory(**changes), stage)
    )


def test_sft_depends_on_nothing_of_grpo_and_grpo_on_the_sft_that_it_starts_from(
    fingerprint,
):
    for change in (
        {"sampler": "model"},
        {"grpo__learning_rate": 1e-3},
        {"evaluation__max_new_tokens": 9},
        {"stages": ["sft"]},
        {"sft__report_to": "tensorboard"},
        {"sft__save_steps": 7, "save_minutes": 1},
        {"data__test_rows": 5},
        {"export": ["w4a16"]},
    ):
        assert fingerprint("sft", **change) == fingerprint("sft"), change
    for change in ({"sampler": "model"}, {"best_by": "loss"}):
        assert fingerprint("grpo", **change) != fingerprint("grpo"), change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sft__learning_rate": 3e-3}, "sft.learning_rate"),
        ({"lora__r": 2}, "lora.r"),
        ({"weights": "4bit", "loss_on": "last", "seed": 1}, "loss_on, seed, weights"),
        ({}, "data.train"),  # rows of other content
    ],
)
def test_a_changed_input_is_named_and_the_former_result_set_aside(
    run_factory, change, name, caplog
):
    run = run_factory()
    data.prepare(run)
    assert inputs.finished_part(run, "sft") is None
    note = run.path / "sft" / inputs.NOTE
    files.write_json(note, files.read_json(note) | {"finished": True})
    run.write_part("sft", {"steps": 3})
    assert inputs.finished_part(run, "sft") is None  # its adapter is gone
    (run.path / "sft" / "adapter").mkdir()
    assert inputs.finished_part(run, "sft") == {"steps": 3}
    edited = run_factory(**change)
    if not change:
        report = run.report()
        report["data"]["fingerprints"]["train"] = "others"
        files.write_json(run.path / "report.json", report)
    assert inputs.finished_part(edited, "sft") is None
    assert f"sft: {name} changed" in caplog.text
    assert (run.path / "sft.before-1").is_dir()


def test_a_model_and_a_template_are_known_by_their_content(
    fingerprint, tiny_model_folder, tmp_path
):
    model = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    values = {"model": str(model), "template": str(template)}
    before = fingerprint("sft", **values)
    assert fingerprint("sft", template=str(template)) == before  # as its copy
    for file, end in ((model / "config.json", " "), (template, "{# another #}")):
        text = file.read_text()
        file.write_text(text + end)
        assert fingerprint("sft", **values) != before
        file.write_text(text)


@pytest.mark.parametrize(
    "call", [stages.ensure_ready, inputs.open_stage, stages.ensure_adapter]
)
def test_a_stage_that_the_run_lacks_is_refused(run_factory, call):
    with pytest.raises(ConfigError, match="run 'test' has no grpo stage"):
        call(run_factory(stages=["sft"]), "grpo")


def test_what_cannot_be_trained_is_refused_and_what_is_questionable_is_logged(
    run_factory, caplog
):
    for change, message in (
        ({"sft": {"learning_rat": 1e-4}}, "did you mean 'learning_rate'"),
        ({"grpo__gradient_accumulation_steps": 9999}, "GRPO would take no step"),
    ):
        run = run_factory(**change)
        with pytest.raises(ConfigError, match=message):
            stages.ensure_ready(run, "sft")
        assert not (run.path / "sft").exists()
    stages.ensure_ready(run_factory(sft__warmup_steps=9, sft__max_steps=4), "sft")
    assert "warning: sft.warmup_steps: 9 in a run of 4 steps" in caplog.text


def test_what_a_notebook_makes_first_comes_with_its_minutes(run_factory):
    places = estimate.CPU, estimate.T4
    run = run_factory(grpo_minutes=3)
    sft, both = (stages.say_minutes(run, stage) for stage in ("sft", "grpo"))
    known = [estimate.sft_minutes(run.config, place) for place in places]
    assert sft.startswith(tuple(f"roughly {math.ceil(m)} min, on" for m in known))
    assert both.startswith(tuple(f"roughly {math.ceil(m + 3)} min, on" for m in known))


def test_a_run_without_sft_trains_grpo_from_fresh_lora(run_factory, caplog):
    grpo = {"max_steps": 1, "max_completion_length": 4}
    run = run_factory(stages=["grpo"], data__train=[], data__eval=None, grpo=grpo)
    assert stages.ensure_adapter(run, "sft") is None
    assert stages.ensure_adapter(run, "grpo") == run.path / "grpo" / "adapter"
    assert "grpo/adapter first: time unknown" in caplog.text
    part = run.report()["grpo"]
    assert (part["steps"], part["prompts_left_out"]) == (1, 0)
    assert not (run.path / "sft").exists()


def test_a_config_is_trained_evaluated_and_exported_in_one_call(run):
    steps = {"sft__max_steps": 2, "sft__eval_steps": 2, "grpo__max_steps": 1}
    lengths = {"grpo__max_completion_length": 4, "evaluation__max_new_tokens": 4}
    config = changed(run.config, **steps, **lengths, export=["adapter"])
    report = stages.train(config).report()
    assert report["export"]["adapter"]["stage"] == "grpo"
    assert (report["sft"]["steps"], report["grpo"]["steps"]) == (2, 1)
    assert set(report["eval"]) >= {"base", "sft", "grpo"}
