"""Tests of helpers.widgets.panel: the form's real widgets, without a browser."""

from __future__ import annotations

import html
import json
import time

import pytest

from helpers import fields, gpus, memory, recipes, runs, timing
from helpers.config import Source, changed, read_config
from helpers.errors import ConfigError
from helpers.widgets import knobs, panel, summary


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


def note(form, path):
    """What is said beside a field."""
    return form.notes[path].value


def tab(form, group):
    """The title of a group's page."""
    return form.tabs.get_title(list(knobs.KNOBS).index(group))


def bar(config):
    """The bar of a config's SFT on a T4."""
    return summary.predict(config, "sft", gpus.T4, None)[1]


def test_every_knob_of_the_list_has_a_field(form):
    assert list(form.fields) == [p for group in knobs.KNOBS.values() for p in group]


def test_the_groups_are_those_of_a_config(form):
    groups = ["Model", "Data", "LoRA", "Optimisation", "Generation", "Run"]
    assert [tab(form, group).split()[0] for group in knobs.KNOBS] == groups
    pages = [len(page.children) for page in form.tabs.children]
    assert pages == [len(group) for group in knobs.KNOBS.values()]


def test_the_fields_start_with_the_values_of_the_run(form):
    values = form.run.config.model_dump()
    for path, field in form.fields.items():
        assert field.value == panel.as_shown(knobs.read(values, path), path)
    assert form.fields["sft__max_steps"].value == "4"
    assert form.fields["sft__packing"].value is True


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
    ("path", "value", "expected"),
    [
        ("weights", "8bit", "8bit"),
        ("double_quant", False, False),
        ("data__train", "a, [1].jsonl\n\n b.jsonl ", ["a, [1].jsonl", "b.jsonl"]),
        ("data__eval_rows", "", None),
        ("lora__target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora__target_modules", "all-linear", "all-linear"),
        ("lora__target_modules", r".*\.(q|v)_proj{1,1}", r".*\.(q|v)_proj{1,1}"),
        ("sft__gradient_checkpointing", False, False),
        ("sft__lr_scheduler_type", "cosine", "cosine"),
        ("sft__warmup_steps", "0.5", 0.5),
        ("sft__warmup_steps", "3", 3),
        ("grpo__temperature", "1", 1.0),
        ("inference__max_new_tokens", "64", 64),
        ("evaluation__max_new_tokens", "32", 32),
        ("name", "other", "other"),
        ("stages", "sft", ["sft"]),
        ("save_minutes", "2.5", 2.5),
    ],
)
def test_a_field_of_each_group_and_kind_is_saved(form, path, value, expected):
    fill(form, path, value)
    form.button.click()
    found = knobs.read(runs.open_run().config.model_dump(), path)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("path", ["data__train", "data__test"])
def test_a_source_with_options_is_typed_and_shown_as_json(form, path):
    text = '{"path": "a.jsonl", "rows": 5, "format": "dolly"}'
    fill(form, path, text)
    form.button.click()
    source = Source(path="a.jsonl", rows=5, format="dolly")
    config = runs.open_run().config
    value = getattr(config.data, path.removeprefix("data__"))
    assert value == ([source] if path == "data__train" else source)
    assert form.fields[path].value == text
    assert form.config == config


def test_a_source_that_is_no_json_is_refused_beside_its_field(form):
    fill(form, "data__train", "a.jsonl\n{b.jsonl")
    assert "is no JSON object" in html.unescape(note(form, "data__train"))
    fill(form, "data__train", '{"path": "a.jsonl", "rows": "many"}')
    assert "should be a valid integer" in html.unescape(note(form, "data__train"))


def test_an_emptied_field_of_a_trainer_leaves_it_to_the_trainer(form):
    fill(form, "sft__learning_rate", "")
    assert "learning_rate" not in form.config.sft


def test_a_box_that_no_one_touched_is_not_written(form):
    assert form.fields["sft__gradient_checkpointing"].value is True
    form.button.click()
    assert "gradient_checkpointing" not in form.run.config.sft


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("lora__r", "8, by default"),
        ("grpo__max_completion_length", "512, by default"),
        ("sft__learning_rate", "2e-05, by default"),
        ("sft__max_steps", "not set"),
        ("data__train_rows", "not set"),
    ],
)
def test_an_empty_field_shows_the_default_of_the_class_that_takes_it(form, path, text):
    assert form.fields[path].placeholder == text


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_every_knob_of_a_library_is_a_field_of_its_class(stage):
    from trl import GRPOConfig, SFTConfig

    kind = {"sft": SFTConfig, "grpo": GRPOConfig}[stage]
    for path, knob in knobs.BY_PATH.items():
        group, _, name = path.partition("__")
        if group == stage:
            if name != "optim":  # not the fused one, see `fields.defaults`
                assert knobs.default(path) == getattr(kind, name)
            for choice in knob.choices:
                assert kind(use_cpu=True, bf16=False, **{name: choice})


