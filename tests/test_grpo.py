"""GRPO: its problems, the adapter that is kept, the clock, the completions logged."""

import json
from types import SimpleNamespace

import pytest
from trl import GRPOConfig

from helpers import stages
from helpers.config import SYSTEM_PROMPT, changed
from helpers.data import load_rows
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.grpo import answers, monitor, rewards
from helpers.grpo import trainer as grpo
from helpers.inference.generation import generate
from helpers.runs import Run
from helpers.training import trainer as training
from tests.rows import write
from tests.test_train import length, losses


@pytest.fixture
def make(run_factory, monkeypatch):
    """Makes a prepared run of GRPO alone, with a reward that a random model gets."""
    monkeypatch.setitem(rewards.REWARDS, "length", length)

    def prepared(**changes):
        small = {
            "stages": ["grpo"],
            "rewards": {"length": 1.0, "strict_format": 0.5},
            "grpo__max_steps": 3,
            "grpo__max_completion_length": 6,
            "grpo_held_out": 4,
        }
        run = run_factory(**{**small, **changes})
        data.prepare(run)
        return run

    return prepared


def history(run, name):
    return losses(run, "grpo", name)


@pytest.mark.parametrize("sampler", ["model", "copy"])
def test_held_out_answers_are_greedy_whoever_samples(make, sampler):
    run = make(sampler=sampler, grpo__eval_steps=1, grpo__learning_rate=1e-2)
    model, tokenizer = training.load_for_training(run, "grpo")
    trainer = grpo.build_grpo(run, model, tokenizer)
    training.fit(trainer, run)
    prompts = list(trainer.eval_dataset["prompt"])
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    paid = [len(answer.text) % 7 for answer in answers]
    formats = rewards.strict_format([answer.text for answer in answers])
    last = (3, round(sum(paid) / 4, 4)), (3, round(sum(formats) / 4, 4))
    assert history(run, "eval_rewards/length")[-1] == last[0]
    assert history(run, "eval_rewards/strict_format")[-1] == last[1]
    total = sum(paid) / 4 + 0.5 * sum(formats) / 4
    assert history(run, "eval_reward")[-1] == (3, round(total, 4))


def test_the_best_adapter_by_held_out_reward_is_kept_and_completions_are_logged(make):
    weights = {"correctness": 1.0, "length": 1.0}
    run = make(grpo__eval_steps=1, grpo__learning_rate=1e-3, rewards=weights)
    part = stages.train_stage(run, "grpo")
    measured = history(run, "eval_reward")
    assert [step for step, _ in measured] == [0, 1, 2, 3]
    best, step = max((value, step) for step, value in measured)
    assert (part["held_out_best"], part["best_step"]) == (round(best, 4), step)
    assert part["held_out_first"] == round(measured[0][1], 4)
    assert (run.path / "grpo" / "curves.png").stat().st_size > 0
    shares = [history(run, name) for name in (rewards.ALL_WRONG, rewards.ALL_RIGHT)]
    assert shares == [[(n, 1.0) for n in (1, 2, 3)], [(n, 0.0) for n in (1, 2, 3)]]
    size = run.config.grpo["num_generations"]
    for logged in (1, 3):
        group = monitor.read_group(run, logged)
        assert len(group) == size and group["prompt"].nunique() == 1
        paid = [len(text) % 7 for text in group["completion"]]
        assert list(group["length"]) == list(group["reward"]) == paid


def test_an_evaluation_without_weights_counts_each_reward_once(make):
    run = make()
    trainer = grpo.build_grpo(run, *training.load_for_training(run, "grpo"))
    values = grpo.grpo_arguments(run) | {"reward_weights": None}
    trainer = type(trainer)(
        model=trainer.model,
        args=GRPOConfig(**values),
        reward_funcs=trainer.reward_funcs,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
    )
    metrics = trainer.evaluate()
    parts = [v for name, v in metrics.items() if name.startswith("eval_rewards/")]
    assert metrics["eval_reward"] == pytest.approx(sum(parts), abs=1e-3)


def test_without_evaluation_the_last_adapter_is_kept(make):
    run = make(grpo__eval_strategy="no", grpo__max_steps=1)
    part = stages.train_stage(run, "grpo")
    assert "held_out_best" not in part and not history(run, "eval_reward")
    assert (run.path / "grpo" / "adapter" / "adapter_config.json").exists()


