"""Tests of benchmarks/gsm8k_proof.py: all its stages, on a tiny model and a CPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gsm8k_proof, gsm8k_variants, publish
from helpers.files import read_rows, write_rows

PROBLEMS = Path(__file__).parent.parent / "data_samples" / "word_problems"
SIZES = """lora__r=4 sft__num_train_epochs=1 sft__per_device_train_batch_size=4
    sft__warmup_steps=1 evaluation__max_new_tokens=8
    grpo__per_device_train_batch_size=4 grpo__num_generations=2 grpo_held_out=2
    grpo__gradient_accumulation_steps=1 grpo__max_completion_length=8""".split()


@pytest.fixture(scope="module")
def command(tiny_model_folder, tmp_path_factory):
    """The command line of all stages, in a folder of its own."""
    folder = tmp_path_factory.mktemp("proof")
    noted = {"question": "7 pens, 8 caps: how many?", "answer": "<<7+8=15>>15\n#### 15"}
    for name, rows in (("train", [noted]), ("test", [])):
        count = 24 if rows else 4
        rows += read_rows(PROBLEMS / f"{name}.jsonl")[: count - len(rows)]
        write_rows(folder / name, rows)
    sizes = "--budget 3000 --held-out 4 --variants 1 --probe 6 --minutes 0.05".split()
    sizes += ["--for-grpo", "8", "--sft-minutes", "0.05"]
    places = ["--runs", str(folder / "runs"), "--out", str(folder / "out")]
    options = ["--model", str(tiny_model_folder), *sizes, *places, "--set", *SIZES]
    program = "benchmarks/gsm8k_proof.py"
    return [program, str(folder / "train"), str(folder / "test"), *options]


def test_all_stages_are_trained_compared_and_not_repeated(command, run_python):
    run_python(*command)
    out = Path(command[command.index("--out") + 1]) / "gsm8k_proof.json"
    report = json.loads(out.read_text())
    rows = {row["stage"]: row for row in report["rows"]}
    assert report["machine"] and set(rows) == set(gsm8k_proof.STAGES)
    for stage, row in rows.items():
        assert row["ours"]["n"] == row["strict"]["n"] == len(row["right"]) == 4
        assert row["seconds"] > 0 and ("p_vs_base" in row) == (stage != "base")
        assert ("p_vs_sft" in row) == (stage not in ("base", "sft"))
        assert (row["trained"].get("steps", 0) > 0) == (stage != "base")
    for stage in ("sft", "control"):
        assert "minutes of grpo_minutes" in rows[stage]["trained"]["stopped"]
        assert rows[stage]["trained"]["passes_left_out"] == 0
    assert rows["grpo"]["trained"]["solved_at_times"] == [0, 6]
    for stage in ("sft", "grpo", "control"):
        assert rows[stage]["trained"]["general"]["n"] == 200
    assert [part["stage"] for part in report["pooled"]] == ["grpo", "control"]
    assert rows["grpo"]["settings"]["num_generations"] == 2
    lines = publish.proof(out)
    assert lines[0].startswith("Real GSM8K's first 4 test") and len(lines) == 11
    assert lines[7].count("| control ") == 1 and "forgetting" in lines[7]
    assert "control against SFT, seeds 0 together: " in lines[-1]
    again = run_python(*command)
    assert again.stdout == "" and json.loads(out.read_text()) == report


def test_a_stage_that_does_not_fit_into_the_budget_is_left_out(
    command, run_python, tmp_path
):
    more = ["--budget", "50", "--runs", str(tmp_path), "--out", str(tmp_path)]
    done = run_python(*command[:3], "--model", command[4], *more)
    assert "base: no time is left for it" in done.stdout
    assert json.loads((tmp_path / "gsm8k_proof.json").read_text())["rows"] == []


def test_a_base_model_is_judged_up_to_its_next_question():
    row = {"question": "1 + 1?", "gold": "2", "answer": "#### 2"}
    text = "1 + 1 = 2\n#### 2\n\nQuestion: 3 + 4?\nAnswer: 7\n#### 7"
    verdicts = gsm8k_proof.judge_continued(text, row)
    assert verdicts["correct"] and verdicts["flexible_extract"]


def test_forgetting_is_judged_by_the_first_line_of_an_answer(tmp_path):
    texts = ["Earth\nWhat is", "12 season", "2*10=20", " 12"]
    pairs = zip(texts, ["Earth", "12", "Earth", "12"], strict=True)
    items = [{"output": text, "reference": right} for text, right in pairs]
    write_rows(tmp_path / "general.jsonl", items)
    marks = gsm8k_proof.mark_general(tmp_path / "general.jsonl")
    assert marks == "1001"
    lost = gsm8k_proof.compare(marks[:2], marks[2:])
    assert (lost["n"], lost["only_first"], lost["only_second"]) == (2, 1, 1)


def test_a_stage_that_fails_is_told_and_others_go_on(command, run_python, tmp_path):
    more = ["--runs", str(tmp_path), "--out", str(tmp_path), "--stages", "base", "sft"]
    # a step that is not finite
    wild = ["--set", *SIZES, "sft__learning_rate=1e30", "sft__max_grad_norm=0"]
    done = run_python(*command[: command.index("--set")], *more, *wild)
    assert "0-sft: step" in done.stdout and "not finite" in done.stdout
    report = json.loads((tmp_path / "gsm8k_proof.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["base"]
    (failed,) = report["failed"]
    assert failed["stage"] == "sft" and "not finite" in failed["error"]
    assert "not finite" in publish.proof(tmp_path / "gsm8k_proof.json")[-1]


def test_a_pass_that_is_not_finite_counts_nothing():
    layer, callback = torch.nn.Linear(2, 1), gsm8k_proof.FinitePasses()
    arguments = SimpleNamespace(fp16=False)
    callback.on_train_begin(arguments, None, None, model=layer)
    layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    layer(torch.tensor([[float("nan"), 2.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 4.0]]
    assert callback.report([]) == {"passes_left_out": 1}


def test_stages_are_compared_over_their_seeds_together():
    rights = {("sft", 0): "0011", ("sft", 1): "0100", ("grpo", 0): "0111"}
    rights |= {("grpo", 1): "1111", ("base", 0): "0000", ("control", 2): "1111"}
    rows = [
        {"model": "m", "stage": s, "seed": n, "right": r}
        for (s, n), r in rights.items()
    ]
    (pooled,) = gsm8k_proof.pool(rows)
    assert pooled["stage"] == "grpo" and pooled["seeds"] == [0, 1]
    assert pooled["difference"] == 0.5 and pooled["only_second"] == 4
    assert pooled["p"] == 0.125


def test_grpo_can_have_problems_that_sft_does_not_see(tmp_path):
    text = "{n} pens, {m} caps: how many?"
    answer = "So <<{n}+{m}={sum}>>{sum}.\n#### {sum}"
    rows = []
    for n in range(13, 19):
        numbers = {"n": n, "m": 2 * n, "sum": 3 * n}
        rows.append({"question": text.format(**numbers)})
        rows[-1]["answer"] = answer.format(**numbers)
    rows[1]["answer"] = "So <<14+28=42>>42, less 1.\n#### 41"  # nothing explains it
    write_rows(tmp_path / "train", rows)
    options = {"held_out": 1, "for_grpo": 2, "variants": 2, "equations": True}
    given = SimpleNamespace(
        train=tmp_path / "train", runs=tmp_path, name="x", **options
    )
    gsm8k_proof.write_parts(given)
    names = ("train", "problems", "control", "eval")
    parts = [read_rows(tmp_path / f"x-{name}.jsonl") for name in names]
    assert [len(part) for part in parts] == [6, 6, 12, 1]  # each with two variants
    assert parts[2] == parts[0] + parts[1]
    assert parts[0][0]["answer"] == "13+26=39\n#### 39"
    own = [{row["question"] for row in part} for part in parts]
    assert not own[0] & own[1] and not own[3] & own[2]
    options |= {"for_grpo": 0, "equations": False}
    given = SimpleNamespace(
        train=tmp_path / "train", runs=tmp_path, name="y", **options
    )
    gsm8k_proof.write_parts(given)
    parts = [read_rows(tmp_path / f"y-{name}.jsonl") for name in names]
    assert parts[0] == parts[1] == parts[2] and len(parts[0]) == 13
    assert parts[0][:5] == rows[:5] and parts[3] == rows[5:]


def test_equations_alone_are_answers():
    rows = [{"question": "7 pens, 8 caps?", "answer": "So <<7+8=15>>15.\n#### 15"}]
    rows += [{"question": "Left?", "answer": "<<7+8=15>>15, less 1\n#### 14"}]
    lines = [json.dumps(row) + "\n" for row in rows]
    (line,) = gsm8k_variants.equations_alone(lines)
    assert json.loads(line)["answer"] == "<<7+8=15>>\n#### 15"
