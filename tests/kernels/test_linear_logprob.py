"""Triton's linear_logprob against the float64 oracle: by the interpreter on a CPU (tests/kernels/test_interpreter.py
runs this file), on a GPU as it is, there at the sizes of training too.

Not covered here: shards that meet (tests/parallel/test_vocab.py), speed and memory (benchmarks/kernels.py).
"""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/kernels/test_interpreter.py runs this file", allow_module_level=True)

from grpo_mcore.kernels import linear_logprob as kernel
from tests.reference import logprob as oracle
from tests.reference.logprob import EXTREMES, OUTPUTS, differentiate, naive, naive_of_logits

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
T, D, V = 21, 24, 291  # no multiple of any block, and three of dz's rectangles of columns
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks of everything at small sizes: rows, splits, rectangles."""
    if "real_sizes" in request.keywords:
        return
    monkeypatch.setattr(kernel, "ROWS", 8)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 1)  # the narrowest rectangle: 128 columns
    if not ON_GPU:
        monkeypatch.setattr(kernel, "_programs_at_once", lambda *_: 7)  # 2 row blocks of 10 splits, in three waves
        small = kernel.Blocks(16, 32, 16, warps=4, stages=2)
        monkeypatch.setattr(kernel, "FORWARD", {FLOAT32: small, BFLOAT16: small})
        monkeypatch.setattr(kernel, "BACKWARD", {FLOAT32: small, BFLOAT16: small})


@functools.cache
def inputs(dtype=FLOAT32, rows: int = T, vocabulary: int = V, width: int = D, seed: int = 0):
    """hidden, weight (logits with a standard deviation of about 3), targets of which some lie outside, upstream
    gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) * 3 / width**0.5).to(dtype)
    target = torch.randint(-3, vocabulary + 3, (rows,), generator=g)
    # Both ends, the edges of blocks, of splits and of rectangles, and the columns that a last block has but the shard
    # has not.
    edges = torch.tensor([0, vocabulary - 1, 31, 32, 127, 128, 255, 256, vocabulary, vocabulary + 1, -1])
    target[: len(edges)] = edges[:rows]
    upstream = {name: torch.randn(rows, generator=g).to(DEVICE) for name in OUTPUTS}
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE), upstream


def ours(hidden, weight, target, upstream, temperature: float = 1.0):
    return differentiate(
        lambda h, w: kernel.linear_logprob(h, w, target, temperature=temperature), hidden, weight, upstream
    )


@functools.cache
def truth(dtype, temperature: float, *shape: int):
    hidden, weight, target, upstream = (x if isinstance(x, dict) else x.cpu() for x in inputs(dtype, *shape))
    upstream = {name: g.cpu() for name, g in upstream.items()}
    out = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), temperature), hidden.double(), weight.double(), upstream
    )
    return tuple({name: x.to(DEVICE) for name, x in part.items()} for part in out)


def noise(hidden, weight, temperature: float) -> float:
    """16 ulp of the largest logit. A logit of some ten products is off by about one of its ulps, as are its factor
    log2(e) / temperature, its product with that, the logsumexp that it is compared with, and the way back to natural
    units; exp turns the sum of those absolute errors into a relative one of every probability, to which rescaling, sums
    and 1 + z - mean add a few more."""
    return 16 * 2.0**-23 * max((hidden.double() @ weight.double().T).abs().max().item() / temperature, 1)


