"""The parity gate: exported files in other programs, beside the trained model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import runtime
from helpers.config import HELD_OUT, Stage
from helpers.data.formats import Row, ask
from helpers.data.preparation import parts_of, to_prompts
from helpers.errors import ModelError
from helpers.evaluation import metrics, tables
from helpers.export import gguf
from helpers.files import read_rows
from helpers.grpo.answers import is_correct
from helpers.inference.chat import open_gguf
from helpers.inference.generation import encode, inference
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import answer_marks, stop_token_ids
from helpers.models import adapters, load
from helpers.runs import Run

# what pre-tokenizers split differently
PROBE = "It's 1234 + 5.67,  don't\n\n\tÜber-x2 naïve 你好 Привет (a_b) 🙂"
# the share of tokens, up to each answer's first other one, that has to agree
AGREE = {"adapter": 1.0, "merged": 1.0, "gguf:f16": 0.98}
# times the trained one; rounding to 4 bit without data costs small models a third
PERPLEXITY, P_VALUE = {"w4a16": 1.5}, 0.01
GGUF: Row = {"gguf_file": "model.gguf", "dtype": "float32"}
GGUF["quantization_config"] = {"quant_method": "gguf", "dequantize": True}
COLUMNS = [
    "mb",
    "prompts_equal",
    "tokens_agree",
    "stop_rate",
    "perplexity",
    "right",
    "p",
]
COLUMNS += ["tokens_per_second", "first_difference"]


def check(
    run: Run, stage: Stage, folders: dict[str, Path], prompts: int = 64
) -> tuple[dict[str, Row], list[str]]:
    """Returns a report row a format, and for `trained`, and sentences on faults.

    Adapter and merged have to give the trained model's greedy tokens, all of them in
    fp32. An f16 GGUF may lose 2 %: llama.cpp rounds activations, which decides between
    near ties. Where training rounds too (16, 8 or 4 bits), a tie may cost the rest of
    an answer, while another model parts from most within a few tokens: the floor is a
    half. Perplexity may rise by a quarter, more than sound 4-bit files of small models
    lose, and right answers may not be fewer at p < 0.01.

    Args:
        run: with the stage trained.
        stage: which was exported.
        folders: of `adapter`, `merged`, `gguf:f16`, `w4a16` and so on.
        prompts: how many to answer, of held-out sets and then of training rows.

    Raises:
        MissingInput: the stage is not trained.
        ModelError: its adapter does not compute what was trained.
    """
    tokenizer, trained = ask_trained(run, stage, prompts)
    row, faults = compare("trained", tokenizer, trained, trained)
    row["reloaded"] = trained["reloaded"]
    if trained["base"] == trained["logits"]:
        faults.append("trained: the adapter changes no logits: nothing was learnt")
    loading = {"adapter": trained["loading"], "gguf": GGUF}
    kinds = [name.partition(":")[0] for name in folders]
    pairs = zip(folders.values(), kinds, strict=True)
    requests = [[str(folder), loading.get(kind, {})] for folder, kind in pairs]
    rows, results = {"trained": row}, run_alone(ask_models, requests, trained, measure)
    for (name, folder), result in zip(folders.items(), results, strict=True):
        try:
            result |= ask_llama(folder, trained) if "gguf" in name else {}
        except (ImportError, OSError, ValueError) as error:
            result["error"] = f"llama.cpp fails: {error}"
        values, sentences = compare(name, tokenizer, result, trained)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        rows[name] = {"path": str(folder), "mb": round(size / 1e6, 1), **values}
        faults += [f"{name}: {sentence}" for sentence in sentences]
    return rows, faults


def ask_trained(run: Run, stage: Stage, count: int) -> tuple[Any, Row]:
    """Returns the tokenizer, what models are asked, and the trained one's answers."""
    from transformers import GenerationConfig

    config, parts = run.config, parts_of(run.config.data)
    rows, chats = list[Row](), list[Any]()
    for part in [name for name in (*HELD_OUT, "train", "problems") if name in parts]:
        lines = read_rows(run.require(f"data/{part}.jsonl"))
        if new := lines[: count - len(rows)]:
            rows += to_prompts(config, new)
        if part in ("eval", "test_chat"):  # about 1,000 tokens
            chats = [line["messages"] for line in lines[:16]]
    adapter, options = run.require(f"{stage}/adapter"), load.options(config)
    model, tokenizer = load.load_model(config.model, adapter=adapter, **options)
    base = model.config.to_dict()  # an adapter needs the weights it was trained on
    with np.load(adapter / adapters.WITNESS) as file:
        trained: Row = {"witness": file["ids"].tolist(), "limit": float(file["limit"])}
    if "quantization_config" in base:  # bitsandbytes rounds to bf16 on some CPUs
        trained["limit"] = max(trained["limit"], adapters.TOLERANCE["cuda"])
    settings = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    settings.eos_token_id = stop_token_ids(tokenizer)
    trained |= {
        "questions": [row["prompt"] for row in rows],
        "prompts": [encode(tokenizer, row["prompt"]) for row in rows],
        "gold": [row.get("gold") for row in rows],
        "system": ask("", config.system_prompt)[:-1],
        "text": PROBE,
        "probe": tokenizer(PROBE, add_special_tokens=False).input_ids,
        "length": min(64, config.evaluation.max_new_tokens),
        "loading": {k: base[k] for k in ("dtype", "quantization_config") if k in base},
        "tied": base.get("tie_word_embeddings"),
        "rope": getattr(model.config.get_text_config(), "rope_parameters", None),
        "examples": [],
    }
    trained["reloaded"] = adapters.compare_saved(model, adapter)
    with inference(model):
        trained |= measure(model, tokenizer, settings, trained)
        pairs = list(zip(trained["prompts"], trained["answers"], strict=True))[:16]
        own = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs]
        if chats:
            limits = (config.loss_on, config.max_length)
            masked = mask_conversations(tokenizer, chats, *limits, drop=True)
            own = masked.rows.to_list()
        trained["examples"], asked = own, {"prompts": [], "examples": own}
        trained |= measure(model, tokenizer, settings, trained | asked)
        with model.disable_adapter():
            base = measure(model, tokenizer, settings, trained | asked)
    del model
    runtime.free_memory()
    return tokenizer, trained | {"base": base["logits"]}


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns a function's value from a process that has nothing of this project.

    Args:
        function: imports in its body what it uses.
        arguments: what JSON has, and functions that the first one calls.

    Raises:
        ModelError: the process fails.
    """
    values = [value for value in arguments if not callable(value)]
    sources = [inspect.getsource(f) for f in (*arguments, function) if callable(f)]
    script = "\n".join(["from __future__ import annotations", *sources])
    script += f"\nimport json, sys\nvalue = {function.__name__}(*json.load(sys.stdin))"
    script += "\nprint(); print(json.dumps(value))"
    command = [sys.executable, "-P", "-c", script]
    options: Any = {"input": json.dumps(values), "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    if done.returncode:
        raise ModelError(f"{function.__name__} fails alone: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ask_models(requests: list, trained: dict) -> list:
    """Returns what plain transformers makes of folders, of GGUFs the weights alone."""
    import functools
    import gc

    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_grad_enabled(False)
    results: list = [{} for _ in requests]
    for (folder, loading), values in zip(requests, results, strict=True):
        tokenizer = settings = model = None
        gc.collect()
        asked = trained | {"prompts": []}
        try:
            if "gguf_file" in loading:
                import gguf

                # transformers makes both anew, for each module and for each use
                for name in ("get_tensor_name_map", "GGUFReader"):
                    setattr(gguf, name, functools.cache(getattr(gguf, name)))
                reader = gguf.GGUFReader(f"{folder}/model.gguf")
                values["tensors"] = [tensor.name for tensor in reader.tensors]
                fields = [f for f in reader.fields.values() if f.types[0] != 9]
                values["metadata"] = {f.name: f.contents() for f in fields}  # no arrays
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                settings = GenerationConfig.from_pretrained(folder)
                form: dict = {"add_generation_prompt": True, "return_dict": False}
                ids = tokenizer.apply_chat_template(trained["questions"], **form)
                asked["prompts"] = values["prompts"] = ids
                probe = tokenizer(trained["text"], add_special_tokens=False)
                values["probe"] = probe.input_ids
            form = {"device_map": "auto", **loading}
            if loading and tokenizer:  # an adapter: transformers itself loses parts
                model = AutoPeftModelForCausalLM.from_pretrained(folder, **form)
            else:
                form["output_loading_info"] = True
                model, loaded = AutoModelForCausalLM.from_pretrained(folder, **form)
                values["missing"] = sorted(loaded["missing_keys"])
            text = model.config.get_text_config()
            values["rope"] = getattr(text, "rope_parameters", None)
            values |= measure(model.eval(), tokenizer, settings, asked)
        except Exception as error:  # whatever a library raises on a folder
            text = f"plain transformers fails: {type(error).__name__}: {error}"
            values["error"] = text[:300]
    return results


def measure(model: Any, tokenizer: Any, settings: Any, asked: dict) -> dict:
    """Returns greedy answers to prompts (ids), perplexity, and logits of a witness."""
    import math
    import time

    import torch

    stops = getattr(settings, "eos_token_id", None)
    stops = [stops] if isinstance(stops, int) else stops or []
    prompts, length = asked["prompts"], asked["length"]
    # Unsloth keeps a frozen embedding on the CPU, by which model.device goes
    device = next((p.device for p in model.parameters() if p.is_cuda), model.device)
    known, answers, todo = asked.get("answers"), {}, []
    for n, prompt in enumerate(prompts):
        if known and n > 7:  # one pass shows whether decoding would give it again
            ids = torch.tensor([prompt + known[n][:-1]], device=device)
            logits = model(input_ids=ids, logits_to_keep=len(known[n])).logits[0]
            ended = known[n][-1] in stops or len(known[n]) == length
            if ended and logits.argmax(-1).tolist() == known[n]:
                answers[n] = known[n]
                continue
        todo.append(n)
    todo.sort(key=lambda n: len(prompts[n]))
    start = time.perf_counter()
    for first in range(0, len(todo), 32):
        batch = todo[first : first + 32]
        rows = {"input_ids": [prompts[n] for n in batch]}
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        settings.update(do_sample=False, repetition_penalty=1.0, max_new_tokens=length)
        output = model.generate(**inputs.to(device), generation_config=settings)
        output = output[:, inputs["input_ids"].shape[1] :].tolist()
        for n, row in zip(batch, output, strict=True):
            ends = [end for end, token in enumerate(row, 1) if token in stops]
            answers[n] = row[: ends[0]] if ends else row
    values: dict = {"stops": stops}
    if prompts:
        tokens = sum(len(answers[n]) for n in todo)
        values["tokens_per_second"] = tokens / (time.perf_counter() - start)
        values["answers"] = [answers[n] for n in range(len(prompts))]
        values["stopped"] = [answer[-1] in stops for answer in values["answers"]]
    total = count = 0.0
    for row in asked["examples"]:
        ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] != -100).sum())
        ids, labels = ids.to(device), labels.to(device)
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    if count:
        values["perplexity"] = math.exp(min(total / count, 100))
    ids = torch.tensor(asked["witness"], device=device)
    return values | {"logits": model(input_ids=ids).logits[0, -1].float().tolist()}


def ask_llama(folder: Path, trained: Row) -> Row:
    """Returns what llama.cpp makes of a GGUF folder and its Modelfile."""
    file, longest = folder / "Modelfile", max(map(len, trained["prompts"]))
    with open_gguf(folder / "model.gguf", context=2 * longest + 64) as url:

        def post(path: str, **body: Any) -> Row:
            kind = {"Content-Type": "application/json"}
            content = json.dumps(body).encode()
            request = urllib.request.Request(url + path, content, kind)
            with urllib.request.urlopen(request) as response:
                return json.load(response)

        def to_ids(text: str, special: bool = True) -> list[int]:
            options = {"add_special": special, "parse_special": special}
            return post("/tokenize", content=text, **options)["tokens"]

        questions, ids = trained["questions"], list[list[int]]()
        for question in questions:
            ids.append(to_ids(post("/apply-template", messages=question)["prompt"]))
        values: Row = {"prompts": ids, "probe": to_ids(PROBE, special=False)}
        chat = post("/v1/chat/completions", messages=questions[0], max_tokens=1)
        values["chat_tokens"] = chat["usage"]["prompt_tokens"]
        if file.exists():
            text, system = file.read_text("utf-8"), trained["system"]
            alone = [q[1:] if q[:1] == system else q for q in questions]
            lines = [gguf.render_modelfile(text, q) for q in (*questions, *alone)]
            values["modelfile"] = [*map(to_ids, lines)]
        options = {"n_predict": trained["length"], "temperature": 0}
        options, start = options | {"return_tokens": True}, time.perf_counter()
        # several at a time take as long on a CPU
        outputs = [post("/completion", prompt=prompt, **options) for prompt in ids]
        seconds = time.perf_counter() - start
    values["answers"] = [output["tokens"] for output in outputs]
    values["stopped"] = [output["stop_type"] == "eos" for output in outputs]
    values["tokens_per_second"] = sum(map(len, values["answers"])) / seconds
    return values


def compare(name: str, tokenizer: Any, own: Row, trained: Row) -> tuple[Row, list[str]]:
    """Returns a format's figures, and sentences that name its faults."""
    row, faults = dict[str, Any](), [own["error"]] if "error" in own else []
    faults += compare_settings(tokenizer, own, trained)
    if name != "trained" and "logits" in own:
        values = (trained["logits"], trained["base"], own["logits"])
        right, base, logits = map(np.array, values)
        far, near, most = (abs(x).max() for x in (logits - right, logits - base, right))
        row["reloaded"] = {"difference": float(f"{far:.3g}"), "logits": float(most)}
        if name in AGREE and near < far:
            faults.append(f"adapter not merged: logits are the base's to {near:.3g}")
        elif name in ("adapter", "merged") and far > trained["limit"] * most:
            faults.append(f"other logits than trained: {row['reloaded']}")
    if name != "trained" and "prompts" in own:
        faults += compare_prompts(tokenizer, own, trained, row)
    if "answers" in own:
        faults += compare_answers(name, tokenizer, own, trained, row)
    if "perplexity" in own:
        row["perplexity"], known = round(own["perplexity"], 3), trained["perplexity"]
        if own["perplexity"] > PERPLEXITY.get(name, 1.25) * known:
            faults.append(f"perplexity {row['perplexity']}, as trained {known:.3f}")
    return row, faults


