"""Chat templates: a conversation's text, and where its answers are, without markers."""

import json
import logging
import os.path
import re
from contextlib import suppress
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from helpers import runtime
from helpers.data.formats import Messages
from helpers.errors import TemplateError
from helpers.inference.chat import break_control

log = logging.getLogger(__name__)
Tokenizer = Any  # one of transformers, which takes seconds to import
LossOn = Literal["all", "assistant", "last"]
Text = tuple[str, list[tuple[int, int]]]  # of a conversation, and the spans to learn
LAST = "choose another template, or loss_on='last'"
LOST = f"the template moves or leaves out text of this answer; {LAST}"
# Llama-3.x templates print today's date; a fixed one keeps tokens the same tomorrow.
DAY = date(2024, 7, 26)
FIXED = {"date_string": "26 Jul 2024", "strftime_now": DAY.strftime}
THINKING = "{%%- set enable_thinking = %s %%}"
# from a plane for private use: neither data nor templates have it
MARK = "\U000f0000"
FILES = sorted(Path(__file__).parent.glob("*.jinja"))
TEMPLATES = {path.stem: path.read_text("utf-8") for path in FILES}


def template_text(template: str) -> str | None:
    """Returns the text of a config's template, None for the tokenizer's own."""
    if template == "own" or template in TEMPLATES:
        return TEMPLATES.get(template)
    file = runtime.find_local(template)
    if file is None or not file.is_file():
        raise TemplateError(f"{template=} is not own, {', '.join(TEMPLATES)} or a file")
    return file.read_text(encoding="utf-8-sig")


@lru_cache(maxsize=4)
def control_tokens(tokenizer: Tokenizer, template: str) -> re.Pattern[str]:
    """Returns what finds special tokens, and others that are put around turns."""
    text, turn = "", {"role": "user", "content": "?"}
    with suppress(TemplateError):  # it may refuse them
        text = write_text(tokenizer, [turn, turn | {"role": "assistant"}, turn])
    added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    names = [n for n in added if n.strip() and (added[n] or n in text)]  # not a "\n"
    names.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def neutralise(tokenizer: Tokenizer, messages: Messages) -> Messages:
    """Returns turns whose texts hold no control token, by the tokenizer's choice."""
    choice = getattr(tokenizer, "control_in_texts", "neutralise")
    pattern = control_tokens(tokenizer, str(tokenizer.chat_template))
    token = next(filter(None, (pattern.search(m["content"]) for m in messages)), None)
    if token is None or choice == "keep":
        return messages
    if choice == "refuse":
        remedy = "remove it, or set special_tokens to neutralise"
        raise TemplateError(f"control token {token[0]} in a text: {remedy}")
    return break_control(messages, pattern)


def render(
    tokenizer: Tokenizer, messages: Messages, *, for_generation: bool = False
) -> str:
    """Returns the text of a conversation, with exactly one BOS where there is one.

    Args:
        tokenizer: use it on the text with `add_special_tokens=False`: all are in it.
        messages: the turns; `weight` is not shown to the template.
        for_generation: end with the header of the assistant's next turn.

    Raises:
        TemplateError: the template refuses it.
    """
    return write_text(tokenizer, neutralise(tokenizer, messages), for_generation)


def write_text(tokenizer: Tokenizer, messages: Messages, ask: bool = False) -> str:
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    options = {"tokenize": False, "add_generation_prompt": ask, **FIXED}
    try:
        text = tokenizer.apply_chat_template(plain, **options)
    except Exception as error:  # whatever Python raises on the template's expressions
        roles = " ".join(["a conversation of", *(m["role"] for m in messages)])
        raise TemplateError(f"the template refuses {roles}: {error}") from error
    bos = tokenizer.bos_token or ""
    if text.startswith(bos) or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return text
    return bos + text


def prepare_tokenizer(
    tokenizer: Tokenizer,
    template: str = "own",
    pad_token: str | None = None,
    special_tokens: str = "neutralise",
    thinking: bool | None = None,
) -> None:
    """Makes a tokenizer fit to train with: a chat template, and a pad token of its own.

    Args:
        tokenizer: it is changed in place.
        template: `own` (if it has none, `instruction`), `llama-2`, or a Jinja file.
        pad_token: of the vocabulary, None to choose one; EOS would never be learnt.
        special_tokens: in texts: `neutralise`, `refuse`, or `keep` as control tokens.
        thinking: the template's `enable_thinking`, None for the template's own choice.

    Raises:
        TemplateError: there is no such template, switch or pad token, or no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise TemplateError("the tokenizer has no EOS token; set tokenizer.eos_token")
    if not (text := template_text(template) or tokenizer.chat_template):
        log.info("no chat template: '### Instruction / ### Response' is used")
        text = TEMPLATES["instruction"]
    if thinking is not None:
        if "enable_thinking" not in text:
            reason = "the chat template has no enable_thinking; set it to null"
            raise TemplateError(f"{thinking=}: {reason}")
        earlier, now = (THINKING % x for x in (r"\w+", str(thinking).lower()))
        text = now + re.sub(earlier, "", text)
    tokenizer.chat_template = text
    tokenizer.control_in_texts = special_tokens
    if pad_token in ("eos", tokenizer.eos_token):
        log.warning("answers padded with EOS would not end: another token pads")
    elif pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
    elif pad_token is not None:
        raise TemplateError(f"{pad_token=} is not in the vocabulary; null will do")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        written = f"{tokenizer.bos_token}{tokenizer.eos_token}{tokenizer.chat_template}"
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        unused = [token for token in added if token not in written]
        if not unused:
            raise TemplateError("no special token but EOS can pad: add one")
        names = ("pad", str(tokenizer.unk_token), "reserved", "")
        tokenizer.pad_token = next(t for n in names for t in unused if n in t)


def fix_date(template: str) -> str:
    """Returns a chat template that prints the fixed date, in any program."""
    call = r"strftime_now\((['\"])(.*?)\1\)"
    text = re.sub(call, lambda match: repr(DAY.strftime(match[2])), template)
    if "strftime_now(" in text:
        raise TemplateError("strftime_now(...) of the template takes no plain string")
    known = f"{{%- set date_string = {FIXED['date_string']!r} %}}"
    return known + text if "date_string" in text else text


def answer_marks(tokenizer: Tokenizer) -> tuple[str, str]:
    """Returns what a template writes before an answer and after the last one."""
    messages = [{"role": "user", "content": MARK}]
    prompt = render(tokenizer, messages, for_generation=True)
    text = render(tokenizer, [*messages, {"role": "assistant", "content": MARK * 2}])
    if MARK not in prompt or MARK * 2 not in text:
        raise TemplateError("the template does not print contents that are text")
    return prompt.partition(MARK)[2], text.rpartition(MARK * 2)[2].strip()


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that end an answer: EOS, and what the template puts."""
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({tokenizer.eos_token_id, *special.intersection(ids)})


