"""Callbacks for any `Trainer`; a stage's report takes in `reason` and `report()`."""

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from helpers.errors import TrainingError
from helpers.files import read_json, read_rows, write_json
from helpers.inference.generation import reply
from helpers.models.adapters import save_adapter

log = logging.getLogger(__name__)
PROMPTS = read_rows(Path(__file__).with_name("eval_prompts.jsonl"))


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest checkpoint that was written to its end."""
    complete = {}
    for file in folder.glob("checkpoint-*/trainer_state.json"):  # it is written last
        with suppress(json.JSONDecodeError):
            state = read_json(file)
            complete[state["global_step"]] = str(file.parent)
    return complete[max(complete)] if complete else None


class Watch(TrainerCallback):
    """Logs `seconds` and `skipped_steps` of all sessions; saves by the clock.

    Raises:
        TrainingError: a gradient is not finite. The step is not taken.
    """

    in_a_row, reason = 0, ""

    def __init__(self, save_minutes: float) -> None:
        self.save_s = 60 * save_minutes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = state.log_history[-1] if state.log_history else {}
        self.skipped = before.get("skipped_steps", 0)
        self.saved = time.monotonic()
        self.started = self.saved - before.get("seconds", 0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **more: Any) -> Any:
        if args.fp16:  # the scaler leaves such a step out
            return
        parameters = more["model"].parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            text = f"step {state.global_step + 1}: loss or gradient is not finite; "
            text += "lower the learning rate, or look at the rows and the model of this"
            raise TrainingError(f"{text} step")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if time.monotonic() - self.saved >= self.save_s:
            control.should_save, self.saved = True, time.monotonic()
        skipped = bool(getattr(more.get("optimizer"), "step_was_skipped", False))
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= 10:  # one to three are normal while the scale is sought
            text = "fp16 gradients overflow in ten steps in a row; lower the rate"
            self.reason = f"stopped at step {state.global_step}: {text}"
            log.warning(self.reason)
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        more["logs"]["skipped_steps"] = self.skipped  # for trackers and the panel
        seconds = round(time.monotonic() - self.started, 2)
        state.log_history[-1] |= {"skipped_steps": self.skipped, "seconds": seconds}


class BestAdapter(TrainerCallback):
    """Keeps the adapter of the lowest loss, or of the highest reward, in a folder.

    Args:
        folder: where the adapter goes; `best.json` beside it serves a resumed run.
        by: a logged value, like `eval_loss`; one that ends in `reward` is better when
            it is greater, and of equals the later one is kept.
    """

    def __init__(self, folder: Path, by: str = "eval_loss") -> None:
        self.folder, self.by, self.note = folder, by, folder.with_name("best.json")
        self.rewarded = by.endswith("reward")
        self.best, self.step = -math.inf if self.rewarded else math.inf, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        note = read_json(self.note) if self.folder.exists() else {}
        if note.get("by") == self.by:  # also one of after the checkpoint
            self.best, self.step = note["value"], note["step"]

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        value = more["logs"].get(self.by, math.nan)
        if not (value >= self.best if self.rewarded else value < self.best):
            return
        self.best, self.step = value, state.global_step
        if state.is_world_process_zero:
            witness = getattr(more["model"], "witness", None)  # of `fit`
            save_adapter(more["model"], self.folder, witness)
            write_json(self.note, {"by": self.by, "value": value, "step": self.step})

    def report(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        if not math.isfinite(self.best):
            return {}
        values = {f"{self.by}_best": round(self.best, 4)}
        if self.rewarded:
            first = next(entry[self.by] for entry in history if self.by in entry)
            values = {"held_out_first": first, "held_out_best": self.best}
        return values | {"best_step": self.step}


@dataclass(eq=False)
class LiveSamples(TrainerCallback):
    """Logs and keeps the answer to one of a few prompts at each epoch's end.

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
        prompt = PROMPTS[round(state.epoch) % len(PROMPTS)]["prompt"]
        options: Any = {"system_prompt": self.system_prompt, "max_new_tokens": 96}
        answer = reply(more["model"], self.tokenizer, prompt, **options)
        log.info(f"step {state.global_step} | {prompt}\n    -> {answer}")
        sample = {"step": state.global_step, "prompt": prompt, "answer": answer}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
