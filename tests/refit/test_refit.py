"""Real vLLM engines under Ray: what a refit delivers by each transport, and how it is attested.

Not covered here: NCCL and IPC (they need GPUs); engines that fail and refits that are corrupted (test_engines.py); the
data plane by itself (test_weight_transfer.py).
"""

import dataclasses
import functools

import pytest
import torch

from grpo_mcore.config import config, file as config_file
from grpo_mcore.loss import loss
from grpo_mcore.parallel import topology
from grpo_mcore.policy.policy import Policy
from grpo_mcore.refit.refit import Refit
from grpo_mcore.report import metrics
from grpo_mcore.rollout.engine import Sampling
from grpo_mcore.rollout.engines import Engines
from grpo_mcore.rollout.rollout import StaleError, sample
from grpo_mcore.types import Group, Prompt
from tests.dist import spawn
from tests.policy.test_policy import batch_of

CANARY = [[5, 17, 33, 80, 2, 41], [60, 8, 9, 10, 11, 12, 13]]
PROMPTS = [Prompt(i, "", "", (3 + i, 40, 7 * i % 91, 12)) for i in range(6)]
pytestmark = pytest.mark.slow  # engines take 15 to 40 s to start


def configuration(folder: str, run_dir: str, *overrides: str) -> config.Config:
    path = f"{run_dir}/cfg.yaml"
    with open(path, "w") as f:
        f.write(f"""
model: {folder}
run_dir: {run_dir}
num_steps: 1
data: {{train: unused.jsonl, max_prompt_tokens: 16}}
precision: {{params: float32}}
rollout: {{max_response_tokens: 24, timeout_s: 60, prompts_per_step: 6, group_size: 4}}
engine: {{num_engines: 2, dtype: float32, kv_cache_bytes: 33554432}}
batch: {{global_batch_size: 24}}
refit: {{timeout_s: 30, bucket_bytes: 20000}}
""")
    return config_file.load(path, overrides)


class Session:
    """A policy on this rank and, on the driver, two engines."""

    def __init__(self, folder: str, run_dir: str, axes: dict[str, int] | None = None, *overrides: str):
        self.cfg = configuration(folder, run_dir, *overrides)
        self.topo = topology.connect(config.Parallel(**(axes or {})), device=torch.device("cpu"), timeout_s=120, seed=1)
        self.engines = Engines(self.cfg, folder, cuda=False, stop_token_ids=[1]) if self.topo.is_driver else None
        self.policy = Policy(
            folder, self.topo, precision=self.cfg.precision, temperature=1.0, optimizer=config.Optimizer(lr=1e-2)
        )
        if self.engines:
            self.engines.wait_until_ready()
        self.first = self.weights()  # the folder's
        self.refit_by("auto")

    def refit_by(self, transport: str) -> Refit:
        """From now on."""
        cfg = dataclasses.replace(self.cfg, refit=dataclasses.replace(self.cfg.refit, transport=transport))
        self.refit = Refit(self.policy, self.engines, cfg, self.topo, CANARY)
        return self.refit

    def learn(self, seed: int) -> None:
        b = batch_of(self.topo, max_tokens=100, seed=seed)
        for m, logprobs in zip(b.microbatches, self.policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs
        self.policy.update(b, functools.partial(loss.grpo, cfg=config.Loss()), lr=1e-2)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for chunk in self.policy.chunks for p in chunk.parameters()]

    def restore(self, weights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip((p for chunk in self.policy.chunks for p in chunk.parameters()), weights, strict=True):
                p.copy_(w)

    def sample(self, version: int, seed: int = 0) -> list[list[tuple[int, ...]]]:
        return [[r.token_ids for r in g.responses] for g in self.groups(version, seed)]

    def groups(self, version: int, seed: int = 0) -> list[Group]:
        return sample(
            self.engines,
            PROMPTS,
            group_size=4,
            temperature=1.0,
            max_tokens=lambda _: 24,
            seed=seed,
            version=version,
            timeout_s=60,
        )

    def close(self) -> None:
        if self.engines:
            self.engines.stop()
        topology.disconnect()


@pytest.fixture(scope="module")
def session(model_folders, tmp_path_factory):
    s = Session(model_folders["qwen2_tied"], str(tmp_path_factory.mktemp("run")))
    yield s
    s.close()


def errors_after_updates(session: Session, transports: tuple[str, ...] = ("shared", "broadcast")) -> list[float]:
    """Several refits by each transport, all to weights that differ."""
    errors = []
    for transport in transports:
        refit = session.refit_by(transport)
        for version in range(3):
            errors.append(refit(version).get("refit/canary_abs_mean", metrics.Mean(0.0, 1)).value)
            session.learn(version)
    return errors


def test_after_every_refit_the_engines_score_as_the_trainer_does(session):
    errors = errors_after_updates(session)
    assert max(errors) < 1e-4, errors  # float32 on both sides


def test_engines_on_this_machine_share_its_memory_and_the_metrics_say_how_fast(session):
    seen = session.refit_by("auto")(3)
    assert session.refit.transfer.transport == "shared_memory"
    # Embedding 91 x 128; each of 2 layers: q, o 128 x 128, k, v 64 x 128, 3 x 96 x 128 and biases, norms 128 + 64 + 64
    # + 2 x 128; the last norm 128. float32.
    assert seen["refit/bytes"].value == 4 * (
        91 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 96 * 128 + 128 + 64 + 64 + 2 * 128) + 128
    )
    assert seen["refit/gb_per_s"].value == pytest.approx(seen["refit/bytes"].value / 1e9 / seen["refit/seconds"].value)


