"""How long a run's conversations are in tokens, and what `max_length` would cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.data import preparation as data
from helpers.data.formats import Messages
from helpers.masking.spans import learnt_spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from helpers.masking.dataset import LossOn
    from helpers.runs import Run

SAMPLE = 10_000


class Lengths(NamedTuple):
    """Token counts of the conversations that were measured."""

    tokens: list[int]
    """Of each conversation."""
    answers: list[list[tuple[int, int]]]
    """Where the learnt parts of each conversation start and end, in tokens."""
    rows: int
    """Conversations in the set; where there are more than measured, a sample was."""

    def cut_at(self, max_length: int) -> dict[str, int]:
        """Returns what is lost when every conversation is cut after so many tokens.

        >>> Lengths([6, 9], [[(2, 6)], [(1, 4), (6, 9)]], 2).cut_at(6)
        ... # doctest: +NORMALIZE_WHITESPACE
        {'max_length': 6, 'rows_cut': 1, 'answers_cut': 1, 'rows_without_answer': 0,
         'tokens_lost': 3}
        """
        return {
            "max_length": max_length,
            "rows_cut": sum(count > max_length for count in self.tokens),
            "answers_cut": sum(e > max_length for row in self.answers for _, e in row),
            "rows_without_answer": sum(
                all(start >= max_length for start, _ in row) for row in self.answers
            ),
            "tokens_lost": sum(max(0, count - max_length) for count in self.tokens),
        }

    def summary(self, max_length: int) -> dict[str, Any]:
        """Returns the figures for a report: sizes, quantiles, and what is cut."""
        ordered = sorted(self.tokens)
        at = {"median": 0.5, "p95": 0.95, "longest": 1.0}
        return {
            "rows": self.rows,
            "measured": len(ordered),
            "tokens": sum(ordered),
            "answers": sum(map(len, self.answers)),
            **{name: ordered[int(q * (len(ordered) - 1))] for name, q in at.items()},
            **self.cut_at(max_length),
        }


def measure(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    loss_on: LossOn = "assistant",
    sample: int = SAMPLE,
    drop: bool = False,
) -> Lengths:
    """Returns the lengths of conversations, of the first ones if there are many.

    `train.jsonl` is shuffled, so that its first conversations are a fair sample.

    Raises:
        DataError: there are no conversations.
        TemplateError: see `masking.mask_batches`, and there `drop`.
    """
    from helpers.masking.dataset import mask_batches

    rest = iter(conversations)
    batches = mask_batches(tokenizer, islice(rest, sample), loss_on, drop)
    rows = [row["labels"] for x in batches for row in x if not isinstance(row, str)]
    if not rows:
        raise data.DataError("no conversations to measure; run data.prepare first")
    spans = list(map(learnt_spans, rows))
    return Lengths(list(map(len, rows)), spans, len(rows) + sum(1 for _ in rest))


def measure_run(run: Run, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """Returns the lengths of a run's training rows, and adds them to its report.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
    """
    config = run.config
    part = data.parts_of(config.data)[0]
    rows = data.stream_rows(run.require(f"data/{part}.jsonl"))
    conversations = (
        row["messages"]
        if "messages" in row
        else data.to_conversations([row], config.system_prompt)[0][0]
        for row in rows
    )
    drop = config.data.drop_unusable
    lengths = measure(tokenizer, conversations, config.loss_on, drop=drop)
    figures = {"part": part, **lengths.summary(config.max_length)}
    run.write_part("data", run.report().get("data", {}) | {"lengths": figures})
    return lengths


def draw(lengths: Lengths, max_length: int) -> Figure:
    """Returns a histogram of the lengths, with a line at `max_length`."""
    from matplotlib import pyplot

    # a pyplot figure: only these are displayed inline
    figure, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
    axes.hist(lengths.tokens, bins=40)
    axes.axvline(max_length, color="tab:red", linestyle="--", label="max_length")
    axes.legend()
    measured, rows = len(lengths.tokens), f"{lengths.rows:,} conversations"
    sample = measured < lengths.rows
    title = f"a sample of {measured:,} of {rows}" if sample else rows
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="tokens", ylabel="conversations")
    return figure
