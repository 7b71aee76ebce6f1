"""The command line that answers prompts, and the batches behind it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import runtime
from helpers.data import preparation as data
from helpers.inference import chat as generate
from helpers.inference import generation
from helpers.models import load as models
from helpers.runs import Run
from tests.rows import turns, write


def choose(*arguments: str) -> generate.Chosen:
    """What a command line means."""
    return generate.choose(generate.parse_arguments(list(arguments)))


def test_a_run_brings_its_model_prompt_and_last_adapter(run: Run) -> None:
    for stage in ("sft", "grpo"):
        (run.path / stage / "adapter").mkdir(parents=True)
    chosen = choose("test")
    assert chosen.model == run.config.model
    assert chosen.adapter == str(run.path / "grpo" / "adapter")
    assert chosen.system_prompt == run.config.system_prompt
    assert choose("test", "--adapter", "sft").adapter == str(run.path / "sft/adapter")


@pytest.mark.parametrize("name", ["test", "some/model"])
def test_the_adapter_can_be_left_off(run: Run, name: str) -> None:
    assert choose(name, "--adapter", "none").adapter is None


def test_a_models_folder_is_not_taken_for_a_run(
    runs_home: Path, tiny_model_folder: Path
) -> None:
    chosen = choose(str(tiny_model_folder), "--adapter", "some/adapter")
    assert (chosen.model, chosen.adapter) == (str(tiny_model_folder), "some/adapter")
    assert (chosen.options, chosen.system_prompt, chosen.sampling) == ({}, "", {})


def test_temperature_zero_is_greedy_whatever_the_run_says(
    run_factory: Callable[..., Run],
) -> None:
    run_factory(inference={"temperature": 1.5, "min_p": 0.1, "max_new_tokens": 9})
    assert choose("test", "--temperature", "0").sampling == {"max_new_tokens": 9}
    assert choose("test", "--temperature", "0.5").sampling["temperature"] == 0.5
    assert choose("test", "--max-new-tokens", "3").sampling["max_new_tokens"] == 3


def test_a_file_of_prompts_is_answered_with_and_without_a_template(
    run_factory: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_factory(inference={"max_new_tokens": 4})
    lines = ['"Say one."', '{"id": "two", "question": "Say two."}']
    lines.append(json.dumps({"messages": [{"role": "user", "content": "Say three."}]}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "answers.jsonl"
    generate.main(["test", "--file", f"{tmp_path}/prompts.jsonl", "--out", str(out)])
    rows = data.read_rows(out)
    assert [row["id"] for row in rows] == [1, "two", 3]
    assert rows[1]["prompt"] == data.ask("Say two.", run.config.system_prompt)
    model, tokenizer = models.load_model(run.config.model)
    alone = generation.reply(
        model,
        tokenizer,
        "Say two.",
        system_prompt=run.config.system_prompt,
        max_new_tokens=4,
    )
    assert rows[1]["output"] == alone
    assert "3 answers in" in capsys.readouterr().out


PROMPTS = ["What is 2 + 2? é", "Name a fruit."]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps([{"prompt": p} for p in PROMPTS], indent=1)),
        ("p.json", json.dumps(PROMPTS)),
        ("p.jsonl", "\n\n".join(json.dumps(prompt) for prompt in PROMPTS)),
        ("p.txt", "\n".join(PROMPTS)),
        ("p.txt", "\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS)),
        ("p.csv", "question;answer\n" + "".join(f"{p};x\n" for p in PROMPTS)),
        ("[p] #1.jsonl", "\n".join(json.dumps({"question": p}) for p in PROMPTS)),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_read_as_training_rows_are(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    path = tmp_path / name
    for content in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        path.write_bytes(content)
        rows = generate.read_prompts(path, "Be brief.")
        assert [row["prompt"] for row in rows] == [
            data.ask(prompt, "Be brief.") for prompt in PROMPTS
        ]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": turns("Hi")}, turns("Hi")),
        ({"prompt": 5}, data.ask("5", "Be kind.")),
        ({"instruction": "Add.", "input": "1 2"}, data.ask("Add.\n\n1 2", "Be kind.")),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, turns("Hi")),
        ({"messages": json.dumps(turns("a", "b", "c"))}, turns("a", "b", "c")),
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "Hi"}]}]},
         turns("Hi")),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *turns("Hi")]},
         turns("Hi", system="Be brief.")),
        ({"prompt": "Hi", "system": "Be brief."}, turns("Hi", system="Be brief.")),
        ({"prompt": None, "messages": turns("Hi")}, turns("Hi")),
        ({"prompt": "Hi", "completion": "Ho"}, data.ask("Hi", "Be kind.")),
    ],
)  # fmt: skip
def test_a_prompt_may_have_the_shape_of_any_training_row(
    tmp_path: Path, row: Any, prompt: Any
) -> None:
    path = Path(write(tmp_path / "p.jsonl", [row]))
    assert generate.read_prompts(path, "Be kind.") == [{"id": 1, "prompt": prompt}]


def test_fields_of_prompts_that_are_not_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": 1, "instruction": "a", "input": "b"}, {"prompt": "a", "input": "b"}]
    path = write(tmp_path / "p.jsonl", rows)
    generate.read_prompts(Path(path), "")
    assert capsys.readouterr().out == f"{path}: unused: input (1)\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", "it is a list, not a text or an object"),
        ("not json", "broken JSON"),
        ('{"messages": []}', "it does not end with the user"),
        ('{"id": 3}', "it has id"),
        ('{"prompt": ""}', "it is empty"),
        ('{"prompt": null}', "it has prompt"),
        ('{"prompt": ["a"]}', "the user turn's content is not text: a list"),
        ('{"messages": "What?"}', "messages is text that is not JSON"),
        (json.dumps({"messages": turns("Hi", "Hi.")}), "it does not end with the user"),
        (json.dumps({"messages": [{"role": "function", "content": "4"}, *turns("?")]}),
         "role 'function' is not system, user or assistant"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_prompt_is_named_with_the_reason(
    tmp_path: Path, row: str, reason: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(f'"Hello"\n{row}\n')
    with pytest.raises(
        data.DataError, match=rf"row 2 is no prompt: {reason}.*; expect"
    ):
        generate.read_prompts(tmp_path / "prompts.jsonl", "")


def test_a_missing_file_ends_the_command_with_a_sentence(runs_home: Path) -> None:
    with pytest.raises(SystemExit, match="no file nowhere.jsonl .*; give a path"):
        generate.main(["m", "--file", "nowhere.jsonl", "--out", "a.jsonl"])


def test_a_file_without_a_place_for_answers_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        generate.parse_arguments(["m", "--file", "a.jsonl"])
    assert "--file and --out go together" in capsys.readouterr().err


def test_a_chat_remembers_what_was_said_until_a_new_one(
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = iter(["Hello", "And now?", "/new", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    model, tokenizer = models.load_model(str(tiny_model_folder))
    drawn = {"temperature": 2.0, "max_new_tokens": 5}  # greedily it says nothing
    chosen = generate.Chosen("", None, {}, "Be brief.", drawn)
    runtime.seed_everything(0)
    generate.chat(model, tokenizer, chosen)
    printed = capsys.readouterr().out
    runtime.seed_everything(0)
    start = data.ask("Hello", "Be brief.")
    first = generation.reply(model, tokenizer, start, sampling=drawn)
    said_so_far = [*start, {"role": "assistant", "content": first}]
    said_so_far += data.ask("And now?", "")
    second = generation.reply(model, tokenizer, said_so_far, sampling=drawn)
    third = generation.reply(model, tokenizer, start, sampling=drawn)
    assert len({first, second, third, ""}) == 4
    assert all(text in printed for text in (first, second, third))


def test_an_answer_ends_at_a_text_and_its_padding_is_not_counted(
    tokenizer: Any,
) -> None:
    ids = tokenizer("Six. Question: and so on").input_ids
    padded = ids + [tokenizer.pad_token_id] * 3
    stops = [tokenizer.eos_token_id]
    found = generation.cut_answer(tokenizer, padded, stops, ["Question:"])
    assert found == ("Six.", len(ids), True)
    assert not generation.cut_answer(tokenizer, ids, stops, ["Answer:"]).stopped


def test_generation_stops_at_a_text(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder))
    prompts = ["One two three four", "A longer text to go on with"]
    drawn = {"temperature": 2.0, "max_new_tokens": 24}
    runtime.seed_everything(0)
    whole = generation.generate(model, tokenizer, prompts, sampling=drawn)[0]
    middle = len(whole.text) // 2
    word = whole.text[middle : middle + 4]
    runtime.seed_everything(0)
    cut = generation.generate(model, tokenizer, prompts, sampling=drawn, until=[word])[
        0
    ]
    assert (cut.text, cut.stopped) == (whole.text.split(word)[0].strip(), True)
    assert 0 < cut.tokens < whole.tokens


def test_a_text_gets_bos_once(make_tokenizer: Callable[..., Any]) -> None:
    bos = "<|im_start|>"
    tokenizer = make_tokenizer(adds_bos=True, bos_token=bos, eos_token="<|im_end|>")
    plain, begun = (generation.encode(tokenizer, t) for t in ("Hi", f"{bos}Hi"))
    assert plain == begun
    assert plain.count(tokenizer.bos_token_id) == 1


def test_rows_answered_at_once_go_by_the_model_and_the_length() -> None:
    from transformers import LlamaConfig

    from helpers import estimate

    def rows(shape: str, tokens: int) -> int:
        config = LlamaConfig(**estimate.KNOWN[shape])
        return generation.fitting_rows(config, tokens, "cuda")

    assert rows("smollm2-135m", 256) == generation.MOST_ROWS
    # 32 layers x 4,096 numbers for keys and for values, 2 bytes each: 0.5 MiB a token
    assert rows("llama-2-7b", 512) == 8
    assert rows("llama-2-7b", 100_000) == 1
    assert rows("llama-3.2-1b", 400) > rows("llama-3.2-3b", 400)


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model, tokenizer = models.load_model(str(tiny_model_folder))
    whole, sizes = model.generate, []

    def small(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return whole(**arguments)

    monkeypatch.setattr(model, "generate", small)
    prompts = [f"{n} and" for n in range(5)]
    found = generation.generate(model, tokenizer, prompts, max_new_tokens=2)
    assert sizes == [5, 2, 2, 1]
    monkeypatch.undo()
    assert found == generation.generate(model, tokenizer, prompts, max_new_tokens=2)
