"""Chat templates: render a conversation, and check what would go silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama-3.x templates print today's date; a fixed one keeps tokens the same tomorrow.
FIXED_DATE = "26 Jul 2024"
FIXED_DAY = date(2024, 7, 26)
# From a plane for private use: neither data nor templates have it.
MARK = "\U000f0000"

# For base models that ship no chat template.
INSTRUCTION_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Llama-2's chat format: each pair of turns is a text of its own, BOS to EOS.
LLAMA2_TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m['content'] | trim + '\n<</SYS>>\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ bos_token }}"
    "{{ '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"instruction": INSTRUCTION_TEMPLATE, "llama-2": LLAMA2_TEMPLATE}


def template_text(template: str) -> str | None:
    """Returns the text of a template that a config names, None for the tokenizer's own.

    Args:
        template: `own`, a name of `TEMPLATES`, or the path of a Jinja file, from here
            or from the folder of `runs/`.

    Raises:
        TemplateError: there is no such name or file, or the file is not UTF-8.
    """
    if template == "own" or template in TEMPLATES:
        return TEMPLATES.get(template)
    folders = dict.fromkeys([Path.cwd(), runtime.home()])
    path = next((f / template for f in folders if (f / template).is_file()), None)
    if path is None:
        raise TemplateError(
            f"template={template!r} is neither {', '.join(['own', *TEMPLATES])} nor a "
            f"file (looked in {' and '.join(map(str, folders))})"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TemplateError(f"template {path} is not UTF-8: save it so") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    for_generation: bool = False,
) -> str:
    """Returns the text of a conversation, with exactly one BOS where there is one.

    Tokenise it with `add_special_tokens=False`: every special token is in the text.

    Args:
        tokenizer: it carries the template.
        messages: the turns; `weight` is not shown to the template.
        for_generation: end with the header of the assistant's next turn.

    Raises:
        TemplateError: the template refuses the conversation.
    """
    from jinja2 import TemplateError as Refused

    try:
        text = tokenizer.apply_chat_template(
            [{k: v for k, v in m.items() if k != "weight"} for m in messages],
            tokenize=False,
            add_generation_prompt=for_generation,
            date_string=FIXED_DATE,
            strftime_now=FIXED_DAY.strftime,
        )
    # what Python raises on an expression comes through as it is
    except (Refused, TypeError, ValueError, ArithmeticError, LookupError) as error:
        roles = " ".join(m["role"] for m in messages)
        raise TemplateError(
            f"the template refuses a conversation of {roles}: {error}"
        ) from error
    bos = tokenizer.bos_token
    if bos is None or text.startswith(bos) or not tokenizer.num_special_tokens_to_add():
        return text
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos else text


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    template: str = "own",
    pad_token: str | None = None,
) -> list[str]:
    """Makes a tokenizer fit to train with; returns a note on each change.

    A missing chat template becomes the `### Instruction` one. A pad token that is EOS
    becomes another one, even where EOS is asked for: no loss is taken on padding, so
    the model would never learn to stop.

    Args:
        tokenizer: it is changed in place.
        template: see `template_text`.
        pad_token: a token of the vocabulary, `eos`, or None to choose one.

    Raises:
        TemplateError: there is no such template, or the tokenizer has no EOS token, no
            such pad token, or none to pad with.
    """
    notes = []
    if tokenizer.eos_token_id is None:
        raise TemplateError("the tokenizer has no EOS token; set tokenizer.eos_token")
    text = template_text(template)
    if text is None and isinstance(tokenizer.chat_template, dict):
        names = list(tokenizer.chat_template)
        if "default" not in names:
            raise TemplateError(
                f"the tokenizer has {len(names)} chat templates ({', '.join(names)}), "
                "none called 'default'; save one as a file: template='path.jinja'"
            )
        text = tokenizer.chat_template["default"]
        notes.append(f"chat template: 'default', of {', '.join(names)}")
    if text is None and not tokenizer.chat_template:
        text = INSTRUCTION_TEMPLATE
        notes.append("no chat template: '### Instruction / ### Response' is used")
    tokenizer.chat_template = text or tokenizer.chat_template
    as_eos = pad_token in ("eos", tokenizer.eos_token)
    if pad_token is not None and not as_eos:
        if pad_token not in tokenizer.get_vocab():
            raise TemplateError(
                f"{pad_token=} is not in the vocabulary; leave it null for "
                f"{find_pad_token(tokenizer)!r}"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        before = tokenizer.pad_token
        tokenizer.pad_token = find_pad_token(tokenizer)
        notes.append(
            f"pad token was {before}, is {tokenizer.pad_token} (EOS is learnt)"
        )
    if as_eos:
        warnings.warn(
            f"padding with EOS ({tokenizer.eos_token}): EOS would never be learnt and "
            f"answers would not end, so {tokenizer.pad_token} pads instead",
            stacklevel=2,
        )
    return notes


def find_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a special token to pad with that is neither EOS nor BOS."""
    added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    written = str(tokenizer.chat_template)
    tokens = [token for token in added if "pad" in token.lower()]
    tokens += [str(tokenizer.unk_token), *(t for t in added if "reserved" in t)]
    tokens += [t for t, special in added.items() if special and t not in written]
    for token in tokens:
        if token not in (tokenizer.eos_token, tokenizer.bos_token, "None"):
            return token
    raise TemplateError(
        f"pad is EOS ({tokenizer.eos_token}) and no other special token can pad; add "
        "one: tokenizer.add_special_tokens({'pad_token': '<pad>'}) and resize the model"
    )


def answer_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns what a template writes before an answer and after the last one.

    Raises:
        TemplateError: the template does not print contents that are text.
    """
    question, answer = MARK, "\U000f0001"
    messages = [{"role": "user", "content": question}]
    prompt = render(tokenizer, messages, for_generation=True)
    text = render(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if question not in prompt or answer not in text:
        raise TemplateError(
            "the template does not print contents that are text; it is made for lists "
            "of parts: choose a template for text"
        )
    return prompt.partition(question)[2], text.partition(answer)[2].strip()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end an assistant's turn: EOS, and what the template puts."""
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({tokenizer.eos_token_id, *special.intersection(ids)})
