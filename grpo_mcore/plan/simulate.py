"""A run in virtual time: the decisions are Dispatch's and Admission's, the seconds those of a Cluster; what it samples
is drawn.

Events move engines from one change to the next, never token by token.

    engine      simulated_engine.py
    trainer     the loop of trainer.py: refit, wait for the step's groups, train. A refit suspends the iteration under
                way.
    failures    of an engine, after exponential times; its requests go to the others, and begin anew. One that has
                started again joins at the next refit; if no engine is left, there is one as soon as the first has
                started.

Not in it: evaluation, grading that takes longer than the slowest response, engines that sleep while the trainer trains,
trainers that fail.
"""

import functools
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from grpo_mcore.config import config
from grpo_mcore.plan.cluster import Cluster, Draw
from grpo_mcore.plan.simulated_engine import Attempt, SimulatedEngine
from grpo_mcore.rollout.admission import Admission
from grpo_mcore.rollout.dispatch import Dispatch


@dataclass
class Step:
    """What one step took and gave; engine-seconds are summed over engines."""

    refit_s: float = 0
    rollout_s: float = 0  # waiting for groups
    train_s: float = 0
    busy_s: float = 0  # engine-seconds with something running
    slots_s: float = 0  # slot-seconds in use
    positions: list[int] = field(default_factory=list)
    response_tokens: int = 0  # trained on
    staleness: float = 0.0  # in steps, mean over those tokens
    max_staleness: int = 0
    sampled: int = 0  # responses that came to their end meanwhile, of whatever step
    failures: int = 0
    issued_again: int = 0  # requests that an engine lost
    dropped: int = 0  # groups that became too stale
    preemptions: int = 0  # responses that lost their place in the cache

    @property
    def seconds(self) -> float:
        return self.refit_s + self.rollout_s + self.train_s


MOST_FAILURES = 10  # of an engine within one step: beyond, the step may never end

_ENGINE, _FAILURE, _STARTED, _TRAINER = range(4)  # of events at the same time: which is first


