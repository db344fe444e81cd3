"""Megatron's policy against Hugging Face's model, and against itself in other layouts.

Not covered here: Transformer Engine and FP8 (marked gpu).
"""

import functools
import random
import types
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from grpo_mcore import trainer
from grpo_mcore.config import config
from grpo_mcore.kernels import linear_grpo
from grpo_mcore.loss import batch, loss
from grpo_mcore.loss.batch import assemble
from grpo_mcore.parallel import collectives, topology
from grpo_mcore.policy import hf_weights
from grpo_mcore.policy.policy import FrozenPolicy, Policy, learning_rate
from grpo_mcore.report import metrics
from grpo_mcore.types import GlobalBatch, Group, Prompt, Response
from tests import models
from tests.dist import spawn

TEMPERATURE = 0.7


def groups(seed: int = 0, *, P: int = 4, G: int = 4) -> tuple[list[Group], torch.Tensor]:
    """P groups of G responses of random tokens and lengths, half of them of several turns, with random advantages."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(91) for _ in range(rng.randint(low, high)))

    out = []
    for p in range(P):
        prompt, responses = tokens(2, 9), []
        for g in range(G):
            r, given = tokens(1, 24), ()
            if g % 2 and len(r) > 4:
                ends = sorted(rng.sample(range(1, len(r)), 4))  # the last token is sampled
                given = ((ends[0], ends[1]), (ends[2], ends[3]))
            num_sampled = len(r) - sum(end - start for start, end in given)
            # Old log-probs are recomputed; what the engine recorded only feeds the mismatch metrics.
            responses.append(Response(r, (-1.0,) * num_sampled, False, given=given))
        out.append(Group(Prompt(p, "", "", prompt), tuple(responses)))
    return out, torch.randn(P, G, generator=torch.Generator().manual_seed(seed))


def connect(**axes):
    return topology.connect(config.Parallel(**axes), device=torch.device("cpu"), timeout_s=60, seed=1)


def make_policy(
    folder: str,
    topo,
    *,
    dtype: str = "float32",
    optimizer: config.Optimizer = config.Optimizer(lr=1e-3),
    pointwise: bool | None = None,
) -> Policy:
    return Policy(
        folder,
        topo,
        precision=config.Precision(params=dtype),
        temperature=TEMPERATURE,
        optimizer=optimizer,
        pointwise=pointwise,
    )


def batch_of(
    topo,
    *,
    max_tokens: int,
    aggregation: str = "token_mean",
    seed: int = 0,
    share: bool = False,
    single: bool = False,
    precision: config.Precision = config.Precision(),
) -> GlobalBatch:
    drawn, advantages = groups(seed)
    packing = batch.Packing(
        max_tokens=max_tokens,
        dp=topo.dp,
        dp_rank=topo.dp_rank,
        cp=topo.cp,
        cp_rank=topo.cp_rank,
        align_tokens=config.packed_alignment(topo.parallel, precision),
        microbatch_multiple=16 // topo.dp if single else topo.pp if topo.parallel.virtual_pp > 1 else 1,
        share_prompts=share,
    )
    (out,) = assemble(
        drawn, advantages, global_batch_size=16, aggregation=aggregation, max_response_tokens=24, packing=packing
    )
    return out


def on_policy_update(policy: Policy, b: GlobalBatch, *, lr: float = 1e-3, **loss_kwargs) -> dict:
    """Scores, then an optimizer step; its metrics."""
    for m, logprobs in zip(b.microbatches, policy.logprobs(b.microbatches), strict=True):
        m.old_logprobs_R = m.ref_logprobs_R = logprobs
    return policy.update(b, functools.partial(loss.grpo, cfg=config.Loss(**loss_kwargs)), lr=lr)


def hf_logprobs(folder: str, b: GlobalBatch) -> list[torch.Tensor]:
    """The oracle: Hugging Face's model on each sequence alone."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out = []
    for m in b.microbatches:
        logprobs: list[torch.Tensor] = []
        for i, j in pairwise(m.cu_seqlens.tolist()):
            tokens, branch = m.token_ids_T[i:j], m.branch_T[i:j]
            for k in range(1, int(branch.max()) + 1):
                prompt, response = tokens[branch == 0], tokens[branch == k]
                mine = m.sequence_R == len(logprobs)
                before = m.position_R[mine] - i  # in the block; in the sequence alone siblings are not there
                before = torch.where(before < len(prompt), before, before - (branch == k).nonzero()[0] + len(prompt))
                with torch.no_grad():
                    logits = hf(torch.cat([prompt, response])[None]).logits[0, before]
                logprobs.append((logits / TEMPERATURE).log_softmax(-1).gather(1, m.target_R[mine, None])[:, 0])
        out.append(torch.cat(logprobs))
    return out


