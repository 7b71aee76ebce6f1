"""The chat templates that the installed unsloth and trl ship, and what to ask them."""

from __future__ import annotations

import copy
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Messages = list[dict[str, str]]

# Markers of turns, as the formats write them, and the tags of thinking.
THOUGHT = ("<think>", "</think>", "<|channel>", "<channel|>")
SPECIAL = re.compile(
    r"<\|[^\s<>|{}']+\|?>|<[a-z_]+\|>|<｜[^\s<>]+?｜>|\[/?[A-Z]*INST\]|\[gMASK\]"
    r"|</?(?:s|sop|think|[a-z]+_of_[a-z]+)>"
)


class Template(NamedTuple):
    """A chat template of a package."""

    names: list[str]
    """The first one is used; the others have the same text."""
    text: str
    stop: str | None
    """The token that the package says ends a turn, None where it says nothing."""


def trl_templates() -> list[Template]:
    """Returns the chat templates that trl ships as files."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("trl is not installed: run `make setup`")
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return distinct([(f"trl/{f.stem}", f.read_text("utf-8"), None) for f in files])


def unsloth_templates() -> list[Template]:
    """Returns the chat templates that unsloth's `get_chat_template` may put on.

    They are taken as they are written: `{system_message}`, which it fills in, stays.
    """
    from unsloth import chat_templates as theirs

    found = []
    for name, (text, stop, *_) in theirs.CHAT_TEMPLATES.items():
        stop = stop if isinstance(stop, str) else stop[1]
        found.append((f"unsloth/{name}", text, None if stop == "eos_token" else stop))
    # put on instead of gemma-4 where the model's own template opens a thought
    text, stop = (
        theirs.gemma4_empty_thought_template,
        theirs.CHAT_TEMPLATES["gemma-4"][1],
    )
    found.append(("unsloth/gemma-4-empty-thought", text, stop))
    return distinct(found)


def distinct(found: list[tuple[str, str, str | None]]) -> list[Template]:
    """Returns one template a text, with all its names.

    >>> distinct([("a", "x", None), ("b", "x", None)])
    [Template(names=['a', 'b'], text='x', stop=None)]
    """
    by_text: dict[str, Template] = {}
    for name, text, stop in found:
        by_text.setdefault(text, Template([], text, stop)).names.append(name)
    return list(by_text.values())


def fit_tokenizer(base: Any, template: Template) -> Any:
    """Returns a copy of a tokenizer with a template, its special tokens and its EOS.

    EOS is `</s>` where the template writes `eos_token`, else what the package declares
    or, failing that, the last of the tokens that the template puts after an answer.
    Templates with the same special tokens get the same copy, one after the other.
    """
    from jinja2 import TemplateError as Refused

    probe, text = turns("Q", "A", system="S"), ""
    own = {"chat_template": template.text, "bos_token": "<s>", "eos_token": "</s>"}
    for messages in (probe[1:], probe):  # some templates refuse a system turn
        try:
            text += base.apply_chat_template(messages, tokenize=False, **own)
        except Refused:
            continue
    found = SPECIAL.findall(template.text + text)
    tokens = frozenset([*found, "<s>", "</s>", template.stop or "</s>"])
    tokenizer = add_tokens(base, tokens)
    for name, value in own.items():
        setattr(tokenizer, name, value)
    ends = re.search(rf"A\s*((?:{SPECIAL.pattern})+)\s*$", text)
    if template.stop:
        tokenizer.eos_token = template.stop
    elif ends and "eos_token" not in template.text:
        tokenizer.eos_token = SPECIAL.findall(ends[1])[-1]
    return tokenizer


@cache
def add_tokens(base: Any, tokens: frozenset[str]) -> Any:
    """Returns a copy of a tokenizer that has these as special tokens."""
    tokenizer = copy.deepcopy(base)
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    tokenizer.control_in_texts = "keep"  # masks have to be right then, too
    return tokenizer


def turns(*contents: str, system: str | None = None) -> Messages:
    """Returns user and assistant turns in alternation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(contents):
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": content})
    return messages


def battery(markers: str, end: str) -> dict[str, Messages]:
    """Returns the conversations; `markers` and `end` are a template's own."""
    code = "```python\ndef f(a):\n    if a:\n        return a[0]\n\n\n\t# end\n```"
    long = " ".join(f"Item {n}: {n * n} units,\n    as agreed." for n in range(60))
    talk = [
        "Hi",
        "Hello.",
        "Who are you?",
        "A model.",
        "Why?",
        "To help.",
        "Bye",
        "Bye!",
    ]
    return {
        "one turn": turns("What is 2 + 2?", "It is 4."),
        "four turns": turns(*talk),
        "system": turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief.\nBe kind."),
        "empty system": turns("Hi", "Hello.", "Bye", "Bye!", system=""),
        "unicode": turns(
            "Grüße, Zoë?", "Grüße — 你好, мир, こんにちは, e\u0301\u00a0x."
        ),
        "emoji": turns("Party? 🎉", "👩\u200d👩\u200d👧🎉 yes 🇩🇪", "Mood?", "🫠"),
        "code": turns(f"Explain\n{code}", code, "Again", f"    {code}"),
        "very long": turns(long, long, "And?", f"All of it: {long}"),
        "spaces": turns(" Hi  ", "  two before, two after  ", "\tOh", "\tyes\t"),
        "line breaks": turns("Hi\n", "\nHello.\n\n", "\n\nBye\n", "\n\nBye!\n"),
        "answer is question": turns("Yes.", "Yes.", "No.", "No."),
        "same answer twice": turns("Hi", "Yes.", "Hi", "Yes.", "Really?", "Yes."),
        "unanswered": turns("Hi", "Hello.", "And?"),
        "words of roles": turns("assistant\n", "user\nassistant\nmodel: system"),
        "reasoning": turns("2 + 2?", "<think>\nAdd them.\n</think>\n\nIt is 4."),
        "markers in answer": turns("How?", f"So: {markers} and on.", "Fine", "Good."),
        "markers in question": turns(f"{markers} Hi", "No.", "Fine", "Good."),
        "answer ends in marker": turns("How?", f"With {end}", "Sure?", f"{end}"),
    }
