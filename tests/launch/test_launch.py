"""The programs beside launch/train.py, as a user calls them.

Not covered here: training (test_trainer.py).
"""

import json
from pathlib import Path

import pytest

from grpo_mcore.data import arithmetic
from tests.conftest import CONFIG
from tests.dist import program


def launch(name: str, *args, cwd: Path, code: int = 0) -> str:
    done = program(f"launch/{name}", *args, cwd=cwd)
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def test_convert_there_and_back_gives_the_same_bytes(tmp_path):
    folder = tmp_path / "model"
    arithmetic.make_model(folder, seed=0)
    launch("convert.py", "to-megatron", "--hf", folder, "--out", tmp_path / "megatron", cwd=tmp_path)
    launch("convert.py", "to-hf", "--checkpoint", tmp_path / "megatron", "--out", tmp_path / "hf", cwd=tmp_path)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    out = launch(
        "convert.py", "to-hf", "--checkpoint", tmp_path / "megatron", "--out", tmp_path / "hf", cwd=tmp_path, code=2
    )
    assert "--out" in out and "exists already" in out and "Traceback" not in out


@pytest.mark.parametrize("name", ["train", "evaluate", "convert"])
def test_a_model_without_a_tokenizer_is_refused_by_every_program_that_reads_one(tmp_path, name):
    arithmetic.make_model(tmp_path / "model", seed=0)
    (tmp_path / "model/tokenizer.json").unlink()
    text = CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run")
    (tmp_path / "cfg.yaml").write_text("".join(x for x in text.splitlines(keepends=True) if "warm_start" not in x))
    arguments = ["to-megatron", "--hf", "model", "--out", "checkpoint"] if name == "convert" else ["--cfg", "cfg.yaml"]
    out = launch(f"{name}.py", *arguments, cwd=tmp_path, code=2)
    assert "has no tokenizer" in out and "Traceback" not in out


@pytest.mark.slow
def test_evaluate_reads_a_folder_or_a_checkpoint_and_says_the_same_of_both(tmp_path):
    arithmetic.make_model(tmp_path / "model", seed=0)
    launch("convert.py", "to-megatron", "--hf", tmp_path / "model", "--out", tmp_path / "checkpoint", cwd=tmp_path)
    (tmp_path / "cfg.yaml").write_text(f"""
model: {tmp_path}/model
run_dir: {tmp_path}/run
num_steps: 1
device: cpu
data:
  train: "arithmetic:two_digit_sums/train"
  prompt_template: "{{problem}}="
  chat_template: false
  max_prompt_tokens: 8
rollout: {{max_response_tokens: 16}}
engine: {{dtype: float32, kv_cache_bytes: 33554432}}
eval: {{data: "arithmetic:two_digit_sums/heldout", max_prompts: 5, samples_per_prompt: 4}}
""")
    seen = []
    for i, source in enumerate(("model", "checkpoint")):
        out = launch(
            "evaluate.py",
            "--cfg",
            "cfg.yaml",
            "--model",
            tmp_path / source,
            "--out",
            f"{i}.json",
            *(["--compare", "0.json"] if i else []),
            cwd=tmp_path,
        )
        assert "mean@4" in out and "5 problems" in out
        seen.append(json.loads((tmp_path / f"{i}.json").read_text()))
    assert "protocols differ in: nothing" in out and seen[1].pop("comparison")["difference"]["value"] == 0
    # An untaught model is right never; how often it runs into the length limit depends on its weights.
    assert 0 < seen[0]["eval/truncated_frac"] <= 1 and seen[0]["num_problems"] == 5
    assert {k: v for k, v in seen[0].items() if k != "model"} == {k: v for k, v in seen[1].items() if k != "model"}
