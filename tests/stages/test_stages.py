"""Stages: their strict file, the rules that span them, what a stage takes over, what the lineage says is next; and a
whole run of three, killed and taken up again.

Not covered here: the stop rule's numbers (test_stop.py), the proof of an export (test_parity.py), several machines.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from grpo_mcore import entry
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.stages import actions, stages
from grpo_mcore.stages.lineage import Lineage, check_unchanged, config_digest, differences, next_action, plain
from tests.conftest import CONFIG
from tests.dist import ROOT, environment, program
from tests.test_trainer import processes_with, wait_until

FILES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "stages" in yaml.safe_load(path.read_text())]

ONE = """
model: some/folder
run_dir: runs/one
num_steps: 10
seed: 7
data: {train: train.jsonl, skip_prompts: 5}
rollout: {prompts_per_step: 16}
"""
TWO = """
inherit: one.yaml
model: made/by/one
run_dir: runs/two
rollout: {max_response_tokens: 6000}
loss: {kl_coef: 0.1}
"""
STAGES = """
dir: out
stages:
  - {name: a, cfg: one.yaml}
  - {name: b, cfg: two.yaml, overrides: [num_steps=4]}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in (("one", ONE), ("two", TWO), ("stages", STAGES)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def load(folder: Path, change: tuple[str, str] = ("", ""), ranks: int | None = 1) -> stages.Plan:
    path = folder / "stages.yaml"
    path.write_text(STAGES.replace(*change))
    return stages.load(path, ranks)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_stages_file_of_the_repository_loads_and_its_separate_commands_take_the_same_prompts(path):
    plan = stages.load(path, None)
    assert len(plan.configs) == 3
    for number, config in enumerate(plan.configs):
        # What stages.py sets beside what the stage's own file says for whoever trains it alone.
        assert config.data.skip_prompts == plan.config(number).data.skip_prompts
        assert (config.model == plan.config(number).model) == (number == 0 or path.stem == "quickstart_stages")
        assert stages.describe(plan).count(config.run_dir) >= 1


def test_a_stage_takes_over_the_export_and_the_place_in_the_prompts(folder):
    plan = load(folder)
    a, b = plan.configs
    assert (a.model, a.data.skip_prompts, a.num_steps) == ("some/folder", 5, 10)
    # 5 skipped and 10 steps of 16 prompts
    assert (b.model, b.data.skip_prompts, b.num_steps, b.checkpoint.start_from) == ("out/a_hf", 165, 4, None)
    taken = stages.carry_over(plan, 1, checkpoint="runs/one/checkpoints/step_000006", prompts_taken=101)
    assert taken == ["model=out/a_hf", "warm_start=null", "data.skip_prompts=101"]
    carried = load(folder, ("two.yaml,", "two.yaml, optimizer: carried, prompts: own,"))
    assert stages.carry_over(carried, 1, checkpoint="c", prompts_taken=101) == [
        "model=out/a_hf",
        "warm_start=null",
        "checkpoint.start_from=c",
    ]
    assert carried.configs[1].data.skip_prompts == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("cfg: two", "confg: two"),
            "stages[1].confg = 'two.yaml': there is no such key. Remedy: did you mean stages[1].cfg.",
        ),
        (("dir: out", "dir: 3"), "dir = 3: must be of type str. Remedy: write a value of type str."),
        (("name: b", "name: a"), "stages[1].name = 'a': is another stage's too. Remedy: choose another."),
        (
            ("name: b", "name: b/c"),
            "stages[1].name = 'b/c': is part of file names: letters, digits, ., _ and -. Remedy: choose another.",
        ),
        (
            ("one.yaml", "one.yaml, optimizer: carried"),
            "stages[0].optimizer = 'carried': has no stage before it to be carried from. Remedy: set it to fresh "
            "(checkpoint.start_from begins from another run).",
        ),
        (
            ("num_steps=4", "nun_steps=4"),
            "stage b: nun_steps = '4': there is no such key. Remedy: did you mean num_steps.",
        ),
        (
            ("num_steps=4", "run_dir=runs/one"),
            "stage b: run_dir = 'runs/one': is another stage's too. Remedy: give each stage one of its own.",
        ),
        (
            ("num_steps=4", "checkpoint.every=0"),
            "stage b: checkpoint.every = 0: keeps no checkpoint, and a stage's is exported. Remedy: raise it.",
        ),
        (
            ("two.yaml", "two.yaml, choose: best"),
            "stage b: checkpoint.keep_best = 0: may remove the best checkpoint, which `choose: best` takes. "
            "Remedy: raise it, or choose the last.",
        ),
        (
            ("num_steps=4", "checkpoint.keep_best=1, checkpoint.best_metric=reward/maen"),
            "stage b: checkpoint.best_metric = 'reward/maen': is no metric that this run writes. Remedy: did you mean "
            "reward/mean.",
        ),
        (
            ("two.yaml", "two.yaml, evaluate: [eval.top_q=1]"),
            "stage b: eval.top_q = '1': there is no such key. Remedy: did you mean eval.top_p.",
        ),
        (
            ("num_steps=4", "parallel.tp=2"),
            "stage b: parallel.tp = 2: tp 2 x pp 1 x cp 1 must divide the number of ranks, 1. Remedy: change an "
            "axis or --nproc-per-node.",
        ),
        # What makes prompts come again.
        (
            ("num_steps=4", "seed=8"),
            "stage b: data.shuffle_seed = 8: makes another order of prompts than the stage before's 7, so that "
            "prompts would come again. Remedy: give both the same, or set prompts: own.",
        ),
        (
            ("num_steps=4", "data.train=other.jsonl"),
            "stage b: data.train = 'other.jsonl': makes another order of prompts than the stage before's "
            "'train.jsonl', so that prompts would come again. "
            "Remedy: give both the same, or set prompts: own.",
        ),
        (
            ("num_steps=4", "data.max_prompt_tokens=512"),
            "stage b: data.max_prompt_tokens = 512: makes another order of prompts than the stage before's 1024, "
            "so that prompts would come again. "
            "Remedy: give both the same, or set prompts: own.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_starts(folder, change, message):
    with pytest.raises(InputError) as e:
        load(folder, change)
    assert str(e.value) == message


def test_other_prompts_are_accepted_where_they_are_asked_for_or_leave_the_order_as_it_is(folder):
    load(folder, ("two.yaml, overrides: [num_steps=4]", "two.yaml, prompts: own, overrides: [seed=8]"))
    load(folder, ("num_steps=4", "seed=8, data.shuffle_seed=7"))
    (folder / "one.yaml").write_text(ONE.replace("skip_prompts: 5", "overlong_prompts: mask"))
    load(folder, ("num_steps=4", "data.max_prompt_tokens=512"))  # over-long ones keep their places


def test_no_number_of_ranks_means_the_least_that_all_stages_can_have(folder):
    assert load(folder, ("num_steps=4", "parallel.tp=2"), ranks=None).ranks == 2
    assert (
        load(folder, ("name: a, cfg: one.yaml", "name: a, cfg: one.yaml, overrides: [parallel.cp=4]"), ranks=None).ranks
        == 4
    )


CHOSEN = {"checkpoint": "runs/one/checkpoints/step_000006", "prompts_taken": 101}


def begun(plan: stages.Plan, *actions: str) -> Lineage:
    """A lineage whose first stage has these actions behind it."""
    lineage = Lineage(plan.dir)
    record = lineage.begin("a", stage_spec(plan, 0), plan.config(0), {})
    for action in actions:
        lineage.finish(record, action, CHOSEN)
    return lineage


def stage_spec(plan: stages.Plan, number: int) -> dict:
    return plain(plan.file.stages[number])


def test_the_lineage_tells_what_is_next_and_survives_its_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = load(folder)
    for done, expected in (
        ((), "train"),
        (("train",), "choose"),
        (("train", "choose", "export"), "prove"),
        (("train", "choose", "export", "prove", "evaluate"), None),
    ):
        begun(plan, *done)
        (record,) = Lineage(plan.dir).stages
        assert next_action(record) == expected and record["status"] == (expected or "finished")
        assert (
            record["config_digest"] == config_digest(plan.config(0))
            and record["config"] == plain(plan.config(0))
            and "torch" in record["versions"]
        )
        shutil.rmtree("out")
    begun(plan)
    (folder / "out/lineage.json").write_text('{"stages": [')
    with pytest.raises(InputError, match="its lineage.json is damaged"):
        Lineage(plan.dir)


def test_a_stage_that_is_not_trained_yet_may_change_and_one_that_is_may_not(folder, monkeypatch):
    monkeypatch.chdir(folder)
    spec = stage_spec(load(folder), 0)
    changed = config_file.load("one.yaml", ["optimizer.lr=1e-5"])
    (record,) = begun(load(folder)).stages
    check_unchanged(record, 0, spec, changed)
    (record,) = begun(load(folder), "train").stages
    check_unchanged(record, 0, spec, config_file.load("one.yaml"))
    with pytest.raises(InputError) as e:
        check_unchanged(record, 0, spec, changed)
    assert (
        str(e.value)
        == "stage a: optimizer.lr = 1e-05: was 1e-06 when the stage was trained. Remedy: put it back, or do that "
        "stage and those after it again with --redo-from 1."
    )
    # How to choose may change until it is done, and so on.
    check_unchanged(record, 0, {**spec, "choose": "best"}, config_file.load("one.yaml"))
    with pytest.raises(InputError, match=r"stages\[0\].prompts = 'own': was 'continue' when stage a was done"):
        check_unchanged(record, 0, {**spec, "prompts": "own"}, config_file.load("one.yaml"))
    with pytest.raises(InputError, match=r"stages\[0\].name = 'c': was 'a' in the lineage"):
        check_unchanged(record, 0, {**spec, "name": "c"}, config_file.load("one.yaml"))


def test_differences_are_named_by_their_dotted_keys_and_new_keys_of_the_code_are_none():
    assert differences({"a": 1, "b": {"c": 2, "d": [1]}, "old": 3}, {"a": 1, "b": {"c": 3, "d": [1], "e": 0}}) == [
        ("b.c", 2, 3)
    ]


def test_a_lineage_of_other_stages_or_a_stray_export_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = load(folder)
    (folder / "out/a_hf").mkdir(parents=True)
    with pytest.raises(InputError, match="dir = 'out': holds a_hf, of which its lineage.json knows nothing"):
        actions.check(plan, Lineage(plan.dir))
    begun(plan, "train", "choose", "prove", "evaluate")
    lineage = Lineage(plan.dir)
    shutil.rmtree(folder / "out/a_hf")
    monkeypatch.setattr(stages, "check_model", lambda plan: None)  # there is none
    actions.check(plan, lineage)  # what was written is what is compared
    lineage.begin("b", stage_spec(plan, 1), plan.config(1), {})
    one = load(folder, ("  - {name: b, cfg: two.yaml, overrides: [num_steps=4]}\n", ""))
    with pytest.raises(InputError, match="stages = 1: are fewer than the 2 of out/lineage.json"):
        actions.check(one, lineage)


def test_the_data_of_all_stages_is_looked_at_before_the_first_is_trained(folder, monkeypatch):
    monkeypatch.chdir(folder)
    own = "  - {name: b, cfg: two.yaml, prompts: own, overrides: [num_steps=4, data.train=b.jsonl], evaluate: [EVAL]}\n"
    own = own.replace("EVAL", "eval.data=heldout.jsonl")
    plan = load(folder, ("  - {name: b, cfg: two.yaml, overrides: [num_steps=4]}\n", own))
    for name, answer in (("train", "3"), ("b", "Half of 6.\\n#### 3"), ("heldout", "#### 3")):
        with pytest.raises(InputError, match=f"stage .: .* = '{name}.jsonl': there is no such file"):
            actions.check_data(plan, Lineage(plan.dir))
        Path(f"{name}.jsonl").write_text(f'{{"problem": "1+2", "answer": "{answer}"}}\n')
        if name != "train":
            with pytest.raises(InputError, match=f"stage b: .* = '{name}.jsonl': 1 of 1 answers can never be right"):
                actions.check_data(plan, Lineage(plan.dir))
            Path(f"{name}.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n')
    actions.check_data(plan, Lineage(plan.dir))
    begun(plan, "train")
    Path("train.jsonl").unlink()  # it has been used
    actions.check_data(plan, Lineage(plan.dir))


def test_a_run_that_began_otherwise_is_not_taken_for_the_stages_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = load(folder)
    saved = folder / "runs/two/checkpoints/step_000001"
    saved.mkdir(parents=True)
    (saved / checkpoint.ATTEST).write_text("{}")
    (folder / "runs/two/config.yaml").write_text(config_file.to_yaml(plan.configs[1]))
    actions.check_run_dir(plan.configs[1])
    with pytest.raises(
        InputError,
        match="run_dir = 'runs/two': holds checkpoints of a run with data.skip_prompts = 165, and the stage begins "
        "with 101",
    ):
        actions.check_run_dir(plan.config(1, ["model=out/a_hf", "data.skip_prompts=101"]))
    with pytest.raises(InputError, match="a run with model = out/a_hf, and the stage begins with made/by/one"):
        actions.check_run_dir(plan.config(1))


def test_redoing_moves_aside_and_forgets(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = load(folder)
    lineage = begun(plan, "train", "choose")
    (folder / "runs/one").mkdir(parents=True)
    (folder / "runs/one/x").write_text("kept")
    fresh = dataclasses.replace(plan, file=dataclasses.replace(plan.file, dir="elsewhere"))
    with pytest.raises(InputError, match="--redo-from = 1: no stage was begun yet. Remedy: leave it out"):
        actions.check_redo(fresh, 1)
    with pytest.raises(InputError, match="--redo-from = 2: must be between 1 and 1"):
        actions.forget(plan, lineage, 1)
    actions.forget(plan, lineage, 0)
    assert (folder / "runs/one.before_redo_1/x").read_text() == "kept" and not (folder / "runs/one").exists()
    assert Lineage(plan.dir).stages == []


def test_how_a_command_ends_is_understood(tmp_path):
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    actions.execute(python("pass"), "it")
    for code, expected in ((2, 2), (1, 1), (5, 1)):
        with pytest.raises(actions.ActionFailed, match=f"it ended with {code}; its own words stand above") as e:
            actions.execute(python(f"raise SystemExit({code})"), "it")
        assert e.value.code == expected
    with pytest.raises(entry.Preempted, match="it was stopped by SIGTERM; the same command goes on from there"):
        actions.execute(python("raise SystemExit(143)"), "it")
    with pytest.raises(actions.ActionFailed, match="it did not end within 1 s and was killed"):
        actions.execute(python("import time; time.sleep(60)"), "it", 1)


def test_sigterm_is_passed_on_to_what_runs():
    began = time.monotonic()
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(entry.Preempted):
        actions.execute([sys.executable, "-c", "import time; time.sleep(100)"], "it")
    assert time.monotonic() - began < 60


def test_one_process_at_a_time_works_in_a_folder_and_its_commands_count(tmp_path):
    refused = pytest.raises(
        InputError, match="is being worked on by another launch/stages.py, or by a command that one has started"
    )
    with actions.alone(tmp_path):
        with refused, actions.alone(tmp_path):
            pass
        actions.execute(["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/pid"], "it")  # leaves a process behind
    pid = int((tmp_path / "pid").read_text())
    try:
        with refused, actions.alone(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2],
        10,
        lambda: "its end",
    )
    with actions.alone(tmp_path):
        pass


def test_training_is_started_as_a_user_would():
    folder = Path("launch")
    assert actions.Launcher(folder, 1).train("--cfg", "x") == [sys.executable, "launch/train.py", "--cfg", "x"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "8"]
    assert actions.Launcher(folder, 8).train("x") == [*torchrun, "--standalone", "launch/train.py", "x"]
    assert actions.Launcher(folder, 8, ("--max-restarts", "2")).train("x") == [
        *torchrun,
        "--max-restarts",
        "2",
        "launch/train.py",
        "x",
    ]


THREE = """
dir: out
stages:
  - {name: a, cfg: cfg.yaml, overrides: [run_dir=run_a, num_steps=2, eval.data=null, rollout.max_response_tokens=28]}
  - name: b
    cfg: cfg.yaml
    overrides: [run_dir=run_b, num_steps=3, rollout.max_response_tokens=34, checkpoint.keep_best=1]
    choose: best
    evaluate: [eval.max_prompts=4, eval.temperature=0, eval.samples_per_prompt=1]  # greedy
  - name: c
    cfg: cfg.yaml
    overrides: [run_dir=run_c, stop.plateau_window=1, stop.plateau_min_gain=2.0]
    optimizer: carried
    evaluate: [eval.data=null]
"""


def command(*args: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(ROOT / "launch/stages.py"), "--cfg", "stages.yaml", *args]


def run(cwd: Path, *args: str, code: int = 0) -> str:
    done = subprocess.run(
        command(*args),
        cwd=cwd,
        env=environment(),
        text=True,
        timeout=2400,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["--nproc-per-node", "0"], "--nproc-per-node = '0': must be a whole number from 1 to"),
        (["--nproc-per-node", "2.5"], "--nproc-per-node = '2.5': must be a whole number from 1 to"),
        (["--redo-from", "-1"], "--redo-from = '-1': must be a whole number from 1 to"),
        (["--redo-from", "99", "--dry-run"], "--redo-from = 99: no stage was begun yet"),
    ],
)
def test_options_are_checked_before_anything_is_planned(folder, args, words):
    done = program("launch/stages.py", "--cfg", "stages.yaml", *args, cwd=folder, timeout_s=60)
    assert done.returncode == 2 and words in done.stdout and "Traceback" not in done.stdout
    assert not (folder / "out").exists()


