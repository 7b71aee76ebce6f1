"""The layout of an optimiser step: the config says its rows, the machine the rest."""

import copy
import inspect
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer

from helpers import runtime
from helpers.files import read_json, write_json
from helpers.runs import Run

log = logging.getLogger(__name__)
NOTE = "layout.json"  # what was tried and chosen
MARGIN = 0.92  # of the memory: the rest is for fragments
COUNTS = ("_metrics", "_total_train_tokens")  # TRL's, of what was trained


class Layout(NamedTuple):
    micro_batch: int  # rows of one forward and backward pass
    accumulation: int  # passes of an optimiser step
    recompute: bool  # activations are computed again in the backward pass
    padding_free: bool  # rows are joined to one sequence


def choose_layout(trainer: Trainer, run: Run) -> pd.DataFrame:
    """Gives a trainer the fastest layout that fits into memory; returns the tries.

    The rows of an optimiser step stay the config's, and so do the losses. A pass has a
    fixed cost, larger than that of recomputation, so the order is: fewest passes first,
    and among as many, activations kept first. Each is tried with a forward and backward
    pass over the largest micro-batch that the run will draw. Rows are joined without
    padding where model and engine keep them apart.

    The config's layout stays on a CPU, where time goes by tokens, with several
    processes, in GRPO, and with `layout="pinned"`; so does a `gradient_checkpointing`
    or `padding_free` that the config sets. The stage's `layout.json` keeps the tries
    and the choice, which holds until the machine changes.

    Args:
        trainer: of TRL, constructed and not yet trained.
        run: whose stage it trains.
    """
    path, machine = note_path(trainer), runtime.find_machine()
    key = {"machine": machine.name, "memory_gb": round(machine.memory_gb, 1)}
    key["stays"] = reason_against(trainer, run)
    note = read_json(path)
    if {name: note.get(name) for name in key} != key:
        keep_lora_fp32(trainer.model)
        note = key | {"tries": [], "out_of_memory_after": []}
        for layout in candidates(trainer, run):
            apply_layout(trainer, layout)
            result = {"verdict": key["stays"]} if key["stays"] else attempt(trainer)
            note["tries"].append(layout._asdict() | result)
            note["choice"] = layout._asdict()
            if result["verdict"] in ("fits", key["stays"]):
                break
        write_json(path, note)
    apply_layout(trainer, Layout(**note["choice"]))
    return pd.DataFrame(note["tries"])


def note_path(trainer: Trainer) -> Path:
    return Path(trainer.args.output_dir).with_name(NOTE)


def keep_lora_fp32(model: Any) -> None:
    """Casts LoRA matrices to fp32: TRL makes them bf16, which a T4 and CPUs emulate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def reason_against(trainer: Trainer, run: Run) -> str:
    """Returns why the layout stays the config's, or an empty string."""
    if run.config.layout == "pinned":
        return "pinned"
    if hasattr(trainer.args, "num_generations"):
        return "GRPO"
    if trainer.args.world_size > 1:
        return "several processes"
    return "on a CPU" if runtime.find_machine().device == "cpu" else ""


