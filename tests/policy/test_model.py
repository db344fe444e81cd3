"""From the configuration's parallel and precision sections to Megatron's, and the rules between them and a model.

Not covered here: what the model computes (test_policy.py). Running FP8 is marked gpu.
"""

import dataclasses

import pytest
import torch
import transformers as tf
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.enums import AttnBackend

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError, Parallel, Precision
from grpo_mcore.parallel import topology
from grpo_mcore.policy import model
from grpo_mcore.policy.policy import Policy
from tests.policy.test_policy import batch_of, hf_logprobs, on_policy_update

# DeepSeek-R1-Distill-Qwen-1.5B
DISTILL = tf.Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
)


def translated(precision: Precision = Precision(), **axes):
    # Of the GPU only what fuses differs.
    return model.transformer_config(DISTILL, parallel=Parallel(**axes), precision=precision, cuda=False)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("delayed", Fp8Recipe.delayed), ("tensorwise", Fp8Recipe.tensorwise), ("blockwise", Fp8Recipe.blockwise)],
)
def test_an_fp8_recipe_is_megatrons(recipe, expected):
    config = translated(Precision(fp8=recipe, fp8_format="e4m3", fp8_amax_history=16))
    assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len, config.bf16) == ("e4m3", expected, 16, True)
    # Weights stay in bfloat16: what is exported and saved.
    assert not config.first_last_layers_bf16 and not config.fp8_param


def test_layers_at_both_ends_may_stay_in_bfloat16():
    config = translated(Precision(fp8="blockwise", fp8_first_layers_bf16=2, fp8_last_layers_bf16=3))
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (
        True,
        2,
        3,
    )
    assert not translated(Precision(fp8="blockwise")).first_last_layers_bf16


def test_without_fp8_there_is_none():
    assert translated().fp8 is None
    float32 = translated(Precision(params="float32"))
    assert float32.params_dtype == torch.float32 and not float32.bf16


def test_every_axis_and_recomputation_reach_megatrons_configuration():
    config = translated(
        tp=2, pp=2, virtual_pp=7, cp=4, sequence_parallel=True, recompute="full", recompute_num_layers=2
    )
    assert (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
    ) == (2, 2, 7)
    assert (config.context_parallel_size, config.sequence_parallel) == (4, True)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full",
        "uniform",
        2,
    )
    config = translated(recompute="selective", recompute_modules=("mlp",))
    assert (config.recompute_granularity, config.recompute_modules, config.virtual_pipeline_model_parallel_size) == (
        "selective",
        ["mlp"],
        None,
    )
    assert translated().recompute_granularity is None


@pytest.mark.parametrize(
    ("parallel", "precision", "message"),
    [
        (
            Parallel(tp=4),
            Precision(),
            "parallel.tp = 4: must divide the model's 2 key-value heads. "
            "Remedy: use one of 1, 2, and parallel.pp, parallel.cp or data parallel for the other ranks.",
        ),
        (
            Parallel(pp=3),
            Precision(),
            "parallel.pp = 3: must divide the model's 28 layers. Remedy: use one of 1, 2, 4, 7, 14, 28.",
        ),
        (
            Parallel(pp=4, virtual_pp=2),
            Precision(),
            "parallel.virtual_pp = 2: must divide the 7 layers of a stage. Remedy: use one of 1, 7.",
        ),
        (
            Parallel(pp=4, recompute="full", recompute_num_layers=8),
            Precision(),
            "parallel.recompute_num_layers = 8: must be at most the 7 layers of a model chunk. Remedy: lower it.",
        ),
        (
            Parallel(pp=14),
            Precision(fp8="tensorwise", fp8_first_layers_bf16=3),
            "precision.fp8_first_layers_bf16 or fp8_last_layers_bf16 = 3: must be at most the 2 layers of a "
            "pipeline stage. Remedy: lower it.",
        ),
    ],
)
def test_rules_between_the_axes_and_the_model_name_a_remedy(parallel, precision, message):
    with pytest.raises(InputError) as e:
        model.check_parallel(DISTILL, parallel, precision)
    assert str(e.value) == message


def test_a_deterministic_run_on_a_gpu_takes_flash_attention_and_without_it_short_sequences(monkeypatch):
    long = config.Config(model="m", run_dir="r", num_steps=1, data=config.Data(train="t"), deterministic=True)
    short = dataclasses.replace(long, rollout=config.Rollout(max_total_tokens=1024))
    gpu, bfloat16 = torch.device("cuda"), Precision()
    monkeypatch.setattr(model, "has_flash_attention", lambda: False)
    model.check_attention(short, gpu)
    model.check_attention(long, torch.device("cpu"))
    model.check_attention(dataclasses.replace(long, deterministic=False), gpu)
    with pytest.raises(InputError, match="needs flash-attn on a GPU for sequences of more than 1024 tokens, here 8192"):
        model.check_attention(long, gpu)
    assert model._attention_backend(bfloat16, cuda=True) == AttnBackend.auto
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert model._attention_backend(bfloat16, cuda=True) == AttnBackend.unfused
    assert model._attention_backend(bfloat16, cuda=False) == AttnBackend.auto
    monkeypatch.setattr(model, "has_flash_attention", lambda: True)
    assert model._attention_backend(bfloat16, cuda=True) == AttnBackend.flash
    model.check_attention(long, gpu)