def test_a_template_may_be_the_path_of_a_file(runs_home, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = changed(recipes.load("smoke"), template=str(path))
    form = panel.form(runs.save_run(config))
    assert form.fields["template"].value == str(path)
    form.fields["template"].value = "instruction"
    assert form.config.template == "instruction"
    form.fields["template"].value = str(path)
    assert form.config == config
    form.fields["template"].value = "no/such.jinja"
    assert "give the path of a Jinja file" in form.notes["template"].value


def test_the_optimiser_that_is_shown_as_the_default_is_the_one_that_trains(form):
    form.fields["sft__optim"].value = ""
    label, _ = form.fields["sft__optim"].options[0]
    assert label == f"{fields.defaults('sft')['optim']}, by default"


def test_a_value_that_is_not_in_the_list_of_choices_is_shown_and_kept(runs_home):
    config = changed(recipes.load("smoke"), sft__optim="lion_8bit")
    form = panel.form(runs.save_run(config))
    assert form.fields["sft__optim"].value == "lion_8bit"
    assert form.config == config


def test_choosing_a_recipe_shows_its_values_and_writes_nothing(form):
    before = stored(form)
    form.recipe.value = "guanaco-llama2-7b"
    assert form.fields["model"].value == "NousResearch/Llama-2-7b-chat-hf"
    assert form.fields["double_quant"].value is False
    assert form.config == recipes.load("guanaco-llama2-7b")
    assert stored(form) == before


def test_a_recipe_that_is_saved_gets_a_run_of_its_own(form):
    before = stored(form)
    old = form.run
    form.recipe.value = "guanaco-llama2-7b"
    form.button.click()
    assert form.run.path.name == "guanaco-llama2-7b"
    assert runs.open_run().config == recipes.load("guanaco-llama2-7b")
    assert (old.path / "config.json").read_text(encoding="utf-8") == before


def test_replacing_the_config_of_another_run_is_warned_of(form):
    fill(form, "name", "other")
    assert "Save replaces" not in note(form, "name")
    form.button.click()
    fill(form, "name", "smoke")
    assert (
        f"Save replaces {runs.runs_folder() / 'smoke' / 'config.json'}"
        in html.unescape(note(form, "name"))
    )
    form.button.click()
    assert runs.open_run().config.name == "smoke"
    assert "Save replaces" not in note(form, "name")


def test_the_saved_run_can_be_chosen_again_after_a_recipe(form):
    fill(form, "sft__max_steps", "7")
    form.button.click()
    form.recipe.value = "demo"
    form.recipe.value = ""
    assert form.config == runs.open_run().config
    assert form.config.sft["max_steps"] == 7


def test_the_fields_of_a_stage_that_the_run_lacks_cannot_be_edited(form):
    form.recipe.value = "guanaco-llama2-7b"
    assert form.fields["grpo__max_steps"].disabled
    assert not form.fields["sft__max_steps"].disabled
    form.recipe.value = "demo"
    assert not form.fields["grpo__max_steps"].disabled


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("seed", "eleven", "&#x27;eleven&#x27; is not a whole number"),
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", "", "&#x27;&#x27; is not a whole number"),
        ("max_length", "8", "greater than or equal to 16"),
        ("model", "", "at least 1 character"),
        ("name", "a/b", "should match pattern"),
        ("data__test_rows", "0", "greater than or equal to 1"),
        ("data__eval_share", "2", "less than 1"),
        ("sft__max_steps", "4.5", "&#x27;4.5&#x27; is not a whole number"),
        ("sft__max_steps", "0", "0 found, a whole number from 1 expected"),
        ("sft__learning_rate", "fast", "&#x27;fast&#x27; is not a number"),
        ("sft__learning_rate", "nan", "nan found, a number from 0 expected"),
        ("lora__target_modules", "q_prj", "did you mean &#x27;q_proj&#x27;?"),
        ("grpo__num_generations", "3", "must be divisible by num_generations"),
    ],
)
def test_an_invalid_value_is_explained_in_red_beside_its_field(
    form, path, text, message
):
    fill(form, path, text)
    assert message in note(form, path)
    assert summary.COLORS["error"] in note(form, path)
    where = path.replace("__", ".")
    assert f"cannot be saved; to correct: {where}" in form.message.value
    group = next(g for g, paths in knobs.KNOBS.items() if path in paths)
    assert tab(form, group) == f"{group} ✗"


