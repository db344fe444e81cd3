"""Lists of sources in a configuration: how they are read and overridden, what each takes from `data`, the rules.

Not covered here: the rows that they lead to (tests/data), single keys' types and bounds (test_schema.py).
"""

import pytest
import yaml

from grpo_mcore.config import data_sources
from grpo_mcore.config.config import InputError, Source
from grpo_mcore.config.file import describe, load, to_yaml

TOP = "model: some/folder\nrun_dir: runs/x\nnum_steps: 3\n"


def read(tmp_path, text: str, *overrides: str):
    path = tmp_path / "c.yaml"
    path.write_text(TOP + text)
    return load(path, overrides)


def of_train(cfg) -> list[data_sources.Resolved]:
    return data_sources.of(cfg, "data.train")


def test_a_list_of_sources_is_read_and_comes_back_from_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("ROWS", "/rows")
    cfg = read(
        tmp_path,
        "data:\n  train:\n  - {path: $ROWS/a.jsonl, weight: 3}\n  - {path: b/c, split: test, name: other}\n"
        "eval:\n  data:\n  - path: aime24\n  - {path: math500, limit: 100}\n",
    )
    assert cfg.data.train == (Source("/rows/a.jsonl", weight=3.0), Source("b/c", split="test", name="other"))
    assert cfg.eval.data == (Source("aime24"), Source("math500", limit=100))
    (tmp_path / "printed.yaml").write_text(describe(cfg, 1))
    assert load(tmp_path / "printed.yaml") == cfg
    assert yaml.safe_load(to_yaml(cfg))["data"]["train"][1]["split"] == "test"  # a reader of YAML 1.1


def test_an_override_is_a_list_if_it_begins_like_one_and_else_a_path(tmp_path):
    text = "data: {train: a.jsonl}\n"
    assert read(tmp_path, text, "data.train=[{path: b.jsonl, weight: 2}]").data.train == (
        Source("b.jsonl", weight=2.0),
    )
    assert read(tmp_path, text, "data.train=./[b].jsonl").data.train == "./[b].jsonl"
    assert read(tmp_path, text, "eval.data=null").eval.data is None


def test_arguments_of_the_template_are_the_users_own_names(tmp_path):
    text = "data: {train: a.jsonl, template_arguments: {enable_thinking: false, depth: 3}}\n"
    cfg = read(tmp_path, text, "data.template_arguments.mood=kind")
    assert cfg.data.template_arguments == {"enable_thinking": False, "depth": 3, "mood": "kind"}
    assert read(tmp_path, text, "data.template_arguments={a: null}").data.template_arguments == {"a": None}
    (tmp_path / "printed.yaml").write_text(describe(cfg, 1))
    assert load(tmp_path / "printed.yaml") == cfg
    hash(cfg.data)  # stages look at no two equal ones twice


def test_a_source_takes_from_data_what_it_does_not_say(tmp_path):
    cfg = read(
        tmp_path,
        "data:\n  problem_key: q\n  answer_regex: (x)\n  system_prompt: add\n  train:\n"
        "  - path: a.jsonl\n"
        "  - {path: b.jsonl, answer_key: gold, answer_from: column, system_prompt: multiply}\n"
        "  - {path: c.parquet, format: verl}\n"
        "  - {path: d.jsonl, format: gsm8k, answer_regex: '#+ (.+)'}\n",
    )
    keys = [(s.problem_key, s.answer_key, s.answer_regex, s.answer_from, s.system_prompt) for s in of_train(cfg)]
    assert keys == [
        ("q", "answer", "(x)", "column", "add"),
        ("q", "gold", None, "column", "multiply"),
        ("prompt", "reward_model.ground_truth", None, "column", "add"),
        ("question", "answer", "#+ (.+)", "column", "add"),
    ]


