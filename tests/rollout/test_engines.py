"""Real vLLM engines under Ray that are killed, stopped and misled, while they sample and while they are refitted:
nothing is lost, nothing comes twice, and others take their place.

Not covered here: GPUs, and several machines.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import signal
import threading
import time

import pytest
import ray
import torch

from grpo_mcore.config import config
from grpo_mcore.loss import batch
from grpo_mcore.parallel import topology
from grpo_mcore.refit.refit import RefitError
from grpo_mcore.rollout.engine import Completion, Sampling, arguments, environment
from grpo_mcore.rollout.engines import EngineError, RequestError, _problem_with
from grpo_mcore.rollout.rollout import sample
from grpo_mcore.types import Prompt, Response
from tests.dist import spawn
from tests.refit.test_refit import Session

PROMPTS = [Prompt(i, "", "", (3 + i % 80, 40, 7 * i % 91, 12)) for i in range(60)]
slow = pytest.mark.slow  # engines take 15 to 40 s to start


@pytest.fixture(scope="module")
def session(model_folders, tmp_path_factory):
    s = Session(
        model_folders["qwen2_tied"],
        str(tmp_path_factory.mktemp("run")),
        {},
        "engine.num_engines=2",
        "engine.health_timeout_s=4",
        "engine.max_failures=12",
        "engine.max_running_responses=16",
        "rollout.max_response_tokens=200",
        "refit.timeout_s=20",
    )
    yield s
    s.close()


def sampled(session, version: int, seed: int = 5, prompts: list[Prompt] = PROMPTS) -> list[list[tuple[int, ...]]]:
    groups = sample(
        session.engines,
        prompts,
        group_size=4,
        temperature=1.0,
        max_tokens=lambda _: 200,
        seed=seed,
        version=version,
        timeout_s=120,
    )
    assert [g.prompt.id for g in groups] == list(range(len(PROMPTS)))
    assert all(r.versions == ((version, len(r.token_ids)),) for g in groups for r in g.responses)
    return [[r.token_ids for r in g.responses] for g in groups]


@contextlib.contextmanager
def signalled(how: int, process_id: int, when, delay_s: float):
    """A signal to a process, delay_s after `when()` holds."""

    def later():
        while not when():
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(process_id, how)

    thread = threading.Thread(target=later)
    thread.start()
    yield
    thread.join()


def has_requests(session, slot):
    return lambda: session.engines._dispatch.dealt_to(slot)


def both_again(session, version: int) -> None:
    """Waits for the replacement, and refits."""
    starting = list(session.engines._starting)
    ray.wait(starting, num_returns=len(starting), timeout=120)
    assert session.refit(version)["refit/engines"].value == 2


@pytest.fixture(scope="module")
def undisturbed(session) -> list[list[tuple[int, ...]]]:
    session.refit(1)
    return sampled(session, 1)


HOW = {
    "killed": (signal.SIGKILL, 0, "evaluation: engine 1 failed: its process is gone"),
    "stopped": (signal.SIGSTOP, 0, "evaluation: engine 1 failed: did not answer for 4 s"),
    "its vLLM process killed": (signal.SIGKILL, -1, "evaluation: engine 1 failed"),
    "its vLLM process stopped": (signal.SIGSTOP, -1, "evaluation: engine 1 failed: did not answer for 4 s"),
}


@slow
@pytest.mark.parametrize("case", HOW)
def test_an_engine_that_dies_or_hangs_in_mid_generation_changes_nothing_and_is_replaced(
    session, undisturbed, capsys, case
):
    how, process, words = HOW[case]
    slot = session.engines.ready[1]
    process_id = slot.process_ids[0] if process == 0 else vllm_process(slot)
    with signalled(how, process_id, has_requests(session, slot), 0.7):
        assert sampled(session, 1) == undisturbed  # as many responses of each prompt, and the same
    said = capsys.readouterr().out
    assert (
        words in said
        and "requests go to the 1 other engines; a replacement is started" in said
        and "The end of" in said
    )
    assert len(session.engines.ready) == 1
    assert sampled(session, 1) == undisturbed  # with fewer engines
    both_again(session, 1)
    assert sampled(session, 1) == undisturbed


def vllm_process(slot) -> int:
    """Of an engine's child processes the one that computes."""
    for process_id in slot.process_ids[1:]:
        with open(f"/proc/{process_id}/cmdline", "rb") as f, open(f"/proc/{process_id}/comm") as comm:
            if b"EngineCore" in f.read() or "EngineCore" in comm.read():
                return process_id
    raise AssertionError("no EngineCore among the children")


