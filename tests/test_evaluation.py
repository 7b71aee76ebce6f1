"""Evaluation: what is counted, and what a run with these sets reports."""

import logging
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from rows import turns, write

from benchmarks import publish
from helpers import __main__ as command_line
from helpers import evaluation, files, recipes, runtime, stages
from helpers.config import SETS
from helpers.data import preparation as data
from helpers.data.formats import ask
from helpers.errors import DataError, MissingInput
from helpers.evaluation import evaluator, metrics
from helpers.evaluation.evaluator import evaluate
from helpers.inference.generation import Answer
from helpers.masking.dataset import mask_conversations
from helpers.models import load as models
from helpers.models.adapters import add_lora
from helpers.runs import Run

NOTHING = dict.fromkeys(f"data__{name}" for name in SETS)
CHATS = NOTHING | {
    "stages": ["sft"],
    "data__train": ["data_samples/dolly.jsonl"],
    "data__eval_share": 0.2,
    "data__test_share": 0.2,
    "evaluation__max_new_tokens": 4,
}
PROBLEMS = {
    "stages": ["grpo"],
    "data__train": [],
    "data__eval": None,
    "data__test_new": None,
    "data__general": None,
    "data__test_rows": 2,
    "best_by": "loss",
    "sft__eval_strategy": "no",
    "evaluation__max_new_tokens": 4,
}
Prepare = Callable[..., Run]


@pytest.fixture
def prepared(run_factory):
    """Makes a run with its data."""

    def make(changes, **more):
        run = run_factory(**changes | more)
        data.prepare(run)
        return run

    return make


def read_items(run, label, name):
    return files.read_rows(run.path / "eval" / label / f"{name}.jsonl")


def test_held_out_conversations_get_losses_and_text_metrics(prepared):
    run = prepared(CHATS)
    part = evaluate(run, "base")
    test, items = part["test_chat"], read_items(run, "base", "test_chat")
    assert part["perplexity"] == pytest.approx(math.exp(part["eval_loss"]), rel=1e-3)
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]), rel=1e-3)
    assert "test" not in part and "eval_text" not in part
    held_out = files.read_rows(run.path / "data" / "test_chat.jsonl")
    questions = [row["messages"][0]["content"] for row in held_out]
    assert [item["question"] for item in items] == questions
    assert test["answers"] == len(items)
    assert test["rougeL"] == metrics.mean([item["rougeL"] for item in items])
    assert {*metrics.OF_ITEMS, "bleu", "chrf", "stop_rate"} <= set(test)
    assert run.report()["eval"]["base"] == part


def test_response_losses_are_of_the_supervised_tokens(tiny_model_folder):
    import torch

    model, tokenizer = models.load_model(str(tiny_model_folder))
    # they begin alike; the second's answer as well
    chats = [turns("Is it?", "Yes. " * n) for n in (1, 7)]
    rows = mask_conversations(tokenizer, chats).rows
    expected = []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        learnt = each[labels != -100]
        expected.append((learnt.sum().item(), len(learnt)))
    assert expected[0][1] < expected[1][1]
    losses = evaluator.response_losses(model, rows)
    assert np.array(losses) == pytest.approx(np.array(expected), abs=1e-4)


def test_what_is_left_out_of_a_loss_is_named(prepared, tmp_path, caplog):
    caplog.set_level(logging.INFO, "helpers")
    rows = [{"prompt": f"{n}? " * 9, "completion": "y"} for n in range(20)]
    rows += [{"prompt": "long? " * 200, "completion": "y"}]
    write(tmp_path / "eval.jsonl", rows)
    sets = {"data__eval": str(tmp_path / "eval.jsonl"), "data__eval_share": None}
    evaluate(prepared(CHATS | sets, max_length=128, data__eval_rows=None), "base")
    assert "the loss of eval: 1 of 21 conversations are left out: row 21" in caplog.text