@pytest.mark.parametrize("shape", [(T, V, D), (1, V, D), (1, 1, 4), (17, 2, 8), (16, 128, 16), (33, 129, 40)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_float32_values_and_gradients_equal_the_float64_oracles(shape, temperature):
    hidden, weight, target, upstream = inputs(FLOAT32, *shape)
    values, gradients = ours(hidden, weight, target, upstream, temperature)
    true_values, true_gradients = truth(FLOAT32, temperature, *shape)
    tolerance = noise(hidden, weight, temperature)
    for name in OUTPUTS:
        assert values[name].dtype == FLOAT32
        assert (values[name].double() - true_values[name]).abs().max() <= tolerance, name
    # Where one token has all probability the true gradient is smaller than the terms it is made of: they count then.
    for name, factor in (("hidden", weight), ("weight", hidden)):
        terms = factor.abs().max() / temperature * max(upstream[output].abs().max() for output in OUTPUTS)
        assert (gradients[name].double() - true_gradients[name]).abs().max() <= tolerance * max(
            true_gradients[name].abs().max(), terms
        ), name


def check_budget(mine, coarse, exact):
    """Errors no larger than those of `coarse`, the naive form in bfloat16: by element, and on average."""
    for my, other, true in zip(mine, coarse, exact, strict=True):
        for name in true:
            error, budget = (my[name].double() - true[name]).abs(), (other[name].double() - true[name]).abs()
            # By element the naive form may be right by luck: two bfloat16 ulps of the largest number are allowed for
            # that, one for the dz that was rounded, one for the result.
            assert (error <= budget + 2 * 2.0**-7 * true[name].abs().max()).all(), name
            # On average luck is small: both round dz and the result, and only the naive one all the rest.
            assert error.mean() <= budget.mean(), name


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_bfloat16_errs_no_more_than_the_naive_form_in_bfloat16(temperature):
    hidden, weight, target, upstream = inputs(BFLOAT16)
    coarse = differentiate(lambda h, w: naive(h, w, target, temperature), hidden, weight, upstream)
    mine = ours(hidden, weight, target, upstream, temperature)
    assert mine[1]["hidden"].dtype == mine[1]["weight"].dtype == BFLOAT16
    check_budget(mine, coarse, truth(BFLOAT16, temperature))


@pytest.mark.parametrize("output", OUTPUTS)
def test_each_output_has_its_own_gradient(output):
    hidden, weight, target, upstream = inputs()
    only = {output: upstream[output]}
    _, mine = ours(hidden, weight, target, only, 0.7)
    _, plain = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), 0.7), hidden.double(), weight.double(), only
    )
    for name in plain:
        assert (mine[name] - plain[name]).abs().max() <= noise(hidden, weight, 0.7) * plain[name].abs().max(), name


def test_a_target_outside_the_shard_gives_zero_and_moves_nothing():
    hidden, weight, _, upstream = inputs()
    # V + 28 ends the last block.
    outside = torch.tensor([-1, -2, -V, -(10**6), V, V + 1, V + 28, V + 29, 10 * V, 2**31 - 1] * 3)[:T].to(DEVICE)
    values, gradients = ours(hidden, weight, outside, {"target": upstream["target"]})
    assert values["target"].tolist() == [0.0] * T
    assert not gradients["hidden"].any() and not gradients["weight"].any()


@pytest.mark.parametrize("spread", [1, 40])  # neighbours, or each in a block of its own
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_extreme_logits_give_finite_and_right_values_and_gradients(name, temperature, spread):
    # Hidden is 1 in its first column, and the other three are 0: the weight's first column is each row's logits.
    hidden, weight = torch.eye(1, 4).repeat(4, 1), torch.full((4 * spread, 4), -1e4)
    weight[::spread, 0] = torch.tensor(EXTREMES[name])
    weight[:, 1:] = 0
    target = torch.arange(4) * spread  # each of the four rows asks for another logit
    upstream = {output: torch.tensor([1.0, -0.5, 2.0, 0.25]) for output in OUTPUTS}
    values, gradients = ours(
        hidden.to(DEVICE),
        weight.to(DEVICE),
        target.to(DEVICE),
        {k: v.to(DEVICE) for k, v in upstream.items()},
        temperature,
    )
    true_values, true_gradients = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), temperature), hidden.double(), weight.double(), upstream
    )
    # The products are exact; their factor log2(e) / temperature, the product with it and the way back to natural units
    # are rounded.
    ulps = 2 * 2.0**-23 * 1e4 / temperature
    for output in OUTPUTS:
        assert (values[output].cpu().double() - true_values[output]).abs().max() <= ulps, output
    # dz carries 1 + z - mean, each off by those; the weight's sums 4 rows, the hidden state's is multiplied by up to
    # 1e4.
    assert (gradients["weight"].cpu().double() - true_gradients["weight"]).abs().max() <= 4 * 2 * 2 * ulps / temperature
    assert (
        gradients["hidden"].cpu().double() - true_gradients["hidden"]
    ).abs().max() <= 4 * 2 * 2 * ulps / temperature * 1e4


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_no_upstream_gradient_gives_none(dtype):
    hidden, weight, target, upstream = inputs(dtype)
    _, gradients = ours(hidden, weight, target, {name: torch.zeros_like(g) for name, g in upstream.items()})
    assert not gradients["hidden"].any() and not gradients["weight"].any()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_no_rows_give_empty_outputs_and_zero_gradients(dtype):
    hidden, weight, target, upstream = inputs(dtype)
    values, gradients = ours(hidden[:0], weight, target[:0], {name: g[:0] for name, g in upstream.items()})
    assert [x.shape for x in values.values()] == [(0,)] * 3
    assert gradients["hidden"].shape == (0, D) and not gradients["weight"].any()


