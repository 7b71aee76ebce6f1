"""Rows of tokens and labels, many in two flat arrays: cut, counted, and checked.

The guards look at every row before training, not at a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from helpers.formats import DataError
from helpers.frames import Rows
from helpers.templates import stop_token_ids
from helpers.turns import NO_LOSS, LossOn

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ANY_LENGTH = 2**31


class Block:
    """Some rows, and what is left of them within `max_length`.

    Attributes:
        ids: token ids of all rows, (tokens,).
        labels: the same, -100 = no loss, (tokens,).
        starts: where each row begins, (rows,).
        lengths: tokens of each row, (rows,).
        ends: tokens of each row up to its last supervised one, (rows,).
        kept: rows that have a supervised token within `max_length`, (rows,) of bool.
        cut: kept rows that are longer than that, (rows,) of bool.
    """

    def __init__(self, rows: Rows, max_length: int | None = None) -> None:
        self.ids, self.labels, self.lengths = rows
        count = len(self.lengths)
        self.starts = np.cumsum(self.lengths) - self.lengths
        limit = max_length or ANY_LENGTH
        row = np.repeat(np.arange(count), self.lengths)
        place = np.arange(len(self.ids)) - self.starts[row]
        learnt = self.labels != NO_LOSS
        self.ends = np.zeros(count, int)
        self.ends[row[learnt]] = place[learnt] + 1  # of several the last one stays
        self.kept = np.bincount(row[learnt & (place < limit)], minlength=count) > 0
        self.cut = self.kept & (self.lengths > limit)
        within = self.kept[row] & (place < limit)
        self.left = self.ids[within], self.labels[within]
        self.left_lengths = np.minimum(self.lengths, limit)[self.kept]

    def batch(self, schema: pa.Schema) -> pa.RecordBatch:
        """Returns what is left as lists of `input_ids` and `labels`."""
        import pyarrow as pa

        offsets = pa.array(np.cumsum([0, *self.left_lengths]), pa.int32())
        columns = [pa.ListArray.from_arrays(offsets, pa.array(x)) for x in self.left]
        return pa.record_batch(columns, schema=schema)


def check_block(
    tokenizer: PreTrainedTokenizerBase, block: Block, loss_on: LossOn, before: int = 0
) -> None:
    """Raises DataError when training on these labels would go silently wrong.

    Guards against a doubled BOS, and supervised turns that do not end in a stop token,
    in every row.

    Args:
        tokenizer: what made the tokens.
        block: the rows.
        loss_on: with `all` turns need no stop token.
        before: number of rows in earlier blocks, for the message.

    Raises:
        DataError: a guard is broken; the message names the first row, from 1.
    """
    bos = tokenizer.bos_token_id
    long = block.starts[block.lengths > 1]
    doubled = long[(block.ids[long] == bos) & (block.ids[long + 1] == bos)]
    if bos is not None and len(doubled):
        row = before + 1 + int(np.searchsorted(block.starts, doubled[0], "right")) - 1
        raise DataError(
            f"{len(doubled)} rows start with {tokenizer.bos_token} twice, the first is "
            f"row {row}; the template writes it, so it must not be added again"
        )
    if loss_on == "all":
        return
    learnt = block.labels != NO_LOSS
    last = learnt & ~np.append(learnt[1:], False)
    row_ends = block.starts + block.lengths - 1
    last[row_ends] = learnt[row_ends]
    stops = stop_token_ids(tokenizer)
    # where a question comes last, the answer before it may end in another token
    ends = np.array([*stops, *tokenizer.added_tokens_decoder])
    open_ended = np.flatnonzero(last & ~np.isin(block.ids, ends))
    if len(open_ended):
        at = int(open_ended[0])
        row = int(np.searchsorted(block.starts, at, "right"))
        said = tokenizer.decode(block.ids[max(0, at - 20) : at + 1].tolist())
        raise DataError(
            f"{len(open_ended)} of {int(last.sum())} answers do not end in a stop "
            f"token ({', '.join(tokenizer.convert_ids_to_tokens(stops))}), so the "
            f"model would not learn to stop; the first, in row {before + row}, ends "
            f"in {said!r}; use a template that ends turns with EOS"
        )


def check_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError when a tokenizer pads with the token that ends answers."""
    eos = tokenizer.eos_token_id
    if eos is not None and tokenizer.pad_token_id == eos:
        raise DataError(
            f"pad and EOS are the same token ({tokenizer.eos_token}): no loss is taken "
            "on padding, so the model would not learn to stop; let "
            "templates.prepare_tokenizer choose another pad token"
        )