def parity_on_ranks(folders: dict[str, str], axes: dict) -> dict[str, float]:
    topo = connect(**axes)
    worst = {}
    for kind, folder in folders.items():
        policy = make_policy(folder, topo)
        worst[kind] = 0.0
        for share in (False, True):
            b = batch_of(topo, max_tokens=90, share=share)
            ours = policy.logprobs(b.microbatches)
            if topo.is_last_stage:
                worst[kind] = max(
                    worst[kind],
                    *((x - y).abs().max().item() for x, y in zip(ours, hf_logprobs(folder, b), strict=True)),
                )
    topology.disconnect()
    return worst


@pytest.mark.parametrize("axes", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=str)
def test_packed_logprobs_equal_hugging_faces_of_each_sequence_alone(model_folders, axes):
    # float32 on both sides, log-probs down to about -20: 1e-4 is 40 ulp of the largest logit.
    for worst in spawn(parity_on_ranks, config.Parallel(**axes).ranks_per_replica, model_folders, axes):
        assert set(worst) == set(models.KINDS)
        assert max(worst.values()) < 1e-4, worst


# 16 sequences of up to 33 tokens. "cut" makes many microbatches, "whole" one a rank, "single" one a sequence.
PACKINGS = {
    "cut": {"max_tokens": 64},
    "whole": {"max_tokens": 10_000},
    "single": {"max_tokens": 64, "single": True},
    "shared": {"max_tokens": 90, "share": True},
}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}
SP = {"sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS_OF_4 = [
    # Every factorisation of 4 ranks into dp, tp and pp, with each option on and off.
    ({}, "cut"),
    ({}, "whole"),
    ({}, "single"),
    ({}, "shared"),
    (FULL, "cut"),
    (OVERLAP, "cut"),
    ({"tp": 2}, "cut"),
    ({"tp": 2, **SP}, "cut"),
    ({"tp": 2, **SP, **FULL}, "single"),
    ({"tp": 4}, "cut"),
    ({"tp": 4, **SP}, "cut"),
    ({"tp": 4, **SP, **SELECTIVE}, "shared"),
    ({"pp": 2}, "cut"),
    ({"pp": 2, **FULL}, "shared"),
    ({"pp": 2, **OVERLAP}, "single"),
    ({"pp": 4}, "cut"),
    ({"pp": 4, **SELECTIVE}, "whole"),
    ({"tp": 2, "pp": 2}, "cut"),
    ({"tp": 2, "pp": 2, **SP, **FULL}, "single"),
    ({"tp": 2, "pp": 2, **SP}, "shared"),
    # Context parallel, and pipelines whose chunks are interleaved.
    ({"cp": 2}, "cut"),
    ({"cp": 4}, "cut"),
    ({"cp": 2, "tp": 2, **SP, **SELECTIVE}, "cut"),
    ({"cp": 2, "pp": 2, **FULL}, "single"),
    ({"pp": 2, "virtual_pp": 2}, "cut"),
    ({"pp": 2, "virtual_pp": 2, **OVERLAP, **FULL}, "single"),
    ({"pp": 2, "virtual_pp": 2, "tp": 2, **SP}, "cut"),
]
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
# Each with sums over whole responses, which context ranks must make together.
GSPO = {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.03, "importance_level": "sequence"}
LOSSES = (
    config.Loss(aggregation="token_mean", clip_low=0.2, clip_high=0.28, importance_level="sequence", entropy_coef=0.01),
    config.Loss(aggregation="sequence_mean", importance_mode="mask", **GSPO),
    config.Loss(aggregation="constant", clip_dual=1.06, **GSPO),
)


