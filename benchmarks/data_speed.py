"""Measures conversations per second from messages to packed tokens with labels.

    python benchmarks/data_speed.py            # -> results/data_speed.json

Rendering, tokenising, labels on the answers and packing of 20,000 synthetic
conversations of several turns, in one process on a CPU: ours, Unsloth's path (render,
tokenise in batches, `train_on_responses_only`) and TRL's (`assistant_only_loss`),
round after round side by side, each in a process of its own that imports first and
then starts the clock. All pack with TRL's `pack_dataset`. Medians of the rounds.

Ours reads the conversations from a JSON-lines file, line by line; the others find them
in a `Dataset` before the clock starts. Memory is what the process holds at most while
the clock runs and that is no file's (`RssAnon`), less what it held before; ours is
measured with four times the conversations too.

The words are those of the tokenizer's vocabulary, with the frequencies of words in
natural text, and 2 % that are put together anew, besides numbers, marks, other scripts
and code: 8 % of 1.5 million words are different ones, as in English prose.
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
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COUNT, ROUNDS, LENGTH = 20_000, 3, 2048
PATHS = ("ours", "unsloth", "trl")
MARKS = [*",,,,...?!:;)-", "'s", "\n\n", " (", ' "']
OTHER = [
    "Zoë",
    "naïve",
    "—",
    "é",
    "你好",
    "мир",
    "🎉",
    "👩‍👩‍👧",
    "こんにちは",
    "€",
    "“x”",
    "…",
]
CODE = [
    "for {a} in range({n}):",
    "    {a}_{b} = {b}[{n}] + {a}",
    '    return {a}("{b}", {n})',
    "if not {a}.{b}:",
    "# {a} {b} {c}",
    "- **{a} {b}**: {c}",
    "| {a} | {b} | {n} |",
]


def conversations(count: int) -> Iterator[list[dict[str, str]]]:
    """Yields chats of one to four rounds, some with a system turn, always the same."""
    draw = random.Random(3407)
    ranks = sorted(load_tokenizer().get_vocab().items(), key=lambda item: item[1])
    words = [token[1:] for token, _ in ranks if token[0] == "Ġ" and len(token) > 2]
    words = [word for word in words if word.isascii() and word.isalpha()]
    # Zipf's law, a little steeper
    weights = list(accumulate((n + 2.7) ** -1.15 for n in range(len(words))))

    def say(low: int, high: int) -> str:
        said = draw.choices(words, cum_weights=weights, k=draw.randint(low, high))
        for n, word in enumerate(said):
            kind = draw.random()
            if kind < 0.02:
                said[n] = word + draw.choice(words)
            elif kind < 0.045:
                said[n] = f"{draw.randint(0, 10 ** draw.randint(1, 5)):,}"
            elif kind < 0.2:
                said[n] = word + draw.choice(MARKS)
            elif kind < 0.24:
                said[n] = word.capitalize()
            elif kind < 0.245:
                said[n] = draw.choice(OTHER)
        text = " ".join(said).replace("\n ", "\n")
        return text.strip().capitalize() + "."

    def code() -> str:
        names = {name: draw.choice(words) for name in "abc"}
        lines = draw.choices(CODE, k=draw.randint(2, 9))
        return "\n".join(line.format(n=draw.randint(0, 99), **names) for line in lines)

    for number in range(count):
        chat = [{"role": "system", "content": say(5, 15)}] if number % 3 == 0 else []
        for _ in range(draw.randint(1, 4)):
            chat.append({"role": "user", "content": say(5, 40)})
            answer = say(10, 90)
            if draw.random() < 0.15:
                answer += f"\n\n```\n{code()}\n```\n{say(5, 20)}"
            chat.append({"role": "assistant", "content": answer})
        yield chat


def load_tokenizer() -> Any:
    """Returns the offline model's tokenizer with the ChatML template that TRL ships."""
    import trl

    from helpers.models import load as models

    tokenizer = models.load_tokenizer("smollm2-135m-offline")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen2_5.jinja").read_text()
    return tokenizer