def test_a_format_of_all_data_has_its_columns_and_takes_another_answer(tmp_path):
    (source,) = of_train(read(tmp_path, "data: {train: a.jsonl, format: gsm8k}\n"))
    assert (source.problem_key, source.answer_key, source.answer_from) == ("question", "answer", "hash")
    (source,) = of_train(read(tmp_path, "data: {train: a.jsonl, format: gsm8k, answer_from: last_number}\n"))
    assert (source.answer_from, source.answer_regex) == ("last_number", None)


def test_names_are_made_of_paths(tmp_path):
    names = [
        data_sources.default_name(p) for p in ("a/b.jsonl", "own.er/set-1", "arithmetic:one_digit/train", "aime24")
    ]
    assert names == ["b", "own.er_set-1", "arithmetic_one_digit_train", "aime24"]
    assert data_sources.several("a.jsonl") == [] == data_sources.several((Source("a.jsonl"),))


@pytest.mark.parametrize(
    "text, message",
    [
        ("data: {train: []}", "data.train = []: names no source. Remedy: name one"),
        ("data: {train: 3}", "data.train = 3: must be a text or a list of sections"),
        ("data: {train: [a.jsonl]}", "data.train = ['a.jsonl']: must be a list of sections"),
        ("data: {train: [{weight: 3}]}", "data.train[0].path = None: is required"),
        (
            "data: {train: [{path: a, wieght: 3}]}",
            "data.train[0].wieght = 3: there is no such key. Remedy: did you mean data.train[0].weight",
        ),
        ("data: {train: [{path: a}, {path: b, weight: 0}]}", "data.train[1].weight = 0.0: must be greater than 0"),
        ("data: {train: [{path: a}, {path: b/a, name: a}]}", "data.train[1].name = 'a': is another source's too"),
        ("data: {train: [{path: a, name: a/b}]}", "data.train[0].name = 'a/b': is part of metrics' names"),
        ("data: {train: [{path: a, answer_regex: 'a+'}]}", "data.train[0].answer_regex = 'a+': must contain ("),
        ("data: {train: [{path: a, answer_regex: '('}]}", "data.train[0].answer_regex = '(': must be a regular"),
        (
            "data: {train: [{path: a, answer_regex: '(a)', answer_from: hash}]}",
            "data.train[0].answer_from = 'hash': and",
        ),
        (
            "data: {train: a, answer_regex: '(a)', answer_from: hash}",
            "data.answer_from = 'hash': and data.answer_regex",
        ),
        (
            "data: {train: a, format: verl, problem_key: q}",
            "data.problem_key = 'q': is another column than format = ve",
        ),
        (
            "data: {train: [{path: a, format: verl, answer_key: q}]}",
            "data.train[0].answer_key = 'q': is another column",
        ),
        (
            "data: {train: [{path: a, weight: 1.23456}, {path: b, weight: 7.654321}]}",
            "data.train = '1.23456, 7.65432': "
            "weights make an order that repeats after more than 100000 prompts. Remedy: write them with fewer digits",
        ),
        (
            "data: {train: a}\neval: {data: [{path: a, weight: 2}]}",
            "eval.data[0].weight = 2.0: has no meaning in an eva",
        ),
        ("data: {train: a, chat_template: false, system_prompt: b}", "data.system_prompt = 'b': needs a chat template"),
        (
            "data: {train: [{path: a, system_prompt: b}], chat_template: false}",
            "data.train[0].system_prompt = 'b': needs",
        ),
        (
            "data: {train: a, chat_template: false, template_arguments: {a: 1}}",
            "data.template_arguments = {'a': 1}: need",
        ),
        ("data: {train: a, template_arguments: {a: [1]}}", "data.template_arguments.a = [1]: must be a text, a number"),
        ("data: {train: a, template_arguments: 3}", "data.template_arguments = 3: must be a mapping of names"),
        ("data: {train: a, max_pass_rate: 0}", "data.max_pass_rate = 0.0: must be greater than 0"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_by_its_key(tmp_path, text, message):
    with pytest.raises(InputError) as e:
        read(tmp_path, text + "\n")
    assert str(e.value).startswith(message)
