"""Rows of a file, the tokenizer around them, and the seeded stream of prompts.

Not covered here: data sets of the hub (no network in tests), the arithmetic tasks (test_arithmetic.py).
"""

import json
from pathlib import Path

import pytest

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.types import Prompt

PLAIN = config.Data(train="", chat_template=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    arithmetic.make_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> prompts.Tokenizer:
    return prompts.Tokenizer(str(folder))


def jsonl(path: Path, *rows: dict | str) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"problem": "1+2", "answer": "3"}


def test_rows_come_in_the_order_of_the_file_and_as_text(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", GOOD, "", {"problem": "1-1", "answer": 0, "level": 5})
    # A blank line is no row; the number 0 is an answer and not an empty one.
    assert prompts.read_rows(source, PLAIN, "data.train") == [("1+2", "3"), ("1-1", "0")]


def test_columns_are_read_by_the_configured_names(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", {"question": "1+2", "gold": "3", "answer": "no"})
    data = config.Data(train="", problem_key="question", answer_key="gold")
    assert prompts.read_rows(source, data, "data.train") == [("1+2", "3")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "1+2"}, "has no column 'answer'. Remedy: set data.answer_key"),
        ({"question": "1+2", "answer": "3"}, "has no column 'problem'. Remedy: set data.problem_key"),
        ([1, 2], "has no column 'problem'"),
        ({"problem": "1+2", "answer": " "}, "its 'answer' is empty. Remedy: mend or remove the row"),
        ({"problem": "1+2", "answer": None}, "its 'answer' is empty"),
        ({"problem": "", "answer": "3"}, "its 'problem' is empty"),
    ],
)
def test_a_bad_row_is_named_by_field_file_and_line(tmp_path, row, message):
    source = jsonl(tmp_path / "d.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(InputError) as e:
        prompts.read_rows(source, PLAIN, "eval.data")
    assert message in str(e.value)
    assert str(e.value).startswith(f"eval.data: {source}, line 3 = ")  # counted as an editor counts them


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.json", "gone.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    source = str(tmp_path / name)
    with pytest.raises(InputError) as e:
        prompts.read_rows(source, PLAIN, "data.train")
    assert str(e.value) == f"data.train = {source!r}: there is no such file. Remedy: check the path."


def test_a_line_that_is_not_json_is_named_by_file_and_line(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", GOOD, '{"problem": "1+2", "answer": ')
    with pytest.raises(InputError, match="d.jsonl, line 2"):
        prompts.read_rows(source, PLAIN, "data.train")


def test_a_line_separator_within_a_json_string_does_not_end_the_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"problem": "1\u20282", "answer": "3"}, ensure_ascii=False) + "\n")
    assert prompts.read_rows(str(path), PLAIN, "data.train") == [("1\u20282", "3")]


def parquet(path: Path, columns: dict[str, list]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_parquet_file_gives_the_rows_that_the_same_jsonl_gives(tmp_path, datasets_cache):
    rows = [{"problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(20)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    from_parquet = prompts.read_rows(parquet(tmp_path / "d.parquet", columns), PLAIN, "data.train")
    assert from_parquet == prompts.read_rows(jsonl(tmp_path / "d.jsonl", *rows), PLAIN, "data.train")


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path, datasets_cache):
    source = parquet(tmp_path / "d.parquet", {"problem": ["1+1", "2+2"], "answer": ["2", None]})
    with pytest.raises(InputError, match="d.parquet, row 1.*its 'answer' is empty"):
        prompts.read_rows(source, PLAIN, "data.train")


def test_over_long_prompts_are_counted_and_left_out_and_ids_stay_those_of_the_file(tmp_path, tokenizer):
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "1"} for p in ("1+2", "11+22", "111+222", "3+4")))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)  # characters are tokens
    kept, too_long = prompts.load(source, data, tokenizer, "data.train")
    assert too_long == 1
    assert [(p.id, p.problem, p.answer) for p in kept] == [(0, "1+2", "1"), (1, "11+22", "1"), (3, "3+4", "1")]
    assert all(p.token_ids == tokenizer.encode_plain(p.problem) for p in kept)


def test_over_long_prompts_may_keep_their_place_cut_and_masked(tmp_path, tokenizer):
    source = jsonl(tmp_path / "d.jsonl", *({"problem": p, "answer": "1"} for p in ("1+2", "111+222", "3+4")))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)
    kept, too_long = prompts.load(source, data, tokenizer, "data.train", overlong="mask")
    assert too_long == 1
    assert [(p.id, tokenizer.decode(p.token_ids), p.masked) for p in kept] == [
        (0, "1+2", False),
        (1, "111+2", True),
        (2, "3+4", False),
    ]