class Meter:
    """The seconds of a block of code, and the memory it took at most."""

    def __enter__(self) -> Meter:
        self.before = self.peak = anonymous_gb()
        self.running = True
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        self.started = time.perf_counter(), time.process_time()
        return self

    def look(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous_gb())
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started[0]
        self.cpu_seconds = time.process_time() - self.started[1]
        self.running = False
        self.watch.join()
        self.gb = self.peak - self.before


def anonymous_gb() -> float:
    """Returns the memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 2**20


def run_ours(path: Path) -> tuple[Any, Meter]:
    """Returns our packed rows."""
    from trl import pack_dataset

    from helpers.files import stream_rows
    from helpers.masking.dataset import mask_conversations

    tokenizer = load_tokenizer()
    with Meter() as meter:
        chats = (row["messages"] for row in stream_rows(path))
        file = path.with_name("rows.arrow")
        masked = mask_conversations(tokenizer, chats, "assistant", LENGTH, file)
        packed = pack_dataset(masked.rows, LENGTH)
    return packed, meter


def run_unsloth(path: Path) -> tuple[Any, Meter]:
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

    data = Dataset.from_json(str(path))
    with Meter() as meter:
        data = data.map(render, batched=True)
        data = data.map(tokenise, batched=True, remove_columns=["messages", "text"])
        data = data.map(learn, batched=True)
        packed = pack_dataset(data, LENGTH)
    return packed, meter


def run_trl(path: Path) -> tuple[Any, Meter]:
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
    data = Dataset.from_json(str(path))
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
        model = LlamaForCausalLM(tiny)
        with Meter() as meter:
            trainer = SFTTrainer(
                model, arguments, train_dataset=data, processing_class=tokenizer
            )
        return trainer.train_dataset, meter


def one(path: str, file: Path) -> None:
    """Runs one path in this process and prints what it took, as JSON."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    packed, meter = globals()[f"run_{path}"](file)
    column = "labels" if "labels" in packed.column_names else "assistant_masks"
    unlearnt = -100 if column == "labels" else 0
    tokens = learnt = 0
    for row in packed:
        tokens += len(row["input_ids"])
        learnt += len(row[column]) - row[column].count(unlearnt)
    found = {name: getattr(meter, name) for name in ("seconds", "cpu_seconds", "gb")}
    print("RESULT " + json.dumps(found | {"tokens": tokens, "learnt": learnt}))


def call(path: str, count: int, folder: Path) -> dict[str, Any]:
    """Returns what a path took in a process of its own."""
    from helpers.files import write_rows

    file = folder / f"{count}.jsonl"
    if not file.exists():
        write_rows(file, ({"messages": chat} for chat in conversations(count)))
    command = [sys.executable, __file__, path, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{path} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main(count: int, rounds: int, out: Path) -> None:
    """Measures all paths, in turns, and writes the medians."""
    from helpers.files import write_json

    seen: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(rounds):
            for path in PATHS:
                seen[path].append(call(path, count, folder))
                rate = count / seen[path][-1]["seconds"]
                print(f"round {number + 1}, {path}: {rate:.0f} a second", flush=True)
        more = call("ours", 4 * count, folder)
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
    result["cpu_ms_each"] = {
        p: round(statistics.median(f["cpu_seconds"] for f in found) / count * 1e3, 3)
        for p, found in seen.items()
    }
    result["tokens"] = {path: found[0]["tokens"] for path, found in seen.items()}
    result["learnt"] = {path: found[0]["learnt"] for path, found in seen.items()}
    result["peak_gb"] = {
        path: round(max(f["gb"] for f in found), 3) for path, found in seen.items()
    }
    result["ours_of_four_times_as_many"] = {
        "per_second": round(4 * count / more["seconds"], 1),
        "peak_gb": round(more["gb"], 3),
    }
    result["conditions"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in ("transformers", "trl", "unsloth"))
        + f", load {os.getloadavg()[0]:.1f}"
    )
    write_json(out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case [path, file] if path in PATHS:
            one(path, Path(file))
        case []:
            main(COUNT, ROUNDS, ROOT / "results" / "data_speed.json")
        case [count, rounds, out]:
            main(int(count), int(rounds), Path(out))
        case _:
            sys.exit(__doc__)
