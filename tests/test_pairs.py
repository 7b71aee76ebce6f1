"""Two models' answers: paired, judged in both orders, decided, shown side by side."""

import contextlib
import html
import re

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.errors import DataError, JudgeError, MissingInput
from helpers.files import read_rows, write_rows
from helpers.llm_judge import pairwise
from helpers.llm_judge.judge import Judge
from tests.judge_server import JudgeServer

MODELS = ("base", "sft")


def item(n, output, correct=None, **more):
    """An item as an evaluation writes it."""
    known = {} if correct is None else {"correct": correct, "gold": "7"}
    question = {"id": f"test-{n}", "question": f"How many, {n}?"}
    return {**question, "output": output, **known, **more}


def write_items(run, label, *items, part="test"):
    write_rows(run.path / "eval" / label / f"{part}.jsonl", list(items))


def write_chats(run, **outputs):
    for label, texts in outputs.items():
        rows = [item(n, text) for n, text in enumerate(texts)]
        write_items(run, label, *rows, part="test_chat")


@pytest.fixture
def run(runs_home):
    """A run whose base model and SFT model have answered four problems."""
    run = runs.save_run(recipes.load("smoke"))
    base = [(1, "5 eggs", False), (2, "7", True), (3, "9", False), (4, "1", False)]
    sft = [(1, "7 eggs", True), (2, "8", False), (3, "7", True), (4, "2", False)]
    write_items(run, "base", *(item(*values) for values in base))
    write_items(run, "sft", *(item(*values) for values in sft))
    return run


def test_answers_are_paired_by_the_id_of_their_question(run):
    backwards = read_rows(run.path / "eval/sft/test.jsonl")[::-1]
    write_items(run, "sft", *backwards, item(9, "y", True))
    pairs = pairwise.read_pairs(run, MODELS)
    assert list(pairs["id"]) == [f"test-{n}" for n in (1, 2, 3, 4)]
    first = pairs.iloc[0]
    assert first["title"] == "How many, 1?\nexpected: 7"
    assert (first["output_first"], first["output_second"]) == ("5 eggs", "7 eggs")
    write_items(run, "base", *[item(1, "5 eggs", False)] * 2)
    write_items(run, "sft", *[item(1, "7 eggs", True)] * 2)
    assert len(pairwise.read_pairs(run, MODELS)) == 1  # a problem that comes twice


def test_models_without_a_question_in_common_are_refused(run):
    write_items(run, "new", item(1, "y"), part="test_chat")
    with pytest.raises(DataError, match="base and new have no set in common"):
        pairwise.read_pairs(run, ("base", "new"))
    former = run._replace(config=changed(run.config, data__test=None))
    with pytest.raises(DataError, match="base and sft have no set in common"):
        pairwise.read_pairs(former, MODELS)  # the answers are of another config
    with pytest.raises(MissingInput, match="eval/grpo is missing: run the eval noteb"):
        pairwise.read_pairs(run, ("base", "grpo"))
    another, unlabelled = item(1, "y", True) | {"question": "Another?"}, item(1, "y")
    for changed_item in (another, item(9, "y", True), unlabelled | {"rougeL": 0.5}):
        write_items(run, "sft", changed_item)
        with pytest.raises(DataError, match="test.jsonl with other data or other eval"):
            pairwise.read_pairs(run, MODELS)


def shown(*arguments, **options):
    """The summary and the cells of a table, as texts."""
    page = pairwise.side_by_side(*arguments, **options).data
    summary, _, table = page.partition("</b>")
    rows = [re.findall(r"<td>(.*?)</td>", r, re.S) for r in table.split("<tr>")[1:]]
    texts = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    return summary.removeprefix("<b>"), texts


def test_the_summary_counts_every_pair_whatever_is_shown(run):
    summary, rows = shown(run, MODELS, count=1)
    assert summary == "better by correct: sft 2, base 1, equal 1"
    assert rows == [["How many, 1?\nexpected: 7", "sft", "5 eggs", "7 eggs"]]
    assert [row[1] for row in shown(run, MODELS)[1]] == ["sft", "base", "sft", "equal"]
    firsts = shown(run, MODELS, only="first")[1]
    assert [row[0][:11] for row in firsts] == ["How many, 2"]
    write_items(run, "sft", item(1, "7 eggs", True))
    assert shown(run, MODELS, only="first") == ("better by correct: sft 1", [])
    with pytest.raises(DataError, match="only='sft': expected first, second, tie, or"):
        shown(run, MODELS, only="sft")
    write_items(run, "<i>", item(1, "5 eggs", False))
    assert "<i>" not in pairwise.side_by_side(run, ("<i>", "sft")).data


