"""benchmarks/train_step.py: its count of FLOPs against torch's, and the program on a tiny model.

Not covered here: CUDA, FP8, running out of memory.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import measure, train_step
from tests.benchmarks.program import report_of


def test_forward_flops_of_a_worked_example():
    hf_config = AutoConfig.from_pretrained(measure.MODELS / "1.5b")
    # A layer: q and o 2 * 1536 * 1536, k and v 2 * 1536 * 256, FFN 3 * 1536 * 8960 = 46,792,704 parameters; 28 of them.
    # Head: 151936 * 1536. 2 * 28 * 46792704 * 1000 + 2 * 151936 * 1536 * 900 + 2 * 28 * 1000**2 * 1536
    assert train_step.forward_flops(hf_config, 1000, 900) == 2_620_391_424_000 + 420_072_652_800 + 86_016_000_000


def test_forward_flops_are_those_torch_counts_but_for_the_half_of_attention_that_the_mask_hides():
    hf_config = AutoConfig.from_pretrained(measure.MODELS / "tiny")
    hf = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(torch.zeros(1, 96, dtype=torch.long), use_cache=False)
    hidden_half = 2 * hf_config.num_hidden_layers * 96**2 * hf_config.hidden_size
    assert counter.get_total_flops() - hidden_half == train_step.forward_flops(hf_config, 96, 96)


@pytest.mark.parametrize("ranks, overrides", [(1, []), pytest.param(2, ["parallel.tp=2"], marks=pytest.mark.slow)])
def test_every_case_is_reported_and_those_that_cannot_run_say_why(tmp_path, ranks, overrides):
    launcher = () if ranks == 1 else ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    cases = ["--model", "tiny", "--precision", "fp32,fp8-delayed", "--sequence-tokens", "64,100", "--prompt-tokens", 80]
    size = ["--tokens-per-step", 400, "--max-tokens-per-microbatch", 200, "--steps", 1, "device=cpu", *overrides]
    report = report_of("train_step", *cases, *size, out=tmp_path / "out.json", timeout_s=120, launcher=launcher)
    status = {(r["precision"], r["sequence_tokens"]): r["status"] for r in report["results"]}
    assert status == {
        ("fp32", 64): "skipped",
        ("fp32", 100): "ok",
        ("fp8-delayed", 64): "skipped",
        ("fp8-delayed", 100): "skipped",
    }
    short, ok, _, fp8 = report["results"]
    assert "max_response_tokens = -16" in short["reason"] and "FP8" in fp8["reason"]
    # 4 sequences of 100 tokens, two a microbatch; no prompt is shared.
    assert (ok["sequences"], ok["microbatches_per_rank"], ok["packed_frac"]) == (4, 2, 1.0)
    phases, (step,) = ok["phases"], ok["s_of_steps"]
    assert list(phases) == [*train_step.PHASES, "step"] and step["step"] == pytest.approx(
        sum(step[p] for p in train_step.PHASES), abs=3e-4
    )
    for p in phases.values():
        assert p["s"] > 0 and p["peak_memory_bytes"] > 0 and p["tokens_per_s"] == pytest.approx(400 / p["s"], rel=0.1)
    peak = report["measured_matmul_flops_per_s"]["float32"]
    mfu = phases["step"]["model_flops"] / phases["step"]["s"] / peak
    assert phases["step"]["mfu_of_measured_float32_peak"] == pytest.approx(mfu, rel=0.01, abs=1e-4)