def essentials(cwd: Path) -> list[dict]:
    """Of a lineage: all but times."""

    def timeless(value):
        return (
            {k: timeless(v) for k, v in value.items() if k not in ("seconds", "run_seconds", "commit")}
            if isinstance(value, dict)
            else value
        )

    return [timeless(record) for record in json.loads((cwd / "out/lineage.json").read_text())["stages"]]


@pytest.mark.slow
def test_three_stages_killed_in_the_second_and_taken_up_again_are_those_of_an_uninterrupted_run(taught, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    (whole / "stages.yaml").write_text(THREE)
    (whole / "cfg.yaml").write_text(CONFIG.format(model=taught, run_dir="run"))
    out = run(whole)
    a, b, c = expected = essentials(whole)
    assert [record["status"] for record in expected] == ["finished"] * 3
    assert (a["train"]["steps"], b["train"]["steps"], c["train"]["steps"]) == (2, 3, 2)
    assert (
        c["train"]["ended_by"].startswith("reward/mean went from")
        and f"the stop rule ends the run after 2 steps: {c['train']['ended_by']}" in out
    )
    # 4 prompts a step, and on from there
    assert [record["carry_over"]["skip_prompts"] for record in expected] == [0, 8, 8 + 4 * b["choose"]["step"]]
    assert a["choose"]["prompts_taken"] == 8 and "reward/mean = " in b["choose"]["why"]
    assert (
        b["carry_over"]["model_digest"]
        == a["export"]["digest"]
        == a["prove"]["digest"]
        != a["carry_over"]["model_digest"]
    )
    assert c["carry_over"]["optimizer"] == f"of {b['choose']['checkpoint']}" and b["carry_over"]["optimizer"] == "fresh"
    assert all(
        record["prove"]["logprob_abs_max_error"] < 1e-4 and record["prove"]["equal_parts"] > 10 for record in expected
    )
    assert b["evaluate"]["num_problems"] == 4 and "eval/mean@1" in b["evaluate"] and "skipped" in c["evaluate"]

    # The same up to the second stage, which is killed in its training.
    killed.mkdir()
    for name in ("stages.yaml", "cfg.yaml", "run_a", "out/a_hf", "out/a_parity.json"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copyfile
        (killed / name).parent.mkdir(exist_ok=True)
        copy(whole / name, killed / name)
    lineage = json.loads((whole / "out/lineage.json").read_text())
    (killed / "out/lineage.json").write_text(json.dumps({"stages": lineage["stages"][:1]}))
    with (killed / "log").open("w") as log:
        process = subprocess.Popen(
            command(), cwd=killed, env=environment(TEST_MARKER="stages"), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until(
                lambda: checkpoint.published(killed / "run_b") or process.poll() is not None,
                600,
                lambda: (killed / "log").read_text()[-2000:],
            )
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
    # Its training dies with it. Ray's own agents notice by polling that their cluster is gone.
    left = lambda: [p for p in processes_with("TEST_MARKER=stages") if "Agent" not in p]  # noqa: E731
    wait_until(lambda: not left(), 60, lambda: f"all processes to end; there remain {left()}")
    (_, record) = json.loads((killed / "out/lineage.json").read_text())["stages"]
    assert record["status"] == "train" and not (killed / "out/b_hf").exists()

    out = run(killed)
    assert "stage a" not in out.partition("lineage: ")[2].partition("stage b: train")[0] and "going on from step" in out
    assert essentials(killed) == expected
    for name in ("a_hf", "b_hf", "c_hf"):
        assert (killed / f"out/{name}/model.safetensors").read_bytes() == (
            whole / f"out/{name}/model.safetensors"
        ).read_bytes()

    # Finished: nothing is done again. A change of what is finished is refused, by name.
    assert "$ " not in run(killed)
    (killed / "stages.yaml").write_text(THREE.replace("num_steps=3", "num_steps=4"))
    assert "error: stage b: num_steps = 4: was 3 when the stage was trained" in run(killed, code=2)
