"""The configuration: strict, total, frozen; every rule and what it says.

Not covered here: how files and overrides are read (test_file.py); rules that need the model or the data
(test_prompts.py), the command line.
"""

import dataclasses
import re
import typing

import pytest
import yaml

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.config.file import describe, load
from grpo_mcore.config.rules import check_metrics, check_ranks
from tests.dist import ROOT

CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

# All that is required. 16 x 8 responses, 1024 + 7168 tokens: the defaults fit each other.
MINIMAL = """
model: some/folder
run_dir: runs/x
num_steps: 3
data: {train: train.jsonl}
"""


@pytest.fixture
def minimal(tmp_path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)


def refused(function, *args) -> str:
    with pytest.raises(InputError) as e:
        function(*args)
    return str(e.value)


def test_every_configuration_of_the_repository_loads_and_comes_back_from_what_is_printed(tmp_path):
    # test_stages.py has those
    paths = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "stages" not in yaml.safe_load(path.read_text())]
    assert QUICKSTART in paths
    for path in paths:
        cfg = load(path)
        printed = tmp_path / "printed.yaml"
        printed.write_text(describe(cfg, cfg.parallel.tp))
        assert load(printed) == cfg, path


def test_what_is_not_given_has_the_default(minimal):
    cfg = load(minimal)
    assert (cfg.model, cfg.num_steps, cfg.data.train) == ("some/folder", 3, "train.jsonl")
    assert cfg.optimizer == config.Optimizer() and cfg.warm_start is None


def test_loading_never_changes_the_defaults_or_an_earlier_configuration(minimal):
    first, copy = load(minimal), load(minimal)
    load(minimal, ["optimizer.lr=0.5", "rollout.group_size=16", "eval.data=x.jsonl"])
    assert load(minimal) == first == copy
    assert config.Optimizer().lr == 1e-6


def test_a_configuration_cannot_be_written_to(minimal):
    cfg = load(minimal)
    for node, name in ((cfg, "seed"), (cfg.optimizer, "lr"), (cfg.data, "train")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, name, getattr(node, name))


