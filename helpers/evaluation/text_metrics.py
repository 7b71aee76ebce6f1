"""Text metrics of answers against references, and rates of class labels.

ROUGE is rouge-score's (Google's), BLEU and chrF are sacrebleu's. Their own tokenizers
read English; other scripts get one that can read them, and the result names it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import regex

from helpers.evaluation import stats as intervals

ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ITEMS = (*ROUGE, "exact_match", "token_f1")
# of scripts that write no spaces between words
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# a character of these, else the letters, marks and digits between two others
WORD = regex.compile(rf"(?={UNSPACED})\X|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{Nd}}])+")
CHARACTERS = 0.1  # share of such letters from which BLEU counts characters
CLASS_RATES = ("precision", "recall", "f1")


class Words:
    """A tokenizer for rouge-score: words of any script.

    ASCII is left to its own one, with the Porter stemmer. It drops everything else.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text; the characters, where words have no spaces."""
        if text.isascii():
            return self.english.tokenize(text)
        words: list[str] = []
        for word in WORD.findall(text.lower()):
            words += self.english.tokenize(word) if word.isascii() else [word]
        return words


@cache
def rouge_scorer() -> Any:
    """Returns rouge-score's scorer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=Words())


def score(output: str, reference: str) -> dict[str, float]:
    """Returns the metrics of one answer, each from 0 to 1; ROUGE is the F measure.

    >>> values = score("The cat sat.", "a cat sat down")
    >>> round(values["rouge1"], 3), values["exact_match"], round(values["token_f1"], 3)
    (0.571, 0.0, 0.8)
    >>> score("这只猫坐下了", "这只猫坐着")["rouge1"]
    0.7273
    """
    same = output.strip() == reference.strip()
    if same and not reference.isascii():  # one word has no ROUGE-2, an emoji no word
        return dict.fromkeys(OF_ITEMS, 1.0)
    rouge = rouge_scorer().score(reference, output)
    bare = normal(reference)
    return {
        **{name: round(rouge[name].fmeasure, 4) for name in ROUGE},
        "exact_match": float(same or bool(bare) and normal(output) == bare),
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

    Where words have no spaces, over characters. Two texts without a word agree if they
    are the same.
    """
    first, second = (
        [
            part
            for word in normal(text).split()
            for part in (WORD.findall(word) if regex.search(UNSPACED, word) else [word])
        ]
        for text in (output, reference)
    )
    if not first or not second:
        return float(output.strip() == reference.strip())
    shared = sum((Counter(first) & Counter(second)).values())
    return 2 * shared / (len(first) + len(second))


def summarise(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the text metrics of a whole set.

    Means of the items' own metrics come with a bootstrap interval. BLEU and chrF are
    of the whole corpus, 0 to 100. Each says how it was made in its signature.

    Args:
        items: `output`, `reference` and `score`'s metrics each.
    """
    from importlib.metadata import version

    from sacrebleu.metrics import BLEU, CHRF

    outputs = [item["output"] for item in items]
    references = [item["reference"] for item in items]
    values: dict[str, Any] = {
        name: intervals.mean([item[name] for item in items]) for name in OF_ITEMS
    }
    ascii_only = all(text.isascii() for text in references)
    words = "default" if ascii_only else "default, words and characters of all scripts"
    values["rouge"] = {
        "signature": f"stemmer:porter|tok:{words}|version:{version('rouge-score')}"
    }
    # of other scripts also where no answer has the four words that BLEU counts up to
    bleu = BLEU(tokenize=bleu_tokenizer(references), effective_order=not ascii_only)
    for name, metric in (("bleu", bleu), ("chrf", CHRF())):
        value = metric.corpus_score(outputs, [references])
        values[name] = {
            "score": round(value.score, 2),
            "signature": str(metric.get_signature()),
        }
    return values


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Returns the name of sacrebleu's tokenizer that reads the references' script.

    >>> [bleu_tokenizer([text]) for text in ("A cat.", "一只猫。", "ねこ")]
    ['13a', 'zh', 'char']
    """
    text = "".join(references)
    letters = regex.findall(UNSPACED, text)
    if len(letters) < max(1, CHARACTERS * len(regex.findall(r"\p{L}", text))):
        return "13a"
    return (
        "zh" if all(regex.match(r"\p{Han}", letter) for letter in letters) else "char"
    )


def same_label(output: str, label: str) -> bool:
    """Returns whether an answer is a label, as it is but for white space around it.

    >>> same_label(" C++\\n", "C++"), same_label("c++", "C++"), same_label("C", "C++")
    (True, False, False)
    """
    return output.strip() == label.strip()


def classify(items: Sequence[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
    """Returns accuracy and, for each class, precision, recall and F1.

    An answer that is no label counts as wrong, and for no class. The macro F1 is over
    the classes that occur, in references or answers.

    Args:
        items: `output` and `reference` each, a label as `same_label` compares them.
        labels: of all classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    answers = [item["output"].strip() for item in items]
    right = [item["reference"].strip() for item in items]
    names = [label.strip() for label in labels]
    table = precision_recall_fscore_support(
        right, answers, labels=names, zero_division=0.0
    )
    classes = {
        name: {
            **{k: round(float(v), 4) for k, v in zip(CLASS_RATES, rates, strict=True)},
            "count": int(count),
        }
        for name, *rates, count in zip(names, *table, strict=True)
    }
    seen = {*right, *answers}
    f1 = [rates["f1"] for name, rates in classes.items() if name in seen]
    hits = sum(a == b for a, b in zip(right, answers, strict=True))
    return {
        "accuracy": intervals.proportion(hits, len(right)),
        "macro_f1": round(sum(f1) / len(f1), 4),
        "no_label": sum(answer not in names for answer in answers),
        "classes": classes,
    }