def test_two_invalid_values_are_explained_at_once(form):
    fill(form, "seed", "eleven")
    fill(form, "sft__max_steps", "many")
    assert "not a whole number" in note(form, "seed")
    assert "not a whole number" in note(form, "sft__max_steps")


def test_a_corrected_value_is_no_longer_marked(form):
    fill(form, "seed", "eleven")
    fill(form, "seed", "11")
    assert summary.COLORS["error"] not in note(form, "seed")
    assert tab(form, "Run") == "Run"


def test_an_error_that_belongs_to_no_field_stands_in_the_list(form):
    form.recipe.value = "guanaco-llama2-7b"
    fill(form, "stages", "sft, grpo")
    assert "the grpo stage needs data.problems" in form.advice.value
    assert form.button.disabled


def test_an_error_in_a_value_without_a_field_stands_in_the_list(runs_home):
    config = changed(recipes.load("smoke"), sft__learning_rat=0.1)
    form = panel.form(runs.save_run(config))
    assert "sft.learning_rat: " in form.advice.value
    assert "did you mean &#x27;learning_rate&#x27;?" in form.advice.value
    assert form.button.disabled
    with pytest.raises(ConfigError, match="sft.learning_rat: .*'learning_rate'"):
        form.save()


def test_advice_stands_in_amber_beside_its_field_and_does_not_forbid_saving(form):
    form.recipe.value = "finetome-llama32-3b-b"
    assert "the rate never reaches its peak" in note(form, "sft__warmup_steps")
    assert summary.COLORS["warning"] in note(form, "sft__warmup_steps")
    assert tab(form, "Optimisation") == "Optimisation ⚠"
    assert not form.button.disabled


def test_advice_goes_when_the_value_is_mended(form):
    form.recipe.value = "finetome-llama32-3b-b"
    fill(form, "sft__warmup_steps", "4")
    assert note(form, "sft__warmup_steps") == ""


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
    assert "<b>1" not in note(form, "seed")
    assert "&lt;b&gt;1" in note(form, "seed")


def test_the_rows_of_a_step_are_the_product_of_both_batch_fields(form):
    fill(form, "sft__per_device_train_batch_size", "4")
    fill(form, "sft__gradient_accumulation_steps", "8")
    assert "32 rows (4 x 8)" in form.summary.value


def test_the_trainable_parameters_follow_the_rank_and_the_targets(form):
    form.recipe.value = "finetome-llama32-1b"
    assert "11,272,192 of 1,247,086,592" in form.summary.value
    fill(form, "lora__r", "32")
    assert "22,544,384 of" in form.summary.value
    fill(form, "lora__target_modules", "q_proj")
    assert "2,097,152 of" in form.summary.value
    fill(form, "lora__target_modules", r".*\.q_proj")
    assert "2,097,152 of" in form.summary.value
    fill(form, "lora__target_modules", "all-linear")
    assert "22,544,384 of" in form.summary.value


def test_the_steps_are_at_most_what_the_caps_let_through(form):
    form.recipe.value = "finetome-llama32-3b-c"
    # twice 15,000 rows less a twentieth, 16 a step
    assert ">at most 1,782<" in form.summary.value
    assert ">40<" in form.summary.value
    fill(form, "sft__max_steps", "")
    fill(form, "sft__num_train_epochs", "2")
    assert ">at most 3,564<" in form.summary.value


def test_the_steps_are_unknown_without_data_or_caps(form):
    form.recipe.value = "guanaco-llama2-7b"
    assert form.summary.value.count("unknown until the data are prepared") == 3


def test_the_steps_are_counted_from_the_rows_of_prepared_data(runs_home):
    run = runs.save_run(recipes.load("guanaco-llama2-7b"))
    run.write_part("data", {"train": 1000})
    form = panel.form(run)
    assert ">125<" in form.summary.value
    assert ">1,250<" in form.summary.value
    fill(form, "data__train_rows", "800")
    assert ">at most 100<" in form.summary.value


