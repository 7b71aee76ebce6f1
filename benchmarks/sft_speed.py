"""Measures SFT steps: ours, Unsloth's stock notebook, Unsloth padding-free, TRL's own.

    python benchmarks/sft_speed.py run MACHINE [SHAPES [WAYS [PROFILES]]]   # a GPU
    python benchmarks/sft_speed.py run cpu tiny trl,ours_trl short
    python benchmarks/sft_speed.py merge FILE ...   # rows of other machines' files
    python benchmarks/sft_speed.py table

SHAPES, WAYS and PROFILES are lists with commas, by default 1b,3b, then stock,
padding_free,trl,ours,compiled, then chat. All ways see the same rows in the same order,
eight an optimiser step; `compiled` packs them, so that a step has eight on average.
Random weights of the published shapes, 4-bit base, LoRA r 16 on all projections, fp16,
under a cap of 14.0 GiB without FlashAttention, as on a T4. Each (shape, way) has a
process of its own with a time limit. The first six steps do not count, then come three
repeats. Each row is written to `sft_speed.json` (in $OUT, else results/) as it is had;
a way that fails has rows with the `error`. What is compiled at the start counts in
`first_step_s`: of a way's first profile only, for Unsloth keeps it for the others.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402

from helpers import runs  # noqa: E402
from helpers.config import check_config  # noqa: E402
from helpers.estimate import KNOWN, NAMES  # noqa: E402
from helpers.files import read_json, write_json  # noqa: E402

RESULT = Path(os.environ.get("OUT", ROOT / "results")) / "sft_speed.json"
SHAPES = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "7b": "llama-2-7b"}
SHAPES["tiny"] = "tiny"
TINY = ("llama", 64, 2, 4, 2, 128, 300, 8192, True)
KNOWN["tiny"] = dict(zip(NAMES, TINY, strict=True))
# mean, least and most tokens of a row; 60 % of them are learnt
PROFILES = {"short": (80, 20, 240), "chat": (320, 60, 1200), "long": (1000, 250, 2048)}
ROWS, STEPS, WARM, REPEAT = 8, 24, 6, 6  # three repeats
RUN = 200  # steps of the run that is told with its start
DEFAULTS = ["1b,3b", "stock,padding_free,trl,ours,compiled", "chat"]
LOAD_S, LIMIT_S = 120, 90  # and for a profile: a slower process is given up


class Way(NamedTuple):
    """One way to group the rows of a step."""

    engine: str
    layout: str = "pinned"
    collator: bool = False  # transformers' own, which pads


WAYS = {
    "stock": Way("unsloth", collator=True),
    "padding_free": Way("unsloth"),
    "trl": Way("transformers"),
    "ours": Way("unsloth", "auto"),
    "ours_trl": Way("transformers", "auto"),
    "compiled": Way("transformers", "compiled"),
}


def make_rows(profile: str, vocabulary: int, count: int = ROWS * (STEPS + 8)) -> Any:
    """Returns rows of random tokens and seeded lengths, more than the steps take."""
    import numpy as np
    from datasets import Dataset

    mean, least, most = PROFILES[profile]
    draw = np.random.default_rng(0)
    sizes = draw.lognormal(np.log(mean) - 0.125, 0.5, count)
    rows = []
    for size in sizes.clip(least, most).astype(int):
        ids = draw.integers(3, vocabulary, size).tolist()
        asked = int(0.4 * size)
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return Dataset.from_list(rows)


def make_run(model: str, way: Way, on_gpu: bool) -> runs.Run:
    """Returns the run of a way: 2 x 4 rows a step, as the stock notebook has it."""
    values: dict[str, Any] = {"name": "speed", "model": model, "stages": ["sft"]}
    values |= {"engine": way.engine, "layout": way.layout, "max_length": 2048}
    values |= {"data": {"train": ["random tokens"]}, "best_by": "loss"}
    values["weights"] = "4bit" if on_gpu else "16bit"
    values["lora"] = {"r": 16, "lora_alpha": 16, "target_modules": memory.ALL}
    sft = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2}
    sft |= {"max_steps": STEPS, "learning_rate": 2e-4, "warmup_steps": 5}
    sft |= {"logging_steps": 1, "save_strategy": "no"}
    values["sft"] = sft | {"optim": "adamw_8bit" if on_gpu else "adamw_torch"}
    return runs.save_run(check_config(values))


def synchronize() -> float:
    """Returns the time when the GPU has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate() -> float:
    """Returns the operations a second of a large fp16 product, 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(20):
        start = synchronize()
        left @ left
    return 2 * 8192**3 / (synchronize() - start)


def measure(trainer: Any, run: runs.Run, began: float) -> dict[str, Any]:
    """Trains, and returns what the steps took."""
    from transformers import TrainerCallback

    from helpers import runtime, training

    table = training.choose_layout(trainer, run)
    times = {"layout_s": round(synchronize() - began, 2)}
    args = trainer.args
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps
    ends: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1 or state.global_step >= WARM:
                ends[state.global_step] = synchronize()

    trainer.add_callback(Clock())
    sampler = trainer.get_train_dataloader().batch_sampler
    order = [row for batch in sampler for row in batch]
    trainer.train()
    starts = range(WARM, STEPS, REPEAT)
    repeats = [round((ends[n + REPEAT] - ends[n]) / REPEAT, 4) for n in starts]
    drawn = [trainer.train_dataset[row] for row in order[count * WARM : count * STEPS]]
    seconds, tokens = ends[STEPS] - ends[WARM], sum(len(r["labels"]) for r in drawn)
    rows = sum(len(r.get("seq_lengths", [1])) for r in drawn)  # a packed row has many
    learnt = tokens - sum(r["labels"].count(-100) for r in drawn)
    times["first_step_s"] = round(ends[1] - began, 2)
    return times | {
        "rows_per_step": round(rows / (STEPS - WARM), 2),
        "s_step": round(seconds / (STEPS - WARM), 4),
        "s_step_repeats": repeats,
        "tokens_per_second": round(tokens / seconds),
        "supervised_per_second": round(learnt / seconds),
        "peak_gb": round(runtime.peak_memory_gb(), 3),
        "layout": json.loads(table.iloc[-1:].to_json(orient="records"))[0],
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e][:10],
    }


def one(shape: str, name: str, model: str, machine: str, profiles: list[str]) -> None:
    """Measures a way in this process, profile after profile."""
    started, way = time.perf_counter(), WAYS[name]
    from helpers import runtime

    runtime.start(way.engine)  # Unsloth before what it patches
    import torch
    from transformers import DataCollatorForSeq2Seq

    from helpers import estimate, training
    from helpers.training import trainer as sft

    on_gpu = torch.cuda.is_available()
    run = make_run(model, way, on_gpu)
    net, tokenizer = training.load_for_training(run)
    from trl import SFTConfig, SFTTrainer  # Unsloth's, where it has replaced them

    weights = [p for p in net.parameters() if p.requires_grad]
    initial = [parameter.detach().clone() for parameter in weights]
    base, rate = estimate.skeleton(model), matrix_rate()
    fixed = base.num_parameters() - base.get_input_embeddings().weight.numel()
    load_s = round(synchronize() - started, 2)
    for profile in profiles:
        (run.path / "sft" / "layout.json").unlink(missing_ok=True)
        for parameter, value in zip(weights, initial, strict=True):
            parameter.data = value.clone()  # each profile starts anew
        if on_gpu:
            runtime.free_memory()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer = SFTTrainer(
            model=net,
            args=SFTConfig(**training.sft_arguments(run)),
            train_dataset=make_rows(profile, net.config.vocab_size),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer) if way.collator else None,
        )
        sft.keep_lora_fp32(net)  # as `fit` does
        row: dict[str, Any] = {"shape": shape, "profile": profile, "way": name}
        row |= measure(trainer, run, began)
        row |= {"load_s": load_s, "start_s": round(load_s + row["first_step_s"], 2)}
        if rate:  # forward, and backward through the activations alone
            share = 4 * fixed * row["tokens_per_second"] / rate
            row |= {"matrix_tflops": round(rate / 1e12), "matrix_share": share}
            row["card"] = torch.cuda.get_device_name()
        write_row(machine, row)
        del trainer


def run_seconds(row: dict[str, Any]) -> float:
    """Returns the seconds of `RUN` steps, from the start of the trainer."""
    return row["first_step_s"] + (RUN - 1) * row["s_step"]


def times_stock(row: dict[str, Any], stock: dict[str, Any]) -> tuple[float, ...]:
    """Returns how much faster than stock the tokens go: the mean, least and most."""
    times = row["tokens_per_second"] / stock["tokens_per_second"]
    fast, slow = (row["s_step"] / end(row["s_step_repeats"]) for end in (min, max))
    spread = [end(stock["s_step_repeats"]) / stock["s_step"] for end in (min, max)]
    return times, times * slow * spread[0], times * fast * spread[1]


def write_errors(machine: str, shape: str, way: str, profiles: str, text: str) -> None:
    """Writes a row for each profile that a process which failed did not come to."""
    rows = read_json(RESULT).get("rows", [])
    done = [r["profile"] for r in rows if (r["shape"], r["way"]) == (shape, way)]
    for profile in profiles.split(","):
        if profile not in done:
            names = {"shape": shape, "profile": profile, "way": way}
            write_row(machine, names | {"error": text})


def merge(files: list[str]) -> None:
    """Puts the rows of other files into the results."""
    for file in files:
        part = read_json(Path(file))
        for row in part["rows"]:
            write_row(part["machine"], row)


def write_row(machine: str, row: dict[str, Any]) -> None:
    """Puts a row into the results, in the place of an older one."""
    names = ("shape", "profile", "way")
    rows = read_json(RESULT).get("rows", [])
    rows = [old for old in rows if any(old[n] != row[n] for n in names)]
    write_json(RESULT, {"machine": machine, "rows": [*rows, row]})


def find_shape(shape: str) -> Path:
    """Returns the folder of a shape's model, made first where it is missing."""
    shared = "/dev/shm" if Path("/dev/shm").exists() else tempfile.gettempdir()
    folder = Path(os.environ.get("TUNEBOOK_SHAPES", shared)) / "shapes" / shape
    if not folder.exists():  # in a process of its own, which frees its memory
        subprocess.check_call([sys.executable, __file__, "make", shape, str(folder)])
    return folder