@pytest.mark.parametrize(
    ("first", "second", "marked"),
    [
        ("a b\nc", "a b\nc", []),
        ("12 eggs", "12 fresh eggs", ["fresh"]),
        ("größer als 3,5 €", "kleiner als 3,5 €", ["größer", "kleiner"]),
        ("<b>&", "<b>& <i>", ["i"]),
    ],
)
def test_words_that_the_other_answer_lacks_are_marked_and_all_is_escaped(
    run, first, second, marked
):
    rows = [item(1, text, rougeL=0.5) for text in (first, second)]
    for label, row in zip(MODELS, rows, strict=True):
        write_items(run, label, row, part="test_chat")
    page = pairwise.side_by_side(run, MODELS, "test_chat").data
    assert re.findall("<mark>(.*?)</mark>", page) == marked
    assert "<b>&" not in page and "<i>" not in page
    summary, ((_, _, *texts),) = shown(run, MODELS, "test_chat")
    assert summary == "better by rougeL: equal 1"
    assert [html.unescape(text) for text in texts] == [first, second]


@pytest.fixture
def server():
    """A judge that prefers the longer answer, and the first where they are alike."""

    def prefer(request):
        _, a, b, *_ = request["messages"][1]["content"].split("|")
        return "[[B]]" if len(b) > len(a) else "[[A]]"

    with JudgeServer(prefer) as running:
        yield running


@pytest.fixture
def judged(run, server, tmp_path, monkeypatch):
    """Judges the test set of chats by short prompts."""
    text = "{question}|{answer_a}|{answer_b}"
    texts = {"pair-v2": text, "pair-math-v1": f"{text}|{{ref_answer_1}}"}
    prompts = {
        name: {"name": name, "system_prompt": "Judge.", "prompt_template": text}
        for name, text in texts.items()
    }
    fastchat = [], {}, prompts
    monkeypatch.setattr(pairwise.judges, "read_fastchat", lambda: fastchat)
    client = Judge("local", tmp_path / "judge.jsonl", server.url, retries=0, workers=1)
    return lambda models=MODELS, **options: pairwise.judge_pairs(
        run, models, client, **options
    )


@pytest.mark.parametrize(
    ("forward", "backward", "winner"),
    [("A", "B", "first"), ("B", "A", "second"), ("C", "C", "tie"), ("A", "A", "tie")]
    + [("B", "B", "tie"), ("C", "B", "tie"), ("?", "A", None), ("B", "?", None)],
)
def test_a_win_counts_when_both_orders_agree(
    run, judged, server, forward, backward, winner
):
    letters = iter((forward, backward))
    server.answer = lambda request: f"[[{next(letters)}]]"
    write_chats(run, base=["a"], sft=["b"])
    with contextlib.suppress(JudgeError):  # none can be read
        judged()
    (row,) = read_rows(run.path / "eval" / "sft" / "test_chat_against_base.jsonl")
    assert row["winner"] == winner


def test_wins_losses_and_ties_are_counted_and_reported(run, judged):
    write_chats(run, base=["a", "b", "ccc", "d"], sft=["aa", "bb", "c", "e"])
    table = judged()
    counts = run.report()["eval"]["sft"]["test_chat_against_base"]
    assert (counts["wins"]["k"], counts["wins"]["n"]) == (2, 3)
    assert (counts["losses"], counts["ties"], counts["missing"]) == (1, 1, 0)
    assert counts["by_position"] == 1
    assert table["wins"]["sft against base"].startswith("2/3 = 66.7 % [")
    rows = read_rows(run.path / "eval" / "sft" / "test_chat_against_base.jsonl")
    assert [row["winner"] for row in rows] == ["second", "second", "first", "tie"]
    assert rows[0]["judgment"] == ["[[B]]", "[[A]]"]


def test_answers_with_a_right_one_are_judged_by_it_up_to_a_limit(run, judged, server):
    for label, text in zip(MODELS, "ab", strict=True):
        write_items(run, label, item(1, text, True), item(2, text, True))
    judged(part="test", limit=1)  # of the first pairs
    contents = [request["messages"][1]["content"] for request in server.requests]
    assert contents == ["How many, 1?|a|b|7", "How many, 1?|b|a|7"]


def test_two_runs_are_judged_against_each_other(run, judged):
    other = runs.save_run(changed(recipes.load("smoke"), name="other"))
    write_chats(run, sft=["a"])
    write_chats(other, sft=["aa"])
    judged(("sft", "sft"), other=other)
    assert "test_chat_against_sft" in other.report()["eval"]["sft"]


def test_without_a_verdict_a_judge_or_answers_nothing_is_reported(run, judged, server):
    with pytest.raises(DataError, match="no test_chat in common"):
        judged()
    server.answer = lambda request: "Hm."
    write_chats(run, base=["a"], sft=["b"])
    message = "no readable winner in any of 1 judgments, as in .*Hm.*: see"
    with pytest.raises(JudgeError, match=message):
        judged()
    with pytest.raises(JudgeError, match="No judge configured: .*TUNEBOOK_JUDGE"):
        pairwise.judge_pairs(run, MODELS, None)
    assert "eval" not in run.report()
