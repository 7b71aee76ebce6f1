"""Proves, or not, that GRPO learns: accuracy after SFT, after GRPO, after more SFT.

    python benchmarks/grpo_learning.py run OUT                     # seeds 0, 1, 2
    python benchmarks/grpo_learning.py run OUT --seeds 0 --settings recipe lr2e-4
    python benchmarks/grpo_learning.py run OUT --seeds --gsm8k FOLDER
    python benchmarks/grpo_learning.py table OUT [OUT ...]         # into results/

For each seed: the recipe `demo` at a GPU's sizes, SFT (its best checkpoint by eval
loss), then GRPO from it within `--minutes`; as a control, further SFT from the
same start for the same time. All answer the 400 items of `test` and the 200 of
`test_new`, greedily; the p value is of McNemar's exact test on the items, against SFT.
With `--gsm8k` the same on real GSM8K, from a folder with train.jsonl and
test_first660.jsonl, the base model beside it; GRPO there takes the problems that the
model solves at times, of `--probe`.

Jobs run side by side, each in a process of its own, in fp16 under a cap of 14.0 GiB, as
on a T4. Runs lie in `--runs`, and what is finished there is not made again. Every job
writes its result, and its log, to OUT as soon as it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import recipes  # noqa: E402

RECIPE = recipes.load("demo", gpu=True)
CAP_GB = 14.0
TABLE = ROOT / "results" / "grpo_learning.json"
END_S = 75  # a job needs after training: to load the model and answer the test items

# changes to the recipe's GRPO
SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "lr5e-5": {"learning_rate": 5e-5},
    "lr2e-4": {"learning_rate": 2e-4},
    "lr4e-4": {"learning_rate": 4e-4},
    # two and four updates an answer sampled, which is clipped where it goes too far
    "two": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "four": {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
    "sixteen": {"num_generations": 16},
    "small": {"gradient_accumulation_steps": 1},
    # proves on a CPU that the program runs
    "tiny": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 24,
    },
}
DEFAULT = "recipe"
GSM8K = "gsm8k"
EVAL_ROWS = 200  # of the train split, for the eval loss and the best adapter


def start_config(seed: int, given: argparse.Namespace) -> Any:
    """Returns the config of the SFT that GRPO and the control start from."""
    from helpers.config import changed

    base = changed(
        RECIPE,
        name=f"start{seed}",
        stages=["sft"],
        seed=seed,
        data__problems=None,
        grpo={},
        evaluation__batch_size=given.batch,
    )
    if given.rows:
        held = ("data__test_rows", "data__test_new_rows", "data__eval_rows")
        base = changed(base, **dict.fromkeys(held, given.rows))
    for name in ("engine", "weights"):
        if getattr(given, name):
            base = changed(base, **{name: getattr(given, name)})
    if given.sft_steps:
        base = changed(base, sft__max_steps=given.sft_steps)
    return base


def gsm8k_config(given: argparse.Namespace) -> Any:
    """Returns the config of SFT on real GSM8K; there is no second test set."""
    from helpers.config import changed

    folder = Path(given.gsm8k).resolve()
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(True)
    parts = {"train": rows[:-EVAL_ROWS], "eval": rows[-EVAL_ROWS:]}
    places = {}
    for name, part in parts.items():
        places[name] = Path(given.runs).resolve() / f"gsm8k_{name}.jsonl"
        places[name].parent.mkdir(parents=True, exist_ok=True)
        places[name].write_text("".join(part), encoding="utf-8")
    steps = given.sft_steps or 500
    return changed(
        start_config(0, given),
        name=GSM8K,
        max_length=1024,
        data__train=[str(places["train"])],
        data__eval=str(places["eval"]),
        data__test=str(folder / "test_first660.jsonl"),
        data__test_rows=given.rows,
        data__test_new=None,
        evaluation__max_new_tokens=256,
        sft__max_steps=steps,
        sft__per_device_train_batch_size=4,
        sft__learning_rate=5e-4,
        sft__warmup_steps=steps // 20,
        sft__eval_steps=max(1, steps // 5),
        sft__save_steps=steps,
    )


def evaluate(run: Any, label: str, adapter: Path | str | None) -> dict[str, Any]:
    """Returns right answers and items of each test set, with each item's verdict."""
    from helpers import files
    from helpers.evaluation import evaluator as evaluation

    part = evaluation.evaluate(run, label, adapter)
    found: dict[str, Any] = {"eval_loss": part.get("eval_loss")}
    for name, key in (("test", "accuracy"), ("test_new", "accuracy_new")):
        if key in part:
            items = files.read_rows(run.path / "eval" / label / f"{name}.jsonl")
            found[name] = part[key]
            found[f"{name}_right"] = [item["correct"] for item in items]
    return found


