"""Proves, or not, that a small model learns GSM8K: base, SFT, GRPO, and more SFT.

    python benchmarks/gsm8k_proof.py TRAIN TEST --model NAME_OR_FOLDER --budget SECONDS

TRAIN and TEST are GSM8K's JSON lines. Stages: `base` answers after four examples, as
text; `sft` trains on the split but for the last rows, by which GRPO's adapter is
chosen; `grpo` goes on for some minutes with the problems that SFT solves at times;
`control` is more SFT for as long. All answer the same test problems greedily; p is of
McNemar's exact test on them. After training a merged 16-bit copy answers, as GRPO
samples from it, and `data_samples/general.jsonl` tells what was forgotten.

With `--variants N` each part has the same problems with other numbers, too. With
`--equations` the answers to learn are the equations of worked ones, a line each. With
`--for-grpo N` SFT leaves N problems out, so that GRPO has some that were not learnt by
heart; the control learns them, too.

A stage that is finished in `--runs` is not repeated, one that was killed goes on, and
one that does not fit into the budget is left out: call again. After each stage OUT gets
gsm8k_proof.json, with the stages of all processes that share `--runs`: seeds can run
side by side, and `grpo` beside `control`. Give other settings another `--name`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import gsm8k_variants  # noqa: E402

from helpers import files, recipes, runs, runtime, stages  # noqa: E402
from helpers.config import RunConfig, Stage, changed  # noqa: E402
from helpers.data import preparation as data  # noqa: E402
from helpers.data.formats import Row, ask  # noqa: E402
from helpers.errors import TrainingError  # noqa: E402
from helpers.evaluation import evaluator, metrics  # noqa: E402
from helpers.grpo import answers, monitor, rewards  # noqa: E402
from helpers.grpo.trainer import build_grpo  # noqa: E402
from helpers.inference.generation import Answer, cut_answer, encode, generate_batches  # noqa: E402
from helpers.inference.items import answer_rows, model_print  # noqa: E402
from helpers.inference.sampler import Sampler  # noqa: E402
from helpers.masking.templates import stop_token_ids  # noqa: E402
from helpers.models import load  # noqa: E402
from helpers.runs import Run  # noqa: E402
from helpers.training import inputs  # noqa: E402
from helpers.training import trainer as training  # noqa: E402

STAGES = ("base", "sft", "grpo", "control")
VERDICTS = {"strict": "strict_match", "flexible": "flexible_extract", "ours": "correct"}
TRAINED = """steps seconds peak_memory_gb loss_last reward_first reward_last stopped
    held_out_first held_out_best best_step solved_at_times sampler layout
    passes_left_out"""
SHORT = 112  # tokens of an answer of equations
FINISH_S = 60  # after training: an evaluation, the adapter read again, test answers
SHOTS = 4
GENERAL = ROOT / "data_samples" / "general.jsonl"
DRAWN = (1.0, 0, 1.0, None)  # temperature, top-k, top-p, min-p: as in GRPO
DRAWS = 8  # answers to a problem that is tried for GRPO
FEW = 32  # solved at times: with fewer GRPO takes all that were tried
SIZES: dict[str, Any] = {
    "weights": "16bit",
    "layout": "pinned",
    "max_length": 1024,
    "max_prompt_length": 256,
    "save_minutes": 20.0,
    "evaluation__max_new_tokens": 320,
    "evaluation__batch_size": 660,
    "lora__r": 128,
    "lora__lora_alpha": 64,
    "lora__target_modules": "all-linear",
}
SFT: dict[str, Any] = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
    "optim": "adamw_torch",
    "logging_steps": 20,
    "eval_strategy": "no",  # the last adapter counts
    "save_strategy": "no",
}
GRPO = {
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "num_generations": 16,
    "max_completion_length": 256,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "save_strategy": "no",
}


class FinitePasses(TrainerCallback):
    """Leaves a pass out whose gradients are not finite, and counts such passes.

    In float16 the scaler leaves the whole step out. TrainingError: none is finite.
    """

    count, before = torch.zeros(()), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        learnt = [p for p in more["model"].parameters() if p.requires_grad]
        self.count = self.count.to(learnt[0].device)
        for parameter in learnt if not args.fp16 else []:
            parameter.register_hook(self.see if parameter is learnt[0] else only_finite)

    def see(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count = self.count + ~gradient.isfinite().all()
        return only_finite(gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        new, self.before = int(self.count) - self.before, int(self.count)
        if new >= args.gradient_accumulation_steps:
            text = f"step {state.global_step}: the gradients of all passes are "
            raise TrainingError(text + "not finite; lower the rate")

    def report(self, history: list[Row]) -> Row:
        return {"passes_left_out": int(self.count)}


def only_finite(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def place_of(given: argparse.Namespace, part: str) -> Path:
    return Path(given.runs / f"{given.name}-{part}.jsonl")


def write_parts(given: argparse.Namespace) -> None:
    """Writes the rows of SFT, of GRPO, of the control, and those held out of all."""
    lines = Path(given.train).read_text(encoding="utf-8").splitlines(True)
    lines, held_out = lines[: -given.held_out], lines[-given.held_out :]
    count = len(lines) - given.for_grpo
    kinds = [lines[:count], lines[count:]]
    if given.equations:
        kinds = [gsm8k_variants.equations_alone(part) for part in kinds]
    first, rest = (p + gsm8k_variants.vary_lines(p, given.variants) for p in kinds)
    parts = {"train": first, "problems": rest or first, "control": first + rest}
    for name, part in (parts | {"eval": held_out}).items():
        if given.equations:
            part = [line.replace("<<", "").replace(">>", "") for line in part]
        files.write_lines(place_of(given, name), part)


def configure(given: argparse.Namespace, stage: str, seed: int) -> RunConfig:
    """Returns the config of SFT; other stages change it."""
    recipe = recipes.load("demo", gpu=True)
    config = changed(
        recipe,
        **SIZES,
        name=f"{given.name}-{seed}-{stage}",
        model=given.model,
        stages=["sft"],
        seed=seed,
        dtype=given.dtype,
        sft=SFT,
        grpo=recipe.grpo | GRPO,
        grpo_minutes=given.minutes,
        grpo_held_out=given.held_out,
        data={
            "train": [str(place_of(given, "train"))],
            "eval": str(place_of(given, "eval")),
            "test": str(Path(given.test).resolve()),
            "test_rows": given.rows,
        },
    )
    if given.equations and stage != "base":
        short = {"evaluation__max_new_tokens": SHORT}
        short |= {"grpo__max_completion_length": SHORT}
        config = changed(config, **short)
    if given.sft_minutes:
        config = changed(config, sft__max_steps=monitor.ENDLESS)
    return changed(config, **dict(given.set))


def minutes_left(given: argparse.Namespace) -> float:
    left_s = given.ends - time.monotonic() - FINISH_S
    return float(max(0.1, min(given.minutes, left_s / 60)))


def answer_base(run: Run) -> list[Row]:
    """Returns the items of the base model, which continues four solved problems."""
    config, folder = run.config, run.path / "data"
    shots, rows = (files.read_rows(folder / f"{n}.jsonl") for n in ("eval", "test"))
    solved = [[turn["content"] for turn in row["messages"][-2:]] for row in shots]
    texts = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in solved[:SHOTS]]
    for row in rows:
        row["prompt"] = "".join([*texts, f"Question: {row['question']}\nAnswer:"])
    model, tokenizer = load.load_model(config.model, **load.options(config))
    decoding = config.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
    settings = files.fingerprint(model_print(config, None), decoding["max_new_tokens"])
    path = run.path / "eval" / "base" / "test.jsonl"
    generate = partial(generate_batches, model, tokenizer, **decoding)
    return answer_rows(path, rows, settings, generate, judge_continued)


def judge_continued(text: str, row: Row) -> Row:
    """Returns the verdicts on an answer, up to where the model asks by itself."""
    text = text.partition("Question:")[0]
    return metrics.check_answer(text, row | {"prompt": ask(row["question"], "")})


def evaluate(run: Run, kind: Stage) -> list[Row]:
    """Returns the greedy answers to the test rows, with their verdicts."""
    config, adapter = run.config, run.path / kind / "adapter"
    model, tokenizer = load.load_model(
        config.model, adapter=adapter, **load.options(config)
    )
    sampler, decoding = Sampler(model), config.evaluation
    rows = files.read_rows(run.path / "data" / "test.jsonl")
    size, limit = decoding.batch_size or len(rows), decoding.max_new_tokens

    def generate(prompts: list[Any]) -> Iterator[dict[int, Answer]]:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            answered = sampler.generate(tokenizer, batch, size, limit)
            yield dict(enumerate(answered, start))

    path = run.path / "eval" / kind / "test.jsonl"
    settings = files.fingerprint(model_print(config, adapter), limit)
    rows = data.to_prompts(config, rows)
    return answer_rows(path, rows, settings, generate, metrics.check_answer)


def ask_general(run: Run, kind: str) -> str:
    """Returns a mark, 1 or 0, for each question that no stage trains for."""
    sets: dict[str, Any] = {"data__test": None, "data__eval": None, "best_by": "loss"}
    sets |= {"name": f"{run.config.name}-general", "data__general": str(GENERAL)}
    sets["data__train"] = [str(run.config.data.eval)]  # few rows: none are trained on
    apart = runs.save_run(changed(run.config, **sets))
    data.ensure_data(apart)
    adapter = None if kind == "base" else run.path / kind / "adapter"
    evaluator.evaluate(apart, kind, adapter)
    return mark_general(apart.path / "eval" / kind / "general.jsonl")


def mark_general(path: Path) -> str:
    """Judges first lines alone: a base model does not stop after its answer."""
    items = files.read_rows(path)
    lines = [item["output"].strip().partition("\n")[0] for item in items]
    scores = [
        metrics.score(line, item["reference"])
        for line, item in zip(lines, items, strict=True)
    ]
    return marks(scores, "exact_match")


def marks(items: list[Row], key: str) -> str:
    return "".join(str(int(item[key])) for item in items)


def compare(first: str, second: str) -> Row:
    """Returns the difference of two rows of marks on the same items, with its p."""
    return metrics.paired_difference(*([m == "1" for m in r] for r in (first, second)))


def draw_answers(given: argparse.Namespace, start: Run) -> list[Row]:
    """Returns problems, and how many of an adapter's `drawn` answers are `right`."""
    path, config = start.path / "drawn.jsonl", start.config
    if path.exists():
        return files.read_rows(path)
    rows = [json.loads(line) for line in place_of(given, "problems").open()]
    random.Random(config.seed).shuffle(rows)
    rows = rows[: given.probe]
    adapter = start.path / "sft" / "adapter"
    model, tokenizer = training.load_for_training(start, "sft", adapter)
    sampler, stops = Sampler(model), stop_token_ids(tokenizer)
    sampler.refresh()
    for row in rows:
        row["ids"] = encode(tokenizer, ask(row["question"], config.system_prompt))
    longest, limit = config.max_prompt_length, config.grpo["max_completion_length"]
    rows = [row for row in rows if not longest or len(row["ids"]) <= longest]
    rows.sort(key=lambda row: len(row["ids"]), reverse=True)
    size = max(1, given.batch // DRAWS)
    for batch in (rows[n : n + size] for n in range(0, len(rows), size)):
        ids = [row["ids"] for row in batch for _ in range(DRAWS)]
        drawn = iter(sampler.decoder.generate(ids, limit, stops, DRAWN)[0])
        for row in batch:
            texts = [cut_answer(tokenizer, next(drawn), stops) for _ in range(DRAWS)]
            golds = [str(answers.parse_gold(row["answer"]))] * DRAWS
            scores = rewards.correctness([text.text for text in texts], golds)
            row |= {"drawn": DRAWS, "right": sum(score > 0 for score in scores)}
            del row["ids"]
    files.write_rows(path, rows)
    return rows


def train(run: Run, kind: Stage, minutes: float | None) -> Row:
    """Trains a run's stage, from `sft_adapter` if it names one; returns the report.

    Args:
        minutes: of SFT, else its epochs; GRPO's are in the config.
    """
    stages.ensure_ready(run, kind)
    if part := inputs.finished_part(run, kind):  # killed while it answered
        return part
    model, tokenizer = training.load_for_training(run, kind, run.config.sft_adapter)
    if kind == "grpo":
        # with SDPA two of three runs of Gemma ended in gradients that are not finite;
        # rows padded on the left are the likely cause, not a proven one
        model.set_attn_implementation("eager")
        trainer = build_grpo(run, model, tokenizer)
    else:
        trainer = training.build_sft(run, model, tokenizer)
        trainer.add_callback(monitor.Clock(run.path / "sft", minutes))
    trainer.add_callback(FinitePasses())
    return training.fit(trainer, run)


def go_on(given: argparse.Namespace, stage: str, seed: int) -> tuple[Row, Row]:
    """Returns what a stage after SFT changes in the config, and notes on its rows."""
    sft = runs.open_run(f"{given.name}-{seed}-sft")
    changes: Row = {"sft_adapter": str(sft.path / "sft" / "adapter")}
    if stage == "control":
        changes |= {"data__train": [str(place_of(given, "control"))]}
        return changes | {"sft__max_steps": monitor.ENDLESS}, {}
    rows = draw_answers(given, sft)
    at_times = [row for row in rows if 0 < row["right"] < row["drawn"]]
    used = at_times if len(at_times) >= FEW else rows
    problems = sft.path / "at_times.jsonl"
    files.write_rows(
        problems, [{n: r[n] for n in ("question", "answer")} for r in used]
    )
    changes |= {"stages": ["grpo"], "grpo_minutes": minutes_left(given)}
    changes |= {"data__problems": str(problems), "data__train": []}
    return changes, {"solved_at_times": [len(at_times), len(rows)]}


def run_stage(given: argparse.Namespace, stage: str, seed: int) -> Row:
    """Trains and evaluates one stage; returns its result."""
    config, part, began = configure(given, stage, seed), Row(), time.perf_counter()
    if stage not in ("base", "sft"):
        changes, part = go_on(given, stage, seed)
        config = changed(config, **changes)
    run = runs.save_run(config)
    data.ensure_data(run)
    if stage == "base":
        items, kind = answer_base(run), "base"
    else:
        (kind,) = config.stages
        minutes = minutes_left(given) if stage == "control" else given.sft_minutes
        part |= train(run, kind, minutes)
        items = evaluate(run, kind)
    own = run.config.grpo if stage == "grpo" else run.config.sft
    settings = own | {n: run.config.lora[n] for n in ("r", "lora_alpha")}
    names = ("dtype", "variants", "equations", "for_grpo")
    settings |= {name: getattr(given, name) for name in names}
    return {
        "model": given.name,
        "seed": seed,
        "stage": stage,
        "date": str(date.today()),
        **{name: rate(items, key) for name, key in VERDICTS.items()},
        "seconds": round(time.perf_counter() - began, 1),
        "trained": {name: part[name] for name in TRAINED.split() if name in part},
        "settings": {} if stage == "base" else settings,
        "right": marks(items, "correct"),
        "right_general": ask_general(run, kind),
    }


def rate(items: list[Row], key: str) -> dict[str, float]:
    return metrics.proportion(sum(item[key] for item in items), len(items))


def write_results(given: argparse.Namespace) -> None:
    """Joins the results of all stages that are finished, with their paired tests."""
    paths = sorted((given.runs / "results").glob("*.json"))
    rows = [files.read_json(path) for path in paths]
    for row in rows:
        known = {r["stage"]: r for r in rows if is_sibling(r, row)}
        for label in ("base", "sft"):
            if label in known and row["stage"] not in ("base", label):
                p = compare(known[label]["right"], row["right"])["p"]
                row[f"p_vs_{label}"] = p
        if "base" in known and row["stage"] != "base":
            pair = (r["right_general"] for r in (known["base"], row))
            row["trained"]["general"] = compare(*pair)
    rows.sort(key=lambda r: (r["model"], STAGES.index(r["stage"]), r["seed"]))
    failed = [
        files.read_json(path)
        for path in sorted((given.runs / "results").glob("*.failed"))
    ]
    values = {"machine": runtime.find_machine().name, "rows": rows, "failed": failed}
    values["pooled"] = pool(rows)
    files.write_json(Path(given.out) / "gsm8k_proof.json", values)


def pool(rows: list[Row]) -> list[Row]:
    """Returns how stages after SFT differ from it over their seeds together.

    The pairs of a seed are of the same problems as another's: p is of the seeds' mean
    on these problems, not of other problems.
    """
    sft = {(r["model"], r["seed"]): r["right"] for r in rows if r["stage"] == "sft"}
    later = [r for r in rows if r["stage"] not in ("base", "sft")]
    later = [r for r in later if (r["model"], r["seed"]) in sft]
    pooled = []
    for (model, stage), group in groupby(later, lambda r: (r["model"], r["stage"])):
        seeds, rights = zip(*((r["seed"], r["right"]) for r in group), strict=True)
        first = "".join(sft[model, seed] for seed in seeds)
        result = compare(first, "".join(rights))
        pooled.append({"model": model, "stage": stage, "seeds": [*seeds]} | result)
    return pooled


def is_sibling(other: Row, row: Row) -> bool:
    seed = other["seed"] == row["seed"] or other["stage"] == "base"
    return seed and other["model"] == row["model"]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument(
        "--model", required=True, help="smollm2-135m-offline, or a folder"
    )
    parser.add_argument(
        "--budget", type=float, required=True, help="seconds for it all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="of GRPO, of control"
    )
    parser.add_argument(
        "--variants", type=int, default=0, help="of a problem, with other numbers"
    )
    parser.add_argument(
        "--probe", type=int, default=4096, help="problems tried for GRPO"
    )
    parser.add_argument(
        "--equations", action="store_true", help="learn them alone as answers"
    )
    parser.add_argument("--sft-minutes", type=float, help="of SFT, instead of epochs")
    parser.add_argument(
        "--for-grpo", type=int, default=0, help="rows of TRAIN not for SFT"
    )
    parser.add_argument("--held-out", type=int, default=500, help="rows of TRAIN")
    parser.add_argument("--rows", type=int, help="test problems; else all")
    parser.add_argument("--batch", type=int, default=1024, help="answers drawn at once")
    parser.add_argument(
        "--dtype", default="auto", help="bfloat16, or float16 as a T4's"
    )
    parser.add_argument("--name", help="of the runs; else the model's")
    parser.add_argument(
        "--set",
        type=read_setting,
        nargs="+",
        default=[],
        metavar="sft__learning_rate=1e-3",
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gsm8k_proof")
    parser.add_argument("--out", default=os.environ.get("OUT", "outputs"))
    given = parser.parse_args()
    given.runs, given.name = given.runs.resolve(), given.name or Path(given.model).name
    os.environ["TUNEBOOK_RUNS"] = str(given.runs)
    given.ends = time.monotonic() + given.budget
    costs = {"base": 60, "sft": 60 * (given.sft_minutes or 4) + 75}
    costs |= {"grpo": 180, "control": 150}  # their minutes are what is left, at most
    load.find_model(given.model)
    if not place_of(given, "train").exists():
        write_parts(given)
    for seed in given.seeds:
        for stage in given.stages:
            file = given.runs / "results" / f"{given.name}-{seed}-{stage}.json"
            if stage == "base":  # needs no seed
                file = file.with_name(f"{given.name}-base.json")
            if file.exists():
                continue
            if time.monotonic() + costs[stage] > given.ends:
                print(f"{seed} {stage}: no time is left for it, call again", flush=True)
                break
            try:
                row = run_stage(given, stage, seed)
            except TrainingError as error:  # told in the table; tried again next time
                row = {"model": given.name, "seed": seed, "stage": stage}
                files.write_json(
                    file.with_suffix(".failed"), row | {"error": str(error)}
                )
                print(f"{file.stem}: {error}", flush=True)
                continue
            files.write_json(file, row)
            file.with_suffix(".failed").unlink(missing_ok=True)
            text = ", ".join(f"{name} {row[name]['k']}" for name in VERDICTS)
            print(
                f"{file.stem}: {text} of {row['ours']['n']}, {row['seconds']} s",
                flush=True,
            )
            write_results(given)
    write_results(given)


def read_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    main()
