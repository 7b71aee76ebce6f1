"""Measures what the callbacks of a stage cost a training step.

    python benchmarks/callback_cost.py MACHINE [SHAPE [ENGINE]]   # a GPU; 1b, unsloth
    python benchmarks/callback_cost.py cpu tiny transformers      # tries the program

Two trainings of the same rows in one process, three times in turn: TRL's trainer as it
is, and with all that `fit` adds (clock, best adapter, copies, panel), with the shapes,
limits and layout of `sft_speed.py`. No step saves or evaluates: what a checkpoint takes
depends on the disk. Apart from that, the time within the callbacks themselves is
taken, each after the GPU has done what was asked of it. Writes `callback_cost.json`
(in $OUT, else results/).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import sft_speed

from helpers.files import read_json, write_json

RESULT = Path(os.environ.get("OUT", sft_speed.ROOT / "results")) / "callback_cost.json"
REPEATS = 3


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        start = sft_speed.synchronize()
        result = function(*arguments, **more)
        spent.append(sft_speed.synchronize() - start)
        return result

    return call


def step_seconds(trainer: Any) -> list[float]:
    """Trains, and returns the seconds of each step after the first ones."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(sft_speed.synchronize())

    trainer.add_callback(Clock())
    trainer.train()
    pairs = zip(ends, ends[1:], strict=False)
    return [end - start for start, end in pairs][sft_speed.WARM :]


def measure(machine: str, model: str, engine: str) -> None:
    from helpers import runtime

    runtime.start(engine)  # Unsloth before what it patches
    import torch

    from helpers import training
    from helpers.training import callbacks, layout
    from helpers.training import trainer as sft
    from helpers.training.inputs import Panel

    run = sft_speed.make_run(
        model, sft_speed.Way(engine, "auto"), torch.cuda.is_available()
    )
    net, tokenizer = training.load_for_training(run)
    from trl import SFTConfig, SFTTrainer  # Unsloth's, where it has replaced them

    rows, folder = sft_speed.make_rows("chat", net.config.vocab_size), run.path / "sft"
    steps: dict[str, list[float]] = {"without": [], "with": []}
    inside: list[float] = []
    for way in [*steps] * REPEATS:
        trainer = SFTTrainer(
            model=net,
            args=SFTConfig(**training.sft_arguments(run)),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        sft.keep_lora_fp32(net)  # as `fit` does
        layout.choose_layout(trainer, run)
        ours: list[Any] = []
        if way == "with":
            place = tempfile.mkdtemp()
            ours = [callbacks.Watch(100), callbacks.BestAdapter(folder / "adapter")]
            ours += [callbacks.SecondPlace(place, "copy", folder), Panel(folder)]
        for callback in ours:
            for name in [n for n in dir(callback) if n.startswith("on_")]:
                setattr(callback, name, timed(getattr(callback, name), inside))
            trainer.add_callback(callback)
        steps[way] += step_seconds(trainer)
    seconds = {way: round(median(values), 5) for way, values in steps.items()}
    count = REPEATS * sft_speed.STEPS
    table = {
        "machine": machine,
        "engine": engine,
        "layout": read_json(folder / layout.NOTE),
        "s_step": seconds,
        "apart": round(seconds["with"] / seconds["without"] - 1, 5),
        "in_callbacks_s_step": round(sum(inside) / count, 6),
        "share": round(sum(inside) / count / mean(steps["without"]), 6),
    }
    print(table)
    rounded = {way: [round(v, 5) for v in vs] for way, vs in steps.items()}
    write_json(RESULT, table | {"steps": rounded})


def main(machine: str, shape: str = "1b", engine: str = "unsloth") -> None:
    folder = sft_speed.find_shape(shape)
    os.environ |= sft_speed.limits(machine)
    with tempfile.TemporaryDirectory() as runs_folder:
        os.environ["TUNEBOOK_RUNS"] = runs_folder
        measure(machine, str(folder), engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
