"""The plain linear_logprob against a float64 oracle of loops: values and all gradients, float32 and bfloat16.

`torch.autograd.gradcheck` cannot serve: the function computes in float32 whatever it is given.
Not covered here: shards that meet (tests/parallel/test_vocab.py), padding rows (tests/policy/test_logprob.py).
"""

import pytest
import torch

from grpo_mcore.kernels.reference import linear_logprob
from tests.reference import logprob as oracle
from tests.reference.logprob import EXTREMES, OUTPUTS, differentiate, naive

R, D, V = 13, 16, 37  # odd on purpose
ULP = 2.0**-23  # float32, relative


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0):
    """hidden, weight (logits with a standard deviation of about 3), and targets on every edge of shard and chunks."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, D, generator=g)
    weight = torch.randn(V, D, generator=g) * 0.75
    targets = [0, 6, 7, 13, 35, 36, 20, 1, -1, -40, 37, 99, 36]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.tensor(targets)


def upstreams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(R, generator=g) for name in OUTPUTS}


def noise(hidden, weight, temperature: float) -> float:
    """8 ulp of the largest logit. A logit of 16 products is off by about one of its ulps; exp turns that absolute error
    into a relative one of every probability, to which rescaling, the sums over V and R, and 1 + z - mean add a few
    more."""
    return 8 * ULP * ((hidden.detach() @ weight.detach().T).abs().max().item() / temperature)


@pytest.mark.parametrize("chunk_V", [1, 7, V, V + 5])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_values_equal_the_float64_oracles(chunk_V, temperature):
    hidden, weight, target = inputs()
    ours = dict(
        zip(OUTPUTS, linear_logprob(hidden, weight, target, temperature=temperature, chunk_V=chunk_V), strict=True)
    )
    truth = dict(zip(OUTPUTS, oracle.partials(hidden, weight, target.tolist(), temperature), strict=True))
    assert all(x.dtype == torch.float32 for x in ours.values())
    for name in OUTPUTS:
        assert (ours[name].double() - truth[name]).abs().max() <= noise(hidden, weight, temperature), name


@pytest.mark.parametrize("chunk_V", [1, 7, V, V + 5])
def test_a_target_outside_the_shard_gives_zero_and_moves_no_weight(chunk_V):
    hidden, weight, _ = inputs()
    outside = torch.tensor([-1, -2, -V, V, V + 1, V + 4, V + 5, 10 * V, -7, -1, V, 41, 42])
    _, target_logit, _ = linear_logprob(hidden, weight, outside, temperature=1.0, chunk_V=chunk_V)
    assert target_logit.tolist() == [0.0] * R
    target_logit.sum().backward()
    assert not weight.grad.any() and not hidden.grad.any()


@pytest.mark.parametrize(
    "outputs", [("logsumexp",), ("target",), ("mean_logit",), OUTPUTS], ids=lambda names: "+".join(names)
)
@pytest.mark.parametrize("chunk_V", [1, 7, V, V + 5])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_gradients_equal_autograd_of_the_float64_oracle(outputs, chunk_V, temperature):
    hidden, weight, target = inputs()
    upstream = {name: g for name, g in upstreams().items() if name in outputs}
    _, ours = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=temperature, chunk_V=chunk_V), hidden, weight, upstream
    )
    _, truth = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), temperature), hidden.double(), weight.double(), upstream
    )
    for name in truth:
        assert (ours[name].double() - truth[name]).abs().max() <= noise(hidden, weight, temperature) * truth[
            name
        ].abs().max(), name


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("chunk_V", [1, 3, 4])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_extreme_logits_give_finite_and_right_values_and_gradients(name, chunk_V, temperature):
    hidden, weight = torch.ones(4, 1), torch.tensor(EXTREMES[name])[:, None]  # so these are the logits of each row
    target = torch.arange(4)  # each of the four rows asks for another logit
    upstream = {output: torch.tensor([1.0, -0.5, 2.0, 0.25]) for output in OUTPUTS}
    values, gradients = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=temperature, chunk_V=chunk_V), hidden, weight, upstream
    )
    true_values, true_gradients = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), temperature), hidden.double(), weight.double(), upstream
    )
    # The logits are exact but for the division; what is left is one ulp of numbers of the size of the largest.
    ulp = ULP * 1e4 / temperature
    for output in OUTPUTS:
        assert (values[output].double() - true_values[output]).abs().max() <= ulp, output
    # dz carries mean - z, off by one ulp of them; the weight's sums 4 rows, the hidden state's is multiplied by up to
    # 1e4.
    assert (gradients["weight"].double() - true_gradients["weight"]).abs().max() <= 4 * 2 * ulp / temperature
    assert (gradients["hidden"].double() - true_gradients["hidden"]).abs().max() <= 4 * 2 * ulp / temperature * 1e4


@pytest.mark.parametrize("chunk_V", [1, 7, V])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_errs_no_more_than_the_naive_form_in_bfloat16(chunk_V, temperature, seed):
    hidden, weight, target = inputs(torch.bfloat16, seed)
    upstream = upstreams()
    ours = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=temperature, chunk_V=chunk_V), hidden, weight, upstream
    )
    coarse = differentiate(lambda h, w: naive(h, w, target, temperature), hidden, weight, upstream)
    truth = differentiate(
        lambda h, w: oracle.partials(h, w, target.tolist(), temperature), hidden.double(), weight.double(), upstream
    )
    for mine, other, exact in zip(ours, coarse, truth, strict=True):
        for name in exact:
            my_error, budget = (mine[name].double() - exact[name]).abs(), (other[name].double() - exact[name]).abs()
            # By element the naive form may be right by luck: two bfloat16 ulps of the largest number are allowed for
            # that, one for the logit or dz that was rounded, one for the result.
            assert (my_error <= budget + 2 * 2.0**-7 * exact[name].abs().max()).all(), name
            # On average luck is small: both forms round the product hidden x weight, and only the naive one all that
            # follows.
            assert my_error.mean() <= 1.1 * budget.mean(), name


def test_gradients_come_in_the_dtype_of_the_inputs():
    hidden, weight, target = inputs(torch.bfloat16)
    linear_logprob(hidden, weight, target, temperature=1.0)[0].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_no_rows_give_empty_outputs_and_zero_gradients():
    hidden, weight, target = inputs()
    upstream = {name: g[:0] for name, g in upstreams().items()}
    values, gradients = differentiate(
        lambda h, w: linear_logprob(h, w, target[:0], temperature=1.0), hidden[:0], weight, upstream
    )
    assert [x.shape for x in values.values()] == [(0,)] * 3
    assert gradients["hidden"].shape == (0, D) and not gradients["weight"].any()


def test_a_shard_without_rows_has_no_probability():
    hidden, weight, target = inputs()
    values, gradients = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=1.0), hidden, weight[:0], upstreams()
    )
    assert (
        (values["logsumexp"] == float("-inf")).all() and not values["target"].any() and not values["mean_logit"].any()
    )
    assert not gradients["hidden"].any() and gradients["weight"].shape == (0, D)


def test_no_upstream_gradient_gives_none():
    hidden, weight, target = inputs()
    upstream = {name: torch.zeros(R) for name in OUTPUTS}
    _, gradients = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=1.0, chunk_V=7), hidden, weight, upstream
    )
    assert not gradients["hidden"].any() and not gradients["weight"].any()


def test_main_grad_is_added_to_and_nothing_is_returned():
    hidden, weight, target = inputs()
    _, plain = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=1.0, chunk_V=7), hidden, weight, upstreams()
    )
    main_grad = torch.full((V, D), 0.5)
    _, fused = differentiate(
        lambda h, w: linear_logprob(h, w, target, temperature=1.0, chunk_V=7, main_grad_VD=main_grad),
        hidden,
        weight,
        upstreams(),
    )
    assert fused["weight"] is None and torch.equal(fused["hidden"], plain["hidden"])
    assert torch.equal(main_grad, 0.5 + plain["weight"])
