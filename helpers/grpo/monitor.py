"""Callbacks that watch a GRPO run, show how it goes, and stop it with a reason."""

from __future__ import annotations

import base64
import html
import io
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from helpers.config import complete
from helpers.grpo import diagnostics
from helpers.runs import Run, write_json
from helpers.training.inputs import draw_diagnostics, read_note

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

SHOW_S = 10.0  # between two drawings of the panel
ENDLESS = 100_000  # steps, for a run that ends by the clock
EVALUATIONS = 8  # of a run that ends by the clock, besides the first
EVALUATION_SHARE = 0.2  # of the time, at most
FEW = 20  # steps below which GRPO has hardly begun


class Clock(TrainerCallback):
    """Ends a run when its minutes are used, with an evaluation and a checkpoint.

    Its first steps tell how many fit; it stops where one more would end further from
    the minutes than none. Evaluations, and the learning rate after its warm-up, go by
    the share of the time that is used. A killed session's time counts (`clock.json`).

    Args:
        folder: of the stage.
        minutes: None does nothing.
        clock: the seconds of some clock.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.clock = folder / "clock.json", clock
        self.total_s = 60 * (minutes or 0)
        note = read_note(self.path)
        self.before: float = note.get("used_s", 0.0)
        self.planned: int | None = note.get("planned_steps")
        self.started = self.last = clock()
        self.step_s: list[float] = []
        self.evaluation_s = self.evaluated_s = self.warm = 0.0
        self.reason = ""

    @property
    def used_s(self) -> float:
        """Seconds used so far, in all sessions."""
        return self.before + self.clock() - self.started

    def lap(self) -> float:
        """Returns the seconds since it was last called."""
        now = self.clock()
        passed, self.last = now - self.last, now
        return passed

    def on_train_begin(self, args: Any, state: Any, *_: Any, **more: Any) -> None:
        self.started, self.evaluated_s = self.clock(), self.before
        self.lap()
        scheduler: Any = more.get("lr_scheduler")
        scheduler = getattr(scheduler, "scheduler", scheduler)
        if self.total_s and hasattr(scheduler, "lr_lambdas"):
            warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else 0
            scheduler.lr_lambdas = [
                lambda step, rate=rate: rate(self.scheduled(step, warmup))
                for rate in scheduler.lr_lambdas
            ]

    def scheduled(self, step: int, warmup: int) -> float:
        """Returns the step of a schedule of ENDLESS steps where a real step stands."""
        share = self.used_s / self.total_s
        if share >= 1:
            return ENDLESS
        if step <= warmup:
            self.warm = share
            return step
        passed = (share - self.warm) / (1 - self.warm)
        return warmup + passed * (ENDLESS - warmup)

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.lap()
        if self.planned:  # a count to show; the clock ends the run
            state.max_steps = max(self.planned, state.global_step + 2)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self.total_s:
            return
        self.step_s.append(self.lap())
        recent = self.step_s[1:][-5:] or self.step_s  # the first step compiles
        next_s, left_s = sum(recent) / len(recent), self.total_s - self.used_s
        evaluates = args.eval_strategy != "no"
        every_s = max(self.total_s / EVALUATIONS, self.evaluation_s / EVALUATION_SHARE)
        if self.planned is None and len(self.step_s) == 2:
            training_s = left_s * (1 - self.evaluation_s / every_s)
            self.planned = state.global_step + max(0, int(training_s / next_s))
            few = "; so few show that it works, a gain takes more"
            log.info(
                f"{next_s:.1f} s a step: about {self.planned} steps fit into "
                f"{self.total_s / 60:g} minutes" + few * (self.planned < FEW)
            )
        is_due, is_over = agree(
            evaluates and self.used_s - self.evaluated_s >= every_s,
            left_s <= self.evaluation_s * evaluates + next_s / 2,
        )
        if is_due or is_over:
            control.should_evaluate, self.evaluated_s = evaluates, self.used_s
        if is_over:
            control.should_training_stop = control.should_save = True
            state.max_steps = state.global_step  # after a kill there is nothing to redo
            self.reason = (
                f"ended at step {state.global_step}: the {self.total_s / 60:g} minutes "
                f"of grpo_minutes are used, at {next_s:.1f} s a step"
            )
            log.info(self.reason)
        self.note(state)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluation_s = self.lap()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.lap()

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.note(state)

    def note(self, state: TrainerState) -> None:
        """Writes what is used, for a session after a kill."""
        if state.is_world_process_zero and self.total_s:
            note = {"used_s": round(self.used_s, 2), "planned_steps": self.planned}
            write_json(self.path, note)

    def report(self, history: list[diagnostics.Entry]) -> dict[str, Any]:
        """Returns the planned steps, where there are minutes."""
        return {"planned_steps": self.planned} if self.planned else {}


def agree(*values: bool) -> tuple[bool, ...]:
    """Returns the main process's values in all processes: each has its own clock."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return values
    from accelerate.utils import broadcast_object_list

    return tuple(broadcast_object_list(list(values)))


