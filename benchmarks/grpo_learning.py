"""Proves, or not, that GRPO learns: accuracy after SFT, after GRPO, after more SFT.

    python benchmarks/grpo_learning.py run OUT                     # seeds 0, 1, 2
    python benchmarks/grpo_learning.py run OUT --seeds 0 --settings recipe lr2e-4
    python benchmarks/grpo_learning.py table OUT [OUT ...]         # into results/

For each seed: the recipe `demo` at a GPU's sizes, SFT (its best checkpoint by eval
loss), then GRPO from it within `--minutes`; as a control, further SFT from the
same start for the same time. All answer the 400 items of `test` and the 200 of
`test_new`, greedily; the p value is of McNemar's exact test on the items, against SFT.
Real GSM8K is for `gsm8k_proof.py`.

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

from helpers import files, recipes, runs, runtime, stages  # noqa: E402
from helpers.config import changed  # noqa: E402
from helpers.data import preparation as data  # noqa: E402
from helpers.evaluation import evaluator, tables  # noqa: E402
from helpers.evaluation.metrics import paired_difference  # noqa: E402
from helpers.models import load  # noqa: E402
from helpers.training import trainer as training  # noqa: E402

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


def start_config(seed: int, given: argparse.Namespace) -> Any:
    """Returns the config of the SFT that GRPO and the control start from."""
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


def evaluate(run: Any, label: str, adapter: Path | str | None) -> dict[str, Any]:
    """Returns right answers and items of each test set, with each item's verdict."""
    part = evaluator.evaluate(run, label, adapter)
    found: dict[str, Any] = {"eval_loss": part.get("eval_loss")}
    for name in tables.PROBLEMS:
        if name in part:
            items = files.read_rows(run.path / "eval" / label / f"{name}.jsonl")
            found[name] = part[name]["correct"]
            found[f"{name}_right"] = [item["correct"] for item in items]
    return found


def start(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates what GRPO starts from."""
    run = runs.save_run(start_config(int(name[5:]), given))
    data.ensure_data(run)
    part = stages.train_stage(run, "sft")
    adapter = run.path / "sft" / "adapter"
    return {"sft": evaluate(run, "sft", adapter), "trained": part}


def go_on(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains on from a start, by GRPO or by more SFT, and evaluates the result."""
    origin, _, setting = name.partition("-")
    before = runs.open_run(origin)
    adapter = before.path / "sft" / "adapter"
    config = changed(before.config, name=name, sft_adapter=str(adapter))
    if setting == "control":
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
        model, tokenizer = training.load_for_training(run, "sft", adapter)
        part = training.fit(training.build_sft(run, model, tokenizer), run)
        stage = "sft"
    else:
        config = changed(
            config,
            stages=["grpo"],
            grpo=RECIPE.grpo | SETTINGS[setting],
            grpo_minutes=given.minutes,
            data__problems=before.config.data.train[0],
        )
        run = runs.save_run(config)
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


def job(name: str, given: argparse.Namespace) -> None:
    """Does one job in this process; its result goes to the runs and to OUT."""
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
    for label in ("sft", "after"):
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
    given.minutes = given.minutes or RECIPE.grpo_minutes
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + given.limit
    load.find_model("smollm2-135m-offline")  # converted once, not by each job
    origins = [f"start{seed}" for seed in given.seeds]
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
    first = next(found[name] for name in sorted(found) if name.endswith(setting))
    table["conditions"] = {
        "machine": given.machine,
        "model": "smollm2-135m-offline",
        "engine": first["engine"],
        "grpo": first["config"],
    }
    files.write_json(TABLE, table)
    print(json.dumps(table["seeds"], indent=1))


def row(found: dict[str, Any], origin: str, setting: str) -> dict[str, Any]:
    """Returns accuracies after SFT, GRPO and the control, with the paired p values."""
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
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--settings", nargs="*", default=[DEFAULT], choices=[*SETTINGS])
    run.add_argument("--minutes", type=float, help="of GRPO; else the recipe's")
    run.add_argument("--limit", type=float, default=7200.0, help="seconds for it all")
    run.add_argument("--workers", type=int, default=2, help="jobs side by side")
    run.add_argument("--engine", default="", choices=["", "unsloth", "transformers"])
    run.add_argument("--weights", default="", choices=["", "4bit", "16bit"])
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
