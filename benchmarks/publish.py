"""Writes a run's report to results/<name>.json, and results/README.md from all of them.

    python benchmarks/publish.py runs/demo demo_cpu "make demo" "two CPU cores, 24 GB"
    python benchmarks/publish.py      # the pages alone, from the results there are

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

from benchmarks import adapters, export_parity, masks, memory, scale, sft_speed  # noqa: E402
from benchmarks.markdown import to_markdown  # noqa: E402
from helpers import recipes  # noqa: E402
from helpers.estimate import estimate_memory  # noqa: E402
from helpers.evaluation.tables import percent, results_table  # noqa: E402
from helpers.files import write_json, write_lines  # noqa: E402

RESULTS = ROOT / "results"
USUAL = [("gradient_accumulation_steps", 1), ("gradient_accumulation_steps", 2)]
USUAL += [("packing", False), ("gradient_checkpointing", True), ("sampler", "model")]
RATES = {
    "grpo_speed": "GRPO steps an hour",
    "data_speed": "Conversations a second, from messages to packed labels",
    "eval_speed": "Evaluated items a second",
    "gsm8k_agreement": "Verdicts equal to lm-evaluation-harness's own",
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def stages(report: dict[str, Any]) -> str:
    """Returns a paragraph on a run's SFT, GRPO and export."""
    sft, grpo, export = report["sft"], report["grpo"], report["export"]
    # of answers as a whole, in older reports
    key = next(k for k in ("tokens_agree", "greedy_agreement") if k in export["merged"])
    parts = "tokens" if key == "tokens_agree" else "answers"
    return (
        f"SFT: {sft['steps']} steps in {sft['seconds']:.0f} s, loss "
        f"{sft['loss_first']} -> {sft['loss_last']}, {sft['tokens_per_second']} "
        f"tokens/s with evaluation and samples, {sft['supervised_fraction']:.0%} of "
        f"the tokens learnt, {sft['skipped_steps']} steps skipped, peak "
        f"{sft['peak_memory_gb']} GB. GRPO: {grpo['steps']} steps in "
        f"{grpo['seconds']:.0f} s, mean reward {grpo['reward_first']} -> "
        f"{grpo['reward_last']}, peak {grpo['peak_memory_gb']} GB. Export: greedy "
        f"{parts} equal to the trained model's: adapter "
        f"{export['adapter'][key]:.0%}, merged {export['merged'][key]:.0%}."
    )


