"""Evaluation: what is counted, and what a run with these sets reports."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.evaluation import evaluator as evaluation
from helpers.evaluation import gsm8k as verdicts
from helpers.evaluation import results
from helpers.evaluation import stats as intervals
from helpers.evaluation import text_metrics as metrics
from helpers.models import adapters
from helpers.models import load as models
from helpers.runs import Run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

CHATS = {
    "stages": ["sft"],
    "data__train": ["data_samples/dolly.jsonl"],
    "data__eval": None,
    "data__eval_share": 0.2,
    "data__test_share": 0.2,
    "data__problems": None,
    "data__test": None,
    "data__test_new": None,
    "evaluation__max_new_tokens": 4,
}


def test_a_run_with_held_out_conversations_reports_their_losses(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**CHATS)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")
    assert part["perplexity"] == pytest.approx(math.exp(part["eval_loss"]), rel=1e-3)
    test = part["test_chat"]
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]), rel=1e-3)
    assert "accuracy" not in part


def test_held_out_conversations_are_answered_for_reading(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**CHATS)
    data.prepare(run)
    evaluation.evaluate(run, "base")
    held_out = data.read_rows(run.path / "data" / "test_chat.jsonl")
    items = data.read_rows(run.path / "eval" / "base" / "test_chat.jsonl")
    questions = [data.questions_of(row["messages"])[0] for row in held_out]
    assert [item["question"] for item in items] == questions


def test_a_run_that_holds_nothing_out_says_which_fields_to_set(
    run_factory: Callable[..., Run],
) -> None:
    nothing = {**CHATS, "data__eval_share": None, "data__test_share": None}
    run = run_factory(**nothing, best_by="loss", sft__eval_strategy="no")
    data.prepare(run)
    with pytest.raises(
        data.DataError, match="set data.eval_share or .*, data.eval, or"
    ):
        evaluation.evaluate(run, "base")


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, ["eval", "test", "test_new"]),
        ({"data__test_new": None}, ["eval", "test"]),
        (CHATS, ["eval", "test_chat"]),
    ],
)
def test_what_is_held_out_is_what_the_config_says(
    run_factory: Callable[..., Run], changes: dict[str, Any], sets: list[str]
) -> None:
    assert evaluation.held_out(run_factory(**changes).config) == sets


PROBLEMS = {
    "stages": ["grpo"],
    "data__train": [],
    "data__eval": None,
    "data__test_new": None,
    "best_by": "loss",
    "sft__eval_strategy": "no",
    "evaluation__max_new_tokens": 4,
}


def test_an_item_says_all_that_decided_its_verdicts(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**PROBLEMS, data__test_rows=2)
    data.prepare(run)
    evaluation.evaluate(run, "base")
    problem = data.read_rows(run.path / "data" / "test.jsonl")[0]
    item = data.read_rows(run.path / "eval" / "base" / "test.jsonl")[0]
    assert item["prompt"] == data.ask(problem["question"], run.config.system_prompt)
    assert (item["id"], item["gold"]) == (problem["id"], problem["gold"])
    assert {"output", "extracted", "tokens", "stopped", *verdicts.VERDICTS} <= set(item)
    assert item["seconds"] > 0


def test_drawn_answers_give_pass_at_k_and_maj_at_k(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**PROBLEMS, data__test_rows=2, evaluation__samples=4)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")["test"]["samples"]
    assert part["maj@4"]["n"] == part["pass@4"]["n"] == 2
    drawn = data.read_rows(run.path / "eval" / "base" / "test.samples.jsonl")
    assert len({item["id"] for item in drawn}) == 8
    assert len({item["output"] for item in drawn}) > 4


def test_evaluating_again_answers_nothing_again_unless_the_adapter_changed(
    run_factory: Callable[..., Run], tiny_model_folder: Path, tmp_path: Path
) -> None:
    import torch

    run = run_factory(**PROBLEMS, data__test_rows=2)
    data.prepare(run)
    model, _ = models.load_model(str(tiny_model_folder))
    model = adapters.add_lora(model, {"r": 2, "target_modules": ["q_proj"]})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    path = run.path / "eval" / "mine" / "test.jsonl"

    def made_from() -> list[Any]:
        evaluation.evaluate(run, "mine", tmp_path / "adapter")
        return [(i["made_from"], i["seconds"]) for i in data.read_rows(path)]

    first = made_from()
    assert made_from() == first
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    assert not {key for key, _ in made_from()} & {key for key, _ in first}


def test_held_out_conversations_get_text_metrics(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**CHATS)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")["test_chat"]
    items = data.read_rows(run.path / "eval" / "base" / "test_chat.jsonl")
    assert part["answers"] == len(items)
    assert part["rougeL"] == intervals.mean([item["rougeL"] for item in items])
    assert set(metrics.OF_ITEMS) | {"bleu", "chrf", "loss", "perplexity"} <= set(part)


@pytest.fixture
def labelled(run_factory: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """A run on a prepared classification set with the labels that are passed."""
    from helpers.runs import write_text

    rows = [
        {"prompt": f"Which language has {n} fans?", "completion": "C" + "+" * (n % 3)}
        for n in range(30)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(tmp_path / "labels.jsonl", lines)

    def prepare(labels: list[str] | None) -> Run:
        source = {"data__train": [str(tmp_path / "labels.jsonl")]}
        run = run_factory(**CHATS | source, evaluation__labels=labels)
        data.prepare(run)
        return run

    return prepare


def test_labels_that_the_config_names_are_counted_as_they_are(
    labelled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.inference import generation
    from helpers.inference.generation import Answer

    def answer(model: Any, tokenizer: Any, prompts: list[Any], **_: Any) -> Any:
        # "C" is right for a third; SQuAD's normaliser would take it for all
        if prompts:
            yield {n: Answer(" C\n", 2, True) for n in range(len(prompts))}

    monkeypatch.setattr(generation, "generate_batches", answer)
    run = labelled(["C", "C+", "C++"])
    part = evaluation.evaluate(run, "base")["test_chat"]
    items = data.read_rows(run.path / "eval" / "base" / "test_chat.jsonl")
    right = [item["reference"] == "C" for item in items]
    assert [item["correct"] for item in items] == right
    assert 0 < sum(right) < len(right)
    assert part["labels"]["accuracy"] == intervals.proportion(sum(right), len(right))
    assert part["labels"]["classes"]["C"]["recall"] == 1.0
    assert part["loss"] > 0
    assert "rougeL" not in part and "bleu" not in part
    (row,) = results.labels_table(run.report()).rows
    assert row[:2] == ["base", "test_chat"] and row[4] == "0"
    evaluation.evaluate(run, "mine")
    compared = evaluation.compare(run, "base", "mine")["test_chat"]
    assert list(compared) == ["correct"] and compared["correct"]["difference"] == 0
    other = labelled(None)
    evaluation.evaluate(other, "mine")
    with pytest.raises(data.DataError, match="under other evaluation.labels: evaluate"):
        evaluation.compare(other, "base", "mine")


def test_a_set_is_no_classification_unless_the_config_says_so(
    labelled: Callable[..., Run],
) -> None:
    part = evaluation.evaluate(labelled(None), "base")["test_chat"]
    assert "labels" not in part and "rougeL" in part


def test_a_right_answer_that_is_no_label_is_refused_before_the_model_is_loaded(
    labelled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", None)
    reason = r"of \d right answers of test_chat are not among .*'C\+.*' \(row .*add the"
    with pytest.raises(data.DataError, match=reason):
        evaluation.evaluate(labelled(["C", "c+"]), "base")


def test_labels_without_conversations_to_answer_are_refused(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**PROBLEMS, data__test_rows=1, evaluation__labels=["a", "b"])
    data.prepare(run)
    with pytest.raises(data.DataError, match="no held-out conversations are answered"):
        evaluation.evaluate(run, "base")


@pytest.mark.parametrize("labels", [[], [""], ["a", " "], ["a", "a "]])
def test_labels_that_name_no_classes_are_refused(
    run_factory: Callable[..., Run], labels: list[str]
) -> None:
    with pytest.raises(ConfigError, match="evaluation.labels: one or more different"):
        run_factory(**CHATS, evaluation__labels=labels)


def test_what_judges_said_is_kept_until_the_model_changes(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**PROBLEMS, data__test_rows=1)
    data.prepare(run)
    run.write_part("eval", {"base": {"mt_bench": 5.0}})
    evaluation.evaluate(run, "base")
    assert run.report()["eval"]["base"]["mt_bench"] == 5.0
    other = run_factory(**PROBLEMS, data__test_rows=1, template="instruction")
    evaluation.evaluate(other, "base")
    assert "mt_bench" not in run.report()["eval"]["base"]


def write_items(run: Run, label: str, right: list[bool], name: str = "test") -> None:
    """Writes items of an evaluated model."""
    rows = [
        {"id": n, "question": f"{n}?", **dict.fromkeys(verdicts.VERDICTS, verdict)}
        for n, verdict in enumerate(right)
    ]
    data.write_rows(run.path / "eval" / label / f"{name}.jsonl", rows)


def test_two_models_are_compared_on_the_same_items(run: Run) -> None:
    write_items(run, "base", [False, False, True, False])
    write_items(run, "sft", [True, True, True, False])
    found = evaluation.compare(run, "base", "sft")["test"]
    assert found["correct"]["difference"] == 0.5
    assert (found["correct"]["only_second"], found["correct"]["only_first"]) == (2, 0)
    assert found["gain"]["reasoning"] == 2
    assert run.report()["comparisons"]["base -> sft"]["test"] == found


def test_conversations_are_compared_by_each_text_metric(run: Run) -> None:
    for label, value in (("base", 0.2), ("sft", 0.5)):
        scores = dict.fromkeys(metrics.OF_ITEMS, value)
        rows = [{"id": n, "question": f"{n}?", **scores} for n in range(3)]
        data.write_rows(run.path / "eval" / label / "test_chat.jsonl", rows)
    found = evaluation.compare(run, "base", "sft")["test_chat"]["rougeL"]
    assert (found["mean"], found["n"]) == (0.3, 3)


def test_models_that_answered_other_questions_are_not_compared(run: Run) -> None:
    write_items(run, "base", [True, False])
    write_items(run, "sft", [True])
    with pytest.raises(data.DataError, match="other questions of test: .*again"):
        evaluation.compare(run, "base", "sft")


def test_a_protocol_without_lm_eval_says_how_to_get_it(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.evaluation import protocols

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pip install lm-eval==.*protocol='ours'"):
        protocols.make_task("gsm8k", [], [])


def test_a_protocol_with_shots_wants_problems_to_show(
    run_factory: Callable[..., Run], tokenizer: Any
) -> None:
    from helpers.evaluation import protocols

    chats = run_factory(**CHATS, evaluation__protocol="gsm8k")
    with pytest.raises(ConfigError, match="solved examples of data.problems"):
        protocols.ask(chats, tokenizer, [])


def test_a_run_is_evaluated_under_the_five_shot_protocol(
    run_factory: Callable[..., Run],
) -> None:
    pytest.importorskip("lm_eval")
    changes = {"data__test_rows": 2, "evaluation__protocol": "gsm8k"}
    run = run_factory(**PROBLEMS, **changes)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")
    assert part["protocol"] == "gsm8k"
    problem = data.read_rows(run.path / "data" / "test.jsonl")[0]
    prompt = data.read_rows(run.path / "eval" / "base" / "test.jsonl")[0]["prompt"]
    assert prompt.endswith(f"Question: {problem['question']}\nAnswer:")
    assert prompt.count("Question:") == 6
    assert prompt.count("####") == 5


def test_the_chat_protocol_has_a_turn_for_each_of_its_shots(
    run_factory: Callable[..., Run], tokenizer: Any
) -> None:
    pytest.importorskip("lm_eval")
    from helpers.evaluation import protocols

    run = run_factory(**PROBLEMS, evaluation__protocol="gsm8k_cot_llama")
    asked = protocols.ask(run, tokenizer, [{"question": "1 + 1?", "answer": "#### 2"}])
    assert asked.prompts[0].count("<|im_start|>user") == 9
    assert asked.prompts[0].endswith("<|im_start|>assistant\n")
    assert "Q:" in asked.until


def test_lm_eval_itself_finds_the_same_outputs_and_accuracy(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    import gsm8k_agreement

    model, tokenizer = models.load_model(str(tiny_model_folder))
    rows = data.load_rows("data_samples/word_problems/test.jsonl", 3)
    shots = "data_samples/word_problems/train.jsonl"
    found = gsm8k_agreement.end_to_end(
        "gsm8k", model, tokenizer, data.to_problems(rows), shots, 8
    )
    assert found["same_prompts"] == found["same_outputs"] == found["n"] == 3
