"""What GRPO's logged values mean, in sentences, and when they mean a collapse.

Pure functions of the values that TRL logs, of `history.json` therefore; the callbacks
that log, show and act are in `guards`.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any, NamedTuple

from helpers.grpo.record import ALL_RIGHT, ALL_WRONG

Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
SKIPPED = "skipped_steps"
NORMAL_SKIPS = 3  # while fp16's loss scale is found
SHORT = 0.25  # of the first length is a collapse
LOST = 0.3  # of the best reward is a collapse, where it is no noise:
SURE = 3  # standard errors
CUT = 0.9  # of the answers cut off is a collapse


class State(NamedTuple):
    """How a training goes: means over the last `WINDOW` logged steps."""

    step: int
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

    From how far rewards are from the one before, which a trend leaves alone: answers
    to one problem are alike, so a step's spread would make it look surer than it is.

    >>> noise_of_means([0.0, 1.0, 0.0, 1.0], width=2)
    0.707...

    Args:
        rewards: the mean of each logged step, in order.
        width: steps in each of the two means.
    """
    changes = [(b - a) ** 2 for a, b in itertools.pairwise(rewards)]
    return (statistics.fmean(changes) / width) ** 0.5 if changes else 0.0


def read_state(entries: list[Entry], max_length: int) -> State | None:
    """Returns the state that logged values describe, None before the first step.

    Args:
        entries: of `history.json`.
        max_length: of a completion, in tokens.
    """
    steps = [e for e in entries if e.get("reward") is not None]
    if not steps:
        return None
    width = width_of_ends(len(steps))
    first, last = steps[:width], steps[-width:]

    def mean(part: list[Entry], name: str) -> float | None:
        found = [e[name] for e in part if e.get(name) is not None]
        return sum(found) / len(found) if found else None

    return State(
        step=steps[-1].get("step", len(steps)),
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
    said = []
    s = state
    if s.all_wrong > 0.5:
        said.append(
            f"{s.all_wrong:.0%} of the groups are all wrong: they give no gradient. "
            "Warm-start with more SFT, or take easier problems."
        )
    if s.all_right > 0.5:
        said.append(
            f"{s.all_right:.0%} of the groups are all right: they give no gradient. "
            "Take harder problems; there is little left to learn from these."
        )
    if s.zero_spread > 0.5 and s.all_wrong <= 0.5 and s.all_right <= 0.5:
        said.append(
            f"{s.zero_spread:.0%} of the groups have equal rewards: they give no "
            "gradient. Sample more answers a problem, or drop problems that are "
            "always or never solved (probe_samples)."
        )
    if s.clipped > 0.2:
        said.append(
            f"{s.clipped:.0%} of the answers are cut at {s.max_length} tokens, before "
            "their answer: raise max_completion_length, or reward shorter ones."
        )
    if 0 < s.length < 0.5 * s.length_first:
        said.append(
            f"Answers have shrunk from {s.length_first:.0f} to {s.length:.0f} tokens: "
            "see in the table whether they still show their working."
        )
    if s.entropy is not None and s.entropy_first:
        if s.entropy < 0.3 * s.entropy_first:
            said.append(
                f"Entropy fell from {s.entropy_first:.2f} to {s.entropy:.2f}: answers "
                "of a group become alike, and soon nothing is left to compare. Lower "
                "the learning rate or raise the temperature."
            )
        elif s.entropy > 2 * s.entropy_first:
            said.append(
                f"Entropy rose from {s.entropy_first:.2f} to {s.entropy:.2f}: the text "
                "gets random. Lower the learning rate."
            )
    if s.skipped > NORMAL_SKIPS:
        said.append(
            f"{s.skipped} steps were skipped because gradients overflow in fp16, "
            f"where 1 to {NORMAL_SKIPS} are normal: lower the learning rate."
        )
    if s.kl is not None and s.kl > 1:
        said.append(
            f"KL {s.kl:.2f} nats a token from the start: the model has left what SFT "
            "taught it. Raise beta or lower the learning rate."
        )
    said += [trend(s), *held_out(s)]
    said.append(
        "The loss is near zero by construction (a group's advantages add up to "
        "nothing): look at the reward."
    )
    if s.kl is None:
        said.append(
            "No KL term (beta 0): only the held-out reward tells whether the model "
            "drifts."
        )
    return said


def trend(state: State) -> str:
    """Returns whether the reward rises, with regard to its noise."""
    change = state.reward - state.reward_first
    ends = f"{state.reward_first:.2f} -> {state.reward:.2f}"
    if abs(change) <= 2 * state.noise:
        return (
            f"The reward is flat within its noise ({ends}, noise "
            f"±{2 * state.noise:.2f}): more steps, more answers a step, or a higher "
            "rate."
        )
    if change > 0:
        return f"The reward rises: {ends} (noise ±{2 * state.noise:.2f})."
    return (
        f"The reward falls: {ends}. Lower the learning rate; the best adapter is kept."
    )


def held_out(state: State) -> list[str]:
    """Returns a sentence on the held-out reward, none before its second measurement."""
    if len(state.held_out) < 2:
        return []
    (_, start), *later = state.held_out
    step, best = max(later, key=lambda point: (point[1], point[0]))
    if best > start:
        return [f"Held-out reward {start:.3f} -> {best:.3f}, best at step {step}."]
    return [
        f"The held-out reward has not passed its start ({start:.3f}, best since "
        f"{best:.3f})."
    ]


def collapse(entries: list[Entry]) -> str:
    """Returns why a training should stop, empty while it should go on.

    Length or reward have collapsed when their mean over `WINDOW` logged steps is a
    fraction of what it was, or nearly all answers are cut. The reward's fall has to be
    beyond its noise and, where a held-out reward is measured, to be in that as well:
    problems differ from step to step, the held-out ones do not.
    """
    steps = [e for e in entries if e.get("reward") is not None]
    if len(steps) < 2 * WINDOW:
        return ""
    names = ("completions/mean_length", "reward", "completions/clipped_ratio")
    windows = {
        name: [
            statistics.fmean(e.get(name) or 0.0 for e in steps[i : i + WINDOW])
            for i in range(len(steps) - WINDOW + 1)
        ]
        for name in names
    }
    length, reward, clipped = (windows[name] for name in names)
    if 0 < length[-1] < SHORT * length[0]:
        return (
            f"answers collapsed from {length[0]:.0f} to {length[-1]:.0f} tokens; lower "
            "the learning rate, or add a reward that short answers do not get"
        )
    noise = noise_of_means([e["reward"] for e in steps], WINDOW)
    best, now = max(reward), reward[-1]
    held = [e["eval_reward"] for e in entries if "eval_reward" in e] or [0.0]
    stands = held[-1] > LOST * max(held)
    if now < LOST * best and best - now > SURE * noise and not stands:
        return (
            f"the reward collapsed from {best:.2f} to {now:.2f}; lower the learning "
            "rate, or set beta"
        )
    if clipped[-1] > CUT and clipped[0] <= CUT:
        return (
            f"{clipped[-1]:.0%} of the answers run on to their limit, {clipped[0]:.0%} "
            "did at first; lower the learning rate"
        )
    return ""
