"""Measures evaluated items per second: ours, and the loop that notebooks write.

    python benchmarks/eval_speed.py                    # -> results/eval_speed.json
    python benchmarks/eval_speed.py --adapter runs/demo/sft/adapter
    TUNEBOOK_DTYPE=float32 python benchmarks/eval_speed.py --out FILE  # no near ties
    python benchmarks/eval_speed.py --items 8 --tokens 32 --out /tmp/speed.json  # a CPU

The same model, loaded once, greedily answers the same held-out word problems, twice:
one prompt after another through `model.generate`, and through `generation.generate`.
Both are warmed up first. Loading is not timed; templates, tokenising and verdicts are.
In fp16 two tokens can be so near that the batch decides between them; in fp32 the
answers and verdicts of both are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROBLEMS = "data_samples/word_problems/test.jsonl"


def answer_in_a_loop(
    model: Any, tokenizer: Any, prompts: list[Any], tokens: int
) -> list[str]:
    """Returns the answers, one `generate` call each, as notebooks commonly do."""
    import torch

    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def measure(
    model: Any,
    tokenizer: Any,
    problems: list[dict[str, Any]],
    tokens: int,
    batch_size: int | None,
    loop_items: int,
) -> dict[str, Any]:
    """Returns items per second of both, and where their answers and verdicts differ."""
    import torch

    from helpers.config import SYSTEM_PROMPT
    from helpers.data.formats import ask
    from helpers.evaluation import metrics as gsm8k
    from helpers.inference.generation import fitting_rows, generate, inference

    prompts = [ask(p["question"], SYSTEM_PROMPT) for p in problems]

    def ours(count: int) -> list[str]:
        found = generate(
            model,
            tokenizer,
            prompts[:count],
            max_new_tokens=tokens,
            batch_size=batch_size,
        )
        return [answer.text for answer in found]

    def loop(count: int) -> list[str]:
        with inference(model):
            return answer_in_a_loop(model, tokenizer, prompts[:count], tokens)

    speeds, items = {}, {}
    for name, answer, count, warm in (
        ("loop", loop, loop_items, 2),
        ("ours", ours, len(problems), 16),
    ):
        answer(min(warm, count))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        texts = answer(count)
        items[name] = [
            {"output": text, **gsm8k.check_answer(text, problem)}
            for text, problem in zip(texts, problems, strict=False)
        ]
        seconds = time.perf_counter() - started
        speeds[name] = {"items": count, "seconds": round(seconds, 2)}
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            speeds[name]["peak_allocated_gb"] = round(peak, 3)
    pairs = list(zip(items["loop"], items["ours"], strict=False))
    longest = max(len(tokenizer(p["question"])["input_ids"]) for p in problems) + 60
    rate = {name: s["items"] / s["seconds"] for name, s in speeds.items()}
    return {
        "ours": round(rate["ours"], 3),
        "loop": round(rate["loop"], 3),
        "ratio": round(rate["ours"] / rate["loop"], 1),
        "runs": speeds,
        "compared": len(pairs),
        "same_verdicts": {
            name: sum(a[name] == b[name] for a, b in pairs) for name in gsm8k.VERDICTS
        },
        "same_outputs": sum(a["output"] == b["output"] for a, b in pairs),
        "right": {
            "loop": sum(a["correct"] for a, _ in pairs),
            "ours": sum(b["correct"] for _, b in pairs),
        },
        "batch_size": batch_size
        or f"up to {fitting_rows(model.config, longest + tokens, model.device.type)}",
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures, writes the figures and returns them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-offline")
    parser.add_argument("--adapter")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--loop-items", type=int, help="fewer, where the loop is slow")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--machine", help="what else is to be said of it")
    parser.add_argument("--out", default=ROOT / "results" / "eval_speed.json")
    given = parser.parse_args(arguments)

    from helpers import files, runtime
    from helpers.data.sources import load_rows
    from helpers.models import load as models
    from tests.rows import to_problems

    engine = runtime.resolve_engine(given.engine)
    runtime.start(engine)
    model, tokenizer = models.load_model(
        given.model, engine=engine, weights=given.weights, adapter=given.adapter
    )
    problems = to_problems(load_rows(PROBLEMS, given.items))
    found = measure(
        model,
        tokenizer,
        problems,
        given.tokens,
        given.batch_size,
        min(given.loop_items or given.items, len(problems)),
    )
    weights = models.resolve_weights(given.weights)
    found["conditions"] = {
        "model": given.model,
        "adapter": str(given.adapter) if given.adapter else None,
        "weights": weights,
        "items": PROBLEMS,
        "max_new_tokens": given.tokens,
        "decoding": "greedy",
        **runtime.environment(engine),
    }
    if given.machine:
        found["conditions"]["machine"] = given.machine
    files.write_json(Path(given.out), found)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
