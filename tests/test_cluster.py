"""What parts of a cluster take: worked numbers; and that what benchmarks/rollout.py concludes is what it was timed with."""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rollout as benchmark
from grpo_mcore import cluster, config, config_file
from grpo_mcore.cluster import Cluster, Draw, EngineProfile, LogNormal, Measured, TrainerProfile
from grpo_mcore.config import InputError
from grpo_mcore.simulate import Simulation

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs/benchmarks/1.5b"


def test_an_iteration_lies_on_the_line_between_its_neighbours():
    p = EngineProfile(((1, 2.0), (4, 5.0), (8, 7.0)))
    assert [p.base_s(n) for n in (1, 2, 4, 6, 8, 12)] == [2, 3, 5, 6, 7, 9]
    assert EngineProfile(((1, 2.0),)).base_s(50) == 2


@pytest.mark.parametrize("seed", range(50))
def test_iterations_within_is_the_inverse_of_decode_s(seed):
    rng = random.Random(seed)
    p = EngineProfile(((1, rng.random()), (9, 1 + rng.random())), kv_token_s=rng.choice([0, 1e-9, 1e-3, 1]) * rng.random())
    n, kv = rng.randint(1, 9), rng.randint(0, 10**rng.randint(1, 7))
    for iterations in (0, 1, 2, 17, 24576):
        end, next_ = p.decode_s(iterations, n, kv), p.decode_s(iterations + 1, n, kv)
        assert p.iterations_within((end + next_) / 2, n, kv) == iterations
        assert iterations == 0 or p.iterations_within(end, n, kv) == iterations
    assert p.iterations_within(-1, n, kv) == 0
    assert p.decode_s(3, n, kv) == pytest.approx(sum(p.decode_s(1, n, kv + n * i) for i in range(3)))


def test_the_shape_of_a_model():
    s = cluster.Shape.of(MODEL)
    # A layer: q and o 2 x 1536 x 1536, k and v 2 x 1536 x 256, FFN 3 x 1536 x 8960 = 46,792,704; 28 of them; head and embedding 151936 x 1536 each.
    assert (s.multiplied, s.parameters) == (28 * 46_792_704 + 233_373_696, 28 * 46_792_704 + 2 * 233_373_696)
    assert (s.kv_bytes, s.layers, s.width) == (28 * 2 * 2 * 128 * 2, 28, 1536)
    with pytest.raises(InputError, match="config.json"):
        cluster.Shape.of("nowhere")


def test_estimates_of_a_worked_example():
    """A model of 10 parameters, all multiplied, 4 bytes of cache a token; a GPU of 1000 FLOP/s, 100 B/s, 1000 B."""
    shape, gpu = cluster.Shape(10, 10, layers=2, width=3, kv_bytes=4), cluster.Gpu(1000, 100, 1000)
    e = cluster.engine_on(gpu, shape, tp=2)
    seconds = dict(e.iteration_s)
    assert seconds[1] == pytest.approx(0.003 + 20 / (100 * 0.7 * 2))  # 20 bytes of weights
    assert seconds[16] == pytest.approx(0.003 + 16 * 20 / (1000 * 0.4 * 2))  # 2 x 10 FLOPs a token: longer than reading
    assert e.kv_token_s == pytest.approx(4 / 140) and e.prefill_token_s == pytest.approx(20 / 800) and e.kv_cache_tokens == int((1000 * 0.85 * 2 - 20) / 4)
    t = cluster.trainer_on(gpu, shape, num_gpus=3, forward_passes=4)
    # Forward: 2 x 10 a token; attention 4 x 3 a pair and layer, of which causality leaves half: 2 x 2 x 3 x L^2 in 2 layers.
    assert t.seconds([5, 7]) == pytest.approx(4 * (20 * 12 + 12 * (25 + 49)) / (1000 * 0.35 * 3))


def test_log_normal_lengths():
    lengths = LogNormal(median_tokens=100, mean_tokens=150, max_tokens=400, prompt_tokens=9, group_size=4, flat_frac=0.25)
    draws = [lengths(p) for p in range(4000)]
    assert draws[7] == lengths(7) and draws[7] != draws[8] and draws[0].prompt_tokens == 9
    tokens = [n for d in draws for n in d.response_tokens]
    # 16,000 samples of sigma 0.9: the median's standard error is 1.25 x 0.9 / sqrt(16000) = 0.9%
    assert statistics.median(tokens) == pytest.approx(100, rel=0.03) and max(tokens) == 400 and min(tokens) >= 1
    assert 0.22 < statistics.mean(not d.has_variance for d in draws) < 0.28
    uncut = LogNormal(100, 150, 10**9, 9, 4)
    assert statistics.mean(n for p in range(4000) for n in uncut(p).response_tokens) == pytest.approx(150, rel=0.05)


