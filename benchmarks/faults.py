"""Plants kills, damaged files and bad inputs in runs of a tiny model, on the CPU.

Each case is a copy of a run and a process of its own, forked once the libraries are
loaded. A kill is SIGKILL at a seeded random moment; the same call is then made again,
and its result compared with an uninterrupted one's. A fault is handled when the result
is the same, or one sentence names the file. A bad input is clear when one sentence
refuses it or warns of it, and silent when nothing is said. The stop button interrupts
a training, which the same process then begins again.

    python benchmarks/faults.py                    # all, to results/faults.json
    python benchmarks/faults.py --minutes 5        # some of what is not in it yet
    python benchmarks/faults.py --only kills       # one table, or one scene of kills
    python benchmarks/faults.py --share 3 --out FILE  # three seeded cases a table

Rows that the file has are not made again: remove it to begin anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OMP_NUM_THREADS"] = "1"  # a fork takes no threads along

from fsspec.implementations.local import LocalFileSystem  # noqa: E402

from helpers import checks, export, files, recipes, runs, stages  # noqa: E402
from helpers.config import RunConfig, changed  # noqa: E402
from helpers.data import preparation  # noqa: E402
from helpers.errors import TunebookError  # noqa: E402
from helpers.evaluation import evaluator  # noqa: E402
from helpers.grpo import trainer as grpo  # noqa: E402
from helpers.inference import items  # noqa: E402
from helpers.models import load_tokenizer  # noqa: E402
from helpers.runs import Run  # noqa: E402
from helpers.training import callbacks, inputs, trainer  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

Row = dict[str, Any]
SEED = 17
SMALL: Row = {
    "max_length": 256,
    "data__train_rows": 24,
    "data__eval_rows": 4,
    "data__test_rows": 6,
    "data__test_new_rows": 4,
    "data__general_rows": 4,
    "evaluation__max_new_tokens": 8,
    "sft__max_steps": 6,
    "sft__save_steps": 2,
    "sft__eval_steps": 3,
    "sft__warmup_steps": 0,
    "grpo__max_steps": 3,
    "grpo__save_steps": 1,
    "grpo__max_completion_length": 8,
}


def weights(folder: Path) -> dict[str, str]:
    """Returns the hashes of the weights below a folder."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(p.relative_to(folder)): files.hash_file(p) for p in paths}


def answers(run: Run) -> list[str]:
    paths = sorted((run.path / "eval").rglob("*.jsonl"))
    return [item["output"] for path in paths for item in files.read_rows(path)]


def rows_of(run: Run) -> list[str]:
    return [p.read_text() for p in sorted((run.path / "data").glob("*.jsonl"))]


# name: kills, what the run has before, the call, its result, whether that is determined
Scene = tuple[int, str, Callable[[Run], Any], Callable[[Run], Any], bool]
SCENES: dict[str, Scene] = {
    "data": (6, "", preparation.ensure_data, rows_of, True),
    "sft": (
        10,
        "data",
        lambda run: stages.train_stage(run, "sft"),
        lambda run: weights(run.path / "sft" / "adapter"),
        True,
    ),
    "second place": (
        6,
        "data",
        lambda run: keep_elsewhere(run),
        lambda run: weights(run.path / "sft" / "adapter"),
        True,
    ),
    "grpo": (
        8,
        "sft",
        lambda run: stages.train_stage(run, "grpo"),
        lambda run: weights(run.path / "grpo" / "adapter"),
        True,
    ),
    "grpo by minutes": (
        4,
        "sft",
        lambda run: stages.train_stage(by_minutes(run), "grpo"),
        lambda run: sorted(weights(run.path / "grpo" / "adapter")),
        False,
    ),
    "evaluation": (
        6,
        "sft",
        lambda run: evaluator.evaluate_run(run, ["base", "sft"]),
        answers,
        True,
    ),
    "export": (
        6,
        "sft",
        lambda run: export.export(run, "sft", ["adapter", "merged"], prompts=2),
        lambda run: weights(run.path / "export"),
        True,
    ),
}


PUTS = 60  # files that the second place is sent in a training, about


def keep_elsewhere(run: Run) -> None:
    """Trains SFT, copying it to a folder beside the run's."""
    place = run.path.with_name(f"{run.path.name}-place")
    place.mkdir(exist_ok=True)
    os.environ["TUNEBOOK_KEEP"] = str(place)
    stages.train_stage(run, "sft")


