"""What parts of a cluster take: worked numbers; and that what benchmarks/rollout.py concludes is what it was timed
with."""

import json
import random
import statistics

import pytest

from benchmarks import rollout as benchmark
from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.plan import cluster, memory, time as plan_time
from grpo_mcore.plan.cluster import Cluster, Draw, EngineProfile, LogNormal, Measured, TrainerProfile
from grpo_mcore.plan.simulate import Simulation
from grpo_mcore.policy import model
from tests.dist import ROOT

MODEL = ROOT / "configs/benchmarks/1.5b"


def test_an_iteration_lies_on_the_line_between_its_neighbours():
    p = EngineProfile(((1, 2.0), (4, 5.0), (8, 7.0)))
    assert [p.base_s(n) for n in (1, 2, 4, 6, 8, 12)] == [2, 3, 5, 6, 7, 9]
    assert EngineProfile(((1, 2.0),)).base_s(50) == 2


@pytest.mark.parametrize("seed", range(50))
def test_iterations_within_is_the_inverse_of_decode_s(seed):
    rng = random.Random(seed)
    p = EngineProfile(
        ((1, rng.random()), (9, 1 + rng.random())), kv_token_s=rng.choice([0, 1e-9, 1e-3, 1]) * rng.random()
    )
    n, kv = rng.randint(1, 9), rng.randint(0, 10 ** rng.randint(1, 7))
    for iterations in (0, 1, 2, 17, 24576):
        end, next_ = p.decode_s(iterations, n, kv), p.decode_s(iterations + 1, n, kv)
        assert p.iterations_within((end + next_) / 2, n, kv) == iterations
        assert iterations == 0 or p.iterations_within(end, n, kv) == iterations
    assert p.iterations_within(-1, n, kv) == 0
    assert p.decode_s(3, n, kv) == pytest.approx(sum(p.decode_s(1, n, kv + n * i) for i in range(3)))


def test_estimates_are_those_of_the_planner():
    """Its seconds of a training step for sequences of the assumed lengths; its weights, cache and assumptions for an
    engine."""
    engine = "placement=disaggregated num_engines=4 dtype=bfloat16 kv_cache_bytes=null"
    tokens = "data.max_prompt_tokens=1000 rollout.max_response_tokens=7000 batch.max_tokens_per_microbatch=8192"
    overrides = ["device=auto", "precision.params=bfloat16", *tokens.split(), *(f"engine.{x}" for x in engine.split())]
    cfg = config_file.load(ROOT / "configs/quickstart.yaml", overrides)
    case = memory.Case(cfg, model.load_hf_config(str(MODEL)), memory.Machine("h100-80gb", 12))
    a = plan_time.Assumptions(500, 2500)
    parts, seconds = cluster.estimated(case, a), plan_time.times(case, a)
    train_s = seconds["logprob"] + seconds["update"]
    assert parts.trainer.seconds([3000] * cfg.responses_per_step) == pytest.approx(train_s)
    assert parts.trainer.refit_s == seconds["refit"]
    # Attention: 2 x 28 layers x 1536 x 3000^2 = 0.774e12 of 10.03e12 FLOPs, which grow fourfold.
    twice = parts.trainer.seconds([6000] * cfg.responses_per_step) / train_s
    assert twice == pytest.approx(2 + 2 * 0.774 / 10.03, rel=1e-3)
    e, bytes_per_s = parts.engine, a.decode_bandwidth_frac * 3.35e12
    assert e.base_s(1) == pytest.approx(0.004 + 2 * case.num_parameters / bytes_per_s, rel=1e-3)
    assert e.kv_token_s == pytest.approx(28672 / bytes_per_s)
    assert e.base_s(4096) == pytest.approx(0.004 + 4096 * e.prefill_token_s)
    assert e.prefill_token_s == pytest.approx(2 * case.num_parameters / (a.decode_mfu * 989e12))
    assert e.kv_cache_tokens == int(memory.needed(case).phases["rollout"]["engine: KV cache"] / 28672)


def test_log_normal_lengths():
    lengths = LogNormal(100, 150, max_tokens=400, prompt_tokens=9, group_size=4, flat_frac=0.25)
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
    rows, names = [], ("time/refit_s", "time/rollout_s", "time/logprob_s", "time/update_s")
    for step, times in ((1, (9.0, 30.0, 2.0, 4.0)), (2, (2.0, 5.0, 1.0, 3.0))):
        rows.append({"step": step, "eval/mean@4": 0.5, "time/eval_s": 99.0})
        rows.append({"step": step, **dict(zip(names, times, strict=True)), "time/eval_s": 77.0})
        responses = [
            {
                "position": 2 * step - 2 + g,
                "sample": i,
                "prompt_tokens": 4,
                "response_tokens": 10 * step + g + i,
                "reward": float(g == 0 and i),
            }
            for g in range(2)
            for i in range(2)
        ]
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_a_run_is_read_back(run_dir):
    draw = Measured(run_dir)
    groups = [Draw(4, (10, 11), True), Draw(4, (11, 12), False), Draw(4, (20, 21), True), Draw(4, (21, 22), False)]
    assert [draw(p) for p in range(5)] == [*groups, draw(0)]
    first, second = cluster.measured_steps(run_dir)
    assert (first.seconds, first.tokens) == (45, 16 + 44)
    assert (second.refit_s, second.rollout_s, second.train_s, second.tokens) == (2, 5, 4, 16 + 84)
    t = cluster.trainer_of([second])
    assert t.refit_s == 2 and t.seconds([50, 50]) == pytest.approx(4)
    with pytest.raises(InputError, match="rollouts"):
        Measured(run_dir / "rollouts")
    with pytest.raises(InputError, match="metrics"):
        cluster.measured_steps(run_dir / "rollouts")


@pytest.mark.parametrize("block_tokens, siblings", [(0, 4), (8, 4), (32, 8)])
def test_the_benchmark_concludes_the_profile_it_was_timed_with(block_tokens, siblings):
    engine = ("engine.max_running_responses=16", "engine.num_engines=1")
    group = (f"rollout.group_size={siblings}", "batch.global_batch_size=32", "data.max_prompt_tokens=50")
    cfg = config_file.load(ROOT / "configs/quickstart.yaml", [*engine, *group, f"model={MODEL}"])
    true = EngineProfile(
        ((1, 0.01), (2, 0.012), (4, 0.02), (8, 0.03), (16, 0.06)),
        kv_token_s=1e-5,
        prefill_token_s=2e-3,
        response_s=0.003,
        block_tokens=block_tokens,
    )

    class Timed(benchmark.Bench):
        """In virtual time."""

        def __init__(self):
            self.cfg = cfg

        def alike(self, running, prompt_tokens, max_tokens, group_size):
            group_size = min(group_size, running)
            sim = Simulation(
                config.Rollout(prompts_per_step=running // group_size, group_size=group_size),
                cfg.engine,
                Cluster(true, TrainerProfile()),
                lambda p: Draw(prompt_tokens, (max_tokens,) * group_size),
            )
            return sim.run(1)[0].rollout_s

    runnings = [1, 2, 4, 8, 16]
    seconds = {name: work() for name, work in benchmark.works(Timed(), runnings, []).items() if name != "load"}
    found = benchmark.profile_of(cfg, seconds, runnings, block_tokens)
    assert [s for _, s in found.iteration_s] == pytest.approx([s for _, s in true.iteration_s])
    assert (found.kv_token_s, found.prefill_token_s, found.response_s) == pytest.approx((1e-5, 2e-3, 0.003))
    assert found.kv_cache_tokens == 67108864 // (2 * 28672)  # float32
