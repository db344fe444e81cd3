"""configs/schema.json and docs/configuration.md say what config.py says, and the schema judges as the loader does.

Not covered here: rules between keys, and integers beyond 64 bits, which are the loader's alone.
"""

import copy
import dataclasses
import json
import math
import os
import re

import jsonschema
import pytest
import yaml

from grpo_mcore.config import schema, strict_yaml
from grpo_mcore.config.bounds import PositiveFloat, PositiveInt
from grpo_mcore.config.config import Config, InputError, RewardFunction, Source
from grpo_mcore.config.file import load
from tests.dist import ROOT

RUNS = [  # a stages file has keys of its own
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "stages" not in yaml.safe_load(path.read_text())
]
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema.SCHEMA.read_text()))
MINIMAL = {"model": "some/folder", "run_dir": "runs/x", "num_steps": 3, "data": {"train": "train.jsonl"}}


def problems(tree: dict) -> list[str]:
    """What the schema says against a file, each with its place in it."""
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(tree)]


def changed(dotted: str, value: object) -> dict:
    """MINIMAL with another value of one key, and a warm start where the key is of one."""
    tree = copy.deepcopy(MINIMAL)
    if dotted.startswith("warm_start."):
        tree["warm_start"] = {"task": "two_digit_sums"}
    *sections, name = dotted.split(".")
    node = tree
    for section in sections:
        if section.endswith("[]"):  # a list of one item
            node[section[:-2]] = [item := {"path": "rows.jsonl"}]
            node = item
        else:
            node = node.setdefault(section, {})
    node[name] = value
    return tree


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    return [
        name
        for key in schema.keys(cls)
        for name in (all_keys(key.section, f"{prefix}{key.name}.") if key.section else [prefix + key.name])
    ]


# What the lists of sections hold; eval.data's is data.train's.
OF_ITEMS = [*all_keys(Source, "data.train[]."), *all_keys(RewardFunction, "reward.functions[].")]


def test_what_is_made_of_the_configuration_is_not_stale():
    for path, text in schema.files().items():
        assert path.read_text() == text, f"{path.name}: run python -m grpo_mcore.config.schema"


def sections(cls: type = Config) -> list[type]:
    return [cls, *(key.section for key in schema.keys(cls) if key.section), Source]


