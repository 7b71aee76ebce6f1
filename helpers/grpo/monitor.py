"""Callbacks that watch a GRPO run, show how it goes, and stop it with a reason."""

from __future__ import annotations

import base64
import html
import io
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from helpers.config import complete
from helpers.files import read_json, write_json
from helpers.grpo import diagnostics
from helpers.runs import Run
from helpers.training.inputs import draw_diagnostics

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

SHOW_S = 10.0  # between two drawings of the panel
ENDLESS = 100_000  # steps, for a run that ends by the clock
EVALUATIONS = 8  # of a run that ends by the clock, besides the first
EVALUATION_SHARE = 0.2  # of the time, at most


class Clock(TrainerCallback):
    """Ends a run when its minutes are used, with an evaluation and a checkpoint.

    Evaluations, and the learning rate after its warm-up, go by the share of the time
    that is used. A killed session's time counts.

    Args:
        folder: of the stage.
        minutes: None does nothing.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.path, self.reason = folder / "clock.json", ""
        self.total_s = 60 * (minutes or 0)
        self.before: float = read_json(self.path).get("used_s", 0.0)
        self.started = self.last = time.monotonic()
        self.step_s: list[float] = []
        self.evaluation_s, self.evaluated_s = 0.0, self.before

    @property
    def used_s(self) -> float:
        """Seconds used so far, in all sessions."""
        return self.before + time.monotonic() - self.started

    def on_train_begin(self, args: Any, *_: Any, **more: Any) -> None:
        self.started = time.monotonic()
        scheduler: Any = more.get("lr_scheduler")
        scheduler = getattr(scheduler, "scheduler", scheduler)  # in accelerate's
        if self.total_s and hasattr(scheduler, "lr_lambdas"):
            rates = scheduler.lr_lambdas
            place = partial(self.scheduled, warmup=args.warmup_steps)
            scheduler.lr_lambdas = [lambda n, r=rate: r(place(n)) for rate in rates]

    def scheduled(self, step: int, warmup: float) -> float:
        """Returns the step of a schedule of ENDLESS steps where a real step stands."""
        passed = min(1.0, self.used_s / self.total_s) * ENDLESS
        return step if 1 <= warmup >= step else max(warmup, passed)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        from accelerate.utils import broadcast_object_list

        if not self.total_s:
            return
        began, self.last = self.last, time.monotonic()
        self.step_s.append(self.last - began)
        recent = self.step_s[1:][-5:] or self.step_s  # the first step compiles
        next_s, left_s = sum(recent) / len(recent), self.total_s - self.used_s
        measures, minutes = args.eval_strategy != "no", f"{self.total_s / 60:g} minutes"
        every_s = max(self.total_s / EVALUATIONS, self.evaluation_s / EVALUATION_SHARE)
        if len(self.step_s) == 2:
            steps = state.global_step + max(0, int(left_s / next_s))
            text = f"{next_s:.1f} s a step: about {steps} steps fit into {minutes}"
            log.info(f"{text}, less what evaluations take")
        is_due = measures and self.used_s - self.evaluated_s >= every_s
        is_over = left_s <= self.evaluation_s * measures + next_s / 2
        # each process has its own clock: the main one's counts
        is_due, is_over = broadcast_object_list([is_due, is_over])
        if is_due or is_over:
            control.should_evaluate, self.evaluated_s = measures, self.used_s
        if is_over:
            control.should_training_stop = control.should_save = True
            state.max_steps = state.global_step  # after a kill there is nothing to redo
            end = f"ended at step {state.global_step}: the {minutes} of grpo_minutes"
            self.reason = f"{end} are used, at {next_s:.1f} s a step"
            log.info(self.reason)
        if state.is_world_process_zero:
            write_json(self.path, {"used_s": round(self.used_s, 2)})

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluation_s = time.monotonic() - self.last


class LivePanel(TrainerCallback):
    """Shows the diagnostics while training, and stops a run that collapses.

    In a notebook in place, else as text. Counts the steps that fp16 skipped in the
    trainer's log history.

    Args:
        run: in training.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.reason, self.skipped = run, "", 0
        self.shown, self.started = float("-inf"), time.monotonic()
        self.handle: Any = None

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        from IPython import get_ipython
        from IPython.display import HTML, display

        counts = [entry.get(diagnostics.SKIPPED, 0) for entry in state.log_history]
        self.skipped, self.started = max(counts, default=0), time.monotonic()
        if hasattr(get_ipython(), "kernel"):
            self.handle = display(HTML("waiting for the first step"), display_id=True)

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any, **_: Any
    ) -> None:
        if "reward" in logs:
            for entry in (logs, state.log_history[-1]):
                entry[diagnostics.SKIPPED] = self.skipped
        fault = diagnostics.collapse(state.log_history)
        if fault and not self.reason:
            self.reason = f"stopped at step {state.global_step}: {fault}"
            log.info(self.reason)
            control.should_training_stop = True
        if state.is_world_process_zero and time.monotonic() - self.shown >= SHOW_S:
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
            "prompts_left_out": read_json(folder / "prompts.json")["left_out"],
            "sampler": read_json(folder / "sampler.json")["name"],
        }

    def show(self, args: Any, state: TrainerState, last: bool = False) -> None:
        """Draws the panel in its place; as text the most urgent, and all at the end."""
        self.shown, history = time.monotonic(), state.log_history
        sentences = diagnostics.explain(history, args.max_completion_length)
        end = f" of {state.max_steps}" if state.max_steps < ENDLESS else ""
        minutes = (self.shown - self.started) / 60
        title = f"step {state.global_step}{end}, {minutes:.1f} minutes"
        group = read_group(self.run)
        if self.handle is None:
            log.info("\n".join([title, *sentences[: None if last else 1]]))
            if last:
                log.info(group.to_string(index=False, max_colwidth=60))
            return
        from IPython.display import HTML

        picture = io.BytesIO()
        draw_diagnostics(history).savefig(picture, dpi=64)
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
    later = [n for n in steps if step is not None and n >= step]
    file = steps.get(min(later, default=max(steps, default=0)))
    frame = pandas.read_parquet(file) if file else pandas.DataFrame()
    if frame.empty:
        return frame
    weights = run.config.rewards
    frame["reward"] = sum(frame[n].fillna(0) * w for n, w in weights.items()).round(4)
    groups = frame.index // complete(run.config, "grpo")["num_generations"]
    rewards = frame["reward"].groupby(groups)
    widest = (rewards.max() - rewards.min()).idxmax()
    return frame[groups == widest].sort_values("reward", ascending=False)
