"""What GRPO's logged values mean, in sentences, and when they mean a collapse.

Pure functions of the trainer's `log_history`; the callbacks that log, show and act are
in `monitor`.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any, NamedTuple

from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG

Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
SKIPPED = "skipped_steps"
NORMAL_SKIPS = 3  # while fp16's loss scale is found
# a collapse: a share of the first length, of the best reward (beyond so many standard
# errors), and of the answers cut off
SHORT, LOST, SURE, CUT = 0.25, 0.3, 3, 0.9


class State(NamedTuple):
    """How a run goes: means over the last `WINDOW` logged steps, and over the first."""

    reward: float
    reward_first: float
    noise: float
    """Standard error of the difference of these two means."""
    zero_spread: float
    all_wrong: float
    all_right: float
    length: float
    length_first: float
    clipped: float
    entropy: float | None
    entropy_first: float | None
    kl: float | None
    skipped: int
    held_out: list[tuple[int, float]]
    """Step and mean reward of each held-out evaluation."""
    max_length: int


def width_of_ends(steps: int) -> int:
    """Returns over how many logged steps the first and the last rewards are averaged.

    >>> width_of_ends(3), width_of_ends(100)
    (1, 10)
    """
    return max(1, min(WINDOW, steps // 2))


def noise_of_means(rewards: list[float], width: int) -> float:
    """Returns the standard error of the difference of two means of rewards.

    From the changes between neighbouring steps, which a trend leaves alone: answers to
    one problem are alike, so a step's spread would make it look surer than it is.

    Args:
        rewards: the mean of each logged step, in order.
        width: steps in each of the two means.
    """
    changes = [(b - a) ** 2 for a, b in itertools.pairwise(rewards)]
    return (statistics.fmean(changes) / width) ** 0.5 if changes else 0.0


def read_state(entries: list[Entry], max_length: int) -> State | None:
    """Returns the state that logged values describe, None before the first step.

    Args:
        entries: the trainer's `log_history`.
        max_length: of a completion, in tokens.
    """
    steps = [e for e in entries if e.get("reward") is not None]
    if not steps:
        return None
    width = width_of_ends(len(steps))
    first, last = steps[:width], steps[-width:]

    def mean(part: list[Entry], name: str) -> float | None:
        values = [e[name] for e in part if e.get(name) is not None]
        return sum(values) / len(values) if values else None

    return State(
        reward=mean(last, "reward") or 0.0,
        reward_first=mean(first, "reward") or 0.0,
        noise=noise_of_means([e["reward"] for e in steps], width),
        zero_spread=mean(last, "frac_reward_zero_std") or 0.0,
        all_wrong=mean(last, ALL_WRONG) or 0.0,
        all_right=mean(last, ALL_RIGHT) or 0.0,
        length=mean(last, "completions/mean_length") or 0.0,
        length_first=mean(first, "completions/mean_length") or 0.0,
        clipped=mean(last, "completions/clipped_ratio") or 0.0,
        entropy=mean(last, "entropy"),
        entropy_first=mean(first, "entropy"),
        kl=mean(last, "kl"),
        skipped=int(steps[-1].get(SKIPPED, 0)),
        held_out=[(e["step"], e["eval_reward"]) for e in entries if "eval_reward" in e],
        max_length=max_length,
    )


def explain(state: State) -> list[str]:
    """Returns what a state means and what to do, a sentence each, most urgent first."""
    s, kl, flat = state, state.kl or 0.0, "they give no gradient."
    entropy_first = s.entropy_first or 0.0
    entropy = entropy_first if s.entropy is None else s.entropy
    mixed = s.all_wrong <= 0.5 and s.all_right <= 0.5
    sentences = {
        f"{s.all_wrong:.0%} of the groups are all wrong: {flat} Warm-start with more "
        "SFT, or take easier problems.": s.all_wrong > 0.5,
        f"{s.all_right:.0%} of the groups are all right: {flat} Take harder problems; "
        "there is little left to learn from these.": s.all_right > 0.5,
        f"{s.zero_spread:.0%} of the groups have equal rewards: {flat} Sample more "
        "answers a problem, or drop problems that are always or never "
        "solved.": s.zero_spread > 0.5 and mixed,
        f"{s.clipped:.0%} of the answers are cut at {s.max_length} tokens, before "
        "their answer: raise max_completion_length, or reward shorter "
        "ones.": s.clipped > 0.2,
        f"Answers have shrunk from {s.length_first:.0f} to {s.length:.0f} tokens: see "
        "in the table whether they still show their "
        "working.": 0 < s.length < 0.5 * s.length_first,
        f"Entropy fell from {entropy_first:.2f} to {entropy:.2f}: answers of a group "
        "become alike, and soon nothing is left to compare. Lower the learning rate "
        "or raise the temperature.": entropy < 0.3 * entropy_first,
        f"Entropy rose from {entropy_first:.2f} to {entropy:.2f}: the text gets "
        "random. Lower the learning rate.": entropy > 2 * entropy_first > 0,
        f"{s.skipped} steps were skipped because gradients overflow in fp16, where 1 "
        f"to {NORMAL_SKIPS} are normal: lower the learning "
        "rate.": s.skipped > NORMAL_SKIPS,
        f"KL {kl:.2f} nats a token from the start: the model has left what SFT taught "
        "it. Raise beta or lower the learning rate.": kl > 1,
        trend(state): True,
        held_out(state): len(s.held_out) > 1,
        "The loss is near zero by construction (a group's advantages add up to "
        "nothing): look at the reward.": True,
        "No KL term (beta 0): only the held-out reward tells whether the model "
        "drifts.": s.kl is None,
    }
    return [sentence for sentence, applies in sentences.items() if applies]


def trend(state: State) -> str:
    """Returns whether the reward rises, with regard to its noise."""
    change, noise = state.reward - state.reward_first, f"±{2 * state.noise:.2f}"
    ends = f"{state.reward_first:.2f} -> {state.reward:.2f}"
    if abs(change) <= 2 * state.noise:
        remedy = "more steps, more answers a step, or a higher rate"
        return f"The reward is flat within its noise ({ends}, noise {noise}): {remedy}."
    if change > 0:
        return f"The reward rises: {ends} (noise {noise})."
    return f"The reward falls: {ends}. Lower the learning rate; the best adapter stays."


def held_out(state: State) -> str:
    """Returns how the held-out reward goes, empty before its second measurement."""
    if len(state.held_out) < 2:
        return ""
    (_, start), *later = state.held_out
    step, best = max(later, key=lambda point: (point[1], point[0]))
    if best > start:
        return f"Held-out reward {start:.3f} -> {best:.3f}, best at step {step}."
    return (
        f"The held-out reward has not passed its start ({start:.3f}, best since "
        f"{best:.3f})."
    )


def collapse(entries: list[Entry]) -> str:
    """Returns why a run should stop, empty while it should go on.

    Length or reward have collapsed when their mean over `WINDOW` logged steps is a
    fraction of what it was, or nearly all answers are cut. The reward's fall has to be
    beyond its noise and, where a held-out reward is measured, to be in that as well:
    problems differ from step to step, the held-out ones do not.
    """
    steps = [e for e in entries if e.get("reward") is not None]
    if len(steps) < 2 * WINDOW:
        return ""

    def windows(name: str) -> list[float]:
        values = [e.get(name) or 0.0 for e in steps]
        starts = range(len(values) - WINDOW + 1)
        return [statistics.fmean(values[i : i + WINDOW]) for i in starts]

    length = windows("completions/mean_length")
    if 0 < length[-1] < SHORT * length[0]:
        return (
            f"answers collapsed from {length[0]:.0f} to {length[-1]:.0f} tokens; lower "
            "the learning rate, or add a reward that short answers do not get"
        )
    reward = windows("reward")
    best, now = max(reward), reward[-1]
    noise = noise_of_means([e["reward"] for e in steps], WINDOW)
    held = [e["eval_reward"] for e in entries if "eval_reward" in e] or [0.0]
    stands = held[-1] > LOST * max(held)
    if now < LOST * best and best - now > SURE * noise and not stands:
        return (
            f"the reward collapsed from {best:.2f} to {now:.2f}; lower the learning "
            "rate, or set beta"
        )
    clipped = windows("completions/clipped_ratio")
    if clipped[-1] > CUT and clipped[0] <= CUT:
        return (
            f"{clipped[-1]:.0%} of the answers run on to their limit, {clipped[0]:.0%} "
            "did at first; lower the learning rate"
        )
    return ""