def test_an_item_says_all_that_decided_its_verdicts(prepared):
    run = prepared(PROBLEMS)
    judgment = {"score": 5.0, "judge": "local"}
    run.write_part("eval", {"base": {"mt_bench": judgment}})
    part = evaluate(run, "base")
    problem = files.read_rows(run.path / "data" / "test.jsonl")[0]
    items = read_items(run, "base", "test")
    item = items[0]
    assert item["prompt"] == ask(problem["question"], run.config.system_prompt)
    assert (item["id"], item["gold"]) == (problem["id"], problem["gold"])
    assert {"output", "extracted", "tokens", "stopped", *metrics.VERDICTS} <= set(item)
    assert item["seconds"] > 0
    rate = metrics.proportion(sum(i["correct"] for i in items), 2)
    assert part["test"]["correct"] == rate
    assert part["test"]["truncated"] == sum(not i["stopped"] for i in items)
    assert part["test"]["tokens"] == sum(i["tokens"] for i in items)
    # a judgment stays until the model changes, a figure until its set does
    assert run.report()["eval"]["base"]["mt_bench"] == judgment
    evaluate(prepared(CHATS, sft__eval_strategy="no"), "base")
    kept = run.report()["eval"]["base"]
    assert kept["mt_bench"] == judgment and "test" not in kept
    evaluate(prepared(PROBLEMS, template="instruction"), "base")
    assert "mt_bench" not in run.report()["eval"]["base"]


def test_evaluating_again_answers_nothing_again_unless_the_adapter_changed(
    prepared, tiny_model_folder, tmp_path
):
    import torch

    run = prepared(PROBLEMS)
    model, _ = models.load_model(str(tiny_model_folder))
    model = add_lora(model, {"r": 2, "target_modules": ["q_proj"]})

    def answer(seed):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                draw = torch.manual_seed(seed)
                torch.nn.init.normal_(parameter, generator=draw)
        model.save_pretrained(tmp_path / "adapter")
        evaluate(run, "mine", tmp_path / "adapter")
        items = read_items(run, "mine", "test")
        return [(item["made_from"], item["seconds"]) for item in items]

    first = answer(0)
    assert answer(0) == first
    assert not {key for key, _ in answer(1)} & {key for key, _ in first}


def test_the_models_of_a_run_are_evaluated_in_order(run, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluator, "evaluate", lambda *call: calls.append(call[1:]))
    with pytest.raises(MissingInput, match="run the sft notebook first"):
        evaluation.evaluate_run(run)
    assert calls == []
    adapters = {stage: run.path / stage / "adapter" for stage in ("sft", "grpo")}
    for adapter in adapters.values():
        adapter.mkdir(parents=True)
    assert len(evaluation.evaluate_run(run)) == 0  # nothing was measured here
    evaluation.evaluate_run(run, ["grpo"])
    assert calls == [("base", None), *adapters.items(), ("grpo", adapters["grpo"])]


@pytest.fixture
def labelled(prepared, tmp_path):
    """Prepares a run on a classification set with the labels that are passed."""
    rows = [
        {"prompt": f"Which language has {n} fans?", "completion": "C" + "+" * (n % 3)}
        for n in range(30)
    ]
    source = [write(tmp_path / "labels.jsonl", rows)]
    return lambda labels: prepared(CHATS, data__train=source, evaluation__labels=labels)


def test_labels_that_the_config_names_are_counted_as_they_are(labelled, monkeypatch):
    def answer(model, tokenizer, prompts, **_):
        # "C" is right for a third; SQuAD's normaliser would take it for all
        if prompts:
            yield {n: Answer(" C\n", 2, True) for n in range(len(prompts))}

    monkeypatch.setattr(evaluator, "generate_batches", answer)
    run = labelled(["C", "C+", "C++"])
    part = evaluate(run, "base")["test_chat"]
    items = read_items(run, "base", "test_chat")
    right = [item["reference"] == "C" for item in items]
    assert [item["correct"] for item in items] == right
    assert 0 < sum(right) < len(right)
    assert part["correct"] == metrics.proportion(sum(right), len(right))
    assert part["loss"] > 0 and "rougeL" not in part
    evaluate(run, "mine")
    compared = evaluation.compare(run, "base", "mine")["test_chat"]
    assert {key: row["difference"] for key, row in compared.items()} == {"correct": 0}
    other = labelled(None)
    part = evaluate(other, "mine")["test_chat"]
    assert "macro_f1" not in part and "rougeL" in part
    with pytest.raises(DataError, match="or other evaluation.labels: evaluate both"):
        evaluation.compare(other, "base", "mine")