def start(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates what GRPO starts from; the base model too, on GSM8K."""
    from helpers import runs, stages
    from helpers.data import preparation as data

    real = name == GSM8K
    config = gsm8k_config(given) if real else start_config(int(name[5:]), given)
    run = runs.save_run(config)
    data.ensure_data(run)
    found = {"base": evaluate(run, "base", None)} if real else {}
    part = stages.train_stage(run, "sft")
    return found | {
        "sft": evaluate(run, "sft", run.path / "sft" / "adapter"),
        "trained": part,
    }


def go_on(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains on from a start, by GRPO or by more SFT, and evaluates the result."""
    from helpers import files, runs, stages
    from helpers.config import changed
    from helpers.data import preparation as data
    from helpers.training import trainer as sft
    from helpers.training import trainer as train

    origin, _, setting = name.partition("-")
    before = runs.open_run(origin)
    adapter = before.path / "sft" / "adapter"
    control = setting == "control"
    config = changed(before.config, name=name, sft_adapter=str(adapter))
    if control:
        # the start's own recipe, over as many steps as fit into the time
        done = json.loads((before.path / "sft" / "log_history.json").read_text())
        timed = [e for e in done if "loss" in e]
        a_step = (timed[-1]["seconds"] - timed[0]["seconds"]) / max(1, len(timed) - 1)
        steps = max(1, int(60 * given.minutes / max(a_step, 1e-3)))
        config = changed(
            config,
            sft__max_steps=steps,
            sft__eval_steps=max(1, steps // 8),
            sft__save_strategy="no",
        )
        run = runs.save_run(config)
        data.ensure_data(run)
        model, tokenizer = train.load_for_training(run, "sft", adapter)
        part = train.fit(sft.build_sft(run, model, tokenizer), run)
        stage = "sft"
    else:
        values = RECIPE.grpo | SETTINGS[setting]
        config = changed(
            config,
            stages=["grpo"],
            grpo_minutes=given.minutes,
            data__problems=before.config.data.train[0],
        )
        if origin == GSM8K:
            # longer, in micro-batches that take the same memory; most groups would be
            # all wrong, so of some problems those are taken that are solved at times
            values["max_completion_length"] *= 2
            values["per_device_train_batch_size"] //= 2
            values["gradient_accumulation_steps"] *= 2
        run = runs.save_run(changed(config, grpo=values))
        if origin == GSM8K:
            file = solved_at_times(run, given.probe)
            run = runs.save_run(changed(run.config, data__problems=file))
        part = stages.train_stage(run, "grpo")
        stage = "grpo"
    history = json.loads((run.path / stage / "log_history.json").read_text())
    kept = ("step", "seconds", "reward", "eval_reward", "eval_loss", "entropy")
    kept += ("frac_reward_zero_std", "completions/mean_length", "grad_norm")
    return {
        "after": evaluate(run, stage, run.path / stage / "adapter"),
        "trained": part,
        "best": files.read_json(run.path / stage / "best.json"),
        "prompts": files.read_json(run.path / stage / "prompts.json"),
        "config": config.grpo if stage == "grpo" else config.sft,
        "history": [
            {k: v for k, v in e.items() if k in kept}
            for e in history[:: max(1, len(history) // 400)]
        ],
    }


def solved_at_times(run: Any, count: int) -> str:
    """Returns a file of those of some problems that some of eight answers solve."""
    import random

    from helpers import files
    from helpers.config import complete
    from helpers.data import preparation as data
    from helpers.data.formats import ask
    from helpers.grpo.rewards import correctness
    from helpers.inference.generation import generate
    from helpers.training import trainer as train

    data.ensure_data(run)
    rows = files.read_rows(run.path / "data" / "problems.jsonl")
    rows = random.Random(run.config.seed).sample(rows, min(count, len(rows)))
    model, tokenizer = train.load_for_training(run, "grpo", run.config.sft_adapter)
    values = complete(run.config, "grpo")
    drawn = {n: values[n] for n in ("temperature", "top_p", "top_k", "min_p")}
    system = run.config.system_prompt
    prompts = [ask(row["question"], system) for row in rows for _ in range(8)]
    length = values["max_completion_length"]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=length, batch_size=64, sampling=drawn
    )
    texts = [answer.text for answer in answers]
    gold = [row["gold"] for row in rows for _ in range(8)]
    scores = correctness(texts, gold=gold, prompts=prompts)
    solved = [scores[8 * n : 8 * n + 8].count(1.0) for n in range(len(rows))]
    kept = [row for row, right in zip(rows, solved, strict=True) if 0 < right < 8]
    path = run.path / "solved_at_times.jsonl"
    files.write_rows(path, [{k: r[k] for k in ("question", "answer")} for r in kept])
    return str(path)


def job(name: str, given: argparse.Namespace) -> None:
    """Does one job in this process; its result goes to the runs and to OUT."""
    from helpers import files, runs, runtime

    started = time.perf_counter()
    os.environ["TUNEBOOK_RUNS"] = str(Path(given.runs).resolve())
    result = go_on(name, given) if "-" in name else start(name, given)
    engine = runtime.resolve_engine(runs.open_run(name).config.engine)
    result |= {"name": name, "engine": engine, "minutes": given.minutes}
    result["seconds"] = round(time.perf_counter() - started, 1)
    files.write_json(result_file(name, given), result)
    shutil.copy(result_file(name, given), Path(given.out) / f"{name}.json")


def result_file(name: str, given: argparse.Namespace) -> Path:
    """Returns where a job's result lies among the runs."""
    return Path(given.runs) / "results" / f"{name}.json"


def run_job(name: str, given: argparse.Namespace, ends: float) -> bool:
    """Runs a job in a process of its own; returns whether it went well."""
    out = Path(given.out)
    kept = result_file(name, given)
    if kept.exists():
        shutil.copy(kept, out / kept.name)
        print(f"{name}: done before", flush=True)
        return True
    minutes = given.minutes
    if "-" in name:
        minutes = min(minutes, (ends - time.monotonic() - END_S) / 60)
    if minutes < 0.3:
        print(f"{name}: left out, no time for it", flush=True)
        return False
    environment = {
        **os.environ,
        "TUNEBOOK_DTYPE": os.environ.get("TUNEBOOK_DTYPE", "float16"),
        "TUNEBOOK_GPU_GB": str(CAP_GB),
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }
    values = vars(given) | {"minutes": minutes}
    command = [sys.executable, __file__, "job", name, json.dumps(values)]
    started = time.monotonic()
    with (out / f"{name}.log").open("w") as file:
        code = subprocess.call(command, env=environment, stdout=file, stderr=file)
    seconds = time.monotonic() - started
    said = summary(json.loads(kept.read_text())) if code == 0 else "FAILED"
    print(f"{name}: {seconds:.0f} s, {said}", flush=True)
    return code == 0


def summary(result: dict[str, Any]) -> str:
    """Returns a result in a line."""
    parts = []
    for label in ("base", "sft", "after"):
        for name in ("test", "test_new"):
            found = result.get(label, {}).get(name)
            if found:
                share = found["k"] / found["n"]
                parts.append(f"{label} {name} {found['k']}/{found['n']} = {share:.1%}")
    trained = result["trained"]
    parts.append(f"{trained['steps']} steps in {trained['seconds']:.0f} s")
    parts.append(f"{trained['peak_memory_gb']:.1f} GiB")
    return ", ".join(parts)


def run_all(given: argparse.Namespace) -> None:
    """Runs all jobs, each as soon as what it starts from is there."""
    from helpers.models import load

    given.minutes = given.minutes or RECIPE.grpo_minutes
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + given.limit
    load.find_model("smollm2-135m-offline")  # converted once, not by each job
    origins = [f"start{seed}" for seed in given.seeds] + [GSM8K] * bool(given.gsm8k)
    with ThreadPoolExecutor(given.workers) as pool:
        starts: dict[str, Future[bool]] = {
            name: pool.submit(run_job, name, given, ends) for name in origins
        }
        later = []
        for name, started in starts.items():
            if started.result():
                ways = [*given.settings, *([] if given.no_control else ["control"])]
                names = [f"{name}-{way}" for way in ways]
                later += [pool.submit(run_job, n, given, ends) for n in names]
        for future in later:
            future.result()


def write_table(given: argparse.Namespace) -> None:
    """Joins the results of OUT folders into results/grpo_learning.json."""
    from helpers.files import write_json

    found: dict[str, dict[str, Any]] = {}
    for folder in given.out:
        for path in sorted(Path(folder).glob("*.json")):
            found[path.stem] = json.loads(path.read_text())
    setting = given.settings[0]
    rows = []
    for name in sorted(n for n in found if n.startswith("start") and "-" not in n):
        if f"{name}-{setting}" in found:
            rows.append({"seed": int(name[5:]), **row(found, name, setting)})
    table: dict[str, Any] = {"setting": setting, "seeds": rows}
    if GSM8K in found:
        table["gsm8k"] = {"base": found[GSM8K]["base"]["test"]}
        if f"{GSM8K}-{setting}" in found:
            table["gsm8k"] |= row(found, GSM8K, setting)
        else:
            table["gsm8k"]["sft"] = found[GSM8K]["sft"]["test"]
    names = sorted(found, key=lambda name: name.startswith(GSM8K))
    first = next(found[name] for name in names if name.endswith(setting))
    table["conditions"] = {
        "machine": given.machine,
        "model": "smollm2-135m-offline",
        "engine": first["engine"],
        "grpo": first["config"],
    }
    write_json(TABLE, table)
    print(json.dumps(table["seeds"], indent=1))


def row(found: dict[str, Any], origin: str, setting: str) -> dict[str, Any]:
    """Returns accuracies after SFT, GRPO and the control, with the paired p values."""
    from helpers.evaluation.metrics import paired_difference

    sft, grpo = found[origin]["sft"], found[f"{origin}-{setting}"]
    control = found.get(f"{origin}-control")
    counts: dict[str, Any] = {}
    for name in ("test", "test_new"):
        if name not in sft:
            continue
        right = f"{name}_right"
        part = {
            "sft": sft[name],
            "grpo": grpo["after"][name],
            "p": paired_difference(sft[right], grpo["after"][right])["p"],
        }
        if control:
            p = paired_difference(sft[right], control["after"][right])["p"]
            part["more_sft"] = {**control["after"][name], "p": p}
        counts |= part if name == "test" else {name: part}
    for name, job in (("grpo", grpo), ("more_sft", control)):
        if job:
            trained = job["trained"]
            counts[name] |= {
                "minutes": round(trained["seconds"] / 60, 2),
                "steps": trained["steps"],
                "peak_gb": trained["peak_memory_gb"],
            }
    return counts | {"minutes": counts["grpo"]["minutes"]}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out")
    run.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    run.add_argument("--settings", nargs="*", default=[DEFAULT], choices=[*SETTINGS])
    run.add_argument("--minutes", type=float, help="of GRPO; else the recipe's")
    run.add_argument("--limit", type=float, default=7200.0, help="seconds for it all")
    run.add_argument("--workers", type=int, default=2, help="jobs side by side")
    run.add_argument("--engine", default="", choices=["", "unsloth", "transformers"])
    run.add_argument("--weights", default="", choices=["", "4bit", "16bit"])
    run.add_argument("--gsm8k", default="", help="folder with the real splits")
    run.add_argument("--probe", type=int, default=1024, help="GSM8K problems tried")
    run.add_argument("--runs", default=str(ROOT / "runs" / "grpo_learning"))
    run.add_argument("--no-control", action="store_true")
    run.add_argument("--rows", type=int, default=None, help="test items, to try it out")
    run.add_argument("--sft-steps", type=int, default=None, help="the recipe's own")
    run.add_argument("--batch", type=int, default=128, help="answers a batch, to score")
    table = commands.add_parser("table")
    table.add_argument("out", nargs="+")
    table.add_argument("--settings", nargs=1, default=[DEFAULT])
    table.add_argument("--machine", default="H100, fp16, 14.0 GiB")
    one = commands.add_parser("job")
    one.add_argument("name")
    one.add_argument("values", type=json.loads)
    given = parser.parse_args()
    if given.command == "job":
        job(given.name, argparse.Namespace(**given.values))
    elif given.command == "run":
        run_all(given)
    else:
        write_table(given)


if __name__ == "__main__":
    main()