def updates(folder: str, layouts: list[tuple[dict, str]], wrong: str = "", losses=LOSSES, once: bool = True) -> list:
    """Loss, gradient norm and gradients (as Hugging Face's tensors, on the driver) of an optimizer step in each layout,
    one after the other. once: the head computes its logits once where it may, in chunks of a few rows; else twice."""
    out = []
    linear_grpo.WORKSPACE_BYTES["cpu"] = 20 * 91 * 4
    for index, (axes, packing) in enumerate(layouts):
        topo, cfg = connect(**axes), losses[index % len(losses)]
        out.append(one_update(folder, topo, packing, cfg, wrong, loss.is_pointwise(cfg) if once else None))
        topology.disconnect(leave=False)
    return out


def one_update(folder: str, topo, packing: str, cfg: config.Loss, wrong: str, pointwise: bool | None) -> dict:
    policy = make_policy(folder, topo, pointwise=pointwise)
    b = batch_of(topo, aggregation=cfg.aggregation, **PACKINGS[packing])
    over_ranks, capped = functools.partial(collectives.sum_over_context, topology=topo), []
    for m, logprobs in zip(b.microbatches, policy.logprobs(b.microbatches), strict=True):
        if logprobs is not None:
            # Off-policy, so that some tokens are clipped, and some responses' importance weights are capped.
            target_R = m.target_R.float()
            m.old_logprobs_R = logprobs + 0.3 * torch.sin(target_R)
            m.rollout_logprobs_R = m.old_logprobs_R + 0.4 * torch.cos(3 * target_R)
            m.ref_logprobs_R = logprobs + 0.2 * torch.cos(target_R)
            m.importance_R, beyond_R = loss.importance(m, cfg, over_ranks)
            capped += beyond_R.tolist()
        if wrong == "mean of microbatches":
            m.weight_R = torch.full_like(m.weight_R, 1 / (m.weight_R.numel() * len(b.microbatches) * topo.dp))
        if wrong == "tokens of the rank":
            m.weight_R = torch.full_like(
                m.weight_R, 1 / (sum(x.weight_R.numel() for x in b.microbatches) * topo.dp * topo.cp)
            )
    if wrong == "Megatron's default":
        policy.chunks[0].config.calculate_per_token_loss = False
    stats = policy.update(b, functools.partial(loss.grpo, cfg=cfg, over_ranks=over_ranks), lr=1e-3)
    merged = metrics.merge(collectives.gather(stats if topo.reports else {}, topo))
    whole_gradients(policy)
    return {
        "loss": merged["update/loss"].value,
        "norm": merged["update/grad_norm"].value,
        "microbatches": len(b.microbatches),
        "once": policy.linear_grpo is not None,
        "clipped": merged["update/clip_frac"].value,
        "metrics": {name: metric.value for name, metric in merged.items()},
        "capped": sum(capped) / max(len(capped), 1),
        "gradients": {
            name: tensor.clone() for name, tensor in hf_weights.export(policy.chunks, policy.hf_config, topo)
        },
    }


def whole_gradients(policy: Policy) -> None:
    """Puts the reduced gradients, of which each data rank holds a shard, into the place of the weights."""
    for module in policy.modules:
        for buffer in module.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(group.size())
                dist.all_gather(list(shards), shards[group.rank()].clone(), group=group)
    with torch.no_grad():
        for chunk in policy.chunks:
            for p in chunk.parameters():
                p.copy_(p.main_grad)


