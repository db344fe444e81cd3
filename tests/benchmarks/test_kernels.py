"""benchmarks/kernels.py: the program at small sizes, and that its float64 truth is the oracle's. Not covered here:
CUDA."""

import torch

from benchmarks import kernels
from tests.benchmarks.program import report_of


def test_its_truth_is_what_autograd_says_in_float64(monkeypatch):
    monkeypatch.setattr(kernels, "D", 24)
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    rows, vocabulary = 70, 4100  # two chunks
    hidden, weight, target, upstream = kernels.inputs(rows, vocabulary)
    z = hidden.double() @ weight.double().T
    logprobs = z.log_softmax(1)
    picked = logprobs.gather(1, target[:, None])[:, 0]
    gradients = torch.autograd.grad((upstream * picked).sum(), (hidden, weight))
    exact = kernels.truth(rows, vocabulary)
    some_rows, some_columns = kernels.samples(rows, vocabulary, target)
    assert torch.allclose(exact["logprob"], picked, rtol=0, atol=1e-12)
    assert torch.allclose(exact["entropy"], -(logprobs.exp() * logprobs).sum(1), rtol=0, atol=1e-12)
    # The leaves are bfloat16, and so are their gradients: half an ulp.
    for name, gradient in (("d_hidden", gradients[0][some_rows]), ("d_weight", gradients[1][some_columns])):
        assert ((exact[name] - gradient.double()).abs() <= 2.0**-8 * exact[name].abs() + 1e-12).all(), name


def test_every_implementation_is_measured_or_says_why_not(tmp_path):
    names = "naive,chunked,logits once,quack (sum of the loss only),triton"
    size = ["--rows", 5, "--vocabulary", 300, "--rounds", 2, "--only", names]
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    report = report_of("kernels", *size, out=tmp_path / "out.json", timeout_s=200, **no_gpu)
    naive, chunked, once, quack, triton = report["results"]
    assert (
        quack["status"] == triton["status"] == "skipped"
        and "ModuleNotFoundError" in quack["reason"]
        and "cannot run" in triton["reason"]
    )
    assert naive["forward"]["time_of_naive"] == naive["forward_backward"]["time_of_naive"] == 1
    for r in (naive, chunked, once):
        assert (
            r["status"] == "ok"
            and r["has_entropy"]
            and set(r["error"]) == {"logprob", "entropy", "d_hidden", "d_weight"}
        )
        assert 0 < max(r["error"].values()) < 0.05
        for pass_, products in (("forward", 1), ("forward_backward", 3)):
            flops = products * 2 * 5 * 1536 * 300
            assert abs(r[pass_]["share_of_peak"] * report["matmul_flops_per_s"] * r[pass_]["s"] / flops - 1) < 1e-6
