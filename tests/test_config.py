"""Tests of helpers.config: what is refused, in which words, and what is kept."""

import pytest

from helpers import config, recipes
from helpers.config import changed, check_config, read_config
from helpers.errors import ConfigError


@pytest.fixture
def demo():
    return recipes.load("demo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # names, types and ranges
        ({"modle": 1}, r"^modle is not a field of the config; did you mean 'model'\?$"),
        ({"data__trian": []}, r"^data.trian is not a field .* mean 'train'\?$"),
        ({"qqqq": 1}, "^qqqq is not a field of the config$"),
        ({"seed": "seven"}, r"^seed: .*valid integer.*\(found 'seven'\)$"),
        ({"engine": "unslot"}, r"^engine: .*'unsloth' or .* \(found 'unslot'\)$"),
        ({"data__eval_rows": 0}, "^data.eval_rows: .* or equal to 1 .*found 0"),
        ({"data__test_share": 1.5}, "^data.test_share: .*less than 1"),
        ({"data__test_share": 0}, "^data.test_share: .*greater than 0"),
        ({"stages": []}, "^stages: .*at least 1 item"),
        ({"seed": "x" * 5000}, r"^seed: .{,190}$"),
        ({"sftt__max_steps": 5}, r"^sftt is not a field .* mean 'sft'\?$"),
        *(
            ({"name": name}, "^name: ")
            for name in ["..", "../other", "a/b", "", "a b", ".hidden"]
        ),
        # what a run needs of its data
        ({"data__train": []}, "the sft stage needs data.train"),
        ({"data__problems": None}, "the grpo stage needs data.problems"),
        ({"data__eval_share": 0.1}, "data.eval or data.eval_share, not both"),
        ({"data__eval": None}, "best_by='eval_loss' needs .*best_by='loss'"),
        ({"data__test": {"path": "a.csv", "weight": 2}}, "^data.test: a weight is of"),
        (
            {"data__test": {"path": "a.csv", "rows": 0}},
            r"^data.test.rows: .*found 0\)$",
        ),
        ({"data__train": [5]}, r"^data.train.0: .* instance of Source \(found 5\)$"),
        ({"seed__x": 1}, "^seed__x: seed is one field, without others in it$"),
        ({"few_shot": 2}, "^few_shot is not a field of the config$"),  # no longer
        ({"evaluation__labels": ["yes", "yes "]}, "different labels expected"),
    ],
    ids=str,
)
def test_a_faulty_config_is_refused_with_the_field_and_the_remedy(
    demo, changes, message
):
    with pytest.raises(ConfigError, match=message):
        changed(demo, **changes)


def test_every_fault_has_its_own_line(demo):
    with pytest.raises(ConfigError) as caught:
        changed(demo, seed=-1, max_length=3, modle="x")
    lines = str(caught.value).split("\n")
    assert sorted(line[:4] for line in lines) == ["max_", "modl", "seed"]
    with pytest.raises(ConfigError, match="^model: Field required"):
        check_config(demo.model_dump(exclude={"model"}))


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_config_survives_the_round_trip_through_json(name, tmp_path):
    path = tmp_path / "config.json"
    text = recipes.load(name).model_dump_json(indent=1)
    path.write_text(text, encoding="utf-8-sig")  # as editors on Windows write it
    assert read_config(path) == recipes.load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config at .*config.json; run .*00_setup"),
        ('{"name": "demo",\n "seed" 1}', "config.json is not JSON: .*line 2 column 9"),
        ("[1, 2]", "^Input should be a valid dictionary"),
        ('{"name": "\udce9"}', "config.json is not JSON: .*can't decode byte 0xe9"),
    ],
)
def test_a_file_that_holds_no_config_says_why(text, message, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_changed_reaches_into_a_group_and_leaves_the_rest_and_the_original(demo):
    before = demo.model_dump_json()
    copy = changed(demo, sft__max_steps=5, sft__weight_decay=0.1, data__test_rows=7)
    assert demo.model_dump_json() == before
    expected = demo.model_dump()
    expected["sft"] |= {"max_steps": 5, "weight_decay": 0.1}
    expected["data"]["test_rows"] = 7
    assert copy.model_dump() == expected


def test_a_stage_is_completed_with_trls_own_defaults(demo):
    from trl import SFTConfig

    bare = changed(demo, sft={"max_steps": 3})
    values = config.complete(bare, "sft")
    own = {f: v.default for f, v in SFTConfig.__dataclass_fields__.items()}
    assert values["max_steps"] == 3
    assert values["weight_decay"] == own["weight_decay"]
    assert values["optim"] == "adamw_torch"  # the fused one hides skipped steps


def test_reading_configs_loads_nothing_heavy(heavy_modules):
    program = (
        "from helpers import config, recipes, runs, runtime, install, checks\n"
        "recipes.load('demo')"
    )
    assert heavy_modules(program) == []
