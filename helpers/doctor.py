"""What works on this machine, and a remedy for what does not, in half a minute."""

import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import requires
from typing import Any

import pandas as pd
import psutil
import torch
from huggingface_hub import HfApi, get_token
from packaging.requirements import Requirement

from helpers import recipes, runtime
from helpers.errors import TunebookError, mask_secrets
from helpers.install import STACK, installed_version
from helpers.models import adapters, load

LEAST_GB = 10  # of disk: a model, its checkpoints, and an export
LEAST_MEMORY_GB = 4


def diagnose() -> pd.DataFrame:
    """Returns a row a check: what was found, seconds, and a remedy where it failed."""
    rows = []
    for name, (check, remedy) in CHECKS.items():
        start, verdict = time.perf_counter(), "fine"
        try:
            text = check()
        except Exception as error:  # of any library: it is the finding
            text = f"{type(error).__name__}: {error!s:.200}"
            is_ours = isinstance(error, TunebookError)  # and says what to do
            verdict = f"failed: {'do as it says' if is_ours else remedy}"
        seconds = round(time.perf_counter() - start, 1)
        rows.append((name, verdict, " ".join(mask_secrets(text).split()), seconds))
    columns = ["check", "verdict", "found", "seconds"]
    return pd.DataFrame(rows, columns=columns).set_index("check")


def report() -> str:
    """Returns a line a check: verdict and remedy, and what was found."""
    rows = diagnose().itertuples()
    return "\n".join(f"{row.Index}: {row.verdict} ({row.found})" for row in rows)


def check_versions() -> str:
    text = STACK.read_text("utf-8") if STACK.exists() else ""
    # `pip install` leaves the file out, and has its lines
    lines = text.splitlines() or requires("tunebook") or []
    lines = [line.partition("#")[0] for line in lines]
    needs = [Requirement(line) for line in lines if line.strip()]
    versions = {need: installed_version(need.name) for need in needs}
    wrong = [
        f"{need.name} {version or 'is missing'}, expected {need.specifier}"
        for need, version in versions.items()
        if version is None or not need.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        raise ImportError("; ".join(wrong))
    return f"{len(needs)} packages as the project needs them"


def check_machine() -> str:
    machine, ram_gb = runtime.find_machine(), psutil.virtual_memory().available / 2**30
    dtype, reason = runtime.choose_dtype(machine)
    if min(machine.memory_gb, 2 * ram_gb) < LEAST_MEMORY_GB:
        text = f"{machine.memory_gb:.1f} GiB of memory, {ram_gb:.1f} GiB of RAM free"
        raise MemoryError(f"{text}: {LEAST_MEMORY_GB} and half of it are needed")
    kind = "no GPU"
    if machine.capability:
        kind = "compute capability {}.{}".format(*machine.capability)
    text = f"{machine.name}, {machine.memory_gb:.1f} GiB, {kind}, {ram_gb:.1f} GiB of"
    return f"{text} RAM free; {dtype}, because {reason}"


def check_disk() -> str:
    folder = runtime.runs_folder()
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < LEAST_GB:
        raise OSError(f"{free_gb:.1f} GB free for {folder}, {LEAST_GB} are needed")
    return f"{free_gb:.0f} GB free for {folder}"


def check_hub() -> str:
    is_reached, token = runtime.hub_reachable(), get_token()
    if is_reached and token:
        HfApi().whoami()  # refuses one that has expired
    hub = "reached" if is_reached else "not reached: offline models only"
    return f"{hub}; {'a token is set' if token else 'no token, for gated models'}"


def check_4bit() -> str:
    from bitsandbytes import functional

    device = runtime.find_machine().device
    weights, inputs = torch.randn(256, 256, device=device), torch.randn(256, 1)
    stored, state = functional.quantize_4bit(weights, quant_type="nf4")
    product = functional.dequantize_4bit(stored, state) @ inputs.to(device)
    exact = weights @ inputs.to(device)
    error = ((product - exact).norm() / exact.norm()).item()
    if not error < 0.2:
        raise ArithmeticError(f"a 4-bit product is wrong by {error:.0%}")
    return f"a 4-bit product is right to {error:.0%}, as NF4's are"


def check_step() -> str:
    """Takes one optimiser step of a tiny model, by the engine that is used here."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    machine, engine = runtime.find_machine(), runtime.resolve_engine("auto")
    weights: Any = "4bit" if machine.device == "cuda" else "16bit"
    # ids of BOS and EOS are those of `LlamaConfig`
    texts = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127))]
    words = {text: n for n, text in enumerate(texts)}
    marks: Any = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    turn = "{{ messages|join('','content') }}{% if add_generation_prompt %}>{% endif %}"
    marks["chat_template"] = turn  # else Unsloth warns of the one it takes
    marks["tokenizer_object"] = Tokenizer(models.BPE(words, []))
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(words), "pad_token_id": 0}
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(**marks).save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
        options: Any = {"engine": engine, "weights": weights, "max_length": 64}
        model, _ = load.load_model(folder, **options)
    lora = recipes.load("demo").lora  # of fewer modules Unsloth warns
    model = adapters.add_lora(model, lora, engine=engine, checkpointing=False)
    ids = torch.arange(32, device=machine.device)[None]
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learnt, lr=0.01), []
    half = runtime.choose_dtype(machine)[0]
    for _ in range(3):
        with torch.autocast(machine.device, half, enabled=machine.device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss does not fall: {losses}")
    return f"{engine}, {weights}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in 3 steps"


CHECKS: dict[str, tuple[Callable[[], str], str]] = {
    "versions": (check_versions, "run `make setup`, or restart the runtime on Colab"),
    "machine": (check_machine, "close other programs, or choose another machine"),
    "disk": (check_disk, "make room, or name another folder in TUNEBOOK_RUNS"),
    "hub": (check_hub, "check the network, and the token in HF_TOKEN"),
    "4-bit product": (check_4bit, "reinstall bitsandbytes for this CUDA version"),
    "training step": (check_step, "restart the kernel; then report this line"),
}
