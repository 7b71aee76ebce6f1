"""Text metrics: by their packages, on texts whose values are known."""

from __future__ import annotations

import pytest

from helpers import metrics
from helpers.intervals import proportion


def scored(*pairs: tuple[str, str]) -> list[dict[str, object]]:
    """Items of outputs and references."""
    return [{"output": o, "reference": r, **metrics.score(o, r)} for o, r in pairs]


def test_a_text_against_itself_has_the_highest_metrics():
    found = metrics.summarise(scored(*[("Two birds sat on the old wall.",) * 2] * 2))
    assert all(found[name]["mean"] == 1.0 for name in metrics.OF_ITEMS)
    assert (found["bleu"]["score"], found["chrf"]["score"]) == (100.0, 100.0)


def test_a_constant_answer_has_low_metrics():
    found = metrics.summarise(
        scored(("yes", "Two birds sat on it."), ("yes", "No wall."))
    )
    assert all(found[name]["mean"] == 0.0 for name in metrics.OF_ITEMS)
    assert found["bleu"]["score"] == 0.0


def test_rouge_counts_shared_words_pairs_and_the_longest_sequence():
    found = metrics.score("the cat sat here", "the cat here sat down")
    # 4 of 4 and 4 of 5 words; 1 of 3 and 1 of 4 pairs; "the cat sat", 3 of 4 and 3 of 5
    assert found["rouge1"] == pytest.approx(8 / 9, abs=1e-4)
    assert found["rouge2"] == pytest.approx(2 / 7, abs=1e-4)
    assert found["rougeL"] == pytest.approx(6 / 9, abs=1e-4)


def test_bleu_is_that_of_the_corpus_and_says_how_it_was_made():
    import sacrebleu

    pairs = [("the cat sat on the mat", "the cat sat on a mat"), ("a b c d", "a b c d")]
    found = metrics.summarise(scored(*pairs))
    outputs, references = (list(side) for side in zip(*pairs, strict=True))
    expected = sacrebleu.corpus_bleu(outputs, [references]).score
    assert found["bleu"]["score"] == pytest.approx(expected, abs=6e-3)
    assert "tok:13a" in found["bleu"]["signature"]


@pytest.mark.parametrize(
    ("output", "reference", "f1"),
    [
        ("The cat.", "a CAT", 1.0),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "the", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1_is_that_of_squad(output, reference, f1):
    assert metrics.token_f1(output, reference) == pytest.approx(f1)


def test_classes_get_accuracy_precision_recall_and_f1():
    references = ["positive", "positive", "positive", "negative", "negative"]
    outputs = ["Positive.", "negative", "I like it", "negative", "positive"]
    labels = metrics.find_labels(references)
    found = metrics.classify(outputs, references, labels)
    assert found["accuracy"] == proportion(2, 5)
    assert found["classes"]["positive"] == {
        "precision": 0.5,
        "recall": 0.3333,
        "f1": 0.4,
        "count": 3,
    }
    assert found["classes"]["negative"]["f1"] == 0.5
    assert (found["macro_f1"], found["no_label"]) == (0.45, 1)


def test_the_labels_of_a_set_are_reported_with_its_texts():
    found = metrics.summarise(
        scored(("yes", "yes"), ("no", "yes"), ("no", "no"), ("", "no"))
    )
    assert found["labels"]["accuracy"] == proportion(2, 4)
    assert set(found["labels"]["classes"]) == {"yes", "no"}


@pytest.mark.parametrize(
    "references",
    [
        ["a long answer about some thing or other"] * 4 + ["no"] * 4,
        ["yes"] * 8,
        [f"answer {n}" for n in range(8)],
    ],
)
def test_other_sets_have_no_labels(references):
    assert metrics.find_labels(references) == []
