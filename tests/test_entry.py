"""What a program does before its heavy imports: work on a CPU sees no GPU, and what will be written can be. And how it
ends where a disk takes no more.

Not covered here: the rest of entry.py (test_run.py, test_trainer.py), and that CUDA obeys.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from grpo_mcore import entry
from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from grpo_mcore.policy import warm_start
from tests.conftest import CONFIG, wants_gpus
from tests.dist import ROOT, environment

# Runs a program up to its first import of torch, and says what torch would see.
UNTIL_TORCH = """
import os, runpy, sys

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("GPUs:", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "arguments", "seen"),
    [
        ("train.py", ["--cfg", "cfg.yaml"], ""),
        ("train.py", ["--cfg", "cfg.yaml", "device=cuda", "precision.params=bfloat16"], "0,1"),
        ("train.py", ["--cfg", "cfg.yaml", "device=auto"], "0,1"),
        ("evaluate.py", ["--cfg", "cfg.yaml"], ""),
        ("convert.py", ["to-megatron", "--hf", "model", "--out", "checkpoint"], ""),
        ("convert.py", ["prove", "--checkpoint", "checkpoint", "--hf", "model"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_before_torch_is_imported_work_on_a_cpu_hides_the_gpus(tmp_path, program, arguments, seen):
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model="model", run_dir="run"))
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, str(ROOT / "launch" / program), *arguments],
        cwd=tmp_path,
        env=environment(CUDA_VISIBLE_DEVICES="0,1"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"GPUs: {seen}\n" in done.stdout, done.stderr


def test_the_warm_start_sees_no_gpu_whatever_the_run_sees(tmp_path, monkeypatch):
    (tmp_path / "cfg.yaml").write_text(CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run"))
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "GPUs: $CUDA_VISIBLE_DEVICES" > {tmp_path}/seen\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    warm_start.ensure(config_file.load(str(tmp_path / "cfg.yaml"), []))
    assert (tmp_path / "seen").read_text() == "GPUs: \n"


def test_a_cpu_beside_a_gpu_that_torch_sees_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="device = 'cpu': .* Remedy: set CUDA_VISIBLE_DEVICES=''"):
        topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=60, seed=1)


def test_tests_of_a_cpu_see_no_gpu_and_those_of_gpus_alone_do():
    assert wants_gpus("gpu") and wants_gpus("gpu and not slow")
    assert not any(map(wants_gpus, ("", "not gpu", "not slow and not gpu", "slow", "gpu or slow")))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_a_file_that_will_be_written_is_tried_before_the_work(tmp_path):
    assert entry.out_file("--out", str(tmp_path / "a/b/out.json")) == tmp_path / "a/b/out.json"
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "kept").write_text("as it was")
    assert entry.out_file("--out", str(tmp_path / "kept")).read_text() == "as it was"
    with pytest.raises(InputError, match=r"--out = .*: cannot be written \((File exists|Not a directory)\)"):
        entry.out_file("--out", str(tmp_path / "kept/out.json"))
    with pytest.raises(InputError, match=r"--out = .*: cannot be written \(Is a directory\)"):
        entry.out_file("--out", str(tmp_path))


FULL = """
import resource, signal, sys
from grpo_mcore import entry
def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    with open(sys.argv[1], "w") as f:
        f.write("x" * 100)
entry.run(main)
"""


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "metrics"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 1 and re.fullmatch(r"error: .*: File too large\. Remedy: make room, .*\n", done.stderr)
