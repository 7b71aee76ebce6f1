"""What is said of each state of a GRPO training, and which are a collapse."""

import math
import random

import pandas
import pytest

from helpers.grpo import monitor
from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

LENGTH, CLIPPED = monitor.LENGTH, monitor.CLIPPED
HEALTHY = {
    "reward": [0.25] * 10 + [0.45] * 10,
    "frac_reward_zero_std": [0.3] * 20,
    ALL_WRONG: [0.2] * 20,
    ALL_RIGHT: [0.1] * 20,
    LENGTH: [50.0] * 10 + [48.0] * 10,
    CLIPPED: [0.02] * 20,
    "entropy": [0.4] * 10 + [0.3] * 10,
    "skipped_steps": [2.0] * 20,
}
HELD_OUT = [0.29, 0.35, 0.34]


def entries(**columns):
    """Logged values: one entry a step."""
    frame = pandas.DataFrame(columns)
    return [{"step": n, **row} for n, row in enumerate(frame.to_dict("records"), 1)]


def explain(held=HELD_OUT, **changes):
    """What is said of the healthy state after changes of its last ten steps."""
    columns = dict(HEALTHY)
    for name, value in changes.items():
        columns[name] = [*columns.get(name, [0.0] * 10)[:10], *[value] * 10]
    logged = entries(**columns)
    logged += [{"step": 10 * n, "eval_reward": v} for n, v in enumerate(held)]
    return monitor.explain(logged)


def test_of_a_healthy_training_trend_held_out_reward_loss_and_kl_are_told():
    assert explain() == [
        "The reward rises: 0.25 -> 0.45, noise ±0.03.",
        "Held-out reward 0.290 at first, 0.350 at best, step 10.",
        "The loss is near zero by construction: look at the reward.",
        "No KL term (beta 0): only the held-out reward tells of drift.",
    ]
    assert len(explain(held=[0.29])) == 3 and len(explain(kl=0.02)) == 3
    assert monitor.explain([{"step": 0, "eval_reward": 0.1}]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({ALL_WRONG: 0.72}, "72% of the groups are all wrong"),
        ({ALL_RIGHT: 0.6}, "60% of the groups are all right"),
        ({"frac_reward_zero_std": 0.8}, "80% of the groups have equal rewards"),
        ({CLIPPED: 0.34}, "34% of the answers are cut"),
        ({LENGTH: 20.0}, "Answers have shrunk from 50 to 20 tokens"),
        ({"entropy": 0.05}, "Entropy fell from 0.40 to 0.05"),
        ({"entropy": 0.9}, "Entropy rose from 0.40 to 0.90"),
        ({"skipped_steps": 9}, "fp16 skipped 9 steps, gradients overflow"),
        ({"kl": 1.5}, "KL 1.50 from the start"),
        ({ALL_WRONG: math.nan, "frac_reward_zero_std": 0.8}, "80% of the groups have"),
        ({"reward": 0.25}, "The reward is flat within its noise (0.25 -> 0.25, noise"),
        ({"reward": 0.10}, "The reward falls: 0.25 -> 0.10, noise"),
    ],
)
def test_a_state_that_needs_action_is_said_first(changes, expected):
    assert explain(**changes)[0].startswith(expected)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"reward": [0.2] * 15 + [0.4] * 15}, ""),
        ({"reward": [0.4] * 20 + [0.0] * 4}, ""),  # a few bad steps
        ({"reward": [0.1] * 25, CLIPPED: [1.0] * 25}, ""),  # cut from the start
        # the mean of eight answers to two problems, which swings
        ({"reward": [0.5, 0.0, 0.5, 0.25, 0.5, 0.0] * 2 + [0.25, *[0.0] * 4] * 2}, ""),
        ({"reward": [0.28, 0.27] * 5 + [0.08, 0.06] * 5}, "from 0.28 to 0.07"),
        ({"reward": [0.4] * 15 + [0.05] * 10}, "reward collapsed from 0.40 to 0.05"),
        ({"reward": [0.4] * 25, LENGTH: [50.0] * 15 + [5.0] * 10}, "from 50 to 5 tok"),
        (
            {"reward": [0.4] * 25, CLIPPED: [0.1] * 15 + [1.0] * 10},
            "100% of the answers run on to their limit, 10% did at first",
        ),
    ],
)
def test_a_collapse_is_told_with_what_collapsed(columns, expected):
    fault = monitor.collapse(entries(**columns))
    assert expected in fault and bool(expected) == bool(fault)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([0.375] * 4, ""),
        ([0.375, 0.375, 0.375, 0.0625], "from 0.29 to 0.06"),
        ([0.0] * 4, "from 0.29 to 0.06"),  # tells nothing
        ([], "from 0.29 to 0.06"),
    ],
)
def test_a_reward_has_not_collapsed_while_the_held_out_one_stands(held, expected):
    # eighths of eight answers to two problems a step: of a GPU run that was stopped
    eighths = [4, 3, 2, 0, 0, 0, 4, 3, 4, 3, 1, 4, 0, 0, 0, 4, 0, 3, 3, 1, 1, 1, 0, 1]
    logged = entries(reward=[n / 8 for n in [*eighths, 2, 0, 0, 0, 0, 0, 1]])
    for number, value in enumerate(held):
        logged.insert(11 * number, {"step": 10 * number, "eval_reward": value})
    fault = monitor.collapse(logged)
    assert expected in fault and bool(expected) == bool(fault)


@pytest.mark.parametrize("seed", range(20))
def test_the_noise_is_the_standard_error_of_the_difference(seed):
    drawn = random.Random(seed)
    rewards = pandas.Series([drawn.gauss(0.01 * n, 0.2) for n in range(400)])
    expected = (2 * 0.2**2 / 10) ** 0.5  # the trend left alone
    assert monitor.noise_of_means(rewards, 10) == pytest.approx(expected, rel=0.15)
