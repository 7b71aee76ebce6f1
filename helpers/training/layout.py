"""The layout of an optimiser step: the config says its rows, the machine the rest."""

import inspect
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, concatenate_datasets
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import runtime
from helpers.errors import ConfigError
from helpers.files import read_json, write_json
from helpers.install import installed_version
from helpers.models import adapters
from helpers.runs import Run

log = logging.getLogger(__name__)
NOTE = "layout.json"  # what was tried and chosen
MARGIN = 0.92  # of the memory: the rest is for fragments


class Layout(NamedTuple):
    micro_batch: int  # rows of one forward and backward pass
    accumulation: int  # passes of an optimiser step
    recompute: bool  # activations are computed again in the backward pass
    padding_free: bool  # rows are joined to one sequence


def choose_layout(trainer: Trainer, run: Run) -> pd.DataFrame:
    """Gives a trainer the fastest layout that fits into memory; returns the tries.

    A step's rows and losses stay the same. Each layout is tried on the largest
    micro-batch of the run, until one fits; a choice holds until the machine changes.
    What the config sets stays, and its whole layout where `reason` says why. So does
    GRPO's: tries cost more than they gain where Unsloth compiles for each shape. Of
    several processes each tries, and the first one's choice counts.

    With `layout="compiled"` SFT's rows are packed first, so that all passes have one
    length and a step its rows on average, and decoder layers are compiled for it. That
    takes seconds and other rows a step: `auto` never chooses it.

    Args:
        trainer: of TRL, constructed and not yet trained. Slower layouts are put into
            its attribute `slower`.
        run: whose stage it trains.

    Raises:
        ConfigError: layers cannot be compiled here, or rows cannot be packed.
    """
    path, stays = Path(trainer.args.output_dir).with_name(NOTE), reason(trainer, run)
    is_packed = hasattr(trainer, "packed")
    if run.config.layout == "compiled" and stays != "GRPO" and not is_packed:
        prepare_compiled(trainer, run)
    machine, note = runtime.find_machine(), read_json(path)
    count = trainer.args.world_size
    name = f"{machine.name}, {machine.memory_gb:.1f} GiB"
    name += f", {count} processes" if count > 1 else ""
    with apart(trainer) if count > 1 else nullcontext():
        order = [own_layout(trainer)] if stays else candidates(trainer, run)
        is_open = note.get("choice") not in [one._asdict() for one in order]
        if stays or note.get("stays") or note.get("machine") != name or is_open:
            note = {"machine": name, "stays": stays, "tries": []}
            for layout in order:
                result = {"verdict": stays} if stays else attempt(trainer, layout)
                note["choice"] = layout._asdict()
                note["tries"].append(note["choice"] | result)
                if result["verdict"] == "fits":
                    break
    [note] = broadcast_object_list([note])
    write_json(path, note)
    choice = Layout(**note["choice"])
    # one of several processes cannot change it by itself
    trainer.slower = order[order.index(choice) + 1 :] if count == 1 else []
    if not stays:
        apply_layout(trainer, choice)
    return pd.DataFrame(note["tries"])


def reason(trainer: Trainer, run: Run) -> str:
    """Returns why the layout stays the config's, or an empty string."""
    if run.config.layout == "pinned":
        return "pinned"
    if hasattr(trainer.args, "num_generations"):
        return "GRPO"
    if runtime.is_sharded():
        return "sharded"
    return "on a CPU" if runtime.find_machine().device == "cpu" else ""


def prepare_compiled(trainer: Trainer, run: Run) -> None:
    """Packs a trainer's rows to one length, and compiles its model for it."""
    args, own = trainer.args, trainer.get_train_dataloader
    if lacks := why_not_compiled(trainer):
        raise ConfigError(f"layout='compiled' needs {lacks}; use layout='auto'")
    if not joins_rows(trainer, run):
        raise ConfigError("layout='compiled': rows cannot be joined; use layout='auto'")
    if "seq_lengths" not in trainer.train_dataset.column_names:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        trainer.train_dataset, rows = pack_rows(trainer.train_dataset, rows)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, 1
    trainer.data_collator.padding_free = trainer.packed = True
    trainer.get_train_dataloader = partial(padded_loader, trainer, own)
    compile_layers(trainer.model)


