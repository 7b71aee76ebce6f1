"""Proves that `helpers.masking` labels exactly the right tokens, by template.

    python benchmarks/masks.py [OUT.json]    # -> results/masks.json, in a minute

Every chat template that the installed `unsloth` and `trl` ship is read from them
(`chats`), put on the offline model's tokenizer with its special tokens, and asked to
render a battery of conversations. The label ids of `masking` are compared with

- oracle: what the text itself says, with the formats written down by hand (`oracle`);
- unsloth: `train_on_responses_only`, with the markers that it detects itself;
- trl: the mask of `assistant_only_loss`, on TRL's training template.

The rules. Learnt is what the model has to say itself: all that follows the format's
header, through the end-of-turn token or tokens. What a generation prompt adds to the
header (an opened or empty `<think>`) is not learnt as far as it stands in the text;
what only the template writes before an answer (the channel of gpt-oss) is. White space
after the end-of-turn token is not learnt; an EOS that ends the last answer is. Content
that the template trims is learnt as rendered. A token is learnt when all its characters
are, so one that header and answer share is not. With `loss_on="last"` it is the last
answer alone. Before each answer stands the prompt that inference renders for the turns
before it. A conversation that a template refuses, leaves out text of, or asks for an
earlier answer of with another prompt is skipped, and `masking` has to refuse it too;
the last answer is put behind inference's prompt. A template that renders no text, or
ends no answer with a token, is unsupported. Differences are put in words by
`differences`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import oracle  # noqa: E402
from benchmarks.chats import (  # noqa: E402
    SPECIAL,
    THOUGHT,
    Template,
    battery,
    fit_tokenizer,
    trl_templates,
    turns,
    unsloth_templates,
)
from benchmarks.differences import Row, Theirs, describe  # noqa: E402
from benchmarks.markdown import to_markdown  # noqa: E402
from helpers.data.formats import arrange  # noqa: E402
from helpers.errors import DataError, TemplateError  # noqa: E402
from helpers.masking.dataset import NO_LOSS, check_row, mask_conversation  # noqa: E402
from helpers.masking.templates import FIXED  # noqa: E402

RESULTS = ROOT / "results" / "masks.json"


def ask(
    tokenizer: Any, loss_on: Literal["assistant", "last"] = "assistant"
) -> tuple[list[Row], dict[str, str], Counter[str]]:
    """Returns the battery under a template, what is skipped and why, and our faults.

    Raises:
        Skipped: the template is unsupported.
    """
    header, ends = oracle.find_format(tokenizer)
    # templates cut thoughts out of an answer: "reasoning" asks for that
    own = [t for t in SPECIAL.findall(tokenizer.chat_template) if t not in THOUGHT]
    markers = " ".join([*dict.fromkeys(own), f"{header}x{ends[0]}"])
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    faults = Counter[str]()
    for name, messages in battery(markers, ends[0]).items():
        try:
            ours, refusal = mask_conversation(tokenizer, messages, loss_on), ""
        except TemplateError as error:
            ours, refusal = {}, str(error)
        try:
            text, answers = oracle.find_answers(
                tokenizer, messages, header, ends, last_only=loss_on == "last"
            )
        except oracle.Skipped as reason:
            skipped[name] = str(reason)
            # the text of earlier answers may be missing
            if not refusal and loss_on == "assistant":
                faults[f"does not refuse: {reason}"] += 1
            continue
        if refusal:
            faults[f"refuses: {refusal}"] += 1
            continue
        ids = tokenizer(text, add_special_tokens=False).input_ids
        spans = oracle.character_spans(tokenizer, ids, text)
        rows.append(Row(messages, text, ids, spans, answers, ours))
    return rows, skipped, faults


def compare_oracle(tokenizer: Any, rows: list[Row], faults: Counter[str]) -> str:
    """Returns how the labels of `masking` compare with the oracle's."""
    ways = []
    for row in rows:
        if row.ours["input_ids"] != row.ids:
            ways.append({"other tokens"})
            continue
        expected = oracle.labels(row.ids, row.spans, row.answers)
        try:
            ways.append(describe(row, expected, row.ours["labels"], Theirs()))
        except ValueError as unexplained:
            ways.append({str(unexplained)[:100]})
    try:
        closing = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
        for number, row in enumerate(rows, 1):
            check_row(tokenizer, row.ours, number, closing)
    except ValueError as error:
        faults[f"the guards refuse: {error}"] += 1
    return in_words(ways, faults)


