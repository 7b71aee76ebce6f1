"""Tests of grpo.prompts: few-shot turns, the length limit, the pass-rate filter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import stages
from helpers.config import SYSTEM_PROMPT, changed
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo import answers, prompts
from helpers.grpo import trainer as grpo
from helpers.rollout import sampler as sampling
from helpers.runs import Run, write_json
from helpers.training import trainer as train

# in the format of GSM8K's files, notes for a calculator included
ROWS = [
    {"question": f"Ann has {n} nuts and gets {n} more. How many has she?"}
    | {"answer": f"Ann has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} nuts.\n#### {2 * n:,}"}
    for n in range(1, 1000, 90)
]


@pytest.fixture
def problem_run(run_factory: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Makes a prepared GRPO run over the problems above, from a local file."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def make(**changes: Any) -> Run:
        given = {"stages": ["grpo"], "data__train": [], "data__eval": None}
        given |= {"data__problems": str(path), "grpo__max_completion_length": 8}
        run = run_factory(**given, **changes)
        data.prepare(run)
        return run

    return make


def unasked(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was asked")


def select(run: Run, tokenizer: Any = None, answer: Any = unasked) -> list[data.Row]:
    return prompts.select(run, tokenizer, answer)


def load(run: Run, sampler: str = "model") -> tuple[Any, Any]:
    """Returns a run's tokenizer, and what answers prompts during its GRPO."""
    config = changed(run.config, sampler=sampler)
    model, tokenizer = train.load_for_training(run, "grpo")
    rollout = sampling.choose(config, model).rollout
    return tokenizer, grpo.answering(model, tokenizer, config, rollout)


def report(run: Run) -> dict[str, Any]:
    return json.loads((run.path / "grpo" / "prompts.json").read_text("utf-8"))


def test_a_prompt_is_the_question_under_the_system_prompt_with_a_plain_gold(
    problem_run: Callable[..., Run],
) -> None:
    rows = select(problem_run())
    assert len(rows) == len(ROWS)
    assert rows[-1] == {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": ROWS[-1]["question"]},
        ],
        "gold": "1982",
    }


def test_the_format_rewards_pay_for_what_the_system_prompt_asks_for() -> None:
    line = SYSTEM_PROMPT.partition(": ")[2]
    assert answers.has_strict_format(f"6 * 7 = 42\n{line}")


def test_solved_examples_are_turns_between_system_prompt_and_question(
    problem_run: Callable[..., Run],
) -> None:
    turns = select(problem_run(few_shot=2))[0]["prompt"]
    assert [t["role"] for t in turns] == ["system", *["user", "assistant"] * 2, "user"]
    assert turns[1]["content"] == ROWS[0]["question"]
    assert turns[2]["content"] == "Ann has 1+1=2 nuts.\n#### 2"
    assert turns[-1]["content"] == ROWS[2]["question"]


def test_a_problem_that_is_shown_solved_is_not_trained_on(
    problem_run: Callable[..., Run],
) -> None:
    run = problem_run(few_shot=2)
    asked = [row["prompt"][-1]["content"] for row in select(run)]
    assert asked == [row["question"] for row in ROWS[2:]]
    counts = {"prompts": len(ROWS) - 2, "left_out": 2, "shown": 2}
    assert report(run) == counts


def test_more_examples_than_problems_are_refused(
    problem_run: Callable[..., Run],
) -> None:
    run = problem_run(few_shot=len(ROWS))
    with pytest.raises(ConfigError, match=f"few_shot={len(ROWS)} takes all"):
        select(run)


def test_examples_without_problems_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="few_shot takes its examples from data.pro"):
        changed(run.config, stages=["sft"], few_shot=1, data__problems=None)


def test_a_limit_counts_the_examples_too(
    problem_run: Callable[..., Run], tokenizer: Any
) -> None:
    bare = problem_run(max_prompt_length=100)
    assert len(select(bare, tokenizer=tokenizer)) == len(ROWS)
    shown = problem_run(max_prompt_length=100, few_shot=3)
    with pytest.raises(ConfigError, match="tokens; raise it or lower few_shot"):
        select(shown, tokenizer=tokenizer)