def demo(path: Path) -> list[str]:
    """Returns the section on a published run."""
    report = read(path)
    place = report["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in place["versions"].items())
    minutes = {n: s / 60 for n, s in report["notebooks"]["seconds"].items()}
    spent = ", ".join(f"{name} {each:.1f}" for name, each in minutes.items())
    return [
        f"`{report['command']}` on {report['conditions']}.",
        f"{place['engine']}, {place['dtype']}, Python {place['python']}, {versions}.",
        *("", to_markdown(results_table(report).reset_index()), "", stages(report), ""),
        f"Minutes a notebook: {spent}; together {sum(minutes.values()):.1f}.",
    ]


def rate(path: Path, name: str) -> list[str]:
    """Returns the section on a program that compares ways in one run."""
    values = read(path)
    conditions = values["conditions"] if name != "data_speed" else {}
    names = [n for n in ("engine", "dtype", "weights", "machine") if n in conditions]
    place = ", ".join([f"`python benchmarks/{name}.py`", *map(conditions.get, names)])
    row = {k: v for k, v in values.items() if isinstance(v, int | float)}
    lines = [f"{RATES[name]}: {place}.", "", to_markdown([row])]
    rows = []
    for way, record in values.get("runs", {}).items():
        if "split_s" in record:
            row = {"way": way} | {
                f"{n}, s": f"{s:.2f}" for n, s in record["split_s"].items()
            }
            rows.append(row | {"GiB": record["peak_gb"]})
        elif "error" in record:
            lines += ["", f"{way}: {record['error']}"]
    lines += ["", to_markdown(rows)] if rows else []
    if "same_verdicts" in values:
        same = ", ".join(f"{k} {v}" for k, v in values["same_verdicts"].items())
        lines += ["", f"Same verdicts, of {values['compared']}: {same}."]
    return lines


def learning(path: Path) -> list[str]:
    """Returns the section on what GRPO learns, seed by seed."""
    values, rows = read(path), []
    for seed in values["seeds"]:
        for name, part in (("test", seed), ("test_new", seed["test_new"])):
            row = {"seed": seed["seed"], "held out": name, "SFT": percent(part["sft"])}
            row |= {"GRPO": percent(part["grpo"]), "p": f"{part['p']:.2g}"}
            row |= {"minutes": seed["minutes"]}
            rows.append(row | {"more SFT instead": percent(part["more_sft"])})
    return [
        f"{values['conditions']['machine']}; by `python benchmarks/grpo_learning.py`.",
        "p: McNemar's exact test of the same items against SFT.",
        *("", to_markdown(rows)),
    ]


def pooled_lines(values: dict[str, Any]) -> list[str]:
    """Returns how later stages differ from SFT over all seeds, as a list."""
    lines = []
    for part in values.get("pooled", []):
        low, mean, high = (100 * part[n] for n in ("low", "difference", "high"))
        seeds = ", ".join(map(str, part["seeds"]))
        text = (
            f"- {part['model']}, {part['stage']} against SFT, seeds {seeds} together:"
        )
        text += f" {mean:+.1f} points [{low:+.1f}, {high:+.1f}], p {part['p']:.2g}, of"
        lines.append(f"{text} the seeds' mean on the same problems.")
    return lines


def proof(path: Path) -> list[str]:
    """Returns the section on what small models learn of real GSM8K."""
    values, rows = read(path), []
    for part in values["rows"]:
        seed = "-" if part["stage"] == "base" else part["seed"]
        row = {"model": part["model"], "seed": seed, "stage": part["stage"]}
        row |= {"right": percent(part["ours"])}
        row |= {name: part[name]["k"] for name in ("strict", "flexible")}
        for label in ("base", "sft"):
            p = part.get(f"p_vs_{label}")
            row[f"p, {label}"] = "-" if p is None else f"{p:.2g}"
        row["forgetting"] = forgetting(part["trained"].get("general"))
        seconds = part["trained"].get("seconds")
        row["minutes"] = f"{seconds / 60:.1f}" if seconds else "-"
        rows.append(row)
    failed = [
        f"{part['model']}, {part['stage']}, seed {part['seed']}: {part['error']}."
        for part in values["failed"]
    ]
    return [
        f"Real GSM8K's first {values['rows'][0]['ours']['n']} test problems on",
        f"{values['machine']}, by `python benchmarks/gsm8k_proof.py`: base after four",
        "examples, SFT on the train split, GRPO from it, and as long a further SFT.",
        "p: McNemar's exact test of the same items. Strict and flexible are counts of",
        "lm-evaluation-harness's matches. Forgetting: as in the section on the board.",
        "Minutes: of training alone. What the names mean: docs/gsm8k.md.",
        *("", to_markdown(rows)),
        *(["", *pooled] if (pooled := pooled_lines(values)) else []),
        *(["", f"Ended without a result: {' '.join(failed)}"] if failed else []),
    ]


def memory_section() -> list[str]:
    """Returns the section on estimated and measured memory."""
    table, rows = read(memory.TABLE), []
    for case in table["rows"]:
        error = case["predicted_gb"] / case["measured_gb"] - 1
        short = {k.rpartition("__")[2]: v for k, v in case["config"].items()}
        row = {"half": "held out" if case["held_out"] else "calibration"}
        row |= {name: case[name] for name in ("id", "shape", "engine", "stage")}
        batch = short.pop("per_device_train_batch_size")
        row["config"] = f"{batch} x {case['row_tokens']} tokens" + "".join(
            f", {k} {v}" for k, v in short.items() if (k, v) not in USUAL
        )
        row |= {"estimated": f"{case['predicted_gb']:.2f}"}
        row |= {"measured": f"{case['measured_gb']:.2f}"}
        row["error"] = f"{error:+.1%}" if case["ran"] else "too large"
        rows.append(row)
    return [
        "Peak reserved GPU memory in GiB, by `python benchmarks/memory.py`: estimated",
        f"by `helpers.estimate`, measured on {table['machine']}. A row is SFT or GRPO",
        "of random weights of the shape, in a process of its own.",
        *("", to_markdown(rows), "", *memory.summary()),
    ]


def sft_rows() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns the rows of SFT's ways, each with that of stock beside it, or nothing."""
    rows = read(RESULTS / "sft_speed.json")["rows"]
    stock = {(r["shape"], r["profile"]): r for r in rows if r["way"] == "stock"}
    good = {place: row for place, row in stock.items() if "error" not in row}
    order = list(sft_speed.WAYS)
    rows.sort(key=lambda r: (r["shape"], r["profile"], order.index(r["way"])))
    return [(row, good.get((row["shape"], row["profile"]), {})) for row in rows]


def speed_section() -> list[str]:
    """Returns the section on ways to group the same rows of an optimiser step."""
    rows = []
    for part, stock in sft_rows():
        row = {name: part[name] for name in ("shape", "profile", "way")}
        if "error" in part:
            rows.append(row | {"layout": "failed: " + part["error"]})
            continue
        layout, times = part["layout"], part["s_step_repeats"]
        row["layout"] = f"{layout['micro_batch']} x {layout['accumulation']}"
        row |= {"s/step": f"{part['s_step']:.3f}"}
        row["least to most"] = f"{min(times):.3f} to {max(times):.3f}"
        row |= {"tokens/s": part["tokens_per_second"], "GiB": part["peak_gb"]}
        row |= {"start, s": part["start_s"]}
        if stock:
            ratios = sft_speed.times_stock(part, stock)
            row["times stock"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratios)
            whole = sft_speed.run_seconds(stock) / sft_speed.run_seconds(part)
            row[f"in {sft_speed.RUN} steps"] = f"{whole:.2f}"
        rows.append(row)
    return [
        "SFT on the same rows, eight an optimiser step (compiled: on average), random",
        "4-bit weights of Llama-3.2's shapes (7b: Llama-2's):",
        f"{read(RESULTS / 'sft_speed.json')['machine']}, by",
        "`python benchmarks/sft_speed.py`. Times stock: of tokens a second [of the",
        "slowest repeat against stock's fastest, and the reverse]; then of a whole run",
        f"of {sft_speed.RUN} steps with layout search, compilation and first step.",
        *("", to_markdown(rows)),
    ]


def speed_table() -> str:
    """Returns README.md's table: tokens a second of chats, by shape and way."""
    rows: dict[str, dict[str, Any]] = {}
    for part, stock in sft_rows():
        if part["profile"] != "chat" or "error" in part or not stock:
            continue
        if part["way"] in ("stock", "ours", "compiled"):
            text = "{:.2f} x [{:.2f}, {:.2f}]".format(
                *sft_speed.times_stock(part, stock)
            )
            value = f"{part['tokens_per_second']:,}"
            value += f" = {text}" if part is not stock else ""
            row = rows.setdefault(part["shape"], {"shape": part["shape"]})
            row[f"{part['way']}, tokens/s"] = value
    return to_markdown([*rows.values()])


def chat_speed() -> list[str]:
    """Returns the section on what answers a chat on a CPU."""
    values, rows = read(RESULTS / "chat_speed.json"), []
    for part in values["rows"]:
        row = {"backend": part["backend"]}
        for name in ("tokens_per_second", "first_token_seconds"):
            row[name.replace("_", " ")] = ", ".join(
                f"{key} {value}" for key, value in part[name].items()
            )
        rows.append(row)
    return [
        f"{values['model']}, {values['device']}, {values['threads']} threads, greedy,",
        f"{values['prompts']} prompts, by `python benchmarks/chat_speed.py`.",
        *("", to_markdown(rows)),
    ]


def page() -> str:
    """Returns results/README.md, made from the JSON files beside it."""
    sections = {path.stem: demo(path) for path in sorted(RESULTS.glob("demo_*.json"))}
    sections["board"] = board_section()
    for name in RATES:
        paths = sorted(RESULTS.glob(f"{name}*.json"))
        sections |= {path.stem: rate(path, name) for path in paths}
    sections["grpo_learning"] = learning(RESULTS / "grpo_learning.json")
    if (path := RESULTS / "gsm8k_proof.json").exists():
        sections["gsm8k_proof"] = proof(path)
    sections["memory"] = memory_section()
    sections |= {"masks": masks.table(), "adapters": adapters.table()}
    if export_parity.TABLE.exists():
        sections["export_parity"] = export_parity.section()
    sections |= {"sft_speed": speed_section(), "chat_speed": chat_speed()}
    if scale.RESULT.exists():
        sections["scale"] = scale.section()
    lines = ["# Measured runs", "", "Made by `python benchmarks/publish.py`."]
    for name, section in sections.items():
        lines += ["", f"## {name}", "", *section]
    return "\n".join(lines) + "\n"


def forgetting(lost: dict[str, Any] | None) -> str:
    """Returns the points lost on a set not trained for [95 %], with McNemar's p."""
    if not lost:
        return "-"
    points = [0 - 100 * lost[name] for name in ("difference", "high", "low")]
    return "{:+.1f} [{:+.1f}, {:+.1f}], p {:.2g}".format(*points, lost["p"])


def proof_rows() -> list[dict[str, Any]]:
    """Returns the board's rows of GSM8K: seed 0 of models that were asked others."""
    path, rows = RESULTS / "gsm8k_proof.json", []
    values = read(path) if path.exists() else {"rows": []}
    bases = {x["model"]: x["ours"] for x in values["rows"] if x["stage"] == "base"}
    asked = [x for x in values["rows"] if "general" in x["trained"]]
    for part in [x for x in asked if x["seed"] == 0]:
        did, model = part["trained"], part["model"]
        row = {"recipe": f"gsm8k_proof, {part['stage']}, seed {part['seed']}"}
        row |= {"model": model, "machine": values["machine"].partition(",")[0]}
        row |= {"minutes": round(did["seconds"] / 60, 1), "date": part["date"]}
        row |= {"gib": did.get("peak_memory_gb"), "general": did["general"]}
        rows.append(row | {"base": bases.get(model), "right": part["ours"]})
    return rows


def board_section() -> list[str]:
    """Returns the section on what recipes cost and gave on people's machines."""
    rows = []
    for row in read(RESULTS / "board.json")["rows"] + proof_rows():
        cells = {name: row[name] for name in ("recipe", "model", "machine", "minutes")}
        cells["GiB"] = f"{row['gib']:.1f}" if row["gib"] else "-"
        for name, rate in (("base", row["base"]), ("right [95 %]", row["right"])):
            cells[name] = percent(rate) if rate else "-"
        rows.append(
            cells | {"forgetting": forgetting(row["general"]), "date": row["date"]}
        )
    return [
        "Minutes and peak memory of training; right answers to held-out rows, before",
        "and after; forgetting: points lost on `data_samples/general.jsonl`, which no",
        "recipe trains for (negative: gained; p: McNemar's exact test, same items).",
        "",
        to_markdown(rows) if rows else "No rows yet.",
        "",
        "To add the row of your machine, a free T4 say, by a pull request:",
        "",
        "    python -m helpers train finetome-llama32-1b",
        "    python -m helpers report finetome-llama32-1b --board",
        "    python benchmarks/publish.py",
        "",
        "The first one trains and evaluates; the others write `results/board.json` and",
        "this page. Commit both, and say in the request what else the machine did.",
    ]


def list_recipes() -> str:
    """Returns docs/recipes.md's table: what recipes reproduce and what they need."""
    board = {(r["recipe"], r["model"]): r for r in read(RESULTS / "board.json")["rows"]}
    rows = []
    for name in recipes.RECIPES:
        config, notes = recipes.load(name, gpu=True), recipes.RECIPES[name]
        row = {"recipe": f"`{name}`", "reproduces": notes["source"]}
        row["stages"] = " + ".join(config.stages).upper()
        row["engine"] = config.engine.replace("auto", "Unsloth")
        peak_gb = estimate_memory(config).sum()
        row |= {"needs": notes["needs"], "GiB on a T4": f"{peak_gb:.1f}"}
        if board:
            part = board.get((name, config.model), {"general": None})
            row["forgetting"] = forgetting(part["general"])
        rows.append(row)
    return to_markdown(rows)


def faults_table() -> str:
    """Returns docs/reliability.md's table: what was planted, and what came of it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    good = {"kills": "survived", "stop_button": "right", "faults": "handled"}
    for row in read(RESULTS / "faults.json")["rows"]:
        table, case = row["table"], row["case"]
        case = "" if table == "bad_inputs" else case.replace("sft/checkpoints/", "")
        name = case.partition("/")[0] if table == "faults" else case
        values = {"planted": table.replace("_", " "), "in": name, "n": 0, "good": 0}
        line = rows.setdefault((table, name), values | {"identical": 0, "asked": 0})
        line["n"] += 1
        bad = row.get("traceback") or row.get("silent")
        line["good"] += not bad if table == "bad_inputs" else row[good[table]]
        if row.get("identical") is not None:
            line["asked"] += 1
            line["identical"] += row["identical"]
    lines = []
    for line in rows.values():
        same = f"{line['identical']} of {line['asked']}" if line["asked"] else "-"
        part = {name: line[name] for name in ("planted", "in")}
        part["survived, right, handled or clear"] = f"{line['good']} of {line['n']}"
        lines.append(part | {"bit-identical result": same})
    return to_markdown(lines)


def replace(path: Path, mark: str, table: str) -> None:
    """Puts a table between the marks in a page."""
    text = path.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark} -->).*(<!-- end of {mark.split()[0]} -->)"
    text, count = re.subn(
        pattern, lambda m: f"{m[1]}\n\n{table}\n\n{m[2]}", text, flags=re.DOTALL
    )
    if not count:
        sys.exit(f"{path} lacks the marks {pattern}")
    write_lines(path, [text])


def main(folder: Path, name: str, command: str, conditions: str) -> None:
    """Writes a run's report without the paths of the machine it was made on."""
    text = (folder / "report.json").read_text(encoding="utf-8")
    text = re.sub(rf'"/[^"]*/(runs/{folder.name})\b', r'"\1', text)
    report = {"command": command, "conditions": conditions, **json.loads(text)}
    write_json(RESULTS / f"{name}.json", report)


if __name__ == "__main__":
    if len(sys.argv) not in (1, 5):
        sys.exit(__doc__)
    if len(sys.argv) == 5:
        main(Path(sys.argv[1]), *sys.argv[2:])
    write_lines(RESULTS / "README.md", [page()])
    replace(ROOT / "docs" / "recipes.md", "recipes", list_recipes())
    demo_table = results_table(read(RESULTS / "demo_cpu.json")).reset_index()
    mark = "table of results/demo_cpu.json"
    replace(ROOT / "README.md", mark, to_markdown(demo_table))
    replace(ROOT / "README.md", "speed of results/sft_speed.json", speed_table())
    mark = "faults of results/faults.json"
    replace(ROOT / "docs" / "reliability.md", mark, faults_table())
