"""Proves that our verdicts on GSM8K answers are lm-evaluation-harness's.

    python benchmarks/gsm8k_agreement.py      # -> results/gsm8k_agreement.json

Twice, on any CPU, with lm-eval installed (requirements-dev.txt):

1. The same outputs are judged by `helpers.evaluation` and by lm_eval's own tasks,
   filters and metric: answers of the offline model, reference answers changed by
   program (commas, $, dots, several marks, none, signs, decimals, other scripts),
   random strings of what its patterns look for.
2. lm_eval evaluates the offline model from prompt to accuracy with its own model class;
   so do we, with our batches, on the same problems: small sums, of which it gets some
   right, or a file's, `--problems test.jsonl --shots train.jsonl` of GSM8K say.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TASKS = ("gsm8k", "gsm8k_cot_llama")  # the second asks through the chat template
SHOTS_SEED = 1234  # lm_eval's default, --seed's third number
VERDICTS = {"strict-match": "strict_match", "flexible-extract": "flexible_extract"}
METRIC = "exact_match"
SAMPLES = "data_samples/word_problems/test.jsonl"
SHAPES = [
    "#### {n}", "####{n}", "####  {n}", "#### {n}.", "#### {n}..", "#### {n},",
    "#### ${n}", "#### {n} dollars", "#### {n}%", "#### -{n}", "#### \u2212{n}",
    "#### {n}.0", "#### {n}.00", "#### 0{n}", "#### +{n}", "#### {n}/1", "#### ({n})",
    "#### *{n}*", "### {n}", "##### {n}", "####\u00a0{n}", "####\n{n}", "#### {n}\n",
    "#### {n}\u2028", "#### {n}\x00", "#### {n} #### {m}", "#### {m}\n#### {n}",
    "#### {n}\n#### {n}", "#### $ {n}", "#### {n}$", "#### .{n}", "####", "#### ",
    "#### .", "#### ,", "#### -", "#### $", "{n}", "-{n}", "${n}", "{n}$", "{n}.",
    "{n},", "{n}, {m}", "{m} and {n}", "{n}-{m}", "{m}-{n}", "{n}.{m}", "{n}e3",
    "x{n}y", "...", "$$", ",,", "-.", "", " ", "\n", "no answer",
    "The final answer is {n}", "The final answer is {n}.", "The final answer is ${n}.",
    "The final answer is ${n}.00", "The final answer is -{n}",
    "The final answer is: {n}", "the final answer is {n}",
    "The final answer is {m}. The final answer is {n}.", "The final answer is ...",
    "The final answer is {n}\n#### {m}", "#### {n}\nThe final answer is {m}",
    "The final answer is \\boxed{{{n}}}", "The final answer is **{n}**",
]  # fmt: skip
PIECES = ["#### ", "####", "The final answer is ", "\n", " ", "$", ",", ".", "-", "a"]
PIECES += [
    "0",
    "1",
    "2",
    "7",
    "12",
    "1,080",
    "3.5",
    "\u0663",
    "\uff11",
    "\u00b2",
    "\u2212",
]


def write_number(value: str, how: int) -> str:
    """Returns a whole number in one of the ways in which people write it."""
    ways = [
        value,
        f"{int(value):,}",
        f"{value}.0",
        "".join(chr(0xFEE0 + ord(c)) for c in value),
    ]
    ways += ["".join(chr(0x630 + ord(c)) for c in value), f"{int(value):_}"]
    return ways[how % len(ways)]


def change_answers(
    problems: list[dict[str, Any]], draw: random.Random
) -> Iterator[tuple[str, str]]:
    """Yields an output and the reference answer it is judged by."""
    for number, problem in enumerate(problems):
        answer = problem["answer"]
        working, _, gold = answer.rpartition("####")
        gold = gold.strip().replace(",", "")
        for place, shape in enumerate(SHAPES):
            text = shape.format(
                n=write_number(gold, (number + place) % 6), m=draw.randint(-20, 2000)
            )
            yield draw.choice([working, "", "So 3 of 4: "]) + text, answer
        yield answer, answer
        # references as they should not be, but are
        for odd in (
            f"#### {int(gold):,}",
            f"#### {gold}.",
            f"#### ${gold}",
            f"####{gold}",
            f"#### {gold}.5",
            f"#### 1\n#### {gold}",
            f"#### -{gold}",
            f"#### {gold} ",
            f"#### {gold}\n",
            f"#### {gold}A",
        ):
            yield f"#### {write_number(gold, number)}", odd
            yield odd, odd


def random_strings(count: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yields strings of the pieces that the patterns look for."""
    for _ in range(count):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 12)))
        yield text, f"#### {draw.choice(['1', '2', '7', '12', '1,080', '3.5'])}"


