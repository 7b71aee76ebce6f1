"""Measures the same training on one GPU and on more: speed, losses, memory, survival.

    python benchmarks/scale.py run MACHINE [--gpus 1 2 4] [--shapes 1b 3b]
        [--engines unsloth transformers] [--parts sft profile fsdp kill grpo]
        [--budget 540]
    ACCELERATE_USE_CPU=1 python benchmarks/scale.py run cpu --gpus 1 2 --shapes tiny
        --engines transformers                                # tries the program
    python benchmarks/scale.py run MACHINE --gpus 2 --shapes 7b --parts fsdp
    python benchmarks/scale.py table
    python benchmarks/scale.py predict  # the tables of docs/scaling.md

Random weights of the published shapes, 4-bit base, LoRA r 16 on all projections, fp16,
under a cap of 14.0 GiB a GPU without FlashAttention, as on T4s. Each way has processes
of its own with a time limit, and GPUs of its own: ways of fewer GPUs than there are run
side by side, so that each is measured while all GPUs and the host are busy. After
BUDGET seconds no other is started. Each way's results go to `scale.json` (in $OUT, else
results/) at its end.

sft   32 and 8 rows an optimiser step on each GPU (`per_gpu`), then on all together
      (`in_all`): the same rows in the same order as on one GPU, so the losses should
      be the same. The layout is the machine's choice. `speedup` compares the tokens a
      second with those of one GPU, of the same file.
profile  the same with `per_gpu` alone, and what each GPU did in the last steps, in
      seconds a step: arithmetic, NCCL with its waiting, copies to and from the host.
fsdp  `python -m helpers train` on the most GPUs, transformers alone: with `--shard`
      (`shared`), and with whole weights on each (`whole`). Then both again, under a cap
      half-way between their peaks: shared (`shared, capped`), which should fit, and on
      one GPU (`whole, capped`), which should run out of memory.
kill  `python -m helpers train`: on one GPU to the end; on two, one of which is killed
      after a checkpoint; and on the most GPUs from there to the end.
grpo  32 answers of 256 tokens, to four problems, a step on each GPU, sampled from each
      GPU's 16-bit copy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import memory, sft_speed  # noqa: E402
from benchmarks.markdown import to_markdown  # noqa: E402
from helpers import runs  # noqa: E402
from helpers.config import changed, check_config  # noqa: E402
from helpers.files import read_json, write_json  # noqa: E402

RESULT = Path(os.environ.get("OUT", ROOT / "results")) / "scale.json"
PROGRAM = str(Path(__file__).resolve())
PARTS = ("sft", "profile", "fsdp", "kill", "grpo")
# fields of LlamaConfig, in the order of helpers.estimate.NAMES after the type
PREDICTED = {
    "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256, 131072, False),
    "llama-3.1-70b": (8192, 80, 64, 8, 28672, 128256, 131072, False),
}
ROWS = (32, 8)  # of an optimiser step
WARM, STEPS, REPEAT = 3, 12, 3  # three repeats of three steps
RUN_ROWS, RUN_STEPS = 8, 16  # of the parts fsdp and kill
# one row a pass on any number of GPUs, and the optimiser that shared weights take
ALIKE: dict[str, Any] = {"sft__per_device_train_batch_size": 1}
ALIKE |= {"sft__gradient_accumulation_steps": RUN_ROWS, "sft__optim": "adamw_torch"}
ALIKE |= {"sft__max_steps": 6}  # a step of shared weights takes seconds
GRPO_WARM, GRPO_STEPS = 2, 6
SHOWN = ("speedup", "s_step", "tokens_per_second", "peak_gb", "loss_distance")
SHOWN += ("s_to_end", "resumed", "error")
KEYS = ("part", "shape", "engine", "gpus", "rows", "rows_a_step")
LIMIT_S, LEAST_S = 200, 35  # of a way; what is left for one to be started
WRITING = threading.Lock()


def base_config(name: str, engine: str, model: str, on_gpu: bool) -> dict[str, Any]:
    """Returns what the configs of all ways share."""
    values: dict[str, Any] = {"name": name, "model": model, "engine": engine}
    values |= {"weights": "4bit" if on_gpu else "16bit", "max_length": 2048}
    lora = {"r": 16, "lora_alpha": 16, "target_modules": memory.ALL}
    return values | {"lora": lora, "best_by": "loss", "system_prompt": ""}


def optimiser(on_gpu: bool) -> dict[str, Any]:
    optim = "adamw_8bit" if on_gpu else "adamw_torch"
    return {"optim": optim, "logging_steps": 1, "save_strategy": "no"}


def sft_config(name: str, engine: str, model: str, rows: int, on_gpu: bool) -> Any:
    """Returns the config of SFT on random tokens, so many rows an optimiser step."""
    sft = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": rows // 2}
    sft |= {"max_steps": STEPS, "learning_rate": 2e-4, "warmup_steps": 5}
    values = base_config(name, engine, model, on_gpu) | {"stages": ["sft"]}
    values |= {"data": {"train": ["random tokens"]}, "sft": sft | optimiser(on_gpu)}
    return check_config(values)


def clock(warm: int, last: int) -> tuple[Any, dict[int, float]]:
    """Returns a callback, and the times at which it sees the ends of steps."""
    from transformers import TrainerCallback

    ends: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if warm <= state.global_step <= last:
                ends[state.global_step] = sft_speed.synchronize()

    return Clock(), ends


def profiler() -> tuple[Any, dict[str, float]]:
    """Returns a callback, and a GPU's last steps by kind, in seconds a step."""
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    seen = dict.fromkeys(("arithmetic", "nccl", "copies"), 0.0)
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU

    class Profiler(TrainerCallback):
        profile = torch.profiler.profile(activities=[activity])

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == STEPS - REPEAT:
                self.profile.start()
            if state.global_step == STEPS:
                self.profile.stop()
                for event in self.profile.events():
                    if event.device_type == torch.autograd.DeviceType.CUDA:
                        words = event.name.split()
                        kind = "nccl" if "nccl" in event.name.lower() else "arithmetic"
                        kind = "copies" if {"HtoD", "DtoH"} & {*words} else kind
                        seen[kind] += event.time_range.elapsed_us() / 1e6 / REPEAT

    return Profiler(), seen


