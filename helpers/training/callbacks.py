"""Trainer callbacks: history, best adapter, live samples, timed saves, machine use.

Importing this module imports transformers; where Unsloth is used, import it first
(`helpers.models.load.load_model` does).
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from helpers.inference.generation import reply
from helpers.models.adapters import Witness, save_adapter
from helpers.runs import write_json
from helpers.runtime import peak_memory_gb
from helpers.training import plots as curves


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint below a folder, None when there is none.

    A checkpoint that a kill cut short lacks `trainer_state.json`, which is written
    last, or holds half of it: it is passed over.
    """
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        found.append((state["global_step"], path))
    return max(found)[1] if found else None


class History(TrainerCallback):
    """Writes every logged value to `history.json` and draws `curves.png` at the end.

    Entries carry `step`, `epoch` and `seconds`, the training time up to the entry,
    that of earlier sessions included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        self.before = 0.0
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        path = self.folder / "history.json"
        old = json.loads(path.read_text()) if path.exists() else []
        self.entries = [e for e in old if e["step"] <= state.global_step]
        self.before = self.entries[-1]["seconds"] if self.entries else 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds, over all sessions."""
        return self.before + time.perf_counter() - self.started

    @property
    def training_seconds(self) -> float:
        """Training time up to the last logged value, in seconds."""
        return self.entries[-1]["seconds"] if self.entries else self.seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        place = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        place["seconds"] = round(self.seconds, 2)
        self.entries.append({**place, **(logs or {})})
        if state.is_world_process_zero:
            write_json(self.folder / "history.json", self.entries)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            curves.draw_losses(self.entries, self.folder / "curves.png")

    def values(self, name: str) -> list[float]:
        """Returns a logged value over time, entries without it left out."""
        return [entry[name] for entry in self.entries if name in entry]


class BestAdapter(TrainerCallback):
    """Keeps the adapter of the lowest loss, or of the highest reward, in a folder.

    The folder is replaced only by a complete adapter; with Google Drive mounted it
    lies there, as the run folder does. `best.json` beside it remembers the value, so
    that a resumed run goes on from it.

    Args:
        folder: where the adapter goes.
        by: `eval_loss`, or `loss` for the train loss of each log; a name that ends in
            `reward` is better when it is greater, and of equals the later one is kept.
        witness: see `models.save_adapter`.
    """

    def __init__(
        self, folder: Path, by: str = "eval_loss", witness: Witness | None = None
    ) -> None:
        self.folder, self.by, self.witness = folder, by, witness
        self.note = folder.with_name("best.json")
        self.greater_is_better = by.endswith("reward")
        self.best = float("-inf" if self.greater_is_better else "inf")
        self.step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        if self.note.exists() and self.folder.exists():
            kept = json.loads(self.note.read_text())
            if kept["step"] <= state.global_step and kept["by"] == self.by:
                self.best, self.step = kept["value"], kept["step"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        value = (logs or {}).get(self.by)
        if value is None or model is None:
            return
        if not (value >= self.best if self.greater_is_better else value < self.best):
            return
        self.best, self.step = value, state.global_step
        if state.is_world_process_zero:
            save_adapter(model, self.folder, self.witness)
            kept = {"by": self.by, "value": value, "step": self.step}
            write_json(self.note, kept)


class LiveSamples(TrainerCallback):
    """Prints and keeps the answer to a random prompt of a list at each epoch's end.

    Args:
        tokenizer: of the model in training.
        prompts: the evaluation list.
        path: the JSON-lines file that collects step, prompt and answer.
        system_prompt: the system turn the model is trained with.
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
        self.system_prompt, self.max_new_tokens = system_prompt, max_new_tokens

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        if model is None or not state.is_world_process_zero:
            return
        # a generator of its own: drawing a sample must not change the training's order
        prompt = random.Random(args.seed + state.global_step).choice(self.prompts)
        answer = reply(
            model,
            self.tokenizer,
            prompt,
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
        )
        print(f"step {state.global_step} | {prompt}\n    -> {answer}")  # noqa: T201
        sample = {"step": state.global_step, "prompt": prompt, "answer": answer}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


class TimedSaves(TrainerCallback):
    """Asks for a checkpoint whenever this many minutes have passed since the last."""

    def __init__(self, minutes: float) -> None:
        self.every_s = minutes * 60
        self.last = time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(
        self, args: Any, state: Any, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if time.monotonic() - self.last >= self.every_s:
            control.should_save = True
        return control

    def on_save(self, *_: Any, **__: Any) -> None:
        self.last = time.monotonic()


class SkippedSteps(TrainerCallback):
    """Counts optimiser steps that fp16's loss scaler skipped, and stops on too many.

    The first one to three are normal while the scale is found. A run that goes on
    skipping learns nothing: it is stopped with the reason in `reason`.

    Args:
        patience: this many skipped steps in a row stop the training.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience, self.count, self.in_a_row = patience, 0, 0
        self.reason = ""

    def on_step_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> TrainerControl:
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self.count += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.patience:
            self.reason = (
                f"stopped at step {state.global_step}: {self.in_a_row} optimiser steps "
                "in a row were skipped because gradients overflow in fp16; lower the "
                "learning rate, or train in 16bit weights or on a GPU with bf16"
            )
            print(self.reason)  # noqa: T201
            control.should_training_stop = True
        return control


class MachineUse(TrainerCallback):
    """Adds memory and GPU use to what is logged: `memory_gb` and `gpu_use`.

    `memory_gb` is the peak so far in GiB (see `runtime.peak_memory_gb`), `gpu_use` the
    share of the last moment in which the GPU worked, 0 to 1, where the driver tells.
    Trackers log what callbacks before them leave in the logs: `lead` makes it first.
    """

    @classmethod
    def lead(cls, trainer: Any) -> None:
        """Adds the callback to a trainer, before its trackers; once."""
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls())

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        import torch

        if logs is None or not {"loss", "eval_loss"} & set(logs):
            return
        logs["memory_gb"] = round(peak_memory_gb(), 3)
        if torch.cuda.is_available():
            try:
                logs["gpu_use"] = torch.cuda.utilization() / 100
            except (ModuleNotFoundError, RuntimeError):  # no nvidia-ml-py, or no rights
                return
