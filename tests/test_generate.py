"""Answers: batched, streamed, in a chat, and from a file of prompts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, set_seed

from helpers import files
from helpers.data.formats import Messages, ask
from helpers.errors import ConfigError, DataError
from helpers.inference import generation, items
from helpers.inference.decoder import set_attention
from helpers.models import load as models
from helpers.runs import Run
from tests.rows import turns, write

TEXTS = ["Count to three.", "Hi", "A much longer question about nothing at all?"]
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
SAMPLED = {"temperature": 2.0, "max_new_tokens": 24}  # greedily it says nothing


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer; do not change them."""
    return models.load_model(str(tiny_model_folder))


def test_batched_answers_equal_single_ones_in_the_prompts_order(tiny: Any) -> None:
    batched = generation.generate(*tiny, PROMPTS, max_new_tokens=6, batch_size=3)
    single = [generation.generate(*tiny, [p], max_new_tokens=6)[0] for p in PROMPTS]
    assert batched == single


def test_what_prompts_begin_with_is_read_once(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = "What is 1 + 1? It is 2. What is 2 + 2? It is 4. " * 3
    prompts = [solved + text for text in (*TEXTS, "")]
    single = [generation.generate(*tiny, [p], max_new_tokens=8)[0] for p in prompts]
    lengths: list[tuple[int, ...]] = []
    hook = tiny[0].register_forward_pre_hook(
        lambda *call: lengths.append(call[2]["input_ids"].shape), with_kwargs=True
    )
    assert generation.generate(*tiny, prompts, max_new_tokens=8) == single
    start, rest = lengths[:2]
    assert start[0] == 1 and start[1] > 50 and rest[0] == 4 and rest[1] < 20
    prompts[0] = "And " + prompts[0]  # nothing is common
    del lengths[:]
    generation.generate(*tiny, prompts, max_new_tokens=8)
    hook.remove()
    assert lengths[0][0] == 4 and lengths[0][1] > 50


def test_a_batch_that_does_not_fit_is_halved(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = tiny[0].generate, []

    def small(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(**arguments)

    prompts = [f"{n} and" for n in range(5)]
    expected = generation.generate(*tiny, prompts, max_new_tokens=2)
    monkeypatch.setattr(tiny[0], "generate", small)
    assert generation.generate(*tiny, prompts, max_new_tokens=2) == expected
    assert sizes == [5, 2, 2, 1]


def test_packed_rows_attend_as_under_sdpa(tiny: Any) -> None:
    form = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]), "use_cache": False}
    form["position_ids"] = torch.tensor([[0, 1, 0, 1, 2, 0]])
    with torch.no_grad():
        theirs = tiny[0](**form).logits
        set_attention(tiny[0])
        ours = tiny[0](**form).logits
    tiny[0].set_attn_implementation("sdpa")
    assert not ours.equal(theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("tokens", "rows"), [(16, 256), (512, 8), (100_000, 1)])
def test_rows_answered_at_once_go_by_their_cache(tokens: int, rows: int) -> None:
    # 32 layers x 4,096 numbers for keys and for values, 2 bytes each: 0.5 MiB a token
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096)
    assert generation.fitting_rows(config, tokens, "cuda") == rows


def test_only_inference_settings_that_sample_sample(tiny: Any) -> None:
    greedy = generation.generate(*tiny, PROMPTS, max_new_tokens=3)
    cold = {"temperature": 0, "min_p": 0.1, "repetition_penalty": 3.0}
    for settings in ({}, {"max_new_tokens": 3}, cold):
        options = {"max_new_tokens": 3, "sampling": settings}
        assert generation.generate(*tiny, PROMPTS, **options) == greedy
    answers = generation.generate(*tiny, PROMPTS[:1] * 3, sampling=SAMPLED)
    assert len({answer.text for answer in answers}) > 1