class LivePanel(TrainerCallback):
    """Shows the diagnostics while training: in a notebook in place, else as text.

    Counts the steps that fp16 skipped among what is logged, so it comes before what
    keeps or tracks the logs. At the end the picture is saved as `diagnostics.png`.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.clock = run, clock
        self.shown, self.started = float("-inf"), clock()
        self.told: set[str] = set()
        self.skipped = 0
        self.handle: Any = None

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        counts = [entry.get(diagnostics.SKIPPED, 0) for entry in state.log_history]
        self.skipped = max(counts, default=0)
        self.handle, self.started = open_display(), self.clock()

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))

    def on_log(
        self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any
    ) -> None:
        if "reward" in logs:
            for entry in (logs, state.log_history[-1]):
                entry[diagnostics.SKIPPED] = self.skipped
        if state.is_world_process_zero and self.clock() - self.shown >= SHOW_S:
            self.show(args, state)

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            self.show(args, state, last=True)
            path = self.run.path / "grpo" / "diagnostics.png"
            draw_diagnostics(state.log_history, path)

    def report(self, history: list[diagnostics.Entry]) -> dict[str, Any]:
        """Returns the stage's own values of `report.json`."""
        rewards = [entry["reward"] for entry in history if "reward" in entry]
        ends = diagnostics.width_of_ends(len(rewards))
        folder = self.run.path / "grpo"
        return {
            "reward_first": round(sum(rewards[:ends]) / ends, 4),
            "reward_last": round(sum(rewards[-ends:]) / ends, 4),
            "reward_averaged_over_steps": ends,
            "prompts_left_out": read_note(folder / "prompts.json")["left_out"],
            "sampler": read_note(folder / "sampler.json")["name"],
        }

    def show(self, args: Any, state: TrainerState, last: bool = False) -> None:
        """Draws the panel in its place; as text, what is new, and all at the end."""
        self.shown, entries = self.clock(), state.log_history
        now = diagnostics.read_state(entries, args.max_completion_length)
        sentences = diagnostics.explain(now) if now else []
        end = f" of {state.max_steps}" if state.max_steps < ENDLESS else ""
        minutes = (self.shown - self.started) / 60
        title = f"step {state.global_step}{end}, {minutes:.1f} minutes"
        group = read_group(self.run)
        if self.handle is None:
            new = [s for s in sentences if last or s not in self.told]
            self.told.update(new)
            log.info("\n".join([title, *(new if last else new[:1])]))
            if last:
                log.info(group.to_string(index=False, max_colwidth=60))
            return
        from IPython.display import HTML

        picture = io.BytesIO()
        draw_diagnostics(entries).savefig(picture, dpi=64)
        data = base64.b64encode(picture.getvalue()).decode()
        page = f'<b>{title}</b><br><img src="data:image/png;base64,{data}">'
        page += "".join(f"<li>{html.escape(s)}</li>" for s in sentences)
        self.handle.update(HTML(page + group.to_html(index=False)))


def read_group(run: Run, step: int | None = None) -> DataFrame:
    """Returns a group of sampled answers, best first, from what TRL logged.

    Columns: `prompt`, `completion`, each reward, `advantage`, and `reward`, the
    weighted sum. Empty before the first logged step.

    Args:
        run: in training, or trained.
        step: of training, or the next that was logged; by default the last. Of its
            groups, the one with the largest spread of rewards is returned.
    """
    import pandas

    files = (run.path / "grpo" / "checkpoints" / "completions").glob("*.parquet")
    steps = {int(path.stem.rpartition("_")[2]): path for path in files}
    frame = pandas.DataFrame()
    if steps:
        later = [n for n in steps if step is not None and n >= step]
        frame = pandas.read_parquet(steps[min(later, default=max(steps))])
    if frame.empty:
        return frame
    weights = run.config.rewards
    frame["reward"] = sum(frame[n].fillna(0) * w for n, w in weights.items()).round(4)
    groups = frame.index // complete(run.config, "grpo")["num_generations"]
    rewards = frame["reward"].groupby(groups)
    widest = (rewards.max() - rewards.min()).idxmax()
    return frame[groups == widest].sort_values("reward", ascending=False)


def open_display() -> Any:
    """Returns a handle to something shown in this notebook, None outside of one."""
    from IPython import get_ipython
    from IPython.display import HTML, display

    if not hasattr(get_ipython(), "kernel"):
        return None
    return display(HTML("waiting for the first step"), display_id=True)


class CollapseGuard(TrainerCallback):
    """Stops a run whose answers or rewards collapse, see `diagnostics.collapse`."""

    def __init__(self) -> None:
        self.reason = ""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        fault = diagnostics.collapse(state.log_history)
        if fault and not self.reason:
            self.reason = f"stopped at step {state.global_step}: {fault}"
            log.info(self.reason)
            control.should_training_stop = True
        return control
