"""AlpacaEval: outputs as its package reads them, and win rates that it counts itself.

Tests marked `network` let uv make the package's environment, from its cache if it was
made before; the judge is a server on this machine.
"""

import json
import re

import pytest

from helpers.config import changed
from helpers.errors import DataError, JudgeError
from helpers.files import write_json
from helpers.llm_judge import chat_benchmarks
from helpers.llm_judge.judge import Judge
from tests.judge_server import JudgeServer

INSTRUCTIONS = ["Name a color.", "Sort 3, 1, 2.", "Was ist das?", "Say nothing."]


def outputs(path, generator):
    """Writes outputs as the package publishes them."""
    rows = [{"instruction": t, "output": f"{generator} on {t}"} for t in INSTRUCTIONS]
    write_json(path, [row | {"generator": generator} for row in rows])
    return path


@pytest.fixture
def reference(tmp_path):
    return outputs(tmp_path / "reference.json", "peer")


@pytest.fixture
def mine(tmp_path):
    return outputs(tmp_path / "mine" / "model_outputs.json", "mine")


@pytest.fixture
def server():
    with JudgeServer(lambda request: "m") as running:
        yield running


def answer(run, reference, **changes):
    settings = {"labels": ["base"], "max_new_tokens": 3, **changes}
    message = chat_benchmarks.run_alpaca_eval(
        run, None, reference=reference, **settings
    )
    assert "answers were saved but not scored" in message
    name = f"alpaca_eval_{changes.get('limit') or 4}"
    path = run.path / "eval/base" / name / "model_outputs.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def answered(monkeypatch):
    """The instructions that a model has answered, in all calls so far."""
    batches, seen = chat_benchmarks.generate_batches, []

    def spy(model, tokenizer, prompts, **options):
        for batch in batches(model, tokenizer, prompts, **options):
            seen.extend(prompts[place][-1]["content"] for place in sorted(batch))
            yield batch

    monkeypatch.setattr(chat_benchmarks, "generate_batches", spy)
    return seen


def test_outputs_have_the_form_of_published_ones_and_are_made_once(
    run, reference, answered
):
    rows = answer(run, reference)
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    for row in rows:
        assert list(row) == ["instruction", "output", "generator"]
        assert row["generator"] == "test-base"
    assert answer(run, reference) == rows
    assert answered == INSTRUCTIONS
    answer(run, reference, max_new_tokens=2)
    assert answered == INSTRUCTIONS * 2
    for seed in (1, 1, 2):  # answers that are drawn are those of the seed
        config = changed(run.config, inference__temperature=0.7, seed=seed)
        answer(run._replace(config=config), reference)
    assert answered == INSTRUCTIONS * 4


@pytest.mark.parametrize("output", [None, 5, ["a"]])
def test_a_reference_without_texts_is_refused(run, tmp_path, output):
    write_json(path := tmp_path / "bad.json", [{"instruction": "a", "output": output}])
    with pytest.raises(DataError, match="bad.json: not every .* is a text"):
        chat_benchmarks.run_alpaca_eval(run, None, reference=path)


def annotate(mine, reference, server, *more, **changes):
    """`annotate`; skips where uv cannot fetch the package."""
    client = Judge("gpt-instruct", mine, server.url, retries=2, **changes)
    try:
        return chat_benchmarks.annotate(mine, reference, client, *more)
    except JudgeError as error:
        causes = "error sending request|Failed to fetch|network was disabled"
        if re.search(causes, str(error)):
            pytest.skip("the package index does not answer")
        raise


@pytest.mark.network
def test_the_package_reads_the_outputs_and_counts_the_wins(mine, reference, server):
    # the package shuffles which answer is shown first: the judge knows ours by its text
    def judge(request):
        prompt = request["messages"][1]["content"]
        if "Say nothing." in prompt:
            return "neither"  # no verdict
        first, second = prompt.index('"m"'), prompt.index('"M"')
        peer_is_first = first < prompt.index("peer on") < second
        return "M" if peer_is_first else "m"  # whoever is not the peer

    server.answer = judge
    server.faults = [429, 500]
    values = annotate(mine, reference, server)
    assert (values["win_rate"], values["n_total"], values["missing"]) == (100.0, 3, 1)
    assert values["not_length_controlled"] == "needs all of the 805 instructions"
    assert len(server.requests) == 4 + 2
    assert {request["model"] for request in server.requests} == {"gpt-instruct"}
    assert annotate(mine, reference, server) == values  # from what is kept
    assert len(server.requests) == 4 + 2


@pytest.mark.network
def test_a_judge_that_the_evaluator_cannot_read_is_told_what_to_do(
    mine, reference, server
):
    server.answer = lambda request: "I like the first."
    reason = "no readable verdict in any of 4 judgments.*--evaluator alpaca_eval_gpt4"
    with pytest.raises(JudgeError, match=reason):
        annotate(mine, reference, server)


@pytest.mark.network
@pytest.mark.parametrize(
    ("status", "message"),
    [(402, "Payment required."), (400, "Use 'max_completion_tokens' instead.")],
)
def test_a_refusal_ends_the_package_with_the_judges_words_at_a_later_question(
    mine, reference, server, status, message
):
    server.answer = lambda request: (
        "m" if len(server.requests) < 3 else (status, {"message": message})
    )
    with pytest.raises(JudgeError, match=f"alpaca_eval stopped: .*{status}.*{message}"):
        annotate(mine, reference, server, workers=1)
    assert len(server.requests) == 3


@pytest.mark.network
def test_thoughts_give_no_verdict_and_are_counted_as_missing(mine, reference, server):
    ranks = '[{"model": "model_1", "rank": 1}, {"model": "model_2", "rank": 2}]'
    replies = iter([f"<think>{ranks}</think>{ranks}", ranks, ranks, ranks])
    server.answer = lambda request: next(replies)
    values = annotate(mine, reference, server, "alpaca_eval_gpt4")
    assert (values["n_total"], values["missing"]) == (3, 1)
    with pytest.raises(JudgeError, match="lmsys_gpt4 may read a verdict in .*thoughts"):
        annotate(mine, reference, server, "lmsys_gpt4")