def limits(machine: str) -> dict[str, str]:
    """Returns the variables that hold a GPU to a T4's arithmetic and memory."""
    cap = {"TUNEBOOK_DTYPE": "float16", "TUNEBOOK_GPU_GB": str(memory.CAP_GB)}
    return cap if machine != "cpu" else {}


def run_all(machine: str, shapes: str, ways: str, profiles: str) -> None:
    """Measures each way in a process of its own, one after the other."""
    environment = os.environ | limits(machine)
    with tempfile.TemporaryDirectory() as runs_folder:
        for shape, name in itertools.product(shapes.split(","), ways.split(",")):
            folder = find_shape(shape)
            command = [sys.executable, __file__, "one", shape, name, str(folder)]
            command += [machine, profiles]
            variables = environment | {"TUNEBOOK_RUNS": runs_folder}
            logs = Path(os.environ.get("OUT", folder.parent))
            log = logs / f"sft_speed.{shape}.{name}.log"
            options: Any = {"env": variables, "check": True}
            options["timeout"] = LOAD_S + LIMIT_S * len(profiles.split(","))
            with log.open("w") as file:
                options |= {"stdout": file, "stderr": file}
                try:
                    subprocess.run(command, **options)
                except subprocess.SubprocessError as error:
                    text = log.read_text()
                    late = isinstance(error, subprocess.TimeoutExpired)
                    last = str(error) if late else [*text.splitlines(), str(error)][-1]
                    write_errors(machine, shape, name, profiles, last[:300])
                    print(f"{error}\n{text[-2000:]}")
            show()


