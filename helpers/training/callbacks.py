"""Callbacks for any `Trainer`; a stage's report takes in `reason` and `report()`."""

import logging
import math
import shutil
import tempfile
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from helpers import files
from helpers.errors import TrainingError, mask_secrets
from helpers.files import is_whole, read_json, read_rows, write_json, write_rows
from helpers.inference.generation import reply
from helpers.models.adapters import save_adapter, whole
from helpers.training.inputs import NOTE

log = logging.getLogger(__name__)
PROMPTS = read_rows(Path(__file__).with_name("eval_prompts.jsonl"))
PARTS = ["*.json", "*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth"]


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest checkpoint that is whole and of the stage's own settings."""
    made_from = read_json(folder.with_name(NOTE)).get("fingerprint")
    for path in map(Path, reversed(sort_checkpoints(str(folder)))):
        state = path / "trainer_state.json"  # it is written last
        values = read_json(state) if is_whole(state) else {}
        note = values.get("stateful_callbacks", {})
        parts = [[*path.glob(p)] or [path / p] for p in note.get("parts", [])]
        faults = [f"no whole {f.name}" for f in chain(*parts) if not is_whole(f)]
        if note.get("made_from", "") != made_from:
            faults = ["it was not finished, or is of other settings"]
        if not faults:
            return str(path)
        log.warning(f"{path} is passed over: {', '.join(faults)}")
    return None


@dataclass(eq=False)
class Watch(TrainerCallback):
    """Logs `seconds` and `skipped_steps`; saves by the clock, and stops by it.

    TrainingError: a gradient is not finite (it takes no step), or the folder is gone.
    """

    save_minutes: float = math.inf  # between checkpoints
    folder: Path | None = None  # of a stage, whose inputs each checkpoint notes
    session_minutes: float = math.inf
    in_a_row, reason = 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = state.log_history[-1] if state.log_history else {}
        self.skipped = before.get("skipped_steps", 0)
        self.resumed, self.saved = state.global_step > 0, time.monotonic()
        self.end = self.saved + 60 * self.session_minutes
        self.started = self.saved - before.get("seconds", 0.0)
        if self.folder:
            note = {"made_from": read_json(self.folder / NOTE)["fingerprint"]}
            note["parts"] = [*PARTS, "scaler.pt"] if args.fp16 else PARTS
            state.stateful_callbacks |= note

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **more: Any) -> Any:
        if args.fp16:  # the scaler leaves such a step out
            return
        parameters = more["model"].parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not whole(torch.nn.utils.get_total_norm(gradients)).isfinite():
            text = "loss or gradient is not finite; lower the rate, or look at its rows"
            raise TrainingError(f"step {state.global_step + 1}: {text}")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.folder and not self.folder.exists():
            raise TrainingError(f"{self.folder} is gone: put it back, or start again")
        now = time.monotonic()
        times = [now - self.saved >= 60 * self.save_minutes, now >= self.end]
        # of several processes the first one's clock counts
        is_due, is_over = broadcast_object_list(times)
        if is_due:
            control.should_save, self.saved = True, now
        if is_over:
            self.reason = f"stopped at step {state.global_step}: the session is over"
            control.should_save = control.should_training_stop = True
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
        names = [n for n in more["logs"] if n.startswith("train_")] * self.resumed
        for name in names:  # transformers divides a session's sums by all steps
            del more["logs"][name], state.log_history[-1][name]


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
        prompts: questions; by default word problems and general ones of our own.
    """

    tokenizer: PreTrainedTokenizerBase
    path: Path
    system_prompt: str = ""
    prompts: list[str] | None = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        prompts = self.prompts or [row["prompt"] for row in PROMPTS]
        prompt = prompts[round(state.epoch) % len(prompts)]
        options: Any = {"system_prompt": self.system_prompt, "max_new_tokens": 96}
        answer = reply(more["model"], self.tokenizer, prompt, **options)
        log.info(f"step {state.global_step} | {prompt}\n    -> {answer}")
        sample = {"step": state.global_step, "prompt": prompt, "answer": answer}
        rows = read_rows(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] < state.global_step]  # not resumed
        write_rows(self.path, [*rows, sample])


@dataclass(eq=False)
class SecondPlace(TrainerCallback):
    """Sends a folder with its newest checkpoint to a second place, in the background.

    A failure is logged once and stops nothing. `files.fetch_copy` brings a copy back.
    """

    place: str
    name: str  # as for `files.send_copy`
    folder: Path | None = None  # by default the trainer's `output_dir`
    copies: tuple[Future[None], ...] = ()
    step, error = 0, ""

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if not state.is_world_process_zero or wait(self.copies, timeout=0).not_done:
            return
        former = [Path(p).name for p in sort_checkpoints(args.output_dir)[:-1]]
        ignore = shutil.ignore_patterns(".new-*", *former)
        scratch, self.step = tempfile.mkdtemp(prefix="tunebook-"), state.global_step
        try:  # training goes on writing to the folder
            folder = self.folder or args.output_dir
            shutil.copytree(folder, scratch, ignore=ignore, dirs_exist_ok=True)
        except OSError as error:  # a full disk
            shutil.rmtree(scratch)
            return self.say(error)
        self.copies = (HfApi().run_as_future(self.send, Path(scratch)),)

    def send(self, scratch: Path) -> None:
        try:
            files.send_copy(scratch, self.place, self.name)
        except Exception as error:  # each file system has its own
            self.say(error)
        finally:
            shutil.rmtree(scratch)

    def say(self, error: Exception) -> None:
        if not self.error:
            self.error = mask_secrets(" ".join(str(error).split())[:300])
            log.warning(f"no second copy in {self.place}: {self.error}")

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        wait(self.copies, timeout=600)
        if self.step < state.global_step:
            self.on_save(args, state)
            wait(self.copies, timeout=600)
