"""Items of an evaluation: written as they come, and not answered twice."""

import shutil

import pytest

from helpers import files
from helpers.errors import MissingInput
from helpers.inference.generation import Answer
from helpers.inference.items import answer_rows

ROWS = [{"id": str(n), "prompt": f"{n} + 1 =", "gold": str(n + 1)} for n in range(6)]


class Adder:
    """Adds one, two prompts a batch, and remembers the prompts."""

    def __init__(self, batches=99):
        self.batches = batches
        self.prompts = []

    def __call__(self, prompts):
        for start in range(0, len(prompts), 2):
            if start == 2 * self.batches:
                raise KeyboardInterrupt
            self.prompts += prompts[start : start + 2]
            places = range(start, min(start + 2, len(prompts)))
            yield {i: Answer(str(int(prompts[i][0]) + 1), 2, True) for i in places}


def judge(text, row):
    """Whether an answer is the gold one."""
    return {"correct": text == row["gold"]}


@pytest.fixture
def path(tmp_path):
    """The file of the items, all of them answered."""
    answer_rows(tmp_path / "a.jsonl", ROWS, "s", Adder(), judge)
    return tmp_path / "a.jsonl"


def test_items_stand_in_the_rows_order_and_verdicts_are_given_anew(path):
    items = files.read_rows(path)
    assert [item["id"] for item in items] == [row["id"] for row in ROWS]
    assert all(item["correct"] for item in items)
    assert list(path.parent.iterdir()) == [path]
    again = Adder()
    items = answer_rows(path, ROWS, "s", again, lambda text, row: {"rougeL": 1.0})
    assert again.prompts == []
    assert all("rougeL" in item and "correct" not in item for item in items)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    path, again = tmp_path / "a.jsonl", Adder()
    with pytest.raises(KeyboardInterrupt):
        answer_rows(path, ROWS, "s", Adder(batches=2), judge)
    assert not path.exists()
    assert len(answer_rows(path, ROWS, "s", again, judge)) == 6
    assert again.prompts == [row["prompt"] for row in ROWS[4:]]


def test_torn_lines_and_lines_that_are_no_items_are_answered_again(path):
    again, text = Adder(), path.read_text()
    part = path.parent / "a.part.jsonl"
    part.write_text('"text"\n[1]\n{"id": 1}\n\nnot JSON\n' + text[: len(text) - 25])
    path.unlink()
    assert len(answer_rows(path, ROWS, "s", again, judge)) == 6
    assert again.prompts == [ROWS[5]["prompt"]]


@pytest.mark.parametrize(
    ("settings", "prompt", "count"), [("t", "0 + 1 =", 6), ("s", "0 + 1 is", 1)]
)
def test_other_settings_or_prompts_are_answered_anew(path, settings, prompt, count):
    again, rows = Adder(), [{**ROWS[0], "prompt": prompt}, *ROWS[1:]]
    answer_rows(path, rows, settings, again, judge)
    assert len(again.prompts) == count and again.prompts[0] == prompt


def test_an_evaluation_whose_folder_is_removed_stops_at_once(tmp_path):
    folder, again = tmp_path / "run", Adder()

    def generate(prompts):
        for batch in again(prompts):
            shutil.rmtree(folder, ignore_errors=True)
            yield batch

    with pytest.raises(MissingInput, match="a.part.jsonl is gone: start again"):
        answer_rows(folder / "a.jsonl", ROWS, "s", generate, judge)
    assert len(again.prompts) == 2 and not folder.exists()