def die_in_copy(number: int) -> None:
    """Has this process kill itself when it sends a file of that number."""
    numbers, put_file = count(), LocalFileSystem.put_file

    def put(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return put_file(*arguments, **options)

    LocalFileSystem.put_file = put


def by_minutes(run: Run) -> Run:
    return Run(run.path, changed(run.config, grpo_minutes=0.1))


def run_apart(action: Callable[[], Any], kill_s: float | None = None) -> Row | None:
    """Returns what an action in another process gave or raised; None if it was killed.

    Keys: `result`; `error`, with `is_ours` for the errors that a user can mend; `log`.
    """
    with tempfile.NamedTemporaryFile("r") as answer:
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                Path(answer.name).write_text(json.dumps(perform(action)))
            os._exit(0)
        if kill_s is not None:
            time.sleep(kill_s)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return None if os.WIFSIGNALED(status) else json.load(answer)


def perform(action: Callable[[], Any]) -> Row:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("helpers")
    library.handlers, library.propagate = [handler], False
    library.setLevel(logging.INFO)
    with Path(os.devnull).open("w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    row: Row = {"result": None, "error": "", "is_ours": False}
    try:
        row["result"] = action()
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"[:400]
        text = text.replace(f"{runs.runs_folder().parent}/", "")
        row["error"] = text.replace(str(ROOT), ".")
        row["is_ours"] = isinstance(error, (TunebookError, SystemExit))
    return row | {"log": "\n".join(lines)}


def make_bases(home: Path, scenes: list[str]) -> None:
    """Makes the runs that cases start from: nothing, then what each scene adds."""
    tokenizer = load_tokenizer("smollm2-135m-offline")
    model = save_tiny_model(
        "Llama", tokenizer, home / "model", max_position_embeddings=2048
    )
    os.environ["TUNEBOOK_RUNS"] = str(home / "runs")
    small = changed(recipes.load("smoke"), name="base", model=str(model), **SMALL)
    run = runs.save_run(small)
    shutil.copytree(run.path, home / "runs" / "with-")
    for scene in scenes:
        row = run_apart(lambda scene=scene: bool(SCENES[scene][2](run)))
        assert row and not row["error"], row
        shutil.copytree(run.path, home / "runs" / f"with-{scene}")


def copy_run(base: str, name: str) -> str:
    folder = runs.runs_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs.runs_folder() / f"with-{base}", folder)
    return name


def perform_scene(scene: str, name: str) -> Any:
    _, _, call, result, _ = SCENES[scene]
    call(runs.open_run(name))
    return result(runs.open_run(name))


def plant_kills(cases: list[tuple[str, float]]) -> Iterator[Row]:
    """Yields a row for each kill at a share of the time that a scene takes.

    In a second-place save it is at a share of the files; the run's folder goes too.
    """
    whole: dict[str, tuple[Any, float]] = {}
    for number, (scene, share) in enumerate(cases):
        _, base, _, _, determined = SCENES[scene]
        if scene not in whole:
            name, began = copy_run(base, "whole"), time.perf_counter()
            row = run_apart(lambda s=scene, n=name: perform_scene(s, n))
            assert row and not row["error"], row
            whole[scene] = row["result"], time.perf_counter() - began
        result, seconds = whole[scene]
        name = copy_run(base, f"kill-{number}")
        action = lambda s=scene, n=name: perform_scene(s, n)  # noqa: E731
        if scene == "second place":
            dies = lambda a=action, s=share: (die_in_copy(int(s * PUTS)), a())  # noqa: E731
            was_killed = run_apart(dies) is None
            copy_run(base, name)  # another machine
        else:
            was_killed = run_apart(action, share * seconds) is None
        row = run_apart(action) or {"error": "killed"}
        same = row.get("result") == result
        case = {"table": "kills", "case": scene, "at": round(share, 3)}
        case |= {"killed": was_killed, "survived": not row["error"]}
        yield case | {"identical": same if determined else None, "error": row["error"]}
        for folder in runs.runs_folder().glob(f"{name}*"):
            shutil.rmtree(folder)


class Stop(callbacks.TrainerCallback):
    """Presses the stop button at an event of a step, once."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.press)

    def press(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise KeyboardInterrupt


def stop_and_go(stage: str, name: str, event: str, step: int, anew: bool) -> Any:
    """Returns a stage's weights after the cell, or all cells, are run again."""
    run, button = runs.open_run(name), Stop(event, step)
    build = trainer.build_sft if stage == "sft" else grpo.build_grpo
    start = run.path / "sft" / "adapter" if stage == "grpo" else None
    trained = build(run, *trainer.load_for_training(run, stage, start))  # type: ignore[arg-type]
    trained.add_callback(button)
    with suppress(KeyboardInterrupt):
        trainer.fit(trained, run)
    assert button.step == -1
    if anew:
        trained = build(run, *trainer.load_for_training(run, stage, start))  # type: ignore[arg-type]
    trainer.fit(trained, run)
    return weights(run.path / stage / "adapter")


def plant_stops(cases: list[tuple[str, str, int, bool]]) -> Iterator[Row]:
    """Yields a row for each interrupted training: whether its weights are right."""
    whole: dict[str, Any] = {}
    for stage, event, step, anew in cases:
        base = "data" if stage == "sft" else "sft"
        if stage not in whole:
            name = copy_run(base, "whole")
            row = run_apart(lambda s=stage, n=name: perform_scene(s, n))
            assert row and not row["error"], row
            whole[stage] = row["result"]
        name = copy_run(base, "stopped")
        again = lambda: stop_and_go(stage, name, event, step, anew)  # noqa: B023, E731
        row = run_apart(again) or {"error": "killed", "result": None}
        case = {"table": "stop_button", "case": stage, "at": f"{event} {step}"}
        right = row["result"] == whole[stage]
        yield case | {"anew": anew, "right": right, "error": row["error"]}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garble(file: Path) -> None:
    file.write_bytes(b"\x00\xff{" * 40)


def remove(file: Path) -> None:
    file.unlink()


LAST = "sft/checkpoints/checkpoint-6/"
DAMAGED = [
    *("config.json", "report.json", "lock.json", "sft/made_from.json"),
    *("sft/best.json", "sft/layout.json", "sft/labels.json", "sft/samples.jsonl"),
    *("data/train.jsonl", "data/eval.jsonl", "data/test.jsonl"),
    *("eval/base/test.jsonl", f"{LAST}trainer_state.json", f"{LAST}optimizer.pt"),
    *(f"{LAST}adapter_model.safetensors", f"{LAST}rng_state.pth"),
]
DAMAGE = {f.__name__: f for f in (cut, empty, garble, remove)}
FAULTS = [(file, name) for file in DAMAGED for name in DAMAGE]
FAULTS.remove(("lock.json", "remove"))


def finish(name: str) -> Any:
    """Trains SFT on from its last checkpoint, and evaluates the base model."""
    run = runs.open_run(name)
    stages.train_stage(run, "sft")
    evaluator.evaluate(run, "base")
    return weights(run.path / "sft" / "adapter"), answers(run)


def plant_faults(cases: list[tuple[str, str]]) -> Iterator[Row]:
    """Yields a row for each damaged file: what came of the calls that read it."""
    name = copy_run("sft", "faulty")
    folder, whole = runs.runs_folder() / name, run_apart(lambda: finish(name))
    assert whole and not whole["error"], whole
    (folder / "lock.json").write_text('{"host": "elsewhere", "pid": 1}')
    os.utime(folder / "lock.json", (0, 0))
    note = files.read_json(folder / "sft" / inputs.NOTE)
    files.write_json(folder / "sft" / inputs.NOTE, note | {"finished": False})
    shutil.copytree(folder, runs.runs_folder() / "with-all")
    for file, damage in cases:
        DAMAGE[damage](runs.runs_folder() / copy_run("all", name) / file)
        row = run_apart(lambda: finish(name)) or {"error": "killed", "is_ours": False}
        sentence = row["is_ours"] and file.split("/")[-1] in row["error"]
        is_handled = sentence or (not row["error"] and row["result"] == whole["result"])
        case = {"table": "faults", "case": file, "damage": damage}
        yield case | {"handled": is_handled, "error": row["error"]}


def values(group: str, **fields: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{group}__{n}", v) for n, all_ in fields.items() for v in all_]


INPUTS: list[tuple[str, Any]] = [
    *values("lora", r=[0, -4, "16", 8.5], lora_alpha=[0, -8, "x"]),
    *values("lora", target_modules=[["q_prj"], "(", 3, []], lora_dropout=[1.0, -0.1]),
    *values("lora", bias=["lora_olny"], task_type=["SEQ_CLS"], rank=[8]),
    *values("lora", init_lora_weights=["eva", "x"], layers_to_transform=[[99]]),
    *values("lora", modules_to_save=[["lm_hed"]], inference_mode=[True]),
    *values("sft", learning_rate=[0, -1, "2e-4", None, float("nan"), float("inf"), 9]),
    *values("sft", max_steps=[0, "many"], num_train_epochs=[0, -1], save_steps=["x"]),
    *values("sft", per_device_train_batch_size=[0, -1, 2.5, "8"], optim=["adam_w"]),
    *values("sft", gradient_accumulation_steps=[0, -2], weight_decay=[-1, "x"]),
    *values("sft", lr_scheduler_type=["cosin"], warmup_steps=[-1, 10**6, "x"]),
    *values("sft", max_step=[1], learning_rat=[1], output_dir=["x"], fp16=[True]),
    *values("sft", save_strategy=["step"], eval_strategy=["x"], report_to=[3]),
    *values("sft", hub_token=["secret"], push_to_hub=[True], max_length=[9]),
    *values("grpo", beta=[-1, "x"], num_generations=[0, 1, 7], temperature=[0, -1]),
    *values("grpo", max_completion_length=[0, None, 10**9], epsilon=["x"]),
    *values("grpo", learning_rate=[0, 5], loss_type=["x"], num_generation=[4]),
    *values("grpo", max_steps=[0], reward_weights=[[1]], generation_kwargs=[{"a": 1}]),
    *values("inference", temperature=["hot", -1], max_new_tokens=[0, -3, 10**9]),
    *values("inference", top_p=[2.0, "x"], temprature=[1]),
    *values("evaluation", max_new_tokens=[0, -1, 10**9, "x"], batch_size=[0, "x"]),
    *values("evaluation", labels=[["a", "a"], 3, [""]], text_rows=[-1]),
    *values("data", train=[["none.jsonl"], [], 3], train_rows=[0, -1, "x"]),
    *values("data", eval_share=[0.2, 2, -1], problems=["none.jsonl"], tset=["a"]),
    *[("max_length", v) for v in (0, -1, 10**9, "x", None)],
    *[("seed", v) for v in (-1, "x", 1.5)],
    *[("save_minutes", v) for v in (0, -1, "x")],
    *[("grpo_minutes", v) for v in (0, -1, "x")],
    *[("model", v) for v in ("", "no/such-model", 3)],
    *[("name", v) for v in ("", "../up", "a/b", 3)],
    *[("rewards", v) for v in ({"corectness": 1}, {}, {"correctness": "x"}, 3)],
    *[("stages", v) for v in (["dpo"], [], "sft", ["grpo", "grpo"])],
    *[("template", v) for v in ("lama-2", "", "{{ bad", "none.jinja")],
    *[("export", v) for v in (["gguf:q9"], ["zip"], "merged")],
    *[("dtype", "float8"), ("weights", "3bit"), ("engine", "jax"), ("loss_on", "x")],
    *[("best_by", "x"), ("layout", "x"), ("sampler", "x"), ("sft_adapter", 3)],
    *[("pad_token", 3), ("system_prompt", 3), ("unknown", 1), ("sft", 3)],
]
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "torn.jsonl": b'{"messages": [',
    "binary.jsonl": b"\x00\xff\xfe\x01" * 50,
    "numbers.jsonl": b"1\n2\n",
    "nothing.jsonl": b"{}\n{}\n",
    "columns.csv": b"a,b\n1,2\n",
    "list.json": b"[]",
    "roles.jsonl": b'{"messages": [{"role": "judge", "content": "x"}]}\n',
    "no_answer.jsonl": b'{"messages": [{"role": "user", "content": "x"}]}\n',
    "null.jsonl": b'{"prompt": null, "completion": null}\n',
    "file.xlsx": b"PK",
    "file.parquet": b"PAR1",
}


def use_input(field: str, value: Any, config: RunConfig) -> str:
    """Returns what was warned of, after a training's and evaluation's first checks."""
    if field == "file":
        path = runs.runs_folder() / value
        path.write_bytes(FILES[value])
        preparation.prepare(runs.save_run(changed(config, data__train=[str(path)])))
        return ""
    if field == "out":
        path = runs.runs_folder() / "prompts.jsonl"
        path.write_text('"Hi"\n')
        return str(items.generate_command(config.model, file=path, out=path))
    fields = {field: value}
    with suppress(KeyError):  # its right value stands beside it
        fields |= {"data__eval_share": {"data__eval": None}[field]}
    run = runs.save_run(changed(config, **fields))
    advice = checks.advise(run.config, rows=24)
    checks.require(advice)
    preparation.ensure_data(run)
    load_tokenizer(run.config.model)
    return "; ".join(a.text for a in advice if field.split("__")[-1] in a.field)


def plant_inputs(cases: list[tuple[str, Any]]) -> Iterator[Row]:
    """Yields a row for each bad input: clear, a traceback, or silent."""
    config = runs.open_run("with-data").config
    for field, value in cases:
        action = lambda f=field, v=value: use_input(f, v, config)  # noqa: E731
        row = run_apart(action) or {"error": "killed", "is_ours": False, "result": ""}
        case = {"table": "bad_inputs", "case": field, "value": repr(value)}
        case["traceback"] = bool(row["error"]) and not row["is_ours"]
        case["silent"] = not row["error"] and not row["result"]
        yield case | {"said": row["error"] or row["result"]}


def summarise(rows: list[Row]) -> Row:
    parts = {t: [r for r in rows if r["table"] == t] for t in TABLES}
    kills, bad = parts["kills"], parts["bad_inputs"]
    asked = [r for r in kills if r["identical"] is not None]
    return {
        "kills": {
            "survived": sum(r["survived"] for r in kills),
            "n": len(kills),
            "identical": sum(r["identical"] for r in asked),
            "asked": len(asked),
        },
        "stop_button": {
            "right": sum(r["right"] for r in parts["stop_button"]),
            "n": len(parts["stop_button"]),
        },
        "faults": {
            "handled": sum(r["handled"] for r in parts["faults"]),
            "n": len(parts["faults"]),
        },
        "bad_inputs": {
            "clear": sum(not (r["traceback"] or r["silent"]) for r in bad),
            "n": len(bad),
            "tracebacks": sum(r["traceback"] for r in bad),
            "silent": sum(r["silent"] for r in bad),
        },
        "rows": rows,
    }


TABLES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "bad_inputs": plant_inputs,
    "stop_button": plant_stops,
    "faults": plant_faults,
    "kills": plant_kills,
}


