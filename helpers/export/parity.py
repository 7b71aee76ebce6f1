"""The parity gate: exported files in other programs, beside the trained model."""

import json
import time
from collections.abc import Iterator
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import runtime
from helpers.config import HELD_OUT, Stage
from helpers.data.formats import Row, ask
from helpers.data.preparation import parts_of, to_prompts
from helpers.data.reading import to_conversations
from helpers.evaluation import metrics, tables
from helpers.export import gguf
from helpers.files import read_rows
from helpers.grpo.answers import is_correct
from helpers.inference.chat import open_gguf, post
from helpers.inference.generation import encode, inference
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import answer_marks, neutralise
from helpers.models import adapters, load
from helpers.models.adapters import device_of
from helpers.runs import Run

# what pre-tokenizers split differently
PROBE = "It's 1234 + 5.67,  don't\n\n\tÜber-x2 naïve 你好 Привет (a_b) 🙂"
# the share of tokens, up to each answer's first other one, that has to agree
AGREE = {"adapter": 1.0, "merged": 1.0, "gguf:f16": 0.98}
PERPLEXITY, P_VALUE = 1.25, 0.01  # times the trained one
TIE = 0.02  # logits between the two likeliest tokens: rounding may turn them round
COLUMNS = ["mb", "prompts_equal", "tokens_agree", "stop_rate", "perplexity", "right"]
COLUMNS += ["p", "tokens_per_second", "first_difference"]


def check(
    run: Run, stage: Stage, folders: dict[str, Path], prompts: int = 64
) -> tuple[dict[str, Row], list[str]]:
    """Returns a report row a format, and for `trained`, and sentences on faults.

    Adapter and merged have to give the trained model's greedy tokens, an f16 GGUF 98 %
    (llama.cpp rounds activations), but for what follows a tie, and each a half where
    training rounds to 16 bit or less: there wider ties turn, too. Perplexity may rise
    by a quarter, and right answers may not be fewer at p < 0.01.

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
    rows = {"trained": row | {"reloaded": trained["reloaded"]}}
    if trained["base"] == trained["logits"]:
        faults.append("trained: the adapter changes no logits: nothing was learnt")
    paths, parts = [*map(str, folders.values())], (measure, device_of, read_settings)
    results = runtime.run_alone(ask_models, paths, trained, *parts)
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
    config, rows, chats = run.config, list[Row](), list[Any]()
    parts = parts_of(config.data)
    for part in [name for name in (*HELD_OUT, "train", "problems") if name in parts]:
        lines = read_rows(run.require(f"data/{part}.jsonl"))
        if new := lines[: count - len(rows)]:
            rows += to_prompts(config, new, part)
        if part != "problems" or not chats:  # which may lack solutions
            told, _ = to_conversations(lines[:16], config.system_prompt)
            chats = told + chats if part in ("eval", "test_chat") else chats + told
    rows.sort(key=lambda row: len(str(row["prompt"])))  # batches need little padding
    adapter, options = run.require(f"{stage}/adapter"), load.options(config)
    model, tokenizer = load.load_model(config.model, adapter=adapter, **options)
    questions = [*(r["prompt"] for r in rows), ask(PROBE, config.system_prompt)]
    questions = [neutralise(tokenizer, question) for question in questions]
    limits = config.loss_on, config.max_length
    masked = mask_conversations(tokenizer, chats[:16], *limits, drop=True)
    base = model.config.to_dict()  # an adapter needs the weights it was trained on
    with np.load(adapter / adapters.WITNESS) as file:
        trained: Row = {"witness": file["ids"].tolist(), "limit": float(file["limit"])}
    if "quantization_config" in base:  # bitsandbytes rounds to bf16 on some CPUs
        trained["limit"] = max(trained["limit"], adapters.TOLERANCE["cuda"])
    trained |= {
        "questions": questions,
        "prompts": [encode(tokenizer, question) for question in questions],
        "gold": [row.get("gold") for row in rows],
        "length": min(64, config.evaluation.max_new_tokens),
        "loading": {k: base[k] for k in ("dtype", "quantization_config") if k in base},
        "tied": base.get("tie_word_embeddings"),
        "examples": masked.rows.to_list(),
        "reloaded": adapters.compare_saved(model, adapter),
    }
    with inference(model):
        bar = partial(runtime.progress, what="trained model")
        trained |= measure(model, tokenizer, model.generation_config, trained, bar)
        pairs = zip(trained["prompts"], trained["answers"], strict=False)
        trained["leads"] = [leads(model, *pair) for pair in pairs]
        witness = trained | {"prompts": [], "examples": []}
        with model.disable_adapter():
            trained["base"] = measure(model, tokenizer, None, witness)["logits"]
    del model
    runtime.free_memory()
    return tokenizer, trained


def leads(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Returns by how much each token of an answer is the likeliest one, in logits."""
    import torch

    ids = torch.tensor([prompt + answer], device=device_of(model))
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    first, second = logits.topk(2).values.T
    return (first - second).tolist()


