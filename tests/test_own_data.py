"""Tests of one's own rows: a config of one line, trained, judged and said."""

import logging
import re

import pytest

from helpers import __main__ as command_line
from helpers import checks, recipes, runs, stages
from helpers.config import SYSTEM_PROMPT, changed
from helpers.errors import DataError, MissingInput
from helpers.widgets import ConfigForm
from tests.rows import pair, write

QUESTIONS = {
    "refund": "money back for {}",
    "parcel": "where is {}?",
    "login": "user {}",
}


@pytest.fixture
def classes(tmp_path):
    """Sixty questions of three classes, in a file `mine.jsonl`."""
    rows = [
        {"instruction": text.format(1000 + number), "response": label}
        for label, text in QUESTIONS.items()
        for number in range(20)
    ]
    return write(tmp_path / "mine.jsonl", rows)


def test_rows_make_a_config_of_sft_alone_without_the_recipes_prompt_and_sets(caplog):
    caplog.set_level(logging.INFO)
    config = recipes.for_data("data_samples/dolly.jsonl")
    assert config.sft["eval_steps"] is None  # of epochs: Unsloth tells of others
    assert (config.name, config.stages, config.system_prompt) == ("dolly", ["sft"], "")
    data = config.data
    assert data.train == ["data_samples/dolly.jsonl"] and data.eval_share
    assert data.test_share and not (data.eval or data.problems or data.test)
    assert config.evaluation.labels is None
    assert "dolly, as the rows have" in caplog.text and "judged as texts" in caplog.text
    assert checks.advise(config) == []


def test_answers_of_a_few_classes_are_judged_by_label(classes):
    config = recipes.for_data(classes, model="my/model")
    assert (config.name, config.model) == ("mine", "my/model")
    assert config.evaluation.labels == sorted(QUESTIONS)


def test_texts_with_labels_are_judged_by_label(tmp_path):
    rows = [
        {"text": f"film {n}", "label": "bad" if n % 2 else "good"} for n in range(20)
    ]
    config = recipes.for_data(write(tmp_path / "labels.jsonl", rows))
    assert config.evaluation.labels == ["bad", "good"]
    rows = [row | {"label": len(row["label"])} for row in rows]
    config = recipes.for_data(write(tmp_path / "numbers.jsonl", rows))
    assert config.evaluation.labels == ["3", "4"]


def test_few_rows_and_rows_that_are_left_out_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"question": f"{n}?", "answer": f"{n}."} for n in range(30)]
    path = write(tmp_path / "mine.jsonl", [*rows, rows[0], {"question": "why?"}])
    recipes.for_data(path)
    assert "30 of 32 rows in 3 epochs of SFT; about 6 held-out" in caplog.text
    assert "so few rows can show a large gain alone" in caplog.text
    assert "left out, duplicate: 1, like row 31" in caplog.text
    assert "left out, no 'answer': 1, like row 32" in caplog.text


def test_answers_that_end_in_a_number_are_judged_by_it_and_asked_for_it():
    config = recipes.for_data("data_samples/word_problems/test.jsonl")
    assert config.system_prompt == SYSTEM_PROMPT
    assert config.evaluation.labels is None


def test_rows_that_are_missing_or_of_no_format_are_refused(tmp_path):
    with pytest.raises(MissingInput, match="no file nothing.jsonl"):
        recipes.for_data("nothing.jsonl")
    with pytest.raises(MissingInput, match="no file ./nothing"):
        recipes.for_data("./nothing")
    path = write(tmp_path / "odd.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="the columns a fit no known format"):
        recipes.for_data(path)


def test_rows_on_the_command_line_train_compare_and_leave_the_notebooks_run(
    classes, tiny_model_folder, runs_home, monkeypatch, capsys
):
    small = {"model": str(tiny_model_folder), "evaluation__max_new_tokens": 4}
    make = recipes.for_data
    monkeypatch.setattr(recipes, "for_data", lambda path: changed(make(path), **small))
    command_line.main(["train", classes])
    report = runs.open_run("mine").report()
    assert report["eval"]["sft"]["test_chat"]["correct"]["n"] >= 6
    assert "p" in report["comparisons"]["base -> sft"]["test_chat"]["correct"]
    output = capsys.readouterr().out
    assert "dolly, as the rows have instruction, response" in output
    assert "about 12 held-out answers are judged by label, of ['login', " in output
    assert "data is prepared now\n" in output
    (tries,) = re.findall("^layout.tries .*", output, re.M)
    assert len(tries) < 90
    assert "after SFT" in output and "only_second" in output
    assert "python -m helpers chat mine" in output
    assert not (runs_home / "current").exists()


def test_held_out_conversations_that_end_in_a_number_are_judged_by_it(
    tiny_model_folder, runs_home
):
    config = recipes.for_data("data_samples/word_problems/test_new.jsonl")
    small = {"model": str(tiny_model_folder), "evaluation__max_new_tokens": 4}
    small |= {"data__train_rows": 40, "sft__max_steps": 1, "evaluation__text_rows": 4}
    part = stages.train(changed(config, **small)).report()["eval"]["base"]["test_chat"]
    assert part["correct"]["n"] == part["strict_match"]["n"] == 4
    assert part["loss"] > 0 and "rouge1" not in part


def test_a_recipe_with_other_rows_is_warned_of_what_it_keeps(classes):
    config = changed(recipes.load("demo"), data__train=[classes])
    (advice,) = checks.advise(config)
    assert (advice.level, advice.field) == ("warning", "data.train")
    assert "eval, problems, test, test_new are kept" in advice.text


def test_what_a_recipe_does_not_have_is_not_said_to_be_kept(classes):
    config = changed(recipes.load("guanaco-llama2-7b"), data__train=[classes])
    assert [a for a in checks.advise(config) if a.field == "data.train"] == []
    small = recipes.small(recipes.load("finetome-llama32-1b"))
    assert [a for a in checks.advise(small) if a.field == "data.train"] == []


def test_a_missing_file_is_an_error_of_its_field():
    config = changed(recipes.load("demo"), data__eval="gone.jsonl")
    (advice,) = checks.advise(config)
    assert (advice.level, advice.field) == ("error", "data.eval")
    assert "no file gone.jsonl" in advice.text


def test_the_form_takes_a_file_and_says_what_it_makes_of_one(
    classes, runs_home, caplog
):
    caplog.set_level("INFO", "helpers")
    form = ConfigForm("smoke")
    form.data.value = "gone.jsonl"
    assert "no file gone.jsonl" in form.message.value
    form.data.value = classes
    assert form.config == recipes.for_data(classes)
    assert "dolly, as the rows have" in form.message.value
    assert "answers are judged by label" in form.message.value
    form.button.click()
    assert runs.open_run() == runs.open_run("mine")


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/mine.jsonl", "mine"), ("a/train.jsonl", "a-train"), (".jsonl", "mine")]
    + [("demo.jsonl", "demo-data")],  # a recipe's run is not taken
)
def test_a_run_is_named_by_the_file_or_by_its_folder_where_that_says_more(
    path, name, tmp_path
):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    source = write(tmp_path / path, [pair(f"{n}?", f"{n}.") for n in range(9)])
    assert recipes.for_data(source).name == name