@slow
@pytest.mark.parametrize(
    ("how", "transport"),
    [
        (signal.SIGKILL, "shared"),
        (signal.SIGKILL, "broadcast"),
        (signal.SIGSTOP, "broadcast"),
        (signal.SIGSTOP, "shared"),
    ],
)
def test_an_engine_that_dies_or_hangs_in_mid_refit_is_replaced_and_the_others_are_refitted(
    session, undisturbed, capsys, monkeypatch, how, transport
):
    session.refit_by(transport)(1)
    slot, honest = session.engines.ready[0], session.policy.export

    def interrupted(**how_exported):
        for i, (name, tensor) in enumerate(honest(**how_exported)):
            if i == 8:
                os.kill(slot.process_ids[0], how)
                for process_id in slot.process_ids[1:]:
                    os.kill(process_id, how)
                time.sleep(0.3)
            yield name, tensor
        monkeypatch.undo()

    monkeypatch.setattr(session.policy, "export", interrupted)
    seen = session.refit(1)
    assert seen["refit/engines"].value == 1 and seen["refit/attempts"].value == 2
    said = capsys.readouterr().out
    assert "refit to version 1: sending model." in said and "it is done again" in said and "engine 0 failed" in said
    assert sampled(session, 1) == undisturbed
    both_again(session, 1)
    assert sampled(session, 1) == undisturbed
    session.refit_by("auto")


def corrupted(session, monkeypatch, times: int):
    honest, left = session.policy.export, [times]

    def export(**how):
        left[0] -= 1
        for name, tensor in honest(**how):
            yield name, tensor.mul_(1.5) if left[0] >= 0 and name == "model.layers.1.mlp.down_proj.weight" else tensor

    monkeypatch.setattr(session.policy, "export", export)


def difference(session, prompt: Prompt, c: Completion) -> torch.Tensor:
    """|engine - trainer| log-prob of each token, by the weights that the policy has now."""
    s = batch.Sample(prompt, Response(tuple(c.token_ids), tuple(c.logprobs), c.truncated), 0.0)
    (logprobs,) = session.policy.logprobs([batch.microbatch([s], [0.0])])
    return (logprobs - torch.tensor(c.logprobs)).abs()


@slow
def test_a_corrupted_refit_is_caught_before_a_token_is_used_and_done_again(session, undisturbed, monkeypatch):
    """Requests run meanwhile. Those that end on the corrupted weights do not leave the engine until it is refitted."""
    corrupted(session, monkeypatch, times=1)
    answers = [
        session.engines.submit((0, i), p.token_ids, Sampling(1, 1.0, 200, seed=i), "test")
        for i, p in enumerate(PROMPTS[:16])
    ]
    time.sleep(0.15)
    assert session.refit(2)["refit/attempts"].value == 2
    completions = [answer.result(60)[0] for answer in answers]
    # The right weights' in every token.
    assert max(difference(session, p, c).max() for p, c in zip(PROMPTS[:16], completions, strict=True)) < 1e-3
    assert any(c.versions == ((2, len(c.token_ids)),) for c in completions)  # sampled again from the start
    assert session.refit(1)["refit/attempts"].value == 1
    assert sampled(session, 1) == undisturbed


@slow
def test_a_refit_that_stays_corrupted_ends_the_run_and_says_what_it_saw(session, undisturbed, monkeypatch):
    corrupted(session, monkeypatch, times=3)
    with pytest.raises(
        RefitError,
        match=r"version 3, 3 times: engine \d does not compute what the trainer computes: mean .* tolerance 0.001; "
        r"worst at canary token",
    ):
        session.refit(3)
    monkeypatch.undo()
    assert session.refit(1)["refit/canary_abs_mean"].value < 1e-4
    assert sampled(session, 1) == undisturbed


