"""Tests of benchmarks/masks.py: every shipped chat template is masked as it should be.

Unsloth patches the libraries when it is imported, so the program runs in a process of
its own; a few of trl's templates are asked about in this one too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chats, differences, masks, oracle
from helpers.data.formats import check_messages
from helpers.models.load import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = json.loads(masks.RESULTS.read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in COMMITTED["templates"]}
# their ends differ, their prompts open a thought, they leave out or refuse something
WITHOUT_UNSLOTH = [
    "llama3",
    "gptoss",
    "qwen3",
    "deepseek_r1_distill",
    "gemma",
    "glm4moe",
]


@pytest.fixture(scope="module")
def base() -> Any:
    return load_tokenizer("smollm2-135m-offline")


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory, run_python: Any) -> dict[str, Any]:
    """What the program writes today."""
    path = tmp_path_factory.mktemp("masks") / "masks.json"
    run_python("benchmarks/masks.py", str(path))
    return json.loads(path.read_text(encoding="utf-8"))


# the table


def test_at_least_25_distinct_templates_are_in_the_table() -> None:
    assert len(ROWS) == len(COMMITTED["templates"]) >= 25
    aliases = [name for row in ROWS.values() for name in row.get("same_text", [])]
    assert not set(aliases) & set(ROWS)


def test_at_most_a_tenth_of_the_templates_is_unsupported() -> None:
    unsupported = [n for n, row in ROWS.items() if row["oracle"].startswith("unsupp")]
    assert len(unsupported) <= 0.1 * len(ROWS)


@pytest.mark.parametrize("column", ["oracle", "unsloth", "trl"])
def test_what_is_not_equal_is_in_the_table_with_its_reason(column: str) -> None:
    for name, row in ROWS.items():
        kind, _, reason = row[column].partition(": ")
        assert kind == "equal" or (kind in ("unsupported", "differs") and reason), name


def test_no_template_differs_from_the_oracle() -> None:
    assert [n for n, row in ROWS.items() if row["oracle"].startswith("differs")] == []


def test_the_lines_of_the_table_count_each_column_and_hold_each_template() -> None:
    lines = masks.table()
    equal = sum(row["oracle"] == "equal" for row in ROWS.values())
    assert (
        f"- oracle: equal {equal}, unsupported {len(ROWS) - equal} of {len(ROWS)}"
        in (lines)
    )
    for name in ROWS:
        assert sum(line.startswith(f"| {name} | ") for line in lines) == 1


# what the program finds today


def test_the_committed_table_is_what_the_program_finds_today(
    today: dict[str, Any],
) -> None:
    found = {row["name"]: row for row in today["templates"]}
    assert list(found) == list(ROWS)
    assert {n: row for n, row in found.items() if row != ROWS[n]} == {}


@pytest.mark.parametrize("name", WITHOUT_UNSLOTH)
def test_the_same_is_found_where_unsloth_has_patched_nothing(
    base: Any, name: str
) -> None:
    template = next(t for t in chats.trl_templates() if t.names[0] == f"trl/{name}")
    row = masks.compare(base, template, {"trl"})
    assert row == {column: ROWS[row["name"]][column] for column in row}


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "developer"])
def test_a_turn_of_a_tool_is_refused_with_the_reason(role: str) -> None:
    messages = [*chats.turns("2 + 2?", "add(2, 2)"), {"role": role, "content": "4"}]
    assert check_messages(messages) == (
        f"role '{role}' is not system, user or assistant"
    )


# the oracle itself


@pytest.fixture(scope="module")
def row(base: Any) -> differences.Row:
    """A conversation of two answers under trl's Llama-3 template."""
    found = next(t for t in chats.trl_templates() if t.names[0] == "trl/llama3")
    rows, skipped, faults = masks.ask(chats.fit_tokenizer(base, found))
    assert (len(rows), skipped, faults) == (18, {}, {})
    return next(
        r for r in rows if r.messages == chats.turns("Yes.", "Yes.", *["No."] * 2)
    )


def learnt(row: differences.Row, labels: list[int]) -> str:
    pairs = zip(row.spans, labels, strict=True)
    return "".join(row.text[a:b] for (a, b), x in pairs if x != oracle.NO_LOSS)


def test_the_oracle_learns_the_answers_and_not_the_same_words_in_the_questions(
    row: differences.Row,
) -> None:
    labels = oracle.labels(row.ids, row.spans, row.answers)
    assert learnt(row, labels) == "Yes.<|eot_id|>No.<|eot_id|>"
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert all(row.text[: a.begin].endswith(header) for a in row.answers)


@pytest.mark.parametrize(
    ("word", "learn", "why"),
    [
        ("\n", True, "learns '.*' in question, unexplained"),
        ("<|eot_id|>", False, "does not learn '<|eot_id|>' in end, unexplained"),
        ("Yes", False, "does not learn 'Yes' in answer, unexplained"),
    ],
)
def test_a_wrong_label_is_noticed_and_without_a_cause_an_error(
    row: differences.Row, word: str, learn: bool, why: str
) -> None:
    right = oracle.labels(row.ids, row.spans, row.answers)
    wrong = [
        label if row.text[a:b] != word else token if learn else oracle.NO_LOSS
        for token, (a, b), label in zip(row.ids, row.spans, right, strict=True)
    ]
    with pytest.raises(ValueError, match=why.replace("|", "[|]")):
        differences.describe(row, right, wrong, differences.Theirs())


def test_a_header_that_is_learnt_is_named(row: differences.Row) -> None:
    right = oracle.labels(row.ids, row.spans, row.answers)
    first = row.answers[0]
    wrong = [
        token if first.previous < a < first.begin else label
        for token, (a, _), label in zip(row.ids, row.spans, right, strict=True)
    ]
    assert differences.describe(row, right, wrong, differences.Theirs()) == {
        "learns '<|start_header_id|>assistant<|end_header_id|>\\n\\n' of the header"
    }


def test_a_tokens_characters_are_found_from_its_bytes(base: Any) -> None:
    text = "é 🎉<|im_end|>\n  x"
    ids = base(text, add_special_tokens=False).input_ids
    spans = oracle.character_spans(base, ids, text)
    pieces = [text[a:b] for a, b in spans]
    assert pieces == ["é", " 🎉", "🎉", "🎉", "<|im_end|>", "\n ", " x"]


def test_the_oracle_shares_no_code_with_masking() -> None:
    for module in (oracle, chats):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert "helpers.masking import" not in source and "helpers.turns" not in source
