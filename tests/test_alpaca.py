"""AlpacaEval: outputs as its package reads them, and win rates that it counts itself.

Tests marked `network` let uv make the package's environment, from its cache if it was
made before; the judge is a server on this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import DataError, JudgeError
from helpers.llm_judge import alpaca_eval as alpaca
from helpers.llm_judge.judge import Judge
from helpers.runs import Run
from tests.judge_server import JudgeServer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_eval"
INSTRUCTIONS = ["Name a color.", "Sort 3, 1, 2.", "Was ist das?", "Say nothing."]


def outputs(generator: str, texts: list[str] = INSTRUCTIONS) -> list[dict[str, str]]:
    return [
        {
            "dataset": "ours",
            "instruction": text,
            "output": f"{generator} on {text}",
            "generator": generator,
        }
        for text in texts
    ]


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write(tmp_path / "reference.json", outputs("peer"))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(lambda request: "m") as running:
        yield running


def answer(run: Run, reference: Path, **changes: Any) -> list[dict[str, str]]:
    settings = {"label": "base", "adapter": None, "max_new_tokens": 3, **changes}
    rows = alpaca.read_outputs(reference)
    path = alpaca.answer(run, reference=rows, **settings)
    return json.loads(path.read_text(encoding="utf-8"))


def test_outputs_have_the_keys_and_the_order_of_the_reference(run: Run, reference):
    rows = answer(run, reference)
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    for row in rows:
        assert list(row) == ["dataset", "instruction", "output", "generator"]
        assert (row["dataset"], row["generator"]) == ("ours", "test-base")
        assert isinstance(row["output"], str)


def test_outputs_have_the_form_of_published_ones(run: Run, reference):
    published = SHARED / "text_davinci_003.json"
    if not published.exists():
        pytest.skip("no published outputs here")
    theirs = alpaca.read_outputs(published)
    assert len(theirs) == alpaca.WHOLE
    ours = answer(run, reference)
    assert {frozenset(row) for row in theirs} == {frozenset(row) for row in ours}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instructions that a model has answered, in all calls so far."""
    batches, seen = alpaca.generate_batches, []

    def spy(model: Any, tokenizer: Any, prompts: list[Any], **options: Any) -> Any:
        for batch in batches(model, tokenizer, prompts, **options):
            seen.extend(prompts[place][-1]["content"] for place in sorted(batch))
            yield batch

    monkeypatch.setattr(alpaca, "generate_batches", spy)
    return seen


def test_a_repeated_call_answers_nothing(run: Run, reference, answered):
    rows = answer(run, reference)
    assert answer(run, reference) == rows
    assert answered == INSTRUCTIONS


@pytest.mark.parametrize("change", [{"max_new_tokens": 2}, {"label": "sft"}])
def test_other_settings_and_models_answer_anew(run, reference, answered, change):
    answer(run, reference)
    answer(run, reference, **change)
    assert answered == INSTRUCTIONS * 2


def test_a_killed_run_goes_on_with_what_is_missing(
    run_factory: Callable[..., Run], reference, answered, monkeypatch
):
    run = run_factory(evaluation__batch_size=3)
    spy = alpaca.generate_batches

    def killed(*arguments: Any, **options: Any) -> Any:
        yield next(spy(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(alpaca, "generate_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(run, reference)
    assert len(answered) == 3
    monkeypatch.setattr(alpaca, "generate_batches", spy)
    answer(run, reference)
    assert sorted(answered) == sorted(INSTRUCTIONS)


def test_fewer_instructions_leave_the_answers_to_more_alone(run, reference, answered):
    rows = alpaca.read_outputs(reference)
    alpaca.answer(run, "base", None, rows, max_new_tokens=3)
    alpaca.answer(run, "base", None, rows[:1], max_new_tokens=3)
    alpaca.answer(run, "base", None, rows, max_new_tokens=3)
    assert len(answered) == 5


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "holds no list of outputs"),
        ({"instruction": "a"}, "holds no list of outputs"),
        (
            [{"instruction": "a", "output": "b"}, {"output": "b"}],
            "row 2 .*'instruction'",
        ),
        ([{"instruction": "a", "output": None}], "row 1 .* lacks 'output', a text"),
        (["a"], "row 1 of .* lacks 'instruction'"),
    ],
)
def test_a_bad_reference_is_refused_by_row_and_reason(tmp_path, values, reason):
    with pytest.raises(DataError, match=reason):
        alpaca.read_outputs(write(tmp_path / "bad.json", values))


def test_a_reference_that_is_no_json_is_refused(tmp_path: Path):
    (tmp_path / "bad.json").write_text("[", encoding="utf-8")
    with pytest.raises(DataError, match="is no JSON"):
        alpaca.read_outputs(tmp_path / "bad.json")


def test_a_missing_reference_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no file .*none.json"):
        alpaca.find_outputs(tmp_path / "none.json")