def compare_unsloth(tokenizer: Any, rows: list[Row]) -> str:
    """Returns how Unsloth's labels compare with ours."""
    from unsloth_zoo.dataset_utils import get_chat_template_parts
    from unsloth_zoo.dataset_utils import train_on_responses_only as train_on

    try:
        question, answer = get_chat_template_parts(tokenizer)
    except ValueError as error:
        return f"unsupported: {str(error).removeprefix('Unsloth: ')}"
    mask = train_on(None, question, answer, tokenizer=tokenizer, return_function=True)
    labels = mask({"input_ids": [row.ids for row in rows]})["labels"]
    theirs = Theirs(question, answer, tokenizer.eos_token)
    pairs = zip(rows, labels, strict=True)
    return in_words([describe(row, row.ours["labels"], x, theirs) for row, x in pairs])


def compare_trl(tokenizer: Any, rows: list[Row]) -> str:
    """Returns how TRL's labels compare, on its training template, which is put on."""
    from trl.chat_template_utils import get_training_chat_template

    faults = Counter[str]()
    try:
        template = get_training_chat_template(tokenizer)
        if template is not None or not rows:
            tokenizer.chat_template = template or tokenizer.chat_template
            rows, _, faults = ask(tokenizer)
    except ValueError:
        return "unsupported: TRL has no training template for it"
    except oracle.Skipped as reason:
        return f"unsupported: {reason}"
    ways = []
    for row in rows:
        found = tokenizer.apply_chat_template(
            row.messages, return_dict=True, return_assistant_tokens_mask=True, **FIXED
        )
        if row.ids != found["input_ids"]:
            ways.append({"trains on another prompt than inference renders"})
            continue
        masked = zip(row.ids, found["assistant_masks"], strict=True)
        labels = [token if learnt else NO_LOSS for token, learnt in masked]
        ways.append(describe(row, row.ours["labels"], labels, Theirs()))
    return in_words(ways, faults)


def in_words(ways: list[set[str]], faults: Counter[str] | None = None) -> str:
    """Returns `equal`, or `differs: ...` with the number of conversations each way.

    >>> in_words([{"learns the header"}, {"learns the header"}, set()])
    'differs: learns the header (2 of 3); equal in 1 of 3'
    """
    counts = Counter(way for found in ways for way in found)
    counts.update(faults or {})
    if not counts:
        return "equal"
    said = [f"{way} ({n} of {len(ways)})" for way, n in sorted(counts.items())]
    return f"differs: {'; '.join(said)}; equal in {ways.count(set())} of {len(ways)}"


def compare(base: Any, template: Template, columns: set[str]) -> dict[str, Any]:
    """Returns the row of a template in results/masks.json."""
    tokenizer = fit_tokenizer(base, template)
    found: dict[str, Any] = {"name": template.names[0]}
    if template.names[1:]:
        found["same_text"] = template.names[1:]
    rows: list[Row] = []
    unsupported = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rows, skipped, faults = ask(tokenizer)
            last, _, more = ask(tokenizer, "last")
            found |= {"conversations": len(rows), "skipped": skipped}
            found["conversations_last"] = len(last)
            found["oracle"] = compare_oracle(tokenizer, [*rows, *last], faults + more)
        except oracle.Skipped as reason:
            found["oracle"] = unsupported = f"unsupported: {reason}"
        if "unsloth" in columns:
            found["unsloth"] = unsupported or compare_unsloth(tokenizer, rows)
        if "trl" in columns:
            found["trl"] = compare_trl(tokenizer, rows)
    return found


def table(path: Path = RESULTS) -> list[str]:
    """Returns the lines of results/README.md on the masks, a table among them."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows, columns = found["templates"], ("oracle", "unsloth", "trl")
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    lines = [f"`python benchmarks/masks.py`, {versions}.", ""]
    for column in columns:
        kinds = Counter(row[column].partition(":")[0] for row in rows)
        counts = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        lines.append(f"- {column}: {counts} of {len(rows)}")
    table = pd.DataFrame(rows)[["name", *columns]].rename(columns={"name": "template"})
    # a bar would end the cell
    return [*lines, "", to_markdown(table.map(lambda cell: cell.replace("|", "\\|")))]


def main(out: Path) -> None:
    # unsloth before the libraries that it patches
    templates = [*unsloth_templates(), *trl_templates()]
    from helpers.files import write_json
    from helpers.models.load import load_tokenizer

    base = load_tokenizer("smollm2-135m-offline")
    packages = ("unsloth", "unsloth_zoo", "trl", "transformers", "tokenizers")
    tool = [*turns("2 + 2?", "add(2, 2)"), {"role": "tool", "content": "4"}]
    rows = [compare(base, template, {"unsloth", "trl"}) for template in templates]
    try:
        arrange(tool)
        tool_turns = "read"
    except DataError as error:
        tool_turns = f"refused: {error}"
    found = {
        "versions": {name: version(name) for name in packages},
        "tool_turns": tool_turns,
        "templates": rows,
    }
    write_json(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