@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_sender_that_fails_midway_names_the_tensor_and_the_refit_is_done_again(
    session, monkeypatch, capsys, transport
):
    refit, honest = session.refit_by(transport), session.policy.export
    left = []

    def failing(**how):
        for name, tensor in honest(**how):
            if name == "model.layers.1.self_attn.o_proj.weight" and not left:
                left.append(name)
                raise RuntimeError("the wire burnt through")
            yield name, tensor

    monkeypatch.setattr(session.policy, "export", failing)
    seen = refit(4)
    assert seen["refit/attempts"].value == 2 and seen["refit/canary_abs_mean"].value < 1e-4
    assert (
        "refit to version 4: sending model.layers.1.self_attn.o_proj.weight: the wire burnt through\nit is done again"
        in capsys.readouterr().out
    )


def test_the_engines_own_logprobs_equal_the_trainers_of_the_same_tokens(session):
    """What the engine sampled with is what the trainer scores, on policy: the mismatch metrics' zero."""
    from grpo_mcore.loss import batch

    session.refit(7)
    groups = sample(
        session.engines,
        PROMPTS,
        group_size=4,
        temperature=1.0,
        max_tokens=lambda _: 24,
        seed=5,
        version=7,
        timeout_s=60,
    )
    (b,) = batch.assemble(
        groups,
        torch.zeros(6, 4),
        global_batch_size=24,
        aggregation="token_mean",
        max_response_tokens=24,
        packing=batch.Packing(max_tokens=8192),
    )
    (ours,) = session.policy.logprobs(b.microbatches)
    seen = metrics.mismatch(b.microbatches[0].rollout_logprobs_R, ours, b.microbatches[0].position_R)
    assert seen["mismatch/logprob_abs_max"].value < 1e-3
    assert seen["mismatch/beyond_cap_frac"].value == 0
    assert len({r.token_ids for g in groups for r in g.responses}) > 6  # siblings differ


def generate(session, requests) -> list:
    answers = [
        session.engines.submit((i,), token_ids, sampling, "test") for i, (token_ids, sampling) in enumerate(requests)
    ]
    return [answer.result(60) for answer in answers]


def test_the_same_seed_gives_the_same_tokens_whatever_the_order_of_engines(session):
    session.refit(8)
    first = session.sample(8)
    assert session.sample(8) == first
    assert session.sample(8, seed=1) != first
    # Prompt i goes to engine i % 2; shifted by one, each goes to the other engine.
    requests = [(p.token_ids, Sampling(4, 1.0, 24, seed=100 + i)) for i, p in enumerate(PROMPTS)]
    plain = generate(session, requests)
    shifted = generate(session, [requests[0], *requests])[1:]
    assert [[c.token_ids for c in cs] for cs in plain] == [[c.token_ids for c in cs] for cs in shifted]


