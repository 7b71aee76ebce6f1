"""Tests of helpers.panel: the form's real widgets, without a browser."""

from __future__ import annotations

import json

import pytest

from helpers import panel, recipes, runs
from helpers.config import ConfigError


@pytest.fixture
def form(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path))
    monkeypatch.delenv("TUNEBOOK_RUN", raising=False)
    return panel.form(runs.save_run(recipes.load("smoke")))


def fill(form, path, text):
    """Type into a field, as the browser does."""
    form.fields[path].value = text


def stored(form):
    return (form.run.path / "config.json").read_text(encoding="utf-8")


def test_every_knob_of_the_list_has_a_field(form):
    assert list(form.fields) == [p for knobs in panel.KNOBS.values() for p in knobs]


def test_the_fields_start_with_the_values_of_the_run(form):
    values = form.run.config.model_dump()
    for path, field in form.fields.items():
        assert field.value == panel.show(panel.read(values, path))
    assert form.fields["sft__max_steps"].value == "4"


def test_a_changed_value_changes_the_config(form):
    fill(form, "sft__max_steps", "7")
    assert form.config.sft["max_steps"] == 7


def test_a_change_leaves_every_other_value_alone(form):
    fill(form, "seed", "11")
    before, after = form.run.config.model_dump(), form.config.model_dump()
    assert after.pop("seed") == 11
    del before["seed"]
    assert after == before


def test_a_rate_may_be_written_with_an_exponent(form):
    fill(form, "sft__learning_rate", "5e-4")
    assert form.config.sft["learning_rate"] == 0.0005


def test_white_space_around_a_value_does_not_count(form):
    fill(form, "seed", " 12 ")
    fill(form, "model", " org/name ")
    assert (form.config.seed, form.config.model) == (12, "org/name")


def test_an_empty_field_means_none(form):
    fill(form, "data__train_rows", "")
    assert form.config.data.train_rows is None


def test_a_field_that_was_empty_takes_a_whole_number(form):
    fill(form, "data__train_rows", "")
    form.save()
    fill(form, "data__train_rows", "32")
    assert form.config.data.train_rows == 32


def test_changing_a_value_saves_nothing_by_itself(form):
    before = stored(form)
    fill(form, "seed", "11")
    assert stored(form) == before


def test_save_writes_a_config_that_open_run_reads_back(form):
    fill(form, "sft__max_steps", "7")
    form.button.click()
    assert runs.open_run().config == form.config
    assert json.loads(stored(form))["sft"]["max_steps"] == 7


def test_save_says_where_the_config_is(form):
    form.button.click()
    assert str(form.run.path / "config.json") in form.message.value


def test_after_save_the_run_of_the_form_has_the_new_config(form):
    fill(form, "lora__r", "8")
    form.button.click()
    assert form.run.config.lora["r"] == 8


def test_save_keeps_the_values_that_have_no_field(form):
    before = form.run.config.model_dump()
    fill(form, "seed", "11")
    form.button.click()
    after = runs.open_run().config.model_dump()
    assert after == before | {"seed": 11}


def test_an_unchanged_form_saves_an_equal_config(form):
    before = form.run.config
    form.button.click()
    assert runs.open_run().config == before


def test_a_value_can_be_changed_back_after_saving(form):
    before = form.run.config
    for text in ("9", "4"):
        fill(form, "sft__max_steps", text)
        form.button.click()
    assert runs.open_run().config == before


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("seed", "eleven", "seed: &#x27;eleven&#x27; is not a whole number"),
        ("seed", "-1", "seed: "),
        ("seed", "", "seed: "),
        ("max_length", "8", "max_length: "),
        ("model", "", "model: "),
        ("data__test_rows", "0", "data.test_rows: "),
        ("sft__max_steps", "4.5", "sft.max_steps: "),
        ("sft__learning_rate", "fast", "sft.learning_rate: "),
    ],
)
def test_an_invalid_value_is_named_beside_the_button(form, path, text, message):
    fill(form, path, text)
    assert "Not saved" in form.message.value
    assert message in form.message.value


def test_an_invalid_value_disables_the_button(form):
    fill(form, "seed", "eleven")
    assert form.button.disabled


def test_an_invalid_value_is_never_saved(form):
    before = stored(form)
    fill(form, "seed", "eleven")
    with pytest.raises(ConfigError, match="seed: 'eleven' is not a whole number"):
        form.save()
    assert stored(form) == before


def test_the_form_raises_for_an_invalid_value_when_asked_for_its_config(form):
    fill(form, "sft__learning_rate", "fast")
    with pytest.raises(ConfigError, match="sft.learning_rate: 'fast' is not a number"):
        _ = form.config


def test_a_corrected_value_can_be_saved_again(form):
    fill(form, "seed", "eleven")
    fill(form, "seed", "11")
    assert not form.button.disabled
    form.button.click()
    assert runs.open_run().config.seed == 11


def test_the_message_escapes_what_was_typed(form):
    fill(form, "seed", "<b>1</b>")
    assert "<b>1" not in form.message.value


def test_the_rows_of_a_step_are_the_product_of_both_batch_fields(form):
    fill(form, "sft__per_device_train_batch_size", "4")
    fill(form, "sft__gradient_accumulation_steps", "8")
    assert form.message.value.startswith("32 rows")


def test_the_button_and_its_message_stand_in_the_displayed_widget(form):
    last = form.widget.children[-1]
    assert last.children == (form.button, form.message)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_recipe_is_shown_and_saved_unchanged(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path))
    config = recipes.load(name)
    form = panel.form(runs.save_run(config))
    form.button.click()
    assert runs.open_run(name).config == config