def measure_sft(
    run: runs.Run, net: Any, tokenizer: Any, began: float, profiled: bool
) -> dict[str, Any]:
    """Trains on random tokens, and returns what the steps took."""
    from accelerate.utils import gather_object
    from trl import SFTConfig, SFTTrainer  # Unsloth's, where it has replaced them

    from helpers import runtime, training
    from helpers.training import layout
    from helpers.training import trainer as sft

    arguments = training.sft_arguments(run)
    arguments["include_num_input_tokens_seen"] = "non_padding"
    count = run.config.sft["gradient_accumulation_steps"] * 2 * (STEPS + 1)
    trainer = SFTTrainer(
        model=net,
        args=SFTConfig(**arguments),
        train_dataset=sft_speed.make_rows("chat", net.config.vocab_size, count),
        processing_class=tokenizer,
    )
    sft.keep_lora_fp32(net)  # as `fit` does, like the next lines
    own = trainer.get_train_dataloader
    trainer.get_train_dataloader = partial(layout.filled_loader, trainer, own)
    table = training.choose_layout(trainer, run)
    callback, ends = clock(WARM, STEPS)
    trainer.add_callback(callback)
    if profiled:
        profile, did = profiler()
        trainer.add_callback(profile)
    trainer.train()
    seen = [e["num_input_tokens_seen"] for e in logged(trainer)]
    last = STEPS - REPEAT if profiled else STEPS  # a profile takes time itself
    starts = range(WARM, last, REPEAT)
    repeats = [round((ends[n + REPEAT] - ends[n]) / REPEAT, 4) for n in starts]
    seconds = ends[last] - ends[WARM]
    tokens = seen[last - 1] - seen[WARM - 1]
    peaks = gather_object([round(runtime.peak_memory_gb(), 3)])
    row = {
        "s_step": round(seconds / (last - WARM), 4),
        "s_step_repeats": repeats,
        "tokens_per_second": round(tokens / seconds),
        "peak_gb": max(peaks),
        "start_s": round(ends[WARM] - began, 1),
        "layout": json.loads(table.iloc[-1:].to_json(orient="records"))[0],
        "losses": [e["loss"] for e in logged(trainer)],
    }
    if profiled:
        row["profile"] = gather_object([{k: round(s, 4) for k, s in did.items()}])
    return row


