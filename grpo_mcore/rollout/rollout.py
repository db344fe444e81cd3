"""Prompts -> graded groups of responses, over all engines.

`sample` is one batch of prompts with the weights as they are: evaluation. `Rollout` is the stage of training: it keeps
the engines busy with the steps that may be sampled now (admission.py), grades groups as they arrive, and hands over a
step's groups once they are complete. A response is a function of (seed, position in the stream, weights), whatever
engine draws it.
"""

import dataclasses
import functools
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from grpo_mcore.config import config
from grpo_mcore.data import prompts
from grpo_mcore.report import metrics
from grpo_mcore.reward import shaping
from grpo_mcore.reward.functions import Case
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.rewards import Rewards
from grpo_mcore.rollout.admission import Admission
from grpo_mcore.rollout.dispatch import Key
from grpo_mcore.rollout.engine import Completion, Sampling
from grpo_mcore.rollout.engines import Engines, RequestError
from grpo_mcore.rollout.turns import Turns
from grpo_mcore.types import Group, Prompt, Response

CHECK_EVERY_S = 0.5  # how soon a wait notices that the engines are gone
NUM_TRIED = 2  # rows of each source that reward functions are tried on
GRADING_THREADS = 8  # groups whose grading takes long do not hold up those that arrive later
EVALUATION, TRAINING = 0, 1  # first parts of a request's key: evaluation goes first


class StaleError(RuntimeError):
    """A response was sampled with weights of another version than the step's."""


@dataclass(frozen=True)
class Sampled:
    """A step's groups, graded."""

    graded: list[Graded]  # in the order of the stream
    cursor: int  # positions before it are done with
    left_out: list[list[int]]  # of each source the ids of prompts that are not sampled again (data.max_pass_rate)
    metrics: dict[str, metrics.Metric]


