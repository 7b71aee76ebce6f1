"""Watches a GRPO run: its clock, what its logged values mean, when it collapses."""

import logging
import math
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pandas
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import TrainerCallback

from helpers.config import complete
from helpers.files import read_json, write_json
from helpers.grpo.rewards import ALL_RIGHT, ALL_WRONG
from helpers.runs import Run
from helpers.training.inputs import Panel

log = logging.getLogger(__name__)
ENDLESS = 100_000  # steps, for a run that ends by the clock
Entry = dict[str, Any]
WINDOW = 10  # logged steps that are averaged before they are judged
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
COLUMNS = ["reward", "frac_reward_zero_std", ALL_WRONG, ALL_RIGHT, CLIPPED, LENGTH]
COLUMNS += ["entropy", "kl", "skipped_steps"]


class Clock(TrainerCallback):
    """Ends a run when its minutes are used, with an evaluation and a checkpoint.

    Evaluations, and the learning rate after its warm-up, go by the share of the time
    that is used. A killed session's time counts.

    Args:
        folder, minutes: of the stage; with None for minutes it does nothing.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.path, self.reason = folder / "clock.json", ""
        self.total_s = 60 * (minutes or 0)
        self.used_s: float = read_json(self.path).get("used_s", 0.0)  # in all sessions
        self.evaluated_s, self.evaluation_s, self.last = self.used_s, 0.0, 0.0
        self.step_s: list[float] = []

    def on_train_begin(self, args: Any, *_: Any, **more: Any) -> None:
        self.last = time.monotonic()
        scheduler: Any = more.get("lr_scheduler")
        scheduler = getattr(scheduler, "scheduler", scheduler)  # in accelerate's
        rates = getattr(scheduler, "lr_lambdas", []) if self.total_s else []
        rates[:] = [partial(self.timed_rate, rate, args.warmup_steps) for rate in rates]

    def timed_rate(self, rate: Any, warmup: float, step: int) -> float:
        passed = min(1.0, self.used_s / self.total_s) * ENDLESS
        return rate(step if 1 <= warmup >= step else max(warmup, passed))

    def lap(self) -> float:
        began, self.last = self.last, time.monotonic()
        self.used_s += self.last - began
        return self.last - began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.total_s:
            return
        self.step_s.append(self.lap())
        next_s = mean(self.step_s[1:][-5:] or self.step_s)  # the first step compiles
        left_s, step = self.total_s - self.used_s, state.global_step
        minutes = f"{self.total_s / 60:g} minutes"
        if len(self.step_s) == 2:
            steps = step + max(0, int(left_s / next_s))
            text = f"{next_s:.1f} s a step: about {steps} steps fit into {minutes}"
            log.info(f"{text}, less what evaluations take")
        measures = args.eval_strategy != "no"
        # eight evaluations, besides the first, in a fifth of the time at most
        every_s = max(self.total_s / 8, self.evaluation_s * 5)
        is_due = measures and self.used_s - self.evaluated_s >= every_s
        is_over = left_s <= self.evaluation_s * measures + next_s / 2
        # each process has its own clock: the main one's counts
        is_due, is_over = broadcast_object_list([is_due, is_over])
        if is_due or is_over:
            control.should_evaluate, self.evaluated_s = measures, self.used_s
        if is_over:
            control.should_training_stop = control.should_save = True
            state.max_steps = step  # after a kill there is nothing to redo
            self.reason = f"step {step}: {minutes} of grpo_minutes are used"
            log.info(self.reason)
        if state.is_world_process_zero:
            write_json(self.path, {"used_s": round(self.used_s, 2)})

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluation_s = self.lap()


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


class LivePanel(Panel):
    """Shows the diagnostics of a run in training, and stops one that collapses."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.path / "grpo")
        self.run, self.reason = run, ""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        fault = collapse(state.log_history)
        if fault and not self.reason:
            self.reason = f"stopped at step {state.global_step}: {fault}"
            log.info(self.reason)
            control.should_training_stop = True
        super().on_log(args, state, control)

    def report(self, history: list[Entry]) -> dict[str, Any]:
        rewards = [entry["reward"] for entry in history if "reward" in entry]
        ends = width_of_ends(len(rewards))
        return {
            "reward_first": round(mean(rewards[:ends]), 4),
            "reward_last": round(mean(rewards[-ends:]), 4),
            "reward_averaged_over_steps": ends,
            "prompts_left_out": read_json(self.folder / "prompts.json").get("left_out"),
            "sampler": read_json(self.folder / "sampler.json").get("name"),
        }

    def title(self, state: Any) -> str:
        if state.max_steps < ENDLESS:
            return super().title(state)
        used_s = read_json(self.folder / "clock.json").get("used_s", 0.0)
        left_s = max(0.0, 60 * (self.run.config.grpo_minutes or 0) - used_s)
        return f"step {state.global_step}, {tqdm.format_interval(left_s)} left"

    def explain(self, history: list[Entry]) -> list[str]:
        return explain(history)

    def page(self) -> str:
        return read_group(self.run).to_html(index=False)


def read_group(run: Run, step: int | None = None) -> pandas.DataFrame:
    """Returns a group of sampled answers, best first, from what TRL logged.

    Columns: `prompt`, `completion`, each reward, `advantage`, and `reward`, the
    weighted sum of the config's. Of a step's groups it is the one of the largest spread
    of rewards; empty where nothing is logged yet.

    Args:
        run, step: in training, or trained; by default the last step that was logged.
    """
    name = "*" if step is None else f"*_{step:05d}"
    files = sorted((run.path / "grpo/checkpoints/completions").glob(f"{name}.parquet"))
    frame = pandas.read_parquet(files[-1]) if files else pandas.DataFrame()
    if frame.empty:
        return frame
    paid = frame.reindex(columns=[*run.config.rewards]).astype(float).fillna(0.0)
    frame["reward"] = paid.dot(pandas.Series(run.config.rewards)).round(4)
    groups = frame.index // complete(run.config, "grpo")["num_generations"]
    widest = frame["reward"].groupby(groups).agg(lambda r: r.max() - r.min()).idxmax()
    return frame[groups == widest].sort_values("reward", ascending=False)
