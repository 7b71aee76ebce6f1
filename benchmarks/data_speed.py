"""Measures conversations per second from messages to packed tokens with labels.

    python benchmarks/data_speed.py            # -> results/data_speed.json

Rendering, tokenising, labels on the answers and packing of 20,000 synthetic
conversations of several turns, in one process on a CPU: ours, Unsloth's path (render,
tokenise in batches, `train_on_responses_only`) and TRL's (`assistant_only_loss`),
round after round side by side, each in a process of its own that imports first and
then starts the clock. All pack with TRL's `pack_dataset`. Medians of the rounds.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COUNT, ROUNDS, LENGTH = 20_000, 3, 2048
PATHS = ("ours", "unsloth", "trl")
WORDS = (
    "the of and to in is that for it was on are as with they be at one have this from "
    "by hot but some what there we can out other were all your when up use word how "
    "said an each she which do their time if will way about many then them would write"
).split()


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Returns chats of one to four rounds, some with a system turn, always the same."""
    draw = random.Random(3407)

    def say(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high))) + "."

    made = []
    for number in range(count):
        chat = [{"role": "system", "content": say(5, 15)}] if number % 3 == 0 else []
        for _ in range(draw.randint(1, 4)):
            chat.append({"role": "user", "content": say(5, 40)})
            chat.append({"role": "assistant", "content": say(10, 90)})
        made.append(chat)
    return made


def load_tokenizer() -> Any:
    """Returns the offline model's tokenizer with the ChatML template that TRL ships."""
    import trl

    from helpers import models

    tokenizer = models.load_tokenizer("smollm2-135m-offline")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen2_5.jinja").read_text()
    return tokenizer


def run_ours(chats: list[Any]) -> Any:
    """Returns our packed rows."""
    from datasets import Dataset
    from trl import pack_dataset

    from helpers.masking import mask_conversations

    tokenizer = load_tokenizer()
    started = time.perf_counter()
    masked = mask_conversations(tokenizer, chats, "assistant", LENGTH)
    packed = pack_dataset(Dataset.from_list(masked.rows), LENGTH)
    return packed, time.perf_counter() - started


def run_unsloth(chats: list[Any]) -> Any:
    """Returns the packed rows of Unsloth's stock notebooks."""
    import unsloth  # noqa: F401
    from datasets import Dataset
    from trl import pack_dataset
    from unsloth.chat_templates import train_on_responses_only

    tokenizer = load_tokenizer()
    learn = train_on_responses_only(
        None,
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
        tokenizer=tokenizer,
        return_function=True,
    )

    def render(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "text": [
                tokenizer.apply_chat_template(chat, tokenize=False)
                for chat in batch["messages"]
            ]
        }

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(
            batch["text"], add_special_tokens=False, truncation=True, max_length=LENGTH
        )
        return {"input_ids": ids["input_ids"]}

    data = Dataset.from_dict({"messages": chats})
    started = time.perf_counter()
    data = data.map(render, batched=True)
    data = data.map(tokenise, batched=True, remove_columns=["messages", "text"])
    data = data.map(learn, batched=True)
    return pack_dataset(data, LENGTH), time.perf_counter() - started


def run_trl(chats: list[Any]) -> Any:
    """Returns the packed rows that TRL's SFTTrainer makes of messages."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer()
    tiny = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
    )
    data = Dataset.from_dict({"messages": chats})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            packing=True,
            max_length=LENGTH,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        started = time.perf_counter()
        trainer = SFTTrainer(
            LlamaForCausalLM(tiny),
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
        )
        return trainer.train_dataset, time.perf_counter() - started


def one(path: str, count: int) -> None:
    """Runs one path in this process and prints what it took, as JSON."""
    import resource

    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    chats = conversations(count)
    packed, seconds = globals()[f"run_{path}"](chats)
    column = "labels" if "labels" in packed.column_names else "assistant_masks"
    learnt = sum(
        sum(x != -100 for x in row) if column == "labels" else sum(row)
        for row in packed[column]
    )
    found = {
        "seconds": seconds,
        "tokens": sum(len(row) for row in packed["input_ids"]),
        "learnt": learnt,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print("RESULT " + json.dumps(found))


def call(path: str, count: int) -> dict[str, Any]:
    """Returns what a path took in a process of its own."""
    command = [sys.executable, __file__, path, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{path} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main(count: int, rounds: int, out: Path) -> None:
    """Measures all paths, in turns, and writes the medians."""
    from helpers.runs import write_json

    seen: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    for number in range(rounds):
        for path in PATHS:
            seen[path].append(call(path, count))
            rate = count / seen[path][-1]["seconds"]
            print(f"round {number + 1}, {path}: {rate:.0f} a second", flush=True)
    rates = {
        path: [count / f["seconds"] for f in found] for path, found in seen.items()
    }
    result: dict[str, Any] = {"conversations": count}
    result |= {path: round(statistics.median(rates[path]), 1) for path in PATHS}
    fastest = max(result["unsloth"], result["trl"])
    result["times_the_faster"] = round(result["ours"] / fastest, 2)
    result["spread"] = {
        p: [round(min(r), 1), round(max(r), 1)] for p, r in rates.items()
    }
    result["tokens"] = {path: found[0]["tokens"] for path, found in seen.items()}
    result["learnt"] = {path: found[0]["learnt"] for path, found in seen.items()}
    result["peak_gb"] = {
        path: round(max(f["peak_gb"] for f in found), 2) for path, found in seen.items()
    }
    result["conditions"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in ("transformers", "trl", "unsloth"))
    )
    write_json(out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case [path, count] if path in PATHS:
            one(path, int(count))
        case []:
            main(COUNT, ROUNDS, ROOT / "results" / "data_speed.json")
        case [count, rounds, out]:
            main(int(count), int(rounds), Path(out))
        case _:
            sys.exit(__doc__)