def test_flash_attention_is_there_if_one_of_its_packages_is(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not model.has_flash_attention()
    (tmp_path / "flash_attn_3-3.0.0.dist-info").mkdir()
    (tmp_path / "flash_attn_3-3.0.0.dist-info/METADATA").write_text("Name: flash-attn-3\nVersion: 3.0.0\n")
    assert model.has_flash_attention()


def test_fp8_wants_dimensions_that_its_matrix_products_take():
    # (4 + 2 * 2 heads) * 20 = 160 columns, over tp 2: 80 = 5 * 16; 40 FFN columns are none
    odd = tf.Qwen2Config(
        hidden_size=80, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    model.check_parallel(odd, Parallel(), Precision(fp8="tensorwise"))
    with pytest.raises(InputError, match="needs a FFN columns of a tp rank that is a multiple of 16, and it is 40"):
        model.check_parallel(odd, Parallel(tp=2), Precision(fp8="tensorwise"))


@pytest.mark.parametrize(
    ("parallel", "precision", "expected"),
    [
        (Parallel(), Precision(), 1),
        (Parallel(tp=2), Precision(), 1),
        (Parallel(tp=2, sequence_parallel=True), Precision(), 2),
        (Parallel(), Precision(fp8="tensorwise"), 16),
        # each tp rank's part is a multiple of 16
        (Parallel(tp=2, sequence_parallel=True), Precision(fp8="tensorwise"), 32),
    ],
)
def test_packed_tokens_are_aligned_to_what_splits_and_multiplies_them(parallel, precision, expected):
    assert config.packed_alignment(parallel, precision) == expected


def test_costs_are_in_units_of_a_tokens_layers():
    # A layer of the 1.5B model multiplies 1536 * (2 * 1536 + 2 * 256 + 3 * 8960) = 46,792,704 numbers a token, the head
    # 151936 * 1536.
    cost = model.cost_of(DISTILL)
    assert cost.head == pytest.approx(151936 * 1536 / (28 * 46_792_704))
    # Causal attention over L tokens: L^2 / 2 scores of 1536 multiplications, twice.
    assert cost.quadratic == pytest.approx(1536 / 46_792_704)


@pytest.mark.parametrize(
    ("layers", "parallel", "stages"),
    [
        (4, Parallel(pp=2), [0, 0, 1, 1]),
        (4, Parallel(pp=2, virtual_pp=2), [0, 1, 0, 1]),
        # Megatron's own example, of 16 layers on 4 stages, halved
        (8, Parallel(pp=2, virtual_pp=2), [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_layers_go_round_the_stages_in_chunks(layers, parallel, stages):
    hf_config = tf.Qwen2Config(num_hidden_layers=layers)
    assert [model.stage_of(hf_config, layer, parallel) for layer in range(layers)] == stages


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_layers_score_near_bfloat16_and_learn(model_folders, recipe):
    topo = topology.connect(Parallel(), device=torch.device("cuda", 0), timeout_s=60, seed=1)
    precision = Precision(fp8=recipe)
    folder = model_folders["qwen3"]
    policy = Policy(folder, topo, precision=precision, temperature=0.7, optimizer=config.Optimizer(lr=1e-3))
    b = batch_of(topo, max_tokens=64, precision=precision)
    scores = policy.logprobs(b.microbatches)
    # 3 bits of mantissa over 2 layers with logits of a few units
    assert (torch.cat(scores) - torch.cat(hf_logprobs(folder, b))).abs().mean() < 0.5
    assert 0 < on_policy_update(policy, b)["update/grad_norm"].value < float("inf")
    topology.disconnect()


@pytest.mark.gpu
def test_the_second_updates_gradients_in_blockwise_fp8_do_not_depend_on_what_is_computed_again(model_folders):
    """The first update changes the weights much: a product computed again with an FP8 copy from before would show."""
    seen = {}
    for recompute in ("none", "selective"):
        topo = topology.connect(
            Parallel(recompute=recompute, recompute_modules=("mlp",)),
            device=torch.device("cuda", 0),
            timeout_s=60,
            seed=1,
        )
        precision = Precision(fp8="blockwise")
        # Such an eps keeps the rounding of a gradient near 0 from choosing the sign of its weight's whole change.
        optimizer = config.Optimizer(eps=1.0, clip_grad=0.0)
        policy = Policy(model_folders["qwen3"], topo, precision=precision, temperature=0.7, optimizer=optimizer)
        b = batch_of(topo, max_tokens=64, precision=precision)
        seen[recompute] = []
        for _ in range(2):
            on_policy_update(policy, b, lr=0.1)
            seen[recompute].append({name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()})
        topology.disconnect()
    first, second = seen["none"]
    for name in first:
        assert (second[name] - first[name]).norm() > 0.5 * first[name].norm(), name
        # Attention's backward pass may add in another order.
        for expected, found in zip(seen["none"], seen["selective"], strict=True):
            assert (found[name] - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-8, name