def logged(trainer: Any) -> list[dict[str, Any]]:
    return [e for e in trainer.state.log_history if "loss" in e]


def one(part: str, shape: str, engine: str, gpus: int, model: str) -> None:
    """Measures a way in this process, one of `gpus`."""
    began = time.perf_counter()
    from helpers import runtime

    runtime.start(engine)  # Unsloth before what it patches
    import torch

    on_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    names = {"part": part, "shape": shape, "engine": engine, "gpus": gpus}
    if part in ("sft", "profile"):
        from helpers import training

        kinds = {"per_gpu": gpus} if gpus > 1 else {}
        if part == "sft" or gpus == 1:
            kinds["in_all"] = 1
        configs = {
            (rows, count): sft_config(
                f"{rows}-{count}", engine, model, n * count, on_gpu
            )
            for count in ROWS
            for rows, n in kinds.items()
        }
        with runtime.first_process():
            ways = {key: runs.save_run(config) for key, config in configs.items()}
        net, tokenizer = training.load_for_training(next(iter(ways.values())))
        weights = [p for p in net.parameters() if p.requires_grad]
        initial = [parameter.detach().clone() for parameter in weights]
        for (rows, count), run in ways.items():
            for parameter, value in zip(weights, initial, strict=True):
                parameter.data = value.clone()  # each begins anew
                parameter.grad = None
            runtime.free_memory()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            row = measure_sft(run, net, tokenizer, began, part == "profile")
            kind = {"rows": rows, "rows_a_step": count, "card": card}
            write_row(names | kind | row)
            began = time.perf_counter()
    else:
        row = measure_grpo(engine, gpus, model, on_gpu)
        kind = {"rows": "per_gpu", "rows_a_step": ROWS[0], "card": card}
        write_row(names | kind | row)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure_grpo(engine: str, gpus: int, model: str, on_gpu: bool) -> dict[str, Any]:
    """Trains GRPO on sums, 32 answers on each GPU, and returns what steps took."""
    from accelerate.utils import gather_object

    from helpers import runtime, stages, training
    from helpers.grpo import build_grpo
    from helpers.training import trainer as sft

    folder = Path(os.environ["TUNEBOOK_RUNS"])
    passes = ROWS[0] // 8 * gpus
    grpo = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": passes}
    grpo |= {"num_generations": 8, "max_completion_length": 256 if on_gpu else 16}
    grpo |= {"max_steps": GRPO_STEPS, "learning_rate": 1e-5, "eval_strategy": "no"}
    values = base_config("grpo", engine, model, on_gpu) | {"stages": ["grpo"]}
    values |= {"data": {"problems": str(folder / "problems.jsonl")}}
    values |= {"sampler": "copy", "grpo": grpo | optimiser(on_gpu)}
    with runtime.first_process():
        memory.write_rows(folder, 64, packing=False)
        run = runs.save_run(check_config(values))
        stages.ensure_ready(run, "grpo")
    net, tokenizer = training.load_for_training(run, "grpo")
    trainer = build_grpo(run, net, tokenizer)
    sft.keep_lora_fp32(net)
    callback, ends = clock(GRPO_WARM, GRPO_STEPS)
    trainer.add_callback(callback)
    trainer.train()
    seconds = (ends[GRPO_STEPS] - ends[GRPO_WARM]) / (GRPO_STEPS - GRPO_WARM)
    last = [e for e in trainer.state.log_history if "reward" in e][-1]
    length = last["completions/mean_length"]
    peaks = gather_object([round(runtime.peak_memory_gb(), 3)])
    drift = "sampling/sampling_logp_difference/mean"
    drifts = [e[drift] for e in trainer.state.log_history if drift in e]
    return {
        "s_step": round(seconds, 3),
        "tokens_per_second": round(ROWS[0] * gpus * length / seconds),
        "peak_gb": max(peaks),
        "copy_from_trained_nats": drifts,
    }


