"""Chat templates: render a conversation, and check what would go silently wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = logging.getLogger(__name__)
# Llama-3.x templates print today's date; a fixed one keeps tokens the same tomorrow.
FIXED_DATE = "26 Jul 2024"
FIXED_DAY = date(2024, 7, 26)
# from a plane for private use: neither data nor templates have it
MARK = "\U000f0000"

# for base models that ship none
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
    """Returns the text of a config's template, None for the tokenizer's own.

    A file is looked for here and in the folder of `runs/`.
    """
    if template == "own" or template in TEMPLATES:
        return TEMPLATES.get(template)
    file = runtime.find_local(template)
    if file and file.is_file():
        return file.read_text(encoding="utf-8-sig")
    raise TemplateError(
        f"template={template!r} is neither {', '.join(['own', *TEMPLATES])} nor a "
        f"file (looked in {Path.cwd()} and {runtime.HOME})"
    )


def render(
    tokenizer: Tokenizer,
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
    try:
        text = tokenizer.apply_chat_template(
            [{k: v for k, v in m.items() if k != "weight"} for m in messages],
            tokenize=False,
            add_generation_prompt=for_generation,
            date_string=FIXED_DATE,
            strftime_now=FIXED_DAY.strftime,
        )
    except Exception as error:  # whatever Python raises on the template's expressions
        roles = " ".join(m["role"] for m in messages)
        raise TemplateError(
            f"the template refuses a conversation of {roles}: {error}"
        ) from error
    bos = tokenizer.bos_token
    if not bos or text.startswith(bos):
        return text
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos else text


def prepare_tokenizer(
    tokenizer: Tokenizer, template: str = "own", pad_token: str | None = None
) -> None:
    """Makes a tokenizer fit to train with: a chat template, and a pad token of its own.

    No loss is taken on padding, so a model whose pad token is EOS never learns to stop.

    Args:
        tokenizer: it is changed in place.
        template: `own`, a name of `TEMPLATES`, or the path of a Jinja file. A tokenizer
            without one gets the `### Instruction` template.
        pad_token: a token of the vocabulary, or None to choose one; EOS is replaced.

    Raises:
        TemplateError: there is no such template or pad token, or no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise TemplateError("the tokenizer has no EOS token; set tokenizer.eos_token")
    text = template_text(template) or tokenizer.chat_template
    if not text:
        log.info("no chat template: '### Instruction / ### Response' is used")
    tokenizer.chat_template = text or INSTRUCTION_TEMPLATE
    as_eos = pad_token in ("eos", tokenizer.eos_token)
    if pad_token is not None and not as_eos:
        if pad_token not in tokenizer.get_vocab():
            raise TemplateError(f"{pad_token=} is not in the vocabulary; null will do")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = find_pad_token(tokenizer)
    if as_eos:
        warnings.warn(
            f"padding with EOS ({tokenizer.eos_token}): EOS would never be learnt and "
            f"answers would not end, so {tokenizer.pad_token} pads instead",
            stacklevel=2,
        )


def find_pad_token(tokenizer: Tokenizer) -> str:
    """Returns a special token to pad with that is neither EOS nor BOS."""
    added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    tokens = [token for token in added if "pad" in token.lower()]
    tokens += [str(tokenizer.unk_token), *(t for t in added if "reserved" in t)]
    template = str(tokenizer.chat_template)
    tokens += [t for t, special in added.items() if special and t not in template]
    for token in tokens:
        if token not in (tokenizer.eos_token, tokenizer.bos_token, "None"):
            return token
    raise TemplateError("no special token but EOS can pad; add one, resize the model")


def answer_marks(tokenizer: Tokenizer) -> tuple[str, str]:
    """Returns what a template writes before an answer and after the last one."""
    question, answer = MARK, "\U000f0001"
    messages = [{"role": "user", "content": question}]
    prompt = render(tokenizer, messages, for_generation=True)
    text = render(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if question not in prompt or answer not in text:
        raise TemplateError(
            "the template does not print contents that are text; choose one that does"
        )
    return prompt.partition(question)[2], text.partition(answer)[2].strip()


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that end an answer: EOS, and what the template puts."""
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({tokenizer.eos_token_id, *special.intersection(ids)})
