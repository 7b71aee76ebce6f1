"""Tests of helpers.masking.lengths: what is counted is what training would cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from helpers.data import preparation as data
from helpers.data.formats import Messages
from helpers.errors import DataError
from helpers.masking import dataset as masking
from helpers.masking import lengths
from helpers.masking.templates import render
from helpers.runs import Run
from tests.rows import turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATS: list[Messages] = [
    turns("Hi", "Hello there, how are you?", "Fine", "Good."),
    turns("Tell me a long story about a snail " * 8, "No."),
    turns("Count!", "one two three four five six seven eight nine ten " * 5),
]


def test_tokens_are_those_of_the_rendered_conversation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [render(tokenizer, messages) for messages in CHATS]
    expected = [
        len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids
    ]
    assert lengths.measure(tokenizer, CHATS).tokens == expected


@pytest.mark.parametrize(
    ("loss_on", "count"),
    [("assistant", [2, 1, 1]), ("last", [1, 1, 1]), ("all", [1] * 3)],
)
def test_the_learnt_parts_are_those_of_the_labels(
    tokenizer: PreTrainedTokenizerFast, loss_on: masking.LossOn, count: list[int]
) -> None:
    found = lengths.measure(tokenizer, CHATS, loss_on)
    assert [len(spans) for spans in found.answers] == count
    for messages, spans in zip(CHATS, found.answers, strict=True):
        labels = masking.mask_conversation(tokenizer, messages, loss_on)["labels"]
        learnt = [at for at, label in enumerate(labels) if label != masking.NO_LOSS]
        assert [at for start, end in spans for at in range(start, end)] == learnt


@pytest.mark.parametrize("max_length", [40, 60, 100, 1000])
def test_what_is_cut_is_what_training_would_cut(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    cut = lengths.measure(tokenizer, CHATS).cut_at(max_length)
    masked = masking.mask_conversations(tokenizer, CHATS, max_length=max_length)
    whole = masking.mask_conversations(tokenizer, CHATS)
    assert cut["rows_without_answer"] == len(masked.dropped)
    assert cut["rows_cut"] == masked.truncated + len(masked.dropped)
    assert cut["answers_cut"] >= sum(end > max_length for end in masked.ends)
    before = sum(min(max_length, len(row["labels"])) for row in whole.rows)
    assert cut["tokens_lost"] == sum(len(r["labels"]) for r in whole.rows) - before


def test_every_answer_that_is_cut_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    found = lengths.measure(tokenizer, CHATS[:1])
    (first, second), length = found.answers[0], found.tokens[0]
    assert found.cut_at(first[1])["answers_cut"] == 1
    assert found.cut_at(first[1] - 1)["answers_cut"] == 2
    assert found.cut_at(second[1])["answers_cut"] == 0
    assert found.cut_at(length)["rows_cut"] == 0


def test_of_many_conversations_the_first_are_measured_and_all_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = lengths.measure(tokenizer, iter(CHATS * 5), sample=4)
    assert (len(found.tokens), found.rows) == (4, 15)
    assert found.tokens == lengths.measure(tokenizer, (CHATS * 2)[:4]).tokens


def test_no_conversations_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no conversations to measure; run data.prep"):
        lengths.measure(tokenizer, [])


def test_the_lengths_of_a_run_join_its_report(
    run: Run, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = data.prepare(run)
    found = lengths.measure_run(run, tokenizer)
    after = json.loads((run.path / "report.json").read_text())["data"]
    assert {name: after[name] for name in before} == before
    assert after["lengths"] == {"part": "train", **found.summary(256)}
    assert after["lengths"]["rows"] == before["train"] == len(found.tokens)


def test_a_run_of_grpo_alone_is_measured_on_its_problems(
    run_factory: Callable[..., Run], tokenizer: PreTrainedTokenizerFast
) -> None:
    run = run_factory(stages=["grpo"], data__train=[], data__eval=None)
    data.prepare(run)
    lengths.measure_run(run, tokenizer)
    assert run.report()["data"]["lengths"]["part"] == "problems"


def test_the_histogram_says_how_much_was_measured_and_marks_max_length() -> None:
    found = lengths.Lengths([5, 9, 9], [[(1, 5)], [(1, 9)], [(1, 9)]], rows=1200)
    (axes,) = lengths.draw(found, 8).axes
    assert axes.get_title() == "a sample of 3 of 1,200 conversations"
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert [list(line.get_xdata()) for line in axes.lines] == [[8, 8]]


def test_the_histogram_of_a_whole_set_speaks_of_no_sample() -> None:
    (axes,) = lengths.draw(lengths.Lengths([5], [[(1, 5)]], rows=1), 8).axes
    assert axes.get_title() == "1 conversations"
