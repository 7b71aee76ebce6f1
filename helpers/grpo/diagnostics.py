"""What GRPO's logged values mean, in sentences, and when they mean a collapse."""

from __future__ import annotations

import math
from typing import Any

import pandas

from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
COLUMNS = ["reward", "frac_reward_zero_std", ALL_WRONG, ALL_RIGHT, CLIPPED, LENGTH]
COLUMNS += ["entropy", "kl", "skipped_steps"]


def width_of_ends(steps: int) -> int:
    """Returns over how many logged steps first and last rewards are averaged."""
    return max(1, min(WINDOW, steps // 2))


def noise_of_means(rewards: pandas.Series, width: int) -> float:
    """Returns the standard error of the difference of two means, a trend left alone."""
    return float((rewards.diff() ** 2).mean() / width) ** 0.5


def rewarded(history: list[Entry]) -> pandas.DataFrame:
    """Returns the logged training steps; what was not logged is NaN."""
    entries = [entry for entry in history if entry.get("reward") is not None]
    return pandas.DataFrame(entries, columns=COLUMNS, dtype=float)


def explain(history: list[Entry]) -> list[str]:
    """Returns what a run's state means and what to do, most urgent first."""
    steps = rewarded(history)
    if steps.empty:
        return []
    width = width_of_ends(len(steps))
    first, last = steps.head(width).mean(), steps.tail(width).mean()
    reward, zero, wrong, right, clipped, length, entropy, kl, skip = last
    length_0, entropy_0 = first[LENGTH], first["entropy"]
    change, noise = reward - first["reward"], 2 * noise_of_means(steps["reward"], width)
    ends = f"{first['reward']:.2f} -> {reward:.2f}, noise ±{noise:.2f}"
    held = [(e["eval_reward"], e["step"]) for e in history if "eval_reward" in e]
    (start, _), (best, at) = (held or [(0.0, 0)])[0], max(held[1:], default=(0.0, 0))
    sentences = {  # none applies to NaN; fp16 skips up to three steps at its start
        f"{wrong:.0%} of the groups are all wrong: take easier problems.": wrong > 0.5,
        f"{right:.0%} of the groups are all right: take harder problems.": right > 0.5,
        f"{zero:.0%} of the groups have equal rewards, hence no gradient: sample more "
        "answers a problem.": zero > 0.5 and not max(wrong, right) > 0.5,
        f"{clipped:.0%} of the answers are cut: raise max_completion_length, or reward "
        "shorter ones.": clipped > 0.2,
        f"Answers have shrunk from {length_0:.0f} to {length:.0f} tokens: see whether "
        "they still show their working.": 0 < length < 0.5 * length_0,
        f"Entropy fell from {entropy_0:.2f} to {entropy:.2f}, answers become alike: "
        "lower the rate, or raise temperature.": entropy < 0.3 * entropy_0,
        f"Entropy rose from {entropy_0:.2f} to {entropy:.2f}, the text gets random: "
        "lower the rate.": entropy > 2 * entropy_0 > 0,
        f"fp16 skipped {skip:.0f} steps, gradients overflow: lower the rate.": skip > 3,
        f"KL {kl:.2f} from the start: raise beta, or lower the rate.": kl > 1,
        f"The reward is flat within its noise ({ends}): more steps, more answers a "
        "step, or a higher rate.": abs(change) <= noise,
        f"The reward rises: {ends}.": change > noise,
        f"The reward falls: {ends}. Lower the rate.": change < -noise,
        f"Held-out reward {start:.3f} at first, {best:.3f} at best, step {at}.": at > 0,
        "The loss is near zero by construction: look at the reward.": True,
        "No KL term (beta 0): only the held-out reward tells of drift.": math.isnan(kl),
    }
    return [sentence for sentence, applies in sentences.items() if applies]


def collapse(history: list[Entry]) -> str:
    """Returns why a run should stop, empty while it should go on."""
    steps = rewarded(history)
    if len(steps) < 2 * WINDOW:
        return ""
    means = steps[["reward", LENGTH, CLIPPED]].rolling(WINDOW).mean().round(9)
    _, length_0, clipped_0 = means.iloc[WINDOW - 1]
    reward, length, clipped = means.iloc[-1]
    best = means["reward"].max()
    is_noise = best - reward <= 3 * noise_of_means(steps["reward"], WINDOW)
    # problems differ from step to step, those held out do not
    held = [e["eval_reward"] for e in history if "eval_reward" in e] or [0.0]
    is_held = held[-1] > 0.3 * max(held)
    faults = {
        f"answers collapsed from {length_0:.0f} to {length:.0f} tokens; lower the "
        "rate, or do not reward short ones": 0 < length < 0.25 * length_0,
        f"the reward collapsed from {best:.2f} to {reward:.2f}; lower the rate, or set "
        "beta": reward < 0.3 * best and not is_noise and not is_held,
        f"{clipped:.0%} of the answers run on to their limit, {clipped_0:.0%} did at "
        "first; lower the learning rate": clipped > 0.9 >= clipped_0,
    }
    return next((fault for fault, applies in faults.items() if applies), "")
