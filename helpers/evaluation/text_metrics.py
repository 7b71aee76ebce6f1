"""Text metrics of answers against references, and rates of class labels.

ROUGE is rouge-score's (Google's), BLEU and chrF are sacrebleu's. Their own tokenizers
read English; other scripts get one that can read them, named in the result.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import regex

from helpers.data.formats import Row
from helpers.evaluation.stats import mean, proportion

ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ITEMS = (*ROUGE, "exact_match", "token_f1")
# scripts without spaces between words
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# a character of these, else the letters, marks and digits between two others
WORD = regex.compile(rf"(?={UNSPACED})\X|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{Nd}}])+")
CHARACTERS = 0.1  # share of such letters from which BLEU counts characters


class Words:
    """A tokenizer for rouge-score: words of any script, ASCII by rouge-score's own."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of a text, or characters in scripts without spaces."""
        if text.isascii():
            return self.english.tokenize(text)
        words = WORD.findall(text.lower())
        stems = (self.english.tokenize(w) if w.isascii() else [w] for w in words)
        return [stem for part in stems for stem in part]


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
    bare = normalise(reference)
    return {
        **{name: round(rouge[name].fmeasure, 4) for name in ROUGE},
        "exact_match": float(same or bool(bare) and normalise(output) == bare),
        "token_f1": round(token_f1(output, reference), 4),
    }


def normalise(text: str) -> str:
    """Returns a text as SQuAD compares answers (Rajpurkar et al., arXiv:1606.05250).

    >>> normalise("The  answer, is: A dog!")
    'answer is dog'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(output: str, reference: str) -> float:
    """Returns SQuAD's F1 over words, over characters in scripts without spaces."""
    first, second = (WORD.findall(normalise(text)) for text in (output, reference))
    if not first or not second:
        return float(output.strip() == reference.strip())
    shared = sum((Counter(first) & Counter(second)).values())
    return 2 * shared / (len(first) + len(second))


def summarise_texts(items: Sequence[Row]) -> dict[str, Any]:
    """Returns the text metrics of a set, with the signatures of their settings.

    Means of the items' metrics have bootstrap intervals; BLEU and chrF are those of the
    whole corpus, from 0 to 100.

    Args:
        items: `output`, `reference` and the metrics of `score`.
    """
    from sacrebleu.metrics import BLEU, CHRF

    outputs = [item["output"] for item in items]
    references = [item["reference"] for item in items]
    values: dict[str, Any] = {n: mean([item[n] for item in items]) for n in OF_ITEMS}
    english = all(text.isascii() for text in references)
    words = "default" if english else "default, words and characters of all scripts"
    signature = f"stemmer:porter|tok:{words}|version:{version('rouge-score')}"
    values["rouge"] = {"signature": signature}
    # an answer in another script may be shorter than the four words that BLEU counts
    bleu = BLEU(tokenize=bleu_tokenizer(references), effective_order=not english)
    for name, metric in (("bleu", bleu), ("chrf", CHRF())):
        result = round(metric.corpus_score(outputs, [references]).score, 2)
        values[name] = {"score": result, "signature": str(metric.get_signature())}
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
    return "zh" if regex.fullmatch(r"\p{Han}+", "".join(letters)) else "char"


def summarise_labels(items: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """Returns accuracy, macro F1, and scikit-learn's rates of the classes that occur.

    Labels are compared as they are, without the white space around them. An answer that
    is not a label counts as wrong, and for no class.

    Args:
        items: `output` and `reference` each.
        labels: the names of all classes.
    """
    from sklearn.metrics import classification_report

    answers = [item["output"].strip() for item in items]
    right = [item["reference"].strip() for item in items]
    names = [label.strip() for label in labels]
    classes = [name for name in names if name in {*right, *answers}]
    rates = classification_report(
        right,
        answers,
        labels=classes,
        target_names=[f"class {name}" for name in classes],  # none is "macro avg"
        zero_division=0.0,
        output_dict=True,
    )
    hits = sum(a == b for a, b in zip(right, answers, strict=True))
    return {
        "accuracy": proportion(hits, len(right)),
        "macro_f1": round(rates["macro avg"]["f1-score"], 4),
        "no_label": sum(answer not in names for answer in answers),
        "classes": {name: rates[f"class {name}"] for name in classes},
    }
