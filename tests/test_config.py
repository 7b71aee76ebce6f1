"""Tests of helpers.config: what is refused, in which words, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import config, recipes
from helpers.config import RunConfig, changed, check_config, read_config
from helpers.errors import ConfigError, nearest


@pytest.fixture
def demo() -> RunConfig:
    return recipes.load("demo")


def test_an_unknown_field_gets_the_nearest_name(demo: RunConfig) -> None:
    with pytest.raises(
        ConfigError,
        match="^modle is not a field of the config; did you mean 'model'\\?$",
    ):
        check_config({**demo.model_dump(), "modle": "x"})


def test_an_unknown_field_of_a_group_gets_that_groups_nearest_name(
    demo: RunConfig,
) -> None:
    with pytest.raises(ConfigError, match="data.trian is not .* mean 'train'\\?$"):
        changed(demo, data__trian=["a.jsonl"])


def test_an_unknown_field_like_no_other_gets_no_hint(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="^qqqq is not a field of the config$"):
        changed(demo, qqqq=1)


def test_a_wrong_type_says_what_was_found(demo: RunConfig) -> None:
    with pytest.raises(
        ConfigError, match="^seed: .*valid integer.*\\(found 'seven'\\)$"
    ):
        changed(demo, seed="seven")


def test_a_wrong_choice_says_the_choices_and_what_was_found(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="'unsloth' or .* \\(found 'unslot'\\)$"):
        changed(demo, engine="unslot")


def test_a_value_out_of_range_says_the_limit(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="data.eval_rows: .* or equal to 1 .*found 0"):
        changed(demo, data__eval_rows=0)


def test_every_fault_has_its_own_line(demo: RunConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(demo, seed=-1, max_length=3, modle="x")
    fields = [
        line.split(":")[0].split(" ")[0] for line in str(caught.value).split("\n")
    ]
    assert sorted(fields) == ["max_length", "modle", "seed"]


def test_a_missing_field_is_named(demo: RunConfig) -> None:
    values = demo.model_dump()
    del values["model"]
    with pytest.raises(ConfigError, match="^model: Field required"):
        check_config(values)


# what a run needs of its data


def test_an_sft_stage_without_rows_is_refused(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="the sft stage needs data.train"):
        changed(demo, data__train=[])


def test_a_grpo_stage_without_problems_is_refused(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="the grpo stage needs data.problems"):
        changed(demo, data__problems=None)


def test_an_sft_stage_needs_no_problems(demo: RunConfig) -> None:
    config = changed(demo, stages=["sft"], data__problems=None, data__test=None)
    assert config.data.problems is None


def test_an_eval_set_and_a_share_for_it_are_one_too_many(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="data.eval or data.eval_share, not both"):
        changed(demo, data__eval_share=0.1)


def test_a_best_adapter_by_eval_loss_needs_eval_rows(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="best_by='eval_loss' needs .*best_by='loss'"):
        changed(demo, data__eval=None)


def test_an_evaluation_during_training_needs_eval_rows(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="sft.eval_strategy needs data.eval or data"):
        changed(demo, data__eval=None, best_by="loss")


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_a_share_that_is_no_part_of_the_whole_is_refused(
    demo: RunConfig, share: float
) -> None:
    with pytest.raises(ConfigError, match="data.test_share: .*less|greater than"):
        changed(demo, data__test_share=share)


def test_a_run_without_stages_is_refused(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="^stages: .*at least 1 item"):
        changed(demo, stages=[])


def test_a_long_value_is_cut_in_the_message(demo: RunConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(demo, seed="x" * 5000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["..", ".", "../other", "a/b", "", "a b", ".hidden"])
def test_a_name_that_is_no_plain_folder_is_refused(demo: RunConfig, name: str) -> None:
    with pytest.raises(ConfigError, match="^name: "):
        changed(demo, name=name)


def test_an_assigned_value_is_checked(demo: RunConfig) -> None:
    with pytest.raises(ValueError, match="valid integer"):
        demo.seed = "seven"  # type: ignore[assignment]


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_config_survives_the_round_trip_through_json(
    name: str, tmp_path: Path
) -> None:
    config = recipes.load(name)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(indent=1), encoding="utf-8")
    assert read_config(path) == config


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config at .*gone.json; run .*00_setup"):
        read_config(tmp_path / "gone.json")


def test_broken_json_says_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"name": "demo",\n "seed" 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="config.json is not JSON: .*line 2 column 9"):
        read_config(path)


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ConfigError, match="^Input should be a valid dictionary"):
        read_config(path)


def test_changed_reaches_into_a_group_and_leaves_its_neighbours(
    demo: RunConfig,
) -> None:
    copy = changed(demo, sft__max_steps=5, data__test_rows=7, seed=1)
    expected = demo.model_dump()
    expected["sft"]["max_steps"] = 5
    expected["data"]["test_rows"] = 7
    expected["seed"] = 1
    assert copy.model_dump() == expected


def test_changed_adds_a_training_argument_that_the_recipe_lacks(
    demo: RunConfig,
) -> None:
    assert changed(demo, sft__weight_decay=0.1).sft["weight_decay"] == 0.1


def test_changed_leaves_the_original_alone(demo: RunConfig) -> None:
    before = demo.model_dump_json()
    changed(demo, sft__max_steps=5, data__train=["a.jsonl"], lora__r=1)
    assert demo.model_dump_json() == before


def test_changed_names_the_nearest_group_of_a_mistyped_one(demo: RunConfig) -> None:
    with pytest.raises(
        ConfigError, match="^sftt__max_steps: 'sftt' is not a group .* mean 'sft'\\?$"
    ):
        changed(demo, sftt__max_steps=5)


def test_changed_refuses_to_reach_into_a_plain_field(demo: RunConfig) -> None:
    with pytest.raises(ConfigError, match="'model' is not a group of the config"):
        changed(demo, model__name="x")


def test_nearest_is_empty_when_nothing_is_near() -> None:
    assert nearest("zzz", ["seed", "model"]) == ""


def test_pure_modules_load_nothing_heavy(
    heavy_modules: Callable[[str], list[str]],
) -> None:
    program = (
        "import helpers.rewards, helpers.config, helpers.recipes, helpers.data\n"
        "import helpers.runs, helpers.templates, helpers.masking, helpers.runtime\n"
        "import helpers.formats, helpers.results\n"
        "import helpers.train, helpers.models, helpers.evaluation, helpers.export"
    )
    assert heavy_modules(program) == []


# fields of earlier versions


@pytest.fixture
def retired(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {"few": (0,), "evaluation.minutes": None}.items():
        monkeypatch.setitem(config.RETIRED, name, (values, "write it in your notebook"))


def test_a_retired_field_that_changed_nothing_is_dropped(
    demo: RunConfig, retired: None
) -> None:
    assert changed(demo, few=0, evaluation__minutes=7) == demo


def test_a_retired_field_that_was_in_use_is_refused_with_what_replaced_it(
    demo: RunConfig, retired: None
) -> None:
    with pytest.raises(ConfigError, match="^few=4 no longer exists: write it in your"):
        changed(demo, few=4)