def ask_models(folders: list, trained: dict) -> list:
    """Returns what plain transformers makes of folders, of GGUFs the weights alone."""
    import functools
    import gc
    import os

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    results: list = [{} for _ in folders]
    for folder, values in zip(folders, results, strict=True):
        tokenizer = settings = model = None
        gc.collect()
        no_code: dict = {"trust_remote_code": False}
        form: dict = {"device_map": "auto", **no_code}
        asked = trained | {"prompts": []}
        try:
            if os.path.exists(f"{folder}/model.gguf"):
                import gguf

                # transformers makes both anew, for each module and for each use
                for name in ("get_tensor_name_map", "GGUFReader"):
                    setattr(gguf, name, functools.cache(getattr(gguf, name)))
                values |= read_settings(f"{folder}/model.gguf", trained["tied"])
                form |= {"gguf_file": "model.gguf", "dtype": "float32"}
                weights = {"quant_method": "gguf", "dequantize": True}
                form["quantization_config"] = weights
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, **no_code)
                settings = GenerationConfig.from_pretrained(folder)
                chat: dict = {"add_generation_prompt": True, "return_dict": False}
                ids = tokenizer.apply_chat_template(trained["questions"], **chat)
                asked["prompts"] = values["prompts"] = ids
            if os.path.exists(f"{folder}/adapter_config.json"):
                form |= trained["loading"]  # transformers itself loses parts
                model = AutoPeftModelForCausalLM.from_pretrained(folder, **form)
            else:
                form["output_loading_info"] = True
                model, loaded = AutoModelForCausalLM.from_pretrained(folder, **form)
                values.setdefault("missing", sorted(loaded["missing_keys"]))
            model.eval().requires_grad_(False)
            values |= measure(model, tokenizer, settings, asked) | values
        except Exception as error:  # whatever a library raises on a folder
            values["error"] = f"plain transformers fails: {error!r}"[:300]
    return results


def measure(
    model: Any, tokenizer: Any, settings: Any, asked: dict, bar: Any = iter
) -> dict:
    """Returns greedy answers to prompts (ids), perplexity, and logits of a witness."""
    import math
    import time

    import torch

    stops = getattr(settings, "eos_token_id", None)
    stops = [stops] if isinstance(stops, int) else stops or []
    device = device_of(model)
    prompts, length = asked["prompts"][:-1], asked["length"]  # without the probe
    answers, start = [], time.perf_counter()
    for first in bar(range(0, len(prompts), 32)):
        rows = {"input_ids": prompts[first : first + 32]}
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        settings.update(do_sample=False, repetition_penalty=1.0, max_new_tokens=length)
        output = model.generate(**inputs.to(device), generation_config=settings)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((n for n, token in enumerate(row, 1) if token in stops), None)
            answers.append(row[:end])
    rate = sum(map(len, answers)) / (time.perf_counter() - start)
    losses: list = []
    for row in asked["examples"]:
        ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
        loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        losses += [float(loss)] * int((labels[:, 1:] != -100).sum())
    ids = torch.tensor(asked["witness"], device=device)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    values: dict = {"stops": stops, "answers": answers, "tokens_per_second": rate}
    values["rope"] = rope.get("full_attention", rope)
    values["perplexity"] = math.exp(min(sum(losses) / max(len(losses), 1), 100))
    return values | {"logits": model(input_ids=ids).logits[0, -1].float().tolist()}


