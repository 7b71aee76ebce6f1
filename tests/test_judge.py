"""The judge client against a real server with its faults, and how verdicts are read."""

import dataclasses
import re
import socket
import time

import pytest

from helpers.errors import JudgeError
from helpers.llm_judge import judge
from helpers.llm_judge.judge import Judge
from tests.judge_server import JudgeServer

ONE_MORE = {"retries": 1, "timeout_s": 1.0}
TOO_LATE = 3.0  # seconds after which the server answers


def echo(request):
    return f"about {request['messages'][-1]['content']} [[8]]"


@pytest.fixture
def server():
    with JudgeServer(echo) as running:
        yield running


@pytest.fixture
def open_client(server, tmp_path):
    def make(**changes):
        settings = {"base_url": server.url, "retries": 2, "timeout_s": 5.0}
        return Judge("local", tmp_path / "judge.jsonl", **{**settings, **changes})

    return make


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_the_order_of_the_questions(server, open_client):
    server.answer = lambda request: (
        time.sleep(0.05 * int(request["messages"][0]["content"])) or echo(request)
    )
    replies = open_client(workers=4).ask(ask("1", "4", "3", "2", "0"))
    assert [text for text, _ in replies] == [
        f"about {n} [[8]]" for n in (1, 4, 3, 2, 0)
    ]


@pytest.mark.parametrize("limit", [{"max_requests": 3}, {"max_s": 0.5}])
def test_a_judge_has_a_limit_in_all_and_a_new_run_asks_the_rest(
    server, open_client, limit
):
    server.answer = lambda request: time.sleep(0.2) or echo(request)
    with pytest.raises(JudgeError, match="are used; replies are kept: run it again"):
        open_client(workers=1, **limit).ask(ask(*"12345"))
    before = len(server.requests)
    assert 2 <= before <= 3
    assert all(text for text, _ in open_client().ask(ask(*"12345")))
    assert len(server.requests) == 5


@pytest.mark.parametrize("is_error", [False, True])
def test_a_reply_of_more_than_a_megabyte_is_not_read(server, open_client, is_error):
    text = "x" * (judge.MAX_BYTES + 1)
    server.answer = lambda request: (500, {"message": text}) if is_error else text
    ((reply, reason),) = open_client(retries=0).ask(ask("1"))
    assert reply is None and "a reply of more than 1 MB" in reason
    server.answer = lambda request: "x" * (judge.MAX_BYTES // 5)
    assert len(open_client(retries=0).ask(ask("1"))[0][0]) == judge.MAX_BYTES // 5


def test_the_judge_is_asked_greedily_and_its_key_is_kept_nowhere(server, open_client):
    client = open_client(api_key="secret")
    client.ask(ask("1"))
    assert server.keys == ["Bearer secret"]
    request = {"model": "local", "temperature": 0}
    assert server.requests == [{**request, "messages": ask("1")[0]}]
    assert "secret" not in repr(client) + client.cache.read_text()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "500 .*oh"),
        (TOO_LATE, "timed out"),
        ("cut", "Connection error"),
        ('{"choices": [', "no completion"),
        ('{"error": {"message": "overloaded"}}', "no completion"),
        ('"so be it"', "no completion"),
        ("<html>Bad gateway</html>", "no completion"),
    ],
    ids=str,
)
def test_a_fault_that_stays_gives_a_reason_and_is_asked_again_by_the_next_run(
    server, open_client, fault, reason
):
    server.faults = [None, fault, *([] if "no" in reason else [fault])]
    client = open_client(**ONE_MORE, workers=1)
    first, second, third = client.ask(ask("1", "2", "3"))
    assert (first[0], third[0]) == ("about 1 [[8]]", "about 3 [[8]]")
    assert second[0] is None
    assert re.search(reason, second[1])
    assert client.ask(ask("2"))[0][0] == "about 2 [[8]]"


def test_a_repeated_run_asks_only_what_is_missing_even_after_a_torn_line(
    server, open_client
):
    open_client().ask(ask("1", "2", "2"))
    with open_client().cache.open("a") as file:
        file.write('\n{"request": "tor')
    for _ in range(2):
        replies = open_client().ask(ask("3", "2", "1"))
        assert [text for text, _ in replies] == [f"about {n} [[8]]" for n in (3, 2, 1)]
    assert [r["messages"][0]["content"] for r in server.requests[2:]] == ["3"]


