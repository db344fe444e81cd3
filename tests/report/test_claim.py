"""A run's folder: one process at a time, and what a run that is taken up again may have changed.

Not covered here: that the program asks (tests/test_run.py).
"""

import subprocess
import sys

import pytest

from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.report import claim
from tests.dist import ROOT, environment

HOLDS = """
import sys, time
from grpo_mcore.report import claim
with claim.claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def take(folder) -> None:
    with claim.claimed(folder, leaving_s=0):
        pass


def test_a_folder_is_held_by_one_process_which_is_named_and_free_when_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, env=environment())
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"is in use by process {holder.pid} on \S+ since .*Remedy: wait for it"):
            take(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    with claim.claimed(tmp_path, leaving_s=0), pytest.raises(InputError, match="is in use by"):
        take(tmp_path)
    take(tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run_dir = .*file/run'?: cannot be written \(Not a directory\)"):
        take(tmp_path / "file/run")


@pytest.fixture
def begun(tmp_path):
    """A run of which a start is recorded; what makes a configuration of it."""

    def configured(*overrides: str) -> config.Config:
        return config_file.load(ROOT / "configs/quickstart.yaml", [f"run_dir={tmp_path}", *overrides])

    claim.record(configured(), CONTENTS)
    return configured


CONTENTS = {"model": "aa", "data.train": "bb"}


def test_what_may_change_is_said_with_both_values(begun):
    assert claim.changes(begun(), 20, CONTENTS) == []
    changed = claim.changes(begun("optimizer.lr=1e-5", "num_steps=90", "engine.num_engines=1"), 20, CONTENTS)
    assert changed == ["num_steps = 90 (was 60)", "optimizer.lr = 1e-05 (was 0.0003)", "engine.num_engines = 1 (was 2)"]


@pytest.mark.parametrize(
    ("override", "contents", "said"),
    [
        ("seed=7", CONTENTS, r"seed = 7: was 6 when .* reached step 20\. Remedy: set it to 6, or name another"),
        ("rollout.group_size=4", CONTENTS, r"group_size = 4: was 8 when"),
        ("data.skip_prompts=8", CONTENTS, r"skip_prompts = 8: was 0 when"),
        ("num_steps=19", CONTENTS, r"num_steps = 19: must be at least 20"),
        ("model=other", CONTENTS | {"model": "cc"}, r"model = 'other': was 'models/quickstart' when"),
        ("seed=6", CONTENTS | {"model": "cc"}, r"model = 'models/quickstart': held something else when"),
        (
            "data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]",
            CONTENTS | {"data.train": "cc"},
            r"data.train = .*'weight': 2.0.*: was 'arithmetic:two_digit_sums/train' when",
        ),
        (
            "data.prompt_template=Q{problem}",
            CONTENTS | {"data.train": "cc"},
            r"prompt_template = 'Q{problem}': was '{p",
        ),
    ],
)
def test_what_a_checkpoint_depends_on_cannot_change_and_nothing_is_written(begun, tmp_path, override, contents, said):
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=said):
        claim.changes(begun(override), 20, contents)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert claim.changes(begun(override), 0, contents) == []  # without a checkpoint nothing depends on it


def test_a_model_moved_is_the_same_and_one_trained_on_is_another(tmp_path):
    for name, last in (("a", b"\0"), ("b", b"\0"), ("c", b"\1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(5 << 20) + last)
    a, b, c = (claim.folder_digest(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_run_of_an_older_version_has_no_digests_and_goes_on(begun, tmp_path):
    (tmp_path / claim.IDENTITY).unlink()
    assert claim.changes(begun(), 20, CONTENTS | {"model": "cc"}) == []
