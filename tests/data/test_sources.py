"""Rows of files, and of data sets of a hub (a stand-in on this machine).

Not covered here: the real hub, the arithmetic tasks (test_arithmetic.py).
"""

import copy
import csv
import datetime
import decimal
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from grpo_mcore.config import config, data_sources
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts, sources
from grpo_mcore.reward import golds
from tests.dist import ROOT, environment, spawn
from tests.hub import Hub


def read_rows(source: data_sources.Given, data: config.Data, name: str) -> list[tuple[str, str]]:
    return [(row.problem, row.answer) for row in sources.read_rows(source, data, name)]


PLAIN = config.Data(train="", chat_template=False)


def jsonl(path: Path, *rows: dict | str) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"problem": "1+2", "answer": "3"}


def test_rows_come_in_the_order_of_the_file_and_as_text(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", GOOD, "", {"problem": "1-1", "answer": 0, "level": 5})
    # A blank line is no row; the number 0 is an answer and not an empty one.
    assert read_rows(source, PLAIN, "data.train") == [("1+2", "3"), ("1-1", "0")]


def test_columns_are_read_by_the_configured_names(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", {"question": "1+2", "gold": "3", "answer": "no"})
    data = config.Data(train="", problem_key="question", answer_key="gold")
    assert read_rows(source, data, "data.train") == [("1+2", "3")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "1+2"}, "has no column 'answer'. Remedy: set data.answer_key"),
        ({"question": "1+2", "answer": "3"}, "has no column 'problem'. Remedy: set data.problem_key"),
        ([1, 2], "is of type list, where a row belongs. Remedy: write each as an object"),
        ('"1+2"', "is of type str, where a row belongs"),
        ({"problem": "1+2", "answer": "\u200b\t"}, "its 'answer' is empty"),
        ({"problem": "1+2", "answer": " "}, "its 'answer' is empty. Remedy: mend or remove the row"),
        ({"problem": "1+2", "answer": None}, "its 'answer' is empty"),
        ({"problem": "", "answer": "3"}, "its 'problem' is empty"),
    ],
)
def test_a_bad_row_is_named_by_field_file_and_line(tmp_path, row, message):
    source = jsonl(tmp_path / "d.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(InputError) as e:
        read_rows(source, PLAIN, "eval.data")
    assert message in str(e.value)
    assert str(e.value).startswith(f"eval.data: {source}, line 3 = ")  # counted as an editor counts them


@pytest.mark.parametrize(
    "value, words",
    [
        (["2"], "is of type list, where a text or a number belongs"),
        ([{"role": "user", "content": "1+2"}, 3], "is of type list"),
        ([], "is of type list"),
        ({"text": "2"}, "is of type dict"),
        (True, "is of type bool"),
        (float("nan"), "is nan, where"),
        (float("-inf"), "is -inf, where"),
        ("x\ud800", "has half of a character"),
    ],
)
@pytest.mark.parametrize("key", ["problem", "answer"])
def test_what_is_no_text_and_no_number_is_not_made_one(tmp_path, key, value, words):
    source = jsonl(tmp_path / "d.jsonl", GOOD, {**GOOD, key: value})
    with pytest.raises(InputError, match=f"line 2 = .*its '{key}' {words}"):
        read_rows(source, PLAIN, "data.train")


@pytest.mark.parametrize(
    "answers, words",
    [
        ([["3"], ["4"]], "is of type list"),
        ([b"3", b"4"], "is of type bytes"),
        ([datetime.date(2024, 1, 1)] * 2, "is of type date"),
        ([{"value": 3}] * 2, "is of type dict"),
        ([None, None], "is empty"),
    ],
)
def test_columns_of_parquet_are_held_to_the_same(tmp_path, answers, words):
    source = str(tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["1+2", "2+2"], "answer": answers}), source)
    with pytest.raises(InputError, match=f"row 0 = .*its 'answer' {words}"):
        read_rows(source, PLAIN, "data.train")


def test_a_number_is_written_in_digits(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", *({"problem": "x", "answer": n} for n in (72.0, 0.1, -2, 1e22, 1e-7, 10**30)))
    answers = [answer for _, answer in read_rows(source, PLAIN, "data.train")]
    assert answers == ["72.0", "0.1", "-2", "1" + 22 * "0", "0.0000001", "1" + 30 * "0"]


def test_a_decimal_number_of_parquet_is_as_it_is_written(tmp_path):
    source, numbers = str(tmp_path / "d.parquet"), [decimal.Decimal("2.50"), decimal.Decimal("4.00")]
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["1+2", "2+2"], "answer": numbers}), source)
    assert read_rows(source, PLAIN, "data.train") == [("1+2", "2.50"), ("2+2", "4.00")]