def test_a_hub_out_of_reach_is_said_with_what_to_do():
    with pytest.raises(DataError, match="cannot be had .* give a copy.*--reference"):
        alpaca.find_outputs(None)


def test_without_uv_it_says_what_to_install(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(alpaca.shutil, "which", lambda name, path=None: None)
    with pytest.raises(JudgeError, match="pip install uv"):
        alpaca.annotate(reference, reference, Judge("local", tmp_path))


def test_without_a_judge_the_command_stops_after_the_outputs(
    run: Run, reference, capsys, monkeypatch
):
    for name in ("OPENAI_BASE_URL", "TUNEBOOK_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    options = ["--models", "base", "--reference", str(reference), "--limit", "2"]
    alpaca.main([run.config.name, *options, "--max-new-tokens", "3"])
    assert "nothing is judged: name a judge" in capsys.readouterr().out
    path = run.path / "eval" / "base" / "alpaca_eval_2" / "model_outputs.json"
    rows = alpaca.read_outputs(path)
    assert [row["instruction"] for row in rows] == INSTRUCTIONS[::2]


def annotate(*arguments: Any, **options: Any) -> dict[str, Any]:
    """`alpaca.annotate`; skips where uv cannot fetch the package."""
    try:
        return alpaca.annotate(*arguments, **options)
    except JudgeError as error:
        log = re.search(r"more in (.+?)\)", str(error))
        said = Path(log[1]).read_text(encoding="utf-8") if log else ""
        if re.search(
            "error sending request|Failed to fetch|network was disabled", said
        ):
            pytest.skip("the package index does not answer")
        raise


@pytest.mark.network
def test_the_package_reads_the_outputs_and_counts_the_wins(
    run: Run, reference, server, capsys
):
    # the package shuffles which answer is shown first: the judge knows ours by its text
    def judge(request: dict[str, Any]) -> str:
        prompt = request["messages"][1]["content"]
        if "Say nothing." in prompt:
            return "neither"  # no verdict
        first, second = prompt.index('"m"'), prompt.index('"M"')
        peer_is_first = first < prompt.index("peer on") < second
        return "M" if peer_is_first else "m"  # whoever is not the peer

    server.answer = judge
    server.faults = [(429, {"Retry-After": "0"}), 500]
    path = run.path / "eval" / "base" / "alpaca_eval" / "model_outputs.json"
    write(path, outputs("test-base"))
    client = Judge("gpt-instruct", run.path / "cache", server.url, retries=2)
    found = annotate(path, reference, client)
    assert (found["win_rate"], found["n_total"], found["missing"]) == (100.0, 3, 1)
    assert found["not_length_controlled"] == "needs all of the 805 instructions"
    assert len(server.requests) == 4 + 2
    assert {request["model"] for request in server.requests} == {"gpt-instruct"}
    assert annotate(path, reference, client) == found  # from what is kept
    assert len(server.requests) == 4 + 2


@pytest.mark.network
def test_a_judge_that_the_evaluator_cannot_read_is_told_what_to_do(
    reference, tmp_path, server
):
    server.answer = lambda request: "I like the first."
    path = write(tmp_path / "out" / "model_outputs.json", outputs("mine"))
    client = Judge("local", tmp_path / "cache", server.url, retries=0)
    reason = "no readable verdict in any of 4 judgments: .*--evaluator alpaca_eval_gpt4"
    with pytest.raises(JudgeError, match=reason):
        annotate(path, reference, client)


@pytest.mark.network
def test_a_refusal_ends_the_package_with_its_sentence_at_a_later_question(
    reference, tmp_path, server
):
    def answer(request: dict[str, Any]) -> Any:
        if "max_tokens" in request:
            return 400, {"message": "Use 'max_completion_tokens' instead."}
        asked.append(request)
        return "m" if len(asked) < 3 else (402, {"message": "Payment required."})

    asked: list[Any] = []
    server.answer = answer
    path = write(tmp_path / "out" / "model_outputs.json", outputs("mine"))
    client = Judge("local", tmp_path / "cache", server.url, workers=1)
    with pytest.raises(
        JudgeError, match=r"status 402 \(Payment required\): add credit"
    ):
        annotate(path, reference, client)
    assert (len(asked), len(server.requests)) == (3, 4)
    assert asked[0]["max_completion_tokens"] == 1


@pytest.mark.network
def test_the_package_reads_what_follows_the_thoughts(reference, tmp_path, server):
    ranks = '[{"model": "model_1", "rank": %d}, {"model": "model_2", "rank": %d}]'
    server.answer = lambda request: f"<think>{ranks % (2, 1)}</think>{ranks % (1, 2)}"
    path = write(tmp_path / "out" / "model_outputs.json", outputs("mine"))
    client = Judge("local", tmp_path / "cache", server.url)
    found = annotate(path, reference, client, "alpaca_eval_gpt4")
    assert (found["n_total"], found["missing"]) == (4, 0)
    texts = [file.read_text() for file in (tmp_path / "out").rglob("*.json")]
    assert not any("<think>" in text for text in texts)
