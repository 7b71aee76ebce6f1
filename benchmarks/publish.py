"""Writes a run's report to results/<name>.json, and results/README.md from all of them.

    python benchmarks/publish.py runs/demo demo_cpu "make demo" "two CPU cores, 24 GB"

The numbers are the run's own; this program measures nothing. Run it after
`make demo`, on the machine whose numbers you want to keep.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import recipes  # noqa: E402
from helpers.estimate import estimate_memory  # noqa: E402
from helpers.evaluation.tables import results_table  # noqa: E402
from helpers.runs import write_json, write_text  # noqa: E402

RESULTS = ROOT / "results"
START, END = "<!-- table of results/demo_cpu.json -->", "<!-- end of table -->"


def clean(value: Any, folder: Path) -> Any:
    """Returns a report without the paths of the machine it was made on."""
    if isinstance(value, dict):
        return {key: clean(item, folder) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(rf"^/.*/(runs/{folder.name})\b", r"\1", value)
    return value


def stages(report: dict[str, Any]) -> str:
    """Returns a paragraph on a run's SFT, GRPO and export."""
    sft, grpo, export = report["sft"], report["grpo"], report["export"]
    return (
        f"SFT: {sft['steps']} steps in {sft['seconds']:.0f} s, loss "
        f"{sft['loss_first']} -> {sft['loss_last']}, {sft['tokens_per_second']} "
        f"tokens/s with evaluation and samples, {sft['supervised_fraction']:.0%} of "
        f"the tokens learnt, {sft['skipped_steps']} steps skipped, peak "
        f"{sft['peak_memory_gb']} GB. GRPO: {grpo['steps']} steps in "
        f"{grpo['seconds']:.0f} s, mean reward {grpo['reward_first']} -> "
        f"{grpo['reward_last']}, peak {grpo['peak_memory_gb']} GB. Export: greedy "
        f"answers equal to the trained model's: adapter "
        f"{export['adapter']['greedy_agreement']:.0%}, merged "
        f"{export['merged']['greedy_agreement']:.0%}."
    )