def rows_of(source: str, **keys: object) -> list[tuple[str, str]]:
    """Of a source with these keys."""
    return read_rows((config.Source(source, **keys),), PLAIN, "data.train")


def test_a_dot_leads_into_a_column_and_a_column_whose_name_has_the_dot_goes_first(tmp_path):
    nested = {"in": {"text": "1+2", "deep": {"er": 3}}, "in.text": "4+5"}
    source = jsonl(tmp_path / "d.jsonl", nested, {"in": {"text": "6+7", "deep": {"er": 13}}})
    assert rows_of(source, problem_key="in.text", answer_key="in.deep.er") == [("4+5", "3"), ("6+7", "13")]


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"problem": "1+2", "gold": {"text": "3"}},
            "has no column 'gold.answer'. Remedy: set data.train[0].answer_key "
            "(there are 'text' in 'gold'), or mend the row",
        ),
        ({"problem": "1+2", "gold": "3"}, "has no column 'gold.answer'. Remedy: set data.train[0].answer_key, or mend"),
        ({"problem": "1+2", "gold": {"answer": " "}}, "its 'gold.answer' is empty"),
        ({"problem": "1+2", "gold": {"answer": {}}}, "its 'gold.answer' is of type dict"),
    ],
)
def test_a_path_of_keys_that_leads_nowhere_is_said(tmp_path, row, words):
    source = jsonl(tmp_path / "d.jsonl", row)
    with pytest.raises(InputError) as e:
        rows_of(source, answer_key="gold.answer")
    assert f"data.train[0]: {source}, line 1 = " in str(e.value) and words in str(e.value)


@pytest.mark.parametrize(
    "how, text, answer",
    [
        ("column", "It is #### 3", "It is #### 3"),
        ("hash", "1+2=<<1+2=3>>3\n#### 3\n", "3"),
        ("hash", "#### 1 #### -70,000\nand so on", "-70,000"),
        ("boxed", r"So \boxed{1} is wrong and it is \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        ("last_number", "48 and 24 make 72 clips.", "72"),
        ("last_number", "In all -1,234.50 dollars", "-1234.50"),
        ("last_number", "10-3", "3"),
        ("last_number", "x = -3.", "-3"),
        ("last_number", "1,2345", "2345"),
        ("last_number", "half is .5", ".5"),
    ],
)
def test_the_answer_is_found_in_its_column(tmp_path, how, text, answer):
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": text})
    assert read_rows(source, config.Data(train="", answer_from=how), "data.train") == [("1+2", answer)]
    assert rows_of(source, answer_from=how) == [("1+2", answer)]


@pytest.mark.parametrize("how, text", [("hash", "3"), ("hash", "####  "), ("boxed", "3"), ("last_number", "three")])
def test_an_answer_that_is_not_in_its_column_is_said(tmp_path, how, text):
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": text})
    with pytest.raises(InputError, match=f"line 1 = .*: its 'answer' has no answer by answer_from = {how}. Remedy: "):
        rows_of(source, answer_from=how)


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+2"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"split": "train", "index": 0},
}


def test_rows_of_verl_are_read_as_they_stand(tmp_path):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL]), path)
    for data in (config.Data(train="", format="verl"), config.Data(train="", problem_key="q", answer_regex="(x)")):
        given = (config.Source(str(path), format="verl"),)  # data's keys are of another format's columns
        (row,) = sources.read_rows(given, data, "data.train")
        assert (row.problem, row.answer, row.columns) == ("1+2", "3", VERL)
        assert row.messages == tuple(VERL["prompt"])