def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded(
    labelled, prepared, monkeypatch
):
    monkeypatch.setattr(models, "load_model", None)
    with pytest.raises(DataError, match=r"'C\+.*' is not among evaluation.labels"):
        evaluate(labelled(["C", "c+"]), "base")
    with pytest.raises(DataError, match="is not among evaluation.labels"):
        stages.ensure_ready(labelled(["C", "c+"]), "sft")
    problems = {k: v for k, v in PROBLEMS.items() if k != "data__eval"}
    with pytest.raises(DataError, match="or none for evaluation.labels: set"):
        evaluate(prepared(problems, evaluation__labels=["a", "b"]), "base")
    nothing = {"data__test_share": None, "best_by": "loss", "sft__eval_strategy": "no"}
    with pytest.raises(DataError, match="no held-out rows.*: set data.eval_share"):
        evaluate(prepared(CHATS, data__eval_share=None, **nothing), "base")


def test_a_set_that_is_not_trained_for_says_what_was_forgotten(
    prepared, tmp_path, monkeypatch
):
    rows = [
        {"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"}
        for n in range(8)
    ]
    rows = [row | {"history": [["Is 100 even?", "yes"]]} for row in rows]
    source, limits = write(tmp_path / "general.jsonl", rows), []

    def answer(model, tokenizer, prompts, max_new_tokens, **_):
        limits.append(max_new_tokens)
        if prompts:
            yield {n: Answer(" Yes.", 2, True) for n in range(len(prompts))}

    run = prepared(CHATS, data__general=source, data__general_rows=8)
    before = evaluate(run, "base")
    items = read_items(run, "base", "general")
    assert [len(item["prompt"]) for item in items] == [3] * 8  # after the example
    assert [item["question"] for item in items] == [row["question"] for row in rows]
    assert [item["reference"] for item in items] == [row["answer"] for row in rows]
    losses = [item["loss"] for item in items]
    assert before["general"]["loss"] == metrics.mean(losses) and min(losses) > 0
    assert before["general"]["exact_match"]["k"] == 0  # a random model's
    monkeypatch.setattr(evaluator, "generate_batches", answer)
    after = evaluate(run, "mine")
    assert limits[-1] == run.config.evaluation.general_tokens != limits[0]
    assert after["general"]["exact_match"] == metrics.proportion(4, 8)
    lost = evaluation.compare(run, "base", "mine")["general"]
    assert (lost["exact_match"]["difference"], lost["exact_match"]["p"]) == (0.5, 0.125)
    assert lost["loss"]["difference"] == lost["loss"]["high"] == 0
    table = evaluation.results_table(run.report())
    assert table.loc["mine", "general: right [95 %]"].startswith("4/8 = 50.0 % [")
    assert "general" in evaluation.scores_table(run.report()).loc["mine"].index


def test_a_set_not_trained_for_takes_no_labels_and_is_no_test(labelled, prepared):
    run = labelled(["C", "C+", "C++"])
    general = {"data__general": "data_samples/general.jsonl", "data__general_rows": 2}
    changes = CHATS | {"data__train": run.config.data.train} | general
    run = prepared(changes, evaluation__labels=["C", "C+", "C++"])
    part = evaluate(run, "base")
    assert "correct" in part["test_chat"] and "correct" not in part["general"]
    problems = PROBLEMS | general
    with pytest.raises(DataError, match="or none for evaluation.labels: set"):
        evaluate(prepared(problems, evaluation__labels=["a", "b"]), "base")
    run = prepared(CHATS | general, data__test_share=None)
    assert {"eval_text", "general"} <= evaluate(run, "base").keys()  # as without it