def page() -> str:
    """Returns results/README.md, made from the JSON files beside it."""
    lines = ["# Measured runs", ""]
    lines.append("Made by `python benchmarks/publish.py`; each table is one run.")
    for path in sorted(RESULTS.glob("demo_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        place, versions = report["environment"], report["environment"]["versions"]
        lines += ["", f"## {path.stem}", ""]
        lines.append(f"`{report['command']}` on {report['conditions']}.")
        lines.append(
            f"{place['engine']}, {place['dtype']}, Python {place['python']}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + "."
        )
        lines += ["", *table_lines(report)]
        lines += ["", stages(report)]
        seconds = report.get("notebooks", {}).get("seconds", {})
        if seconds:
            spent = ", ".join(f"{n} {s / 60:.1f}" for n, s in seconds.items())
            total = sum(seconds.values()) / 60
            lines += ["", f"Minutes a notebook: {spent}; together {total:.1f}."]
    lines += [*rate_lines(), *learning_lines(), *memory_lines(), *mask_lines()]
    if (RESULTS / "adapters.json").exists():
        import adapters

        lines += ["", "## adapters", "", *adapters.table()]
    return "\n".join(lines) + "\n"


RATES = {
    "grpo_speed": "GRPO steps an hour",
    "data_speed": "conversations a second, from messages to packed labels",
    "eval_speed": "evaluated items a second",
    "gsm8k_agreement": "verdicts equal to lm-evaluation-harness's own",
}


def rate_lines() -> list[str]:
    """Returns a section for each program that compares ways in one run."""
    lines = []
    paths = [(n, p) for n in RATES for p in sorted(RESULTS.glob(f"{n}*.json"))]
    for name, path in paths:
        what, found = RATES[name], json.loads(path.read_text(encoding="utf-8"))
        plain = {k: v for k, v in found.items() if isinstance(v, int | float)}
        lines += ["", f"## {path.stem}", "", f"{what[0].upper()}{what[1:]}"]
        lines[-1] += f", by `python benchmarks/{name}.py`"
        on = found.get("conditions", {})
        said = [on[k] for k in ("engine", "dtype", "weights", "machine") if k in on]
        lines[-1] += f": {', '.join(said)}." if said else "."
        lines += ["", f"| {' | '.join(plain)} |", "|---" * len(plain) + "|"]
        lines.append(f"| {' | '.join(map(str, plain.values()))} |")
        if "same_verdicts" in found:
            same = ", ".join(f"{k} {v}" for k, v in found["same_verdicts"].items())
            lines += ["", f"Same verdicts, of {found['compared']}: {same}."]
    return lines


def learning_lines() -> list[str]:
    """Returns the section on what GRPO learns, seed by seed."""
    path = RESULTS / "grpo_learning.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["", "## grpo_learning", "", found["conditions"]["machine"] + "; "]
    lines[-1] += "by `python benchmarks/grpo_learning.py`. p: McNemar's exact test of "
    lines[-1] += "the same items against SFT."
    columns = ["seed", "held out", "SFT", "GRPO", "p", "minutes", "more SFT instead"]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found["seeds"]:
        for name, part in (("test", row), ("test_new", row["test_new"])):
            cells = [str(row["seed"]), name, share(part["sft"]), share(part["grpo"])]
            cells += [f"{part['p']:.2g}", f"{row['minutes']}", share(part["more_sft"])]
            lines.append("| " + " | ".join(cells) + " |")
    if "gsm8k" in found:
        parts = [(k, found["gsm8k"].get(k)) for k in ("base", "sft", "grpo")]
        told = ", ".join(f"{name} {share(part)}" for name, part in parts if part)
        count = found["gsm8k"]["base"]["n"]
        lines += ["", f"Real GSM8K, first {count} test problems: {told}."]
    return lines


def share(part: dict[str, Any]) -> str:
    """Returns a count of a whole, in percent, with its interval."""
    low, high = 100 * part["low"], 100 * part["high"]
    rate = 100 * part["k"] / part["n"]
    return f"{part['k']}/{part['n']} = {rate:.1f} % [{low:.1f}, {high:.1f}]"


def mask_lines() -> list[str]:
    """Returns the section on labels, template by template."""
    if not (RESULTS / "masks.json").exists():
        return []
    import masks

    return ["", "## masks", "", *masks.table()]


def in_words(row: dict[str, Any]) -> str:
    """Returns a measured config in a few words."""
    short = {k.rpartition("__")[2]: v for k, v in row["config"].items()}
    words = [f"{short['per_device_train_batch_size']} x {row['row_tokens']} tokens"]
    if row["stage"] == "grpo":
        words.append(f"+ {short['max_completion_length']}")
    if short.get("packing"):
        words.append("packed")
    if not short["gradient_checkpointing"]:
        words.append("no checkpointing")
    words.append(short.get("weights", "4bit"))
    if not short.get("double_quant", True):
        words.append("scales not quantised")
    if short.get("sampler") == "copy":
        words.append("sampled from a 16-bit copy")
    if "target_modules" in short:
        words.append(f"LoRA r {short['r']} on {' '.join(short['target_modules'])}")
    return ", ".join(words).replace(", +", " +")


def memory_lines() -> list[str]:
    """Returns the section on predicted and measured memory."""
    path = RESULTS / "memory.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["", "## memory", "", "Peak reserved GPU memory in GiB, predicted by "]
    lines[-1] += f"`helpers.estimate` and measured on {found['machine']}."
    lines.append("`python benchmarks/memory.py measure`; a row is SFT or GRPO of ")
    lines[-1] += "random weights of the shape, in a process of its own."
    columns = ["half", "case", "shape", "engine", "stage", "config", "predicted"]
    columns += ["measured", "error", "said to fit 14.0", "ran"]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in found["rows"]:
        error = row["predicted_gb"] / row["measured_gb"] - 1
        if row["ran"]:
            errors[row["held_out"]].append(abs(error))
        config = in_words(row)
        cells = ["held out" if row["held_out"] else "calibration", row["id"]]
        cells += [row["shape"], row["engine"], row["stage"], config]
        cells += [f"{row['predicted_gb']:.2f}", f"{row['measured_gb']:.2f}"]
        cells.append(f"{error:+.1%}" if row["ran"] else "-")
        cells += [("no", "yes")[row["predicted_fits"]], ("no", "yes")[row["ran"]]]
        lines.append("| " + " | ".join(cells) + " |")
    for half, name in ((False, "Calibration"), (True, "Held out")):
        seen = errors[half]
        lines += ["", f"{name}: {len(seen)} cases, mean error "]
        lines[-1] += f"{sum(seen) / len(seen):.1%}, largest {max(seen):.1%}; "
        lines[-1] += f"{sum(e > 0.1 for e in seen)} past 10 %."
    return lines


def table_lines(report: dict[str, Any]) -> list[str]:
    """Returns a report's table in Markdown."""
    table = results_table(report).reset_index()
    rows = [table.columns, ["---"] * len(table.columns), *table.values.tolist()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def list_recipes() -> str:
    """Returns README's table of the recipes: what they reproduce, what they need."""
    lines = ["| recipe | reproduces | stages | engine | needs | GiB on a T4 |"]
    lines.append("|---|---|---|---|---|---|")
    for name in recipes.read_file():
        config, notes = recipes.load(name), recipes.describe(name)
        engine = "Unsloth" if config.engine == "auto" else config.engine
        cells = [f"`{name}`", notes["source"], " + ".join(config.stages).upper()]
        cells += [engine, notes["needs"], f"{estimate_memory(config).peak_gb:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update_readme(report: dict[str, Any]) -> None:
    """Puts the table of a CPU demo between the marks in the project's README."""
    path = ROOT / "README.md"
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    table = "\n".join(["", "", *table_lines(report), "", ""])
    write_text(path, before + start + table + end + after)


def main(folder: Path, name: str, command: str, conditions: str) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report = {"command": command, "conditions": conditions, **clean(report, folder)}
    write_json(RESULTS / f"{name}.json", report)
    write_text(RESULTS / "README.md", page())
    if name == "demo_cpu":
        update_readme(report)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: publish.py RUN_FOLDER NAME COMMAND CONDITIONS")
    main(Path(sys.argv[1]), *sys.argv[2:])