def compare_settings(tokenizer: Any, own: Row, trained: Row) -> list[str]:
    """Returns sentences on what answers to short prompts need not show."""
    faults, missing = [], own.get("missing", [])
    ropes: list[Row] = [trained["rope"] or {}, own.get("rope") or {}]
    rope, file = (x.get("full_attention", x) for x in ropes)
    if data := own.get("metadata"):
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        own["stops"] = [data[key] for key in keys if key in data]
        names, prefix = own["tensors"], f"{data['general.architecture']}.rope."
        kind = "llama3" if "rope_freqs.weight" in names else "default"
        kind = "longrope" if "rope_factors_long.weight" in names else kind
        kind = data.get(f"{prefix}scaling.type", kind).replace("none", "default")
        file = {"rope_type": kind, "rope_theta": data.get(f"{prefix}freq_base", 1e4)}
        missing = [] if trained["tied"] else sorted({"output.weight"} - {*names})
    if wrong := {k: v for k, v in file.items() if rope.get(k, v) != v}:
        faults.append(f"rope scaling lost: the file has {wrong}, trained with {rope}")
    if {"lm_head.weight", "output.weight"} & {*missing}:
        faults.append("tied embedding lost: the file has no weights for the output")
    elif missing:
        faults.append(f"weights lost: {', '.join(missing[:3])}")
    if "stops" in own:
        closing = answer_marks(tokenizer)[1]
        ids = {*tokenizer(closing, add_special_tokens=False).input_ids}
        ends = ids & {*trained["stops"]} or {*trained["stops"]}
        text = f"answers end in {tokenizer.convert_ids_to_tokens(sorted(ends))}"
        if not own["stops"]:
            faults.append(f"missing EOS: the file sets no stop token, {text}")
        elif not ends & {*own["stops"]}:
            tokens = tokenizer.convert_ids_to_tokens(own["stops"])
            faults.append(f"old stop token: the file sets {tokens}, {text}")
    return faults