@pytest.fixture
def run_dir(tmp_path):
    """Two steps of two groups of two; the second group of each has no variance."""
    (tmp_path / "rollouts").mkdir()
    rows = []
    for step, times in ((1, (9.0, 30.0, 2.0, 4.0)), (2, (2.0, 5.0, 1.0, 3.0))):
        rows.append({"step": step, "eval/mean@4": 0.5, "time/eval_s": 99.0})
        rows.append({"step": step, **dict(zip(("time/refit_s", "time/rollout_s", "time/logprob_s", "time/update_s"), times, strict=True)), "time/eval_s": 77.0})
        responses = [{"position": 2 * step - 2 + g, "sample": i, "prompt_tokens": 4, "response_tokens": 10 * step + g + i, "reward": float(g == 0 and i)} for g in range(2) for i in range(2)]
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_a_run_is_read_back(run_dir):
    draw = Measured(run_dir)
    assert [draw(p) for p in range(5)] == [Draw(4, (10, 11), True), Draw(4, (11, 12), False), Draw(4, (20, 21), True), Draw(4, (21, 22), False), draw(0)]
    first, second = cluster.measured_steps(run_dir)
    assert (first.seconds, first.tokens) == (45, 16 + 44) and (second.refit_s, second.rollout_s, second.train_s, second.tokens) == (2, 5, 4, 16 + 84)
    t = cluster.trainer_of([second])
    assert t.refit_s == 2 and t.seconds([50, 50]) == pytest.approx(4)
    with pytest.raises(InputError, match="rollouts"):
        Measured(run_dir / "rollouts")
    with pytest.raises(InputError, match="metrics"):
        cluster.measured_steps(run_dir / "rollouts")


@pytest.mark.parametrize("block_tokens, siblings", [(0, 4), (8, 4), (32, 8)])
def test_the_benchmark_concludes_the_profile_it_was_timed_with(tmp_path, block_tokens, siblings):
    cfg = config_file.load(ROOT / "configs/quickstart.yaml", ["data.max_prompt_tokens=50", f"rollout.group_size={siblings}", "engine.max_running_responses=16", "engine.num_engines=1",
                                                             f"model={MODEL}", "batch.global_batch_size=32"])
    true = EngineProfile(((1, 0.01), (2, 0.012), (4, 0.02), (8, 0.03), (16, 0.06)), kv_token_s=1e-5, prefill_token_s=2e-3, response_s=0.003, block_tokens=block_tokens)

    class Timed(benchmark.Bench):
        """In virtual time."""

        def __init__(self):
            self.cfg = cfg

        def alike(self, running, prompt_tokens, max_tokens, group_size):
            group_size = min(group_size, running)
            sim = Simulation(config.Rollout(prompts_per_step=running // group_size, group_size=group_size), cfg.engine, Cluster(true, TrainerProfile()), lambda p: Draw(prompt_tokens, (max_tokens,) * group_size))
            return sim.run(1)[0].rollout_s

    runnings = [1, 2, 4, 8, 16]
    seconds = {name: work() for name, work in benchmark.works(Timed(), runnings, []).items() if name != "load"}
    found = benchmark.profile_of(cfg, seconds, runnings, block_tokens)
    assert [s for _, s in found.iteration_s] == pytest.approx([s for _, s in true.iteration_s])
    assert (found.kv_token_s, found.prefill_token_s, found.response_s) == pytest.approx((1e-5, 2e-3, 0.003))
    assert found.kv_cache_tokens == 67108864 // (2 * 28672)  # float32


@pytest.mark.slow
def test_the_benchmark_of_a_real_engine(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/rollout.py", "--cfg", "configs/quickstart.yaml", "--running", "1,8", "--load", "16", "--rounds", "1", "--out", str(out), "engine.num_engines=1"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert cluster.engine_from(out).iteration_s[1][0] == 8 and report["load"]["responses"] == 16 and report["load"]["s"] > 0 and report["load"]["simulated_s"] > 0
    assert report["prefix_cache"]["prompt_tokens"] == 8 and all(s > 0 for s in report["seconds"]["8 running, 40 tokens"])