class Simulation:
    def __init__(
        self,
        rollout: config.Rollout,
        engine: config.Engine,
        cluster: Cluster,
        draw: Callable[[int], Draw],
        *,
        seed: int = 0,
    ):
        """`draw`: what the prompt at a position of the stream will sample."""
        self._rollout, self._engine_cfg, self._cluster, self._draw = rollout, engine, cluster, draw
        self._rng = random.Random(seed)
        self._dispatch: Dispatch[int] = Dispatch(engine.max_running_responses)
        self._admission = Admission(
            prompts_per_step=rollout.prompts_per_step,
            max_staleness=rollout.max_staleness,
            dynamic_sampling=rollout.dynamic_sampling,
            oversampling_frac=rollout.oversampling_frac,
            max_draws=rollout.max_draws,
        )
        self.now: float = 0
        # A heap of (time, kind, engine's index, number, what happens).
        self._events: list[tuple[float, int, int, int, Callable[[], None]]] = []
        self._num_events = 0
        self._engines: dict[int, SimulatedEngine] = {}
        self._expected: dict[int, int] = {}  # by engine: the number of the event that counts
        self._started = list(range(engine.num_engines))  # waiting for a refit to join
        self._arrived: dict[int, Attempt] = {}
        self._version = 0
        self._since: float = 0  # the trainer's phase
        self._trainer_waits = True  # for groups or for an engine
        self._steps: list[Step] = []
        self._step = Step()

    def run(self, num_steps: int) -> list[Step]:
        """That many further steps."""
        until = len(self._steps) + num_steps
        if not self._events:
            self._begin_refit()
        while len(self._steps) < until:
            self.now, kind, index, number, happen = heapq.heappop(self._events)
            if kind != _ENGINE or self._expected.get(index) == number:
                happen()
        return self._steps[until - num_steps : until]

    # The trainer: refit, wait, train.

    def _begin_refit(self) -> None:
        self._step.rollout_s += self.now - self._since  # it waited for an engine to start
        self._since = self.now
        if not self._engines and not self._started:
            self._trainer_waits = True
            return
        seconds = self._cluster.trainer.refit_s
        for index, engine in self._engines.items():
            engine.refit(self.now, seconds, self._version, recompute=self._rollout.cache_after_refit == "recompute")
            self._expect(index, engine.look_ahead())
        for index in self._started:
            self._engines[index] = SimulatedEngine(
                self._cluster.engine, self._engine_cfg.max_running_responses, self._version, self.now + seconds
            )
            self._dispatch.join(index)
            if failures := self._cluster.failures:
                fail = functools.partial(self._fail, index, failures.restart_s)
                self._push(self.now + failures.life_s(self._rng), _FAILURE, index, fail)
        self._started = []
        self._then(seconds, self._end_refit)

    def _end_refit(self) -> None:
        self._step.refit_s += self.now - self._since
        self._since, self._trainer_waits = self.now, True
        admitted, stale = self._admission.begin(self._version)
        for position in stale:
            index = self._dispatch.cancel((position,))
            if index is not None:
                engine = self._engines[index]
                engine.settle(self.now)
                engine.cancel((position,))
                self._expect(index, engine.look_ahead())
        self._step.dropped += len(stale)
        self._submit(admitted)
        self._take()
        if self._trainer_waits and not self._engines and self._started:  # the last one failed during the refit
            self._begin_refit()

    def _take(self) -> None:
        """Trains, if the step's groups are there."""
        taken = self._admission.take()
        if taken is None:
            return
        step = self._step
        step.rollout_s += self.now - self._since
        self._since, step.positions = self.now, taken.positions
        spans = [s for p in taken.positions for response in self._arrived[p].spans for s in response]
        step.response_tokens = sum(tokens for _, tokens in spans)
        step.staleness = sum((self._version - version) * tokens for version, tokens in spans) / step.response_tokens
        step.max_staleness = max(self._version - version for version, _ in spans)
        draws = [self._arrived[p].draw for p in taken.positions]
        tokens = [d.prompt_tokens + n for d in draws for n in d.response_tokens]
        for p in [p for p in self._arrived if p < self._admission.cursor]:
            del self._arrived[p]
        self._then(self._cluster.trainer.seconds(tokens), self._end_step)

    def _end_step(self) -> None:
        step = self._step
        step.train_s += self.now - self._since
        for engine in self._engines.values():
            self._settle(engine)
        self._steps.append(step)
        self._step, self._since = Step(), self.now
        self._version += 1
        self._begin_refit()

    def _then(self, seconds: float, what: Callable[[], None]) -> None:
        self._trainer_waits = False
        self._push(self.now + seconds, _TRAINER, -1, what)

    # The engines.

    def _submit(self, positions: Sequence[int]) -> None:
        for position in positions:
            self._dispatch.submit((position,), self._rollout.group_size)
        self._deal()

    def _deal(self) -> None:
        touched = {}
        for index, key in self._dispatch.deal():
            engine = touched[index] = self._engines[index]
            engine.add(Attempt(key, self._draw(key[0])))
        for index, engine in touched.items():
            engine.settle(self.now)
            self._expect(index, engine.look_ahead())

    def _change(self, index: int) -> None:
        done, at = self._engines[index].change()
        self._expect(index, at)
        for attempt in done:
            self._finish(index, attempt)

    def _finish(self, index: int, attempt: Attempt) -> None:
        if not self._dispatch.done(index, attempt.key):
            raise RuntimeError(f"{attempt.key} was done by an engine that did not have it")
        position = attempt.key[0]
        self._arrived[position] = attempt
        self._step.sampled += len(attempt.spans)
        self._submit(self._admission.arrived(position, attempt.draw.has_variance))
        if self._trainer_waits:
            self._take()

    def _fail(self, index: int, restart_s: float) -> None:
        self._settle(self._engines.pop(index))
        self._expect(index, None)
        self._step.failures += 1
        if self._step.failures > MOST_FAILURES * self._engine_cfg.num_engines:
            raise config.InputError(
                "failures",
                f"{self._step.failures} within a step",
                f"end no step: each of {self._engine_cfg.num_engines} engines failed {MOST_FAILURES} times",
                "lower --failures-per-day or --restart-s",
            )
        self._step.issued_again += len(self._dispatch.leave(index))
        self._push(self.now + restart_s, _STARTED, index, functools.partial(self._start, index))
        self._deal()

    def _start(self, index: int) -> None:
        self._started.append(index)
        if not self._engines and self._trainer_waits:
            self._begin_refit()

    def _settle(self, engine: SimulatedEngine) -> None:
        """Counts for the step what the engine has done since it was last counted."""
        engine.settle(self.now)
        self._step.busy_s += engine.busy_s
        self._step.slots_s += engine.slots_s
        self._step.preemptions += engine.preemptions
        engine.busy_s = engine.slots_s = engine.preemptions = 0

    def _expect(self, index: int, at: float | None) -> None:
        """The engine's next change; what was expected before no longer counts."""
        self._expected.pop(index, None)
        if at is not None:
            self._expected[index] = self._push(at, _ENGINE, index, functools.partial(self._change, index))

    def _push(self, at: float, kind: int, index: int, what: Callable[[], None]) -> int:
        self._num_events += 1
        heapq.heappush(self._events, (at, kind, index, self._num_events, what))
        return self._num_events
