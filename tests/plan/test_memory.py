"""The planner: numbers worked by hand, and weights, gradients and optimizer against what Megatron allocates on a CPU.

Not covered here: that GPUs agree. Activations are compared with a CPU where all are computed again; the fused layers of
Transformer Engine keep others than a CPU's.
"""

import functools
import gc
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers as tf

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError, Parallel
from grpo_mcore.config.file import load
from grpo_mcore.loss import batch
from grpo_mcore.parallel import topology
from grpo_mcore.plan import memory, time as plan_time
from grpo_mcore.plan.memory import Case, Machine
from grpo_mcore.policy import model
from grpo_mcore.policy.policy import Policy
from grpo_mcore.types import Prompt, Response
from tests import models
from tests.dist import ROOT, spawn
from tests.launch.test_launch import launch

CONFIGS = ROOT / "configs"
PRESETS = sorted(CONFIGS.rglob("deepscaler_*.yaml"))
NODE = Machine("h100-80gb", 8)


def preset(name: str, *overrides: str) -> config.Config:
    return load(CONFIGS / f"{name}.yaml", overrides)


def case(name: str, *overrides: str, machine: Machine = NODE) -> Case:
    cfg = preset(name, *overrides)
    return Case(cfg, memory.hf_config_of(cfg), machine)


def test_the_parameters_of_the_recipes_model():
    """28 layers, hidden 1536, FFN 8960, 12 heads of 128, 2 KV heads, vocabulary 151936, not tied."""
    hf = model.load_hf_config(str(CONFIGS / "benchmarks/1.5b"))
    # Layer: q 1536 x 1536 + 1536, k and v 256 x 1536 + 256 each, o 1536 x 1536, MLP 3 x 8960 x 1536, two norms of 1536.
    layer = 1536 * 1536 + 1536 + 2 * (256 * 1536 + 256) + 1536 * 1536 + 3 * 8960 * 1536 + 2 * 1536
    assert layer == 46_797_824
    assert memory.num_parameters(hf) == 2 * 151936 * 1536 + 28 * layer + 1536 == 1_777_088_000
    # tp 2: half of all but norms; 151936 is even
    assert memory.num_parameters(hf, Parallel(tp=2)) == 151936 * 1536 + 28 * ((layer - 2 * 1536) // 2 + 2 * 1536) + 1536
    # pp 2: 14 layers with the embedding, or with the head and its norm
    stages = [memory.num_parameters(hf, Parallel(pp=2), stage) - 151936 * 1536 - 14 * layer for stage in (0, 1)]
    assert stages == [0, 1536]
    assert memory.kv_bytes_per_token(hf, config.Engine(dtype="bfloat16")) == 28672


@pytest.mark.parametrize("folder", ["1.5b", "smollm2-135m", "tiny"])
def test_parameters_are_those_of_hugging_faces_model(folder):
    with torch.device("meta"):
        hf_model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(CONFIGS / "benchmarks" / folder))
    planned = memory.num_parameters(model.load_hf_config(str(CONFIGS / "benchmarks" / folder)))
    assert planned == sum(p.numel() for p in hf_model.parameters())


connect = functools.partial(topology.connect, device=torch.device("cpu"), timeout_s=60, seed=1)
untrained = functools.partial(Policy, temperature=1.0, optimizer=config.Optimizer(), load_weights=False)


def live_bytes() -> int:
    """Of all tensors' memory."""
    gc.collect()
    return storage_bytes(x for x in gc.get_objects() if torch.is_tensor(x))