@pytest.mark.parametrize(
    "override, message",
    [
        ("nun_steps=3", "nun_steps = '3': there is no such key. Remedy: did you mean num_steps."),
        (
            "rollout.group_sise=3",
            "rollout.group_sise = '3': there is no such key. Remedy: did you mean rollout.group_size.",
        ),
        ("optimiser.lr=1.0", "optimiser = '1.0': there is no such key. Remedy: did you mean optimizer."),
        # Nothing is near: all keys of the section are shown.
        (
            "checkpoint.xyzzy=3",
            "checkpoint.xyzzy = '3': there is no such key. Remedy: known keys here: every, keep, keep_best, "
            "best_metric, start_from, asynchronous, timeout_s.",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(minimal, override, message):
    assert refused(load, minimal, [override]) == message


@pytest.mark.parametrize(
    "override, message",
    [
        ("num_steps=many", "num_steps = 'many': must be of type int. Remedy: write a value of type int."),
        ("num_steps=1.5", "num_steps = 1.5: must be of type int. Remedy: write a value of type int."),
        # bool is an int to Python
        ("num_steps=true", "num_steps = True: must be of type int. Remedy: write a value of type int."),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': must be of type float. Remedy: write a value of type float."),
        ("optimizer.lr=true", "optimizer.lr = True: must be of type float. Remedy: write a value of type float."),
        ("optimizer.lr=[1.0]", "optimizer.lr = '[1.0]': must be of type float. Remedy: write a value of type float."),
        ("data.chat_template=1", "data.chat_template = 1: must be of type bool. Remedy: write a value of type bool."),
        ("eval.max_prompts=x", "eval.max_prompts = 'x': must be of type int. Remedy: write a value of type int."),
        # null is for the optional ones
        ("num_steps=null", "num_steps = None: must be of type int. Remedy: write a value of type int."),
        ("rollout=5", "rollout = 5: must be a section of keys. Remedy: write its keys below `rollout:`."),
        ("data=null", "data = None: must be a section of keys. Remedy: write its keys below `data:`."),
        ("loss.kl_estimator=k4", "loss.kl_estimator = 'k4': must be one of k1, k2, k3. Remedy: choose one of them."),
        ("warm_start.lr=1.0", "warm_start.task = None: is required. Remedy: add `task:` to the configuration."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(minimal, override, message):
    assert refused(load, minimal, [override]) == message


@pytest.mark.parametrize("text, value", [("1e-6", 1e-6), ("2.5e-4", 2.5e-4), ("1", 1.0), ("0.1", 0.1)])
def test_a_number_becomes_a_float_where_the_field_is_one(tmp_path, text, value):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + f"optimizer: {{lr: {text}}}\n")
    lr = load(path).optimizer.lr
    assert type(lr) is float and lr == value


@pytest.mark.parametrize(
    "name",
    [
        "engine.kv_cache_bytes",
        "refit.canary_tolerance",
        "eval.data",
        "eval.max_prompts",
        "eval.max_response_tokens",
        "rollout.max_total_tokens",
        "data.shuffle_seed",
        "warm_start",
        "stop.plateau_window",
        "stop.truncated_above",
        "checkpoint.start_from",
    ],
)
def test_null_is_a_value_of_the_optional_fields(minimal, name):
    value = load(minimal, [f"{name}=null"])
    for key in name.split("."):
        value = getattr(value, key)
    assert value is None


@pytest.mark.parametrize("line", MINIMAL.split("\n")[1:-1])
def test_what_has_no_default_is_required(tmp_path, line):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL.replace(line, ""))
    name = line.partition(":")[0]
    assert refused(load, path) == f"{name} = None: is required. Remedy: add `{name}:` to the configuration."


MUST_BE_POSITIVE = """
num_steps num_threads collective_timeout_s data.max_prompt_tokens parallel.tp parallel.pp parallel.virtual_pp
parallel.cp parallel.ep parallel.recompute_num_layers precision.fp8_amax_history checkpoint.timeout_s optimizer.lr
rollout.prompts_per_step rollout.group_size rollout.temperature rollout.max_response_tokens rollout.max_total_tokens
rollout.timeout_s engine.num_engines engine.max_running_responses engine.num_threads engine.start_timeout_s
reward.num_processes reward.cpu_s reward.wall_s reward.memory_bytes batch.global_batch_size
batch.max_tokens_per_microbatch refit.bucket_bytes refit.timeout_s eval.every eval.samples_per_prompt
eval.top_p checkpoint.keep stop.plateau_window stop.truncated_steps
rollout.max_draws engine.tp engine.gpu_memory_frac engine.max_batched_tokens engine.health_timeout_s
engine.kv_cache_bytes mismatch.warn_above mismatch.stop_above loss.kl_limit eval.max_prompts eval.max_response_tokens
optimizer.eps refit.canary_tolerance data.max_pass_rate kernels.workspace_bytes
""".split()
NEEDED = {  # what a section that may be null cannot do without
    "warm_start": ["warm_start.task=two_digit_sums"],
    "environment": ["environment.path=a.py:A", "reward.functions=[{path: environment}]"],
}
OF_AN_ENVIRONMENT = [f"environment.{name}" for name in ("max_turns", "num_processes", "wall_s", "memory_bytes")]
OF_A_WARM_START = ["warm_start.batch_size", "warm_start.lr", "warm_start.max_steps"]
MAY_BE_ZERO = (
    "data.skip_prompts loss.kl_coef loss.entropy_coef shaping.overlong_buffer_tokens "
    "shaping.overlong_penalty loss.clip_low loss.clip_high optimizer.warmup_steps optimizer.weight_decay "
    "optimizer.clip_grad checkpoint.every rollout.max_staleness rollout.oversampling_frac rollout.keep_texts "
    "stop.after_steps stop.plateau_min_gain checkpoint.keep_best engine.max_failures "
    "precision.fp8_first_layers_bf16 precision.fp8_last_layers_bf16".split()
)
MUST_BE_A_FRACTION = (
    "stop.truncated_above optimizer.warmup_start_frac warm_start.corrupted_frac warm_start.stop_at_pass_rate".split()
)
AT_MOST_1 = ["engine.gpu_memory_frac", "loss.clip_low", "eval.top_p", "data.max_pass_rate"]
HAVE_BOUNDS_OF_THEIR_OWN = (
    "seed loss.importance_cap loss.clip_dual engine.cores eval.temperature optimizer.beta1 optimizer.beta2".split()
)
ANY_NUMBER = ["data.shuffle_seed"]  # a part of a text that seeds the order


def numbers(cls: type, prefix: str = "") -> dict[str, type]:
    """int or float of every dotted key that holds one, or several; not of those in lists of sections."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= numbers(part, f"{prefix}{name}.") if typing.get_origin(hint) is not tuple else {}
            elif part in (int, float):
                found[prefix + name] = part
    return found


def test_every_number_has_a_bound_here_or_needs_none():
    listed = MUST_BE_POSITIVE + OF_A_WARM_START + OF_AN_ENVIRONMENT
    listed += MAY_BE_ZERO + MUST_BE_A_FRACTION + HAVE_BOUNDS_OF_THEIR_OWN
    assert sorted(numbers(config.Config)) == sorted(listed + ANY_NUMBER)


FLOATS = [name for name, kind in numbers(config.Config).items() if kind is float]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_no_number_is_infinite_or_nan(minimal, name, value):
    needed = NEEDED.get(name.partition(".")[0], [])
    seen = value.replace(".", "")
    said = f"{name} = {seen}: must be a finite number. Remedy: write one."
    assert refused(load, minimal, [*needed, f"{name}={value}"]) == said


@pytest.mark.parametrize("name", MUST_BE_A_FRACTION + AT_MOST_1)
def test_a_fraction_ends_at_0_and_1(minimal, name):
    needed = NEEDED.get(name.partition(".")[0], [])
    load(minimal, [*needed, f"{name}=1"])
    words = f"{name} = 1.01: must be between 0 and 1. Remedy: lower it."
    assert refused(load, minimal, [*needed, f"{name}=1.01"]) == words
    if name in MUST_BE_A_FRACTION:
        load(minimal, [*needed, f"{name}=0"])
        words = f"{name} = -0.01: must be between 0 and 1. Remedy: raise it."
        assert refused(load, minimal, [*needed, f"{name}=-0.01"]) == words


@pytest.mark.parametrize("name", MUST_BE_POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_or_time_must_be_positive(minimal, name, value):
    assert re.fullmatch(
        rf"{name} = {value}(\.0)?: must be greater than 0\. Remedy: raise it\.",
        refused(load, minimal, [f"{name}={value}"]),
    )


@pytest.mark.parametrize("name", OF_A_WARM_START + OF_AN_ENVIRONMENT)
def test_sizes_of_a_section_that_may_be_null_must_be_positive(minimal, name):
    assert re.fullmatch(
        rf"{name} = 0(\.0)?: must be greater than 0\. Remedy: raise it\.",
        refused(load, minimal, [*NEEDED[name.partition(".")[0]], f"{name}=0"]),
    )


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_a_coefficient_may_be_zero_but_not_negative(minimal, name):
    load(minimal, [f"{name}=0"])
    assert re.fullmatch(
        rf"{name} = -1(\.0)?: must be 0 or more\. Remedy: raise it\.", refused(load, minimal, [f"{name}=-1"])
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["rollout.group_size=1"],
            "rollout.group_size = 1: a group needs 2 responses to compare. Remedy: set it to 2 or more.",
        ),
        # 128 prompts x 8 responses
        (
            ["batch.global_batch_size=100"],
            "batch.global_batch_size = 100: must divide the 1024 responses of a step "
            "(rollout.prompts_per_step x rollout.group_size). Remedy: choose a divisor.",
        ),
        (
            ["batch.max_tokens_per_microbatch=8191"],
            "batch.max_tokens_per_microbatch = 8191: must hold the longest sequence, 8192 tokens "
            "(data.max_prompt_tokens + rollout.max_response_tokens). Remedy: set it to 8192 or more, or shorten "
            "the sequences.",
        ),
        (
            ["rollout.max_total_tokens=9000", "rollout.max_response_tokens=9000"],
            "batch.max_tokens_per_microbatch = 8192: must hold the longest sequence, 9000 tokens "
            "(rollout.max_total_tokens). Remedy: set it to 9000 or more, or shorten the sequences.",
        ),
        (
            ["rollout.max_total_tokens=1024"],
            "data.max_prompt_tokens = 1024: must leave room for a response in rollout.max_total_tokens = 1024. "
            "Remedy: lower it.",
        ),
        (
            ["data.prompt_template=Solve it."],
            "data.prompt_template = 'Solve it.': must contain {problem}. Remedy: add it where the problem goes.",
        ),
        # 8192 tokens on 4 context ranks: 2048 each; aligned to sequence parallelism over 3 tp ranks, 2 zigzag chunks: 6
        # * 342 = 2052
        (
            [
                "parallel.cp=4",
                "parallel.tp=3",
                "parallel.sequence_parallel=true",
                "batch.max_tokens_per_microbatch=2051",
            ],
            "batch.max_tokens_per_microbatch = 2051: must hold the longest sequence, 8192 tokens "
            "(data.max_prompt_tokens + rollout.max_response_tokens); "
            "with its padding 2052 on each of 4 context ranks. Remedy: set it to 2052 or more, or shorten the "
            "sequences.",
        ),
        (
            ["parallel.ep=2"],
            "parallel.ep = 2: expert parallelism is not built: the model families here are dense. Remedy: leave it "
            "at 1.",
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel = True: splits what tp ranks would each hold whole, and parallel.tp is 1. "
            "Remedy: raise parallel.tp, or set it to false.",
        ),
        (
            ["parallel.virtual_pp=2"],
            "parallel.virtual_pp = 2: cuts a pipeline stage into chunks, and parallel.pp is 1. Remedy: raise "
            "parallel.pp, or set it to 1.",
        ),
        (
            ["parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather = True: needs parallel.overlap_grad_reduce. Remedy: set both, or neither.",
        ),
        (
            ["parallel.recompute_modules=[core_attn, moe]"],
            "parallel.recompute_modules = 'moe': must be of core_attn, mlp. Remedy: choose among them.",
        ),
        (
            ["precision.fp8=tensorwise", "precision.params=float32"],
            "precision.fp8 = 'tensorwise': needs precision.params = bfloat16, which is float32. Remedy: change one "
            "of them.",
        ),
        (
            ["precision.fp8=blockwise", "device=cpu"],
            "precision.fp8 = 'blockwise': needs a GPU with FP8 matrix products (Hopper or newer), and this is a CPU. "
            "Remedy: set precision.fp8=null, or run on a GPU.",
        ),
        (
            ["precision.fp8=delayed", "precision.fp8_last_layers_bf16=1", "device=cuda"],
            "precision.fp8 = 'delayed': cannot leave single layers in bfloat16: its scales are kept for the whole "
            "model. "
            "Remedy: set fp8_first_layers_bf16 and fp8_last_layers_bf16 to 0, or choose tensorwise or blockwise.",
        ),
        (
            ["precision.params=float32", "engine.offload_trainer=[]", "device=cuda"],
            "precision.params = 'float32': has no fused attention on a GPU, and without it a sequence has at most 1024 "
            "tokens, not 8192. Remedy: train in bfloat16, or shorten the sequences.",
        ),
        (
            [
                *("precision.params=float32", "engine.offload_trainer=[]", "device=cuda", "parallel.cp=2"),
                *("rollout.max_total_tokens=1024", "data.max_prompt_tokens=24"),
            ],
            "parallel.cp = 2: needs fused attention, which precision.params = float32 does not have on a GPU. "
            "Remedy: train in bfloat16, or set it to 1.",
        ),
        (
            ["kernels.linear_logprob=triton", "device=cpu"],
            "kernels.linear_logprob = 'triton': needs a GPU, and this is a CPU. Remedy: set it to auto, or run on "
            "a GPU.",
        ),
        (
            ["loss.clip_dual=1.0"],
            "loss.clip_dual = 1.0: must be more than 1, the ratio on policy. Remedy: raise it, or set it to null.",
        ),
        (
            ["loss.clip_dual=3.0", "loss.policy_loss=cispo"],
            "loss.clip_dual = 3.0: has no meaning for policy_loss = cispo, whose ratio is clipped whatever the "
            "advantage's sign. "
            "Remedy: set it to null.",
        ),
        (
            ["shaping.overlong_buffer_tokens=7169"],
            "shaping.overlong_buffer_tokens = 7169: must be at most rollout.max_response_tokens = 7168, at whose "
            "end it stands. Remedy: lower it.",
        ),
        (["loss.kl_limit=0"], "loss.kl_limit = 0.0: must be greater than 0. Remedy: raise it."),
        (
            ["loss.importance_cap=0.5"],
            "loss.importance_cap = 0.5: must be 1 or more: at weight 1 there is nothing to correct. Remedy: raise it.",
        ),
        (["stop.truncated_above=1.5"], "stop.truncated_above = 1.5: must be between 0 and 1. Remedy: lower it."),
        (
            ["eval.temperature=0"],
            "eval.samples_per_prompt = 8: must be 1 with eval.temperature = 0: greedy samples of a problem are all "
            "the same. Remedy: set it to 1, or raise the temperature.",
        ),
        (
            ["eval.temperature=0.009"],
            "eval.temperature = 0.009: would be 0.01 in the engine. Remedy: set it to 0, which is greedy, or to 0.01 "
            "or more.",
        ),
        (
            ["rollout.temperature=0.009"],
            "rollout.temperature = 0.009: must be between 0.01 and 2: vLLM samples at no other. Remedy: raise it.",
        ),
        (
            ["rollout.temperature=2.01"],
            "rollout.temperature = 2.01: must be between 0.01 and 2: vLLM samples at no other. Remedy: lower it.",
        ),
        (
            ["optimizer.beta1=1"],
            "optimizer.beta1 = 1.0: must be between 0 and 1, and not 1: a mean that decays by nothing never begins. "
            "Remedy: lower it.",
        ),
        (
            ["engine.max_batched_tokens=255"],
            "engine.max_batched_tokens = 255: must be engine.max_running_responses = 256 or more: each takes a token "
            "of a step. Remedy: raise it, or lower engine.max_running_responses.",
        ),
        (
            ["data.shuffle_seed=9223372036854775808"],
            "data.shuffle_seed = 9223372036854775808: must fit into 64 bits. Remedy: write a smaller number.",
        ),
        (
            ["rollout.cache_after_refit=keep", "rollout.max_staleness=1", "device=cuda"],
            "rollout.cache_after_refit = 'keep': cannot keep what colocated engines give back before every update. "
            "Remedy: leave it at recompute, or set engine.placement=disaggregated.",
        ),
        (
            ["refit.transport=broadcast", "device=cuda"],
            "refit.transport = 'broadcast': is NCCL's on GPUs, which refuses two processes on one, and colocated "
            "engines stand on the trainers'. Remedy: set it to auto, or set engine.placement=disaggregated.",
        ),
        (
            ["engine.offload_trainer=[optimizer, weights]"],
            "engine.offload_trainer = 'weights': must be of gradients, optimizer. Remedy: choose among them.",
        ),
        (
            ["rollout.max_draws=0.5"],
            "rollout.max_draws = 0.5: must be 1 or more: a step needs prompts_per_step prompts. Remedy: raise it.",
        ),
        (["engine.cores=[0, -1]"], "engine.cores = -1: must be 0 or more. Remedy: raise it."),
        (["seed=-1"], "seed = -1: must be between 0 and 4294967295, as NumPy's seeds are. Remedy: raise it."),
        (
            ["seed=4294967296"],
            "seed = 4294967296: must be between 0 and 4294967295, as NumPy's seeds are. Remedy: lower it.",
        ),
        (["eval.top_p=1.5"], "eval.top_p = 1.5: must be between 0 and 1. Remedy: lower it."),
    ],
)
def test_rules_between_fields_name_field_value_constraint_and_remedy(minimal, overrides, message):
    assert refused(load, minimal, overrides) == message


def test_what_just_fits_is_accepted(minimal):
    load(
        minimal,
        [
            "rollout.group_size=2",
            "batch.global_batch_size=256",
            "batch.max_tokens_per_microbatch=8192",
            "eval.top_p=1.0",
            "seed=4294967295",
            "data.shuffle_seed=-1",
            "loss.importance_cap=1",
            "rollout.max_draws=1",
            "rollout.temperature=0.01",
            "eval.temperature=0",
            "eval.samples_per_prompt=1",
            "optimizer.beta1=0",
        ],
    )


@pytest.mark.parametrize(
    "overrides, world_size, message",
    [
        (
            ["parallel.tp=3"],
            4,
            "parallel.tp = 3: tp 3 x pp 1 x cp 1 must divide the number of ranks, 4. Remedy: change an axis or "
            "--nproc-per-node.",
        ),
        (
            ["parallel.tp=4"],
            2,
            "parallel.tp = 4: tp 4 x pp 1 x cp 1 must divide the number of ranks, 2. Remedy: change an axis or "
            "--nproc-per-node.",
        ),
        (
            ["parallel.tp=2", "parallel.cp=4"],
            12,
            "parallel.cp = 4: tp 2 x pp 1 x cp 4 must divide the number of ranks, 12. Remedy: change an axis or "
            "--nproc-per-node.",
        ),
        # 6 ranks / tp 2 = dp 3
        # 6 ranks / pp 2 = dp 3, with interleaved stages of 2: 64 is no multiple of 6
        (
            ["parallel.pp=2", "parallel.virtual_pp=2"],
            12,
            "batch.global_batch_size = 64: must be a multiple of the 6 data-parallel ranks x the 2 pipeline "
            "stages, which are interleaved. "
            "Remedy: change one of them.",
        ),
        (
            ["parallel.tp=2"],
            6,
            "batch.global_batch_size = 64: must be a multiple of the 3 data-parallel ranks. Remedy: change one of "
            "them.",
        ),
    ],
)
def test_rules_between_configuration_and_ranks(minimal, overrides, world_size, message):
    assert refused(check_ranks, load(minimal, overrides), world_size) == message


def test_tensor_ranks_do_not_share_the_global_batch_out(minimal):
    # 6 ranks / tp 3 = dp 2, which divides 64; 6 would not
    check_ranks(load(minimal, ["parallel.tp=3"]), 6)


def test_the_description_of_the_quickstart_shows_its_derived_sizes_with_units():
    cfg = load(QUICKSTART, ["num_steps=100", "rollout.max_response_tokens=40"])  # the two that tuning may move
    lines = [re.sub(" +", " ", line) for line in describe(cfg, 2).split("\n# derived\n")[1].split("\n")]
    # 32 prompts x 8 responses in optimizer steps of 128; 8 + 40 tokens; 100 steps of 2
    assert lines == [
        "# responses per step 256 responses (32 prompts x 8)",
        "# responses per optimizer step 128 responses (over all ranks)",
        "# optimizer steps per step 2 optimizer steps",
        "# tokens per microbatch at most 4096 tokens (per data-parallel rank)",
        "# longest sequence 48 tokens (prompt and response)",
        "# optimizer steps of the run 200 optimizer steps (100 steps)",
        "# ranks by axis tp 1 x cp 1 x pp 1 x dp 2 = 2 ranks; 2 engines",
    ]


def test_the_longest_sequence_is_that_of_training_or_of_evaluation(minimal):
    assert load(minimal, ["eval.max_response_tokens=9000"]).longest_tokens == 1024 + 9000
    assert load(minimal, ["eval.max_response_tokens=10"]).longest_tokens == 1024 + 7168
    # evaluation has a limit of its own
    both = load(minimal, ["rollout.max_total_tokens=8000", "eval.max_response_tokens=7500"])
    assert (both.longest_train_tokens, both.longest_tokens) == (8000, 1024 + 7500)
    assert load(minimal, ["rollout.max_total_tokens=9000"]).longest_tokens == 1024 + 7168


def test_a_response_ends_at_its_own_limit_or_at_that_of_prompt_and_response_together(minimal):
    cfg = load(minimal, ["rollout.max_total_tokens=8000"])
    # 7168 after up to 832 tokens; then 8000 - prompt; never none at all
    assert [cfg.response_tokens(n) for n in (1, 832, 833, 7999, 8000, 9000)] == [7168, 7168, 7167, 1, 1, 1]
    assert cfg.response_tokens(833, evaluation=True) == 7167
    assert load(minimal).response_tokens(9000) == 7168
    offline = load(minimal, ["rollout.max_total_tokens=8000", "eval.max_response_tokens=32768"])
    assert (offline.response_tokens(833, evaluation=True), offline.response_tokens(833)) == (32768, 7167)


@pytest.mark.parametrize("override", ["eval.max_prompts=0", "eval.max_prompts=-1", "eval.max_response_tokens=-5"])
def test_an_optional_number_is_positive_where_it_is_given(minimal, override):
    assert "must be greater than 0" in refused(load, minimal, [override])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["checkpoint.keep_best=1", "checkpoint.best_metric=reward/maen"],
            "checkpoint.best_metric = 'reward/maen': is no metric that this run writes. Remedy: did you mean "
            "reward/mean.",
        ),
        (
            ["stop.plateau_window=2", "stop.plateau_metric=zzz"],
            "stop.plateau_metric = 'zzz': is no metric that this run writes. Remedy: there are mismatch/beyond_cap",
        ),
        # what only another configuration writes
        (
            ["checkpoint.keep_best=1", "checkpoint.best_metric=eval/mean@16", "eval.data=x.jsonl"],
            "checkpoint.best_metric = 'eval/mean@16': is no metric that this run writes. Remedy: did you mean "
            "eval/mean@8.",
        ),
        (
            ["stop.plateau_window=2", "stop.plateau_metric=update/kl_to_ref"],
            "stop.plateau_metric = 'update/kl_to_ref': is no metric that this run writes. ",
        ),
        (
            ["stop.plateau_window=2", "stop.plateau_metric=eval/mean@8"],
            "stop.plateau_metric = 'eval/mean@8': is never known without eval.data. Remedy: set eval.data.",
        ),
        (
            ["checkpoint.keep_best=2", "checkpoint.best_metric=eval/mean@8", "eval.data=x.jsonl", "eval.every=3"],
            "checkpoint.best_metric = 'eval/mean@8': is known of a checkpoint only if eval.every = 3 divides "
            "checkpoint.every = 10. Remedy: change one of them.",
        ),
    ],
)
def test_a_run_is_judged_by_metrics_that_it_writes(minimal, overrides, message):
    cfg = load(minimal, overrides)  # which may be evaluated, or planned
    assert refused(check_metrics, cfg).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.best_metric=reward/maen", "stop.plateau_metric=reward/maen"],  # by which nothing is judged
        ["stop.plateau_window=2", "stop.plateau_metric=update/kl_to_ref", "loss.kl_coef=0.1"],
        ["checkpoint.keep_best=1", "checkpoint.best_metric=eval/maj@8", "eval.data=x.jsonl", "eval.every=5"],
    ],
)
def test_a_metric_that_is_written_or_not_asked_for_is_accepted(minimal, overrides):
    check_metrics(load(minimal, overrides))
