"""Two models' answers: paired, judged in both orders, decided, shown side by side."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.errors import DataError, JudgeError, MissingInput
from helpers.files import read_rows, write_rows
from helpers.llm_judge import pairwise
from helpers.llm_judge.judge import FastChat, Judge
from helpers.runs import Run
from tests.judge_server import JudgeServer

MODELS = ("base", "sft")


def item(n: int, output: str, correct: bool | None = None, **more: Any) -> Any:
    """An item as an evaluation writes it."""
    known = {} if correct is None else {"correct": correct, "gold": "7"}
    question = {"id": f"test-{n}", "question": f"How many, {n}?"}
    return {**question, "output": output, **known, **more}


def write_items(run: Run, label: str, *items: Any, part: str = "test") -> None:
    write_rows(run.path / "eval" / label / f"{part}.jsonl", list(items))


def write_chats(run: Run, **outputs: list[str]) -> None:
    for label, texts in outputs.items():
        rows = [item(n, text) for n, text in enumerate(texts)]
        write_items(run, label, *rows, part="test_chat")


@pytest.fixture
def run(runs_home) -> Run:
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
    name, pairs = pairwise.read_pairs(run, MODELS)
    assert (name, list(pairs["id"])) == ("test", [f"test-{n}" for n in (1, 2, 3, 4)])
    first = pairs.iloc[0]
    assert (first["question"], first["gold"]) == ("How many, 1?", "7")
    assert (first["output_first"], first["output_second"]) == ("5 eggs", "7 eggs")


def test_models_without_a_question_in_common_are_refused(run):
    write_items(run, "new", item(1, "y"), part="test_chat")
    with pytest.raises(DataError, match="base and new answered no set in common"):
        pairwise.read_pairs(run, ("base", "new"))
    with pytest.raises(MissingInput, match="eval/grpo is missing: run the eval noteb"):
        pairwise.read_pairs(run, ("base", "grpo"))
    write_items(run, "sft", {**item(1, "y", True), "question": "Another one?"})
    with pytest.raises(DataError, match="test-1 of test is another question for sft"):
        pairwise.read_pairs(run, MODELS)
    write_items(run, "sft", item(9, "y", True))
    with pytest.raises(DataError, match="base and sft share no question of test"):
        pairwise.read_pairs(run, MODELS)


def test_wins_are_a_share_of_the_decided_pairs():
    counts = pairwise.count_wins(["second"] * 3 + ["first"] + ["tie"] * 6 + [None])
    assert (counts["wins"]["k"], counts["wins"]["n"]) == (3, 4)
    assert (counts["losses"], counts["ties"], counts["missing"]) == (1, 6, 1)
    # statsmodels' proportion_confint(3, 4, method="wilson")
    assert counts["wins"]["low"] == pytest.approx(0.3006, abs=1e-4)
    assert counts["wins"]["high"] == pytest.approx(0.9544, abs=1e-4)
    assert pairwise.count_wins(["tie", None])["wins"] is None


def shown(*arguments: Any, **options: Any) -> tuple[str, list[list[str]]]:
    """The summary and the cells of a table, as texts."""
    page = pairwise.side_by_side(*arguments, **options).data
    summary, _, table = page.partition("</b>")
    rows = [re.findall(r"<td>(.*?)</td>", r, re.S) for r in table.split("<tr>")[1:]]
    texts = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    return summary.removeprefix("<b>"), texts


def test_the_summary_counts_every_pair_whatever_is_shown(run):
    summary, rows = shown(run, MODELS, count=1)
    text = "sft: better than base in 2, worse in 1, equal in 1, undecided in 0 of 4"
    assert summary == f"{text}, by right answers"
    assert rows == [["How many, 1?\nexpected: 7", "sft", "5 eggs", "7 eggs"]]
    assert [row[1] for row in shown(run, MODELS)[1]] == ["sft", "base", "sft", "equal"]
    assert [row[0][:11] for row in shown(run, MODELS, only="first")[1]] == [
        "How many, 2"
    ]


def test_texts_are_decided_by_rouge_where_there_is_no_right_answer(run):
    write_chats(run, base=["a"], sft=["b"])
    summary, rows = shown(run, MODELS, "test_chat")
    assert summary.endswith("undecided in 1 of 1, by ROUGE-L")
    assert rows[0][1] == "-"
    for label, value in zip(MODELS, (0.5, 0.25), strict=True):
        row = item(1, label, reference="a cat", rougeL=value)
        write_items(run, label, row, part="test_chat")
    _, rows = shown(run, MODELS, "test_chat")
    assert rows[0][:2] == ["How many, 1?\nexpected: a cat", "base"]


def test_models_of_two_runs_are_named_with_their_runs(run):
    other = runs.save_run(changed(recipes.load("smoke"), name="other"))
    write_items(other, "sft", item(1, "7 hens", True), item(4, "7", True))
    summary, rows = shown(run, ("sft", "sft"), other=other)
    assert summary.startswith("other sft: better than smoke sft in 1")
    assert [row[1] for row in rows] == ["equal", "other sft"]


@pytest.mark.parametrize(
    ("first", "second", "marked"),
    [
        ("", "", []),
        ("a b\nc", "a b\nc", []),
        ("the cat sat", "the dog sat", ["cat", "dog"]),
        ("12 eggs", "12 fresh eggs", ["fresh "]),
        ("größer als 3,5 €", "kleiner als 3,5 €", ["größer", "kleiner"]),
        ("<b>&", "<b>& <i>", [" <i>"]),
        ("word " * 100, "word " * 99 + "end ", ["word ", "end "]),
    ],
)
def test_words_that_the_other_answer_lacks_are_marked_and_all_is_escaped(
    run, first, second, marked
):
    write_chats(run, base=[first], sft=[second])
    page = pairwise.side_by_side(run, MODELS, "test_chat").data
    pieces = re.findall(r'<(?:del|ins) style="[^"]*">(.*?)</', page)
    assert [p.replace("&lt;", "<").replace("&gt;", ">") for p in pieces] == marked
    assert "<b>&" not in page and "<i>" not in page
    _, ((_, _, *texts),) = shown(run, MODELS, "test_chat")
    texts = [t.replace("&lt;", "<").replace("&gt;", ">") for t in texts]
    assert [t.replace("&amp;", "&") for t in texts] == [first, second]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """A judge that prefers the longer answer, and the first where they are alike."""

    def prefer(request: dict[str, Any]) -> str:
        _, a, b, *_ = request["messages"][1]["content"].split("|")
        return "[[B]]" if len(b) > len(a) else "[[A]]"

    with JudgeServer(prefer) as running:
        yield running


@pytest.fixture
def judged(run: Run, server: JudgeServer, tmp_path: Path, monkeypatch):
    """Judges the test set of chats by short prompts."""
    text = "{question}|{answer_a}|{answer_b}"
    texts = {"pair-v2": text, "pair-math-v1": f"{text}|{{ref_answer_1}}"}
    prompts = {
        name: {"name": name, "system_prompt": "Judge.", "prompt_template": text}
        for name, text in texts.items()
    }
    fastchat = FastChat([], {}, prompts)
    monkeypatch.setattr(pairwise, "read_fastchat", lambda folder: fastchat)
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


def test_wins_losses_and_ties_are_counted_reported_and_shown(run, judged):
    write_chats(run, base=["a", "b", "ccc", "d"], sft=["aa", "bb", "c", "e"])
    table = judged()
    counts = run.report()["eval"]["sft"]["test_chat_against_base"]
    assert counts["wins"] == pairwise.count_wins(["second"] * 2 + ["first"])["wins"]
    assert (counts["losses"], counts["ties"], counts["missing"]) == (1, 1, 0)
    assert counts["by_position"] == 1
    assert table["wins"]["sft against base"].startswith("2/3 = 66.7 % [")
    rows = read_rows(run.path / "eval" / "sft" / "test_chat_against_base.jsonl")
    assert [row["winner"] for row in rows] == ["second", "second", "first", "tie"]
    assert rows[0]["judgments"] == ["[[B]]", "[[A]]"]
    write_chats(run, base=["a", "b", "ccc", "d"], sft=["aa", "other", "c", "e"])
    summary, rows = shown(run, MODELS, "test_chat", by="judge")
    assert [row[1] for row in rows] == ["sft", "-", "base", "equal"]
    assert summary.endswith("undecided in 1 of 4, by a judge")


def test_a_pair_without_a_verdict_in_either_order_is_missing(run, judged, server):
    server.faults = [None, 500]
    write_chats(run, base=["a", "b"], sft=["aa", "bb"])
    table = judged()
    assert table["wins"].iloc[0].startswith("1/1") and table["missing"].iloc[0] == 1
    rows = read_rows(run.path / "eval" / "sft" / "test_chat_against_base.jsonl")
    assert [row["winner"] for row in rows] == [None, "second"]
    assert rows[0]["judgments"] == ["[[B]]", "status 500 (oh)"]


def test_answers_with_a_right_one_are_judged_by_it(run, judged, server):
    for label, text in zip(MODELS, "ab", strict=True):
        write_items(run, label, item(1, text, True))
    judged(part="test")
    contents = [request["messages"][1]["content"] for request in server.requests]
    assert contents == ["How many, 1?|a|b|7", "How many, 1?|b|a|7"]


def test_two_runs_are_judged_against_each_other(run, judged):
    other = runs.save_run(changed(recipes.load("smoke"), name="other"))
    write_chats(run, sft=["a"])
    write_chats(other, sft=["aa"])
    judged(("sft", "sft"), other=other)
    assert "test_chat_against_sft" in other.report()["eval"]["sft"]


def test_without_a_verdict_a_judge_or_answers_nothing_is_reported(run, judged, server):
    with pytest.raises(DataError, match="no set in common: expected one of test_chat"):
        judged()
    server.answer = lambda request: "Hm."
    write_chats(run, base=["a"], sft=["b"])
    message = "no readable verdict in any of 2 judgments, 2 times 'Hm.': see"
    with pytest.raises(JudgeError, match=message):
        judged()
    with pytest.raises(JudgeError, match="No judge configured: .*TUNEBOOK_JUDGE"):
        pairwise.judge_pairs(run, MODELS, None)
    with pytest.raises(MissingInput, match="test_against_base.jsonl is missing"):
        pairwise.side_by_side(run, MODELS, by="judge")
    assert "eval" not in run.report()