@pytest.mark.parametrize("cls", sections(), ids=lambda cls: cls.__name__)
def test_every_section_and_key_says_what_it_is(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")  # dataclass would write one
    assert [key.name for key in schema.keys(cls) if not key.what] == [], "write a comment behind or right above it"


def test_the_schema_is_one_and_a_page_has_every_key():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    rows = re.findall(r"^(?:## ([\w.\[\]]+)|\| `(\w+)`)", schema.page(), re.MULTILINE)
    found, section = [], ""
    for heading, name in rows:
        section = f"{heading}." * (heading != "Top") if heading else section
        found += [section + name] * bool(name)
    assert sorted(found) == sorted(["inherit", *all_keys(), *OF_ITEMS])


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_configuration_of_the_repository_is_valid_and_leads_editors_to_the_schema(path):
    text = path.read_text()
    assert problems(strict_yaml.read(text, "", "")) == []
    first = text.partition("\n")[0]
    assert first == f"# yaml-language-server: $schema={os.path.relpath(schema.SCHEMA, path.parent)}"


@pytest.mark.parametrize(
    "dotted, value, message",
    [
        ("nun_steps", 3, "$: Additional properties are not allowed ('nun_steps' was unexpected)"),
        ("rollout.group_sise", 8, "$.rollout: Additional properties are not allowed ('group_sise' was unexpected)"),
        ("rollout.group_size", 1, "$.rollout.group_size: 1 is less than the minimum of 2"),
        ("num_steps", "many", "$.num_steps: 'many' is not of type 'integer'"),
        ("num_steps", True, "$.num_steps: True is not of type 'integer'"),
        ("num_steps", None, "$.num_steps: None is not of type 'integer'"),
        ("num_steps", 0, "$.num_steps: 0 is less than or equal to the minimum of 0"),
        ("data.chat_template", 1, "$.data.chat_template: 1 is not of type 'boolean'"),
        ("data.prompt_template", "Solve it.", "$.data.prompt_template: 'Solve it.' does not match"),
        ("optimizer.lr", "1e-6", "$.optimizer.lr: '1e-6' is not of type 'number'"),
        ("optimizer.lr", math.inf, "$.optimizer.lr: inf is greater than the maximum of 1"),
        ("loss.kl_coef", math.inf, "$.loss.kl_coef: inf is greater than the maximum of 1.79769"),
        ("loss.kl_limit", math.nan, "$.loss.kl_limit: nan should not be valid under"),
        ("eval.top_p", 1.5, "$.eval.top_p: 1.5 is greater than the maximum of 1"),
        ("eval.max_prompts", 0, "$.eval.max_prompts: 0 is less than or equal to the minimum of 0"),
        ("loss.kl_estimator", "k4", "$.loss.kl_estimator: 'k4' is not one of ['k1', 'k2', 'k3']"),
        ("precision.fp8", "fast", "$.precision.fp8: 'fast' is not one of"),
        ("engine.cores", [0, -1], "$.engine.cores[1]: -1 is less than the minimum of 0"),
        ("parallel.recompute_modules", ["moe"], "$.parallel.recompute_modules[0]: 'moe' is not one of"),
        ("rollout", 5, "$.rollout: 5 is not of type 'object'"),
        ("warm_start", {"lr": 1.0}, "$.warm_start: 'task' is a required property"),
        ("data", {}, "$.data: 'train' is a required property"),
        ("inherit", ["a.yaml"], "$.inherit: ['a.yaml'] is not of type 'string'"),
    ],
)
def test_a_mistake_is_named_where_it_stands(dotted, value, message):
    found = problems(changed(dotted, value))
    assert len(found) == 1 and found[0].startswith(message)


@pytest.mark.parametrize("name", ["model", "run_dir", "num_steps", "data"])
def test_what_has_no_default_is_required_of_a_file_that_inherits_nothing(name):
    tree = {key: value for key, value in MINIMAL.items() if key != name}
    assert problems(tree) == [f"$: '{name}' is a required property"]
    assert problems(tree | {"inherit": "base.yaml"}) == []


def test_an_heir_may_leave_out_what_a_section_requires():
    assert problems({"inherit": "base.yaml", "data": {"skip_prompts": 3}, "warm_start": {"lr": 1.0}}) == []


VALUES = [
    0,
    1,
    -1,
    0.5,
    1.01,
    1e-6,
    math.inf,
    -math.inf,
    math.nan,
    "1e-6",
    "-1e-6",
    True,
    None,
    "x",
    "{problem}",
    {},
    [],
    ["x"],
    [-1],
]


@pytest.mark.parametrize("dotted", [*all_keys(), *OF_ITEMS])
def test_the_schema_takes_what_the_loader_takes_and_no_other_type_or_size(tmp_path, dotted):
    path, named = tmp_path / "c.yaml", re.escape(dotted.replace("[]", "[0]"))
    for value in [*VALUES, *schema_of(dotted).get("enum", [])]:
        tree = changed(dotted, value)
        path.write_text(strict_yaml.write(tree))
        try:
            load(path)
            said = ""
        except InputError as e:
            said = str(e)
        if not said:
            assert problems(tree) == [], value
        elif re.match(rf"{named} = .*: must be (of|one of|a|greater|0 or|between) ", said):  # of this key alone
            assert problems(tree) != [], (value, said)


def schema_of(dotted: str) -> dict:
    node = VALIDATOR.schema
    for name in dotted.split("."):
        node = node["properties"][name.removesuffix("[]")]
        if name.endswith("[]"):
            node = node["anyOf"][1]["items"] if "anyOf" in node else node["items"]
    return node


def test_a_comment_stands_behind_a_field_or_right_above_it():
    assert schema.comments(Sample) == {
        "above": "two lines above: the second one",
        "behind": "behind",
        "both": "above and behind",
    }


@dataclasses.dataclass
class Sample:
    """Not a configuration."""

    none: PositiveInt = 1
    # another's

    # two lines above:
    # the second one
    above: int = 1
    behind: str = "# not a comment"  # behind
    # above
    both: PositiveFloat | None = None  # and behind