def compare_prompts(tokenizer: Any, own: Row, trained: Row, row: Row) -> list[str]:
    known, bos, kinds = trained["prompts"], tokenizer.bos_token_id, dict[str, str]()
    sets = [("", own["prompts"], known), ("", [own["probe"]], [trained["probe"]])]
    sets.append((" (Modelfile)", own.get("modelfile", []), known * 2))
    for where, prompts, expected in sets:
        for ids, right in zip(prompts, expected, strict=False):
            kind = "wrong chat template"
            if ids == [bos, *right] and right[0] == bos:
                kind = "doubled BOS"
            elif right == [bos, *ids]:
                kind = "lost BOS"
            elif tokenizer.decode(ids) == tokenizer.decode(right):
                kind = "wrong pre-tokenizer"
            if ids != right:
                text = f"{kind}{where}: {show_difference(tokenizer, right, ids)}"
                kinds.setdefault(kind + where, text)
    tokens, count = own.get("chat_tokens"), len(own["prompts"][0])
    if tokens not in (None, count):
        kinds["chat"] = f"llama.cpp's chat reads {tokens} prompt tokens of {count}"
    equal = sum(map(list.__eq__, own["prompts"], known))
    row["prompts_equal"] = {"k": equal, "n": len(known)}
    return [*kinds.values()]


