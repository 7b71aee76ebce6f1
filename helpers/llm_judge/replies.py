"""A judge server's replies: refusals as sentences, renamed options, thoughts cut out.

It imports nothing of ours, so that `alpaca_annotate` reads replies by the same rules in
its own environment.
"""

from __future__ import annotations

import re
from typing import Any

NAME = r"(?:\w+:)?(?:think|thinking|thought|reasoning)\b[^<>]*>"
# and as Mistral's, Moonshot's and OpenAI's open models write them
OPEN = rf"<{NAME}|(?-i:\[THINK\])|◁think▷|<\|channel\|>analysis"
CLOSE = rf"</{NAME}|(?-i:\[/THINK\])|◁/think▷|<\|channel\|>final<\|message\|>"
OPENED, CLOSED = re.compile(OPEN, re.I), re.compile(CLOSE, re.I)
BLOCK = re.compile(f"(?:{OPEN}).*?(?:{CLOSE})", re.I | re.S)
# of an account; a limit of rate, which passes, is none
QUOTA = re.compile(r"insufficient[ _]?(quota|balance|credit|fund)|billing_hard", re.I)
PASSING = (408, 409, 429)
NO_CREDIT = (
    "add credit to the account, or name another key in OPENAI_API_KEY or another judge"
)
ACCESS = (
    "check OPENAI_API_KEY, the address (most end in /v1) and the model's name, or take "
    "another judge"
)


def without_thoughts(text: str | None) -> str:
    """Returns a text without its blocks of thought, those cut at either end too.

    >>> without_thoughts("<think>Poor: [[2]]</think>Rating: [[7]]")
    'Rating: [[7]]'
    >>> without_thoughts("it is [[2]]</think> [[7]] <Reasoning>or [[3]]")
    ' [[7]] '
    """
    text = CLOSED.split(BLOCK.sub("", text or ""))[-1]
    return OPENED.split(text)[0]


def message_of(error: Any) -> str:
    """Returns what a server says in an error of the `openai` client, on one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    text = re.sub(r"<[^>]*>", " ", body) if isinstance(body, str) else str(body or "")
    return " ".join(text.split())[:300].rstrip(". ") or "no message"


def adapted(options: dict[str, Any], error: Any) -> dict[str, Any] | None:
    """Returns a request's options as the server wants them, None if it names none.

    OpenAI's newer models refuse `max_tokens`, which is `max_completion_tokens` there,
    and every temperature but their own.

    Args:
        options: that were refused.
        error: the client's.
    """
    if error.status_code not in (400, 422):
        return None
    text = str(error.body)
    if "max_tokens" in options and "max_completion_tokens" in text:
        rest = {name: v for name, v in options.items() if name != "max_tokens"}
        return rest | {"max_completion_tokens": options["max_tokens"]}
    if "temperature" in options and "temperature" in text.lower():
        return {name: v for name, v in options.items() if name != "temperature"}
    return None


def refusal(error: Any, url: object, model: str) -> str | None:
    """Returns a status that no repetition mends as a sentence, None for another.

    Args:
        error: the client's.
        url: of the judge.
        model: its name.
    """
    status, broke = error.status_code, QUOTA.search(str(error.body))
    if status >= 500 or status in PASSING and not broke:
        return None
    remedy = NO_CREDIT if broke or status == 402 else ACCESS
    return (
        f"the judge at {url} refuses model {model!r} with status {status} "
        f"({message_of(error)}): {remedy}"
    )
