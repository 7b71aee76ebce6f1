"""GRPO learns the same from a step's completions, however many go through at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from helpers.data import preparation as data
from helpers.files import read_json
from helpers.grpo import rewards
from helpers.grpo import trainer as grpo
from helpers.inference.generation import encode
from helpers.runs import Run
from helpers.training import layout
from helpers.training import trainer as train
from helpers.training.layout import Layout

WHOLE, OWN = Layout(8, 1, False, False), Layout(2, 4, False, False)
MEANS = "vLLM, or a loss of means over a micro-batch"


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward that random text spreads."""
    return [float(len(c[-1]["content"]) % 7) for c in completions]


@pytest.fixture
def make(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Makes a prepared GRPO run of 2 x 4 completions a step, four to a prompt."""
    monkeypatch.setitem(rewards.REWARDS, "length", length)
    monkeypatch.setattr(layout, "reason", lambda *_: "")  # a CPU chooses, too

    def prepared(**changes: Any) -> Run:
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        sizes |= {"max_steps": 3, "save_steps": 2, "max_completion_length": 6}
        run = run_factory(
            stages=["grpo"],
            rewards={"length": 1.0},
            grpo__eval_strategy="no",
            grpo__learning_rate=1e-2,
            grpo__warmup_steps=0,
            **{f"grpo__{name}": value for name, value in sizes.items()} | changes,
        )
        data.prepare(run)
        return run

    return prepared


def build(run: Run) -> Any:
    trainer = grpo.build_grpo(run, *train.load_for_training(run, "grpo"))
    train.keep_lora_fp32(trainer.model)
    return trainer


def logged(run: Run, *names: str) -> list[list[str]]:
    """The prompts, or completions, of each step."""
    files = sorted((run.path / "grpo/checkpoints/completions").glob("*.parquet"))
    frames = [pd.read_parquet(file) for file in files]
    return [frame[list(names)].astype(str).sum(axis=1).to_list() for frame in frames]


def measured(trainer: Any) -> list[float]:
    """What training logged of each step: not the loss, which is zero at its start."""
    names = ("reward", "grad_norm", "loss")
    entries = [e for e in trainer.state.log_history if "reward" in e]
    return [entry[name] for entry in entries for name in names]


def weights(trainer: Any) -> torch.Tensor:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.parametrize(
    "values",
    [
        {},
        # completions of two steps are sampled at once, and learnt from twice
        {"loss_type": "grpo", "num_iterations": 2, "steps_per_generation": 8},
    ],
)
def test_steps_do_not_depend_on_how_many_completions_go_through_at_a_time(
    make: Callable[..., Run], values: dict[str, Any]
) -> None:
    run = make(**{f"grpo__{name}": value for name, value in values.items()})
    results = []
    for size in (8, 4, 2):
        trainer = build(run)
        layout.apply_layout(trainer, Layout(size, 8 // size, False, False))
        trainer.train()
        texts = logged(run, "prompt", "completion")
        results.append((measured(trainer), texts, weights(trainer)))
    assert len(results[0][1]) == 3 and max(results[0][0]) > 0.01
    for numbers, texts, trained in results[1:]:
        assert numbers == pytest.approx(results[0][0], abs=1e-4)
        assert texts == results[0][1]
        assert (trained - results[0][2]).abs().max() < 1e-3


def test_no_pass_spans_two_samplings_and_a_fixed_recomputation_is_kept(
    make: Callable[..., Run],
) -> None:
    run = make(grpo__steps_per_generation=2, grpo__gradient_checkpointing=False)
    trainer = build(run)
    order = layout.candidates(trainer, run)
    assert order == [Layout(n, 8 // n, False, False) for n in (4, 2, 1)]


@pytest.mark.parametrize("sampler", ["model", "copy"])
def test_training_after_a_choice_is_training_with_that_layout(
    make: Callable[..., Run], sampler: str
) -> None:
    run = make(sampler=sampler, grpo__beta=0.01)
    trainer = build(run)
    (row,) = layout.choose_layout(trainer, run).to_dict("records")
    rows, tokenizer = trainer.train_dataset["prompt"], trainer.processing_class
    prompts = [encode(tokenizer, row) for row in rows]
    assert row["tokens"] == 8 * (max(map(len, prompts)) + 6)
    note = read_json(run.path / "grpo" / "layout.json")
    assert row["verdict"] == "fits" and Layout(**note["choice"]) == WHOLE
    trainer.train()
    texts = logged(run, "prompt", "completion")
    other = build(run)
    layout.apply_layout(other, WHOLE)
    other.train()
    assert measured(trainer) == measured(other)
    assert texts == logged(run, "prompt", "completion")
    assert torch.equal(weights(trainer), weights(other))


def test_a_resumed_run_keeps_its_layout_and_its_prompts(
    make: Callable[..., Run],
) -> None:
    run = make()
    whole = build(run)
    layout.choose_layout(whole, run)
    whole.train()
    prompts = logged(run, "prompt")
    again = build(run)
    layout.choose_layout(again, run)
    assert again.args.per_device_train_batch_size == 8
    checkpoint = Path(again.args.output_dir) / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    assert logged(run, "prompt") == prompts
    assert measured(again) == pytest.approx(measured(whole), abs=1e-5)


@pytest.mark.parametrize("step", [0, 2])
def test_out_of_memory_in_a_step_takes_the_next_layout_and_the_same_prompts(
    make: Callable[..., Run], step: int
) -> None:
    run = make()
    plain = build(run)
    plain.train()
    prompts = logged(run, "prompt")
    trainer = build(run)
    compute_loss, failures = trainer.compute_loss, []

    def fails_once(*args: Any, **options: Any) -> Any:
        loss = compute_loss(*args, **options)
        if trainer.state.global_step == step and layouts and not failures:
            failures.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return loss

    layouts = layout.choose_layout(trainer, run).to_dict("records")
    for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
        folder.rename(folder.with_name(f"plain-{folder.name}"))
    trainer.compute_loss = fails_once
    part = train.fit(trainer, run)
    assert failures and part["steps"] == 3
    assert part["layout"]["choice"] == Layout(8, 1, True, False)._asdict()
    assert part["layout"]["tries"][-1]["verdict"] == f"out of memory after step {step}"
    assert logged(run, "prompt") == prompts


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"loss_type": "bnpo"}, MEANS),
        ({"top_entropy_quantile": 0.5}, MEANS),
        ({}, "on a CPU"),
    ],
)
def test_without_a_choice_the_layout_stays_and_the_table_says_why(
    make: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    why: str,
) -> None:
    run = make(**{f"grpo__{name}": value for name, value in values.items()})
    monkeypatch.undo()
    monkeypatch.setitem(rewards.REWARDS, "length", length)
    monkeypatch.setenv("TUNEBOOK_RUNS", str(run.path.parent))
    (row,) = layout.choose_layout(build(run), run).to_dict("records")
    assert row == OWN._asdict() | {"verdict": why}
