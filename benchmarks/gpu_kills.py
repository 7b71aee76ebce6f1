"""Kills trainings on a GPU, resumes them, and compares with uninterrupted ones.

    python benchmarks/gpu_kills.py MACHINE [--engines transformers unsloth]
    python benchmarks/gpu_kills.py cpu --tiny      # tries the program

SFT of the offline model, 60 steps: three trainings to the end, and three that get
SIGKILL up to a second after a checkpoint of a seeded step, and go on. GRPO by minutes:
one that is killed so. Each training is a process of its own, those of an engine side by
side. Writes `gpu_kills.json` (in $OUT, else results/).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import recipes  # noqa: E402
from helpers.config import RunConfig, changed  # noqa: E402
from helpers.files import read_json, write_json  # noqa: E402

RESULT = Path(os.environ.get("OUT", ROOT / "results")) / "gpu_kills.json"
REPEATS, LIMIT_S = 3, 300
MINUTES = {False: 0.75, True: 0.15}  # of GRPO; tiny: true
STEPS = {False: 60, True: 8}


def build_config(name: str, engine: str, tiny: bool) -> RunConfig:
    """Returns a short run with many checkpoints."""
    rows = {"train": 24 if tiny else 200, "eval": 8, "test": 4, "test_new": 4}
    values: dict[str, Any] = {f"data__{key}_rows": n for key, n in rows.items()}
    values |= {"name": name, "engine": engine, "save_minutes": 100}
    values |= {"sft__max_steps": STEPS[tiny], "sft__save_steps": 2 if tiny else 5}
    values |= {"sft__eval_steps": STEPS[tiny] // 2, "sft__warmup_steps": 2}
    values |= {"grpo_minutes": MINUTES[tiny], "grpo_held_out": 8}
    values |= {"grpo__max_completion_length": 24, "grpo__save_steps": 2}
    values |= {} if tiny else {"weights": "4bit"}
    return changed(recipes.load("smoke"), **values)


def train(home: Path, config: Path, stage: str, kill_at: int | None = None) -> int:
    """Trains a stage in a process; returns its exit code, -9 where it was killed."""
    name = json.loads(config.read_text())["name"]
    own = {"TUNEBOOK_RUNS": str(home), "UNSLOTH_COMPILE_LOCATION": str(home / name)}
    command = [sys.executable, "-m", "helpers", "train", str(config), "--stage", stage]
    checkpoints, late = home / name / stage / "checkpoints", time.monotonic() + LIMIT_S
    with (home / f"{name}.log").open("a") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | own,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while child.poll() is None:
            time.sleep(0.05)
            states = checkpoints.glob("checkpoint-*/trainer_state.json")
            steps = [int(s.parent.name.partition("-")[2]) for s in states]
            if kill_at is not None and max(steps, default=0) >= kill_at:
                time.sleep(random.Random(name).random())
            elif time.monotonic() < late:
                continue
            os.killpg(child.pid, signal.SIGKILL)
            break
        return child.wait()


def run_sft(home: Path, engine: str, tiny: bool, job: tuple[str, int]) -> list[float]:
    """Returns the losses of one training, killed and resumed or not."""
    kind, number = job
    config = home / f"{engine}-{kind}-{number}.json"
    config.write_text(build_config(config.stem, engine, tiny).model_dump_json())
    if kind == "killed":
        quarter = STEPS[tiny] // 4
        step = random.Random(config.stem).randrange(quarter, 3 * quarter)
        assert train(home, config, "sft", step) == -signal.SIGKILL
    assert train(home, config, "sft") == 0, f"see {home / config.stem}.log"
    entries = json.loads((home / config.stem / "sft/log_history.json").read_text())
    return [entry["loss"] for entry in entries if "loss" in entry]


def differ(first: list[float], second: list[float]) -> float:
    """Returns the largest difference of two trainings' losses, in nats."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def measure_sft(home: Path, engine: str, tiny: bool) -> dict[str, Any]:
    """Returns how far killed trainings are from whole ones, and those apart."""
    kinds = ("whole", "killed")
    jobs = list(product(kinds, range(1 if tiny else REPEATS)))
    with ThreadPoolExecutor(1 if tiny else len(jobs)) as pool:
        losses = [*pool.map(partial(run_sft, home, engine, tiny), jobs)]
    whole, killed = (
        [values for (kind, _), values in zip(jobs, losses, strict=True) if kind == name]
        for name in kinds
    )
    return {
        "engine": engine,
        "steps": len(whole[0]),
        "loss_last": whole[0][-1],
        "killed": len(killed),
        "largest_difference": max(differ(a, b) for a, b in product(whole, killed)),
        "of_whole_ones": max([differ(*pair) for pair in combinations(whole, 2)] or [0]),
    }


def measure_grpo(home: Path, engine: str, tiny: bool) -> dict[str, Any]:
    """Returns the seconds that a killed and resumed GRPO took of its budget."""
    config = home / f"{engine}-grpo.json"
    config.write_text(build_config(config.stem, engine, tiny).model_dump_json())
    assert train(home, config, "grpo", kill_at=2) == -signal.SIGKILL
    assert train(home, config, "grpo") == 0, f"see {home / config.stem}.log"
    used = read_json(home / config.stem / "grpo" / "clock.json")["used_s"]
    return {"engine": engine, "used_s": used, "budget_s": 60 * MINUTES[tiny]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine")
    engines = ["transformers", "unsloth"]
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--tiny", action="store_true", help="few steps, without a GPU")
    options = parser.parse_args()
    names = engines[:1] if options.tiny else options.engines
    values: dict[str, Any] = {"machine": options.machine, "sft": [], "grpo": []}
    with tempfile.TemporaryDirectory() as folder:
        for engine in names:
            row = measure_sft(Path(folder), engine, options.tiny)
            values["sft"].append(row)
            write_json(RESULT, values)
        values["grpo"].append(measure_grpo(Path(folder), names[0], options.tiny))
        write_json(RESULT, values)
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