def test_prompts_over_the_limit_are_left_out_and_counted(
    problem_run: Callable[..., Run], tokenizer: Any
) -> None:
    shortest, longest = (
        len(
            tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        for r in (select(problem_run())[0], select(problem_run())[-1])
    )
    assert shortest < longest
    run = problem_run(max_prompt_length=longest - 1)
    rows = select(run, tokenizer=tokenizer)
    assert 0 < len(rows) < len(ROWS)
    assert report(run)["too_long"] == report(run)["left_out"] == len(ROWS) - len(rows)


def test_a_probe_draws_as_grpo_does(run: Run) -> None:
    from trl import GRPOConfig

    config = changed(run.config, grpo={"temperature": 0.7, "max_completion_length": 9})
    assert prompts.sampling(config) == {
        "temperature": 0.7,
        "top_p": GRPOConfig.top_p,
        "top_k": GRPOConfig.top_k,
        "min_p": GRPOConfig.min_p,
        "repetition_penalty": GRPOConfig.repetition_penalty,
        "max_new_tokens": 9,
    }


def keep_rates(run: Run, solved: dict[str, int]) -> Path:
    """Writes the file that a probe keeps its findings in."""
    path = run.path / prompts.PASS_RATES
    write_json(path, {"made_from": prompts.made_of(run), "solved": solved})
    return path


@pytest.fixture
def probed(problem_run: Callable[..., Run]) -> Run:
    """A run whose problems were all probed, with pass rates from 0/4 to 4/4."""
    run = problem_run(probe_samples=4)
    keys = [row["id"] for row in data.read_rows(run.path / "data/problems.jsonl")]
    keep_rates(run, {key: number % 5 for number, key in enumerate(keys)})
    return run


def test_problems_that_are_never_or_always_solved_are_left_out_and_reported(
    probed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = select(probed)  # without a model: what was probed is not probed again
    asked = [row["prompt"][-1]["content"] for row in rows]
    assert asked == [r["question"] for n, r in enumerate(ROWS) if n % 5 in (1, 2, 3)]
    found = {"samples": 4, "problems": 12, "histogram": [3, 3, 2, 2, 2]}
    counts = {"prompts": 7, "left_out": 5, "shown": 0, "probe": found}
    assert report(probed) == counts
    assert "3 never solved, 2 always, 7 kept" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["model", "copy"])
def test_a_probe_that_was_stopped_goes_on_with_what_is_left(
    probed: Run, sampler: str
) -> None:
    problems = data.read_rows(probed.path / "data/problems.jsonl")
    before = {row["id"]: 3 for row in problems[:-1]}
    path = keep_rates(probed, before)
    found = prompts.probe(probed, load(probed, sampler)[1], problems)
    assert found == {**before, problems[-1]["id"]: 0}
    assert json.loads(path.read_text("utf-8"))["solved"] == found


def test_other_sampling_is_probed_anew(probed: Run) -> None:
    config = changed(probed.config, grpo__temperature=0.5, probe_problems=3)
    with pytest.raises(ConfigError, match="to learn from: 3 problems, .* 3 never sol"):
        select(Run(probed.path, config), *load(probed))


def test_a_capped_probe_draws_its_problems_by_the_seed(probed: Run) -> None:
    path = probed.path / prompts.PASS_RATES
    few = Run(probed.path, changed(probed.config, probe_problems=6))
    first, again = select(few), select(few)
    assert first == again
    assert sum(report(few)["probe"]["histogram"]) == 6
    other = Run(probed.path, changed(few.config, seed=1))
    keep_rates(other, json.loads(path.read_text("utf-8"))["solved"])
    assert select(other) != first


def test_the_random_numbers_of_training_are_the_same_with_and_without_a_probe(
    problem_run: Callable[..., Run],
) -> None:
    import torch

    run = problem_run(probe_samples=2, probe_problems=2)
    loaded = load(run)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ConfigError, match="no problem is left"):
        select(run, *loaded)
    assert torch.equal(torch.rand(3), expected)


def test_one_answer_a_problem_tells_nothing(run: Run) -> None:
    with pytest.raises(ConfigError, match="probe_samples=1 tells nothing; give 2"):
        changed(run.config, probe_samples=1)


def test_what_only_grpo_asks_leaves_a_finished_sft_as_it_is(run: Run) -> None:
    grpo_only = {"few_shot": 2, "probe_samples": 4, "probe_problems": 64}
    other = Run(run.path, changed(run.config, **grpo_only))
    assert stages.made_from(other, "sft") == stages.made_from(run, "sft")
    assert stages.made_from(other, "grpo") != stages.made_from(run, "grpo")


@pytest.mark.slow
def test_a_real_model_solves_an_easy_problem_more_often_than_a_hard_one(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    asked = {"Write the number 5.": 5, "What is 3917 * 4801?": 18805517}
    rows = [{"question": q, "answer": f"#### {a}"} for q, a in asked.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = run_factory(
        model="smollm2-135m-offline",
        stages=["grpo"],
        data__train=[],
        data__eval=None,
        data__problems=str(path),
        system_prompt="",
        grpo__max_completion_length=12,
        probe_samples=4,
    )
    data.prepare(run)
    problems = data.read_rows(run.path / "data/problems.jsonl")
    easy, hard = prompts.probe(run, load(run)[1], problems).values()
    assert easy > hard == 0
