"""A careful client of any OpenAI-compatible judge: retries, keeps answers, resumes.

A verdict that is missing or cannot be read is None and counted, never replaced by a
guess. Prompts come from the files that publish them (`mt_bench.find_data`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from helpers.data.formats import Messages, Row
from helpers.errors import DataError, JudgeError
from helpers.llm_judge import replies
from helpers.runs import Run, open_run, write_json

RATING = r"(\d+(?:\.\d*)?)(?:\s*/\s*10)?"
# what a body that is no JSON, or JSON that is no completion, raises in the client
MALFORMED = (ValueError, TypeError, LookupError, AttributeError)
UNJUDGED = (
    "answers are written, nothing is judged: name a judge with --judge URL "
    "--judge-model NAME, any OpenAI-compatible server (a key in OPENAI_API_KEY)"
)
WINNERS = {"A": "first", "B": "second", "C": "tie"}


class Reply(NamedTuple):
    """What a judge wrote, None with the reason when nothing could be had."""

    text: str | None
    error: str = ""


@dataclass
class Judge:
    """A model behind an OpenAI-compatible address, whose answers are kept on disk.

    Greedy with at most 2,048 tokens, as FastChat asks its judges
    (`fastchat/llm_judge/common.py`), unless `options` say otherwise or the server
    refuses one of them (`replies.adapted`); what it takes instead is remembered.
    """

    model: str
    cache: Path
    """Folder of the answers, a file each: a repeated run asks only what is missing."""
    base_url: str | None = None
    """Ends in `/v1` at most servers; None is OpenAI's own."""
    api_key: str = field(default="none", repr=False)
    options: dict[str, Any] = field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 2048}
    )
    timeout_s: float = 120.0
    retries: int = 5
    """Of 408, 409, 429 (after its Retry-After), 5xx, time-outs, cut connections and
    answers that are no completion; each wait is longer than the one before."""
    workers: int = 4
    """Questions asked at the same time; lower it where the rate limit is low."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ask(self, conversations: list[Messages]) -> list[Reply]:
        """Returns one reply a conversation, in their order.

        Raises:
            JudgeError: the server refuses a request for good, or does not answer the
                first one; replies until then are kept.
        """
        while (path := self.place([])).exists():
            self.options = json.loads(path.read_text(encoding="utf-8"))["options"]
        answers = [self.recall(messages) for messages in conversations]
        new = [n for n, reply in enumerate(answers) if reply is None]
        if new:
            client = self.open_client()
            # the first request alone: a wrong address ends it before others wait for it
            answers[new[0]] = self.request(client, conversations[new[0]], first=True)
            ended = threading.Event()

            def ask_next(n: int) -> Reply | None:
                if ended.is_set():
                    return None
                try:
                    return self.request(client, conversations[n])
                except JudgeError:
                    ended.set()
                    raise

            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    rest = pool.map(ask_next, new[1:])
                    for n, reply in zip(new[1:], rest, strict=True):
                        answers[n] = reply
                finally:
                    ended.set()
        return [reply or Reply(None, "not asked") for reply in answers]

    def open_client(self) -> Any:
        """Returns the `openai` client; it does not try again without credit."""
        import openai

        def end_without_credit(response: Any) -> None:
            if response.status_code == 429:
                response.read()
                if replies.QUOTA.search(response.text):
                    response.headers["x-should-retry"] = "false"

        hooks = {"response": [end_without_credit]}
        return openai.OpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=self.timeout_s,
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )

    def request(self, client: Any, messages: Messages, first: bool = False) -> Reply:
        """Returns the reply to one conversation and keeps it, unless it failed."""
        import openai

        reason = "an answer that is no chat completion"
        for attempt in range(self.retries + 1):
            try:
                completion = self.send(client, messages)
                if error := getattr(completion, "error", None):  # with status 200
                    reason = f"an error for an answer: {str(error)[:200]}"
                choice = completion.choices[0]
                text = choice.message.content
            except openai.APIConnectionError as error:
                # a time-out means that the server exists
                if first and not isinstance(error, openai.APITimeoutError):
                    raise JudgeError(
                        f"no judge answers at {client.base_url}: {error} "
                        f"({error.__cause__}); start it, or check the address and the "
                        "network"
                    ) from error
                return Reply(None, str(error))
            except openai.APIStatusError as error:
                if sentence := replies.refusal(error, client.base_url, self.model):
                    raise JudgeError(sentence) from error
                return Reply(None, f"status {error.status_code}")
            except (*MALFORMED, openai.APIError):
                if attempt < self.retries:
                    time.sleep(min(0.5 * 2**attempt, 8))
                continue
            if text:
                with self.lock:
                    values = {"messages": messages, "text": text}
                    write_json(self.place(messages), values)
                return Reply(text)
            return Reply(None, f"empty answer, finished by {choice.finish_reason}")
        return Reply(None, reason)

    def send(self, client: Any, messages: Messages) -> Any:
        """Returns a completion, by options that the server takes and that are kept."""
        import openai

        options = self.options
        while True:
            try:
                completion = client.chat.completions.create(
                    model=self.model, messages=messages, **options
                )
            except openai.APIStatusError as error:
                other = replies.adapted(options, error)
                if other is None:
                    raise
                options = other
            else:
                with self.lock:
                    if options != self.options:
                        write_json(self.place([]), {"options": options})
                        self.options = options
                        logging.getLogger(__name__).warning(
                            "%s is asked with %s, as its server wants it",
                            self.model,
                            options,
                        )
                return completion

    def place(self, messages: Messages) -> Path:
        """Returns the file of an answer, named by everything that decides it.

        Without messages it is the file of the options that the server takes instead.
        """
        values = [self.base_url, self.model, self.options, messages]
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def recall(self, messages: Messages) -> Reply | None:
        """Returns the answer that an earlier run got, None without one."""
        path = self.place(messages)
        if not path.exists():
            return None
        return Reply(json.loads(path.read_text(encoding="utf-8"))["text"])


def read_rating(text: str | None) -> float | None:
    """Returns the rating of 1 to 10 in a judgment, None where there is none.

    The last `[[rating]]` outside thoughts, else the last `Rating: [rating]` or one that
    begins the text: a judge that changes its mind means the last one, and `[1]` may
    cite. FastChat takes the first of each, and every `[1]`. Spaces inside and `/10` are
    forgiven; a number off the scale is no rating.

    >>> read_rating("Clear and correct. Rating: [[8]]")
    8.0
    >>> read_rating("[[2]] at first sight. Rating: [[7]]")
    7.0
    >>> read_rating("Rating: [7.5]"), read_rating("**[[ 9/10 ]]**")
    (7.5, 9.0)
    >>> read_rating("Rating: 8") is read_rating("Rating: [[85]]") is read_rating(None)
    True
    """
    spoken = replies.without_thoughts(text)
    single = rf"(?:\A|(?i:rating))\W*\[\s*{RATING}\s*\]"
    for pattern in (rf"\[\[\s*{RATING}\s*\]\]", single):
        if ratings := re.findall(pattern, spoken):
            rating = float(ratings[-1])
            return rating if 1 <= rating <= 10 else None
    return None


def read_winner(text: str | None) -> str | None:
    """Returns `first`, `second` or `tie` by `[[A]]`, `[[B]]`, `[[C]]`, None without.

    The last one outside thoughts, as with ratings; where its sentence holds another one
    too, it decides nothing. FastChat takes the first letter that occurs.

    >>> read_winner("[[A]] at first sight. Assistant B is more precise: [[B]]")
    'second'
    >>> read_winner("[[A]] if A is better, [[B]] if B is: I cannot say.") is None
    True
    """
    for sentence in reversed(re.split(r"[.!?\n]", replies.without_thoughts(text))):
        if letters := set(re.findall(r"\[\[\s*([ABC])\s*\]\]", sentence)):
            return WINNERS[letters.pop()] if len(letters) == 1 else None
    return None


def unreadable(kind: str, reasons: list[str], path: Path) -> JudgeError:
    """Returns the error of a judge whose judgments all hold no verdict.

    Args:
        kind: `rating` or `verdict`.
        reasons: of each judgment: an error, or what the judge wrote.
        path: of the judgments.
    """
    reason, count = Counter(reasons).most_common(1)[0]
    return JudgeError(
        f"the judge gave no readable {kind} in any of {len(reasons)} judgments, "
        f"{count} times {' '.join(reason.split())[-100:]!r}: read them in {path}, and "
        "take a judge that answers and keeps to the format"
    )


def fill(prompt: Row, **fields: str) -> Messages:
    """Returns what to send: a published prompt with questions and answers put in.

    Args:
        prompt: a row of FastChat's `judge_prompts.jsonl`.
        fields: the names in its template.
    """
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]


def add_result(run: Run, label: str, name: str, values: dict[str, Any]) -> None:
    """Writes one result of a model into the `eval` part of the run's report."""
    part = run.report().get("eval", {})
    run.write_part("eval", {**part, label: {**part.get(label, {}), name: values}})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, and the options that name a judge, to a command line."""
    parser.add_argument("run", help="a run's name")
    parser.add_argument("--judge", metavar="URL", help="else OPENAI_BASE_URL")
    parser.add_argument("--judge-model", metavar="NAME", help="else TUNEBOOK_JUDGE")


def answering_parser(
    prog: str, items: str, max_new_tokens: int
) -> argparse.ArgumentParser:
    """Returns the command line of a bench that models answer and a judge reads.

    Args:
        prog: the program's name.
        items: what is answered, in the plural.
        max_new_tokens: the default.
    """
    parser = argparse.ArgumentParser(prog=prog)
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", help="base sft ...; all of the run's")
    parser.add_argument("--limit", type=int, help=f"of {items}")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    return parser


def open_answering(given: argparse.Namespace) -> dict[str, Any]:
    """Returns what the values of `answering_parser` mean, as a bench's arguments.

    Raises:
        DataError: see `find_adapters`.
        JudgeError: see `open_judge`.
    """
    run = open_run(given.run)
    return {
        "run": run,
        "adapters": find_adapters(run, given.models),
        "client": open_judge(run, given.judge, given.judge_model),
        "limit": given.limit,
        "max_new_tokens": given.max_new_tokens,
    }


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    """Returns at most so many rows, evenly from the whole list; all without a limit.

    >>> spread([{"n": n} for n in range(5)], 2)
    [{'n': 0}, {'n': 3}]
    """
    return rows[:: math.ceil(len(rows) / limit)] if limit else rows


def find_adapters(run: Run, labels: list[str] | None) -> dict[str, Path | str | None]:
    """Returns the adapter of each label, all of the run's models without labels.

    Raises:
        DataError: the run has no such model.
    """
    from helpers.stages import ensure_adapter

    known = {"base": None} | {stage: stage for stage in run.config.stages}
    if unknown := [label for label in labels or [] if label not in known]:
        raise DataError(
            f"run {run.config.name!r} has no model {unknown[0]!r}, only "
            f"{', '.join(known)}"
        )
    stages = {label: known[label] for label in labels or known}
    return {n: stage and ensure_adapter(run, stage) for n, stage in stages.items()}


def open_judge(run: Run, url: str | None, model: str | None) -> Judge | None:
    """Returns the judge of a command line or the environment, None if none is named.

    The key is `OPENAI_API_KEY`; a server of your own may need none.

    Raises:
        JudgeError: an address without a model's name, or a key that is none.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    model = model or os.environ.get("TUNEBOOK_JUDGE")
    if model is None:
        if url is None:
            return None
        raise JudgeError(f"which model judges at {url}? give --judge-model NAME")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if not key.isascii() or not key.isprintable():
        raise JudgeError(
            "OPENAI_API_KEY holds other characters than a key: copy it again"
        )
    return Judge(model, run.path / "eval" / "judge", url, key)
