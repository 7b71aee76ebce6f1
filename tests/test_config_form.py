"""Tests of helpers.widgets.ConfigForm: its real widgets, without a browser."""

import html
import io
import re

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from nbformat.v4 import new_output

from benchmarks import outputs
from helpers import estimate, recipes, runs
from helpers.config import Source, changed
from helpers.errors import ConfigError
from helpers.widgets import ConfigForm
from helpers.widgets.config_form import COLORS, COSTS, MORE, PAGES, describe


@pytest.fixture
def form(runs_home):
    return ConfigForm(runs.save_run(recipes.load("smoke")), "sft")


def note(form, name):
    """What is said beside a field."""
    return html.unescape(form.notes[name].value)


def stored(form):
    return (form.saved.path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("recipe", recipes.NAMES)
def test_every_recipe_is_shown_and_saved_unchanged(page, recipe, runs_home):
    form = ConfigForm(recipe, page)
    assert 12 <= len(form.fields) - 1 <= 23
    assert form.config == recipes.load(recipe)
    form.button.click()
    assert runs.open_run(recipe).config == recipes.load(recipe)


def test_a_change_leaves_other_values_alone_and_saving_says_what_it_is(form):
    before, file = form.config, stored(form)
    form.fields["sft.max_steps"].value = "7"
    assert form.config == changed(before, sft__max_steps=7)
    assert stored(form) == file
    form.button.click()
    assert "smoke, changes to the recipe smoke: 1" in form.message.value
    assert "sft.max_steps = 7, not 4" in html.unescape(form.message.value)


SOURCE = '{"path": "a.jsonl", "rows": 5, "format": "dolly"}'
LINES = ["a, [1].jsonl", Source(path="a.jsonl", rows=5, format="dolly")]


@pytest.mark.parametrize(
    ("page", "name", "text", "expected"),
    [
        ("setup", "weights", "8bit", "8bit"),
        ("setup", "model", " org/name ", "org/name"),
        ("setup", "stages", "sft\n", ["sft"]),
        ("setup", "system_prompt", "", ""),
        ("setup", "data.train_rows", "", None),
        ("setup", "data.train", f"a, [1].jsonl\n\n {SOURCE}", LINES),
        ("sft", "data.eval", SOURCE, LINES[1]),
        ("sft", "lora.target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("sft", "lora.target_modules", "all-linear", "all-linear"),
        ("sft", "lora.target_modules", r".*\.(q|v)_proj{1,1}", r".*\.(q|v)_proj{1,1}"),
        ("sft", "sft.learning_rate", "5e-4", 0.0005),
        ("sft", "sft.warmup_steps", "0.5", 0.5),
        ("sft", "sft.gradient_checkpointing", False, False),
        ("sft", "lora.lora_dropout", "", None),
        ("grpo", "rewards.correctness", "2", 2.0),
        ("grpo", "rewards.strict_format", "0.5", 0.5),
        ("sft", "layout", "pinned", "pinned"),
        ("grpo", "grpo.temperature", "1", 1),
    ],
)
def test_a_field_of_each_kind_is_saved(
    page, name, text, expected, runs_home, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for file in map(str, LINES):
        (tmp_path / file).touch()
    form = ConfigForm("smoke", page)
    form.fields[name].value = text
    form.button.click()
    assert "saved to" in form.message.value
    value = form.run.config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    assert (value, type(value)) == (expected, type(expected))
    assert form.config == runs.open_run().config


def test_other_settings_are_added_changed_and_removed_as_toml(runs_home):
    null = changed(recipes.load("smoke"), grpo__steps_per_generation=None)
    form = ConfigForm(runs.save_run(null), "sft")
    more = form.fields[MORE]
    more.value = more.value.replace("sft.eval_steps = 2", "sft.eval_steps = 3")
    more.value = more.value.replace("sft.save_steps = 2\n", "")
    more.value += "\nsft.weight_decay = 0.01\nevaluation.batch_size = 4"
    form.button.click()
    config = runs.open_run().config
    assert (config.sft["eval_steps"], config.sft["weight_decay"]) == (3, 0.01)
    assert "save_steps" not in config.sft
    assert config.evaluation.batch_size == 4
    assert config.grpo == null.grpo  # with the null that TOML cannot hold
    assert "sft.weight_decay = 0.01" in more.value


@pytest.mark.parametrize(
    ("page", "name", "text", "words"),
    [
        ("grpo", "rewards.overlong", "much", "valid number.*found 'much'"),
        ("setup", "seed", "eleven", "valid integer.*found 'eleven'"),
        ("setup", "name", "a/b", "should match pattern"),
        ("sft", "sft.max_steps", "4.5", "found 4.5; expected"),
        ("sft", "sft.learning_rate", "<b>1</b>", "found '<b>1</b>'"),
        ("sft", "lora.target_modules", '["q_prj"]', "did you mean 'q_proj'"),
        ("sft", "template", "no/such.jinja", "or a file"),
        ("sft", MORE, "sft.eval_steps", "cannot be read: Expected '='"),
        ("sft", MORE, "sft = 3", "cannot be read"),
        ("sft", MORE, "sft.learning_rat = 1", "sft.learning_rat.*did you mean"),
        ("sft", MORE, "sfft.x = 1", "sfft.*did you mean"),
        ("grpo", "grpo.num_generations", "3", "divisible by num_generations"),
    ],
)
def test_a_wrong_value_is_explained_in_red_beside_its_field_and_never_saved(
    page, name, text, words, runs_home
):
    form = ConfigForm("smoke", page)
    before, former = stored(form), form.fields[name].value
    text = f"{former}\n{text}" if name == MORE else text
    form.fields[name].value = text

    assert re.search(words, note(form, name))
    assert COLORS["error"] in form.notes[name].value
    assert "<b>" not in form.notes[name].value
    assert "to correct: " in form.message.value and form.button.disabled
    with pytest.raises(ConfigError):
        form.save()
    assert stored(form) == before
    assert form.fields[name].value == text

    form.fields[name].value = former
    assert COLORS["error"] not in form.notes[name].value
    assert not form.button.disabled


def test_advice_stands_in_amber_beside_its_field_and_does_not_forbid_saving(form):
    form.recipe.value = "finetome-llama32-3b-b"
    assert "the rate never reaches its peak" in note(form, "sft.warmup_steps")
    assert COLORS["warning"] in form.notes["sft.warmup_steps"].value
    assert not form.button.disabled
    form.fields["sft.warmup_steps"].value = "4"
    assert "linear warmup" in note(form, "sft.warmup_steps")  # TRL's own words
    assert form.fields["lora.r"].placeholder == "8, by default"


def test_choosing_a_recipe_shows_its_values_and_writes_nothing(form):
    before, path = stored(form), form.saved.path
    form.recipe.value = "guanaco-llama2-7b"
    assert form.config == recipes.load("guanaco-llama2-7b")
    assert stored(form) == before
    form.button.click()
    assert (form.run.path.name, path.name) == ("guanaco-llama2-7b", "smoke")
    assert (path / "config.json").read_text(encoding="utf-8") == before
    form.recipe.value = "demo"
    form.recipe.value = ""
    assert form.config == runs.open_run().config == recipes.load("guanaco-llama2-7b")
    form.recipe.value = "smoke"
    assert f"Save replaces {path / 'config.json'}" in form.notes[MORE].value


def test_the_summary_follows_batch_rank_and_targets(form):
    form.recipe.value = "finetome-llama32-1b"
    form.fields["sft.per_device_train_batch_size"].value = "4"
    form.fields["sft.gradient_accumulation_steps"].value = "8"
    assert "SFT: 32 rows a step" in form.message.value
    assert "11,272,192 of 1,247,086,592" in form.message.value
    form.fields["lora.r"].value = "32"
    assert "22,544,384 of" in form.message.value


def test_the_steps_are_counted_from_the_rows_of_prepared_data(runs_home):
    run = runs.save_run(recipes.load("guanaco-llama2-7b"))
    assert "steps unknown until data are prepared" in ConfigForm(run).message.value
    run.write_part("data", {"train": 1000})
    form = ConfigForm(run)
    assert "1,250 steps, roughly" in form.message.value
    form.fields["data.train_rows"].value = "800"  # no longer the prepared data
    assert "steps unknown" in form.message.value


def test_a_machine_without_a_gpu_is_measured_by_its_ram(form, monkeypatch):
    monkeypatch.setattr(estimate, "this_gpu", lambda: None)
    peak_gb = estimate.estimate_memory(form.config, estimate.CPU, "sft").sum()
    form.check()
    text = f"{peak_gb:.1f} of {estimate.CPU.memory_gb:.1f} GiB of RAM"
    assert text in form.message.value and "T4" not in form.message.value


EDITS = {"typed": "sft.max_steps", "mistyped": "sft.optim", "chosen": None}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("end", ["Save", "Discard"])
def test_the_next_cell_and_another_recipe_wait_for_save_or_discard(kind, end, form):
    assert form.run.config == form.config and form.undo.disabled
    if field := EDITS[kind]:
        form.fields[field].value = "7"
        edited = form.fields[MORE].value, form.fields[field].value
        assert form.recipe.disabled and form.data.disabled
        form.recipe.value = "demo"
        form.data.value = "gone.jsonl"
        assert (form.fields[MORE].value, form.fields[field].value) == edited
    else:
        form.recipe.value = "demo"
        assert form.config == recipes.load("demo") and not form.recipe.disabled
    with pytest.raises(ConfigError, match="Save or Discard"):
        assert form.run
    before = stored(form)
    if end == "Save" and kind != "mistyped":
        shown = form.config
        form.button.click()
        assert form.run.config == shown == runs.open_run().config
    else:
        form.undo.click()
        assert stored(form) == before
        assert form.run.config == form.config == recipes.load("smoke")
    assert (form.recipe.value, form.data.value) == ("", "")
    assert form.undo.disabled and not form.recipe.disabled


@pytest.mark.parametrize("page", PAGES)
def test_every_field_has_a_hint_and_its_librarys_name_and_belongs_to_a_title(
    page, runs_home
):
    form = ConfigForm("demo", page)
    texts = [getattr(row, "value", "") for row in form.children]
    titles = {re.sub("(?s)<style.*/style>|<.*?>", "", text) for text in texts}
    split = {"GRPO", "Chat", "Evaluation"}
    assert titles >= {"setup": split, "sft": {"SFT"}, "grpo": {"Rewards"}}[page]
    for name, field in form.fields.items():
        assert field.description == name
        assert len(describe(name)[2].split()) > 2, name
    if page != "setup":
        batch = describe(f"{page}.per_device_train_batch_size")[2]
        assert batch == "The batch size per device for training; memory grows with it"


def test_own_words_are_of_fields_that_the_form_shows():
    names = " ".join(PAGES.values()).split()
    assert set(COSTS) <= {name.rpartition(".")[2] for name in names}


def test_the_estimated_peak_is_red_where_it_does_not_fit(runs_home, monkeypatch):
    monkeypatch.setattr(estimate, "this_gpu", lambda: estimate.T4)
    form = ConfigForm("dolly-llama2-7b")
    peak_gb = estimate.estimate_memory(form.config).sum()
    assert f"{peak_gb:.1f} of 14.0 GiB of Tesla T4" in form.message.value
    assert COLORS["error"] not in form.message.value
    form.fields["weights"].value = "16bit"
    assert "too large" in form.message.value and COLORS["error"] in form.message.value


def test_a_model_of_unknown_architecture_can_be_saved(runs_home):
    form = ConfigForm("smoke")
    form.fields["model"].value = "org/never-heard-of"
    assert "cannot be estimated" in form.message.value
    form.button.click()
    assert runs.open_run().config.model == "org/never-heard-of"


def test_a_table_of_its_values_stands_for_the_form_where_no_kernel_answers(form):
    form.fields[MORE].value += '\nsft.run_name = "<7>"'
    shell = InteractiveShell.instance()
    with capture_output() as captured:
        display(form)
        form.fields["sft.max_steps"].value = "7"
        form.button.click()
    shell.clear_instance()
    first, widget, updated = (output.data for output in captured.outputs)
    assert outputs.WIDGET in widget
    stored = [
        outputs.clean_output(new_output("display_data", dict(x)))
        for x in (first, widget)
    ]
    assert [bool(output) for output in stored] == [True, False]
    for bundle, steps in ((first, "4"), (updated, "7")):
        (table,) = pd.read_html(io.StringIO(bundle["text/html"]), index_col=0)
        assert table.loc["sft.max_steps", "value"] == steps
        assert 'sft.run_name = "<7>"' in table.loc[MORE, "value"]
        assert "lora.lora_dropout" not in table.index, "empty fields are left out"
    assert updated["text/plain"] == recipes.differences(form.saved.config)