def show() -> None:
    """Prints the rows so far, with time and losses beside those of stock."""
    rows = read_json(RESULT).get("rows", [])
    stock = {(r["shape"], r["profile"]): r for r in rows if r["way"] == "stock"}
    for row in rows:
        if "error" in row:
            print(*row.values())
            continue
        text = "{shape:4} {profile:5} {way:12} {s_step:.3f} s {tokens_per_second:6} "
        text += "tokens/s {peak_gb:6.2f} GiB start {start_s:.0f} s"
        text = text.format(**row)
        base = stock.get((row["shape"], row["profile"]), {"error": "not measured"})
        if "error" not in base:
            pairs = zip(row["losses"], base["losses"], strict=False)
            apart = max(abs(loss / other - 1) for loss, other in pairs)
            whole = run_seconds(base) / run_seconds(row)
            times, least, most = times_stock(row, base)
            text += f" {times:.2f} [{least:.2f}, {most:.2f}] x stock, {whole:.2f} x in "
            text += f"{RUN} steps, losses {apart:.3%} apart"
        print(text, list(row["layout"].values()), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", machine, *rest] if len(rest) <= 3:
            given = [*rest, *DEFAULTS[len(rest) :]]
            for names, known in zip(given, (SHAPES, WAYS, PROFILES), strict=True):
                if unknown := [n for n in names.split(",") if n not in known]:
                    sys.exit(f"{', '.join(unknown)}: there are {', '.join(known)}")
            run_all(machine, *given)
        case ["make", shape, folder]:
            memory.make_model(SHAPES[shape], Path(folder))
        case ["one", shape, name, model, machine, profiles]:
            one(shape, name, model, machine, profiles.split(","))
        case ["merge", *files] if files:
            merge(files)
        case ["table"]:
            show()
        case _:
            sys.exit(__doc__)
