"""How files and overrides are read: by the field's type, and whatever is wrong in one line.

Not covered here: what a Config may be (test_config.py).
"""

import operator
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from grpo_mcore.config import config, schema, strict_yaml
from grpo_mcore.config.config import InputError
from grpo_mcore.config.file import describe, load, to_yaml
from tests.config.test_config import MINIMAL, refused
from tests.dist import ROOT


@pytest.fixture
def minimal(tmp_path) -> str:
    return str(write(tmp_path, minimal=MINIMAL))


def write(folder: Path, **files: str) -> Path:
    """The first of the files, NAME.yaml each."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


# Overrides.


def test_an_override_reaches_any_depth_and_its_type_says_how_it_is_read(minimal):
    cfg = load(
        minimal,
        [
            "seed=7",
            "optimizer.lr=1e-5",
            "data.chat_template=false",
            "eval.data=null",
            "warm_start.task=two_digit_sums",
            "engine.cores=[3, 1]",
            "parallel.recompute_modules=[mlp]",
            "recipe_deviations=[learning rate, steps]",
            "eval={every: 3, top_p: 0.5}",
            "eval.max_prompts=4",
        ],
    )
    assert (cfg.seed, cfg.optimizer.lr, cfg.data.chat_template, cfg.eval.data) == (7, 1e-5, False, None)
    assert cfg.warm_start == config.WarmStart(task="two_digit_sums")
    assert (cfg.engine.cores, cfg.parallel.recompute_modules) == ((3, 1), ("mlp",))
    assert cfg.recipe_deviations == ("learning rate", "steps")
    assert cfg.eval == config.Eval(every=3, top_p=0.5, max_prompts=4)
    assert load(minimal, ["warm_start.task=two_digit_sums", "warm_start=null"]).warm_start is None


TEXTS = [
    "{problem}",
    "{problem}=",
    " {problem} ",
    '"{problem}"',
    "{problem} # 2",
    "- {problem}",
    "*{problem}: [",
    "{problem}\n",
    "~/{problem} $HOME",
    "\u00a0{problem}\u2028\x85",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_stands_and_comes_back_from_what_is_printed(minimal, tmp_path, text):
    cfg = load(minimal, [f"data.prompt_template={text}"])
    assert cfg.data.prompt_template == text
    assert load(write(tmp_path, printed=describe(cfg, 1))) == cfg


def test_any_text_comes_back_from_what_is_written():
    rng = random.Random(0)
    letters = "a1 \t\n\r\x85\u00a0\u2028\u2029\ufeff\x07\x7f\U0001f600'\"\\:#-?[]{}&*!|>%@`~.e,="
    for _ in range(2000):
        text = "".join(rng.choices(letters, k=rng.randint(0, 8)))
        assert strict_yaml.read(strict_yaml.write({"a": [text]}), "", "") == {"a": [text]}


@pytest.mark.parametrize(
    "text", ["runs/a #2", "7", "1e-6", "2024-02-30", "yes", "null", "true", "a: b", "[a]", "-", "="]
)
def test_a_name_is_taken_as_it_stands_and_comes_back_from_what_is_printed(minimal, tmp_path, text):
    cfg = load(minimal, [f"run_dir={text}", f"data.problem_key={text}"])
    assert (cfg.run_dir, cfg.data.problem_key) == (text, text)
    printed = describe(cfg, 1)
    assert load(write(tmp_path, printed=printed)) == cfg
    assert yaml.safe_load(printed)["run_dir"] == text  # a reader of YAML 1.1


OF_ITEMS = ["data.train[].path", "reward.functions[].path"]
PATHS = ["model", "run_dir", "data.train", "eval.data", "checkpoint.start_from"]
OF_SECTIONS = ["environment.path"]  # which may be null


def test_all_paths_are_known_as_such():
    rows = re.findall(r"^(?:## ([\w.\[\]]+)|\| `(\w+)` \| path)", schema.page(), re.MULTILINE)
    found, section = [], ""
    for heading, name in rows:
        section = f"{heading}." * (heading != "Top") if heading else section
        found += [section + name] * bool(name)
    assert sorted(found) == sorted([*PATHS, *OF_SECTIONS, *OF_ITEMS])


@pytest.mark.parametrize("name", PATHS)
def test_home_and_environment_variables_are_expanded_in_paths(minimal, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/some one")
    monkeypatch.setenv("SCRATCH", "/scratch/#1")
    get = operator.attrgetter(name)
    assert get(load(minimal, [f"{name}=~/a b"])) == "/home/some one/a b"
    assert get(load(minimal, [f"{name}=$SCRATCH/${{SCRATCH}}/~"])) == "/scratch/#1//scratch/#1/~"
    assert refused(load, minimal, [f"{name}=$NOT_THERE/a"]) == (
        f"{name} = '$NOT_THERE/a': $NOT_THERE is no environment variable. Remedy: set it, or write the path out."
    )
    assert "no such user's home" in refused(load, minimal, [f"{name}=~nobody_of_this_name/a"])
    assert refused(load, minimal, [f"{name}="]) == f"{name} = '': is empty. Remedy: name a path."


def test_paths_of_files_are_expanded_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, base=MINIMAL)
    cfg = load(
        write(tmp_path, heir="inherit: ~/base.yaml\nrun_dir: $HOME/runs\ndata: {prompt_template: '$HOME{problem}'}")
    )
    assert (cfg.run_dir, cfg.model) == (f"{tmp_path}/runs", "some/folder")
    assert cfg.data.prompt_template == "$HOME{problem}"  # no path


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed", "override = 'seed': must read key.sub=value. Remedy: write it without spaces around '='."),
        ("=7", "override = '=7': must read key.sub=value. Remedy: write it without spaces around '='."),
        ("seed=[1", "seed = '[1': must be of type int. Remedy: write a value of type int."),
        (
            "num_steps.x=1",
            "override = 'num_steps.x': 'num_steps' is no section. Remedy: name a key of the configuration.",
        ),
        (".=3", "override = '.=3': must read key.sub=value. Remedy: write it without spaces around '='."),
        ("data.=3", "override = 'data.=3': must read key.sub=value. Remedy: write it without spaces around '='."),
    ],
)
def test_a_malformed_override_is_refused(minimal, override, message):
    assert refused(load, minimal, [override]) == message


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer={lr: 1e-5, lr: 1e-6}", "lr = 'twice': is written twice in one section. Remedy: keep one of them."),
        ("optimizer={lr: nan}", "optimizer.lr = 'nan': must be of type float. Remedy: write a value of type float."),
        ("optimizer.lr=nan", "optimizer.lr = 'nan': must be of type float. Remedy: write a value of type float."),
        ("optimizer.lr=1e999", "optimizer.lr = inf: must be a finite number. Remedy: write one."),
        ("optimizer.lr=" + "9" * 350, "optimizer.lr = inf: must be a finite number. Remedy: write one."),
        ("optimizer.lr=" + "9" * 5000, "optimizer.lr = inf: must be a finite number. Remedy: write one."),
        ("num_steps=" + "9" * 5000, "num_steps = inf: must be of type int. Remedy: write a value of type int."),
        ("num_steps=010:1", "num_steps = '010:1': must be of type int. Remedy: write a value of type int."),
        ("engine.cores=[1", "engine.cores = '[1': is not valid YAML"),
        ("engine.cores=" + "[" * 5000, f"engine.cores = '{'[' * 399} ... (5002 characters): is nested too deeply."),
        ("engine.cores=&a [*a]", "*a = 'line 1': is an alias, which is not read."),
        ("engine.cores=!!python/tuple [1]", "!!python/tuple = 'line 1': is a tag, which is not read."),
        (
            "data.answer_key=\udc80",
            r"data.answer_key = '\udc80': holds what is no character. Remedy: write it as UTF-8 text.",
        ),
    ],
)
def test_an_override_that_its_type_cannot_be_is_refused(minimal, override, message):
    assert refused(load, minimal, [override]).startswith(message)


# Files.


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "gone.yaml")
    assert (
        refused(load, path)
        == f"--cfg = {path!r}: there is no such file. Remedy: give the path of a YAML file, such as "
        f"configs/quickstart.yaml."
    )


@pytest.mark.parametrize(
    "text, constraint",
    [
        ("model: [a\nrun_dir: b", r"is not valid YAML \(.*line 2.*\)\. Remedy: mend the line it names"),
        ("- a\n- b", "must hold a mapping of keys. Remedy: see configs/quickstart.yaml"),
        ("", "must hold a mapping of keys"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(tmp_path, text, constraint):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = refused(load, path)
    assert re.search(constraint, message) and str(path) in message
    assert "\n" not in message  # one line, whatever PyYAML said


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2", "seed = 'twice': is written twice in one section. Remedy: keep one of them."),
        ("<<: {seed: 1}", "<< = {'seed': 1}: there is no such key."),
        (
            "eval: &e {every: *e}",
            "*e = 'line 1': is an alias, which is not read. Remedy: write its value out, or inherit",
        ),
        (
            "run_dir: !!timestamp 2024-02-30",
            "!!timestamp = 'line 1': is a tag, which is not read. Remedy: leave it out",
        ),
        ("? [a]\n: 1", "key = 'line 1': is no name. Remedy: write `name: value`."),
        (MINIMAL + "seed: 99999999999999999999", "seed = 99999999999999999999: must fit into 64 bits."),
        (MINIMAL.replace("3", "9" * 6000), "num_steps = inf: must be of type int."),
        (MINIMAL.replace("runs/x", '"a\\0b"'), r"run_dir = 'a\x00b': holds what is no character."),
        ("model: 7", "model = 7: must be of type str."),
        ('inherit: "a\\0b"', r"inherit = 'a\x00b': holds what is no character."),
        ("inherit: " + "a" * 5000, "inherit = "),
        ("a: " + "{a: " * 3000, "--cfg = "),
        ("a: " + "[" * 3000 + "]" * 3000, "--cfg = "),
        ("a: 1\n---\nb: 2", "--cfg = "),
        ("a: \x07", "--cfg = "),
    ],
)
def test_what_a_file_may_not_hold_is_said_in_one_line(tmp_path, text, message):
    said = refused(load, write(tmp_path, c=text))
    assert said.startswith(message) and len(said) < 1000 and "\n" not in said


def test_a_file_that_is_not_utf_8_or_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(MINIMAL.replace("some", "s\xf6me").encode("latin-1"))
    assert "is not UTF-8 text (invalid" in refused(load, path)
    path.write_bytes(MINIMAL.encode("utf-16"))
    assert "is not UTF-8 text (invalid" in refused(load, path)
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("some", "s\xf6me").encode())  # as editors of Windows write it
    assert load(path).model == "s\xf6me/folder"
    assert "cannot be read (File name too long)" in refused(load, tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "text, value",
    [("2024-02-30", "2024-02-30"), ("yes", "yes"), ("1:30", "1:30"), ("1_000", "1_000"), ("=", "="), ("'7'", "7")],
)
def test_what_only_yaml_1_1_reads_as_something_else_is_text(tmp_path, text, value):
    assert load(write(tmp_path, c=MINIMAL.replace("runs/x", text))).run_dir == value


def test_an_heir_changes_what_it_names_key_by_key_and_keeps_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        base=MINIMAL
        + "optimizer: {lr: 1e-5, eps: 1e-7}\nwarm_start: {task: two_digit_sums}\nparallel: {recompute_modules: "
        "[core_attn, mlp]}\n",
    )
    write(tmp_path, middle="inherit: base.yaml\nnum_steps: 4\noptimizer: {lr: 1e-4}\nseed: 1\n")
    top = write(
        tmp_path / "sub",
        top="inherit: ../middle.yaml\nwarm_start: null\nseed: 2\nparallel: {recompute_modules: [mlp]}\neval: "
        "{data: x.jsonl}\n",
    )
    cfg = load(top, ["optimizer.beta1=0.8"])
    assert (cfg.model, cfg.num_steps, cfg.seed, cfg.warm_start) == ("some/folder", 4, 2, None)
    assert cfg.optimizer == config.Optimizer(lr=1e-4, eps=1e-7, beta1=0.8)
    assert cfg.parallel.recompute_modules == ("mlp",)  # a list is a value
    assert cfg.eval == config.Eval(data="x.jsonl")
    assert load(tmp_path / "middle.yaml").warm_start == config.WarmStart(task="two_digit_sums")


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"a": "inherit: b.yaml", "b": "inherit: c.yaml", "c": "inherit: a.yaml"},
            r"inherit = '.*/a\.yaml \(in .*/c\.yaml\)': inherits itself, by way of others or at once\. Remedy: "
            r"break the circle\.",
        ),
        ({"a": "inherit: a.yaml"}, r"inherit = '.*/a\.yaml \(in .*/a\.yaml\)': inherits itself"),
        ({"a": "inherit: gone.yaml"}, r"inherit = '.*/gone\.yaml \(in .*/a\.yaml\)': there is no such file"),
        ({"a": "inherit: [b.yaml]"}, r"inherit = \['b\.yaml'\]: must be one file's path"),
        ({"a": "inherit: b.yaml", "b": "- 1"}, r"inherit = '.*/b\.yaml \(in .*/a\.yaml\)': must hold a mapping"),
        (
            {"a": "inherit: b.yaml", "b": MINIMAL + "rollout: {group_sise: 3}"},
            r"rollout\.group_sise = 3: there is no such key",
        ),
        (
            {"a": "inherit: b.yaml\nrollout: 5", "b": MINIMAL + "rollout: {group_size: 4}"},
            r"rollout = 5: must be a section of keys",
        ),
    ],
)
def test_an_inheritance_that_cannot_be_followed_is_refused(tmp_path, files, message):
    assert re.match(message, refused(load, write(tmp_path, **files)))


# Whatever a user writes.

JUNK = [
    *(
        "",
        "~",
        "null",
        "yes",
        "nan",
        ".nan",
        "-.inf",
        "1e999",
        "-1",
        "0",
        "1.5",
        "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "a",
    ),
    *("[", "{", "[]", "{}", "[[", "{a: 1, a: 2}", "&a [*a]", "<<: {a: 1}", "*a", "!!int x", "!!binary x", "!!set {a}"),
    *(
        "2024-02-30",
        "?",
        "? a",
        "- ",
        "|",
        ">",
        "'",
        '"',
        "%YAML 3",
        "@",
        "`",
        "#",
        " #",
        "$X",
        "~x/y",
        "\udc80",
        "\ufeff",
    ),
    *(
        "\t",
        "\n",
        "\x00",
        "\x85",
        "{problem}",
        "\u2028",
        "[" * 2000,
        "{a: " * 1500,
        "---",
        "...",
        "true",
        "1e-6",
        ":",
        ": ",
    ),
]


def mutations(seed: int, number: int) -> Iterator[tuple[bytes, list[str]]]:
    """(a file, overrides) of so many runs with mistakes."""
    rng = random.Random(seed)
    texts = [(ROOT / f"configs/{name}.yaml").read_text() for name in ("quickstart", "quickstart_stage2", "smollm2")]
    dotted = [line.split("`")[1] for line in schema.page().splitlines() if line.startswith("| `")]
    sections = ["", *(f"{m}." for m in re.findall(r"^## (\w+)$", schema.page(), re.MULTILINE))]
    for _ in range(number):
        lines = rng.choice(texts).splitlines(keepends=True)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(lines))
            match rng.randrange(7):
                case 0:
                    lines.insert(at, rng.choice(lines))
                case 1:
                    lines[at] = rng.choice("  \t-?&") + lines[at]
                case 2:
                    lines[at] = lines[at].split(":")[0] + f": {rng.choice(JUNK)}\n"
                case 3:
                    lines[at] = f"{rng.choice(dotted)}: {rng.choice(JUNK)}\n"
                case 4:
                    column = rng.randrange(len(lines[at]))
                    lines[at] = lines[at][:column] + rng.choice(JUNK) + lines[at][column:]
                case 5:
                    lines[at] = lines[at][rng.randrange(len(lines[at])) :]
                case 6 if len(lines) > 1:
                    del lines[at]
        data = bytearray("".join(lines).encode(errors="surrogateescape"))
        if rng.random() < 0.2:
            data[rng.randrange(len(data))] = rng.randrange(256)
        yield (
            bytes(data),
            [
                f"{rng.choice(sections)}{rng.choice([*dotted, 'x', ''])}{rng.choice(['=', '=', '=', '', '.=', ' ='])}"
                f"{rng.choice(JUNK)}"
                for _ in range(rng.choice([0, 0, 1, 2]))
            ],
        )


def check_mutations(folder: Path, seed: int, number: int) -> None:
    """Each is a configuration, which comes back from what is printed, or refused in one line, within seconds."""
    path, printed, taken = folder / "c.yaml", folder / "printed.yaml", 0
    for data, overrides in mutations(seed, number):
        path.write_bytes(data)
        signal.alarm(20)  # ends a hang
        try:
            cfg = load(path, overrides)
        except InputError as e:
            assert len(str(e).splitlines()) == 1 and len(str(e)) < 3000, str(e)
            continue
        finally:
            signal.alarm(0)
        taken += 1
        printed.write_text(to_yaml(cfg))
        assert load(printed) == cfg, overrides
    assert number / 20 < taken < number * 3 / 4  # neither all nor none are mistakes


def test_no_mistake_in_a_configuration_is_a_traceback(tmp_path):
    check_mutations(tmp_path, seed=1, number=400)


@pytest.mark.slow
def test_no_mistake_of_many_in_a_configuration_is_a_traceback(tmp_path):
    check_mutations(tmp_path, seed=2, number=10_000)
