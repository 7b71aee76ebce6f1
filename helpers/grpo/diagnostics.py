"""What GRPO's logged values mean, in sentences, and when they mean a collapse."""

from __future__ import annotations

import math
from typing import Any

import pandas

from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
SKIPS, NORMAL_SKIPS = "skipped_steps", 3  # while fp16's loss scale is found
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
COLUMNS = ["reward", "frac_reward_zero_std", ALL_WRONG, ALL_RIGHT, CLIPPED, LENGTH]
COLUMNS += ["entropy", "kl", SKIPS]
# a collapse: a share of the first length, of the best reward (beyond so many standard
# errors), and of the answers cut off
SHORT, LOST, SURE, CUT = 0.25, 0.3, 3, 0.9


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


def explain(history: list[Entry], max_length: int) -> list[str]:
    """Returns what a run's state means and what to do, most urgent first."""
    steps = rewarded(history)
    if steps.empty:
        return []
    width = width_of_ends(len(steps))
    first, last = steps.head(width).mean(), steps.tail(width).mean()
    reward, zero, wrong, right, clipped, length, entropy, kl = last[:-1]
    length_0, entropy_0, skips = first[LENGTH], first["entropy"], steps[SKIPS].max()
    change, noise = reward - first["reward"], 2 * noise_of_means(steps["reward"], width)
    ends = f"{first['reward']:.2f} -> {reward:.2f}, noise ±{noise:.2f}"
    held = [(e["eval_reward"], e["step"]) for e in history if "eval_reward" in e]
    start = held[0][0] if held else math.nan
    best, at = max(held[1:], default=(math.nan, 0))
    sentences = {  # of a value that is NaN none applies
        f"{wrong:.0%} of the groups are all wrong: they give no gradient. Train SFT "
        "further, or take easier problems.": wrong > 0.5,
        f"{right:.0%} of the groups are all right: they give no gradient. Take harder "
        "problems.": right > 0.5,
        f"{zero:.0%} of the groups have equal rewards: they give no gradient. Sample "
        "more answers a problem.": zero > 0.5 and not max(wrong, right) > 0.5,
        f"{clipped:.0%} of the answers are cut at {max_length} tokens: raise "
        "max_completion_length, or reward shorter ones.": clipped > 0.2,
        f"Answers have shrunk from {length_0:.0f} to {length:.0f} tokens: see whether "
        "they still show their working.": 0 < length < 0.5 * length_0,
        f"Entropy fell from {entropy_0:.2f} to {entropy:.2f}: answers become alike. "
        "Raise temperature or lower the rate.": entropy < 0.3 * entropy_0,
        f"Entropy rose from {entropy_0:.2f} to {entropy:.2f}: the text gets random. "
        "Lower the learning rate.": entropy > 2 * entropy_0 > 0,
        f"{skips:.0f} steps were skipped because gradients overflow in fp16, where 1 "
        f"to {NORMAL_SKIPS} are normal: lower the rate.": skips > NORMAL_SKIPS,
        f"KL {kl:.2f} nats a token from the start: the model has left what SFT taught. "
        "Raise beta or lower the learning rate.": kl > 1,
        f"The reward is flat within its noise ({ends}): more steps, more answers a "
        "step, or a higher rate.": abs(change) <= noise,
        f"The reward rises: {ends}.": change > noise,
        f"The reward falls: {ends}. Lower the learning rate.": change < -noise,
        f"Held-out reward {start:.3f} at first, best since {best:.3f} at step "
        f"{at}.": not math.isnan(best),
        "The loss is near zero by construction (a group's advantages add up to "
        "nothing): look at the reward.": True,
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
    is_noise = best - reward <= SURE * noise_of_means(steps["reward"], WINDOW)
    # problems differ from step to step, those held out do not
    held = [e["eval_reward"] for e in history if "eval_reward" in e] or [0.0]
    is_held = held[-1] > LOST * max(held)
    faults = {
        f"answers collapsed from {length_0:.0f} to {length:.0f} tokens; lower the "
        "rate, or do not reward short ones": 0 < length < SHORT * length_0,
        f"the reward collapsed from {best:.2f} to {reward:.2f}; lower the rate, or set "
        "beta": reward < LOST * best and not is_noise and not is_held,
        f"{clipped:.0%} of the answers run on to their limit, {clipped_0:.0%} did at "
        "first; lower the learning rate": clipped > CUT >= clipped_0,
    }
    return next((fault for fault, applies in faults.items() if applies), "")
