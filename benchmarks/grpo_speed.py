"""Measures GRPO steps an hour: ours, Unsloth's stock trainer, TRL's ways to sample.

    python benchmarks/grpo_speed.py run MACHINE [NAME ...]    # needs a CUDA GPU
    python benchmarks/grpo_speed.py run cpu --tiny ours trl   # tries the program

The same random weights of Llama-3.2-1B's shape (time does not depend on their values,
and completions never end early), 4-bit base with LoRA r 16 on all projections, 8
generations of 256 tokens of one prompt of about 110 tokens a step, fp16, under a cap of
14.0 GiB without FlashAttention, as on a T4. TRL's continuous batching casts LoRA to
fp16, whose gradients cannot be scaled: it gets bf16. Each way has a process of its own,
one after the other; the first steps, which compile, do not count. One that fails leaves
its error. Writes `grpo_speed.json` (in $OUT, else results/) after each way.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

RESULT = Path(os.environ.get("OUT", ROOT / "results")) / "grpo_speed.json"
GENERATIONS, TOKENS = 8, 256
WARM, TIMED, PROFILED = 2, 8, 2
LIMIT_S, TOTAL_S = 260, 900  # a process, and all: what takes longer is given up
DEFAULT = ["ours", "unsloth", "trl-cb", "vllm"]


class Way(NamedTuple):
    """One way to train and sample."""

    engine: str
    copied: bool = False
    compiled: bool = False
    micro_batch: int = GENERATIONS
    sampling: str = ""  # a library's, by a switch of TRL's


WAYS = {
    "ours": Way("unsloth", copied=True, compiled=True),
    "unsloth": Way("unsloth"),
    "trl": Way("transformers"),
    "trl-cb": Way("transformers", sampling="continuous"),
    "vllm": Way("transformers", sampling="vllm"),
    # what else ours could be
    "ours-short": Way("unsloth", copied=True),  # as in short runs
    "ours-2x4": Way("unsloth", copied=True, compiled=True, micro_batch=2),
    "ours-plain": Way("transformers", copied=True),
}
# 64 blocks of 256 tokens hold all completions; else half of the GPU, whatever its cap
CONTINUOUS = {"num_blocks": 64, "max_batch_tokens": 1024}
SAMPLING: dict[str, dict[str, Any]] = {
    "": {},
    "continuous": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": CONTINUOUS,
    },
    "vllm": {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.06,  # of all its memory, not of the cap
    },
}


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns a cheap reward that random tokens spread."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def build_trainer(
    way: Way, model_folder: str, out: Path, tokens: int
) -> tuple[Any, Any]:
    """Returns the trainer of a way, and our sampler where it has one."""
    from transformers import set_seed

    from helpers import runtime
    from helpers.models import adapters
    from helpers.models import load as models

    runtime.find_machine()
    model, tokenizer = models.load_model(
        model_folder, engine=way.engine, weights="4bit", max_length=1024
    )
    set_seed(0)
    lora = {"r": 16, "lora_alpha": 16}
    lora["target_modules"] = [  # type: ignore[assignment]
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    model = adapters.add_lora(
        model,
        lora,
        engine=way.engine,
        checkpointing=True,
    )
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from helpers.inference import sampler as sampling

    on_gpu = runtime.find_machine().device == "cuda"
    sampler = sampling.Sampler(model, compiled=way.compiled) if way.copied else None
    questions = [f"What is {number} + 1? ".ljust(90, ".") for number in range(80)]
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in questions]
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=str(out / "checkpoints"),
            per_device_train_batch_size=way.micro_batch,
            gradient_accumulation_steps=GENERATIONS // way.micro_batch,
            num_generations=GENERATIONS,
            max_completion_length=tokens,
            max_steps=WARM + TIMED + PROFILED,
            learning_rate=1e-4,
            optim="adamw_8bit",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
            gradient_checkpointing=on_gpu,
            fp16=on_gpu and way.sampling != "continuous",
            bf16=on_gpu and way.sampling == "continuous",
            use_cpu=not on_gpu,
            **SAMPLING[way.sampling],
        ),
        reward_funcs=[spread],
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        **({"rollout_func": sampler} if sampler else {}),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes them bf16, which fp16 cannot scale
            parameter.data = parameter.data.float()
    return trainer, sampler


def synchronize() -> float:
    """Returns the time when the GPU has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(trainer: Any) -> tuple[list[float], dict[str, float]]:
    """Returns the ends of steps, and seconds by phase, which training fills."""
    from transformers import TrainerCallback

    ends: list[float] = []
    phases: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step < WARM + TIMED:
                return function(*args, **kwargs)
            start = synchronize()
            result = function(*args, **kwargs)
            phases[name] += synchronize() - start
            return result

        return call

    for name in ("_generate", "_prepare_inputs", "compute_loss", "training_step"):
        setattr(trainer, name, timed(name, getattr(trainer, name)))

    class Watch(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not ends:
                ends.append(synchronize())

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.start = synchronize()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            if trainer.state.global_step >= WARM + TIMED:
                phases["optimiser"] += synchronize() - self.start

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(synchronize())

    trainer.add_callback(Watch())
    return ends, phases


def one(name: str, model: str, out: Path, tokens: int) -> None:
    """Runs one way in this process and writes what it took."""
    import torch

    started = time.perf_counter()
    way = WAYS[name]
    trainer, sampler = build_trainer(way, model, out.with_suffix(""), tokens)
    built = time.perf_counter()
    ends, phases = watch(trainer)
    trainer.train()
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    counted = steps[WARM : WARM + TIMED]
    total = sum(steps[WARM + TIMED :])
    inner = phases["_prepare_inputs"]
    parts = {
        "sampling": phases["_generate"],
        "scoring": inner - phases["_generate"],
        "loss forward": phases["compute_loss"],
        "backward": phases["training_step"] - inner - phases["compute_loss"],
        "optimiser": phases["optimiser"],
        "other": total - phases["training_step"] - phases["optimiser"],
    }
    parts = {name: seconds / PROFILED for name, seconds in parts.items()}
    learning = [parts[name] for name in ("loss forward", "backward", "optimiser")]
    split = {name: parts[name] for name in ("sampling", "scoring", "other")}
    split["learning"] = sum(learning)
    history = trainer.state.log_history
    record: dict[str, Any] = {
        "steps_an_hour": round(3600 / statistics.median(counted), 1),
        "step_s": [round(s, 3) for s in counted],
        "first_step_s": round(steps[0], 1),
        "load_s": round(built - started, 1),
        "split_s": {k: round(v, 4) for k, v in split.items()},
        "parts_s": {k: round(v, 4) for k, v in parts.items()},
        "completion_tokens": mean(history, "completions/mean_length"),
        "grad_norm": mean(history, "grad_norm"),
        "loss": mean(history, "loss"),
    }
    if torch.cuda.is_available():
        record["peak_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        record["machine"] = torch.cuda.get_device_name()
        record["torch"] = torch.__version__
    if sampler is not None:
        record["sampler"] = measure_sampler(trainer, sampler, tokens)
    elif way.engine == "unsloth" and torch.cuda.is_available():
        from unsloth.models import _decode_graphs

        record["unsloth_graphs"] = _decode_graphs.stats(trainer.model.get_base_model())
    out.write_text(json.dumps(record) + "\n")
    if "TUNEBOOK_PROFILE" in os.environ:
        show_profile(trainer)


def mean(history: list[dict[str, Any]], name: str) -> float | None:
    """Returns the mean of a metric over the logged steps that have it."""
    values = [e[name] for e in history if e.get(name) is not None]
    return round(statistics.mean(values), 6) if values else None


def measure_sampler(trainer: Any, sampler: Any, tokens: int) -> dict[str, float]:
    """Returns seconds of the sampler's parts, and its agreement on a whole batch."""
    ids = [list(range(3, 113))] * GENERATIONS
    found: dict[str, float] = {}

    def clock(name: str, function: Any, times: int = 3) -> None:
        function()
        start = synchronize()
        for _ in range(times):
            function()
        found[name] = round((synchronize() - start) / times, 5)

    clock("fold_s", sampler.refresh)
    stops, drawn = trainer.eos_token_ids, sampler.decoder.settings
    clock("one_token_s", lambda: sampler.decoder.generate(ids, 1, stops, drawn))
    clock("all_tokens_s", lambda: sampler.decoder.generate(ids, tokens, stops, drawn))
    found["ms_a_token"] = round(
        (found["all_tokens_s"] - found["one_token_s"]) / max(1, tokens - 1) * 1000, 3
    )
    (drawn_ids,), (sampled,) = sampler.decoder.generate(ids[:1], tokens, stops, drawn)
    found |= agreement(trainer, ids[0], drawn_ids, sampled)
    return found


def agreement(
    trainer: Any, prompt: list[int], ids: list[int], logps: list[float]
) -> dict[str, float]:
    """Returns how far sampled log-probabilities are from the trained model's."""
    import torch

    device = trainer.accelerator.device
    whole = torch.tensor([prompt + ids], device=device)
    with torch.no_grad():
        trained = trainer._get_per_token_logps_and_entropies(
            trainer.model, whole, torch.ones_like(whole), len(ids)
        )[0]
    difference = trained[0, -len(ids) :].float() - torch.tensor(logps, device=device)
    return {
        "importance_ratio": round(difference.exp().mean().item(), 6),
        "logp_difference": round(difference.abs().mean().item(), 6),
    }


def show_profile(trainer: Any) -> None:
    """Prints where a step's time goes, by kernel and by operator."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.training_step(trainer.model_wrapped, batch, None)
    trainer._step, trainer._buffered_inputs = 0, None
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        trainer.training_step(trainer.model_wrapped, batch, None)
        synchronize()
    table = profiler.key_averages()
    for key in ("self_cuda_time_total", "self_cpu_time_total"):
        print(table.table(sort_by=key, row_limit=25, max_name_column_width=60))


def run(machine: str, names: list[str], tiny: bool) -> None:
    """Runs the ways one after the other and writes the results."""
    from memory import CAP_GB

    shape = "tiny" if tiny else "1b"
    tokens = 8 if tiny else TOKENS
    home = (
        Path("/dev/shm") if Path("/dev/shm").exists() else Path(tempfile.gettempdir())
    )
    home = Path(os.environ.get("TUNEBOOK_SHAPES", home)) / "shapes"
    folder = home / shape
    environment = {
        **os.environ,
        "TUNEBOOK_GPU_GB": str(CAP_GB),
        "TOKENIZERS_PARALLELISM": "false",
    }
    program = [sys.executable, __file__]
    if not folder.exists():
        subprocess.check_call([*program, "make", shape, str(folder)])
    records: dict[str, dict[str, Any]] = {}
    ends = time.monotonic() + TOTAL_S
    for name in names:
        if name == "vllm" and importlib.util.find_spec("vllm") is None:
            records[name] = {"error": "vLLM is not installed"}
        else:
            half = "bfloat16" if WAYS[name].sampling == "continuous" else "float16"
            environment["TUNEBOOK_DTYPE"] = "float32" if tiny else half
            log = Path(os.environ.get("OUT", home)) / f"grpo_speed.{name}.log"
            limit_s = max(1, min(LIMIT_S, ends - time.monotonic()))
            command = [*program, "one", name, str(folder), "OUT", str(tokens)]
            records[name] = run_one(command, environment, log, limit_s)
        print(name, json.dumps(records[name], indent=1), flush=True)
        if not tiny:
            write(machine, records, CAP_GB)


def run_one(
    command: list[str], environment: dict[str, str], log: Path, limit_s: float
) -> dict[str, Any]:
    """Returns the record of a way that a process of its own runs, or its error."""
    with tempfile.TemporaryDirectory() as place, log.open("w") as file:
        out = Path(place) / "record.json"
        command[-2] = str(out)
        options: dict[str, Any] = {"env": environment, "stdout": file, "stderr": file}
        started = time.perf_counter()
        try:
            code = subprocess.call(command, timeout=limit_s, **options)
        except subprocess.TimeoutExpired:
            code = 124
        whole_s = round(time.perf_counter() - started, 1)
        if out.exists():
            return json.loads(out.read_text()) | {"whole_s": whole_s}
    if code == 124:
        return {"error": f"given up after {whole_s} s", "whole_s": whole_s}
    print(log.read_text()[-3000:], flush=True)
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    faults = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    error = (faults or lines or [f"exit {code}"])[-1]
    return {"error": error[:300], "whole_s": whole_s}


def write(machine: str, records: dict[str, dict[str, Any]], cap_gb: float) -> None:
    """Writes what was measured so far."""
    from helpers.files import write_json

    rates = {name: r.get("steps_an_hour") for name, r in records.items()}
    if rates.get("ours") and rates.get("unsloth"):
        rates["ours_times_unsloth"] = round(rates["ours"] / rates["unsloth"], 2)
    conditions = {
        "machine": machine,
        "shape": "llama-3.2-1b, random weights, 4-bit base, LoRA r 16",
        "dtype": "float16",
        "cap_gb": cap_gb,
        "generations": GENERATIONS,
        "completion_tokens": TOKENS,
        "steps": TIMED,
    }
    write_json(RESULT, {**rates, "conditions": conditions, "runs": records})


def make(shape: str, folder: Path) -> None:
    """Writes a model of random weights; `tiny` is a shape of this program's own."""
    import memory

    from helpers.estimate import KNOWN, NAMES

    tiny = ("llama", 64, 2, 4, 2, 128, 300, 8192, True)
    KNOWN["tiny"] = dict(zip(NAMES, tiny, strict=True))
    shape = {"1b": "llama-3.2-1b"}.get(shape, shape)
    memory.make_model(shape, folder)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", machine, *rest]:
            names = [name for name in rest if name != "--tiny"]
            if unknown := [name for name in names if name not in WAYS]:
                sys.exit(f"{', '.join(unknown)}: no way; there are {', '.join(WAYS)}")
            run(machine, names or DEFAULT, "--tiny" in rest)
        case ["make", shape, folder]:
            make(shape, Path(folder))
        case ["one", name, model, out, tokens]:
            one(name, model, Path(out), int(tokens))
        case _:
            sys.exit(__doc__)