def write_row(row: dict[str, Any]) -> None:
    """Puts a row into the results, in the place of an older one; one process does."""
    values = read_json(RESULT)
    rows = [r for r in values.get("rows", []) if not is_older(r, row)]
    write_json(RESULT, values | {"rows": [*rows, row]})


def is_older(row: dict[str, Any], new: dict[str, Any]) -> bool:
    """Returns whether a row is an older one of the same way, or its error."""
    same = all(row[key] == new[key] for key in KEYS[:4])
    return same and (row["rows"] == "error" or all(row[k] == new[k] for k in KEYS[4:]))


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with what can be said once one GPU's are there, too."""
    for row in rows:
        alike = (*KEYS[:3], "rows_a_step")
        same = [r for r in rows if all(r[k] == row[k] for k in alike)]
        base = next((r for r in same if r["gpus"] == 1 and "s_step" in r), None)
        if base is None or "s_step" not in row or row["part"] == "kill":
            continue
        row["speedup"] = round(row["tokens_per_second"] / base["tokens_per_second"], 3)
        if row["part"] == "sft" and row["rows"] == "in_all":
            pairs = zip(row["losses"], base["losses"], strict=True)
            row["loss_distance"] = max(abs(x / y - 1) for x, y in pairs)
    return rows


def launcher(gpus: int) -> list[str]:
    if gpus == 1:
        return [sys.executable]
    options = ["--standalone", f"--nproc-per-node={gpus}"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def run_config(name: str, engine: str, model: str, **changes: Any) -> Path:
    """Writes the config of a run of few rows, with a checkpoint at every other step."""
    import torch

    folder, on_gpu = Path(os.environ["TUNEBOOK_RUNS"]), torch.cuda.is_available()
    sft = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    sft |= {"max_steps": RUN_STEPS, "learning_rate": 2e-4, "warmup_steps": 2}
    sft |= optimiser(on_gpu) | {"save_strategy": "steps", "save_steps": 2}
    values = base_config(name, engine, model, on_gpu) | {"stages": ["sft"], "sft": sft}
    values |= {"data": {"train": [str(folder / "train.jsonl")]}, "layout": "pinned"}
    path = folder / f"{name}.json"
    path.write_text(changed(check_config(values), **changes).model_dump_json())
    return path


class Training:
    """A process of `python -m helpers train`, and the run that it trains."""

    def __init__(self, config: Path, *options: str, **variables: str) -> None:
        command = [sys.executable, "-m", "helpers", "train", str(config)]
        command += ["--stage", "sft", *options]
        settings: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        settings |= {"text": True, "cwd": ROOT, "env": os.environ | variables}
        self.process = subprocess.Popen(command, **settings)
        self.folder = config.with_suffix("")

    def end(self, late: float) -> str:
        """Returns what it printed."""
        text, _ = self.process.communicate(timeout=max(1, late - time.monotonic()))
        return text

    def losses(self) -> list[float]:
        history = self.folder / "sft" / "log_history.json"
        entries = json.loads(history.read_text()) if history.exists() else []
        return [e["loss"] for e in entries if "loss" in e]


def distance(losses: list[float], others: list[float]) -> float:
    return max(abs(x / y - 1) for x, y in zip(losses, others, strict=True))


def run_fsdp(shape: str, gpus: int, model: str, late: float) -> None:
    """Trains with whole and with shared weights, and where whole ones do not fit."""
    memory.write_rows(Path(os.environ["TUNEBOOK_RUNS"]), 400, packing=False)
    names = {"part": "fsdp", "shape": shape, "engine": "transformers"}
    losses: list[float] = []

    def train(rows: str, count: int, *more: str, **variables: str) -> float:
        config = run_config(rows.replace(", ", "-"), "transformers", model, **ALIKE)
        way = Training(config, "--gpus", str(count), *more, **variables)
        text = way.end(late)
        row = names | {"gpus": count, "rows": rows, "rows_a_step": RUN_ROWS}
        row["exit_code"] = way.process.returncode
        report = read_json(way.folder / "report.json")
        if part := report.get("sft"):
            losses[:] = losses or way.losses()
            row |= {"tokens_per_second": part["tokens_per_second"]}
            row |= {"peak_gb": part["peak_memory_gb"], "steps": part["steps"]}
            row |= {"reloaded": part["reloaded"]}
            row["loss_distance"] = distance(way.losses(), losses)
            row["card"] = report["environment"]["device"]
        else:
            lines = [line for line in text.splitlines() if "Error" in line] or [text]
            row["error"] = lines[-1][:300]
        write_row(row | variables)
        return row.get("peak_gb", 0.0)

    shared_gb, whole_gb = train("shared", gpus, "--shard"), train("whole", gpus)
    if 0 < shared_gb < whole_gb:  # small models have little to share
        cap = {"TUNEBOOK_GPU_GB": f"{(whole_gb + shared_gb) / 2:.2f}"}
        train("shared, capped", gpus, "--shard", **cap)
        train("whole, capped", 1, **cap)


def run_kill(shape: str, engine: str, most: int, model: str, late: float) -> None:
    """Kills one of two processes, and goes on with `most`; compares the losses."""
    folder = Path(os.environ["TUNEBOOK_RUNS"])
    memory.write_rows(folder, 400, packing=False)
    row: dict[str, Any] = {"part": "kill", "shape": shape, "engine": engine}
    row["gpus"] = most
    config = run_config("killed", engine, model)
    whole = Training(run_config("whole", engine, model))
    text = whole.end(late)
    assert whole.losses(), text[-1500:]
    killed = Training(config, "--gpus", "2")
    process = killed.process
    points = folder / "killed" / "sft" / "checkpoints"
    while not any(points.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < late, "no checkpoint"
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    rank_1 = next(p for p in ranks if p.environ().get("LOCAL_RANK") == "1")
    rank_1.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    text = killed.end(late)
    row |= {"s_to_end": round(time.perf_counter() - began, 1)}
    row |= {"exit_code": process.returncode, "last_line": text.splitlines()[-1]}
    row["processes_left"] = sum(p.is_running() for p in ranks)
    killed = Training(config, "--gpus", str(most))
    text = killed.end(late)
    assert killed.losses(), text[-1500:]
    going = [line for line in text.splitlines() if "going on from" in line]
    row["resumed"] = going[0].rpartition("/")[2] if going else None
    row |= {"rows": "in_all", "rows_a_step": RUN_ROWS, "steps": len(killed.losses())}
    row["loss_distance"] = distance(killed.losses(), whole.losses())
    write_row(row)


def jobs(options: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """Returns part, shape, engine and GPUs of each way, those of fewest GPUs first."""
    ways, most = [], max(options.gpus)
    for shape in options.shapes:
        for engine in options.engines:
            for gpus in options.gpus:
                ways += [(p, shape, engine, gpus) for p in ("sft", "profile", "grpo")]
        if most > 1:
            ways.append(("fsdp", shape, "transformers", most))
            ways.append(("kill", shape, options.engines[-1], most))
    return sorted((w for w in ways if w[0] in options.parts), key=lambda way: way[3])


def run_all(options: argparse.Namespace) -> None:
    """Measures way after way, and side by side where GPUs are left."""
    late = time.monotonic() + options.budget
    write_json(RESULT, read_json(RESULT) | {"machine": options.machine})
    cores, most = len(os.sched_getaffinity(0)), max(options.gpus)
    variables = os.environ | {"OMP_NUM_THREADS": str(cores // most or 1)}
    cap = {"TUNEBOOK_DTYPE": "float16", "TUNEBOOK_GPU_GB": str(memory.CAP_GB)}
    variables |= cap if options.machine != "cpu" else {}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables |= {"NCCL_NVLS_ENABLE": "0", "PYTHONPATH": os.pathsep.join(paths)}
    for shape in options.shapes:
        if not model_folder(shape).exists():  # in a process, which frees its memory
            make = [sys.executable, PROGRAM, "make", shape, str(model_folder(shape))]
            subprocess.check_call(make, env=variables)
    free, running = list(range(most)), dict[Future[None], list[int]]()
    with ThreadPoolExecutor(most) as pool:
        for way in jobs(options):
            while len(free) < way[3]:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    free = sorted(free + running.pop(done))
                    done.result()
            mine, free = free[: way[3]], free[way[3] :]
            running[pool.submit(run_way, *way, mine, variables, late)] = mine
    values = read_json(RESULT)
    write_json(RESULT, values | {"rows": compare(values.get("rows", []))})
    show()


def model_folder(shape: str) -> Path:
    shared = "/dev/shm" if Path("/dev/shm").exists() else tempfile.gettempdir()
    return Path(os.environ.get("TUNEBOOK_SHAPES", shared)) / "shapes" / shape


def run_way(
    part: str,
    shape: str,
    engine: str,
    gpus: int,
    numbers: list[int],
    variables: dict[str, str],
    late: float,
) -> None:
    """Measures a way in processes of its own, on the GPUs of these numbers."""
    left_s, title = late - time.monotonic(), f"{part} {shape} {engine} {gpus}"
    if left_s < LEAST_S:
        print(f"no time for {title}")
        return
    several = part in ("kill", "fsdp")  # runs, each with a launcher of its own
    limit_s = min(LIMIT_S * (6 if several else 1), left_s)
    head = [sys.executable] if several else launcher(gpus)
    command = [*head, PROGRAM, "one", part, shape, engine, str(gpus)]
    log = RESULT.with_name(f"scale.{title.replace(' ', '.')}.log")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as file:
        own = variables | {"TUNEBOOK_RUNS": folder, "LIMIT_S": str(limit_s)}
        own |= {"OUT": folder, "UNSLOTH_COMPILE_LOCATION": f"{folder}/compiled"}
        own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, numbers))
        settings: Any = {"env": own, "stdout": file, "stderr": file}
        with subprocess.Popen(command, start_new_session=True, **settings) as way:
            try:
                code = way.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
                # torch's launcher puts each process into a session of its own
                for process in psutil.Process(way.pid).children(recursive=True):
                    process.kill()
                way.kill()
        rows = read_json(Path(folder) / RESULT.name).get("rows", [])
    seconds = time.monotonic() - began
    text = f"{title}: {seconds:.0f} s, exit code {code}"
    if code != 0:
        text += "\n" + log.read_text()[-2000:]
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        error = "time limit" if code is None else lines[-1][:300]
        names = (part, shape, engine, gpus, "error", None)
        rows.append(dict(zip(KEYS, names, strict=True)) | {"error": error})
    print(text, flush=True)
    with WRITING:
        for row in rows:
            write_row(row)


def show() -> None:
    """Prints the results."""
    for row in compare(read_json(RESULT).get("rows", [])):
        text = " ".join(str(row[key]) for key in KEYS)
        names = ("speedup", "s_step", "s_step_repeats", "tokens_per_second", "peak_gb")
        names += ("loss_distance", "layout", "copy_from_trained_nats", "profile")
        names += ("error", "s_to_end", "exit_code", "last_line", "resumed")
        names += ("processes_left",)
        print(text, {name: row[name] for name in names if name in row}, flush=True)


def section() -> list[str]:
    """Returns the section of results/README.md."""
    values, columns = read_json(RESULT), [*KEYS, *SHOWN]
    rows = [{c: row.get(c) for c in columns} for row in compare(values["rows"])]
    for row in rows:
        if row["loss_distance"]:
            row["loss_distance"] = f"{row['loss_distance']:.2g}"
    profiles = [
        {"shape": row["shape"], "rows_a_step": row["rows_a_step"], "gpu": gpu}
        | {"s_step": row["s_step"], **part}
        for row in values["rows"]
        for gpu, part in enumerate(row.get("profile", []))
    ]
    return [
        "Training on one GPU and on more: random weights, 4-bit, r 16, fp16, a cap",
        f"of 14.0 GiB a GPU, {values['machine']}, by `python benchmarks/scale.py`.",
        "`per_gpu`: so many rows a step on each GPU; `in_all`: on all together.",
        "Speedup: of tokens a second, over one GPU's, all GPUs being busy either way.",
        "Loss distance: the largest relative one from one GPU's losses, step by step.",
        *("", to_markdown(rows), ""),
        "Profile: seconds a step in which a GPU computed, was in NCCL, which includes",
        "its waiting for others, and copied from and to the host.",
        *("", to_markdown(profiles)),
    ]


def longest_share(gpus: int) -> tuple[float, float]:
    """Returns the most tokens of a GPU over the mean: as rows come, and as dealt."""
    import numpy as np

    from helpers.training.layout import SharedRows

    draw, ratios, rows = np.random.default_rng(0), list[list[float]](), ROWS[-1]
    for _ in range(10):
        sizes = draw.lognormal(np.log(320) - 0.125, 0.5, rows * gpus).clip(60, 1200)
        shared = SharedRows(range(len(sizes)), [], sizes, rows, gpus, len(sizes))
        dealt = sizes[[*shared]]
        sums = [part.reshape(gpus, rows).sum(axis=1) for part in (sizes, dealt)]
        ratios.append([part.max() / part.mean() for part in sums])
    plain, dealt = np.mean(ratios, axis=0)
    return float(plain), float(dealt)


def predicted_config(model: str, engine: str) -> Any:
    config = sft_config("predict", engine, model, ROWS[-1], on_gpu=True)
    settings: Any = {"sft__per_device_train_batch_size": 1}
    return changed(config, **settings)


def predict() -> None:
    """Prints memory, communication and efficiency of more GPUs than were measured."""
    from helpers import estimate

    for model, fields in PREDICTED.items():
        estimate.KNOWN[model] = dict(
            zip(estimate.NAMES, ("llama", *fields), strict=True)
        )
    for model in ("llama-2-7b", *PREDICTED):
        config = predicted_config(model, "transformers")
        peaks = [estimate.estimate_memory(config, shares=n).sum() for n in (1, 2, 4, 8)]
        print(f"| {model} | " + " | ".join(f"{gb:.1f}" for gb in peaks) + " |")
    mean = 320  # tokens of a chat row
    waits = {gpus: longest_share(gpus) for gpus in (8, 64, 512)}
    for model in PREDICTED:
        lora = {"r": 16, "target_modules": memory.ALL}
        trained, _ = estimate.skeleton(model, lora).get_nb_trainable_parameters()
        base = estimate.skeleton(model)
        weights = base.num_parameters()
        embeddings = 2 * base.get_input_embeddings().weight.numel()
        config = predicted_config(model, "unsloth")
        peak = estimate.estimate_memory(config).sum()
        operations = 6 * ROWS[-1] * mean * weights
        compute_s = operations / (2.6e12 * 132)  # `this_gpu` of an H100
        for gpus, longest in waits.items():
            link = 300e9 if gpus <= 8 else 50e9  # bytes/s a GPU: NVLink, 400 Gb/s
            share = 2 * (gpus - 1) / gpus  # of what each GPU holds, in a ring
            # 4-bit weights in both passes, fp32 embeddings in one
            gathered = (weights - embeddings) / 2 + 4 * embeddings / 2
            reduce_s, gather_s = (share * n / link for n in (4 * trained, gathered))
            packed = compute_s / (compute_s + reduce_s)
            sharded = compute_s / (compute_s + reduce_s + gather_s)
            split = estimate.estimate_memory(config, shares=gpus).sum()
            text = f"| {model} | {gpus} | {peak:.0f} | {split:.1f} "
            text += f"| {compute_s:.2f} | {reduce_s:.3f} | {gather_s:.2f} "
            shares = (packed, packed / longest[0], packed / longest[1], sharded)
            print(f"{text}| " + " | ".join(f"{x:.0%}" for x in shares) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table", "predict"])
    parser.add_argument("machine", nargs="?", default="")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1b", "3b"])
    engines = ["unsloth", "transformers"]
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--budget", type=float, default=540)
    options = parser.parse_args()
    if options.command == "table":
        show()
        return
    if options.command == "predict":
        predict()
        return
    if unknown := {*options.shapes} - {*sft_speed.SHAPES}:
        sys.exit(f"{', '.join(unknown)}: there are {', '.join(sft_speed.SHAPES)}")
    run_all(options)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", shape, folder]:
            memory.make_model(sft_speed.SHAPES[shape], Path(folder))
        case ["one", part, shape, engine, gpus]:
            late = time.monotonic() + float(os.environ["LIMIT_S"])
            model = str(model_folder(shape))
            if part == "kill":
                run_kill(shape, engine, int(gpus), model, late)
            elif part == "fsdp":
                run_fsdp(shape, int(gpus), model, late)
            else:
                one(part, shape, engine, int(gpus), model)
        case _:
            main()