def why_not_compiled(trainer: Trainer) -> str:
    """Returns what compiled layers lack here, or an empty string."""
    lacks = {
        "one process": trainer.args.world_size > 1,
        "a GPU": runtime.find_machine().device == "cpu",
        "Triton": installed_version("triton") is None,
        "a C compiler": not any(map(shutil.which, ("cc", "gcc", "clang"))),
    }
    return " and ".join(name for name, is_so in lacks.items() if is_so)


def row_lengths(rows: Dataset) -> np.ndarray:
    return pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()


def pack_rows(rows: Dataset, count: int) -> tuple[Dataset, int]:
    """Returns rows packed by TRL, and how many of them have `count` rows on average."""
    from trl import pack_dataset

    tokens, longest = count * row_lengths(rows).mean(), row_lengths(rows).max()
    parts = 2 ** max(0, int(np.log2(tokens / longest)))  # to be halved for memory
    limit = max(int(longest), round(tokens / parts))
    packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), limit)
    log.info(f"{len(rows)} rows packed into {len(packed)} of {limit} tokens")
    return packed, parts


def padded_loader(trainer: Trainer, make_loader: Any) -> Any:
    """Returns batches of training of one length; evaluation's stay as they are."""
    own, rows = trainer.data_collator, trainer.args.per_device_train_batch_size
    longest = row_lengths(trainer.train_dataset).max()
    # at least one token is padding: without any, one row alone has no mask
    tokens = 64 * (rows * longest // 64 + 1)
    trainer.data_collator = replace(own, pad_to_multiple_of=tokens)
    loader = make_loader()
    trainer.data_collator = own
    return loader


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the decoder layers, for training alone."""
    dtype = model.get_base_model().config.dtype
    for parameter in filter(torch.is_floating_point, model.parameters()):
        # PEFT makes frozen ones fp32, and so all activations and the loss's copies of
        # the embedding; LoRA's are fp32 in `fit`, too, which would compile anew
        kind = torch.float32 if parameter.requires_grad else dtype
        parameter.data = parameter.data.to(kind)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and "eager" not in vars(layer):
            layer.eager = layer.forward
            compiled = torch.compile(layer.eager, dynamic=False)
            layer.forward = partial(forward, layer, compiled)


def forward(layer: Any, compiled: Any, hidden: Any, *args: Any, **more: Any) -> Any:
    if not layer.training:
        return layer.eager(hidden, *args, **more)
    # the first layer's input, too: one graph serves all layers
    hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
    return compiled(hidden, *args, **more)


def share_weights(trainer: Trainer) -> None:
    """Has accelerate's FSDP2 deal a trainer's weights to the processes, which add up.

    Nothing is cast: packed 4-bit weights are no numbers, and autocast computes as it
    does in one process. Checkpoints have the form that one process writes and reads.
    """
    state, model = trainer.accelerator.state, trainer.model
    policy = MixedPrecisionPolicy()
    state.fsdp_plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    state.distributed_type = DistributedType.FSDP  # accelerate leaves it out on a CPU
    model.forward = trainer.accelerator.autocast()(model.forward)
    trainer.is_fsdp_enabled = False  # it would save the frozen weights, too
    trainer._save_checkpoint = partial(save_whole, trainer, trainer._save_checkpoint)
    load = trainer._load_optimizer_and_scheduler
    trainer._load_optimizer_and_scheduler = partial(load_shares, trainer, load)


def save_whole(trainer: Trainer, save: Any, *args: Any, **more: Any) -> None:
    weights = adapters.trained_weights(trainer.model)
    state = tree_map_only(DTensor, adapters.whole, trainer.optimizer.state_dict())
    write = partial(trainer._save, state_dict=weights)
    with patch.object(trainer, "_save", write):
        with patch.object(trainer.optimizer, "state_dict", lambda: state):
            save(*args, **more)


def load_shares(trainer: Trainer, load: Any, checkpoint: str | None) -> None:
    load(checkpoint)
    for parameter, values in trainer.optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                place = parameter.device_mesh, parameter.placements
                values[name] = distribute_tensor(value, *place)


class SharedRows(NamedTuple):
    """Deals rows to processes; ends in blanks, where accelerate would repeat rows."""

    sampler: Any
    blanks: list[int]
    tokens: list[int]  # of each row
    size: int  # rows of a pass of one process
    processes: int
    step: int  # rows of an optimiser step

    def __len__(self) -> int:
        return len(self.sampler) + len(self.blanks)

    def __iter__(self) -> Iterator[int]:
        rows = [*self.sampler, *self.blanks]
        for start in range(0, len(rows), self.step):
            yield from self.deal(rows[start : start + self.step])

    def deal(self, rows: list[int]) -> list[int]:
        """Returns a step's rows as they are drawn: by pass, and then by process."""
        shares: list[list[int]] = [[] for _ in range(self.processes)]
        most = len(rows) // self.processes
        for row in sorted(rows, key=self.tokens.__getitem__, reverse=True):
            free = [share for share in shares if len(share) < most]
            min(free, key=self.count_tokens).append(row)
        passes = most // self.size
        parts = [share[n::passes] for n in range(passes) for share in shares]
        return [row for part in parts for row in part]

    def count_tokens(self, rows: list[int]) -> int:
        return sum(self.tokens[row] for row in rows)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def filled_loader(trainer: Trainer, make_loader: Any) -> Any:
    """Returns batches of SFT in which several processes draw each row once an epoch."""
    loader, count = make_loader(), trainer.args.world_size
    data, batches = loader.dataset, loader.batch_sampler
    if count > 1 and "labels" in data.column_names:
        size, sampler = batches.batch_size, batches.batch_sampler.sampler
        row = data[0] | {"labels": [-100] * len(data[0]["labels"])}
        last = Dataset.from_list([row], features=data.features)
        filled, blanks = concatenate_datasets([data, last]), -len(data) % (size * count)
        # a loader lets nobody assign its rows
        vars(loader.base_dataloader)["dataset"] = filled
        rows = [len(data)] * blanks, row_lengths(filled).tolist(), size, count
        step = size * count * trainer.args.gradient_accumulation_steps
        shared = SharedRows(sampler, *rows, step)
        batches.batch_sampler = BatchSampler(shared, size, False)
    return loader


def own_layout(trainer: Trainer) -> Layout:
    """Returns the layout that a trainer has, at first the config's."""
    args, flat = trainer.args, getattr(trainer.data_collator, "padding_free", False)
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return Layout(size, steps, args.gradient_checkpointing, flat)


def candidates(trainer: Trainer, run: Run) -> list[Layout]:
    """Returns the layouts of the same rows an optimiser step, fastest first."""
    own, flat = own_layout(trainer), joins_rows(trainer, run)
    rows = own.micro_batch * own.accumulation
    # a pass has a fixed cost, larger than that of recomputation
    fixed = "gradient_checkpointing" in run.config.sft
    kinds = [own.recompute] if fixed else [False, True]
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    return [Layout(n, rows // n, kind, flat) for n in sizes for kind in kinds]


def joins_rows(trainer: Trainer, run: Run) -> bool:
    """Returns whether rows are joined, or can be: they do not see one another."""
    model, collator = trainer.model, trainer.data_collator
    if own_layout(trainer).padding_free:
        return True
    takes = inspect.signature(model.get_base_model().forward).parameters
    is_set = "padding_free" in run.config.sft or hasattr(model, "for_training")
    if is_set or "position_ids" not in takes or not hasattr(collator, "padding_free"):
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
    return losses[0] == losses[1]


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
def apart(trainer: Trainer) -> Iterator[None]:
    """Has one of several processes count as all: its memory alone may run out."""
    one = {"num_processes": 1, "distributed_type": DistributedType.NO}
    states = AcceleratorState._shared_state, PartialState._shared_state
    with patch.dict(states[0], one), patch.dict(states[1], one):
        with patch.dict(vars(trainer.model)):  # accelerate's marks
            yield


@contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Takes random states, gradients and TRL's counts back, and frees memory."""
    runtime.free_memory()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            clear_memory(trainer)
            trainer._total_train_tokens = 0
            for values in trainer._metrics.values():
                values.clear()


def clear_memory(trainer: Trainer) -> None:
    trainer.model.zero_grad()
    buffers: Any = sys.modules.get("unsloth_zoo.gradient_checkpointing")
    if hasattr(buffers, "GPU_BUFFERS"):  # Unsloth's, which an error leaves in use
        buffers.reset_unsloth_gradient_checkpointing_buffers()
    runtime.free_memory()


def largest_batch(trainer: Trainer, layout: Layout) -> dict[str, Any]:
    """Returns the micro-batch of most tokens among those that the run will draw."""
    data, loader = trainer.train_dataset, trainer.get_train_dataloader()
    lengths = row_lengths(data)
    epochs, *_, steps = trainer.set_initial_training_values(trainer.args, loader)
    count, flat = runtime.count_processes(), layout.padding_free  # each draws as many
    batches = [batch for _ in range(epochs * count) for batch in loader.batch_sampler]
    batches = batches[: steps * layout.accumulation * count]
    tokens = [lengths[b].sum() if flat else lengths[b].max() * len(b) for b in batches]
    return loader.collate_fn([data[row] for row in batches[np.argmax(tokens)]])


def attempt(trainer: Trainer, layout: Layout) -> dict[str, Any]:
    """Returns tokens, seconds and peak GiB of a pass, and whether it fits."""
    optim, limit_gb = trainer.args.optim, runtime.find_machine().memory_gb
    state = 0 if "paged" in optim else 2 if "8bit" in optim else 8  # bytes a parameter
    state *= trainer.model.get_nb_trainable_parameters()[0]
    trainer.current_gradient_accumulation_steps = 1
    apply_layout(trainer, layout)
    with unchanged(trainer):
        batch = largest_batch(trainer, layout)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            limit_gb = min(limit_gb, free / 2**30)  # others may use the GPU, too
        model = trainer.accelerator.prepare(trainer.model)  # as `train` does
        result: dict[str, Any] = {"tokens": batch["input_ids"].numel()}
        try:
            for name in ("first_seconds", "seconds"):  # the first one may compile
                began = time.perf_counter()
                step = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
                trainer.training_step(model, step[0][0], step[1]).item()
                result[name] = round(time.perf_counter() - began, 3)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return result | {"verdict": "out of memory"}
        result["peak_gb"] = round(runtime.peak_memory_gb() + state / 2**30, 2)
    fits = result["peak_gb"] <= MARGIN * limit_gb
    return result | {"verdict": "fits" if fits else f"too near to {limit_gb:.2f} GiB"}


def train_within_memory(trainer: Trainer, run: Run, checkpoint: str | None) -> None:
    """Trains in the fastest layout, and in slower ones from where memory runs out."""
    choose_layout(trainer, run)
    while True:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            return
        except RuntimeError as error:
            if not trainer.slower or not should_reduce_batch_size(error):
                raise
        # past the handler, which would hold the activations
        checkpoint = go_slower(trainer) or checkpoint


def go_slower(trainer: Trainer) -> str | None:
    """Takes the next layout after a step failed; returns a checkpoint to go on from."""
    path, step = Path(trainer.args.output_dir), trainer.state.global_step
    layout = trainer.slower.pop(0)
    clear_memory(trainer)
    if step:
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer.optimizer = None  # the next one has the checkpoint's state
    apply_layout(trainer, layout)
    note, verdict = read_json(path.with_name(NOTE)), f"out of memory after step {step}"
    note["tries"].append(note["choice"] | {"verdict": verdict})
    write_json(path.with_name(NOTE), note | {"choice": layout._asdict()})
    log.info(f"{verdict}: going on with {layout}")
    return str(path / f"checkpoint-{step}") if step else None