def read_settings(file: str, tied: bool) -> dict:
    """Returns a GGUF's stop tokens and rope, and the weights that it lacks."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    data = {key.partition(".")[2]: f.contents() for key, f in reader.fields.items()}
    rope = {"rope_theta": data.get("rope.freq_base", 1e4)}
    if not names & {"rope_freqs.weight", "rope_factors_long.weight"}:
        kind = data.get("rope.scaling.type", "none")
        rope["rope_type"] = "default" if kind == "none" else kind
    missing = [] if tied else sorted({"output.weight"} - names)
    stops = [data[k] for k in ("ggml.eos_token_id", "ggml.eot_token_id") if k in data]
    return {"stops": stops, "rope": rope, "missing": missing}


def ask_llama(folder: Path, trained: Row) -> Row:
    """Returns what llama.cpp makes of a GGUF folder and its Modelfile."""
    questions, longest = trained["questions"], max(map(len, trained["prompts"]))
    with open_gguf(folder / "model.gguf", context=2 * longest + 64) as url:

        def ask_server(path: str, part: str, **values: Any) -> Any:
            with post(url + path, values) as response:
                return json.load(response)[part]

        texts = [ask_server("/apply-template", "prompt", messages=q) for q in questions]
        alone = [q[1:] if q[:1] == questions[-1][:-1] else q for q in questions]
        if (file := folder / "Modelfile").exists():
            text = file.read_text("utf-8")
            # to what has no system turn Ollama adds the run's: nothing to compare
            bare = questions[-1][0]["role"] == "system"
            known = [bare and q[0]["role"] != "system" for q in questions] * 2
            served = zip(known, texts * 2, (*questions, *alone), strict=True)
            texts += [x if k else gguf.render_modelfile(text, q) for k, x, q in served]
        options: Row = {"add_special": True, "parse_special": True}
        prompts = [
            ask_server("/tokenize", "tokens", content=x, **options) for x in texts
        ]
        options = {"n_predict": trained["length"], "temperature": 0}
        options["return_tokens"] = True
        answers, start = list[list[int]](), time.perf_counter()
        # several at a time take as long
        for ids in runtime.progress(prompts[: len(questions) - 1], folder.name):
            answers.append(ask_server("/completion", "tokens", prompt=ids, **options))
        rate = sum(map(len, answers)) / (time.perf_counter() - start)
    return {"prompts": prompts, "answers": answers, "tokens_per_second": rate}


def compare(name: str, tokenizer: Any, own: Row, trained: Row) -> tuple[Row, list[str]]:
    """Returns a format's figures, and sentences that name its faults."""
    row, faults = dict[str, Any](), [own["error"]] if "error" in own else []
    faults += compare_settings(tokenizer, own, trained)
    if "logits" in own:
        values = (trained["logits"], trained["base"], own["logits"])
        right, base, logits = map(np.array, values)
        far, near, most = (abs(x).max() for x in (logits - right, logits - base, right))
        row["reloaded"] = {"difference": float(f"{far:.3g}"), "logits": float(most)}
        if name in AGREE and near < far:
            faults.append(f"adapter not merged: logits are the base's to {near:.3g}")
        elif name in ("adapter", "merged") and not far <= trained["limit"] * most:
            faults.append(f"other logits than trained: {row['reloaded']}")
        row["perplexity"], known = round(own["perplexity"], 3), trained["perplexity"]
        if not own["perplexity"] <= PERPLEXITY * known:  # nor is it NaN
            faults.append(f"perplexity {row['perplexity']}, as trained {known:.3f}")
    if "prompts" in own and own is not trained:
        faults += compare_prompts(tokenizer, own, trained, row)
    if own.get("answers"):
        faults += compare_answers(tokenizer, own, trained, row)
        rounds = {"dtype": "float32"} != trained["loading"]
        floor = min(AGREE.get(name, 0.0), 0.5 if rounds else 1.0)
        if row["tokens_agree"] < floor:
            text = f"{row['tokens_agree']:.1%} of tokens agree, {floor:.0%} must"
            faults.append(f"other answers: {text}: {row['first_difference']}")
    return row, faults


def compare_settings(tokenizer: Any, own: Row, trained: Row) -> Iterator[str]:
    """Yields sentences on what answers to short prompts need not show."""
    rope, file = trained["rope"], own.get("rope", {})
    if wrong := {k: v for k, v in file.items() if rope.get(k, v) != v}:
        yield f"rope scaling lost: the file has {wrong}, trained with {rope}"
    if missing := own.get("missing"):
        tied = {"lm_head.weight", "output.weight"} & {*missing}
        kind = "tied embedding lost" if tied else "weights lost"
        yield f"{kind}: the file has no {', '.join(missing[:3])}"
    closing = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = {*trained["stops"]}.intersection(closing) or {*trained["stops"]}
    text = f"answers end in {tokenizer.convert_ids_to_tokens(sorted(ends))}"
    stops = own.get("stops", ends)
    if not stops:
        yield f"missing EOS: the file sets no stop token, {text}"
    elif ends.isdisjoint(stops):
        tokens = tokenizer.convert_ids_to_tokens(stops)
        yield f"old stop token: the file sets {tokens}, {text}"