def sample(
    engines: Engines,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    temperature: float,
    max_tokens: Callable[[int], int],
    seed: int,
    version: int,
    timeout_s: float,
    top_p: float = 1.0,
    phase: str = "evaluation",
    turns: Turns | None = None,
) -> list[Group]:
    """One group of `group_size` responses per prompt, in the order of the prompts. `max_tokens` of a response, by its
    prompt's length.

    Raises EngineError, EnginesLost, RequestError, StaleError.
    """
    answers = [
        submit(
            engines,
            turns,
            (EVALUATION, i),
            p,
            Sampling(group_size, temperature, max_tokens(len(p.token_ids)), seed_of(seed, phase, i, p), top_p),
            phase,
        )
        for i, p in enumerate(prompts)
    ]
    end = time.monotonic() + timeout_s
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            while True:
                try:
                    completions_of(prompt, answer, CHECK_EVERY_S)
                    break
                except FutureTimeoutError:
                    engines.check()
                    if time.monotonic() > end:
                        raise engines.overdue(phase, timeout_s) from None
    except BaseException:
        cancel(engines, turns, [(EVALUATION, i) for i in range(len(answers))])
        raise
    return [
        group_of(prompt, answer.result(), oldest=version, newest=version)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def submit(engines: Engines, turns: Turns | None, key: Key, prompt: Prompt, sampling: Sampling, phase: str) -> Future:
    """The completions of a prompt, some time: turns, or with an environment sessions."""
    if turns is None:
        return engines.submit(key, prompt.token_ids, sampling, phase)
    return turns.submit(key, prompt, sampling, phase)


def cancel(engines: Engines, turns: Turns | None, keys: Sequence[Key]) -> None:
    if turns is None:
        engines.cancel(keys)
    else:
        for key in keys:
            turns.cancel(key)


def seed_of(seed: int, phase: str, position: int, prompt: Prompt) -> int:
    return random.Random(f"{seed}/{phase}/{position}/{prompt.id}").getrandbits(31)


def completions_of(prompt: Prompt, answer: Future, timeout_s: float | None = None) -> list[Completion]:
    """Raises RequestError, which names the prompt, and what else the answer fails with."""
    try:
        completions: list[Completion] = answer.result(timeout_s)
        return completions
    except RequestError as e:
        raise RequestError(f"{e}: that of prompt {prompt.id}, {prompt.problem[:80]!r}") from None


def group_of(prompt: Prompt, completions: Sequence[Completion], *, oldest: int, newest: int) -> Group:
    """Raises StaleError if a token was sampled with another version than these."""
    for version in (v for c in completions for v, _ in c.versions):
        if not oldest <= version <= newest:
            needs = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
            raise StaleError(
                f"an engine sampled a response to prompt {prompt.id} with weights of version {version}, where the "
                f"step needs {needs}"
            )
    return Group(
        prompt,
        tuple(
            Response(tuple(c.token_ids), tuple(c.logprobs), c.truncated, c.versions, c.given, c.outcome, c.prompt)
            for c in completions
        ),
    )


def grade(
    groups: Sequence[Group], positions: Sequence[int], tokenizer: prompts.Tokenizer, rewards: Rewards
) -> list[Graded]:
    """The groups with their verdicts; all responses are asked about at once."""
    verdicts = rewards.grade([case_of(g, tokenizer) for g in groups])
    return [Graded(position, g, of_group) for position, g, of_group in zip(positions, groups, verdicts, strict=True)]


def case_of(g: Group, tokenizer: prompts.Tokenizer) -> Case:
    """What reward functions see of a group."""
    return dataclasses.replace(
        _unanswered(g.prompt),
        texts=tuple(tokenizer.decode(r.token_ids) for r in g.responses),
        token_ids=tuple(r.token_ids for r in g.responses),
        truncated=tuple(r.truncated for r in g.responses),
        outcomes=tuple(r.outcome for r in g.responses),
    )


def _unanswered(p: Prompt) -> Case:
    answer = p.gold if p.gold is not None else p.answer or None
    return Case([dict(m) for m in p.messages] or p.problem, answer, p.row, p.source, (), (), ())


def try_functions(cfg: config.Reward, known: Sequence[Prompt]) -> str:
    """Tries reward.functions on the first rows; returns what is said of them, and prints what fails on some. Raises
    InputError."""
    if not cfg.functions:
        return cfg.verifier
    with Rewards(cfg) as rewards:
        first = [p for of_source in prompts.by_source(known).values() for p in of_source[:NUM_TRIED]]
        for warning in rewards.check([_unanswered(p) for p in first]):
            print(warning, flush=True)
        return rewards.describe()


class Rollout:
    """The stage, on the driver. `begin` says that the engines have a new version of the weights, `take` waits for the
    step's groups.

    A thread takes answers as they come and grades them. What it cannot handle is raised by the next `take`.
    """

    def __init__(
        self,
        engines: Engines,
        stream: prompts.Stream,
        tokenizer: prompts.Tokenizer,
        rewards: Rewards,
        cfg: config.Config,
        *,
        cursor: int,
        left_out: Sequence[Sequence[int]] = (),
        turns: Turns | None = None,
    ):
        """`cursor`: positions of the stream before it have been trained on; `left_out`: as in Sampled, until then."""
        self._engines, self._stream, self._tokenizer = engines, stream, tokenizer
        self._rewards, self._cfg, self._turns = rewards, cfg, turns
        r = cfg.rollout
        self._admission = Admission(
            prompts_per_step=r.prompts_per_step,
            max_staleness=r.max_staleness,
            dynamic_sampling=r.dynamic_sampling,
            oversampling_frac=r.oversampling_frac,
            max_draws=r.max_draws,
            cursor=cursor,
            num_steps=cfg.num_steps,
            is_left_out=self._is_left_out,
        )
        self._left_out: dict[str, set[int]] = {source: set() for source in stream.sources}
        if left_out and cfg.data.max_pass_rate is not None:
            self._left_out = {s: set(ids) for s, ids in zip(stream.sources, left_out, strict=True)}
        self._changed = threading.Condition()  # guards what follows
        self._version = 0
        self._answers: dict[int, Future] = {}  # by position, until it is graded
        self._graded: dict[int, Graded] = {}
        self._problem: Exception | None = None
        self._grading_s = 0.0
        self._arrived: queue.SimpleQueue = queue.SimpleQueue()
        self._graders = ThreadPoolExecutor(GRADING_THREADS, thread_name_prefix="grading")
        self._thread = threading.Thread(target=self._serve, name="rollout", daemon=True)
        self._thread.start()

    def begin(self, version: int) -> None:
        """Engines and policy have this version now: what has become too stale is dropped, and more may be sampled."""
        with self._changed:
            if not self._stream.has_other_than(self._left_out):
                raise config.RunError(
                    f"after {version} steps every prompt has been left out by data.max_pass_rate = "
                    f"{self._cfg.data.max_pass_rate}: raise it, bring more prompts, or end the run here by num_steps"
                )
            self._version = version
            admitted, dropped = self._admission.begin(version)
            cancel(self._engines, self._turns, [(TRAINING, p) for p in dropped])
            for position in dropped:
                self._answers.pop(position, None)
                self._graded.pop(position, None)
            self._submit(admitted)

    def take(self) -> Sampled:
        """The groups of the step that starts from the version begun last. Raises EngineError, EnginesLost (call again
        after a refit), StaleError."""
        end = time.monotonic() + self._cfg.rollout.timeout_s
        with self._changed:
            while (taken := self._admission.take()) is None:
                if self._problem is not None:
                    raise self._problem
                self._engines.check()
                if time.monotonic() > end:
                    raise self._engines.overdue("rollout", self._cfg.rollout.timeout_s)
                self._changed.wait(CHECK_EVERY_S)
            graded = [self._graded.pop(p) for p in taken.positions]
            passed_over = [self._graded.pop(p) for p in sorted(self._graded) if p < self._admission.cursor]
            self._leave_out([*graded, *passed_over])
            left_out = [sorted(ids) for ids in self._left_out.values()]
            grading_s, self._grading_s = self._grading_s, 0.0
            num_dropped = self._admission.num_dropped
            self._admission.num_dropped = 0
        step = self._version
        staleness = [(step - v, n) for g in graded for r in g.group.responses for v, n in r.versions]
        return Sampled(
            graded,
            self._admission.cursor,
            left_out,
            {
                "rollout/staleness_mean": metrics.Mean(
                    float(sum(s * n for s, n in staleness)), sum(n for _, n in staleness)
                ),
                "rollout/staleness_max": metrics.Max(float(max(s for s, _ in staleness))),
                "rollout/groups_passed_over": metrics.Sum(float(taken.passed_over)),
                "rollout/groups_without_variance": metrics.Sum(float(taken.kept)),
                "rollout/groups_dropped": metrics.Sum(float(num_dropped)),
                "rollout/engine_failures": metrics.Max(float(self._engines.num_failures)),
                "reward/seconds": metrics.Sum(grading_s),
                **(
                    {"rollout/prompts_left_out": metrics.Max(float(sum(map(len, left_out))))}
                    if self._cfg.data.max_pass_rate is not None
                    else {}
                ),
            },
        )

    def _leave_out(self, done: Sequence[Graded]) -> None:
        """The prompts of groups whose mean reward has reached data.max_pass_rate."""
        most = self._cfg.data.max_pass_rate
        for g in done:
            prompt = g.group.prompt
            if most is not None and not prompt.masked and sum(g.rewards) >= most * len(g.rewards):
                self._left_out[prompt.source].add(prompt.id)

    def _is_left_out(self, position: int) -> bool:
        if not any(self._left_out.values()):
            return False
        prompt = self._stream.at(position)
        return prompt.id in self._left_out[prompt.source]

    def close(self) -> None:
        self._arrived.put(None)
        self._thread.join(10)
        self._graders.shutdown(wait=False, cancel_futures=True)

    def _submit(self, positions: Sequence[int]) -> None:
        r = self._cfg.rollout
        for position in positions:
            prompt = self._stream.at(position)
            sampling = Sampling(
                r.group_size,
                r.temperature,
                self._cfg.response_tokens(len(prompt.token_ids)),
                seed_of(self._cfg.seed, "rollout", position, prompt),
            )
            self._answers[position] = answer = submit(
                self._engines, self._turns, (TRAINING, position), prompt, sampling, "rollout"
            )
            answer.add_done_callback(functools.partial(self._put, position))

    def _put(self, position: int, answer: Future) -> None:
        self._arrived.put((position, answer))

    def _serve(self) -> None:
        try:
            while (item := self._arrived.get()) is not None:
                items = [item]
                while not self._arrived.empty():
                    items.append(self._arrived.get())
                if None in items:
                    return
                self._graders.submit(self._grade, items)
        except Exception as e:
            self._fail(e)

    def _fail(self, e: Exception) -> None:
        with self._changed:
            self._problem = self._problem or e
            self._changed.notify()

    def _grade(self, items: list[tuple[int, Future]]) -> None:
        try:
            self._grade_those(items)
        except Exception as e:
            self._fail(e)

    def _grade_those(self, items: list[tuple[int, Future]]) -> None:
        start = time.perf_counter()
        with self._changed:
            # Not dropped since.
            items = [(position, answer) for position, answer in items if self._answers.get(position) is answer]
            # A refit may be under way.
            newest, oldest = self._version + 1, self._version - self._cfg.rollout.max_staleness
        positions = [position for position, _ in items]
        groups = [
            group_of(prompt, completions_of(prompt, answer), oldest=oldest, newest=newest)
            for prompt, answer in ((self._stream.at(position), answer) for position, answer in items)
        ]
        graded = grade(groups, positions, self._tokenizer, self._rewards)
        with self._changed:
            for (position, answer), g in zip(items, graded, strict=True):
                if self._answers.get(position) is not answer:  # dropped since
                    continue
                del self._answers[position]
                self._graded[position] = g
                has_variance = len(set(shaping.combined(g, self._cfg.reward))) > 1 and not g.group.prompt.masked
                self._submit(self._admission.arrived(position, has_variance=has_variance))
            self._grading_s += time.perf_counter() - start
            self._changed.notify()