def test_a_shard_without_rows_has_no_probability():
    hidden, weight, target, upstream = inputs()
    values, gradients = ours(hidden, weight[:0], target, upstream)
    assert (
        (values["logsumexp"] == float("-inf")).all() and not values["target"].any() and not values["mean_logit"].any()
    )
    assert not gradients["hidden"].any() and gradients["weight"].shape == (0, D)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_two_runs_are_equal_bit_for_bit(dtype):
    hidden, weight, target, upstream = inputs(dtype)
    for one, other in zip(ours(hidden, weight, target, upstream), ours(hidden, weight, target, upstream), strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("rows", [8, T])  # several rectangles of rows; one
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_main_grad_is_added_to_in_float32_and_nothing_is_returned(monkeypatch, dtype, rows):
    monkeypatch.setattr(kernel, "ROWS", rows)
    hidden, weight, target, upstream = inputs(dtype)
    _, plain = ours(hidden, weight, target, upstream)
    main_grad = torch.full((V, D), 0.5, device=DEVICE)
    for _ in range(2):
        _, fused = differentiate(
            lambda h, w: kernel.linear_logprob(h, w, target, temperature=1.0, main_grad_VD=main_grad),
            hidden,
            weight,
            upstream,
        )
    assert fused["weight"] is None and torch.equal(fused["hidden"], plain["hidden"])
    exact = truth(dtype, 1.0)[1]["weight"]
    # dz is rounded to the dtype, half an ulp: at random over T rows, but it may be at most that of the largest gradient
    # in each.
    ulp = 2.0**-8 if dtype == BFLOAT16 else noise(hidden, weight, 1.0)
    assert (main_grad.double() - 0.5 - 2 * exact).abs().max() <= 2 * ulp * exact.abs().max() + 2.0**-23
    if dtype == BFLOAT16:
        assert not torch.equal(main_grad, main_grad.bfloat16().float())


@pytest.mark.parametrize("rows", [8, T])
def test_the_shape_of_the_rectangles_does_not_matter(monkeypatch, rows):
    hidden, weight, target, upstream = inputs()
    values, gradients = ours(hidden, weight, target, upstream)
    monkeypatch.setattr(kernel, "ROWS", rows)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 256 * (rows * 4 + 4 * D))  # 256 columns, not 128
    other_values, other_gradients = ours(hidden, weight, target, upstream)
    for name in OUTPUTS:
        assert torch.equal(values[name], other_values[name])
    for name in gradients:  # another order of the same sums
        assert (gradients[name] - other_gradients[name]).abs().max() <= 2.0**-20 * gradients[name].abs().max(), name


def test_rectangles_of_worked_sizes():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernel, "ROWS", 32768)
        # All rows in one: a column takes 24576 x 2 B of dz; 536870912 / 49152 = 10922.7, of which 85 x 128; dWeight
        # needs no sums.
        for fused in (False, True):
            assert kernel.rectangle(24576, 1536, 2, 512 << 20, fused=fused) == (24576, 10880)
        # Two rectangles of rows, as equal as can be; 40000 B and 1536 x 4 B of dWeight: 11634, of which 90 x 128.
        assert kernel.rectangle(40000, 1536, 2, 512 << 20, fused=False) == (20000, 11520)
        # dWeight in main_grad: 536870912 / 40000 = 13421, of which 104 x 128.
        assert kernel.rectangle(40000, 1536, 2, 512 << 20, fused=True) == (20000, 13312)