def compare_prompts(tokenizer: Any, own: Row, trained: Row, row: Row) -> Iterator[str]:
    known, bos, kinds = trained["prompts"], tokenizer.bos_token_id, set[str]()
    equal = sum(map(list.__eq__, own["prompts"], known[:-1]))  # without the probe
    row["prompts_equal"] = {"k": equal, "n": len(known) - 1}
    for n, (ids, right) in enumerate(zip(own["prompts"], known * 3, strict=False)):
        kind = "wrong chat template"
        if ids == [bos, *right] and right[0] == bos:
            kind = "doubled BOS"
        elif tokenizer.decode(ids) == tokenizer.decode(right):
            kind = "wrong pre-tokenizer"
        kind += " (Modelfile)" if n >= len(known) else ""
        if ids != right and kind not in kinds:
            kinds.add(kind)
            yield f"{kind}: {show_difference(tokenizer, right, ids)}"


def compare_answers(tokenizer: Any, own: Row, trained: Row, row: Row) -> Iterator[str]:
    columns = trained["answers"], own["answers"]
    pairs = [*zip(*columns, strict=True)]
    same = [len(commonprefix(pair)) for pair in pairs]
    # behind a tie that went the other way stands another answer, as good as this one
    counted = [
        n if n < len(right) and lead[n] < TIE else len(right)
        for n, right, lead in zip(same, columns[0], trained["leads"], strict=True)
    ]
    row["tokens_agree"] = round(sum(same) / max(1, sum(counted)), 4)
    if different := [pair for pair in pairs if pair[0] != pair[1]]:
        row["first_difference"] = show_difference(tokenizer, *different[0])
    stops = {*trained["stops"]}
    known, ended = ([not stops.isdisjoint(a[-1:]) for a in x] for x in columns)
    row["stop_rate"] = round(sum(ended) / len(pairs), 4)
    test = metrics.paired_difference(known, ended)
    if test["difference"] < -0.2 and test["p"] < P_VALUE:
        text = f"{sum(known) - sum(ended)} of {len(pairs)} answers no longer end"
        yield f"lost stops: {text}, p = {test['p']}"
    row["tokens_per_second"] = round(own["tokens_per_second"], 1)
    # an answer that was cut says nothing on the whole one
    if gold := {n: g for n, g in enumerate(trained["gold"]) if g and known[n]}:
        texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in columns]
        right, now = ([is_correct(text[n], gold[n]) for n in gold] for text in texts)
        row["right"] = metrics.proportion(sum(now), len(gold))
        row["right - trained"] = test = metrics.paired_difference(right, now)
        row["p"] = test["p"]
        if test["p"] < P_VALUE and test["difference"] < 0:
            text = f"{sum(now)} of {len(gold)}, {sum(right)} as trained"
            yield f"fewer right answers: {text}, p = {test['p']}"


def show_difference(tokenizer: Any, expected: list[int], ids: list[int]) -> str:
    """Returns the first differing token in context: `...context [expected] / [got]`."""
    same = len(commonprefix([expected, ids]))
    before = tokenizer.decode(expected[max(0, same - 12) : same])
    tokens = [tokenizer.decode(x[same : same + 1]) or "end" for x in (expected, ids)]
    return f"...{before} [{tokens[0]}] / [{tokens[1]}]"


def parity_table(report: Row) -> pd.DataFrame:
    """Returns how exported formats behave, a row a format.

    Answers come 8 to 32 at a time in transformers, one at a time in llama.cpp.
    `tokens_agree`: of the trained model's greedy tokens, up to an answer's first other
    one, without what follows a tie; `p`: of the paired test of right answers beside the
    trained ones.
    """
    parts = report.get("export", {}).items()
    rows = [{"format": name, **part} for name, part in parts if isinstance(part, dict)]
    for row in rows:
        if same := row.get("prompts_equal"):
            row["prompts_equal"] = f"{same['k']}/{same['n']}"
    return tables.to_frame(rows, ["format"], COLUMNS)
