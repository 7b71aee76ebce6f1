"""Compares the memory estimate with measured peaks; measures them anew on a GPU.

    python benchmarks/memory.py                     # estimated, measured, error
    python benchmarks/memory.py table               # estimates, into the results
    python benchmarks/memory.py fit                 # constants of helpers/estimate.py
    python benchmarks/memory.py measure [ID ...]    # on a CUDA GPU, into the results

The cases are those of results/memory.json. Models have the published shapes and random
weights: memory does not depend on their values. Each case trains in a process of its
own, as a notebook would, in fp16 under a cap of 14.0 GiB, as on a T4. Constants are
fitted on the half of the cases that is not `held_out`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import estimate  # noqa: E402
from helpers.config import RunConfig, changed, check_config  # noqa: E402

CAP_GB = estimate.T4.memory_gb
TABLE = ROOT / "results" / "memory.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FITTED = "KEPT KEPT_UNSLOTH INT8 BACKWARD SCORE KEPT_SCORE LOGIT LOGIT_UNSLOTH CACHE"


def read_cases() -> list[dict[str, Any]]:
    """Returns the measured cases."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"]


def build_config(case: dict[str, Any], model: str, rows: str = "rows") -> RunConfig:
    """Returns the config of a case.

    Args:
        case: of `read_cases`.
        model: a known name, or the folder of a model with random weights.
        rows: the folder of its data.
    """
    training = {
        "optim": "adamw_8bit",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 4,
    }
    base = {
        "name": case["id"],
        "model": model,
        "engine": case["engine"],
        "stages": [case["stage"]],
        "weights": "4bit",
        "best_by": "loss",
        "system_prompt": "",
        "data": {
            "train": [f"{rows}/train.jsonl"],
            "problems": f"{rows}/problems.jsonl",
        },
        "lora": {"r": 16, "lora_alpha": 16, "target_modules": ALL},
        case["stage"]: training,
    }
    return changed(check_config(base), **case["config"])


def estimate_case(case: dict[str, Any]) -> float:
    """Returns the estimated peak of a case in GiB, for rows as long as it had."""
    field = "max_length" if case["stage"] == "sft" else "max_prompt_length"
    config = changed(build_config(case, case["shape"]), **{field: case["row_tokens"]})
    return float(estimate.estimate_memory(config).sum())


def errors(cases: list[dict[str, Any]]) -> list[float]:
    """Returns the relative error of each estimate."""
    return [estimate_case(case) / case["measured_gb"] - 1 for case in cases]


def show() -> None:
    """Prints the estimates beside the measurements."""
    for case in read_cases():
        peak_gb, measured_gb = estimate_case(case), case["measured_gb"]
        measured = f"{measured_gb:6.2f} {peak_gb / measured_gb - 1:+7.1%}"
        print(
            f"{case['id']:10} {peak_gb:6.2f} {measured if case['ran'] else 'too large'}"
        )
    print("\n".join(summary()))


def summary() -> list[str]:
    """Returns a line on the errors of each half of the cases."""
    lines, ran = [], [case for case in read_cases() if case["ran"]]
    for held_out in (False, True):
        sizes = [abs(e) for e in errors([c for c in ran if c["held_out"] == held_out])]
        lines.append(
            f"{'Held out' if held_out else 'Fitted'}: {len(sizes)} cases, mean error "
            f"{sum(sizes) / len(sizes):.1%}, largest {max(sizes):.1%}, "
            f"{sum(size > 0.15 for size in sizes)} past 15 %."
        )
    return lines


def fit() -> None:
    """Prints the constants that suit the cases best which are not held out."""
    from scipy.optimize import least_squares

    cases = [case for case in read_cases() if case["ran"] and not case["held_out"]]
    names = [*FITTED.split(), "WORKSPACE_GB"]

    def residuals(values: list[float]) -> list[float]:
        for name, value in zip(names, values, strict=True):
            setattr(estimate, name, float(value))
        return errors(cases)

    start = [getattr(estimate, name) for name in names]
    best = least_squares(residuals, start, bounds=(0, 100), x_scale=start)
    print(dict(zip(names, best.x.round(2).tolist(), strict=True)))


def make_model(shape: str, folder: Path) -> None:
    """Writes a complete model of random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        **{**estimate.KNOWN[shape], "max_position_embeddings": 8192},
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


def measure_case(case: dict[str, Any], model: str) -> None:
    """Trains a case in this process, and prints what it took as JSON."""
    from helpers import runs, runtime

    runtime.start(case["engine"])  # Unsloth before what it patches
    import torch

    from helpers.data import preparation as data
    from helpers.grpo import trainer as grpo
    from helpers.training import trainer as sft
    from helpers.training import trainer as train

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNEBOOK_RUNS"] = folder
        length = case["config"].get("max_length", 1024)
        write_rows(Path(folder), length, case["config"].get("sft__packing", False))
        run = runs.save_run(build_config(case, model, folder))
        data.prepare(run)
        net, tokenizer = train.load_for_training(run, case["stage"])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        build = sft.build_sft if case["stage"] == "sft" else grpo.build_grpo
        try:
            trainer = build(run, net, tokenizer)
            train.keep_lora_fp32(trainer.model)  # as in training
            trainer.train()
        except torch.OutOfMemoryError:
            case["ran"] = False
        case["measured_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    print(json.dumps(case))


def measure(ids: list[str]) -> None:
    """Measures cases anew, one after the other, and writes them into the results."""
    environment = {"TUNEBOOK_DTYPE": "float16", "TUNEBOOK_GPU_GB": str(CAP_GB)}
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for place, case in enumerate(table["rows"]):
            if ids and case["id"] not in ids:
                continue
            model = Path(folder, case["shape"])
            if not model.exists():
                make_model(case["shape"], model)
            command = [sys.executable, __file__, "one", case["id"], str(model)]
            text = subprocess.check_output(command, env=os.environ | environment)
            table["rows"][place] = json.loads(text.splitlines()[-1])
    write_table(table)


def write_table(table: dict[str, Any]) -> None:
    """Writes the results, with today's estimates."""
    for case in table["rows"]:
        case["predicted_gb"] = round(estimate_case(case), 3)
        case["predicted_fits"] = case["predicted_gb"] <= CAP_GB
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            show()
        case ["fit"]:
            fit()
        case ["table"]:
            write_table(json.loads(TABLE.read_text(encoding="utf-8")))
        case ["measure", *ids]:
            measure(ids)
        case ["one", name, model]:
            measure_case(next(c for c in read_cases() if c["id"] == name), model)
        case _:
            sys.exit(__doc__)
