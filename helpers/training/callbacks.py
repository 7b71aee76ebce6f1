"""Trainer callbacks: best adapter, live samples, timed saves, skipped fp16 steps.

They work with any `Trainer`. Two members of a callback go into a stage's report:
`reason`, why it stopped the training, and `report(history)`, more values.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from helpers.inference.generation import reply
from helpers.models.adapters import Witness, save_adapter
from helpers.runs import write_json

log = logging.getLogger(__name__)
Entry = dict[str, Any]
"""An entry of TRL's log history."""


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in a folder, None when there is none.

    `trainer_state.json` is written last: a kill leaves none, or half of it.
    """
    complete = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        complete.append((state["global_step"], path))
    return max(complete)[1] if complete else None


class Stopwatch(TrainerCallback):
    """Adds `seconds` to the log history: training time up to an entry, all sessions."""

    started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = max((e.get("seconds", 0.0) for e in state.log_history), default=0.0)
        self.started = time.monotonic() - before

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 2)


class BestAdapter(TrainerCallback):
    """Keeps the adapter of the lowest loss, or of the highest reward, in a folder.

    Only a complete adapter replaces the folder. `best.json` beside it holds the value,
    from which a resumed run goes on.

    Args:
        folder: where the adapter goes.
        by: a logged value, like `eval_loss`; one that ends in `reward` is better when
            it is greater, and of equals the later one is kept.
        witness: see `save_adapter`; `trainer.fit` sets it.
    """

    def __init__(
        self, folder: Path, by: str = "eval_loss", witness: Witness | None = None
    ) -> None:
        self.folder, self.by, self.witness = folder, by, witness
        self.note = folder.with_name("best.json")
        self.rewarded = by.endswith("reward")
        self.best, self.step = -math.inf if self.rewarded else math.inf, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.note.exists() and self.folder.exists():
            note = json.loads(self.note.read_text())
            if note["step"] <= state.global_step and note["by"] == self.by:
                self.best, self.step = note["value"], note["step"]

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        value = more["logs"].get(self.by)
        if value is None:
            return
        if not (value >= self.best if self.rewarded else value < self.best):
            return
        self.best, self.step = value, state.global_step
        if state.is_world_process_zero:
            save_adapter(more["model"], self.folder, self.witness)
            write_json(self.note, {"by": self.by, "value": value, "step": self.step})

    def report(self, history: list[Entry]) -> dict[str, Any]:
        """Returns the best value and its step, empty when none was logged."""
        if not math.isfinite(self.best):
            return {}
        if not self.rewarded:
            return {f"{self.by}_best": round(self.best, 4), "best_step": self.step}
        first = next(entry[self.by] for entry in history if self.by in entry)
        values = {"held_out_first": first, "held_out_best": self.best}
        return values | {"best_step": self.step}


class LiveSamples(TrainerCallback):
    """Shows and keeps the answer to a random prompt of a list at each epoch's end.

    Args:
        tokenizer: of the model in training.
        prompts: the list.
        path: a JSON-lines file that collects step, prompt and answer.
        system_prompt: the system turn that the model is trained with.
        max_new_tokens: answers are cut here.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[str],
        path: Path,
        *,
        system_prompt: str = "",
        max_new_tokens: int = 96,
    ) -> None:
        self.tokenizer, self.prompts, self.path = tokenizer, prompts, path
        self.options: dict[str, Any] = {"system_prompt": system_prompt}
        self.options["max_new_tokens"] = max_new_tokens

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        # a generator of its own: drawing a sample must not change the order of rows
        prompt = random.Random(args.seed + state.global_step).choice(self.prompts)
        answer = reply(more["model"], self.tokenizer, prompt, **self.options)
        log.info(f"step {state.global_step} | {prompt}\n    -> {answer}")
        sample = {"step": state.global_step, "prompt": prompt, "answer": answer}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


class TimedSaves(TrainerCallback):
    """Saves a checkpoint whenever this many minutes have passed since the last."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.last = minutes, time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if time.monotonic() - self.last >= 60 * self.minutes:
            control.should_save = True
        return control


class SkippedSteps(TrainerCallback):
    """Counts optimiser steps that fp16's loss scaler skipped, and stops on too many.

    The first one to three are normal while the scale is sought; a run that goes on
    skipping learns nothing.

    Args:
        patience: this many skipped steps in a row stop the training.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience, self.count, self.in_a_row = patience, 0, 0
        self.reason = ""

    def on_step_end(
        self, args: Any, state: Any, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        skipped = bool(getattr(more.get("optimizer"), "step_was_skipped", False))
        self.count += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.patience:
            self.reason = (
                f"stopped at step {state.global_step}: {self.in_a_row} optimiser steps "
                "in a row were skipped because gradients overflow in fp16; lower the "
                "learning rate, or train in 16bit weights or on a GPU with bf16"
            )
            log.warning(self.reason)
            control.should_training_stop = True
        return control

    def report(self, history: list[Entry]) -> dict[str, Any]:
        """Returns the number of skipped steps."""
        return {"skipped_steps": self.count}