def compare_answers(
    name: str, tokenizer: Any, own: Row, trained: Row, row: Row
) -> list[str]:
    pairs = [*zip(trained["answers"], own["answers"], strict=True)]
    same, faults = sum(len(commonprefix(pair)) for pair in pairs), list[str]()
    row["tokens_agree"] = round(same / sum(len(a) for a, _ in pairs), 4)
    if different := [pair for pair in pairs if pair[0] != pair[1]]:
        row["first_difference"] = show_difference(tokenizer, *different[0])
    rounds = {"dtype": "float32"} != trained["loading"]
    floor = min(AGREE.get(name, 0.0), 0.5 if rounds else 1.0)
    if row["tokens_agree"] < floor:
        text = f"other answers: {row['tokens_agree']:.1%} of tokens agree, {floor:.0%}"
        faults.append(f"{text} must; expected and got: {row['first_difference']}")
    row["stop_rate"] = round(sum(own["stopped"]) / len(pairs), 4)
    lost = sum(trained["stopped"]) - sum(own["stopped"])
    if lost > max(1, 0.2 * len(pairs)):
        faults.append(f"lost stops: {lost} of {len(pairs)} answers no longer end")
    row["tokens_per_second"] = round(own["tokens_per_second"], 1)
    # an answer that was cut says nothing on the whole one
    gold = {n: g for n, g in enumerate(trained["gold"]) if g and trained["stopped"][n]}
    if gold:
        columns = zip(*pairs, strict=True)
        texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in columns]
        right = [[is_correct(text[n], gold[n]) for n in gold] for text in texts]
        row["right"] = metrics.proportion(sum(right[1]), len(gold))
        row["right - trained"] = test = metrics.paired_difference(*right)
        row["p"] = test["p"]
        if test["p"] < P_VALUE and test["difference"] < 0:
            text = f"{sum(right[1])} of {len(gold)}, {sum(right[0])} as trained"
            faults.append(f"fewer right answers: {text}, p = {test['p']}")
    return faults


def show_difference(tokenizer: Any, expected: list[int], ids: list[int]) -> str:
    """Returns the first differing token in context: `...context [expected] / [got]`."""
    same = len(commonprefix([expected, ids]))
    before = tokenizer.decode(expected[max(0, same - 12) : same])
    tokens = [tokenizer.decode(x[same : same + 1]) or "end" for x in (expected, ids)]
    return f"...{before} [{tokens[0]}] / [{tokens[1]}]"


def parity_table(report: Row) -> pd.DataFrame:
    """Returns how exported formats behave, a row a format.

    Answers come 8 to 32 at a time in transformers, one at a time in llama.cpp.
    `tokens_agree` is the share of the trained model's greedy tokens up to each answer's
    first other one; `p` is of the paired test of right answers beside the trained ones.
    """
    parts = report.get("export", {}).items()
    rows = [{"format": name, **part} for name, part in parts if isinstance(part, dict)]
    for row in rows:
        if same := row.get("prompts_equal"):
            row["prompts_equal"] = f"{same['k']}/{same['n']}"
    return tables.to_frame(rows, ["format"], COLUMNS)
