"""Callbacks that watch a GRPO training, show how it goes, and stop it with a reason.

Importing this module imports transformers, as `callbacks` does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from helpers.data import preparation as data
from helpers.grpo import budget, diagnostics
from helpers.grpo.record import Record, answers_table
from helpers.runs import write_json
from helpers.training import plots as curves
from helpers.training.inputs import read_note

SHOW_S = 10.0  # between two drawings of the panel
ANSWERS = "answers.jsonl"
PATIENCE = 4  # times its minutes a probe may take for its second step


class TimeBudget(TrainerCallback):
    """Ends a training when its minutes are used, with an evaluation and a checkpoint.

    It stops where one more step would end further from the budget than none, so that
    a run misses it by half of a step and an evaluation at most. What a killed session
    used counts: it is in `budget.json`.

    Args:
        folder: of the stage.
        minutes: None only measures.
        steps: planned for them; it takes more where the machine turns out faster.
        probe: end without a word, an evaluation or a checkpoint.
        clock: the seconds of some clock.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float | None,
        steps: int | None = None,
        *,
        probe: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.path, self.minutes = folder / budget.USED, minutes
        self.clock = clock or time.monotonic
        self.steps, self.probe, self.reason = steps, probe, ""
        self.before = budget.read_used(folder)
        self.started = self.step_began = self.last = self.clock()
        self.step_s: list[float] = []
        self.evaluation_s = self.save_s = 0.0

    @property
    def used_s(self) -> float:
        """Seconds used so far, in all sessions."""
        return self.before + self.clock() - self.started

    @property
    def share(self) -> float:
        """The share of the time that is used, 0 to 1."""
        return min(1.0, self.used_s / (60 * self.minutes)) if self.minutes else 0.0

    def follow(self, scheduler: Any) -> None:
        """Has a learning rate go by the time that is used, not by the steps.

        Args:
            scheduler: a `LambdaLR` made for the planned steps; others stay as they are.
        """
        factors = getattr(scheduler, "lr_lambdas", [])
        scheduler.lr_lambdas = [
            lambda _, factor=factor: factor(self.share * (self.steps or 0))
            for factor in factors
        ]

    def on_train_begin(
        self, args: Any, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        self.started = self.last = self.clock()
        if self.steps is not None:
            state.max_steps = self.steps

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.step_began = self.clock()
        if self.steps is not None:  # the time ends it, see on_step_end
            state.max_steps = max(state.max_steps, state.global_step + 2)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.note(state)
        self.step_s.append(self.last - self.step_began)
        recent = self.step_s[-5:]
        next_s = sum(recent) / len(recent)
        end_s = self.evaluation_s * (1 + control.should_evaluate) + self.save_s
        time_is_up = self.minutes is not None and (
            self.used_s + end_s + next_s / 2 >= 60 * self.minutes
        )
        if self.probe and len(self.step_s) == 1:
            # the first compiles, and says little of the others
            time_is_up = self.used_s >= PATIENCE * 60 * (self.minutes or 0)
        if not budget.agreed(time_is_up):
            return control
        control.should_training_stop = True
        if not self.probe:
            state.max_steps = state.global_step  # a kill after this has nothing to redo
            self.reason = (
                f"ended at step {state.global_step}: the {self.minutes:g} minutes of "
                f"grpo_minutes are used, at {next_s:.1f} s a step"
            )
            print(self.reason)  # noqa: T201
            control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        return control

    def on_evaluate(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.evaluation_s = self.note(state)

    def on_save(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.save_s = self.note(state)

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.note(state)

    def note(self, state: TrainerState) -> float:
        """Keeps what is used for the session after a kill; returns what was since."""
        now = self.clock()
        passed, self.last = now - self.last, now
        if state.is_world_process_zero:
            write_json(self.path, {"used_s": round(self.used_s, 2)})
        return passed


class LivePanel(TrainerCallback):
    """Shows the diagnostics while training: in a notebook in place, else as text.

    Adds to what is logged the shares of groups that are all wrong and all right, and
    the steps that fp16 skipped; so it comes before what keeps or tracks the logs. At
    the end the picture is saved as `diagnostics.png`; the groups that were shown are in
    `answers.jsonl`.

    Args:
        folder: of the stage; its `history.json` is gone on from.
        record: that watches the rewards.
        clock: the seconds of some clock.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.folder, self.record = folder, record
        self.clock = clock or time.monotonic
        self.entries: list[diagnostics.Entry] = []
        self.rows: list[diagnostics.Entry] = []
        self.sentences: list[str] = []
        self.said: list[str] = []
        self.title = ""
        self.skipped = 0
        self.shown, self.started = float("-inf"), self.clock()
        self.handle: Any = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, **_: Any
    ) -> None:
        self.entries = read_history(self.folder, state)
        counts = [
            e[diagnostics.SKIPPED] for e in self.entries if diagnostics.SKIPPED in e
        ]
        self.skipped = int(counts[-1]) if counts else 0
        path = self.folder / ANSWERS
        if path.exists():  # steps that a kill lost are taken again
            rows = data.read_rows(path)
            data.write_rows(path, [r for r in rows if r["step"] <= state.global_step])
        self.handle, self.started = open_display(), self.clock()

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        size = args.num_generations
        if "reward" in logs:
            more = self.record.groups(size) | {diagnostics.SKIPPED: self.skipped}
            logs |= more
            if state.log_history:
                state.log_history[-1] |= more
            self.rows = self.record.group(size)
            self.keep(state.global_step)
        self.entries.append({"step": state.global_step, **logs})
        minutes = (self.clock() - self.started) / 60
        self.title = f"step {state.global_step} of {state.max_steps}, "
        self.title += f"{minutes:.1f} minutes"
        found = diagnostics.read_state(self.entries, args.max_completion_length)
        self.sentences = diagnostics.explain(found) if found else []
        if self.clock() - self.shown >= SHOW_S:
            self.show()

    def on_train_end(
        self, args: Any, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if state.is_world_process_zero and self.entries:
            self.show(last=True)
            curves.draw_diagnostics(self.entries, self.folder / "diagnostics.png")

    def report(self, history: list[diagnostics.Entry]) -> dict[str, Any]:
        """Returns the stage's own values of `report.json`."""
        rewards = [entry["reward"] for entry in history if "reward" in entry]
        ends = diagnostics.width_of_ends(len(rewards))
        part = {
            "reward_first": round(sum(rewards[:ends]) / ends, 4),
            "reward_last": round(sum(rewards[-ends:]) / ends, 4),
            "reward_averaged_over_steps": ends,
            "prompts_left_out": read_note(self.folder / "prompts.json")["left_out"],
            "sampler": read_note(self.folder / "sampler.json")["name"],
        }
        plan = budget.read_plan(self.folder)
        return part | ({"planned_steps": plan.steps} if plan else {})

    def keep(self, step: int) -> None:
        """Appends the group that is shown to `answers.jsonl`."""
        with (self.folder / ANSWERS).open("a", encoding="utf-8") as file:
            for row in self.rows:
                text = json.dumps({"step": step, **row}, ensure_ascii=False)
                file.write(text + "\n")

    def show(self, last: bool = False) -> None:
        """Draws the panel in its place; as text, what is new, and all at the end."""
        self.shown = self.clock()
        if self.handle is not None:
            self.handle.update(curves.draw_diagnostics(self.entries))
            return
        new = [s for s in self.sentences if last or s not in self.said]
        self.said += new
        lines = [*new, repr(answers_table(self.rows))] if last else new[:1]
        print(*lines, sep="\n", end="\n" if lines else "")  # noqa: T201


def open_display() -> Any:
    """Returns a handle to something shown in this notebook, None outside of one."""
    from IPython import get_ipython
    from IPython.display import HTML, display

    if not hasattr(get_ipython(), "kernel"):
        return None
    return display(HTML("waiting for the first step"), display_id=True)


def silence_progress(trainer: Any) -> None:
    """Takes the trainer's table of losses, zeros here, out of a notebook's output."""
    from transformers.utils.notebook import NotebookProgressCallback

    trainer.remove_callback(NotebookProgressCallback)


class CollapseGuard(TrainerCallback):
    """Stops a training whose answers or rewards collapse, see `diagnostics.collapse`.

    The adapter of the best held-out reward is kept by `callbacks.BestAdapter`.

    Args:
        folder: of the stage; its `history.json` is gone on from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[diagnostics.Entry] = []
        self.reason = ""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, **_: Any
    ) -> None:
        self.entries = read_history(self.folder, state)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        self.entries.append({"step": state.global_step, **(logs or {})})
        found = diagnostics.collapse(self.entries)
        if found and not self.reason:
            self.reason = f"stopped at step {state.global_step}: {found}"
            print(self.reason)  # noqa: T201
            control.should_training_stop = True
        return control


def read_history(folder: Path, state: TrainerState) -> list[diagnostics.Entry]:
    """Returns what was logged up to the step that training goes on from."""
    return [dict(entry) for entry in state.log_history]