def test_the_problems_of_a_grpo_step_share_its_answers(runs_home):
    run = runs.save_run(recipes.load("gsm8k-grpo-llama32-1b"))
    run.write_part("data", {"train": 0, "problems": 7473})
    form = panel.form(run)
    assert "4 answers, 4 to a problem (1 x 4)" in form.summary.value
    assert ">7,473<" in form.summary.value


def test_minutes_are_predicted_when_the_steps_are_known(runs_home):
    run = runs.save_run(recipes.load("guanaco-llama2-7b"))
    assert " on Tesla T4<" not in summary.summarize(run.config, run, gpus.T4)
    run.write_part("data", {"train": 1000})
    minutes = timing.training_minutes(run.config, gpus.T4, "sft", 1250)
    shown = summary.summarize(run.config, run, gpus.T4)
    assert f">{minutes:,.0f} on Tesla T4<" in shown


def test_minutes_of_steps_that_are_only_known_at_most_say_so(form):
    form.gpu = gpus.T4
    form.recipe.value = "guanaco-llama2-7b"
    fill(form, "data__train_rows", "1000")
    minutes = timing.training_minutes(form.config, gpus.T4, "sft", 1250)
    assert f">at most {minutes:,.0f} on Tesla T4<" in form.summary.value


def test_without_a_gpu_the_minutes_are_those_of_a_t4_and_of_the_cpu():
    config = recipes.load("demo")
    there, here = (
        timing.training_minutes(config, place, "sft") for place in (gpus.T4, None)
    )
    assert there < 1 < here
    minutes, _ = summary.predict(config, "sft", None, 120)
    assert minutes == f"under 1 on Tesla T4, {here:.0f} on this CPU"


def test_the_bar_shows_the_predicted_peak_in_green_where_it_fits():
    config = recipes.load("finetome-llama32-1b")
    found = memory.predict(config, gpus.T4, "sft")
    assert f"{found.peak_gb:.1f} of 14.0 GiB of Tesla T4" in bar(config)
    share = 100 * found.peak_gb / 14
    assert f"width:{share:.0f}%;height:100%;background:{summary.COLORS['fits']}" in bar(
        config
    )


def test_the_bar_is_full_and_red_past_the_memory_of_the_gpu():
    config = changed(recipes.load("dolly-llama2-7b"), weights="16bit")
    assert f"width:100%;height:100%;background:{summary.COLORS['error']}" in bar(config)
    assert "does not fit" in bar(config)


def test_an_edit_turns_the_bar_red_and_back(form, monkeypatch):
    form.gpu = gpus.T4
    form.recipe.value = "dolly-llama2-7b"
    fill(form, "weights", "16bit")
    assert "does not fit" in form.summary.value
    fill(form, "weights", "4bit")
    assert "does not fit" not in form.summary.value


def test_a_model_of_unknown_architecture_can_be_saved(form):
    fill(form, "model", "org/never-heard-of")
    assert (
        "unknown: the numbers of &#x27;org/never-heard-of&#x27;" in form.summary.value
    )
    form.button.click()
    assert runs.open_run().config.model == "org/never-heard-of"


def test_an_edit_is_answered_at_once(form):
    form.recipe.value = "finetome-llama32-1b"
    started = time.perf_counter()
    for steps in range(10, 20):
        fill(form, "sft__max_steps", str(steps))
    # a twentieth of a second each on a machine at rest
    assert (time.perf_counter() - started) / 10 < 0.3


def test_the_file_that_save_writes_is_what_the_command_line_reads(form):
    fill(form, "sft__max_steps", "7")
    form.button.click()
    assert read_config(form.run.path / "config.json") == form.config


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


def test_where_a_copy_does_not_fit_the_minutes_are_those_of_the_model_itself():
    config = changed(recipes.load("gsm8k-grpo-llama32-1b"), engine="transformers")
    small = gpus.T4._replace(memory_gb=4.0)
    assert memory.settle_sampler(config, small).sampler == "model"
    itself = changed(config, sampler="model")
    minutes, copied = (
        summary.predict(config, "grpo", gpu, 1000)[0] for gpu in (small, gpus.T4)
    )
    assert minutes == summary.predict(itself, "grpo", small, 1000)[0] != copied