def find_spans(
    tokenizer: Tokenizer, messages: Messages, loss_on: LossOn, closing: str
) -> Text:
    """Returns the training text of a conversation and the character spans to learn."""
    text = write_text(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    turns = [(m["role"], m.get("weight") != 0) for m in messages]
    learnt = [n for n, turn in enumerate(turns) if turn == ("assistant", True)]
    if loss_on == "all" and not all(weight for _, weight in turns):
        raise TemplateError("loss_on='all' would learn a turn of weight 0")
    for number in learnt[-1:] if loss_on == "last" else learnt:
        prompt = write_text(tokenizer, messages[:number], True)
        if not text.startswith(prompt):
            earlier = text[: spans[-1][1]] if spans else ""
            follows = loss_on == "all" and messages[number + 1 :]
            if number != learnt[-1] or follows or not prompt.startswith(earlier):
                reason = "the prompt that inference renders is not how the text begins"
                raise TemplateError(f"turn {number + 1}: {reason}; {LAST}")
            messages = messages[: number + 1]
            text = put_behind(tokenizer, messages, prompt)
        content, start = messages[number]["content"], len(prompt)
        plain = content.strip() + closing
        end = start + len(plain)
        if not (closing and text.startswith(plain, start)):
            end = find_end(tokenizer, messages, number, text, closing)
        if not holds(text[start:end], content):
            raise TemplateError(f"turn {number + 1}: {LOST}")
        spans.append((start, end))
    return text, [(0, len(text))] if loss_on == "all" else spans


def put_behind(tokenizer: Tokenizer, messages: Messages, prompt: str) -> str:
    """Returns inference's prompt, and the last answer with its end as rendered."""
    text = write_text(tokenizer, messages)
    if text.startswith(prompt):
        return text
    before, _, after = mark(tokenizer, messages, len(messages) - 1).partition(MARK)
    body = text[len(before) : len(text) - len(after)]
    if before + body + after != text or not holds(body, messages[-1]["content"]):
        raise TemplateError(f"turn {len(messages)}: {LOST}")
    at = len(os.path.commonprefix([prompt, before]))
    header = before[at:]
    if more := prompt[at:].strip():
        if not header.strip() and body.lstrip().startswith(more):
            body = body.lstrip()[len(more) :].lstrip()  # the prompt has it already
        opening = answer_marks(tokenizer)[0]
        known = header.strip() and opening.strip() and prompt.endswith(opening)
        header = before.rpartition(opening)[2] if known and opening in before else ""
    return prompt + header + body + after


def find_end(
    tokenizer: Tokenizer, messages: Messages, number: int, text: str, closing: str
) -> int:
    """Returns the end of a turn in a text, after the tokens that end it."""
    if number + 1 == len(messages):
        return len(text.rstrip())
    after = mark(tokenizer, messages, number).partition(MARK)[2]
    if not text.endswith(after):
        raise TemplateError(f"turn {number + 1}: {LOST}")
    # an earlier answer may be ended otherwise than the last one
    tokens = [closing, *map(str, tokenizer.added_tokens_decoder.values())]
    ends = [t for t in tokens if closing and after.lstrip().startswith(t)]
    rest = after.lstrip().removeprefix(max(ends, key=len)) if ends else after
    return len(text) - len(rest)


def mark(tokenizer: Tokenizer, messages: Messages, number: int) -> str:
    """Returns the text of a conversation with MARK as the content of a turn."""
    turn = {**messages[number], "content": MARK}
    return write_text(tokenizer, [*messages[:number], turn, *messages[number + 1 :]])


def holds(text: str, content: str) -> bool:
    """Returns whether a text has all of a content but white space and tags."""
    if content.strip() in text:
        return True
    as_json = json.dumps(content, ensure_ascii=False)[1:-1]
    pieces = re.split(r"<[^<>\s]+>", as_json if as_json in text else content)
    pattern = ".*?".join(re.escape("".join(piece.split())) for piece in pieces)
    return re.search(pattern, "".join(text.split())) is not None
