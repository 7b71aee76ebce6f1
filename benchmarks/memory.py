"""Measures peak GPU memory of training and sampling, beside what `memory` predicts.

    python benchmarks/memory.py measure OUT.jsonl [ID ...]    # needs a CUDA GPU
    python benchmarks/memory.py table OUT.jsonl MACHINE       # into results/memory.json
    python benchmarks/memory.py fit OUT.jsonl                 # constants of `memory`

Random weights of the published shapes: memory does not depend on their values. Every
config runs in a process of its own, through `helpers.training` as a notebook would, in
fp16 under a cap of 14.0 GiB, FlashAttention off, as on a T4 (which reports 14.74 GiB,
the CUDA context included; torch's reserved figure does not hold the context). Rows are
as long as the config allows. The held-out half was named before anything was fitted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CAP_GB = 14.0
STEPS = 4
WORKERS = int(os.environ.get("TUNEBOOK_WORKERS", "4"))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLE = ROOT / "results" / "memory.json"
SHAPES = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "7b": "llama-2-7b"}


class Case(NamedTuple):
    """One config to measure; its id is `shape-engine-anything`."""

    id: str
    stage: str
    held_out: bool
    changes: dict[str, Any]

    @property
    def shape(self) -> str:
        """A key of `SHAPES`."""
        return self.id.split("-")[0]

    @property
    def engine(self) -> str:
        """`unsloth` or `transformers`."""
        return {"un": "unsloth", "tr": "transformers"}[self.id.split("-")[1]]


def sft(
    id: str,
    held_out: bool,
    batch: int,
    length: int,
    *,
    packing: bool = False,
    checkpointing: bool = True,
    accumulation: int = 2,
    **changes: Any,
) -> Case:
    """Returns an SFT case."""
    values = {
        "max_length": length,
        "sft__per_device_train_batch_size": batch,
        "sft__gradient_accumulation_steps": accumulation,
        "sft__packing": packing,
        "sft__gradient_checkpointing": checkpointing,
    }
    return Case(id, "sft", held_out, {**values, **changes})


def grpo(
    id: str,
    held_out: bool,
    batch: int,
    generations: int,
    length: int,
    *,
    accumulation: int = 1,
    checkpointing: bool = True,
    **changes: Any,
) -> Case:
    """Returns a GRPO case; it samples from the trained model unless told otherwise."""
    values = {
        "sampler": "model",
        "grpo__per_device_train_batch_size": batch,
        "grpo__gradient_accumulation_steps": accumulation,
        "grpo__num_generations": generations,
        "grpo__max_completion_length": length,
        "grpo__gradient_checkpointing": checkpointing,
    }
    return Case(id, "grpo", held_out, {**values, **changes})


QV = {"lora__target_modules": ["q_proj", "v_proj"], "lora__r": 32}
CASES = [
    # calibration half
    sft("1b-un-a", False, 2, 1024),
    sft("1b-un-b", False, 4, 2048),
    sft("1b-un-c", False, 4, 2048, packing=True),
    sft("1b-un-d", False, 2, 2048, packing=True, checkpointing=False),
    sft("1b-tr-a", False, 1, 1024),
    sft("1b-tr-b", False, 4, 2048),
    sft("1b-tr-c", False, 2, 1024, packing=True, checkpointing=False),
    sft("1b-tr-d", False, 2, 1024, weights="8bit"),
    sft("1b-un-e", False, 2, 1024, weights="16bit"),
    sft("3b-un-a", False, 4, 2048),
    sft("3b-un-b", False, 1, 2048, checkpointing=False),
    sft("3b-tr-a", False, 2, 2048),
    sft("3b-tr-b", False, 1, 1024, checkpointing=False, **QV),
    sft("7b-un-a", False, 2, 1024, packing=True),
    sft("7b-tr-a", False, 1, 512),
    sft("7b-tr-b", False, 2, 2048, **QV),
    grpo("1b-un-g", False, 8, 8, 256),
    grpo("1b-tr-g", False, 8, 8, 256),
    grpo("3b-un-g", False, 4, 4, 512),
    # named after the first measurement, for what no calibration case had covered
    sft("1b-un-i", False, 4, 1024, weights="8bit"),
    sft("3b-un-i", False, 1, 1024, weights="8bit"),
    sft("3b-tr-i", False, 1, 1024, weights="8bit"),
    sft("1b-un-i3", False, 1, 1024, weights="8bit"),
    sft("1b-un-i4", False, 8, 1024, weights="8bit"),
    sft("3b-un-i3", False, 1, 1536, weights="8bit"),
    sft("3b-un-i4", False, 2, 2048, weights="8bit"),
    grpo("3b-tr-i2", False, 8, 8, 128),
    grpo("1b-tr-i2", False, 8, 4, 512),
    grpo("1b-un-i5", False, 8, 8, 512),
    grpo("3b-un-i5", False, 8, 8, 192),
    grpo("1b-un-k", False, 8, 8, 256, sampler="copy"),
    grpo("3b-un-k", False, 4, 4, 512, sampler="copy"),
    grpo("1b-tr-k", False, 4, 4, 384, sampler="copy"),
    grpo("3b-tr-k", False, 8, 8, 128, sampler="copy"),
    # held-out half
    sft("1b-un-h1", True, 8, 1024),
    sft("1b-un-h2", True, 1, 2048, packing=True),
    sft("1b-un-h3", True, 2, 1024, checkpointing=False),
    sft("1b-tr-h1", True, 2, 2048),
    sft("1b-tr-h2", True, 4, 1024, packing=True),
    sft("1b-tr-h3", True, 1, 1024, weights="16bit"),
    sft("1b-un-h4", True, 2, 1024, weights="8bit"),
    sft("3b-un-h1", True, 2, 2048, packing=True),
    sft("3b-un-h2", True, 2, 1024, checkpointing=False, packing=True),
    sft("3b-tr-h1", True, 4, 1024),
    sft("3b-tr-h2", True, 1, 2048, checkpointing=False, **QV),
    sft("7b-un-h1", True, 4, 1024),
    sft("7b-un-h2", True, 1, 1024, checkpointing=False),
    sft("7b-tr-h1", True, 1, 2048),
    sft("7b-tr-h2", True, 2, 512, **QV),
    grpo("1b-un-gh", True, 4, 4, 512),
    grpo("1b-tr-gh", True, 4, 4, 512),
    grpo("3b-un-gh", True, 8, 8, 256),
    grpo("3b-tr-gh", True, 4, 4, 256),
    # named before the second calibration, which two cases above had asked for
    sft("1b-un-h5", True, 1, 2048, weights="8bit"),
    sft("3b-un-h5", True, 2, 1024, weights="8bit"),
    sft("1b-un-h7", True, 2, 2048, weights="8bit"),
    sft("1b-un-h6", True, 2, 1024, double_quant=False),
    grpo("1b-tr-gh2", True, 8, 8, 384),
    grpo("3b-tr-gh2", True, 8, 8, 192),
    grpo("1b-un-kh", True, 4, 4, 512, sampler="copy"),
    grpo("3b-un-kh", True, 8, 8, 256, sampler="copy"),
    grpo("1b-tr-kh", True, 8, 8, 256, sampler="copy"),
    grpo("3b-tr-kh", True, 4, 4, 256, sampler="copy"),
    # the default on Colab, finetome-llama32-1b
    grpo("1b-un-kh2", True, 8, 8, 320, accumulation=8, sampler="copy"),
]


def make_model(shape: str, folder: Path) -> None:
    """Writes a complete model of random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from helpers.shapes import KNOWN

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        ),
    ).save_pretrained(folder)
    config = LlamaConfig(
        **{**KNOWN[SHAPES[shape]], "max_position_embeddings": 8192},
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float16",
    )
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(folder: Path, length: int, packing: bool) -> None:
    """Writes conversations, of full length or (to pack) of 90 tokens, and problems."""
    size = 45 if packing else length + 50
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 1500 if packing else 80), ("eval", 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                turns = [
                    ("user", f"{name} {number} " * 3),
                    ("assistant", "word " * size),
                ]
                messages = [{"role": r, "content": t[:size]} for r, t in turns]
                file.write(json.dumps({"messages": messages}) + "\n")
    with (folder / "problems.jsonl").open("w") as file:
        for number in range(80):
            question = f"What is {number} + 1? ".ljust(90, ".")
            answer = f"{number} + 1 = {number + 1}\n#### {number + 1}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def build_config(case: Case, model: str, rows: Path) -> Any:
    """Returns the validated config of a case."""
    from helpers.config import changed, check_config

    base = {
        "name": case.id,
        "model": model,
        "engine": case.engine,
        "stages": [case.stage],
        "weights": "4bit",
        "best_by": "loss",
        "system_prompt": "",
        "data": {
            "train": [str(rows / "train.jsonl")],
            "eval": str(rows / "eval.jsonl"),
            "problems": str(rows / "problems.jsonl"),
        },
        "lora": {"r": 16, "lora_alpha": 16, "target_modules": ALL},
        "sft": {
            "max_steps": STEPS,
            "learning_rate": 2e-4,
            "optim": "adamw_8bit",
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "grpo": {
            "max_steps": 2,
            "learning_rate": 5e-6,
            "optim": "adamw_8bit",
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",  # it answers no more problems at a time
        },
    }
    if case.stage == "sft":
        base["grpo"] = {}
    else:
        base["sft"] = {}
    return changed(check_config(base), **case.changes)


def one(case: Case, model: str, out: Path) -> None:
    """Runs one case in this process and writes what it took."""
    from helpers import runs, runtime
    from helpers.data import preparation as data
    from helpers.grpo import trainer as grpo
    from helpers.masking.templates import render
    from helpers.training import sft
    from helpers.training import trainer as train

    record: dict[str, Any] = {"id": case.id}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNEBOOK_RUNS"] = folder
        sources = Path(folder) / "rows"
        length = case.changes.get("max_length", 1024)
        write_rows(sources, length, case.changes.get("sft__packing", False))
        run = runs.save_run(build_config(case, model, sources))
        data.prepare(run)
        started = time.perf_counter()
        net, tokenizer = train.load_for_training(run, case.stage)
        import torch

        cuda = torch.cuda.is_available()

        def note(name: str) -> None:
            if cuda:
                torch.cuda.synchronize()
                record[f"{name}_allocated"] = torch.cuda.memory_allocated()
                record[f"{name}_peak_allocated"] = torch.cuda.max_memory_allocated()
                record[f"{name}_peak_reserved"] = torch.cuda.max_memory_reserved()

        note("loaded")
        record["load_seconds"] = time.perf_counter() - started
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        build = sft.build_sft if case.stage == "sft" else grpo.build_grpo
        try:
            trainer = build(run, net, tokenizer)
            rows = trainer.train_dataset
            if case.stage == "sft":
                record["row_tokens"] = max(map(len, rows["input_ids"]))
            else:
                text = render(tokenizer, rows[0]["prompt"], for_generation=True)
                record["row_tokens"] = len(tokenizer(text)["input_ids"])
            note("built")
            marks = [time.perf_counter()]
            watch_steps(trainer, marks)
            trainer.train()
            record["step_seconds"] = [
                round(b - a, 3) for a, b in zip(marks, marks[1:], strict=False)
            ]
            record["loss"] = [
                e["loss"] for e in trainer.state.log_history if "loss" in e
            ]
            state = trainer.optimizer.state
            record["optimizer_tensors"] = sum(len(s) for s in state.values())
            record["fits"] = True
        except torch.OutOfMemoryError as error:
            record["fits"] = False
            record["error"] = str(error)[:300]
        note("trained")
        if cuda:
            record["cap_gb"] = runtime.memory_cap_gb()
    out.write_text(json.dumps(record) + "\n")


def watch_steps(trainer: Any, marks: list[float]) -> None:
    """Appends the time after each optimiser step to `marks`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Watch())


def measure(out: Path, ids: list[str]) -> None:
    """Runs the cases, several at a time, each in a process of its own."""
    chosen = [case for case in CASES if not ids or case.id in ids]
    folder = Path(os.environ.get("TUNEBOOK_SHAPES", tempfile.gettempdir())) / "shapes"
    environment = {
        **os.environ,
        "TUNEBOOK_DTYPE": "float16",
        "TUNEBOOK_GPU_GB": str(CAP_GB),
        "TOKENIZERS_PARALLELISM": "false",
    }
    program = [sys.executable, __file__]
    made = []
    for shape in SHAPES:
        place = folder / shape
        if any(case.shape == shape for case in chosen) and not place.exists():
            made.append(subprocess.Popen([*program, "make", shape, str(place)]))
    if any(process.wait() for process in made):
        sys.exit("a model could not be written")
    print(f"{len(chosen)} cases, models in {folder}", flush=True)

    def run(case: Case) -> None:
        started = time.perf_counter()
        piece = out.with_name(f"{out.name}.{case.id}")
        command = [*program, "one", case.id, str(folder / case.shape), str(piece)]
        log = out.with_name(f"{case.id}.log")
        with log.open("w") as file:
            code = subprocess.call(command, env=environment, stdout=file, stderr=file)
        if code == 0:
            with out.open("a") as file:
                file.write(piece.read_text())
            piece.unlink()
            log.unlink()
        seconds = time.perf_counter() - started
        print(
            f"{case.id}: {'ok' if code == 0 else 'FAILED'}, {seconds:.0f} s", flush=True
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, chosen))


def find_case(name: str) -> Case:
    """Returns the case of an id."""
    return next(case for case in CASES if case.id == name)


def read_measured(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what was measured, by id: of results/memory.json, and newer records."""
    found = {
        row["id"]: {
            "id": row["id"],
            "row_tokens": row["row_tokens"],
            "trained_peak_reserved": row["measured_gb"] * 2**30,
            "fits": row["ran"],
        }
        for row in json.loads(TABLE.read_text())["rows"]
    }
    return found | {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def predict(case: Case, record: dict[str, Any]) -> Any:
    """Returns what `memory` predicts of a case, given the rows that it had."""
    from helpers import memory
    from helpers.gpus import T4

    with tempfile.TemporaryDirectory() as folder:
        config = build_config(case, SHAPES[case.shape], Path(folder))
    assert T4.memory_gb == CAP_GB
    return memory.predict(config, T4, case.stage, row_tokens=record["row_tokens"])


def write_table(path: Path, machine: str) -> None:
    """Writes results/memory.json, and the tables of results/README.md anew."""
    import publish

    from helpers.runs import write_json, write_text

    rows = []
    for name, record in read_measured(path).items():
        case = find_case(name)
        found = predict(case, record)
        rows.append(
            {
                "id": name,
                "shape": SHAPES[case.shape],
                "engine": case.engine,
                "stage": case.stage,
                "config": case.changes,
                "row_tokens": record["row_tokens"],
                "held_out": case.held_out,
                "predicted_gb": round(found.peak_gb, 3),
                "measured_gb": round(record["trained_peak_reserved"] / 2**30, 3),
                "predicted_fits": found.fits,
                "ran": record["fits"],
            }
        )
    rows.sort(key=lambda row: (row["held_out"], [c.id for c in CASES].index(row["id"])))
    write_json(TABLE, {"machine": machine, "rows": rows})
    write_text(publish.RESULTS / "README.md", publish.page())
    print("\n".join(publish.memory_lines()))


# what `fit` may change, engine by engine and then for GRPO
FITTED = [
    (
        "unsloth",
        "sft",
        "HIDDEN INNER BACKWARD LOGIT_UNSLOTH GRADIENT BASE_GB_UNSLOTH LOGIT_FUSED "
        "LOGIT_CHUNKED",
    ),
    # not BASE_GB, which these cases do not tell from LOGIT
    ("transformers", "sft", "KEPT INT8 FEED_FORWARD ATTENTION LOGIT"),
    ("unsloth", "grpo", "CACHE"),
    ("transformers", "grpo", "ANSWER_LOGIT"),
]


def fit(path: Path) -> None:
    """Prints the constants of `memory` that suit the calibration half best."""
    from scipy.optimize import least_squares

    from helpers import memory

    measured = read_measured(path)
    for engine, stage, names in FITTED:
        cases = [
            case
            for case in CASES
            if not case.held_out
            and (case.engine, case.stage) == (engine, stage)
            and measured.get(case.id, {}).get("fits")
        ]

        def errors(values: Any, cases: Any = cases, names: str = names) -> list[float]:
            for name, value in zip(names.split(), values, strict=True):
                setattr(memory, name, float(value))
            peaks = [measured[c.id]["trained_peak_reserved"] / 2**30 for c in cases]
            found = [predict(c, measured[c.id]).peak_gb for c in cases]
            return [f / p - 1 for f, p in zip(found, peaks, strict=True)]

        start = [getattr(memory, name) for name in names.split()]
        best = least_squares(errors, start, bounds=(0, 100), x_scale=start)
        print(engine, stage, dict(zip(names.split(), best.x.round(3), strict=True)))
        for case, error in zip(cases, errors(best.x), strict=True):
            print(f"    {case.id:8} {error:+.1%}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["measure", out, *ids]:
            measure(Path(out), ids)
        case ["make", shape, folder]:
            make_model(shape, Path(folder))
        case ["one", name, model, out]:
            one(find_case(name), model, Path(out))
        case ["table", path, machine]:
            write_table(Path(path), machine)
        case ["fit", path]:
            fit(Path(path))
        case _:
            sys.exit(__doc__)
