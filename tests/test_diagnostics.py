"""What is said of each state of a GRPO training, and what is recorded of rewards."""

from __future__ import annotations

import random
from typing import Any

import pytest

from helpers.grpo import diagnostics
from helpers.grpo.diagnostics import State

HEALTHY = State(
    reward=0.45,
    reward_first=0.25,
    noise=0.02,
    zero_spread=0.3,
    all_wrong=0.2,
    all_right=0.1,
    length=48.0,
    length_first=50.0,
    clipped=0.02,
    entropy=0.30,
    entropy_first=0.40,
    kl=None,
    skipped=2,
    held_out=[(0, 0.29), (20, 0.35), (40, 0.34)],
    max_length=64,
)


def sentences(**changes: Any) -> str:
    return "\n".join(diagnostics.explain(HEALTHY._replace(**changes)))


def test_of_a_healthy_training_trend_held_out_reward_loss_and_kl_are_told() -> None:
    assert diagnostics.explain(HEALTHY) == [
        "The reward rises: 0.25 -> 0.45 (noise ±0.04).",
        "Held-out reward 0.290 -> 0.350, best at step 20.",
        "The loss is near zero by construction (a group's advantages add up to "
        "nothing): look at the reward.",
        "No KL term (beta 0): only the held-out reward tells whether the model drifts.",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"all_wrong": 0.72, "zero_spread": 0.8},
            "72% of the groups are all wrong: they give no gradient. Warm-start",
        ),
        (
            {"all_right": 0.6, "zero_spread": 0.7},
            "60% of the groups are all right: they give no gradient. Take harder",
        ),
        (
            {"zero_spread": 0.8, "all_wrong": 0.4, "all_right": 0.4},
            "80% of the groups have equal rewards",
        ),
        ({"clipped": 0.34}, "34% of the answers are cut at 64 tokens"),
        ({"length": 20.0}, "Answers have shrunk from 50 to 20 tokens"),
        ({"entropy": 0.05}, "Entropy fell from 0.40 to 0.05"),
        ({"entropy": 0.9}, "Entropy rose from 0.40 to 0.90"),
        ({"skipped": 9}, "9 steps were skipped because gradients overflow in fp16"),
        ({"kl": 1.5}, "KL 1.50 nats a token from the start"),
    ],
)
def test_a_state_that_needs_action_is_said_first(
    changes: dict[str, Any], expected: str
) -> None:
    assert sentences(**changes).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward": 0.27}, "flat within its noise (0.25 -> 0.27, noise ±0.04)"),
        ({"reward": 0.10}, "The reward falls: 0.25 -> 0.10."),
        (
            {"held_out": [(0, 0.29), (20, 0.29), (40, 0.2)]},
            "has not passed its start (0.290, best since 0.290)",
        ),
    ],
)
def test_the_trend_is_told_with_its_noise(
    changes: dict[str, Any], expected: str
) -> None:
    assert expected in sentences(**changes)


def test_what_was_not_measured_is_not_told() -> None:
    assert "eld-out reward 0.290" not in sentences(held_out=[(0, 0.29)])
    assert "No KL term" not in sentences(kl=0.02)


def entries(**columns: list[float]) -> list[dict[str, Any]]:
    """Logged values: one entry a step."""
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return [{"step": n, **row} for n, row in enumerate(rows, start=1)]


def test_a_state_is_read_from_the_first_and_the_last_logged_steps() -> None:
    logged = entries(
        reward=[0.1] * 10 + [0.3] * 5 + [0.5] * 10,
        **{"completions/mean_length": [50.0] * 20 + [30.0] * 5},
    )
    logged.insert(3, {"step": 3, "eval_reward": 0.2})
    state = diagnostics.read_state(logged, 64)
    assert state is not None
    assert state.reward == 0.5
    assert state.reward_first == pytest.approx(0.1)
    assert (state.length_first, state.length) == (50, 40)
    # two changes of 0.2 in 24: their variance is of twice a step's
    assert state.noise == pytest.approx((2 * 0.2**2 / 24 / 10) ** 0.5)
    assert state.held_out == [(3, 0.2)] and state.kl is None and state.entropy is None


def test_there_is_no_state_before_the_first_step() -> None:
    assert diagnostics.read_state([{"step": 0, "eval_reward": 0.1}], 64) is None


# collapse


@pytest.mark.parametrize(
    "columns",
    [
        {"reward": [0.2] * 15 + [0.4] * 15},
        {"reward": [0.4] * 20 + [0.0] * 4},
        {"reward": [0.1] * 25, "completions/clipped_ratio": [1.0] * 25},
    ],
)
def test_a_few_bad_steps_or_answers_cut_from_the_start_are_no_collapse(
    columns: dict[str, list[float]],
) -> None:
    assert diagnostics.collapse(entries(**columns)) == ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"reward": [0.4] * 15 + [0.05] * 10}, "reward collapsed from 0.40 to 0.05"),
        (
            {
                "reward": [0.4] * 25,
                "completions/mean_length": [50.0] * 15 + [5.0] * 10,
            },
            "answers collapsed from 50 to 5 tokens",
        ),
        (
            {
                "reward": [0.4] * 25,
                "completions/clipped_ratio": [0.1] * 15 + [1.0] * 10,
            },
            "100% of the answers run on to their limit, 10% did at first",
        ),
    ],
)
def test_a_collapse_is_told_with_what_collapsed(
    columns: dict[str, list[float]], expected: str
) -> None:
    assert expected in diagnostics.collapse(entries(**columns))


def test_a_reward_that_only_swings_has_not_collapsed() -> None:
    # the mean of eight answers to two problems: what one GPU run was stopped for
    rewards = [0.5, 0.0, 0.5, 0.25, 0.5, 0.0, 0.25, 0.5, 0.25, 0.0]
    assert diagnostics.collapse(entries(reward=rewards + [0.25, *[0.0] * 4] * 2)) == ""
    steady = [0.28, 0.27] * 5 + [0.08, 0.06] * 5
    assert "from 0.28 to 0.07" in diagnostics.collapse(entries(reward=steady))


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([0.375] * 4, ""),
        ([0.375, 0.375, 0.375, 0.0625], "from 0.29 to 0.06"),
        ([0.0] * 4, "from 0.29 to 0.06"),  # tells nothing
        ([], "from 0.29 to 0.06"),
    ],
)
def test_a_reward_has_not_collapsed_while_the_held_out_one_stands(
    held: list[float], expected: str
) -> None:
    # eighths of eight answers to two problems a step: of a GPU run that was stopped
    eighths = [4, 3, 2, 0, 0, 0, 4, 3, 4, 3, 1, 4, 0, 0, 0, 4, 0, 3, 3, 1, 1, 1, 0, 1]
    logged = entries(reward=[n / 8 for n in [*eighths, 2, 0, 0, 0, 0, 0, 1]])
    for number, value in enumerate(held):
        logged.insert(11 * number, {"step": 10 * number, "eval_reward": value})
    found = diagnostics.collapse(logged)
    assert expected in found and bool(expected) == bool(found)


@pytest.mark.parametrize("seed", range(20))
def test_the_noise_is_the_standard_error_of_the_difference(seed: int) -> None:
    drawn = random.Random(seed)
    rewards = [drawn.gauss(0.01 * n, 0.2) for n in range(400)]  # with a trend
    expected = (2 * 0.2**2 / 10) ** 0.5
    assert diagnostics.noise_of_means(rewards, 10) == pytest.approx(expected, rel=0.15)