@slow
@pytest.mark.parametrize("cache", ["recompute", "keep"])
def test_responses_that_run_during_a_refit_go_on_with_the_new_weights_and_every_token_knows_its_version(
    session, undisturbed, cache
):
    """With `recompute` each token has the log-prob that the policy of its version gives; with `keep` those after the
    refit have another."""
    session.refit(1)
    session.refit.transfer.keep_cache = cache == "keep"
    weights = session.weights()
    session.learn(seed=3)
    answers = [
        session.engines.submit((0, i), p.token_ids, Sampling(1, 1.0, 200, seed=i), "test")
        for i, p in enumerate(PROMPTS[:16])
    ]
    time.sleep(0.15)
    session.refit(2)
    completions = [answer.result(60)[0] for answer in answers]
    assert all(sum(n for _, n in c.versions) == len(c.token_ids) for c in completions)
    mixed = [(p, c) for p, c in zip(PROMPTS[:16], completions, strict=True) if [v for v, _ in c.versions] == [1, 2]]
    assert len(mixed) >= 4, [c.versions for c in completions]
    new = max(difference(session, prompt, c)[c.versions[0][1] :].max() for prompt, c in mixed)
    session.restore(weights)
    old = max(difference(session, prompt, c)[: c.versions[0][1]].max() for prompt, c in mixed)
    session.refit.transfer.keep_cache = False
    session.refit(1)
    assert old < 1e-3
    assert new < 1e-3 if cache == "recompute" else new > 1e-2
    assert sampled(session, 1) == undisturbed


@slow
def test_responses_wait_while_engines_sleep_and_go_on_after_the_refit_that_wakes_them(session, undisturbed):
    """On a CPU sleeping gives no memory back; the order of the verbs is the same."""
    answers = [
        session.engines.submit((0, i), p.token_ids, Sampling(1, 1.0, 200, seed=i), "test")
        for i, p in enumerate(PROMPTS[:16])
    ]
    time.sleep(0.1)
    session.engines.sleep(20)
    time.sleep(0.5)
    done = [answer for answer in answers if answer.done()]
    time.sleep(1)
    assert len(done) < 16 and [answer for answer in answers if answer.done()] == done
    session.refit(2)
    completions = [answer.result(60)[0] for answer in answers]
    assert max(difference(session, p, c).max() for p, c in zip(PROMPTS[:16], completions, strict=True)) < 1e-3
    session.refit(1)


@slow
def test_engines_that_take_turns_with_trainers_are_replaced_while_these_have_lent_their_memory(
    session, undisturbed, capsys, monkeypatch
):
    """On a CPU there is no memory to lend; when engines start and sleep is the same. The first replacement cannot
    start: one failure more, and the next one takes its place."""
    engines, failures = session.engines, session.engines.num_failures
    monkeypatch.setattr(engines, "_in_turns", True)
    broken, honest = {**engines._args, "kv_cache_memory_bytes": 1}, engines._args
    slot = engines.ready[1]
    with signalled(signal.SIGKILL, slot.process_ids[0], has_requests(session, slot), 0.3):
        assert sampled(session, 1) == undisturbed
    assert not engines._starting, "nothing starts while a trainer has its memory"
    engines._args, start = broken, engines._start

    def mended(index: int):  # after one that fails
        started, engines._args = start(index), honest
        return started

    monkeypatch.setattr(engines, "_start", mended)
    assert [s.index for s in engines.assemble("refit")] == [0] and engines.num_failures == failures + 2
    said = capsys.readouterr().out
    assert "a replacement is started by the next refit" in said
    assert "engine start: engine 1 failed: " in said and "No available memory for the cache" in said  # its own words
    assert session.refit(1)["refit/engines"].value == 2, "started, asleep, and woken by the refit"
    assert sampled(session, 1) == undisturbed


