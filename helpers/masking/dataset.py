"""Token ids and labels of conversations, guarded row by row, and shown to a human.

Labels are stored with the tokens, so packing and any collator keep them.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.data.formats import Messages
from helpers.errors import DataError, TemplateError
from helpers.masking.spans import NO_LOSS, LossOn, Span, find_spans, label_tokens
from helpers.masking.templates import answer_marks, stop_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

BATCH = 512  # conversations in memory at a time
Example = dict[str, list[int]]
Text = tuple[str, list[Span]]  # a rendered conversation, and what to learn of it


@dataclass
class Masked:
    """Tokenised rows, and what was left out."""

    rows: Dataset  # `input_ids` and `labels` each, both (seq,); -100 = no loss
    dropped: dict[int, str]  # position and reason
    ends: list[int]  # tokens of each conversation up to its last learnt one, uncut
    counts: dict[str, Any]  # the figures of labels.json

    def describe_dropped(self) -> str:
        """Returns how many conversations were dropped, which ones, from 1, and why."""
        rows = ", ".join(map(str, self.counts["dropped_rows"]))
        reasons = Counter(self.dropped.values()).most_common(3)
        return (
            f"{len(self.dropped)} of {len(self.ends)} conversations are left out (rows "
            f"{rows}{', ...' if len(self.dropped) > 20 else ''}): "
            + "; ".join(f"{reason} ({count})" for reason, count in reasons)
        )


def mask_conversation(
    tokenizer: Tokenizer,
    messages: Messages,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Example:
    """Returns `input_ids` and `labels`, both (seq,); -100 = no loss.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the turns; those of `"weight": 0` are not learnt.
        loss_on: `assistant` supervises every answer and its end-of-turn token, `last`
            only the last answer, `all` every token.
        max_length: tokens past it are cut off.

    Raises:
        TemplateError: the template refuses it, or would have it teach another text.
    """
    text = find_spans(tokenizer, messages, loss_on, answer_marks(tokenizer))
    *_, (row,) = tokenise(tokenizer, [text])
    return {name: values[:max_length] for name, values in row.items()}


def tokenise(tokenizer: Tokenizer, texts: Iterable[Text]) -> Iterator[list[Example]]:
    """Yields the rows of texts, a batch at a time."""
    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()  # an earlier call may have left them on
    encoder.no_padding()

    def encode(batch: list[Text]) -> list[Example]:
        plain = [text for text, _ in batch]
        rows = encoder.encode_batch(plain, add_special_tokens=False)
        return [
            {"input_ids": row.ids, "labels": label_tokens(row.ids, row.offsets, *text)}
            for row, text in zip(rows, batch, strict=True)
        ]

    texts = iter(texts)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(encode, [])
        # a batch is encoded while the next one is rendered
        while batch := list(islice(texts, BATCH)):
            following = pool.submit(encode, batch)
            yield pending.result()
            pending = following
        yield pending.result()


def mask_conversations(
    tokenizer: Tokenizer,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    file: Path | None = None,
    drop: bool = False,
) -> Masked:
    """Returns the tokenised rows, with what was dropped and cut.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        conversations: read one after the other, so they need not fit in memory.
        loss_on: see `mask_conversation`.
        max_length: tokens past it are cut off.
        file: a new Arrow file for the rows; without it they are kept in memory.
        drop: leave out conversations that `mask_conversation` refuses.

    Raises:
        DataError: no row has a supervised token, or the labels of one break a guard.
        TemplateError: see `mask_conversation`.
    """
    import pyarrow as pa

    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError(
            f"pad and EOS are the same token ({tokenizer.eos_token}): stopping would "
            "not be learnt; masking.prepare_tokenizer chooses another pad token"
        )
    marks = answer_marks(tokenizer)
    # where a question comes last, the answer before it may end in another token
    closing = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    if loss_on == "all":
        closing = set()
    dropped: dict[int, str] = {}
    ends: list[int] = []
    counts = Counter[str]()

    def render_all() -> Iterator[Text]:
        for number, messages in enumerate(conversations):
            try:
                yield find_spans(tokenizer, messages, loss_on, marks)
            except TemplateError as error:
                if not drop:
                    raise TemplateError(f"row {number + 1}: {error}") from error
                dropped[number] = str(error)
                yield "", []

    def cut(row: Example) -> Example | None:
        ends.append(check_row(tokenizer, row, len(ends) + 1, closing))
        labels = row["labels"][:max_length]
        learnt = len(labels) - labels.count(NO_LOSS)
        if not learnt:
            late = "no answer begins within max_length"
            why = late if ends[-1] else "there is no answer to learn"
            dropped.setdefault(len(ends) - 1, why)
            return None
        counts["truncated"] += len(labels) < len(row["labels"])
        counts.update(tokens=len(labels), learnt=learnt)
        return {"input_ids": row["input_ids"][:max_length], "labels": labels}

    kind = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": kind, "labels": kind})
    batches = tokenise(tokenizer, render_all())
    rows = store(([x for x in map(cut, batch) if x] for batch in batches), schema, file)
    fraction = counts["learnt"] / max(1, counts["tokens"])
    dropped = dict(sorted(dropped.items()))  # rendering runs ahead
    figures: dict[str, Any] = {"rows": len(rows), "dropped": len(dropped)}
    figures["dropped_rows"] = [number + 1 for number in [*dropped][:20]]
    figures |= {"truncated": counts["truncated"], "supervised_fraction": fraction}
    masked = Masked(rows, dropped, ends, figures)
    if not len(rows):
        raise DataError(
            f"no token to learn from within {max_length=}: {masked.describe_dropped()};"
            " raise max_length, or check the roles of the turns"
        )
    if loss_on != "all" and not 0.01 <= fraction <= 0.99:
        text = tokenizer.decode([x for x in rows[0]["labels"] if x != NO_LOSS])
        raise DataError(
            f"{fraction:.1%} of the tokens carry loss; 1 % to 99 % is plausible. "
            f"Row 1 learns {text[:200]!r}"
        )
    return masked


def store(batches: Iterable[list[Example]], schema: Any, file: Path | None) -> Dataset:
    """Returns batches of rows as a dataset in an Arrow file; in memory without one."""
    import pyarrow as pa
    from datasets import Dataset

    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return (
        Dataset.from_file(str(file)) if file else Dataset.from_buffer(sink.getvalue())
    )


def check_row(
    tokenizer: Tokenizer, row: Example, number: int, closing: set[int]
) -> int:
    """Returns the number of tokens up to the last learnt one; refuses silent faults."""
    ids, labels = row["input_ids"], row["labels"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(
            f"row {number} starts with {tokenizer.bos_token} twice: the template "
            "writes it, so it must not be added again"
        )
    learnt = bytes(map(NO_LOSS.__ne__, labels))
    ends = [run.end() for run in re.finditer(b"\1+", learnt)]
    for end in ends if closing else []:
        if ids[end - 1] not in closing:
            stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
            raise DataError(
                f"row {number}: an answer does not end in a stop token ({stops}) but "
                f"in {tokenizer.decode(ids[:end])[-60:]!r}, so the model would not "
                "learn to stop; use a template that ends turns with EOS"
            )
    return ends[-1] if ends else 0


class Shown(str):
    """A row with its mask: brackets where it is printed, colours in a notebook."""

    page = ""

    def _repr_html_(self) -> str:
        return self.page


def show(tokenizer: Tokenizer, row: Example) -> Shown:
    """Returns a view of a row in which the learnt tokens stand out."""
    text = page = ""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learnt, run in groupby(pairs, lambda pair: pair[1] != NO_LOSS):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"[[{piece}]]" if learnt else piece
        tag = '<u style="background:#2e7d3255">{}</u>' if learnt else "{}"
        page += tag.format(html.escape(piece))
    share = 1 - row["labels"].count(NO_LOSS) / max(1, len(row["labels"]))
    legend = f"learnt, {share:.0%} of the tokens"
    page = f'<pre style="white-space:pre-wrap">{page}</pre>'
    view = Shown(f"{text}\n[[...]] = {legend}")
    view.page = f"{page}<small>underlined = {legend}</small>"
    return view
