"""Token ids and labels of conversations, guarded row by row, and shown to a human."""

import html
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from helpers.data.formats import Messages
from helpers.errors import DataError, TemplateError
from helpers.masking import templates
from helpers.masking.templates import LossOn, Text, Tokenizer, answer_marks, find_spans

NO_LOSS = -100
BATCH = 512  # conversations in memory at a time
Example = dict[str, list[int]]


class Masked(NamedTuple):
    rows: Any  # a Dataset of `input_ids` and `labels`, both (seq,); -100 = no loss
    dropped: str  # how many conversations, and why; empty if none
    ends: list[int]  # tokens of each conversation up to its last learnt one, uncut
    counts: dict[str, Any]  # the figures of labels.json


def mask_conversation(
    tokenizer: Tokenizer,
    messages: Messages,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Example:
    """Returns `input_ids` and `labels`, both (seq,); -100 = no loss.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the turns; answers of `"weight": 0` are not learnt.
        loss_on: `assistant` (answers and their end-of-turn tokens), `last`, or `all`.
        max_length: tokens past it are cut off.

    Raises:
        TemplateError: the template refuses it, or would have it teach another text.
    """
    plain, closing = templates.neutralise(tokenizer, messages), answer_marks(tokenizer)
    text = find_spans(tokenizer, plain, loss_on, closing[1])
    (row,) = tokenise(tokenizer, [text])
    return {name: values[:max_length] for name, values in row.items()}


def tokenise(tokenizer: Tokenizer, texts: list[Text]) -> list[Example]:
    """Returns ids and labels of texts; a token not wholly inside a span has no loss."""
    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()  # an earlier call may have left them on
    encoder.no_padding()
    rows = encoder.encode_batch([text for text, _ in texts], add_special_tokens=False)
    examples = []
    for row, (text, spans) in zip(rows, texts, strict=True):
        ids, offsets = row.ids, row.offsets
        labels = [NO_LOSS] * len(ids)
        for start, end in spans:
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            # some tokenizers leave spaces before a token out of its offsets
            first += first > 0 and offsets[first - 1][1] < start
            while 0 < last < len(ids) and offsets[last - 1][1] < end:
                last += 1
            # an end-of-turn token may take the white space after it with it
            while last > first and text[end : offsets[last - 1][1]].strip():
                last -= 1
            labels[first:last] = ids[first:last]
        examples.append({"input_ids": ids, "labels": labels})
    return examples


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
        tokenizer, loss_on, max_length: see `mask_conversation`.
        conversations: read one after the other, so they need not fit in memory.
        file: a new Arrow file for the rows; without it they are kept in memory.
        drop: leave out conversations that `mask_conversation` refuses.

    Raises:
        DataError, TemplateError: no row has an answer, or one breaks a guard.
    """
    import pyarrow as pa
    from datasets import Dataset

    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError("pad and EOS are the same token: use masking.prepare_tokenizer")
    closing = answer_marks(tokenizer)[1]
    # where a question comes last, the answer before it may end in another token
    stops = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    stops = set() if loss_on == "all" else stops
    dropped, counts, ends = dict[int, str](), Counter[str](), list[int]()

    def render_all() -> Iterator[Text]:
        for number, messages in enumerate(conversations, 1):
            try:
                plain = templates.neutralise(tokenizer, messages)
                counts["neutralised"] += plain is not messages
                counts["thoughts"] += any("</think>" in m["content"] for m in messages)
                yield find_spans(tokenizer, plain, loss_on, closing)
            except TemplateError as error:
                if not drop:
                    raise TemplateError(f"row {number}: {error}") from error
                dropped[number] = str(error)
                yield "", []

    schema = pa.schema(dict.fromkeys(["input_ids", "labels"], pa.list_(pa.int32())))
    out = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    texts = render_all()
    with out, pa.ipc.new_stream(out, schema) as writer, ThreadPoolExecutor(1) as pool:
        batch = list(islice(texts, BATCH))
        while batch:
            encoding = pool.submit(tokenise, tokenizer, batch)
            batch = list(islice(texts, BATCH))  # rendered while the former is encoded
            examples = []
            for row in encoding.result():
                number = len(ends) + 1
                ends.append(check_row(tokenizer, row, number, stops))
                cut = {name: values[:max_length] for name, values in row.items()}
                size = len(cut["labels"])
                if learnt := size - cut["labels"].count(NO_LOSS):
                    examples.append(cut)
                    counts.update(tokens=size, learnt=learnt)
                    counts["truncated"] += size < len(row["labels"])
                else:
                    where = "within max_length" if ends[-1] else "to learn"
                    dropped.setdefault(number, f"no answer {where}")
            writer.write_batch(pa.RecordBatch.from_pylist(examples, schema))
    rows = Dataset.from_file(str(file)) if file else Dataset.from_buffer(out.getvalue())
    numbers = sorted(dropped)
    reasons = "; ".join(f"row {n}: {dropped[n]}" for n in numbers[:3])
    summary = f"{len(numbers)} of {len(ends)} conversations are left out: {reasons}"
    if not len(rows):
        raise DataError(f"no token to learn from within {max_length=}: {summary}")
    share = counts["learnt"] / counts["tokens"]
    if share == 1 and loss_on != "all":
        raise DataError("every token would be learnt: no row has a prompt")
    figures = {"rows": len(rows), "dropped": len(numbers), "dropped_rows": numbers[:20]}
    figures |= {name: counts[name] for name in ("truncated", "neutralised", "thoughts")}
    figures["supervised_fraction"] = share
    return Masked(rows, summary if dropped else "", ends, figures)


def check_row(tokenizer: Tokenizer, row: Example, number: int, stops: set[int]) -> int:
    """Returns the number of tokens up to the last learnt one; refuses silent faults."""
    ids = row["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(f"row {number} starts with {tokenizer.bos_token} twice")
    learnt = bytes(map(NO_LOSS.__ne__, row["labels"]))
    ends = [run.end() for run in re.finditer(b"\1+", learnt)]
    for end in ends if stops else []:
        if ids[end - 1] not in stops:
            tail = tokenizer.decode(ids[:end])[-60:]
            raise DataError(f"row {number}: an answer ends in no stop token: {tail!r}")
    return ends[-1] if ends else 0


class Shown(str):
    """A row with its learnt tokens in brackets, which a notebook underlines."""

    def _repr_html_(self) -> str:
        page = html.escape(self).replace("⟦", "<u>").replace("⟧", "</u>")
        return f'<pre style="white-space:pre-wrap">{page}</pre>'


def show(tokenizer: Tokenizer, row: Example) -> Shown:
    """Returns a view of a row in which the learnt tokens stand out."""
    text, pairs = "", zip(row["input_ids"], row["labels"], strict=True)
    for learnt, run in groupby(pairs, lambda pair: pair[1] != NO_LOSS):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"⟦{piece}⟧" if learnt else piece
    share = 1 - row["labels"].count(NO_LOSS) / max(1, len(row["labels"]))
    return Shown(f"{text}\n⟦...⟧ = learnt, {share:.0%} of the tokens")