def test_clipping_is_as_far_to_both_sides_unless_told_otherwise(make):
    run = make(grpo__epsilon=0.1)
    values = grpo.grpo_arguments(run)
    assert (values["epsilon"], values["epsilon_high"]) == (0.1, 0.1)
    other = Run(run.path, changed(run.config, grpo__epsilon_high=0.3))
    assert grpo.grpo_arguments(other)["epsilon_high"] == 0.3


def test_a_run_with_minutes_ends_by_the_clock_with_its_adapter_saved(make, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def slow(completions, **_):
        clock.now += 5  # of sampling: each step and each evaluation calls it once
        return length(completions)

    monkeypatch.setitem(rewards.REWARDS, "slow", slow)
    time = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(monitor, "time", time)
    run = make(rewards={"slow": 1.0}, grpo_minutes=1, grpo__lr_scheduler_type="linear")
    part = stages.train_stage(run, "grpo")
    assert clock.now == pytest.approx(60, abs=6)
    assert part["steps"] + len(history(run, "eval_reward")) == clock.now // 5
    assert "1 minutes of grpo_minutes are used" in part["stopped"]
    rates = [rate for _, rate in history(run, "learning_rate")]
    assert rates[0] > 2 * rates[-1] >= 0
    assert (run.path / "grpo" / "adapter" / "adapter_config.json").exists()


# the problems, in the format of GSM8K's files
ROWS = [
    {"question": f"Ann has {n} nuts and gets {n} more. How many has she?"}
    | {"answer": f"Ann has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} nuts.\n#### {2 * n:,}"}
    for n in range(1, 1000, 90)
]


@pytest.fixture
def problem_run(make, tmp_path):
    """Makes a prepared GRPO run over the problems above, from a local file."""
    local = {"data__train": [], "data__eval": None, "grpo_held_out": 2}
    local["data__problems"] = write(tmp_path / "problems.jsonl", ROWS)
    return lambda **changes: make(**local | changes)


def test_a_prompt_is_the_question_under_the_system_prompt_with_a_plain_gold(
    problem_run, tokenizer
):
    rows = grpo.training_prompts(problem_run(max_prompt_length=500), tokenizer)
    assert len(rows) == len(ROWS) - 2
    system = {"role": "system", "content": SYSTEM_PROMPT}
    question = {"role": "user", "content": ROWS[-3]["question"]}
    assert rows[-1] == {"prompt": [system, question], "gold": "1622"}
    line = SYSTEM_PROMPT.partition(": ")[2]  # the format that is paid for
    assert answers.has_strict_format(f"6 * 7 = 42\n{line}")


def test_prompts_over_the_limit_are_left_out_and_counted(problem_run, tokenizer):
    rows = grpo.training_prompts(problem_run(), tokenizer)
    prompts = [row["prompt"] for row in rows]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)
    shortest, *_, longest = sorted(map(len, ids["input_ids"]))
    run = problem_run(max_prompt_length=longest - 1)
    left = grpo.training_prompts(run, tokenizer)
    counts = {"prompts": len(left), "left_out": len(rows) - len(left)}
    assert 0 < len(left) < len(rows)
    assert json.loads((run.path / "grpo/prompts.json").read_text()) == counts
    with pytest.raises(ConfigError, match=f"the shortest has {shortest} tokens"):
        grpo.training_prompts(problem_run(max_prompt_length=5), tokenizer)


def test_held_out_problems_are_eval_rows_and_all_problems_are_trained_on(run_factory):
    run = run_factory(stages=["grpo"], grpo_held_out=4)
    data.prepare(run)
    left, held_out = grpo.split_problems(run)
    assert (len(left), len(held_out)) == (2400, 4)
    rows = load_rows(run.config.data.eval or "")
    asked = [problem["prompt"][-1]["content"] for problem in held_out]
    assert asked == [row["question"] for row in rows[:4]]
    assert held_out[0]["gold"] == rows[0]["answer"].split("#### ")[1]


@pytest.mark.parametrize("rows", [None, "data_samples/alpaca.jsonl"])
@pytest.mark.parametrize(("wanted", "held_out"), [(2, 2), (32, 6)])
def test_without_eval_rows_with_gold_answers_the_last_problems_are_held_out(
    problem_run, rows, wanted, held_out
):
    run = problem_run(data__eval=rows, grpo_held_out=wanted)
    parts = grpo.split_problems(run)
    asked = [[row["prompt"][-1]["content"] for row in part] for part in parts]
    questions = [row["question"] for row in ROWS]
    assert asked == [questions[:-held_out], questions[-held_out:]]