def test_loss_and_gradient_are_those_of_one_process_in_every_layout_of_4_ranks(model_folders):
    folder = model_folders["qwen2_deep"]
    (alone,) = spawn(updates, 1, folder, [({}, "whole")] * 3, "", LOSSES, False)
    assert alone[0]["microbatches"] == 1
    assert all(0 < seen["clipped"] < 1 and 0 < seen["capped"] < 1 for seen in alone), [
        (seen["clipped"], seen["capped"]) for seen in alone
    ]
    ranks = spawn(updates, 4, folder, LAYOUTS_OF_4, timeout_s=600)
    for index, (layout, driver) in enumerate(zip(LAYOUTS_OF_4, ranks[0], strict=True)):
        expected = alone[index % 3]
        assert driver["microbatches"] > 1 or layout[1] in ("whole", "shared")
        # Sums of the same float32 terms in another order: 1e-5 relative covers some hundred roundings.
        for seen in (rank[index] for rank in ranks):
            assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-7), layout
            assert seen["norm"] == pytest.approx(expected["norm"], rel=1e-5), layout
        assert driver["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (driver["gradients"][name] - gradient).abs().max()
            assert error <= 2e-5 * gradient.abs().max() + 1e-8, (layout, name)


POINTWISE = (
    config.Loss(clip_low=0.2, clip_high=0.28, clip_dual=1.2, kl_coef=0.1, importance_level="token", entropy_coef=0.01),
    config.Loss(policy_loss="cispo", kl_coef=0.1, kl_estimator="k2", aggregation="sequence_mean"),
)


def once_and_twice(folder: str, layouts: list[tuple[dict, str]]) -> list[list[dict]]:
    return [updates(folder, layouts, "", POINTWISE, once) for once in (True, False)]


@pytest.mark.parametrize(
    "folder, layouts",
    [
        ("qwen2_tied", [({}, "cut"), ({"pp": 2}, "single"), ({"tp": 2}, "cut")]),
        ("qwen2_untied", [(OVERLAP, "cut"), ({"cp": 2}, "single"), ({"tp": 2, **SP}, "cut")]),
    ],
)
def test_logits_computed_once_give_the_metrics_and_gradients_of_logits_computed_twice(model_folders, folder, layouts):
    """With and without a place in DDP's buffers, over stages, over the shards of an odd vocabulary, and over
    context ranks of which one may have no token."""
    layouts = [layout for layout in layouts for _ in POINTWISE]
    once, twice = spawn(once_and_twice, 2, model_folders[folder], layouts)[0]
    for layout, one, two in zip(layouts, once, twice, strict=True):
        assert one["once"] and not two["once"] and 0 < one["clipped"] < 1
        assert one["metrics"].keys() == two["metrics"].keys() >= {"update/entropy", "update/ratio", "update/kl_to_ref"}
        for name, value in two["metrics"].items():  # sums in another order
            assert one["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), (layout, name)
        for name, gradient in two["gradients"].items():
            error = (one["gradients"][name] - gradient).abs().max()
            assert error <= 2e-5 * gradient.abs().max() + 1e-8, (layout, name)


def wrong_updates(folder: str) -> dict[str, list[float]]:
    """Gradient norms with a wrong normaliser, in two layouts whose true norms are the same."""
    cases = {
        "": [({}, "whole"), ({"cp": 2}, "cut")],
        "mean of microbatches": [({}, "whole"), ({}, "cut")],
        "tokens of the rank": [({}, "cut"), ({"cp": 2}, "cut")],
        "Megatron's default": [({}, "whole"), ({}, "cut")],
    }
    return {
        wrong: [updates(folder, [layout], wrong, once=not wrong)[0]["norm"] for layout in layouts]
        for wrong, layouts in cases.items()
    }


def test_the_tempting_normalisers_depend_on_the_layout(model_folders):
    norms = spawn(wrong_updates, 2, model_folders["qwen2_untied"])[0]
    first, second = norms.pop("")
    assert first == pytest.approx(second, rel=1e-5)
    for wrong, (first, second) in norms.items():
        assert abs(first / second - 1) > 1e-3, wrong  # 100 times the bound of the right one


def masked_update(folder: str) -> list[dict]:
    """An optimizer step on 3 groups, and on these and a masked one, whose responses alone fill some microbatches."""
    out = []
    drawn, advantages = groups()
    masked = [Group(Prompt(9, "", "", drawn[3].prompt.token_ids, masked=True), drawn[3].responses)]
    # Of the 16 responses of the second, each is a microbatch.
    for some, num_microbatches in ((drawn[:3], 1), (drawn[:3] + masked, 16)):
        topo = connect()
        policy = make_policy(folder, topo)
        multiple = -(-num_microbatches // topo.dp)
        packing = batch.Packing(max_tokens=64, dp=topo.dp, dp_rank=topo.dp_rank, microbatch_multiple=multiple)
        (b,) = assemble(
            some,
            advantages[: len(some)],
            global_batch_size=4 * len(some),
            aggregation="token_mean",
            max_response_tokens=24,
            packing=packing,
        )
        stats = metrics.merge(collectives.gather(on_policy_update(policy, b), topo))
        empty = sum(m.target_R.numel() == 0 for m in b.microbatches)
        out.append({"empty": empty, **{name: metric.value for name, metric in stats.items()}})
        topology.disconnect(leave=False)
    return out


def test_masked_prompts_change_neither_loss_nor_gradient_nor_statistics(model_folders):
    ranks = spawn(masked_update, 2, model_folders["qwen2_untied"])
    without, with_masked = ranks[0]
    assert sum(rank[1].pop("empty") for rank in ranks) == 4 and without.pop("empty") == 0
    assert with_masked == pytest.approx(without, rel=1e-5, abs=1e-7)  # sums in another order
    assert without["update/grad_norm"] > 0.1


@pytest.fixture
def alone():
    """A topology of this one process."""
    yield connect()
    topology.disconnect()


def test_given_tokens_that_no_sampled_one_attends_to_change_nothing_and_others_do(model_folders, alone):
    def update_with(middle: int, last: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """One of a response with a given token between its turns, and one behind the last of them."""
        policy = make_policy(model_folders["qwen2_tied"], alone)
        several = Response((4, 5, middle, 6, 7, last), (-1.0,) * 4, False, given=((2, 3), (5, 6)))
        one = Response((8, 9), (-1.0,) * 2, False)
        (b,) = assemble(
            [Group(Prompt(0, "", "", (1, 2, 3)), (several, one))],
            torch.tensor([[1.0, -0.5]]),
            global_batch_size=2,
            aggregation="token_mean",
            max_response_tokens=8,
            packing=batch.Packing(max_tokens=32),
        )
        stats = on_policy_update(policy, b)
        gradients = {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}
        return {name: metric.value for name, metric in stats.items()}, gradients

    (stats, gradients), (same, equal), (other, unequal) = update_with(10, 11), update_with(10, 60), update_with(20, 11)
    assert same == stats and all(torch.equal(gradients[name], equal[name]) for name in gradients)
    assert other["update/loss"] != stats["update/loss"] or other["update/grad_norm"] != stats["update/grad_norm"]
    assert any(not torch.equal(gradients[name], unequal[name]) for name in gradients)


@pytest.mark.parametrize("rows", [7, 10_000])  # of which the head has the logits at once
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pointwise", [None, True])
def test_on_policy_the_ratio_is_one_and_nothing_is_clipped_and_kl_is_zero(
    model_folders, alone, monkeypatch, pointwise, dtype, rows
):
    monkeypatch.setitem(linear_grpo.WORKSPACE_BYTES, "cpu", rows * 91 * 4)
    policy = make_policy(model_folders["qwen2_tied"], alone, dtype=dtype, pointwise=pointwise)
    stats = on_policy_update(policy, batch_of(alone, max_tokens=60), kl_coef=0.1)
    # Exactly: one code path computes old, ref and current.
    assert stats["update/ratio"].value == 1.0
    assert stats["update/clip_frac"].value == 0.0
    assert stats["update/kl_to_ref"].value == 0.0


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_scoring_fills_in_what_the_loss_needs_before_the_first_update(model_folders, alone, level):
    cfg = config.Config(
        model="", run_dir="", num_steps=1, data=config.Data(""), loss=config.Loss(importance_level=level)
    )
    run = types.SimpleNamespace(
        cfg=cfg,
        policy=make_policy(model_folders["qwen2_tied"], alone),
        reference=None,
        over_ranks=functools.partial(collectives.sum_over_context, topology=alone),
    )
    b = batch_of(alone, max_tokens=60)
    row = trainer.score(run, [b])
    for m in b.microbatches:
        # The engine's log-probs are -1 a token, so its sums are minus a response's length.
        log_weight = m.old_logprobs_R + 1
        if level == "sequence":
            log_weight = torch.stack([log_weight[m.sequence_R == s].sum() for s in m.sequence_R])
        if level == "none":
            assert m.importance_R is None
        else:
            torch.testing.assert_close(
                m.importance_R, log_weight.clamp(min=-20).exp().clamp(max=2), rtol=1e-5, atol=1e-8
            )
    assert ("importance/weight_mean" in row) == (level != "none")


def test_an_update_makes_rewarded_responses_more_likely(model_folders, alone):
    policy = make_policy(model_folders["qwen2_tied"], alone)
    b = batch_of(alone, max_tokens=10_000)
    (m,) = b.microbatches
    for _ in range(5):
        (before,) = policy.logprobs([m])
        m.old_logprobs_R = before
        policy.update(b, functools.partial(loss.grpo, cfg=config.Loss()), lr=1e-3)
        (after,) = policy.logprobs([m])
        assert ((after - before) * m.advantage_R * m.weight_R).sum() > 0


def decays(policy: Policy) -> dict[int, float]:
    """Weight decay by the number of a parameter's dimensions."""
    (inner,) = policy.optimizer.chained_optimizers
    return {
        parameter.dim(): policy.optimizer.param_groups[inner.model_param_group_index_map[parameter][0]]["weight_decay"]
        for parameter in policy.chunks[0].parameters()
    }


def test_all_weights_are_decayed_or_all_but_norms_and_biases(model_folders, alone):
    lr, decay, changed = 0.01, 0.5, {}
    for what in ("all", "matrices"):
        policy = make_policy(
            model_folders["qwen2_tied"], alone, optimizer=config.Optimizer(weight_decay=decay, decay=what)
        )
        assert decays(policy) == {1: decay if what == "all" else 0.0, 2: decay}
        before = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
        on_policy_update(policy, batch_of(alone, max_tokens=100), lr=lr)
        changed[what] = {name: p.detach() - before[name] for name, p in policy.chunks[0].named_parameters()}
    for name, weight in before.items():
        expected = -lr * decay * weight if weight.dim() == 1 else torch.zeros_like(weight)
        torch.testing.assert_close(changed["all"][name] - changed["matrices"][name], expected, rtol=1e-4, atol=1e-6)
    assert changed["all"]["decoder.final_layernorm.weight"].abs().min() > 0


def test_bfloat16_stays_within_its_error_of_float32(model_folders, alone):
    b = batch_of(alone, max_tokens=60)
    exact = torch.cat(make_policy(model_folders["qwen2_tied"], alone).logprobs(b.microbatches))
    coarse = make_policy(model_folders["qwen2_tied"], alone, dtype="bfloat16")
    # 8 bits of mantissa over 2 layers with logits of a few units
    assert (torch.cat(coarse.logprobs(b.microbatches)) - exact).abs().mean() < 0.1
    assert on_policy_update(coarse, b)["update/ratio"].value == 1.0


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(model_folders, alone):
    policy = make_policy(model_folders["qwen2_tied"], alone)
    b = batch_of(alone, max_tokens=60)
    b.microbatches[0].advantage_R[0] = float("nan")
    before = [p.clone() for p in policy.chunks[0].parameters()]
    with pytest.raises(FloatingPointError, match="not finite"):
        on_policy_update(policy, b)
    assert all(torch.equal(p, q) for p, q in zip(policy.chunks[0].parameters(), before, strict=True))


def test_what_leaves_the_gpu_between_steps_comes_back_as_it_was(model_folders):
    """On a CPU the storage of the gradients is really given back; the optimizer's is where it should go already."""

    def weights(parts: list[str]) -> list[torch.Tensor]:
        topo = connect()
        policy = make_policy(model_folders["qwen2_tied"], topo, dtype="bfloat16")
        for seed in range(2):
            on_policy_update(policy, batch_of(topo, max_tokens=100, seed=seed), lr=1e-2)
            policy.offload(parts)
            sizes = [buffer.grad_data.untyped_storage().size() for m in policy.modules for buffer in m.buffers]
            assert all(size == 0 for size in sizes) == ("gradients" in parts)
            policy.onload(parts)
        out = [p.detach().clone() for p in policy.chunks[0].parameters()]
        topology.disconnect()
        return out

    assert all(map(torch.equal, weights([]), weights(["gradients", "optimizer"])))


def test_learning_rate_warms_up_and_decays():
    cfg = config.Optimizer(lr=1.0, lr_schedule="constant", warmup_steps=10, warmup_start_frac=0.1)
    # 0.1 + 0.9 * step / 10
    assert [learning_rate(cfg, s, 100) for s in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    cfg = config.Optimizer(lr=1.0, lr_schedule="linear")
    assert [learning_rate(cfg, s, 100) for s in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.01])


def test_a_microbatch_of_one_response_token_scores(model_folders, alone):
    policy = make_policy(model_folders["qwen2_tied"], alone)
    s = batch.Sample(Prompt(0, "", "", (5,)), Response((7,), (0.0,), False), 1.0)
    m = batch.microbatch([s], [1.0])
    (ours,) = policy.logprobs([m])
    (oracle,) = hf_logprobs(model_folders["qwen2_tied"], GlobalBatch([m]))
    assert ours.item() == pytest.approx(oracle.item(), abs=1e-5)


@pytest.mark.parametrize("kind", [FrozenPolicy, Policy])
def test_the_kernel_that_scores_is_the_one_asked_for(model_folders, alone, kind):
    extra = {"optimizer": config.Optimizer()} if kind is Policy else {}
    policy = kind(
        model_folders["qwen2_tied"],
        alone,
        precision=config.Precision(params="float32"),
        temperature=1.0,
        kernels=config.Kernels("triton"),
        **extra,
    )
    with pytest.raises(ValueError, match="linear_logprob: impl = 'triton' cannot run: "):  # here
        policy.logprobs(batch_of(alone, max_tokens=90).microbatches)


@pytest.mark.gpu
def test_transformer_engine_layers_score_as_hugging_face_does(model_folders):
    topo = topology.connect(config.Parallel(), device=torch.device("cuda", 0), timeout_s=60, seed=1)
    b = batch_of(topo, max_tokens=60)
    policy = make_policy(model_folders["qwen2_untied"], topo, dtype="bfloat16")
    ours, oracle = torch.cat(policy.logprobs(b.microbatches)), torch.cat(hf_logprobs(model_folders["qwen2_untied"], b))
    assert (ours - oracle).abs().mean() < 0.1
    topology.disconnect()