def write_items(run, label, name, rows):
    """Writes the items of an evaluated model, with ids and questions."""
    items = [{"id": n, "question": f"{n}?", **row} for n, row in enumerate(rows)]
    files.write_rows(run.path / "eval" / label / f"{name}.jsonl", items)


def test_two_models_are_compared_on_the_same_items(run):
    for label, verdicts in (("base", (0, 0, 1, 0)), ("sft", (1, 1, 1, 0))):
        items = [dict.fromkeys(metrics.VERDICTS, bool(verdict)) for verdict in verdicts]
        write_items(run, label, "test", items)
    for label, value in (("base", 0.2), ("sft", 0.5)):
        scores = [dict.fromkeys(metrics.OF_ITEMS, value)] * 3
        write_items(run, label, "eval", scores)
        write_items(run, label, "test_chat", scores)  # of a former config
    sets = evaluation.compare(run, "base", "sft")
    assert {*sets} == {"test", "eval"}
    assert sets["test"]["correct"]["difference"] == 0.5
    assert sets["test"]["by reasoning"] == {"only_first": 0, "only_second": 2}
    rouge = sets["eval"]["rougeL"]
    assert (rouge["difference"], rouge["n"]) == (0.3, 3)
    assert run.report()["comparisons"] == {"base -> sft": sets}
    write_items(run, "sft", "test", items[:1])
    with pytest.raises(DataError, match="answered test with other data .*again"):
        evaluation.compare(run, "base", "sft")


@pytest.fixture
def measured(run_factory):
    """A run that is trained and evaluated, as its report says."""
    run = run_factory(recipe="demo", model=recipes.load("demo").model)
    run.write_part("environment", {"device": "cuda: Tesla T4"})
    for stage, seconds in (("sft", 90.0), ("grpo", 150.0)):
        run.write_part(stage, {"seconds": seconds, "peak_memory_gb": seconds / 50})
    parts = {"base": metrics.proportion(1, 8), "grpo": metrics.proportion(6, 8)}
    run.write_part(
        "eval", {label: {"test": {"correct": k}} for label, k in parts.items()}
    )
    for label, right in (("base", [True] * 7 + [False]), ("grpo", [False] * 8)):
        write_items(run, label, "general", [{"exact_match": k} for k in right])
    return run


def test_the_board_has_one_row_a_recipe_model_and_machine(
    measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runtime, "HOME", tmp_path)
    monkeypatch.setattr(runtime, "start", lambda engine: None)
    command_line.main(["report", "test"])
    assert not (tmp_path / "results").exists()
    assert "1/8 = 12.5 %" in capsys.readouterr().out
    command_line.main(["report", "test", "--board"])
    measured.write_part("environment", {"device": "cpu: 2 cores"})
    for _ in range(2):
        command_line.main(["report", "test", "--board"])
    cpu, gpu = files.read_json(tmp_path / "results" / "board.json")["rows"]
    assert (cpu["machine"], gpu["machine"]) == ("cpu: 2 cores", "cuda: Tesla T4")
    assert (gpu["recipe"], gpu["minutes"], gpu["gib"]) == ("demo", 4.0, 3.0)
    assert (gpu["base"]["k"], gpu["right"]["k"], gpu["general"]["n"]) == (1, 6, 8)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    *_, low, high = re.findall(
        r"[-+][\d.]+", text := publish.forgetting(gpu["general"])
    )
    assert text == f"+87.5 [{low}, {high}], p 0.016" and "-" not in text
    (line,) = (
        x for x in "\n".join(publish.board_section()).splitlines() if "T4 |" in x
    )
    for cell in ("demo", "4.0", "3.0", "6/8 = 75.0 % [40.9, 92.8]", text, gpu["date"]):
        assert f"| {cell} |" in line
    first, *others = publish.list_recipes().splitlines()[2:]
    assert first.endswith(f"| {text} |") and all(x.endswith("| - |") for x in others)


def test_a_run_that_was_not_evaluated_gets_no_row(run):
    with pytest.raises(MissingInput, match="'test' has no trained stage, or base and"):
        evaluator.report(run, board=True)