def real_outputs(
    model: Any, tokenizer: Any, problems: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Returns answers of a model, greedy ones and drawn ones."""
    from transformers import set_seed

    from helpers.config import SYSTEM_PROMPT
    from helpers.data.formats import ask
    from helpers.inference.generation import generate

    found = []
    for sampling in (None, {"temperature": 1.0}):
        set_seed(0)
        prompts = [ask(p["question"], SYSTEM_PROMPT) for p in problems]
        answers = generate(
            model, tokenizer, prompts, max_new_tokens=64, sampling=sampling
        )
        found += [(a.text, p["answer"]) for a, p in zip(answers, problems, strict=True)]
    return found


def write_sums(path: Path, count: int, seed: int) -> str:
    """Writes problems that a very small model solves now and then; returns the path."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = draw.randint(2, 9), draw.randint(2, 9)
        name = draw.choice(["Ann", "Ben", "Ida", "Tom"])
        question = f"{name} has {a} nuts and finds {b} more. How many nuts is that?"
        answer = f"{a} + {b} = {a + b} nuts.\n#### {a + b}"
        lines.append(json.dumps({"question": question, "answer": answer}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def make_task(name: str, problems: list[Any], shots: list[Any]) -> Any:
    """Returns a task of lm_eval's folder `gsm8k` over problems of ours.

    Args:
        name: of `TASKS`.
        problems: `question` and `answer` each.
        shots: the same; solved examples are drawn from them.
    """
    import lm_eval
    import yaml
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    files = (
        yaml.safe_load(f.read_text("utf-8")) for f in sorted(folder.glob("*.yaml"))
    )
    config = next(values for values in files if values.get("task") == name)
    parts = {
        part: Dataset.from_list([{k: r[k] for k in ("question", "answer")} for r in of])
        for part, of in {"test": problems, "train": shots}.items()
    }
    # it warns that the data are not the hub's
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    config["custom_dataset"] = lambda **_: DatasetDict(parts)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(SHOTS_SEED)
    return task


def make_prompts(task: Any, tokenizer: Any, chat: bool) -> list[str]:
    """Returns a task's prompts of its problems, with its solved examples.

    Args:
        task: of `make_task`.
        tokenizer: the model's.
        chat: through our rendering of the chat template, a shot a turn.
    """
    from helpers.masking.templates import render

    def template(turns: Any, add_generation_prompt: bool = True) -> str:
        return render(tokenizer, turns, for_generation=add_generation_prompt)

    options: dict[str, Any] = {"num_fewshot": task.config.num_fewshot}
    if chat:
        options |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
        options["chat_template"] = template
    # in the problems' order: each draws its examples from the same generator
    return [task.fewshot_context(doc, **options) for doc in task.test_docs()]


def judge_theirs(name: str, outputs: list[tuple[str, str]]) -> list[dict[str, bool]]:
    """Returns lm_eval's verdicts, by its own task, filters and metric."""
    from lm_eval.api.instance import Instance

    rows = [{"question": "?", "answer": answer} for _, answer in outputs]
    task = make_task(name, rows, rows)
    docs = list(task.test_docs())
    task._instances = [
        Instance("generate_until", doc, ("", {}), place, resps=[text])
        for place, (doc, (text, _)) in enumerate(zip(docs, outputs, strict=True))
    ]
    task.apply_filters()
    return [
        {
            ours: bool(
                task.process_results(made.doc, [made.filtered_resps[theirs]])[METRIC]
            )
            for theirs, ours in VERDICTS.items()
        }
        for made in task.instances
    ]


def judge_ours(task: str, outputs: list[tuple[str, str]]) -> list[dict[str, bool]]:
    """Returns our verdicts by the rules of a task."""
    from helpers.evaluation import metrics

    rows = []
    for text, answer in outputs:
        strict = re.findall(metrics.STRICT, text)[:1]
        if task == "gsm8k_cot_llama":
            answer = answer.split("####")[-1].strip()
            strict = re.findall(f"The final answer is ({metrics.FLEXIBLE})", text)[-1:]
        flexible = re.findall(metrics.FLEXIBLE, text)[-1:]
        matches = {"strict_match": strict, "flexible_extract": flexible}
        rows.append({k: metrics.is_same(match, answer) for k, match in matches.items()})
    return rows


def agreement(outputs: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns how many outputs get the same verdicts, by the rules of all tasks."""
    judged = {t: (judge_ours(t, outputs), judge_theirs(t, outputs)) for t in TASKS}
    found: dict[str, Any] = {"n": len(outputs)}
    for short, name in (("strict", "strict_match"), ("flexible", "flexible_extract")):
        found[f"{short}_agree"] = sum(
            all(a[i][name] == b[i][name] for a, b in judged.values())
            for i in range(len(outputs))
        )
    found["judged_right"] = {
        task: {name: sum(row[name] for row in theirs) for name in VERDICTS.values()}
        for task, (_, theirs) in judged.items()
    }
    return found


def end_to_end(
    name: str, model: Any, tokenizer: Any, problems: list[Any], shots: str, tokens: int
) -> dict[str, Any]:
    """Returns the accuracies of lm_eval's evaluation and of ours, and equal outputs."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from helpers.data.sources import load_rows
    from helpers.inference.generation import generate

    chat = name == TASKS[1]
    examples = load_rows(shots)
    task = make_task(name, problems, examples)
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[task],
        gen_kwargs={"max_gen_toks": tokens},
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    samples = sorted(
        (s for s in result["samples"][name] if s["filter"] == "strict-match"),
        key=lambda sample: sample["doc_id"],
    )
    prompts = make_prompts(make_task(name, problems, examples), tokenizer, chat)
    ends = "|".join(map(re.escape, task.config.generation_kwargs["until"]))
    answers = generate(model, tokenizer, prompts, max_new_tokens=tokens)
    texts = [re.split(ends, answer.text)[0].strip() for answer in answers]
    outputs = [(t, p["answer"]) for t, p in zip(texts, problems, strict=True)]
    items = judge_ours(name, outputs)
    found: dict[str, Any] = {
        "n": len(problems),
        "max_new_tokens": tokens,
        "same_prompts": sum(
            sample["arguments"][0][0] == prompt
            for sample, prompt in zip(samples, prompts, strict=True)
        ),
        "same_outputs": sum(
            sample["resps"][0][0].strip() == text
            for sample, text in zip(samples, texts, strict=True)
        ),
    }
    for theirs, verdict in VERDICTS.items():
        accuracy = result["results"][name][f"{METRIC},{theirs}"]
        found[verdict] = {
            "lm_eval": round(accuracy * len(problems)),
            "ours": sum(item[verdict] for item in items),
        }
    return found


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures, writes the figures and returns them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-offline")
    parser.add_argument("--problems", help="of the second part, in GSM8K's format")
    parser.add_argument("--shots", help="solved ones for its few-shot prompts")
    parser.add_argument("--changed", type=int, default=20, help="problems")
    parser.add_argument("--real", type=int, default=32, help="problems")
    parser.add_argument("--random", type=int, default=1000, help="strings")
    parser.add_argument("--end-to-end", type=int, default=40, help="problems")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", default=ROOT / "results" / "gsm8k_agreement.json")
    given = parser.parse_args(arguments)

    from helpers import files
    from helpers.data.sources import load_rows
    from helpers.models import load as models
    from tests.rows import to_problems

    draw = random.Random(0)
    problems = to_problems(load_rows(SAMPLES))
    model, tokenizer = models.load_model(given.model, engine="transformers")
    kinds = {
        "real": real_outputs(model, tokenizer, problems[: given.real]),
        "changed": list(change_answers(problems[: given.changed], draw)),
        "random": list(random_strings(given.random, draw)),
    }
    found = agreement([output for outputs in kinds.values() for output in outputs])
    found["outputs"] = {kind: len(outputs) for kind, outputs in kinds.items()}
    names = ("lm-eval", "transformers", "torch")
    found["conditions"] = {
        "model": given.model,
        "problems": Path(given.problems).name if given.problems else "small sums",
        "versions": {name: version(name) for name in names},
    }
    files.write_json(Path(given.out), found)  # the rest takes minutes
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        asked = given.problems or write_sums(home / "test.jsonl", given.end_to_end, 1)
        shots = given.shots or write_sums(home / "train.jsonl", 100, 2)
        rows = to_problems(load_rows(asked, given.end_to_end))
        found["end_to_end"] = {
            # the chat task's prompts are eight times as long
            name: end_to_end(name, model, tokenizer, part, shots, given.tokens)
            for name, part in zip(TASKS, (rows, rows[::4]), strict=True)
        }
    files.write_json(Path(given.out), found)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