@slow
def test_a_temperature_of_0_takes_the_likeliest_token_also_beside_sampled_responses(session, undisturbed):
    greedy = [Sampling(1, 0.0, 8, seed=i) for i in range(4)]
    mixed = [s for pair in zip(greedy, [Sampling(4, 1.0, 8, seed=9)] * 4, strict=True) for s in pair]
    answers = [session.engines.submit((0, i), PROMPTS[i // 2].token_ids, s, "test") for i, s in enumerate(mixed)]
    vocabulary = range(session.policy.hf_config.vocab_size)
    for prompt, answer in zip(PROMPTS[:4], answers[::2], strict=True):
        (completion,) = answer.result(60)
        for n, token in enumerate(completion.token_ids):  # each against all others after the same tokens
            before = dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *completion.token_ids[:n]))
            others = [batch.Sample(before, Response((t,), (0.0,), False), 0.0) for t in vocabulary]
            (logprobs,) = session.policy.logprobs([batch.microbatch(others, [0.0] * len(others))])
            assert logprobs.max() - logprobs[token] < 1e-4
            assert abs(logprobs[token] - completion.logprobs[n]) < 1e-3
    [answer.result(60) for answer in answers]


@slow
def test_a_cancelled_request_is_not_answered_and_its_key_may_come_again(session, undisturbed):
    prompt = PROMPTS[0].token_ids
    first = session.engines.submit((0, 0), prompt, Sampling(4, 1.0, 200, seed=1), "test")
    session.engines.cancel([(0, 0)])
    second = session.engines.submit((0, 0), prompt, Sampling(4, 1.0, 10, seed=2), "test")
    assert len(second.result(60)) == 4
    assert not first.done()


@slow
def test_a_request_that_no_engine_could_serve_is_refused_by_its_prompt_and_costs_no_engine(session, undisturbed):
    failures, vocabulary = session.engines.num_failures, session.policy.hf_config.vocab_size
    for token_ids, words in (
        ((), "its prompt has no token"),
        ((3, vocabulary), f"its prompt has token {vocabulary}, and the model has {vocabulary}"),
        ((3,) * 100, "its prompt of 100 tokens and a response of 200 are longer than the 216 that engines"),
    ):
        among = [*PROMPTS[:20], Prompt(77, "what is it?", "", token_ids), *PROMPTS[20:]]
        with pytest.raises(
            RequestError, match=rf"^evaluation: .*{re.escape(words)}.*: that of prompt 77, 'what is it\?'"
        ):
            sampled(session, 1, prompts=among)
    for sampling in (
        Sampling(4, -1.0, 200, 5),
        Sampling(0, 1.0, 200, 5),
        Sampling(4, 1.0, 0, 5),
        Sampling(4, 1.0, 9, 5, 2.0),
    ):
        with pytest.raises(RequestError, match="^rollout: .*(temperature|n |max_tokens|top_p)"):
            session.engines.submit((1, 0), PROMPTS[0].token_ids, sampling, "rollout").result(60)
    assert sampled(session, 1) == undisturbed  # by engines that are as they were
    assert session.engines.num_failures == failures and len(session.engines.ready) == 2


@slow
def test_one_failure_too_many_stops_with_the_engines_last_words(session, undisturbed):
    # Last in this module.
    session.engines._cfg = type(session.cfg.engine)(
        **{**vars(session.cfg.engine), "max_failures": session.engines.num_failures}
    )
    slot = session.engines.ready[0]
    with (
        signalled(signal.SIGKILL, slot.process_ids[0], has_requests(session, slot), 0.3),
        pytest.raises(
            EngineError, match=r"evaluation: engine 0 failed: (?s:.*)engine_0.*\.log(?s:.*), and engine.max_failures = "
        ),
    ):
        sampled(session, 1)


GOOD = Completion([5, 6], [-0.5, 0.0], False, ((3, 2),))
GARBAGE = {
    "too few responses": ([GOOD], "1 responses where 2"),
    "an empty response": ([GOOD, Completion([], [], False, ())], "a response of 0 tokens"),
    "more tokens than asked for": ([GOOD, Completion([1] * 5, [-1.0] * 5, True, ((3, 5),))], "a response of 5 tokens"),
    "a log-prob short": ([GOOD, Completion([5, 6], [-0.5], False, ((3, 2),))], "2 tokens with 1 log-probs"),
    "NaN": ([GOOD, Completion([5, 6], [-0.5, float("nan")], False, ((3, 2),))], "a log-prob that is none"),
    "minus infinity": ([GOOD, Completion([5, 6], [-0.5, float("-inf")], False, ((3, 2),))], "a log-prob that is none"),
    "a probability above 1": ([GOOD, Completion([5, 6], [-0.5, 0.7], False, ((3, 2),))], "a log-prob that is none"),
    "a token without version": ([GOOD, Completion([5, 6], [-0.5, -1.0], False, ((3, 1),))], "2 tokens, of which 1"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_told_from_an_answer(case):
    completions, words = GARBAGE[case]
    assert words in _problem_with(completions, Sampling(2, 1.0, 4, seed=0))


def test_an_answer_is_not_garbage():
    assert _problem_with([GOOD, GOOD], Sampling(2, 1.0, 4, seed=0)) is None


def arguments_of(minimal: dict, cuda: bool, alone: bool = False) -> dict:
    cfg = config.Config(model="m", run_dir="r", num_steps=1, data=config.Data(train="t"), **minimal)
    return arguments(cfg, "m", cuda=cuda, alone=alone)


def test_vllm_is_told_what_the_placement_asks_for():
    shared = arguments_of({"engine": config.Engine(quantization="fp8_per_block", tp=2)}, cuda=True)
    assert (
        shared["enable_sleep_mode"]
        and shared["gpu_memory_utilization"] == 0.5
        and shared["quantization"] == "fp8_per_block"
    )
    assert (
        shared["tensor_parallel_size"] == 2
        and shared["distributed_executor_backend"] == "mp"
        and not shared["enforce_eager"]
    )
    apart = arguments_of({"engine": config.Engine(placement="disaggregated", kv_cache_dtype="fp8")}, cuda=True)
    assert (
        not apart["enable_sleep_mode"] and apart["gpu_memory_utilization"] == 0.9 and apart["kv_cache_dtype"] == "fp8"
    )
    alone = arguments_of({}, cuda=True, alone=True)  # an evaluation has no trainer whose turn it could be
    assert not alone["enable_sleep_mode"] and alone["gpu_memory_utilization"] == 0.9 and alone["load_format"] == "auto"
    assert shared["max_num_batched_tokens"] == 8192 and shared["load_format"] == "dummy"
    on_cpu = arguments_of({"engine": config.Engine(kv_cache_bytes=1 << 20)}, cuda=False)
    assert (
        on_cpu["enforce_eager"] and on_cpu["max_num_batched_tokens"] == 8192 and "gpu_memory_utilization" not in on_cpu
    )
    with pytest.raises(config.InputError, match="engine.kv_cache_bytes"):
        arguments_of({}, cuda=False)


@pytest.mark.parametrize("release", ["0.26.0", "0.32.0", "0.33.1"])
def test_sampling_ahead_needs_a_vllm_that_says_which_weights_sampled_a_token(monkeypatch, release):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release if name.startswith("vllm") else "?")
    refused = pytest.raises(config.InputError, match=r"rollout.max_staleness = 1: needs vllm 0\.32 or newer")
    with refused if release == "0.26.0" else contextlib.nullcontext():
        arguments_of({"rollout": config.Rollout(max_staleness=1)}, cuda=True)
    arguments_of({}, cuda=True)


def of_nccl(deterministic: bool) -> tuple[dict[str, str], dict[str, str]]:
    """NCCL's variables (of engines started before the trainer's rank connects, of that rank then)."""
    os.environ |= {"NCCL_SOCKET_IFNAME": "eth7", "NCCL_COLLNET_ENABLE": "1"}  # the user's
    cfg = config.Config(model="m", run_dir="r", num_steps=1, data=config.Data(train="t"), deterministic=deterministic)
    both = [environment(cfg, cuda=True)]
    topology.connect(
        config.Parallel(), device=torch.device("cpu"), timeout_s=60, seed=1, deterministic=cfg.deterministic
    )
    both.append(dict(os.environ))
    return tuple({name: value for name, value in side.items() if name.startswith("NCCL_")} for side in both)


@pytest.mark.parametrize("deterministic", [False, True])
def test_engines_and_trainers_have_the_same_variables_of_nccl(deterministic):
    ((engines, trainers),) = spawn(of_nccl, 1, deterministic)
    assert engines == trainers and engines["NCCL_SOCKET_IFNAME"] == "eth7"
    assert engines["NCCL_COLLNET_ENABLE"] == ("0" if deterministic else "1")


def test_a_deterministic_engine_does_not_depend_on_its_batch():
    cfg = config.Config(model="m", run_dir="r", num_steps=1, data=config.Data(train="t"), deterministic=True)
    assert environment(cfg, cuda=True)["VLLM_BATCH_INVARIANT"] == "1" and "VLLM_BATCH_INVARIANT" not in environment(
        cfg, cuda=False
    )
