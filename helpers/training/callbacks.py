"""Callbacks for any `Trainer`: best adapter, live samples, clock, skipped fp16 steps.

A stage's report takes in `reason`, why one stopped the training, and its `report()`.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from helpers.files import read_json, write_json
from helpers.inference.generation import reply
from helpers.models.adapters import save_adapter

log = logging.getLogger(__name__)
Entry = dict[str, Any]  # of TRL's log history
PATIENCE = 10  # skipped steps in a row
FILE = Path(__file__).with_name("eval_prompts.jsonl")
PROMPTS = [json.loads(row)["prompt"] for row in FILE.read_text("utf-8").splitlines()]


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in a folder, None when there is none."""
    complete = []  # a kill leaves no state, or half of it: it is written last
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        complete.append((state["global_step"], path))
    return max(complete)[1] if complete else None


class Stopwatch(TrainerCallback):
    """Logs `seconds`, trained in all sessions, and saves a checkpoint by the clock."""

    def __init__(self, save_minutes: float) -> None:
        self.save_s, self.started, self.saved = 60 * save_minutes, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = max((e.get("seconds", 0.0) for e in state.log_history), default=0.0)
        self.saved = time.monotonic()
        self.started = self.saved - before

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 2)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.saved >= self.save_s:
            control.should_save = True


class BestAdapter(TrainerCallback):
    """Keeps the adapter of the lowest loss, or of the highest reward, in a folder.

    `best.json` beside it holds the value, from which a resumed run goes on.

    Args:
        folder: where the adapter goes.
        by: a logged value, like `eval_loss`; one that ends in `reward` is better when
            it is greater, and of equals the later one is kept.
    """

    witness: Any = None  # see `save_adapter`; `fit` sets it

    def __init__(self, folder: Path, by: str = "eval_loss") -> None:
        self.folder, self.by = folder, by
        self.note = folder.with_name("best.json")
        self.rewarded = by.endswith("reward")
        self.best, self.step = -math.inf if self.rewarded else math.inf, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        note = read_json(self.note)
        if note and self.folder.exists():
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
        part = {"held_out_first": first, "held_out_best": self.best}
        return part | {"best_step": self.step}


@dataclass(eq=False)
class LiveSamples(TrainerCallback):
    """Logs and keeps the answer to one of a few prompts, drawn at each epoch's end.

    Args:
        tokenizer: of the model in training.
        path: a JSON-lines file that collects step, prompt and answer.
        system_prompt: the system turn that the model is trained with.
    """

    tokenizer: PreTrainedTokenizerBase
    path: Path
    system_prompt: str = ""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        # a generator of its own: drawing a sample must not change the order of rows
        prompt = random.Random(args.seed + state.global_step).choice(PROMPTS)
        system, model = self.system_prompt, more["model"]
        answer = reply(
            model, self.tokenizer, prompt, system_prompt=system, max_new_tokens=96
        )
        log.info(f"step {state.global_step} | {prompt}\n    -> {answer}")
        sample = {"step": state.global_step, "prompt": prompt, "answer": answer}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


class SkippedSteps(TrainerCallback):
    """Counts the steps that fp16's loss scaler skipped; stops after ten in a row.

    The first one to three are normal while the scale is sought.
    """

    count = in_a_row = 0
    reason = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        skipped = bool(getattr(more.get("optimizer"), "step_was_skipped", False))
        self.count += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= PATIENCE:
            self.reason = (
                f"stopped at step {state.global_step}: {PATIENCE} steps in a row were "
                "skipped because gradients overflow in fp16; lower the learning rate, "
                "or train in 16bit weights or on a GPU with bf16"
            )
            log.warning(self.reason)
            control.should_training_stop = True

    def report(self, history: list[Entry]) -> dict[str, Any]:
        """Returns the number of skipped steps."""
        return {"skipped_steps": self.count}
