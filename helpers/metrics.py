"""Text metrics of answers against references, and rates of classes.

ROUGE is rouge-score's (Google's, with the Porter stemmer), BLEU and chrF are
sacrebleu's with its defaults. ROUGE splits at everything but a-z and 0-9, so it is of
no use for languages in other scripts; chrF is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from helpers import intervals

ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ITEMS = (*ROUGE, "exact_match", "token_f1")
MOST_LABELS, LABEL_WORDS = 20, 5


@cache
def rouge_scorer() -> Any:
    """Returns rouge-score's scorer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def score(output: str, reference: str) -> dict[str, float]:
    """Returns the metrics of one answer, each from 0 to 1; ROUGE is the F measure.

    >>> found = score("The cat sat.", "a cat sat down")
    >>> round(found["rouge1"], 3), found["exact_match"], round(found["token_f1"], 3)
    (0.571, 0.0, 0.8)
    """
    found = rouge_scorer().score(reference, output)
    return {
        **{name: round(found[name].fmeasure, 4) for name in ROUGE},
        "exact_match": float(normal(output) == normal(reference)),
        "token_f1": round(token_f1(output, reference), 4),
    }


def normal(text: str) -> str:
    """Returns a text as SQuAD compares answers (Rajpurkar et al., arXiv:1606.05250).

    In small letters, without punctuation, articles and superfluous space.

    >>> normal("The  answer, is: A dog!")
    'answer is dog'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(output: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over words, as SQuAD's.

    Two texts without a word agree, as in its version 2 (arXiv:1806.03822).
    """
    first, second = normal(output).split(), normal(reference).split()
    if not first or not second:
        return float(first == second)
    shared = sum((Counter(first) & Counter(second)).values())
    return 2 * shared / (len(first) + len(second))


def summarise(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of a whole set; labels' too, where the references are such.

    Means of the items' own metrics come with a bootstrap interval. BLEU and chrF are
    of the whole corpus, 0 to 100, with sacrebleu's signature.

    Args:
        items: `output`, `reference` and `score`'s metrics each.
    """
    from sacrebleu.metrics import BLEU, CHRF

    outputs = [item["output"] for item in items]
    references = [item["reference"] for item in items]
    found: dict[str, Any] = {
        name: intervals.mean([item[name] for item in items]) for name in OF_ITEMS
    }
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        value = metric.corpus_score(outputs, [references])
        found[name] = {
            "score": round(value.score, 2),
            "signature": str(metric.get_signature()),
        }
    labels = find_labels(references)
    if labels:
        found["labels"] = classify(outputs, references, labels)
    return found


def find_labels(references: Sequence[str]) -> list[str]:
    """Returns the labels of a classification set, none where it is no such set.

    It is one when there are at most 20 different references, of at most five words,
    each twice or more on average.

    >>> find_labels(["Yes", "no", "yes.", "no"]), find_labels(["a cat", "a dog"])
    (['no', 'yes'], [])
    """
    labels = sorted({normal(text) for text in references})
    short = all(len(label.split()) <= LABEL_WORDS for label in labels)
    few = 1 < len(labels) <= min(MOST_LABELS, len(references) // 2)
    return labels if short and few else []


def classify(
    outputs: Sequence[str], references: Sequence[str], labels: list[str]
) -> dict[str, Any]:
    """Returns accuracy and, for each class, precision, recall and F1.

    An answer that is no label counts as wrong, and for no class.

    Args:
        outputs: the answers.
        references: the right labels.
        labels: all of them, as `find_labels` returns them.
    """
    from sklearn.metrics import precision_recall_fscore_support

    right = [normal(text) for text in references]
    said = [normal(text) for text in outputs]
    columns = precision_recall_fscore_support(
        right, said, labels=labels, zero_division=0.0
    )
    classes = {
        label: dict(
            zip(
                ("precision", "recall", "f1", "count"),
                (*(round(float(number), 4) for number in numbers[:3]), int(numbers[3])),
                strict=True,
            )
        )
        for label, *numbers in zip(labels, *columns, strict=True)
    }
    hits = sum(a == b for a, b in zip(right, said, strict=True))
    return {
        "accuracy": intervals.proportion(hits, len(right)),
        "macro_f1": round(sum(c["f1"] for c in classes.values()) / len(labels), 4),
        "no_label": sum(text not in labels for text in said),
        "classes": classes,
    }
