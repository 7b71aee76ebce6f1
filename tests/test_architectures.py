"""Tiny models of other families than Llama: labels, training, an answer that ends."""

import pytest
from peft import load_peft_weights
from transformers import AutoTokenizer

from helpers import files, recipes, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import TemplateError
from helpers.estimate import skeleton
from helpers.inference import generation
from helpers.masking import dataset as masking
from helpers.masking.templates import neutralise, prepare_tokenizer, stop_token_ids
from helpers.models.load import load_tokenizer
from helpers.runs import save_run
from helpers.training import trainer as sft
from helpers.training import trainer as train
from tests.rows import turns
from tests.test_recipe_runs import TODAY, small
from tests.tiny import save_family

EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    """Writes a model of random weights with the chat template of its family."""
    return lambda model: save_family(model, tmp_path_factory.mktemp("m"))


@pytest.mark.parametrize("family", ["qwen2.5", "phi-3"])
def test_another_family_is_masked_trained_and_answers(family, make_folder, run_factory):
    run = run_factory(
        model=str(make_folder(family)),
        system_prompt="",
        lora__target_modules="all-linear",
        sft__max_steps=3,
        sft__eval_steps=3,
        sft__warmup_steps=0,
    )
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    rows = files.read_rows(run.path / "data" / "train.jsonl")
    row = masking.mask_conversation(tokenizer, rows[0]["messages"])
    answer = rows[0]["messages"][-1]["content"]
    learnt = tokenizer.decode([x for x in row["labels"] if x != masking.NO_LOSS])
    assert answer in learnt and not learnt.endswith(answer)
    stops = stop_token_ids(tokenizer)
    assert [x for x in row["labels"] if x != masking.NO_LOSS][-1] in stops

    trainer = sft.build_sft(run, model, tokenizer)
    part = train.fit(trainer, run)
    assert part["steps"] == 3 and part["loss_last"] > 0

    asked = [rows[0]["messages"][:-1]]
    (answered,) = generation.generate(model, tokenizer, asked, max_new_tokens=6)
    assert 0 < answered.tokens <= 6


# parameters, and trained ones of LoRA r 16 on seven modules, as others print them
COUNTS = {
    "llama32-3b": (3_212_749_824, 24_313_856),
    "qwen3-0.6b": (596_049_920, 10_092_544),
    "qwen3-1.7b": (1_720_574_976, 17_432_576),
    "qwen3-4b": (4_022_468_096, 33_030_144),
    "gemma3-1b": (999_885_952, 13_045_760),
    "gemma3-4b": (4_300_079_472, 29_802_496),
    "smollm3-3b": (3_075_098_624, 30_228_480),
}


@pytest.mark.parametrize("recipe", TODAY)
def test_a_recipe_of_today_has_and_trains_the_known_numbers_of_parameters(recipe):
    config, counts = recipes.load(recipe), COUNTS[recipe.removesuffix("-thinking")]
    trained, _ = skeleton(config.model, config.lora).get_nb_trainable_parameters()
    assert (skeleton(config.model).num_parameters(), trained) == counts
    numbers = skeleton(config.model).config.get_text_config()
    width = getattr(numbers, "head_dim", None)
    width = width or numbers.hidden_size // numbers.num_attention_heads
    inner, heads = numbers.intermediate_size, numbers.num_attention_heads
    kv = 2 * (numbers.hidden_size + numbers.num_key_value_heads * width)
    layer = 2 * (numbers.hidden_size + heads * width) + kv
    layer += 3 * (numbers.hidden_size + inner)  # in plus out, of the seven
    assert config.lora["r"] * numbers.num_hidden_layers * layer == trained


@pytest.mark.parametrize("recipe", TODAY)
def test_a_recipe_of_today_runs_on_its_own_architecture(recipe, make_folder, runs_home):
    model = recipes.load(recipe).model
    config = small(recipe, str(make_folder(model)))
    run = save_run(config)
    stages.train_stage(run, config.stages[-1])
    assert all(run.report()[stage]["steps"] == 2 for stage in config.stages)
    weights = load_peft_weights(str(run.path / config.stages[-1] / "adapter"))
    assert weights and not any("vision_tower" in name for name in weights)


SWITCHED = [
    (False, turns("1 + 1?", "2", "1 + 2?", "3")),
    (True, turns("1 + 1?", "<think>\nEasy.\n</think>\n\n2")),
]


@pytest.mark.parametrize(("thinking", "messages"), SWITCHED)
def test_thinking_is_the_same_in_training_evaluation_chat_and_export(
    thinking, messages, make_folder, runs_home
):
    folder, shown = make_folder("qwen3"), {"stages": ["sft"], "export": ["merged"]}
    config = changed(small("qwen3-0.6b", str(folder)), thinking=thinking, **shown)
    tokenizer = load_tokenizer(str(folder), thinking=thinking)
    prompt = tokenizer.decode(generation.encode(tokenizer, messages[:1]))
    row = masking.mask_conversation(tokenizer, messages, "last")
    learnt = tokenizer.decode([x for x in row["labels"] if x != masking.NO_LOSS])
    assert prompt.endswith(EMPTY) is not thinking
    assert learnt.startswith("<think>\nEasy.") if thinking else learnt.startswith("3")
    run = stages.train(config)
    assert "correct" in run.report()["eval"]["sft"]["test"]
    plain = AutoTokenizer.from_pretrained(run.path / "export" / "merged")
    chat = {"tokenize": False, "add_generation_prompt": True}
    assert plain.apply_chat_template(messages[:1], **chat) == prompt
    # once more, from what was exported, the other way
    prepare_tokenizer(plain, thinking=not thinking)
    assert plain.apply_chat_template(messages[:1], **chat) != prompt


def test_thinking_without_a_switch_is_refused():
    with pytest.raises(TemplateError, match="thinking=True: the chat template has no"):
        load_tokenizer("smollm2-135m-offline", thinking=True)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_answers_without_thoughts_are_warned_of_where_the_model_thinks(
    thinking, make_folder, run_factory, caplog
):
    folder = str(make_folder("qwen3"))
    run = run_factory(model=folder, thinking=thinking, loss_on="last")
    data.prepare(run)
    with caplog.at_level("INFO"):
        train.label_rows(run, load_tokenizer(folder, thinking=thinking))
    assert ("learns not to think" in caplog.text) is (thinking is not False)


def test_a_change_of_thinking_trains_anew(run_factory):
    from helpers.training.inputs import inputs_of

    values = [inputs_of(run_factory(thinking=x), "sft") for x in (None, True, False)]
    assert len({str(value) for value in values}) == 3


def test_a_newline_among_gemmas_added_tokens_is_left_in_texts(make_folder):
    tokenizer = load_tokenizer(str(make_folder("gemma-3-1b")))
    tokenizer.add_tokens(["\n", "\n\n", "  ", "<table>"])  # as Gemma's vocabulary has
    messages = [{"role": "user", "content": "One.\n\n  <table>\nTwo."}]
    assert neutralise(tokenizer, messages) is messages