def test_programs_share_a_multiprocessor_as_its_shared_memory_allows():
    hopper = 233472  # bytes
    # 3 stages of (128 + 128) x 64 bfloat16: 96 KiB each
    assert kernel.programs_of(kernel.Blocks(128, 128, 64, 4, 3), 2, hopper) == 2
    # 2 stages of (128 + 128) x 128: 128 KiB
    assert kernel.programs_of(kernel.Blocks(128, 128, 128, 4, 2), 2, hopper) == 1
    assert kernel.programs_of(kernel.Blocks(128, 256, 64, 8, 3), 2, hopper) == 1
    assert kernel.programs_of(kernel.Blocks(128, 256, 128, 8, 4), 2, hopper) == 1  # which does not fit at all


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_the_order_in_which_programs_start_does_not_matter(monkeypatch, group):
    """Bit for bit."""
    monkeypatch.setattr(kernel, "num_splits", lambda *_: 3)
    hidden, weight, target, upstream = inputs()
    values, gradients = ours(hidden, weight, target, upstream)
    monkeypatch.setattr(kernel, "GROUP", group)
    # The forward's group is as many row blocks as run at once with all of their splits.
    monkeypatch.setattr(kernel, "_programs_at_once", lambda *_: group * 3)
    other_values, other_gradients = ours(hidden, weight, target, upstream)
    assert all(torch.equal(values[name], other_values[name]) for name in OUTPUTS)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_the_vocabulary_is_split_until_the_programs_end_together():
    assert kernel.num_splits(264, 1187, 264) == 1  # one wave as it is
    assert kernel.num_splits(8, 1187, 264) == 33  # 8 x 33 = 264
    # 192 row blocks fill 264 places 11 at a time: 192 x 11 = 8 waves of 108 blocks, 864; unsplit 1187, and fewer splits
    # leave places empty.
    assert kernel.num_splits(192, 1187, 264) == 11
    assert kernel.num_splits(1, 3, 264) == 3


def test_what_the_kernel_cannot_take_is_refused():
    hidden, weight, target, _ = inputs()
    for h, w, words in (
        (hidden.half(), weight.half(), "float16"),
        (hidden, weight.bfloat16(), "both"),
        (hidden[:, :3], weight[:, :3], "D = 3"),
    ):
        with pytest.raises(ValueError, match=words):
            kernel.linear_logprob(h, w, target, temperature=1.0)


def in_float64(hidden, weight, target, temperature: float, upstream):
    """What `differentiate` gives for the oracle, at sizes for which its loops are too slow: a thousand rows at a
    time."""
    weight, parts = weight.double(), []
    d_weight = torch.zeros_like(weight)
    for start in range(0, len(hidden), 1024):
        rows = slice(start, start + 1024)
        h = hidden[rows].double()
        z = (h @ weight.T / temperature).requires_grad_()
        outputs = naive_of_logits(z, target[rows])
        (dz,) = torch.autograd.grad(
            sum((upstream[name][rows].double() * x).sum() for name, x in zip(OUTPUTS, outputs, strict=True)), z
        )
        dz /= temperature
        d_weight += dz.T @ h
        parts.append([*(x.detach() for x in outputs), dz @ weight])
    *values, d_hidden = (torch.cat(x) for x in zip(*parts, strict=True))
    return dict(zip(OUTPUTS, values, strict=True)), {"hidden": d_hidden, "weight": d_weight}


@pytest.mark.gpu
@pytest.mark.real_sizes
@pytest.mark.parametrize("vocabulary", [151936, 75968, 151665])  # whole, of tp 2, without padding rows: odd
@pytest.mark.parametrize("rows", [1, 1000, 8192, 24576])
def test_bfloat16_at_real_sizes_errs_no_more_than_the_naive_form(rows, vocabulary):
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, 1536, generator=g, device=DEVICE).bfloat16()
    weight = (torch.randn(vocabulary, 1536, generator=g, device=DEVICE) * 3 / 1536**0.5).bfloat16()
    target = torch.randint(-5, vocabulary + 5, (rows,), generator=g, device=DEVICE)
    upstream = {name: torch.randn(rows, generator=g, device=DEVICE) for name in OUTPUTS}
    mine = ours(hidden, weight, target, upstream, 0.8)
    again = ours(hidden, weight, target, upstream, 0.8)
    for one, other in zip(mine, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    del again
    exact = in_float64(hidden, weight, target, 0.8, upstream)
    coarse = differentiate(lambda h, w: naive(h, w, target, 0.8), hidden, weight, upstream)
    check_budget(mine, coarse, exact)