@pytest.mark.parametrize("overlong", ["filter", "mask"])
def test_a_file_without_a_prompt_that_fits_is_refused(tmp_path, tokenizer, overlong):
    source = jsonl(tmp_path / "d.jsonl", GOOD)
    data = config.Data(train="", chat_template=False, max_prompt_tokens=2)
    with pytest.raises(InputError, match="holds no prompt of at most 2 tokens. Remedy: raise data.max_prompt_tokens"):
        prompts.load(source, data, tokenizer, "data.train", overlong=overlong)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{problem}=", "1+2="),
        (r"\boxed{}{problem}", r"\boxed{}1+2"),  # str.format would take {} for a field
        (r"\boxed{{problem}}", r"\boxed{1+2}"),  # and {{ for a brace
        ("{problem}?{problem}", "1+2?1+2"),
    ],
)
def test_only_problem_is_replaced_in_a_template_and_other_braces_are_literal(tokenizer, template, text):
    data = config.Data(train="", chat_template=False, prompt_template=template)
    assert tokenizer.decode(tokenizer.encode("1+2", data)) == text


def test_a_chat_template_that_the_tokenizer_lacks_is_refused(tokenizer):
    with pytest.raises(
        InputError, match="data.chat_template = True: .*has no chat template. Remedy: set data.chat_template=false"
    ):
        tokenizer.encode("1+2", config.Data(train=""))


def test_a_chat_template_wraps_the_text_as_the_users_turn_and_opens_the_answer(tmp_path):
    arithmetic.make_model(tmp_path, seed=0)
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }},{% endfor %}{% if add_generation_prompt "
        "%}assistant:{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = prompts.Tokenizer(str(tmp_path))
    ids = tokenizer.encode("1+2", config.Data(train="", prompt_template="{problem}="))
    assert tokenizer.decode(ids) == "user:1+2=,assistant:"


def test_decode_keeps_the_thinking_tags_and_drops_what_ends_a_response(tokenizer):
    text = r"<think>1+2=3</think>\boxed{3}"
    assert tokenizer.decode(tokenizer.encode_plain(text + "<eos>")) == text


def test_decode_keeps_the_thinking_tags_also_where_the_tokenizer_calls_them_special(folder, tmp_path):
    from transformers import AutoTokenizer

    special = AutoTokenizer.from_pretrained(folder)
    special.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    special.save_pretrained(tmp_path)
    tokenizer = prompts.Tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode_plain("<think>1</think>2<eos>")) == "<think>1</think>2"


def test_every_end_token_that_the_folder_names_stops_a_response(folder, tmp_path):
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    before = prompts.Tokenizer(str(folder))
    (eos,) = before.stop_token_ids
    (z,) = before.encode_plain("z")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, z]}))
    tokenizer = prompts.Tokenizer(str(tmp_path))
    assert tokenizer.stop_token_ids == sorted([eos, z])
    assert tokenizer.decode(tokenizer.encode_plain("yz")) == "y"


PROMPTS = [Prompt(i, "", "", (i,)) for i in range(7)]


def order(seed: int, start: int, end: int) -> list[int]:
    """Ids of the prompts at these positions, by a stream that was asked for no others."""
    stream = prompts.Stream(PROMPTS, seed)
    return [stream.at(position).id for position in range(start, end)]


def test_each_epoch_is_another_permutation_of_all_prompts():
    epochs = [tuple(order(3, 7 * i, 7 * i + 7)) for i in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1 and epochs[0] != tuple(range(7))


def test_the_order_is_a_function_of_the_seed():
    assert order(3, 0, 21) == order(3, 0, 21)
    assert len({tuple(order(seed, 0, 21)) for seed in range(5)}) == 5


def test_what_stands_at_a_position_does_not_depend_on_what_was_asked_before():
    whole = order(3, 0, 30)
    # 7 prompts: over an epoch's end wherever a start is not on it
    assert all(order(3, start, start + 7) == whole[start : start + 7] for start in range(23))
    stream = prompts.Stream(PROMPTS, 3)
    assert [stream.at(p).id for p in reversed(range(30))] == whole[::-1]


def test_a_later_stage_begins_where_the_former_stopped_and_repeats_no_prompt_before_all_were_seen():
    whole = order(3, 0, 30)
    stages = [(skip, prompts.Stream(PROMPTS, 3, skip=skip)) for skip in (0, 4, 6)]
    assert [stream.at(p).id for (skip, stream), n in zip(stages, (4, 2, 24)) for p in range(n)] == whole
    assert len(set(whole[:7])) == 7


REAL = {"deepscaler": 40308, "aime_2024": 30, "math_500": 500, "amc_2023": 40}


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_published_sets_is_a_problem_with_an_answer(name):
    path = Path(__file__).parents[3] / "shared" / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    assert len(prompts.read_rows(str(path), PLAIN, "data.train")) == REAL[name]