def storage_bytes(tensors) -> int:
    """Each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def allocated(folder: str, layouts: list[tuple[dict, str]]) -> list[int]:
    """What a policy adds, after an optimizer step, in each layout."""
    out = []
    for axes, params in layouts:
        topo = connect(Parallel(**axes))
        before = live_bytes()
        policy = untrained(folder, topo, precision=config.Precision(params=params))
        for module in policy.modules:
            for buffer in module.buffers:
                buffer.grad_data.fill_(1.0)
        policy.optimizer.step()
        out.append(live_bytes() - before)
        del policy, module, buffer
        topology.disconnect(leave=False)
    return out


LAYOUTS = [({}, "bfloat16"), ({}, "float32"), ({"tp": 2}, "bfloat16"), ({"pp": 2}, "bfloat16"), ({"cp": 2}, "bfloat16")]


@pytest.mark.parametrize("kind, layouts", [("qwen2_untied", LAYOUTS), ("qwen2_tied", [({"pp": 2}, "bfloat16")])])
def test_weights_gradients_and_optimizer_are_what_megatron_allocates(tmp_path, kind, layouts):
    _, config_class, extra = models.KINDS[kind]
    hf_config = config_class(**{**models._SIZES, **extra, "vocab_size": 1001, "hidden_size": 256})
    hf_config.save_pretrained(tmp_path)
    ranks = spawn(allocated, 2, str(tmp_path), layouts)
    base = preset("deepscaler_8k", "engine.num_engines=1")
    for index, (axes, params) in enumerate(layouts):
        cfg = replace(base, parallel=Parallel(**axes), precision=config.Precision(params=params))
        for rank, seen in enumerate(ranks):
            stage = rank if cfg.parallel.pp > 1 else 0
            planned = sum(memory.state_bytes(Case(cfg, hf_config, Machine("h100-80gb", 2)), stage).values())
            # Megatron pads buckets and shards so that ranks share them evenly, some hundred bytes; RoPE's tables are no
            # weights.
            assert seen[index] == pytest.approx(planned, rel=5e-3), (axes, params)


def kept_bytes(folder: str, num_layers: int, tokens: int) -> int:
    """What a forward pass of one sequence keeps for its backward, weights apart, if all layers are computed again,
    `num_layers` at a time."""
    topo = connect(Parallel(recompute="full", recompute_num_layers=num_layers))
    policy = untrained(folder, topo, precision=config.Precision())
    weights = {buffer.param_data.untyped_storage().data_ptr() for module in policy.modules for buffer in module.buffers}
    weights |= {p.untyped_storage().data_ptr() for p in policy.chunks[0].parameters()}
    response = Response((2,) * (tokens - 8), (-1.0,) * (tokens - 8), False, 0)
    packed = batch.microbatch([batch.Sample(Prompt(0, "", "", (1,) * 8), response, 1.0)], [1.0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        policy._score(policy.modules[0], packed, 1.0)
    topology.disconnect(leave=False)
    return storage_bytes(x for x in kept if x.untyped_storage().data_ptr() not in weights)


def test_with_full_recomputation_a_layer_keeps_its_input_alone(tmp_path):
    hf_config = tf.Qwen2Config(**{**models._SIZES, "num_hidden_layers": 6, "max_position_embeddings": 2048})
    hf_config.save_pretrained(tmp_path)
    tokens, base = 1024, preset("deepscaler_8k", "batch.max_tokens_per_microbatch=8192")
    planned, seen = [], []
    for num_layers in (1, 2, 3):
        again = Parallel(recompute="full", recompute_num_layers=num_layers)
        sizes = replace(base.batch, max_tokens_per_microbatch=tokens)
        alone = Case(replace(base, parallel=again, batch=sizes), hf_config, NODE)
        planned.append(memory.activation_bytes(alone, 0)["activations kept"] / memory.ALLOCATOR_SLACK)
        seen.append(kept_bytes(str(tmp_path), num_layers, tokens))
    assert planned[0] == tokens * 6 * 2 * 128  # 6 inputs of 128 bfloat16
    assert [a - b for a, b in pairwise(seen)] == [a - b for a, b in pairwise(planned)]
    # What remains, the last norm and the head, is within the head's part.
    assert 0 <= seen[0] - planned[0] <= memory.head_bytes(alone)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["kernels.linear_grpo=false"], 512 << 20),
        (["kernels.linear_grpo=false", "kernels.workspace_bytes=1000000000"], 1e9),
        (["loss.policy_loss=gspo"], 512 << 20),
        # 500 rows of 151936 x 6 bytes
        (["kernels.workspace_bytes=456000000"], 500 * 151936 * 6),
        # All of the float32 logits' rows, and blocks of 16384 columns, float32 and bfloat16.
        (["kernels.linear_logprob=reference", "kernels.workspace_bytes=607744000"], 1000 * (151936 * 4 + 16384 * 6)),
        (["kernels.linear_logprob=reference", "kernels.linear_grpo=false"], 8192 * 2048 * 10),
        # The weight's gradient, which overlap wants for itself: in bfloat16, and once as a float32 sum too.
        (["kernels.linear_grpo=false", "parallel.overlap_grad_reduce=true"], (512 << 20) + 2 * 151936 * 1536),
        (["parallel.overlap_grad_reduce=true"], 2061 * 151936 * 6 + 6 * 151936 * 1536),
    ],
    ids=str,
)
def test_the_heads_workspace_is_counted_as_it_is_configured(overrides, expected):
    head = memory.head_bytes(case("deepscaler_8k", "batch.max_tokens_per_microbatch=8192", *overrides))
    assert head - 8192 * 1536 * (3 * 2 + 2 + 4) == pytest.approx(expected)


def test_the_memory_of_the_8k_stage_worked_by_hand():
    overrides = ("batch.max_tokens_per_microbatch=8192", "parallel.recompute=none")
    phases = memory.needed(case("deepscaler_8k", *overrides)).phases
    update, rollout = phases["update"], phases["rollout"]
    # 1.777 B parameters: bfloat16 weights 3.55 GB, float32 gradients 7.11, main weights and two moments 21.33 over 8
    # ranks.
    state = ("weights", "gradients (float32)", "optimizer, sharded (float32)")
    assert [round(update[name] / 1e9, 2) for name in state] == [3.55, 7.11, 2.67]
    # Per token and layer, in bfloat16 numbers: norm 2 x 1536, qkv 2 x 2048, attention 1536, norm 2 x 1536, MLP 3 x
    # 8960; 12 float32 sums.
    layer = 2 * (2 * 1536 + 2 * 2048 + 1536 + 2 * 1536 + 3 * 8960) + 12 * 4
    assert layer == 77_360
    assert update["activations kept"] == pytest.approx(1.1 * 8192 * 28 * layer)
    assert update["backward of a layer"] == pytest.approx(1.1 * 8192 * layer)
    # Never [8192, 151936] logits, 4.98 GB in float32: rows of 1536 (three times bfloat16, a gradient in both), and of
    # 1.75 GiB as many logits of 4 bytes, and gradients of 2, as they hold: of 2,061 rows. No gradient of the weight.
    assert update["head"] == pytest.approx(1.1 * (8192 * 1536 * (3 * 2 + 2 + 4) + 2061 * 151936 * 6))
    assert "reference policy" not in update
    assert "reference policy" in memory.needed(case("original/deepscaler_8k")).phases["update"]
    # 8192 tokens of prompts: three rows of 1536, gate, up and their product of 8960, in bfloat16.
    prefill = 8192 * 2 * 3 * (1536 + 8960) / 1e9
    assert rollout["engine: activations of prompts"] / 1e9 == pytest.approx(prefill)
    # Half of 79.1 GiB, without weights of 3.55 GB, that, and 3 GiB.
    left = 0.5 * 79.1 * 1.073741824 - 3.554176 - prefill - 3 * 1.073741824
    assert rollout["engine: KV cache"] / 1e9 == pytest.approx(left)


def test_an_engine_needs_room_for_one_longest_sequence_within_its_share_to_start():
    m = memory.needed(case("deepscaler_8k"))
    # 2 x 28 layers x 2 key-value heads x 128, in bfloat16, for each of 8192 tokens.
    assert m.phases["start"]["engine: KV cache"] == 8192 * 2 * 28 * 2 * 128 * 2
    assert "weights" not in m.phases["start"], "there is no policy yet"
    assert m.limit("start") == m.capacity_bytes / 2 and m.limit("update") == m.capacity_bytes
    little = memory.needed(case("deepscaler_8k", "engine.gpu_memory_frac=0.05"))
    assert not little.fits and little.fullest == "start"
    # A cache of a given size is taken beyond any share.
    given = memory.needed(case("deepscaler_8k", "engine.kv_cache_bytes=1000000000"))
    assert given.limit("start") == given.capacity_bytes and given.fits


def test_layouts_divide_what_they_divide():
    def kept(*overrides: str, stage: int = 0) -> float:
        layout = case("deepscaler_8k", "parallel.recompute=none", *overrides)
        return memory.activation_bytes(layout, stage)["activations kept"]

    whole = kept()
    assert kept("parallel.tp=2", "parallel.sequence_parallel=true") == pytest.approx(whole / 2)
    # Without sequence parallelism the norms' 4 x 1536 numbers of a token stay whole.
    assert kept("parallel.tp=2") == pytest.approx(whole / 2 + 1.1 * 16384 * 28 * 2 * 4 * 1536 / 2)
    # Two stages of half the layers: the first holds two microbatches, the second one. Interleaved, half a stage more.
    assert [kept("parallel.pp=2", stage=stage) for stage in (0, 1)] == pytest.approx([whole, whole / 2])
    assert kept("parallel.pp=2", "parallel.virtual_pp=2") == pytest.approx(1.25 * whole)
    cp, dp = (memory.state_bytes(case("deepscaler_8k", f"parallel.cp={n}")) for n in (2, 1))
    assert cp == dp  # the optimizer is sharded over dp x cp, the weights over neither


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_presets_fit_the_machine_they_are_for(path):
    cfg = load(path)
    machine = Machine("a100-40gb" if "a100_40gb" in path.stem else "h100-80gb", 16 if "2nodes" in path.stem else 8)
    assert memory.check(Case(cfg, memory.hf_config_of(cfg), machine)).fits


@pytest.mark.parametrize("name", ["deepscaler_8k", "deepscaler_16k", "deepscaler_24k"])
def test_the_recipe_runs_on_80_gb_of_the_older_kind_as_it_is(name):
    assert memory.check(case(name, machine=Machine("a100-80gb", 8))).fits


REFUSED = [
    ("deepscaler_8k", ("parallel.recompute=none",), Machine("a100-40gb", 8)),
    ("deepscaler_24k", ("parallel.recompute=none",), Machine("a100-40gb", 8)),
    ("deepscaler_8k", ("engine.kv_cache_bytes=79000000000",), NODE),
]


@pytest.mark.parametrize("name, overrides, machine", REFUSED)
def test_what_does_not_fit_is_refused_with_the_fewest_keys_that_do(name, overrides, machine):
    with pytest.raises(InputError) as e:
        memory.check(case(name, *overrides, machine=machine))
    message = str(e.value)
    change = message.split("Remedy: ")[1].split(" makes ")[0].split()
    assert memory.check(case(name, *overrides, *change, machine=machine)).fits
    assert len(change) == 1  # one key does, and so no more are named
    assert f"{machine.num_gpus} x {machine.name}" in message and "GB" in message


def test_two_keys_are_named_where_one_does_not_do():
    overrides = ("parallel.recompute=none", "engine.kv_cache_bytes=80000000000")
    full = case("deepscaler_24k", *overrides, machine=Machine("a100-40gb", 8))
    change = memory.smallest_change(full)
    assert len(change) == 2 and change["engine.kv_cache_bytes"] is None
    for name, value in change.items():
        assert not memory.needed(full.changed({name: value})).fits


def test_where_nothing_helps_a_larger_gpu_is_named():
    cfg, small = preset("deepscaler_8k"), Machine("a100-40gb", 8)
    one_kv_head = dict(vocab_size=152064, num_key_value_heads=1, max_position_embeddings=32768)
    width = dict(hidden_size=5120, intermediate_size=27648, num_attention_heads=40)
    large = tf.Qwen2Config(num_hidden_layers=64, **width, **one_kv_head)
    words = "no change of recomputation, microbatch and axes does; take a smaller model or shorter sequences"
    with pytest.raises(InputError, match=words):
        memory.check(Case(cfg, large, small))
    width = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28)
    seven = tf.Qwen2Config(num_hidden_layers=29, **width, **one_kv_head)
    with pytest.raises(InputError, match="take .*h200-141gb"):
        memory.check(Case(replace(cfg, parallel=Parallel(recompute="full")), seven, small))


@pytest.mark.parametrize(
    "overrides, machine, message",
    [
        (
            ["precision.fp8=blockwise"],
            Machine("a100-80gb", 8),
            "precision.fp8 = 'blockwise': needs FP8 matrix products, which a100-80gb has not",
        ),
        (["engine.num_engines=9"], NODE, "engine.num_engines = 9: takes 9 of 8 GPUs. Remedy: lower it."),
        (
            [],
            Machine("h100-80gb", 11),
            "batch.global_batch_size = 64: must be a multiple of the 11 data-parallel ranks",
        ),
        (["parallel.tp=4"], NODE, "parallel.tp = 4: must divide the model's 2 key-value heads"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(overrides, machine, message):
    with pytest.raises(InputError) as e:
        case("deepscaler_8k", *overrides, machine=machine)
    assert str(e.value).startswith(message)


def with_engine(on: Case, **keys) -> Case:
    return replace(on, cfg=replace(on.cfg, engine=config.Engine(**{"num_engines": 8, **keys})))


def test_engines_share_gpus_as_their_keys_say():
    def rollout(**keys) -> dict[str, float]:
        return memory.check(with_engine(base, **keys)).phases["rollout"]

    base = case("deepscaler_8k")
    m = rollout()
    assert "weights" in m and not any(name.startswith(("gradients", "optimizer")) for name in m)  # on the CPU meanwhile
    assert "gradients (float32)" in rollout(offload_trainer=("optimizer",))
    two = rollout(tp=2, num_engines=4, gpu_memory_frac=0.7)
    assert two["engine: weights"] == pytest.approx(1_777_088_000)  # half of bfloat16
    engine = sum(size for name, size in two.items() if name.startswith("engine"))
    assert engine == pytest.approx(0.7 * NODE.gpu.memory_bytes)
    # 1.310 B numbers of the layers' matrices in one byte, the other 0.467 in two
    small = rollout(quantization="fp8_per_block", kv_cache_dtype="fp8")
    layers = 28 * (2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 8960 * 1536)
    assert small["engine: weights"] == pytest.approx(2 * 1_777_088_000 - layers)
    slow, fast = (
        plan_time.running_responses(with_engine(base, max_running_responses=10_000, kv_cache_dtype=d), EVEN)
        for d in ("auto", "fp8")
    )
    assert fast == pytest.approx(2 * slow)


def test_a_share_of_the_gpu_that_is_too_large_becomes_the_largest_that_fits():
    # Weights and CUDA take 6.8 GB of 84.9, with gradients and optimizer 16.6.
    greedy = with_engine(case("deepscaler_8k"), gpu_memory_frac=0.95)
    assert memory.smallest_change(greedy) == {"engine.gpu_memory_frac": 0.8}
    resident = with_engine(case("deepscaler_8k"), gpu_memory_frac=0.85, offload_trainer=())
    assert memory.smallest_change(resident) == {"engine.offload_trainer": ("gradients", "optimizer")}


def test_apart_from_the_policy_an_engine_has_its_gpu_to_itself():
    phases = memory.check(with_engine(case("deepscaler_8k"), placement="disaggregated", num_engines=4)).phases
    assert "engine asleep" not in phases["update"]
    assert not phases["rollout"].keys() & {"weights", "gradients (float32)"}
    assert phases["update"]["optimizer, sharded (float32)"] == pytest.approx(12 * 1_777_088_000 / 4)


EVEN = plan_time.Assumptions(prompt_tokens=192, response_tokens=4000)


def test_the_arithmetic_of_the_policy_worked_by_hand():
    none = case("deepscaler_8k", "parallel.recompute=none")
    # A sequence of 4192 tokens: 2 x 1.310 B of the layers a token, attention 28 layers x 2 x 1536 x 4192^2, head 2 x
    # 151936 x 1536 x 4000.
    layers = 28 * (2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 8960 * 1536)
    flops = 2 * layers * 4192 + 28 * 2 * 1536 * 4192**2 + 2 * 151936 * 1536 * 4000
    assert sum(plan_time.forward_flops(none.hf_config, 4192, 4000)) == pytest.approx(flops)
    times = plan_time.times(none, EVEN)
    forward = 1024 * flops / (8 * 0.4 * 989e12)
    assert times["logprob"] == pytest.approx(forward)
    # 16 optimizer steps: 4 + 2 bytes of 1.777 B over NVLink but an eighth; 2 x 16 bytes of an eighth and 8 bytes of all
    # through memory.
    n = 1_777_088_000
    step = 6 * n * 7 / 8 / (0.7 * 450e9) + (32 * n / 8 + 8 * n) / 3.35e12
    assert times["update"] == pytest.approx(3 * forward + 16 * step)
    full = plan_time.times(case("deepscaler_8k", "parallel.recompute=full"), EVEN)
    assert full["update"] - times["update"] == pytest.approx(forward)


def test_decoding_reads_weights_and_cache_for_every_token():
    # One prompt of 2 responses on one of 2 GPUs, all of 100 tokens: 100 times the weights and two caches of 192 + 50
    # tokens.
    step = "rollout.prompts_per_step=1 rollout.group_size=2 batch.global_batch_size=2 rollout.max_response_tokens=100"
    engine = "engine.placement=disaggregated engine.num_engines=1"
    two = case("deepscaler_8k", *step.split(), *engine.split(), machine=Machine("h100-80gb", 2))
    seen = plan_time.times(two, plan_time.Assumptions(192, 100, decode_fixed_s=0.0))["rollout"]
    n = 1_777_088_000
    token = (2 * n + 2 * 242 * 28672) / (0.6 * 3.35e12)
    prefill = 2 * n * 192 / (0.4 * 989e12)
    assert seen == pytest.approx(100 * token + prefill)


def test_the_longest_response_is_a_floor_that_more_engines_do_not_lower():
    cases = case("deepscaler_8k"), case("deepscaler_8k_2nodes", machine=Machine("h100-80gb", 16))
    few, many = (plan_time.times(each, plan_time.Assumptions(192, 1000)) for each in cases)
    floor = 8000 * (2 * 1_777_088_000 / (0.6 * 3.35e12) + 0.004)
    assert floor < many["rollout"] < few["rollout"] < many["rollout"] * 1.2
    assert many["logprob"] == pytest.approx(few["logprob"] / 2)


def test_the_program_reports_and_says_that_no_gpu_was_asked(tmp_path):
    args = ("--cfg", str(CONFIGS / "deepscaler_16k.yaml"), "--gpu", "h100-80gb", "--num-gpus", "8")
    out = launch("plan.py", *args, cwd=tmp_path)
    assert "1.777 B parameters" in out and "reference policy" in out and "has not been compared with a GPU" in out
    smaller = {**json.loads((CONFIGS / "benchmarks/1.5b/config.json").read_text()), "num_hidden_layers": 14}
    (tmp_path / "config.json").write_text(json.dumps(smaller))
    # 1.777 B less 14 of 28 layers of 46.8 M
    assert "1.122 B parameters" in launch("plan.py", "memory", *args, "--model-config", tmp_path, cwd=tmp_path)
    out = launch("plan.py", *args, "engine.kv_cache_bytes=90000000000", cwd=tmp_path, code=2)
    assert "error: rollout on 8 x h100-80gb" in out and "engine.kv_cache_bytes=null" in out and "Traceback" not in out


def test_a_length_that_is_no_number_is_refused_in_one_line(tmp_path):
    args = ("--cfg", CONFIGS / "deepscaler_8k.yaml", "--gpu", "h100-80gb", "--num-gpus", "8", "--prompt-tokens", "abc")
    out = launch("plan.py", *args, cwd=tmp_path, code=2)
    assert out == "error: --prompt-tokens = 'abc': must be a number from 1 to 1e+09. Remedy: give one.\n"


@pytest.mark.parametrize(
    "name, num_gpus, message",
    [
        ("h100", "8", "--gpu = 'h100': must be one of h100-80gb, "),
        (None, "8", "--gpu = None"),
        ("h100-80gb", None, "--num-gpus = None: must be a whole number from 1 to 1000000"),
        ("h100-80gb", "0", "--num-gpus = '0'"),
        ("h100-80gb", "-8", "--num-gpus = '-8'"),
    ],
)
def test_a_machine_has_a_known_name_and_gpus(name, num_gpus, message):
    with pytest.raises(InputError) as e:
        memory.machine_of(name, num_gpus)
    assert str(e.value).startswith(message)