def test_more_prompt_tokens_than_one_engine_step_takes_are_sampled_the_same(session):
    session.refit(8)
    # 2 engines x 75 prompts x 4 responses x 15 tokens: twice the 2048 tokens of an engine step
    requests = [((3 + i % 80, *range(20, 34)), Sampling(4, 1.0, 24, seed=i)) for i in range(150)]
    together = generate(session, requests)
    (alone,) = generate(session, [requests[100]])
    assert [c.token_ids for c in together[100]] == [c.token_ids for c in alone]


def test_a_response_sampled_with_other_weights_is_refused(session):
    session.refit(9)
    with pytest.raises(StaleError, match="of version 9, where the step needs 10"):
        session.sample(10)


def refit_quantised(folder: str, run_dir: str) -> tuple[list[float], float]:
    """(errors of refits to two policies, the second by each transport; how far the policies are apart)"""
    session = Session(
        folder, run_dir, {}, "engine.num_engines=1", "engine.dtype=bfloat16", "engine.quantization=fp8_per_block"
    )

    def scores() -> torch.Tensor:
        answers, _ = session.engines.collect(session.engines.call(session.engines.ready, "score", (CANARY,)), 30)
        (answer,) = answers.values()
        return torch.tensor([x for part in answer for x in part])

    try:
        errors, before = [session.refit(0)["refit/canary_abs_mean"].value], scores()
        with torch.no_grad():
            for p in session.policy.chunks[0].parameters():
                p.add_(torch.randn_like(p) * p.std() * 0.5)
        errors += [
            session.refit_by(transport)(1)["refit/canary_abs_mean"].value for transport in ("shared", "broadcast")
        ]
        return errors, (scores() - before).abs().mean().item()
    finally:
        session.close()


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's FP8 kernels for a CPU need AMX")
def test_quantised_engines_are_refitted_through_vllms_reload(model_folders, tmp_path):
    ((errors, apart),) = spawn(refit_quantised, 1, model_folders["llama_linear_rope"], str(tmp_path))
    assert max(errors) < apart / 4, (errors, apart)  # FP8's error, against what stale weights would show


def sampled_by_tp_2(folder: str, run_dir: str) -> list[Group]:
    session = Session(folder, run_dir, {}, "engine.num_engines=1", "engine.tp=2")
    try:
        session.refit(1)
        return session.groups(1)
    finally:
        session.close()


def test_an_engine_split_over_two_processes_samples_the_same(session, model_folders, tmp_path):
    (split,) = spawn(sampled_by_tp_2, 1, model_folders["qwen2_tied"], str(tmp_path))
    session.restore(session.first)
    session.refit(1)
    whole = session.groups(1)
    for a, b in zip((r for g in split for r in g.responses), (r for g in whole for r in g.responses), strict=True):
        assert a.token_ids == b.token_ids
        assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=1e-4)


def refit_on_ranks(folder: str, run_dir: str, axes: dict[str, int], engine_tp: int) -> list[float]:
    session = Session(folder, run_dir, axes, "engine.num_engines=1", f"engine.tp={engine_tp}")
    try:
        return errors_after_updates(session)
    finally:
        session.close()


@pytest.mark.parametrize(
    ("kind", "axes", "engine_tp"),
    [
        ("qwen2_untied", {"tp": 2, "pp": 2}, 1),
        ("llama_llama3_rope", {"tp": 2, "sequence_parallel": True}, 2),
        ("llama_linear_rope", {"cp": 2}, 1),
    ],
    ids=str,
)
def test_a_policy_and_an_engine_split_over_ranks_refit_the_same(model_folders, tmp_path, kind, axes, engine_tp):
    arguments = model_folders[kind], str(tmp_path), axes, engine_tp
    driver, *others = spawn(refit_on_ranks, 4 if "pp" in axes else 2, *arguments, timeout_s=400)
    assert max(driver) < 1e-4, driver
    assert all(max(other) == 0 for other in others)