def candidates(trainer: Trainer, run: Run) -> list[Layout]:
    """Returns the layouts of the same rows an optimiser step, fastest first."""
    args, own = trainer.args, getattr(trainer.data_collator, "padding_free", False)
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if reason_against(trainer, run):
        return [Layout(size, steps, args.gradient_checkpointing, own)]
    rows, flat = size * steps, own or joins_rows(trainer, run)
    fixed = "gradient_checkpointing" in run.config.sft
    kinds = [args.gradient_checkpointing] if fixed else [False, True]
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    return [Layout(n, rows // n, kind, flat) for n in sizes for kind in kinds]


def joins_rows(trainer: Trainer, run: Run) -> bool:
    """Returns whether rows can be joined: they do not see one another."""
    model, collator = trainer.model, trainer.data_collator
    takes = inspect.signature(model.get_base_model().forward).parameters
    # Unsloth has decided it by now, and a collator that is not TRL's cannot
    if hasattr(model, "for_training") or not hasattr(collator, "padding_free"):
        return False
    if "padding_free" in run.config.sft or "position_ids" not in takes:
        return False
    first, second = (trainer.train_dataset[index] for index in (0, -1))
    first["labels"], losses = [-100] * len(first["labels"]), []
    collator.padding_free = True
    with unchanged(trainer), torch.no_grad():
        net = trainer.accelerator.prepare(model).eval()
        for _ in range(2):
            inputs = trainer._prepare_inputs(collator([first, second]))
            losses.append(trainer.compute_loss(net, inputs).item())
            first["input_ids"] = first["input_ids"][::-1]
    # 8-bit layers look for outliers in the whole batch
    tolerance = 0.01 if getattr(model, "is_loaded_in_8bit", False) else 0
    return math.isclose(*losses, rel_tol=tolerance)


def apply_layout(trainer: Trainer, layout: Layout) -> None:
    """Sets what a trainer, its collator and its model keep of a layout."""
    args, model = trainer.args, trainer.model
    args.per_device_train_batch_size, args.gradient_accumulation_steps = layout[:2]
    args.gradient_checkpointing = layout.recompute
    trainer._train_batch_size = args.train_batch_size
    if hasattr(trainer.data_collator, "padding_free"):
        trainer.data_collator.padding_free = layout.padding_free
    if hasattr(model, "for_training"):  # Unsloth's goes by a note of its own
        model._unsloth_gradient_checkpointing = layout.recompute
        model.for_training(use_gradient_checkpointing=layout.recompute)
    elif layout.recompute:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    else:
        model.gradient_checkpointing_disable()


@contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Takes random states, gradients and counts back, and frees memory."""
    counts = {name: vars(trainer)[name] for name in COUNTS if name in vars(trainer)}
    counts = copy.deepcopy(counts)
    reset_memory()
    with TemporaryDirectory() as folder:
        trainer._save_rng_state(folder)
        try:
            yield
        finally:
            trainer._load_rng_state(folder)
            vars(trainer).update(counts)
            trainer.model.zero_grad()
            reset_memory()


def reset_memory() -> None:
    runtime.free_memory()
    if torch.cuda.is_available():  # what was tried is no peak of the run's
        torch.cuda.reset_peak_memory_stats()


def largest_batch(trainer: Trainer) -> dict[str, Any]:
    """Returns the micro-batch of most tokens among those that the run will draw."""
    args, data = trainer.args, trainer.train_dataset
    table = data.with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    loader, size = trainer.get_train_dataloader(), args.per_device_train_batch_size
    epochs, *_, steps = trainer.set_initial_training_values(args, loader)
    left, batches = steps * size * args.gradient_accumulation_steps, list[list[int]]()
    for _ in range(epochs):  # each in an order of its own
        order = [row for batch in loader.batch_sampler for row in batch][:left]
        left -= len(order)
        batches += [order[start : start + size] for start in range(0, len(order), size)]
    padded = not getattr(trainer.data_collator, "padding_free", False)
    tokens = [
        lengths[b].max() * len(b) if padded else lengths[b].sum() for b in batches
    ]
    return trainer.data_collator([data[row] for row in batches[np.argmax(tokens)]])


def attempt(trainer: Trainer) -> dict[str, Any]:
    """Returns tokens, seconds and peak GiB of a pass, and whether it fits."""
    batch, optim = largest_batch(trainer), trainer.args.optim
    result: dict[str, Any] = {"tokens": batch["input_ids"].numel()}
    state = 0 if "paged" in optim else 2 if "8bit" in optim else 8  # bytes a parameter
    state *= trainer.model.get_nb_trainable_parameters()[0]
    limit_gb = runtime.find_machine().memory_gb
    with unchanged(trainer):
        if torch.cuda.is_available():  # others may use the GPU, too
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            limit_gb = min(limit_gb, free / 2**30)
        model = trainer.accelerator.prepare(trainer.model)  # as `train` does
        try:
            for _ in range(2):  # the first one may compile
                began = time.perf_counter()
                passes = trainer.get_batch_samples(
                    iter([batch]), 1, trainer.args.device
                )
                trainer.current_gradient_accumulation_steps = 1
                trainer.training_step(model, *passes[0], passes[1]).item()
                result["seconds"] = round(time.perf_counter() - began, 3)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return result | {"verdict": "out of memory"}
        result["peak_gb"] = round(runtime.peak_memory_gb() + state / 2**30, 2)
    fits = result["peak_gb"] <= MARGIN * limit_gb
    return result | {"verdict": "fits" if fits else f"too near to {limit_gb:.2f} GiB"}


def train(trainer: Trainer, run: Run, checkpoint: str | None) -> None:
    """Trains in the chosen layout, and in slower ones from where memory runs out."""
    choose_layout(trainer, run)
    while True:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            return
        except RuntimeError as error:
            note, order = read_json(note_path(trainer)), candidates(trainer, run)
            slower = order[order.index(Layout(**note["choice"])) + 1 :]
            if not slower or not should_reduce_batch_size(error):
                raise
        # past the handler nothing holds the activations any more
        trainer.model.zero_grad()
        reset_memory()
        step, layout = trainer.state.global_step, slower[0]
        if step:
            trainer._save_checkpoint(trainer.model, trial=None)
            checkpoint = f"{trainer.args.output_dir}/checkpoint-{step}"
        trainer.optimizer = None  # the next one starts with the checkpoint's state
        apply_layout(trainer, layout)
        note["choice"] = layout._asdict()
        note["out_of_memory_after"].append(step)
        write_json(note_path(trainer), note)
        log.info(f"out of memory after step {step}: going on with {layout}")
