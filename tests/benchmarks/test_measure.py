"""benchmarks/measure.py on a CPU. Not covered here: CUDA."""

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


def test_the_peak_is_that_of_what_was_there_at_once_since_the_reset():
    size = 256 << 20
    torch.ones(size, dtype=torch.uint8)  # a peak of before
    measure.reset_peak(CPU)
    before = measure.held_bytes(CPU)
    for _ in range(2):
        torch.ones(size // 2, dtype=torch.uint8)
    assert 0.9 * size / 2 < measure.peak_bytes(CPU) - before < 1.5 * size / 2


@pytest.mark.parametrize("capability, n", [("AVX512", 2048), ("AVX2", 512)])
def test_the_peak_of_products_is_the_fastest_and_others_are_waited_for(monkeypatch, capability, n):
    # 12 timings, from 12 s to 1 s: a product of n x n matrices is 2 n^3 operations.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    timings, waited = iter(range(12, 0, -1)), []
    monkeypatch.setattr(measure, "seconds", lambda work, device: next(timings))
    assert measure.matrix_flops_per_s(torch.float32, CPU, lambda: waited.append(1)) == 2 * n**3
    assert len(waited) == 12


def test_what_is_asked_for_stands_and_the_rest_is_the_devices_own():
    defaults = {"cpu": {"model": "tiny", "steps": 2}, "cuda": {"model": "1.5b", "steps": 3}}
    parser = measure.parser("", overrides=None)
    measure.model_option(parser)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(["--steps", "7"])
    measure.settle(args, CPU, defaults, "train_step")
    assert (args.steps, args.model) == (7, str(measure.MODELS / "tiny"))
    assert args.out == measure.RESULTS / "train_step.json"
    args = parser.parse_args(["--model", "/elsewhere"])
    measure.settle(args, torch.device("cuda"), defaults, "train_step")
    assert (args.steps, args.model, args.out.name) == (3, "/elsewhere", "train_step_cuda.json")