def list_cases() -> dict[str, list[Any]]:
    """Returns the cases of each table; which they are is decided by a seed."""
    draw = random.Random(SEED)
    kills = [(s, draw.uniform(0.02, 0.98)) for s in SCENES for _ in range(SCENES[s][0])]
    bad = [*INPUTS, *(("file", name) for name in FILES), ("out", "prompts.jsonl")]
    events = ["on_step_begin", "on_step_end", "on_pre_optimizer_step", "on_log"]
    stops = []
    for stage, steps in (("sft", 6), ("grpo", 3)):
        for number, event in enumerate(events):
            step = draw.randrange(1, steps)
            stops.append((stage, event, step, bool(number % 2)))
    cases: dict[str, list[Any]] = {"bad_inputs": bad, "stop_button": stops}
    return cases | {"faults": FAULTS, "kills": kills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*TABLES, *SCENES])
    parser.add_argument("--share", type=int, help="cases a table, drawn by a seed")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "faults.json")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    rows = files.read_json(options.out).get("rows", [])
    made = {(row["table"], row["number"]) for row in rows}
    todo: dict[str, list[tuple[int, Any]]] = {}
    for table, all_ in list_cases().items():
        cases = [(n, c) for n, c in enumerate(all_) if (table, n) not in made]
        if options.only in SCENES:
            cases = [(n, c) for n, c in cases if c[0] == options.only]
        if options.share:
            draw = random.Random(SEED)
            cases = draw.sample(cases, min(options.share, len(cases)))
        if cases and options.only in (
            None,
            table,
            *(SCENES if table == "kills" else []),
        ):
            todo[table] = cases
    with tempfile.TemporaryDirectory() as home:
        make_bases(Path(home), ["data", "sft"][: 1 + (set(todo) != {"bad_inputs"})])
        for table, cases in todo.items():
            planted = TABLES[table]([case for _, case in cases])
            for (number, _), row in zip(cases, planted, strict=True):
                rows.append({"number": number, **row})
                print(rows[-1], flush=True)
                files.write_json(options.out, summarise(rows))
                if time.monotonic() > end:
                    return


if __name__ == "__main__":
    main()
