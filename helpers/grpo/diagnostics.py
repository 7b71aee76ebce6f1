"""What GRPO's logged values mean, in sentences, and when they mean a collapse."""

from __future__ import annotations

from typing import Any

import pandas

from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
SKIPPED = "skipped_steps"
NORMAL_SKIPS = 3  # while fp16's loss scale is found
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
# a collapse: a share of the first length, of the best reward (beyond so many standard
# errors), and of the answers cut off
SHORT, LOST, SURE, CUT = 0.25, 0.3, 3, 0.9
FLAT = "they give no gradient."


def width_of_ends(steps: int) -> int:
    """Returns over how many logged steps first and last rewards are averaged."""
    return max(1, min(WINDOW, steps // 2))


def noise_of_means(rewards: pandas.Series, width: int) -> float:
    """Returns the standard error of the difference of two means of `width` rewards."""
    changes = rewards.diff().dropna()  # which a trend leaves alone
    return float((changes**2).mean() / width) ** 0.5 if len(changes) else 0.0


def rewarded(history: list[Entry]) -> pandas.DataFrame:
    """Returns the logged training steps, which have a reward."""
    return pandas.DataFrame([e for e in history if e.get("reward") is not None])


def explain(history: list[Entry], max_length: int) -> list[str]:
    """Returns what a run's state means and what to do, most urgent first.

    Args:
        history: the trainer's `log_history`; before its first step nothing is said.
        max_length: of a completion, in tokens.
    """
    steps = rewarded(history)
    if steps.empty:
        return []
    width = width_of_ends(len(steps))
    first, last = (
        part.mean(numeric_only=True).dropna().to_dict()
        for part in (steps.head(width), steps.tail(width))
    )
    zero, wrong = last.get("frac_reward_zero_std", 0), last.get(ALL_WRONG, 0)
    right, clipped = last.get(ALL_RIGHT, 0), last.get(CLIPPED, 0)
    length_0, length = first.get(LENGTH, 0), last.get(LENGTH, 0)
    entropy_0 = first.get("entropy", 0)
    entropy, kl = last.get("entropy", entropy_0), last.get("kl", 0)
    skipped = int(steps.iloc[-1].dropna().get(SKIPPED, 0))
    warnings = {
        f"{wrong:.0%} of the groups are all wrong: {FLAT} Warm-start with more SFT, or "
        "take easier problems.": wrong > 0.5,
        f"{right:.0%} of the groups are all right: {FLAT} Take harder problems; there "
        "is little left to learn from these.": right > 0.5,
        f"{zero:.0%} of the groups have equal rewards: {FLAT} Sample more answers a "
        "problem, or drop problems that are always or never "
        "solved.": zero > 0.5 >= max(wrong, right),
        f"{clipped:.0%} of the answers are cut at {max_length} tokens, before their "
        "answer: raise max_completion_length, or reward shorter ones.": clipped > 0.2,
        f"Answers have shrunk from {length_0:.0f} to {length:.0f} tokens: see in the "
        "table whether they still show their working.": 0 < length < 0.5 * length_0,
        f"Entropy fell from {entropy_0:.2f} to {entropy:.2f}: answers of a group "
        "become alike, and soon nothing is left to compare. Lower the learning rate or "
        "raise the temperature.": entropy < 0.3 * entropy_0,
        f"Entropy rose from {entropy_0:.2f} to {entropy:.2f}: the text gets random. "
        "Lower the learning rate.": entropy > 2 * entropy_0 > 0,
        f"{skipped} steps were skipped because gradients overflow in fp16, where 1 to "
        f"{NORMAL_SKIPS} are normal: lower the learning rate.": skipped > NORMAL_SKIPS,
        f"KL {kl:.2f} nats a token from the start: the model has left what SFT taught "
        "it. Raise beta or lower the learning rate.": kl > 1,
    }
    noise = noise_of_means(steps["reward"], width)
    sentences = [sentence for sentence, applies in warnings.items() if applies]
    sentences += [trend(first["reward"], last["reward"], noise), held_out(history)]
    sentences.append(
        "The loss is near zero by construction (a group's advantages add up to "
        "nothing): look at the reward."
    )
    no_kl = "No KL term (beta 0): only the held-out reward tells if the model drifts."
    sentences += [no_kl] * ("kl" not in last)
    return [sentence for sentence in sentences if sentence]


def trend(first: float, last: float, noise: float) -> str:
    """Returns whether the reward rises, with regard to its noise."""
    ends, margin = f"{first:.2f} -> {last:.2f}", f"noise ±{2 * noise:.2f}"
    if abs(last - first) <= 2 * noise:
        remedy = "more steps, more answers a step, or a higher rate"
        return f"The reward is flat within its noise ({ends}, {margin}): {remedy}."
    if last > first:
        return f"The reward rises: {ends} ({margin})."
    return f"The reward falls: {ends}. Lower the learning rate; the best adapter stays."


def held_out(history: list[Entry]) -> str:
    """Returns how the held-out reward goes, empty before its second measurement."""
    points = [(e["eval_reward"], e["step"]) for e in history if "eval_reward" in e]
    if len(points) < 2:
        return ""
    (start, _), (best, step) = points[0], max(points[1:])
    if best > start:
        return f"Held-out reward {start:.3f} -> {best:.3f}, best at step {step}."
    ends = f"({start:.3f}, best since {best:.3f})"
    return f"The held-out reward has not passed its start {ends}."


def collapse(history: list[Entry]) -> str:
    """Returns why a run should stop, empty while it should go on."""
    steps = rewarded(history)
    if len(steps) < 2 * WINDOW:
        return ""
    values = steps.reindex(columns=["reward", LENGTH, CLIPPED]).fillna(0.0)
    means = values.rolling(WINDOW).mean().dropna().round(9)
    first, now, best = means.iloc[0], means.iloc[-1], means["reward"].max()
    if 0 < now[LENGTH] < SHORT * first[LENGTH]:
        return (
            f"answers collapsed from {first[LENGTH]:.0f} to {now[LENGTH]:.0f} tokens; "
            "lower the learning rate, or add a reward that short answers do not get"
        )
    noise = noise_of_means(steps["reward"], WINDOW)
    # problems differ from step to step, those held out do not
    held = [e["eval_reward"] for e in history if "eval_reward" in e] or [0.0]
    stands = held[-1] > LOST * max(held)
    lost = best - now["reward"]
    if now["reward"] < LOST * best and lost > SURE * noise and not stands:
        return (
            f"the reward collapsed from {best:.2f} to {now['reward']:.2f}; lower the "
            "learning rate, or set beta"
        )
    if now[CLIPPED] > CUT >= first[CLIPPED]:
        return (
            f"{now[CLIPPED]:.0%} of the answers run on to their limit, "
            f"{first[CLIPPED]:.0%} did at first; lower the learning rate"
        )
    return ""
