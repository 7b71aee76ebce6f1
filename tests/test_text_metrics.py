"""Text metrics: by their packages, on texts whose values are known."""

from __future__ import annotations

import random
from typing import Any

import pytest

from helpers.evaluation import metrics
from helpers.evaluation.evaluator import judge
from helpers.evaluation.metrics import proportion


def summary(*pairs: tuple[str, str]) -> dict[str, Any]:
    """The metrics of a set of outputs and references."""
    return metrics.summarise_texts(
        [{"output": o, "reference": r, **metrics.score(o, r)} for o, r in pairs]
    )


@pytest.mark.parametrize(
    ("output", "reference", "match", "f1"),
    [
        ("The cat.", "a CAT", 1.0, 1.0),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "An", 0.0, 0.0),
        ("!", "?", 0.0, 0.0),
        ("🙃", "🙂", 0.0, 0.0),
        (" ... ", "...", 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1_are_those_of_squad(
    output: str, reference: str, match: float, f1: float
) -> None:
    values = metrics.score(output, reference)
    assert values["exact_match"] == match
    assert values["token_f1"] == pytest.approx(f1, abs=1e-4)


TEXTS = [
    *("今天的天气很好，我们去公园。", "ねこが古い塀の上にすわっている。"),
    *("고양이가 낡은 담 위에 앉아 있다.", "แมวนั่งอยู่บนกำแพงเก่า", "ឆ្មាអង្គុយលើជញ្ជាំង"),
    *("बिल्ली पुरानी दीवार पर बैठी है।", "القط يجلس على الجدار القديم"),
    *(
        "Кот сидит на старой стене.",
        "Two birds sat on the old wall.",
        "кот",
        "猫",
        "🙂",
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_any_script_against_itself_has_the_highest_metrics(text: str) -> None:
    values = summary((text, text), (text, text))
    assert all(values[name]["mean"] == 1.0 for name in metrics.OF_ITEMS)
    assert (values["bleu"]["score"], values["chrf"]["score"]) == (100.0, 100.0)


@pytest.mark.parametrize(
    ("output", "reference", "other"),
    [
        ("今天天气很好", "今天天气不好", "昨晚下雨"),
        ("กขคงจฉ", "กขคงจช", "ดตถท"),
        ("кот сидит дома.", "кот сидит там.", "снег идёт."),
        ("answer: 猫", "answer: 猫和狗", "狐"),
        ("größer ist besser", "größer ist gut", "kleine Mäuse"),
    ],
)
def test_what_texts_of_any_script_share_counts_and_the_rest_does_not(
    output: str, reference: str, other: str
) -> None:
    for name in ("rouge1", "token_f1"):
        assert 0 < metrics.score(output, reference)[name] < 1
        assert metrics.score(other, reference)[name] == 0


def test_the_metrics_of_english_are_those_of_the_packages() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    words = "The cats' sitting, mats_2 running don't 3.50 easily; (none) state-of-art"
    draw = random.Random(0)
    pairs = [
        [" ".join(draw.choices(words.split(), k=draw.randint(1, 8))) for _ in "12"]
        for _ in range(50)
    ]
    theirs = RougeScorer(list(metrics.ROUGE), use_stemmer=True)
    for output, reference in pairs:
        expected = theirs.score(reference, output)
        values = metrics.score(output, reference)
        for name in metrics.ROUGE:
            assert values[name] == round(expected[name].fmeasure, 4)
    outputs, references = (list(side) for side in zip(*pairs, strict=True))
    bleu = sacrebleu.corpus_bleu(outputs, [references]).score
    assert summary(*pairs)["bleu"]["score"] == pytest.approx(bleu, abs=6e-3)


@pytest.mark.parametrize(
    ("references", "tokenizer", "effective"),
    [
        (["A cat."], "13a", "no"),
        (["Кот сидит."], "13a", "yes"),
        (["今天很好。", "A cat."], "zh", "yes"),
        (["ねこと犬"], "char", "yes"),
        (["The word 猫 stands for a cat in both of these languages."], "13a", "yes"),
    ],
)
def test_the_result_names_the_tokenizer_of_the_script(
    references: list[str], tokenizer: str, effective: str
) -> None:
    values = summary(*((text, text) for text in references))
    assert f"eff:{effective}|tok:{tokenizer}|" in values["bleu"]["signature"]


def rates(labels: list[str], *pairs: tuple[str, str]) -> dict[str, Any]:
    """The rates of outputs and references that are labels."""
    items = [{"output": o, "reference": r} for o, r in pairs]
    return metrics.summarise_labels(items, labels)


def test_classes_that_occur_get_f1_and_their_mean() -> None:
    references = ["positive", "positive", "positive", "negative", "negative"]
    outputs = [" positive\n", "negative", "I like it", "negative", "positive"]
    pairs = zip(outputs, references, strict=True)
    values = rates(["negative", "positive", "neutral"], *pairs)
    assert values["correct"] == proportion(2, 5)
    assert (values["macro_f1"], values["no_label"]) == (0.45, 1)
    assert values["f1"] == {"negative": 0.5, "positive": 0.4}


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *(("", "A"), ("the", "A"), ("-1", "1"), ("1.0", "10"), ("C", "C++")),
        *(("C#", "C"), ("yes", "Yes"), ("Yes.", "Yes"), ("a cat", "cat"), ("是", "否")),
    ],
)
def test_a_label_is_compared_as_it_is(output: str, label: str) -> None:
    row = {"question": "?", "reference": label}
    assert not judge(output, row, [label])["correct"]
    assert judge(f"\n {label} ", row, [label])["correct"]
    values = rates([label, "other"], (output, label))
    assert (values["correct"]["k"], values["no_label"]) == (0, 1)