def test_greedy_answers_take_nothing_of_the_models_own_settings(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["one one one one", "Hi"]
    greedy = generation.generate(*tiny, prompts, max_new_tokens=8)
    for name, value in {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}.items():
        monkeypatch.setattr(tiny[0].generation_config, name, value)
        answers = generation.generate(*tiny, prompts, max_new_tokens=8)
        assert answers == greedy


@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_an_answer_ends_before_its_stop_and_padding_is_not_counted(
    tokenizer: Any, end: str
) -> None:
    ids = tokenizer(f"Fine.{end}").input_ids
    padding = [tokenizer.pad_token_id] * 3 if end else []
    cut = generation.cut_answer(tokenizer, ids + padding, [tokenizer.eos_token_id])
    assert cut == ("Fine.", len(ids), bool(end))


def test_a_text_gets_bos_once(make_tokenizer: Callable[..., Any]) -> None:
    bos = "<|im_start|>"
    tokenizer = make_tokenizer(adds_bos=True, bos_token=bos, eos_token="<|im_end|>")
    plain, begun = (generation.encode(tokenizer, t) for t in ("Hi", f"{bos}Hi"))
    assert plain == begun
    assert plain.count(tokenizer.bos_token_id) == 1


@pytest.fixture
def calls(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command loads, and answers in a chat of one question."""
    calls: list[dict[str, Any]] = []
    lines = itertools.cycle(["Hi", "/quit"])

    def load(name: str, **options: Any) -> Any:
        calls.append({"name": name, **options})
        return tiny

    def note(_: Any, __: Any, prompt: Messages, sampling: Any) -> Iterator[str]:
        calls[-1] |= {"prompt": list(prompt), "sampling": sampling}
        yield "Yes."

    monkeypatch.setattr(items.models, "load_model", load)
    monkeypatch.setattr(items.generation, "stream_answer", note)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    return calls


def test_a_run_brings_its_model_prompt_and_last_adapter(run: Run, calls: Any) -> None:
    for stage in ("sft", "grpo"):
        (run.path / stage / "adapter").mkdir(parents=True)
    for adapter in (None, "sft", "none", "some/adapter"):
        items.chat_command("test", adapter=adapter, terminal=True)
    folders = [str(run.path / stage / "adapter") for stage in ("grpo", "sft")]
    assert [c["adapter"] for c in calls] == [*folders, None, "some/adapter"]
    assert all(call["name"] == run.config.model for call in calls)
    assert calls[0]["prompt"] == ask("Hi", run.config.system_prompt)
    assert calls[0]["max_length"] == run.config.max_length


@pytest.mark.parametrize("stages", [["grpo"], ["sft", "grpo"]])
def test_a_runs_own_sft_adapter_is_what_sft_means(
    run_factory: Callable[..., Run], calls: Any, stages: list[str]
) -> None:
    run = run_factory(stages=stages, sft_adapter="their/adapter")
    for adapter in (None, "sft"):
        items.chat_command("test", adapter=adapter, terminal=True)
    assert [call["adapter"] for call in calls] == ["their/adapter"] * 2
    with pytest.raises(FileNotFoundError, match="run the grpo notebook"):
        items.chat_command("test", adapter="grpo", terminal=True)
    assert not (run.path / "grpo").exists()


def test_a_models_folder_is_not_taken_for_a_run(
    runs_home: Path, tiny_model_folder: Path, calls: Any
) -> None:
    items.chat_command(str(tiny_model_folder), adapter="some/adapter", terminal=True)
    expected = {"name": str(tiny_model_folder), "adapter": "some/adapter"}
    assert calls == [{**expected, "prompt": ask("Hi", ""), "sampling": {}}]


def test_options_of_sampling_go_before_the_runs(
    run_factory: Callable[..., Run], calls: Any
) -> None:
    run_factory(inference={"temperature": 1.5, "min_p": 0.1, "max_new_tokens": 9})
    items.chat_command("test", temperature=0, terminal=True)
    items.chat_command("test", temperature=0.5, max_new_tokens=3, terminal=True)
    expected = {"temperature": 0, "min_p": 0.1, "max_new_tokens": 9}
    assert calls[0]["sampling"] == expected
    assert calls[1]["sampling"]["temperature"] == 0.5
    assert calls[1]["sampling"]["max_new_tokens"] == 3


def test_a_file_of_prompts_is_answered_as_each_would_be_alone(
    run_factory: Callable[..., Run], tiny: Any, tmp_path: Path, caplog: Any
) -> None:
    run = run_factory(inference={"max_new_tokens": 4})
    system = run.config.system_prompt
    rows = ["Say one.", {"id": "two", "question": "Say two."}, {"prompt": turns("Hi")}]
    file = Path(write(tmp_path / "prompts.jsonl", rows))
    out = tmp_path / "answers.jsonl"
    with caplog.at_level(logging.INFO, "helpers"):
        items.generate_command("test", file=file, out=out)
    answers = files.read_rows(out)
    assert [item["id"] for item in answers] == [1, "two", 3]
    assert answers[1]["prompt"] == ask("Say two.", system)
    options = {"system_prompt": system, "max_new_tokens": 4}
    assert answers[1]["output"] == generation.reply(*tiny, "Say two.", **options)
    assert f"3 answers in {out}" in caplog.text


@pytest.mark.parametrize("name", ["prompts.jsonl", "mine.txt", "."])
def test_answers_overwrite_nothing_that_exists(tmp_path: Path, name: str) -> None:
    file = Path(write(tmp_path / "prompts.jsonl", ["Say one."]))
    (tmp_path / "mine.txt").write_text("mine")
    before = file.read_text()
    with pytest.raises(ConfigError, match="exists: name another file, or move it away"):
        items.generate_command("m", file=file, out=tmp_path / name)
    assert file.read_text() == before and (tmp_path / "mine.txt").read_text() == "mine"


def test_a_chat_remembers_what_was_said_until_a_new_one(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hello", "And now?", "/new", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(items.models, "load_model", lambda *_, **__: tiny)
    set_seed(0)
    items.chat_command("m", system="Be brief.", **SAMPLED, terminal=True)
    printed = capsys.readouterr().out
    set_seed(0)
    start = ask("Hello", "Be brief.")
    first = generation.reply(*tiny, start, sampling=SAMPLED)
    second_turn = [{"role": "assistant", "content": first}, *ask("And now?", "")]
    second = generation.reply(*tiny, [*start, *second_turn], sampling=SAMPLED)
    third = generation.reply(*tiny, start, sampling=SAMPLED)
    assert len({first, second, third, ""}) == 4
    assert all(text in printed for text in (first, second, third))


def test_a_row_that_is_not_a_prompt_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"Hello"\nnot json\n')
    with pytest.raises(DataError, match="row 2 is not a prompt: .*broken JSON"):
        items.generate_command("m", file=tmp_path / "prompts.jsonl", out=tmp_path / "a")
