"""Measures a chat's tokens per second and seconds to the first token on a CPU.

    python -m helpers export RUN --format gguf:q4_k_m gguf:q8_0 gguf:f16
    python benchmarks/chat_speed.py RUN        # -> results/chat_speed.json

The same prompts, of the run's held-out rows first, greedily, through what the chat page
calls: `stream_gguf` for each GGUF of the run, `stream_answer` for transformers in fp32
with the adapter. All are open together, and take turns prompt by prompt, so that what
else the machine does falls on all of them. A first round is not counted. The rate is
that of the tokens after the first. llama.cpp keeps the beginning that a prompt shares
with the one before; transformers reads all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = ("q4_k_m", "q8_0", "f16")


def measure(texts: Iterator[str]) -> tuple[float, float, int]:
    """Returns seconds to the first token, tokens/s after it, and the token count."""
    begin, first, count = time.perf_counter(), 0.0, 0
    for _ in texts:
        count += 1
        first = first or time.perf_counter() - begin
    seconds = time.perf_counter() - begin - first
    return first, (count - 1) / seconds, count


def spread(values: list[float], digits: int) -> dict[str, float]:
    points = {"median": median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in points.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "results/chat_speed.json")
    options = parser.parse_args()

    from helpers import runtime
    from helpers.config import HELD_OUT
    from helpers.data.preparation import parts_of, to_prompts
    from helpers.files import read_rows, write_json
    from helpers.inference import chat, generation, items
    from helpers.models.load import load_model
    from helpers.runs import open_run

    run, sampling = open_run(options.run), {"max_new_tokens": options.tokens}
    if runtime.find_machine().device != "cpu":
        sys.exit("a GPU answers here: run it on a CPU, or with CUDA_VISIBLE_DEVICES=")
    names = [n for n in [*HELD_OUT, "train"] if n in parts_of(run.config.data)]
    sets = [read_rows(run.require(f"data/{name}.jsonl")) for name in names]
    rows = [row for part in sets if part for row in to_prompts(run.config, part)]
    prompts = [row["prompt"] for row in rows]
    if len(prompts) < options.prompts:
        sys.exit(f"{len(prompts)} rows in data/, {options.prompts} wanted: --prompts")
    name, loading, *_ = items.resolve_model(options.run)
    values: dict[str, list[Any]] = defaultdict(list)
    with ExitStack() as stack:
        streams = {}
        for kind in KINDS:
            file = run.require(f"export/gguf-{kind}/model.gguf")
            url = stack.enter_context(chat.open_gguf(file))
            streams[f"gguf:{kind}"] = partial(chat.stream_gguf, url)
        model, tokenizer = load_model(name, **loading)
        streams["transformers"] = partial(generation.stream_answer, model, tokenizer)
        for number, prompt in enumerate(prompts[:1] + prompts[: options.prompts]):
            for backend, stream in streams.items():
                figures = measure(stream(prompt, sampling))
                values[backend] += [figures] if number else []
    result: dict[str, Any] = {"run": run.config.name, "model": run.config.model}
    result |= runtime.environment("transformers") | {"prompts": options.prompts}
    import torch

    result["threads"] = torch.get_num_threads()
    result["sampling"], result["rows"] = {"greedy": True, **sampling}, []
    for backend, figures in values.items():
        firsts, rates, counts = map(list, zip(*figures, strict=True))
        row: dict[str, Any] = {"backend": backend, "tokens": sum(counts)}
        row["tokens_per_second"] = spread(rates, 2)
        row["first_token_seconds"] = spread(firsts, 3)
        result["rows"].append(row)
        print(backend, json.dumps(row["tokens_per_second"]), end=" tokens/s, first ")
        print(json.dumps(row["first_token_seconds"]), "s")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
