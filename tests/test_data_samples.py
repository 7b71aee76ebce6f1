"""Tests of the sample data in data_samples."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.training import sft

SAMPLES = Path(__file__).resolve().parent.parent / "data_samples"
COUNTS = {"train": 2400, "eval": 200, "test": 400, "test_new": 200}
FORMATS = ["sharegpt", "alpaca", "dolly", "openai_messages", "llama2_text"]
FORMATS += ["chatml_text", "wizardlm"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def problems() -> dict[str, list[dict[str, Any]]]:
    return {
        split: read(SAMPLES / "word_problems" / f"{split}.jsonl") for split in COUNTS
    }


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "data_samples_generate", SAMPLES / "generate.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def exact(node: ast.expr) -> Fraction:
    """Evaluate the syntax tree of an arithmetic expression without rounding."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp), ast.dump(node)
    left, right = exact(node.left), exact(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    assert isinstance(node.op, ast.Div), ast.dump(node)
    return left / right


def sides(line: str) -> tuple[str, str]:
    """Split a worked line at its equals sign into expression and result."""
    left, right = line.split("=")
    expression = re.search(r"\d+( [-+*/] \d+)+ $", left)
    result = re.match(r" (\d+)\b", right)
    assert expression and result, line
    return expression[0].strip(), result[1]


def numbers(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", row["question"]))


def test_each_split_has_its_number_of_rows(problems):
    assert {split: len(rows) for split, rows in problems.items()} == COUNTS


def test_every_problem_has_the_four_keys_with_texts(problems):
    for rows in problems.values():
        for row in rows:
            assert list(row) == ["id", "question", "answer", "template"]
            assert all(isinstance(value, str) and value for value in row.values())


def test_ids_are_unique_over_all_splits_and_name_their_split(problems):
    ids = [row["id"] for rows in problems.values() for row in rows]
    assert len(set(ids)) == len(ids) == sum(COUNTS.values())
    for split, rows in problems.items():
        assert all(re.fullmatch(rf"{split}-\d{{5}}", row["id"]) for row in rows)


def test_no_question_occurs_twice(problems):
    questions = [row["question"] for rows in problems.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_train_has_fifty_rows_of_each_of_at_least_forty_templates(problems):
    counts = Counter(row["template"] for row in problems["train"])
    assert len(counts) >= 40
    assert set(counts.values()) == {50}


def test_eval_and_test_use_exactly_the_templates_of_train(problems):
    train, evaluation, test = (
        {row["template"] for row in problems[split]}
        for split in ("train", "eval", "test")
    )
    assert train == evaluation == test


def test_test_new_has_at_least_ten_templates_and_none_of_train(problems):
    new = {row["template"] for row in problems["test_new"]}
    assert len(new) >= 10
    assert new.isdisjoint(row["template"] for row in problems["train"])


def test_no_template_has_the_same_numbers_in_two_splits(problems):
    keys = {
        split: {(row["template"], numbers(row)) for row in rows}
        for split, rows in problems.items()
    }
    assert keys["train"].isdisjoint(keys["eval"])
    assert keys["train"].isdisjoint(keys["test"])
    assert keys["eval"].isdisjoint(keys["test"])


def test_swapping_the_numbers_of_a_question_gives_no_row_of_another_split(problems):
    keys = {
        split: {(row["template"], tuple(sorted(numbers(row)))) for row in rows}
        for split, rows in problems.items()
    }
    assert keys["train"].isdisjoint(keys["eval"] | keys["test"])
    assert keys["eval"].isdisjoint(keys["test"])


def test_every_worked_line_is_one_true_equation(problems):
    for rows in problems.values():
        for row in rows:
            for line in row["answer"].split("\n")[:-1]:
                expression, result = sides(line)
                tree = ast.parse(expression, mode="eval").body
                assert exact(tree) == int(result) > 0, line


def test_the_gold_answer_is_the_result_of_the_last_equation(problems):
    for rows in problems.values():
        for row in rows:
            *steps, last = row["answer"].split("\n")
            assert last == f"#### {sides(steps[-1])[1]}"


def test_every_step_uses_only_known_numbers(problems):
    # Numbers come from the question, from an earlier result, or from a word
    # (half, twice, two and four legs, seven days of a week).
    for rows in problems.values():
        for row in rows:
            known = set(numbers(row)) | {"2", "4", "7"}
            for line in row["answer"].split("\n")[:-1]:
                expression, result = sides(line)
                assert known.issuperset(re.findall(r"\d+", expression)), line
                known.add(result)


def test_answers_have_one_to_three_worked_lines(problems):
    for rows in problems.values():
        assert {row["answer"].count("\n") for row in rows} <= {1, 2, 3}


def test_questions_do_not_contain_the_gold_marker(problems):
    for rows in problems.values():
        assert not any("####" in row["question"] for row in rows)


def test_questions_are_between_18_and_45_words_and_end_in_a_question_mark(problems):
    for rows in problems.values():
        for row in rows:
            assert 18 <= len(row["question"].split()) <= 45
            assert row["question"].endswith("?")


def test_generating_again_gives_the_same_bytes(generator, tmp_path):
    generator.generate(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stored = SAMPLES / "word_problems"
    assert written == {path.name: path.read_bytes() for path in stored.iterdir()}


def test_another_seed_gives_other_problems(generator, tmp_path, problems):
    other = generator.generate(tmp_path, seed=1)
    assert other["train"] != problems["train"]


def test_the_generator_refuses_a_wrong_equation(generator):
    row = {"question": "How many?", "answer": "That is 2 + 3 = 6.\n#### 6"}
    with pytest.raises(ValueError, match="wrong arithmetic"):
        generator.check(row)


def test_the_generator_refuses_a_gold_answer_that_is_not_the_last_result(generator):
    row = {"question": "How many?", "answer": "That is 2 + 3 = 5.\n#### 6"}
    with pytest.raises(ValueError, match="last result"):
        generator.check(row)


@pytest.mark.parametrize("name", FORMATS)
def test_each_other_format_has_twelve_different_rows(name):
    rows = read(SAMPLES / f"{name}.jsonl")
    assert len(rows) == len({json.dumps(row) for row in rows}) == 12


def test_sharegpt_rows_alternate_between_human_and_gpt():
    turns = []
    for row in read(SAMPLES / "sharegpt.jsonl"):
        assert list(row) == ["conversations"]
        assert all(list(turn) == ["from", "value"] for turn in row["conversations"])
        turns.append(" ".join(turn["from"] for turn in row["conversations"]))
    assert all(re.fullmatch(r"(system )?(human gpt ?)+", t) for t in turns)
    assert sum("human gpt human" in t for t in turns) >= 2
    assert sum("system" in t for t in turns) == 1


def test_alpaca_rows_have_their_keys_and_some_empty_inputs():
    rows = read(SAMPLES / "alpaca.jsonl")
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(row["instruction"] and row["output"] for row in rows)
    assert {bool(row["input"]) for row in rows} == {True, False}


def test_wizardlm_rows_have_their_keys_and_long_instructions():
    rows = read(SAMPLES / "wizardlm.jsonl")
    assert all(list(row) == ["instruction", "output"] for row in rows)
    assert all(row["output"] for row in rows)
    assert min(len(row["instruction"].split()) for row in rows) >= 20


def test_dolly_rows_have_their_keys_and_some_empty_contexts():
    rows = read(SAMPLES / "dolly.jsonl")
    keys = ["instruction", "context", "response", "category"]
    assert all(list(row) == keys for row in rows)
    assert all(row["response"] and row["category"] for row in rows)
    assert {bool(row["context"]) for row in rows} == {True, False}


def test_openai_rows_alternate_between_user_and_assistant():
    turns = []
    for row in read(SAMPLES / "openai_messages.jsonl"):
        assert list(row) == ["messages"]
        assert all(list(turn) == ["role", "content"] for turn in row["messages"])
        turns.append(" ".join(turn["role"] for turn in row["messages"]))
    assert all(re.fullmatch(r"(system )?(user assistant ?)+", t) for t in turns)
    assert any("assistant user" in t for t in turns)
    assert any("system" in t for t in turns)


def test_llama2_rows_are_whole_turns_of_the_llama2_template():
    texts = [row["text"] for row in read(SAMPLES / "llama2_text.jsonl")]
    turn = r"<s>\[INST\] (?:(?!\[/?INST\]|</?s>).)+ \[/INST\] [^\[<]+ </s>"
    assert all(re.fullmatch(f"({turn})+", text, flags=re.S) for text in texts)
    assert sum(text.count("[INST]") == 2 for text in texts) >= 2
    assert sum("<<SYS>>\n" in text and "\n<</SYS>>\n\n" in text for text in texts) == 1


def test_chatml_rows_are_whole_turns_between_their_markers():
    texts = [row["text"] for row in read(SAMPLES / "chatml_text.jsonl")]
    turn = r"<\|im_start\|>{}\n(?:(?!<\|im_).)+<\|im_end\|>\n"
    system, user, assistant = map(turn.format, ("system", "user", "assistant"))
    rows = re.compile(f"({system})?({user}{assistant})+", re.S)
    assert all(rows.fullmatch(text) for text in texts)
    assert sum(text.count("im_start|>user") == 2 for text in texts) >= 2
    assert sum("im_start|>system" in text for text in texts) == 1


def test_eval_prompts_are_ten_and_occur_in_no_other_set(problems):
    prompts = sft.PROMPTS
    assert len(set(prompts)) == 10
    others = {row["question"] for rows in problems.values() for row in rows}
    assert others.isdisjoint(prompts)
    for name in FORMATS:
        text = (SAMPLES / f"{name}.jsonl").read_text("utf-8")
        assert not any(json.dumps(prompt) in text for prompt in prompts)
