"""How many GRPO steps fit into the minutes that are given.

`grpo.make_plan` times real steps on this machine; `guards.TimeBudget` ends the training
cleanly should the machine get slower than that.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.estimate import count_steps, step_rows
from helpers.evaluation.results import Table
from helpers.runs import write_json

if TYPE_CHECKING:
    from helpers.config import RunConfig, complete

USED = "budget.json"
PLAN = "plan.json"
FEW = 20  # steps below which GRPO has hardly begun
EVALUATIONS = 8  # over the whole run, besides the one before the first step
EVALUATION_SHARE = 0.2  # of the time, at most
TARGET = 0.97  # of the time is planned: checkpoints and plots take some, too


class Timing(NamedTuple):
    """What a probe took on this machine."""

    step_s: float
    """An optimiser step: sampling, rewards and update."""
    evaluation_s: float
    """One held-out evaluation."""
    spent_s: float
    """The whole probe, which counts as used."""
    longest: int = 0
    """Tokens of the longest answer that was sampled."""


class Plan(NamedTuple):
    """A number of steps that fits into the time, and what they cost."""

    minutes: float
    steps: int
    eval_steps: int
    timing: Timing

    @property
    def seconds(self) -> float:
        """The predicted time of probe, steps and evaluations."""
        evaluations = 1 + math.ceil(self.steps / self.eval_steps)
        t = self.timing
        return t.spent_s + self.steps * t.step_s + evaluations * t.evaluation_s


def plan(minutes: float, timing: Timing) -> Plan:
    """Returns the most steps that fit into the minutes, with their evaluations.

    >>> plan(10, Timing(step_s=5, evaluation_s=2, spent_s=30))[1:3]
    (106, 14)
    >>> plan(0.1, Timing(step_s=5, evaluation_s=2, spent_s=30))[1:3]
    (1, 1)

    Args:
        minutes: for the stage, without loading the model.
        timing: of this machine.
    """
    free_s = 60 * TARGET * minutes - timing.spent_s - timing.evaluation_s
    evaluations = EVALUATIONS
    if timing.evaluation_s > 0:
        affordable = int(EVALUATION_SHARE * free_s / timing.evaluation_s)
        evaluations = max(1, min(EVALUATIONS, affordable))
    free_s -= evaluations * timing.evaluation_s
    steps = max(1, int(free_s / timing.step_s))
    return Plan(minutes, steps, math.ceil(steps / evaluations), timing)


def table(made: Plan | None, config: RunConfig, prompts: int) -> Table:
    """Returns a plan in words: what fits into the time, and what a step holds.

    Args:
        made: the plan; None where the config counts steps, not minutes.
        config: that it was made for.
        prompts: to train on.
    """
    values = complete(config, "grpo")
    answers, size = step_rows(config, "grpo"), values["num_generations"]
    steps = made.steps if made else count_steps(config, "grpo", prompts) or 0
    seen = steps * answers // size
    rows = {
        "steps": f"{steps}, with {seen} prompts drawn from {prompts}",
        "a step": f"{answers // size} prompts, {size} answers each",
        "answers": f"at most {values['max_completion_length']} tokens",
        "held out": f"{config.grpo_held_out} problems",
    }
    if made is None:
        rows["time"] = "as long as it takes; set grpo_minutes to plan for a time"
    else:
        t = made.timing
        rows["a step"] += f", {t.step_s:.1f} s"
        rows["answers"] += f"; the longest sampled has {t.longest}"
        rows["held out"] += f" every {made.eval_steps} steps, {t.evaluation_s:.1f} s"
        rows["time"] = (
            f"{made.seconds / 60:.1f} of {made.minutes:g} minutes, of which the probe "
            f"took {t.spent_s:.0f} s"
        )
    if steps < FEW:
        rows["too few?"] = f"{steps} show that it works; a gain takes more"
    return Table(["plan", ""], [[name, text] for name, text in rows.items()])


def write_plan(folder: Path, made: Plan) -> None:
    """Keeps a plan in a stage's folder, and counts its probe as used time."""
    values = {**made._asdict(), "timing": made.timing._asdict()}
    write_json(folder / PLAN, values)
    write_json(folder / USED, {"used_s": made.timing.spent_s})


def read_used(folder: Path) -> float:
    """Returns the seconds that a stage has used already, in sessions before this."""
    path = folder / USED
    if not path.exists():
        return 0.0
    return json.loads(path.read_text(encoding="utf-8"))["used_s"]


def agreed(value: Any) -> Any:
    """Returns the main process's value in all processes: each has its own clock."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def read_plan(folder: Path) -> Plan | None:
    """Returns the plan that a stage's folder keeps, None when there is none."""
    path = folder / PLAN
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**{**values, "timing": Timing(**values["timing"])})
