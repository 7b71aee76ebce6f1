"""Compares our GGUF quantiser with llama.cpp's own, tensor by tensor.

    npm pack @node-llama-cpp/linux-x64@3.21.1 && tar xzf node-llama-cpp-*.tgz
    python benchmarks/gguf_quants.py package/bins/linux-x64

The offline model and random models of two layers and more are converted to f16, then
quantised by `helpers.export.gguf` and by `llama_model_quantize` of the folder's
`libllama`. Prints equal and all tensors, and writes the digests of the contents to
tests/gguf_digests.json, which the tests hold.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.export.gguf import convert, quantise  # noqa: E402
from helpers.models import load_model, load_tokenizer  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

OFFLINE = "smollm2-135m-offline"
DIGESTS = ROOT / "tests" / "gguf_digests.json"
FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}  # LLAMA_FTYPE_MOSTLY_*
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {}),
    "llama-tied-wide": ("Llama", WIDE),
    "llama-untied-wide": ("Llama", WIDE | {"tie_word_embeddings": False}),
    "qwen3-tied-wide": ("Qwen3", WIDE | {"head_dim": 64}),
    "qwen3-untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
}


class Parameters(ctypes.Structure):
    """llama.h's `llama_model_quantize_params`."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        *((name, ctypes.c_int) for name in ("ftype", "output_type", "token_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy")),
        *((name, ctypes.c_bool) for name in ("pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "values", "types", "layers")),
    ]


def load_library(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    library.llama_model_quantize_default_params.restype = Parameters
    arguments = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    library.llama_model_quantize.argtypes = arguments
    library.llama_backend_init()
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))))
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    return library


def digest(file: Path) -> tuple[dict[str, tuple[str, str]], str]:
    """Returns type and hash of each tensor, and the hash of all in order of name."""
    from gguf import GGUFReader

    tensors, whole = {}, hashlib.sha256()
    for tensor in sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        content = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        tensors[tensor.name] = (tensor.tensor_type.name, content)
        whole.update(f"{tensor.name} {tensor.tensor_type.name} {content}\n".encode())
    return tensors, whole.hexdigest()


def compare(library: ctypes.CDLL, source: Path, kind: str) -> tuple[str, int, int]:
    """Returns the digest of our file, and how many tensors of upstream's are equal."""
    ours, theirs = source.with_suffix(".ours"), source.with_suffix(".theirs")
    start = time.perf_counter()
    quantise(source, ours, kind)
    seconds = time.perf_counter() - start
    options = library.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], 1
    names = str(source).encode(), str(theirs).encode()
    if library.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit(f"llama_model_quantize failed on {source.name}")
    print(f"  {seconds:.1f} s, upstream {time.perf_counter() - start - seconds:.1f} s")
    (tensors, whole), (expected, _) = digest(ours), digest(theirs)
    equal = sum(tensors.get(name) == content for name, content in expected.items())
    return whole, equal, len(expected)


def main(folder: Path) -> None:
    library, digests = load_library(folder), {}
    tokenizer = load_tokenizer(OFFLINE)
    with tempfile.TemporaryDirectory() as scratch:
        for name in (OFFLINE, *SHAPES):
            merged = Path(scratch, name)
            if name == OFFLINE:
                model, _ = load_model(name, engine="transformers", weights="16bit")
                model.save_pretrained(merged)
                tokenizer.save_pretrained(merged)
            else:
                family, shape = SHAPES[name]
                save_tiny_model(family, tokenizer, merged, **shape)
            source = Path(scratch, f"{name}.gguf")
            convert(merged, source)
            digests[name] = {"f16": digest(source)[1]}
            for kind in FILE_TYPES:
                whole, equal, total = compare(library, source, kind)
                print(f"{name} {kind}: {equal} of {total} tensors equal", flush=True)
                digests[name][kind] = whole
                if equal != total:
                    raise SystemExit(f"{name} {kind} differs from upstream's")
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