def test_rows_of_gsm8k_are_read_as_they_stand(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", {"question": "1+2", "answer": "1+2=<<1+2=3>>3\n#### 3"})
    assert read_rows(source, config.Data(train="", format="gsm8k"), "data.train") == [("1+2", "3")]
    with pytest.raises(InputError, match="has no column 'prompt'. Remedy: set a format other than verl"):
        read_rows(source, config.Data(train="", format="verl"), "data.train")


def test_a_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", GOOD, {**GOOD, "problem": "2+1"}, {"problem": "bad"})
    assert rows_of(source, limit=2) == [("1+2", "3"), ("2+1", "3")]
    made = read_rows((config.Source("arithmetic:one_digit/train", limit=3),), PLAIN, "data.train")
    assert made == arithmetic.rows("one_digit/train")[:3]


@pytest.mark.parametrize("key", ["subset", "split", "revision"])
def test_what_a_file_has_no_use_for_is_refused(tmp_path, key):
    source = jsonl(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(
        InputError, match=rf"data.train\[0\].{key} = 'x': is of a data set, and this is a file. Remedy: "
    ):
        rows_of(source, **{key: "x"})
    with pytest.raises(InputError, match="is of a data set, and this one is made"):
        rows_of("arithmetic:one_digit/train", **{key: "x"})


def test_a_subset_and_a_split_of_a_data_set_are_chosen(tmp_path, datasets_cache):
    for subset, problem in (("main", "1+2"), ("socratic", "2+1")):
        for split in ("train", "test"):
            folder = tmp_path / "several" / subset
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.json").write_text(json.dumps([{"problem": problem, "answer": split}]))
    configs = "".join(
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}.json\n" for s in ("train", "test"))
        for c in ("main", "socratic")
    )
    (tmp_path / "several/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    source = str(tmp_path / "several")
    assert rows_of(source, subset="socratic", split="test") == [("2+1", "test")]
    assert rows_of(source, subset="main") == [("1+2", "train")]
    with pytest.raises(InputError, match="has no one data set of a split 'train'.* Remedy: name one of its subsets"):
        rows_of(source)
    with pytest.raises(InputError, match="revision = 'x': is of a data set of the hub, and this is a folder"):
        rows_of(source, subset="main", revision="x")


GSM8K = ROOT.parent / "shared/data/gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"needs {GSM8K}")
def test_gsm8k_is_read_from_its_own_files_by_its_format_alone():
    found = read_rows(str(GSM8K), config.Data(train="", format="gsm8k"), "data.train")
    assert len(found) == 7473 and found[0][1] == "72"


def test_the_answer_may_be_a_part_of_its_column(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": "1+2 is 3.\n#### 3 \n"})
    data = config.Data(train="", answer_regex="#### (.+)")
    assert read_rows(source, data, "data.train") == [("1+2", "3")]
    source = jsonl(tmp_path / "d.jsonl", {"problem": "1+2", "answer": "####  "})
    with pytest.raises(InputError, match="line 1 = '####  ': its 'answer' does not match data.answer_regex"):
        read_rows(source, data, "data.train")
    source = jsonl(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(InputError, match="line 1 = '3': its 'answer' does not match"):  # with a group that has no part
        read_rows(source, config.Data(train="", answer_regex="#### (.+)|3"), "data.train")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"
LINE = json.dumps({"problem": "1+2 \u00e9", "answer": "3"}, ensure_ascii=False) + "\n"
NO_ROWS = {  # name: (what it holds, what is said)
    "pointer.jsonl": (POINTER, "is Git LFS's pointer to a file, and not the file. Remedy: run git lfs pull"),
    "pointer.parquet": (POINTER, "is Git LFS's pointer"),
    "latin.jsonl": (2 * LINE.encode("latin1"), "line 1 = .*is not UTF-8. Remedy: .*iconv -f LATIN1 -t UTF-8"),
    "utf16.jsonl": (LINE.encode("utf-16"), "is not UTF-8. Remedy: .*iconv -f UTF-16 -t UTF-8"),
    "utf32.jsonl": (LINE.encode("utf-32"), "is not UTF-8. Remedy: .*iconv -f UTF-32 -t UTF-8"),
    "packed.jsonl": (gzip.compress(LINE.encode()), "holds bytes of zero, and is no text. Remedy: unpack it"),
    "utf16_without_mark.jsonl": (
        LINE.replace("\u00e9", "e").encode("utf-16-le"),
        "holds bytes of zero, and is no text",
    ),
    "empty.jsonl": (b"", "holds no row"),
    "blank.json": (b" \n\n", "holds no row"),
    "no_row.json": (b"[]", "holds no row"),
    "array.jsonl": (
        b'[\n{"problem": "1", "answer": "1"}\n]',
        "line 1 = .*not valid JSON.*Remedy: write one row a line",
    ),
    "cut.json": (b'[{"problem": "1", "answer"', "is not valid JSON"),
    "one.json": (b'{\n"problem": "1",\n"answer": "1"\n}', "line 1 = .*Remedy: write one row a line"),
    "deep.jsonl": (b"[" * 100_000, "line 1 = .*is not valid JSON"),
    "digits.jsonl": (b'{"problem": "1", "answer": ' + b"1" * 5000 + b"}", "line 1 = .*is not valid JSON"),
    "text.parquet": (b"problem,answer\n1+2,3\n", "cannot be read as parquet"),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "rows.csv": (b"problem,answer\n1+2,3\n", "is no .jsonl, .json or .parquet file. Remedy: save the rows as"),
    "rows.jsonl.gz": (b"", "is no .jsonl, .json or .parquet file"),
    "pointer.csv": (POINTER, "is Git LFS's pointer"),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_a_file_that_holds_no_rows_is_said_in_a_line(tmp_path, name):
    contents, words = NO_ROWS[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError, match=words) as e:
        read_rows(str(tmp_path / name), PLAIN, "data.train")
    assert str(e.value).startswith("data.train")


def test_an_array_of_rows_and_a_byte_order_mark_are_read(tmp_path):
    rows = [GOOD, {"problem": "2+2", "answer": 4}]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1), "utf-8-sig")
    assert read_rows(str(tmp_path / "d.json"), PLAIN, "data.train") == [("1+2", "3"), ("2+2", "4")]
    with pytest.raises(InputError, match="row 1 = 2: is of type int"):
        (tmp_path / "d.json").write_text(json.dumps([GOOD, 2]))
        read_rows(str(tmp_path / "d.json"), PLAIN, "data.train")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.json", "gone.parquet", "gone.csv", "gone", "gone/rows"])
def test_a_missing_file_is_named(tmp_path, name):
    source = str(tmp_path / name)
    with pytest.raises(InputError) as e:
        read_rows(source, PLAIN, "data.train")
    assert str(e.value) == f"data.train = {source!r}: there is no such file. Remedy: check the path."


@pytest.mark.parametrize(
    "name, words",
    [("", "is a folder"), ("x" * 300, "cannot be read (File name too long)"), ("\udcff", "there is no such file")],
)
def test_a_path_that_leads_to_no_file_is_said(tmp_path, name, words):
    (tmp_path / ".jsonl.jsonl").mkdir()
    source = str(tmp_path / f"{name or '.jsonl'}.jsonl")
    with pytest.raises(InputError) as e:
        read_rows(source, PLAIN, "data.train")
    assert words in str(e.value)
    str(e.value).encode()  # can be printed


def broken_text(path: Path) -> None:
    """A parquet file of whose first problem the bytes are no UTF-8."""
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    problem = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")])
    pyarrow.parquet.write_table(pyarrow.table({"problem": problem, "answer": ["3"]}), path)


FOLDERS = {  # what stands in one: what is said
    "nothing": "cannot be read as rows (EmptyDatasetError: ",
    "a pointer": "train.jsonl': is Git LFS's pointer to a file",
    "broken text": "cannot be read as rows (UnicodeDecodeError: ",
    "another split": "has no one data set of a split 'train' (Unknown split",
    "an empty file": "cannot be read as rows (",
    "another encoding": "cannot be read as rows (DatasetGenerationError: 'utf-8' codec can't decode",
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_holds_no_rows_is_said_in_a_line(tmp_path, datasets_cache, case):
    folder = tmp_path / "rows"
    folder.mkdir()
    contents = {"a pointer": POINTER, "an empty file": b""}
    if case in contents:
        (folder / "train.jsonl").write_bytes(contents[case])
    if case == "broken text":
        broken_text(folder / "train.parquet")
    if case == "another split":
        jsonl(folder / "test.jsonl", GOOD)
    if case == "another encoding":
        (folder / "train.csv").write_bytes("problem,answer\n1+2 \u00e9,3\n".encode("latin1"))
    with pytest.raises(InputError) as e:
        read_rows(str(folder), PLAIN, "data.train")
    assert FOLDERS[case] in str(e.value)


def test_a_line_that_is_not_json_is_named_by_file_and_line(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", GOOD, '{"problem": "1+2", "answer": ')
    with pytest.raises(InputError, match="d.jsonl, line 2"):
        read_rows(source, PLAIN, "data.train")


def test_a_line_separator_within_a_json_string_does_not_end_the_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"problem": "1\u20282", "answer": "3"}, ensure_ascii=False) + "\n")
    assert read_rows(str(path), PLAIN, "data.train") == [("1\u20282", "3")]


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
    from_parquet = read_rows(parquet(tmp_path / "d.parquet", columns), PLAIN, "data.train")
    assert from_parquet == read_rows(jsonl(tmp_path / "d.jsonl", *rows), PLAIN, "data.train")


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path, datasets_cache):
    source = parquet(tmp_path / "d.parquet", {"problem": ["1+1", "2+2"], "answer": ["2", None]})
    with pytest.raises(InputError, match="d.parquet, row 1.*its 'answer' is empty"):
        read_rows(source, PLAIN, "data.train")


READ = """
import json, sys
from grpo_mcore.config import config
from grpo_mcore.data.sources import read_rows
for name in sys.argv[1:]:
    try:
        rows = read_rows(name, config.Data(train=""), "data.train")
        print(json.dumps([(row.problem, row.answer) for row in rows]))
    except config.InputError as e:
        print(e)
"""


def test_a_data_set_of_the_hub_gives_its_rows_and_what_is_wrong_with_one_is_said_in_a_line(tmp_path):
    sets = {"owner/good/train.json": GOOD, "owner/unsplit/test.json": GOOD, "owner/columns/train.json": {"a": 1}}
    for path, row in sets.items():
        (tmp_path / "hub/datasets" / path).parent.mkdir(parents=True)
        (tmp_path / "hub/datasets" / path).write_text(json.dumps([row]))
    for path in ("broken", "scripted"):
        (tmp_path / "hub/datasets/owner" / path).mkdir()
    (tmp_path / "hub/datasets/owner/scripted/scripted.py").write_text("print(1)")
    (tmp_path / "hub/datasets/owner/broken/train.json").write_text('[{"problem": "1+2", ')
    several = tmp_path / "several"
    (several / "a").mkdir(parents=True)
    (several / "a/train.json").write_text(json.dumps([GOOD]))
    configs = "".join(f"- config_name: {c}\n  data_files: a/train.json\n" for c in ("main", "socratic"))
    (several / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    names = [
        "owner/good",
        "owner/unsplit",
        "owner/columns",
        "owner/broken",
        "owner/absent",
        str(several),
        "owner/scripted",
    ]
    with Hub(tmp_path / "hub").serve() as hub:
        done = subprocess.run(
            [sys.executable, "-c", READ, *names],
            env=environment(**hub.environment(tmp_path / "home")),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    good, unsplit, columns, broken, absent, of_several, scripted = done.stdout.splitlines()
    assert json.loads(good) == [["1+2", "3"]]
    assert columns.startswith("data.train: owner/columns, row 0 = {'a': 1}: has no column 'problem'. Remedy: set")
    for name, line, words in (
        ("owner/unsplit", unsplit, "has no one data set of a split 'train' (Unknown split \"train\""),
        (several, of_several, "has no one data set of a split 'train' (Config name is missing."),
        ("owner/broken", broken, "cannot be read as rows ("),
        ("owner/scripted", scripted, "cannot be read as rows (RuntimeError: Dataset scripts are no longer supported"),
        ("owner/absent", absent, "is neither a .jsonl, .json or .parquet file nor a data set that can be reached ("),
    ):
        assert line.startswith(f"data.train = '{name}': {words}") and "Remedy: " in line
    assert "['main', 'socratic']" in of_several and "doesn't exist on the Hub" in absent
    assert all("save the rows as a .jsonl or .parquet file" in line for line in (unsplit, of_several, broken))


REAL = {"deepscaler": 40308, "aime_2024": 30, "math_500": 500, "amc_2023": 40}


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_published_sets_is_a_problem_with_an_answer(name):
    path = Path(__file__).parents[3] / "shared" / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    assert len(read_rows(str(path), PLAIN, "data.train")) == REAL[name]


SHAPES = [
    None,
    True,
    float("nan"),
    1e999,
    -1,
    10**400,
    "",
    " ",
    "\ud800",
    "\x00",
    [],
    ["2"],
    {},
    {"problem": "x"},
    [{"role": "user", "content": "1+2"}],
    {"a": [{"b": [[]]}]},
    "é" * 99,
]
COLUMNS = [  # of parquet, of types that JSON has not
    pyarrow.array([b"3", b"\xff"]),
    pyarrow.array([datetime.date(2024, 1, 1), None]),
    pyarrow.array([2**50, 0], pyarrow.timestamp("ms")),  # beyond the years that Python knows
    pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Nowhere/Here")),
    pyarrow.array([1, None], pyarrow.duration("us")),
    pyarrow.array([decimal.Decimal("1.50"), None]),
    pyarrow.array([[("a", 1), ("a", 2)], None], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
    pyarrow.array(["3", "4"]).dictionary_encode(),
    pyarrow.array([None, None]),
    pyarrow.array([1.5, float("nan")], pyarrow.float16()),
]


def mutated(rng: random.Random, folder: Path) -> Path:
    """A file of five rows of which something is wrong, or not; a CSV's folder."""
    rows: list = [{"problem": f"{n}+{n}", "answer": str(2 * n), "level": n} for n in range(5)]
    for _ in range(rng.randrange(3)):
        row = rng.choice(rows)
        if isinstance(row, dict) and rng.random() < 0.8:
            row[rng.choice(["problem", "answer", "level", "other"])] = copy.deepcopy(rng.choice(SHAPES))
        else:
            rows[rows.index(row)] = copy.deepcopy(rng.choice(SHAPES))
    path = folder / rng.choice(["d.jsonl", "d.json", "d.parquet", f"{rng.getrandbits(40)}/train.csv"])
    if path.suffix == ".csv":
        path.parent.mkdir()
        with path.open("w", errors="surrogatepass") as f:
            writer = csv.writer(f)
            writer.writerows(
                [("problem", "answer"), *(row.values() if isinstance(row, dict) else [row] for row in rows)]
            )
    elif path.suffix == ".parquet" and rng.random() < 0.3:
        columns = [pyarrow.array(["1+2", "2+2"]), pyarrow.array(["3", "4"]), rng.choice(COLUMNS)]
        rng.shuffle(columns)
        pyarrow.parquet.write_table(
            pyarrow.table(dict(zip(("problem", "answer", "other"), columns, strict=True))), path
        )
    elif path.suffix == ".parquet":
        good = [row for row in rows if isinstance(row, dict)]
        columns = {key: [row.get(key) for row in good] for key in ("problem", "answer", "level")}
        try:
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):  # columns of several types
            pyarrow.parquet.write_table(pyarrow.table({"problem": ["1"], "answer": [[rng.random()]]}), path)
    elif path.suffix == ".json" and rng.random() < 0.5:
        path.write_text(json.dumps(rows, indent=rng.choice([None, 1])))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice([0, 0, 1, 2, 20])):
        at, kind = rng.randrange(len(raw) + 1), rng.randrange(4)
        if kind == 0:
            del raw[at : at + rng.choice([1, 5, 10**9])]
        elif kind == 1:
            raw[at:at] = rng.randbytes(rng.choice([1, 2, 50]))
        elif kind == 2:
            raw[at:at] = raw[rng.randrange(len(raw) + 1) :][:100]
        else:
            raw[at : at + 1] = bytes([rng.randrange(256)])
    if rng.random() < 0.1:
        raw = bytearray(bytes(raw).decode("latin1").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-8"])))
    path.write_bytes(raw)
    return path.parent if path.suffix == ".csv" else path


def read_mutated(folder: str, model: str, seeds: range) -> tuple[list[str], int]:
    """(what was raised that is no InputError, how many were read)"""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
    tokenizer, wrong, num_read = prompts.Tokenizer(model), [], 0
    for seed in seeds:
        path = mutated(random.Random(seed), Path(folder))
        try:
            rows, _ = prompts.load(str(path), PLAIN, tokenizer, "data.train")
            golds.check([p.answer for p in rows], config.Reward(num_processes=1), "data.train", str(path))
            num_read += 1
        except InputError:
            pass
        except BaseException as e:
            wrong.append(f"seed {seed}: {type(e).__name__}: {e}")
    return wrong, num_read


@pytest.mark.slow
def test_no_mistake_of_many_in_a_data_file_is_a_traceback(tmp_path):
    arithmetic.make_model(tmp_path / "model", seed=0)
    ((wrong, num_read),) = spawn(read_mutated, 1, str(tmp_path), str(tmp_path / "model"), range(2000), timeout_s=400)
    assert not wrong and 200 < num_read < 1800, (wrong[:5], len(wrong), num_read)