def test_answers_received_before_an_error_are_kept(server, open_client):
    server.faults = [None, 401]
    with pytest.raises(JudgeError):
        open_client(workers=1).ask(ask("1", "2"))
    open_client().ask(ask("1", "2"))
    contents = [request["messages"][0]["content"] for request in server.requests]
    assert (contents.count("1"), contents.count("2")) == (1, 2)


@pytest.mark.parametrize(("change", "count"), [("model", 2), ("api_key", 1)])
def test_an_answer_serves_again_for_the_same_judge_only(
    server, open_client, change, count
):
    client = open_client()
    client.ask(ask("1"))
    dataclasses.replace(client, **{change: "other"}).ask(ask("1"))
    assert len(server.requests) == count


REFUSALS = [
    (400, {"message": "Use 'max_completion_tokens' instead."}, "max_completion_tokens"),
    (401, {"message": "Incorrect API key."}, "Incorrect API key.*check key"),
    (
        402,
        {"message": "Insufficient Balance", "type": "unknown"},
        "Insufficient.*credit",
    ),
    (405, "<html><h1>Not\nallowed</h1></html>", "405.*address"),
    (429, {"message": "No quota.", "code": "insufficient_quota"}, "No quota.*credit"),
]


@pytest.mark.parametrize(("status", "error", "words"), REFUSALS, ids=str)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_a_refusal_ends_it_with_one_sentence_at_every_question(
    server, open_client, status, error, words, later
):
    server.answer = lambda request: (
        echo(request) if later and "one" in str(request) else (status, error)
    )
    with pytest.raises(JudgeError, match=f"refuses 'local' .*{words}") as caught:
        open_client(workers=1, retries=0).ask(ask("one", *map(str, range(50))))
    assert "\n" not in str(caught.value)
    assert len(server.requests) < 10  # not all fifty


def test_a_model_of_one_temperature_is_asked_without_one(server, open_client):
    message = "'temperature' does not support 0 with this model."
    server.answer = lambda request: (
        (400, {"message": message}) if "temperature" in request else echo(request)
    )
    for _ in range(2):
        replies = open_client(workers=1).ask(ask("1", "2"))
        assert [text for text, _ in replies] == ["about 1 [[8]]", "about 2 [[8]]"]
        assert len(server.requests) == 4


def test_an_address_without_a_server_ends_it_with_one_sentence(open_client):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match=f"judge at {url}.* is not there.*start it"):
        open_client(retries=0, base_url=url).ask(ask("1", "2"))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[10]]", 10),
        ("[[9/10]]", 9),
        ("[[2]], no: [[80]]", None),
        ("[4] is cited. Rating: [5]", None),
        ("By [1] and [2] it is good. Rating: 8", None),
        ("<think>Rather [[2]].</think>\n\nRating: [[7]]", 7),
        ("Rating: [[7]] <think>or [[2]]", 7),
        ("[THINK]Rather [[2]].[/THINK]Rating: [[7]]", 7),
        ("<seed:think>[[2]]</seed:think>[[7]]", 7),
        ("<|channel|>analysis<|message|>[[2]]<|channel|>final<|message|>[[7]]", 7),
        ("<think>Rather [[2]]", None),
        (None, None),
    ],
)
def test_a_rating_is_read_or_missing_but_never_made_up(text, rating):
    assert judge.read_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("[[A]]", "first"),
        ("[[A]] or [[B]]?", None),
        ("[[A]] if A is better, [[B]] if B is, and [[C]] for a tie", None),
        ("At first [[A]]. Then B convinced me: [[B]]", "second"),
        ("<think>[[A]]? Yes.</think> [[B]]", "second"),
        (None, None),
    ],
)
def test_a_winner_is_read_or_missing_but_never_made_up(text, winner):
    assert judge.read_winner(text) == winner


def test_a_judge_is_named_by_the_environment_or_none_is_opened(run, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "TUNEBOOK_JUDGE"):
        monkeypatch.delenv(name, raising=False)
    assert judge.open_judge(run) is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    with pytest.raises(JudgeError, match="no model is named for http://.*_JUDGE"):
        judge.open_judge(run)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("TUNEBOOK_JUDGE", "local")
    client = judge.open_judge(run)
    assert client is not None
    assert (client.base_url, client.model) == ("http://localhost:1/v1", "local")
    assert client.api_key == "secret"
