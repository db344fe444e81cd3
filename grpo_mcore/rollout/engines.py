"""All engines of a run, as Ray actors; lives on the driver.

A thread deals requests out by load (dispatch.py), takes the answers, and asks after the engines' health, so that they
sample while the trainer trains. An engine that dies, fails, answers garbage or no longer answers is replaced, and its
requests go to the others; the replacement takes part from the next refit on. Whatever cannot go on says which engine,
in which phase, with its own last words.

Engines that take turns with trainers on GPUs start only while these have given their memory back, because vLLM takes
for its own what others allocate while it measures: the first ones before there is a policy, replacements in `assemble`.
They sleep until the next refit.
"""

import contextlib
import itertools
import math
import os
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import ray

from grpo_mcore.config import config
from grpo_mcore.rollout import engine, placement
from grpo_mcore.rollout.dispatch import Dispatch, Key
from grpo_mcore.rollout.engine import Completion, Engine, Sampling, Unservable

HEALTH_EVERY_S = 2.0


class EngineError(config.RunError):
    """An engine died, failed or missed its deadline."""


class RequestError(config.RunError):
    """A request that no engine could serve."""


class EnginesLost(EngineError):
    """None is left, and replacements are on their way: the next refit waits for them."""


@dataclass(eq=False)
class Slot:
    """One place for an engine, and who is in it."""

    index: int
    log: Path
    actor: ray.actor.ActorHandle
    began: float  # time.monotonic() of its start
    host: str = ""
    process_ids: Sequence[int] = ()  # once it has started: the actor's and its children's
    ready: bool = False  # takes requests: started, and refitted with the others
    ping: tuple[ray.ObjectRef, float] | None = None  # and when it was sent

    def last_words(self) -> str:
        """The end of its log, and errors before it: vLLM's last one may only say that there was a first."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        causes = [line for line in dict.fromkeys(lines[:-15]) if re.search(r"\w(Error|Exception): ", line)]
        return "\n  ".join(
            [f"The end of {self.log}:", *causes[-3:], *lines[-15:]] if lines else [f"{self.log} is empty"]
        )


@dataclass(frozen=True, eq=False)
class _Request:
    name: int  # of this and no other: keys may come again
    phase: str
    token_ids: Sequence[int]
    sampling: Sampling
    answer: Future


class Engines:
    def __init__(self, cfg: config.Config, folder: str, *, cuda: bool, stop_token_ids: list[int], alone: bool = False):
        """Starts Ray (or joins the cluster of RAY_ADDRESS) and the engines, without waiting for them.

        `alone`: there is no trainer. Engines load the folder's weights and have their GPUs to themselves; else their
        weights are arbitrary until the first refit. Raises InputError.
        """
        self._cfg, self._stop_token_ids = cfg.engine, stop_token_ids
        self._args = engine.arguments(cfg, folder, cuda=cuda, alone=alone)
        self._environment = engine.environment(cfg, cuda=cuda)
        self._logs = Path(cfg.run_dir).absolute() / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.num_failures = 0
        self._failed: EngineError | None = None  # what ends the run
        self._lock = threading.RLock()
        self._dispatch: Dispatch[Slot] = Dispatch(cfg.engine.max_running_responses)
        self._requests: dict[Key, _Request] = {}
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._names = itertools.count()
        self._refitting = False
        self._in_turns = not alone and cfg.engine.is_colocated("cuda" if cuda else "cpu")
        self._starting: dict[ray.ObjectRef, Slot] = {}
        placement.start_ray(cfg.engine, cuda=cuda, alone=alone)
        self._group = placement.reserve(cfg.engine, cuda=cuda)
        self._slots: list[Slot | None] = [None] * cfg.engine.num_engines
        self._fill()
        self._thread = threading.Thread(target=self._serve, name="engines", daemon=True)
        self._thread.start()

    def _start(self, index: int) -> Slot:
        log = self._logs / (
            f"engine_{index}.log" if not self.num_failures else f"engine_{index}.after_failure_{self.num_failures}.log"
        )
        n = self._cfg.num_threads
        actor = placement.in_bundle(Engine, self._group, index, self._environment)
        cores = self._cfg.cores[index * n : (index + 1) * n]
        return Slot(index, log, actor.remote(self._args, str(log), cores), time.monotonic())

    def _fill(self) -> None:
        """Starts an engine in each place that has none."""
        with self._lock:
            for index, slot in enumerate(self._slots):
                if slot is None:
                    self._slots[index] = slot = self._start(index)
                    self._starting[slot.actor.ready.remote(self._stop_token_ids, self._in_turns)] = slot

    @property
    def address(self) -> str:
        """Of this machine, as the engines reach it."""
        mine = ray.get_runtime_context().get_node_id()
        return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == mine)

    @property
    def ready(self) -> list[Slot]:
        """The engines that take part."""
        with self._lock:
            return [slot for slot in self._slots if slot is not None and slot.ready]

    def wait_until_ready(self) -> None:
        """All of them, for the first time. Raises EngineError for the first that fails."""
        while over := self._next_start(wait=True):
            slot, problem = over
            if problem is not None:
                raise EngineError(f"engine start: engine {slot.index} failed: {problem}. {slot.last_words()}")
            self._admit(slot)

    def _next_start(self, *, wait: bool) -> tuple[Slot, str | None] | None:
        """An engine whose start is over, and what went wrong with it. None if none is over: with `wait`, if none is
        under way."""
        with self._lock:
            starting = dict(self._starting)
        if not starting:
            return None
        oldest = min(starting, key=lambda ref: starting[ref].began)
        left_s = max(starting[oldest].began + self._cfg.start_timeout_s - time.monotonic(), 0)
        done, _ = ray.wait(list(starting), timeout=left_s if wait else 0)
        if not done and left_s and not wait:
            return None
        ref = done[0] if done else oldest
        with self._lock:
            slot = self._starting.pop(ref)
        if not done:
            return slot, f"did not start within {self._cfg.start_timeout_s:.0f} s"
        try:
            slot.host, slot.process_ids = ray.get(ref)
        except ray.exceptions.RayError as e:
            return slot, _last_line(e)
        return slot, None

    def _admit(self, slot: Slot) -> None:
        with self._lock:
            slot.ready = True
            self._dispatch.join(slot)
            self._deal()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self, key: Key, token_ids: Sequence[int], sampling: Sampling, phase: str, conversation: Key | None = None
    ) -> Future:
        """A list of Completion, some time: requests are served in the order of their keys. `conversation`: what else is
        of the same one has, or will have, the same beginning; until `end_conversation`. The future fails with
        RequestError if no engine could serve it, else only when the run cannot go on."""
        request = _Request(next(self._names), phase, token_ids, sampling, Future())
        with self._lock:
            self._requests[key] = request
            self._dispatch.submit(key, sampling.num_responses, conversation)
            self._deal()
        return request.answer

    def end_conversation(self, conversation: Key) -> None:
        with self._lock:
            self._dispatch.end(conversation)

    def cancel(self, keys: Sequence[Key]) -> None:
        """Ends requests; the futures of those that were not answered yet never end."""
        with self._lock:
            for key in keys:
                request = self._requests.pop(key, None)
                if request is not None and (slot := self._dispatch.cancel(key)) is not None:
                    slot.actor.cancel.remote(request.name)
            self._deal()

    def check(self) -> None:
        """Raises EngineError if the run cannot go on, EnginesLost if none is left."""
        if self._failed is not None:
            raise self._failed
        if not self.ready:
            raise EnginesLost("no engine is left")

    def overdue(self, phase: str, timeout_s: float) -> EngineError:
        """What to raise when the requests of a phase were not done in time."""
        with self._lock:
            left = {
                slot: [key for key in self._dispatch.dealt_to(slot) if self._requests[key].phase == phase]
                for slot in self.ready
            }
            slot = max(left, key=lambda slot: len(left[slot]))
            num_left = sum(r.phase == phase for r in self._requests.values())
        return EngineError(
            f"{phase}: {num_left} requests were not done within {timeout_s:.0f} s, {len(left[slot])} of them at "
            f"engine {slot.index}. {slot.last_words()}"
        )

    def _deal(self) -> None:
        for slot, key in self._dispatch.deal():
            request = self._requests[key]
            ref = slot.actor.generate.remote(request.name, request.token_ids, request.sampling)
            ref.future().add_done_callback(
                lambda answer, slot=slot, key=key, request=request: self._events.put((slot, key, request, answer))
            )

    def _serve(self) -> None:
        """The thread: answers as they come, and health in between."""
        asked = time.monotonic()
        while True:
            try:
                event = self._events.get(timeout=HEALTH_EVERY_S)
            except queue.Empty:
                event = ()
            if event is None:
                return
            try:
                if event:
                    self._take(*event)
                if time.monotonic() - asked > HEALTH_EVERY_S and not self._refitting:
                    asked = time.monotonic()
                    self._check_health()
            except EnginesLost:
                pass  # those who wait ask check()
            except EngineError as e:
                self._give_up(e)
            except BaseException as e:  # a silent end of this thread would be a run that hangs
                self._give_up(EngineError(f"engines: {e!r}"))
                raise

    def _take(self, slot: Slot, key: Key, request: _Request, answer: Future) -> None:
        with self._lock:
            # Cancelled, or taken from it, since.
            if self._requests.get(key) is not request or self._dispatch.owner(key) is not slot:
                return
            error = answer.exception()
            if isinstance(error, Unservable):
                self._end(slot, key)
                request.answer.set_exception(RequestError(f"{request.phase}: {_last_line(error)}"))
                return
            problem = _last_line(error) if error is not None else _problem_with(answer.result(), request.sampling)
            if problem is not None:
                self.lose(slot, request.phase, problem)
                return
            self._end(slot, key)
        request.answer.set_result(answer.result())

    def _end(self, slot: Slot, key: Key) -> None:
        self._dispatch.done(slot, key)
        del self._requests[key]
        self._deal()

    def _give_up(self, error: EngineError) -> None:
        with self._lock:
            self._failed = error
            requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request.answer.set_exception(error)

    # --- health and failure -------------------------------------------------------------------------------------------

    def _check_health(self) -> None:
        """Loses engines that do not answer, or say that they cannot go on."""
        for slot in self.ready:
            if slot.ping is None:
                slot.ping = slot.actor.health.remote(), time.monotonic()
                continue
            ref, sent = slot.ping
            if ray.wait([ref], timeout=0)[0]:
                slot.ping = None
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    self.lose(slot, self._phase_of(slot), _last_line(e))
            elif time.monotonic() - sent > self._cfg.health_timeout_s:
                self.lose(slot, self._phase_of(slot), f"did not answer for {self._cfg.health_timeout_s:.0f} s")

    def _phase_of(self, slot: Slot) -> str:
        with self._lock:
            return next((self._requests[key].phase for key in self._dispatch.dealt_to(slot)), "idle")

    def lose(self, slot: Slot, phase: str, problem: str) -> None:
        """Ends an engine, has another take its place, and gives its requests to the others.

        Raises EngineError after engine.max_failures failures, EnginesLost if none is left.
        """
        with self._lock:
            if self._slots[slot.index] is not slot:  # by the other thread
                return
            self.num_failures += 1
            left = self._dispatch.leave(slot) if slot.ready else []
            slot.ready, self._slots[slot.index] = False, None
            what = f"{phase}: engine {slot.index} failed: {problem}. {slot.last_words()}"
            _kill(slot)
            if self.num_failures > self._cfg.max_failures:
                raise EngineError(
                    f"{what}\nfailure {self.num_failures} of engines, and engine.max_failures = "
                    f"{self._cfg.max_failures}"
                )
            print(
                f"{what}\n{len(left)} of its requests go to the {len(self.ready)} other engines; a replacement is "
                f"started{' by the next refit' if self._in_turns else ''}",
                flush=True,
            )
            if not self._in_turns:
                self._fill()
            self._deal()
            if not self.ready:
                raise EnginesLost(what)

    @contextlib.contextmanager
    def refitting(self):
        """While it is open nobody else asks after the engines' health: a refit has its own deadlines, and they may be
        busy."""
        self._refitting = True
        try:
            yield
        finally:
            for slot in self.ready:
                slot.ping = None
            self._refitting = False

    def assemble(self, phase: str) -> list[Slot]:
        """The engines that take part from now on, for the caller to refit them: those that answer, and replacements
        that have started. A replacement that does not start is a failure as any other.

        Waits for one if none is left, and where they take turns with trainers, which have given their memory back now,
        for all. Raises EngineError after engine.max_failures failures.
        """
        self._raise_if_failed()
        _, failed = self.collect({slot: slot.actor.health.remote() for slot in self.ready}, self._cfg.health_timeout_s)
        for slot, problem in failed.items():
            with contextlib.suppress(EnginesLost):
                self.lose(slot, phase, problem)
        if self._in_turns:
            self._fill()
        while over := self._next_start(wait=self._in_turns or not self.ready):
            replacement, why = over
            if why is None:
                self._admit(replacement)
                continue
            with contextlib.suppress(EnginesLost):
                self.lose(replacement, "engine start", why)
            if not self.ready:
                self._fill()
        return self.ready

    def _raise_if_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    # --- calls to all -------------------------------------------------------------------------------------------------

    def call(self, slots: Sequence[Slot], method: str, args: Sequence[tuple] | tuple = ()) -> dict[Slot, ray.ObjectRef]:
        """Starts `method` on these engines, with the same arguments (a tuple) or each with its own (a list); `collect`
        waits."""
        each = args if isinstance(args, list) else [args] * len(slots)
        return {slot: getattr(slot.actor, method).remote(*arg) for slot, arg in zip(slots, each, strict=True)}

    def collect(self, refs: dict[Slot, ray.ObjectRef], timeout_s: float) -> tuple[dict, dict[Slot, str]]:
        """(results by engine, what went wrong by engine) of `call`."""
        done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        done = set(done)
        results, failed = {}, {}
        for slot, ref in refs.items():
            try:
                if ref in done:
                    results[slot] = ray.get(ref)
                else:
                    failed[slot] = f"did not answer within {timeout_s:.0f} s"
            except ray.exceptions.RayError as e:
                failed[slot] = _last_line(e)
        return results, failed

    def sleep(self, timeout_s: float) -> None:
        """They give their GPUs' memory back, until the next refit. Raises EngineError after engine.max_failures
        failures."""
        _, failed = self.collect(self.call(self.ready, "sleep"), timeout_s)
        for slot, problem in failed.items():
            with contextlib.suppress(EnginesLost):
                self.lose(slot, "sleep", problem)

    def stop(self) -> None:
        self._events.put(None)
        for slot in filter(None, self._slots):
            _kill(slot)
        ray.shutdown()


def _kill(slot: Slot) -> None:
    ray.kill(slot.actor)
    if slot.host == socket.gethostname():  # Ray asks a process to end itself: one that is stopped cannot
        for process_id in slot.process_ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


def _problem_with(completions: Sequence[Completion], sampling: Sampling) -> str | None:
    """What an engine may not answer."""
    if len(completions) != sampling.num_responses:
        return f"garbage: {len(completions)} responses where {sampling.num_responses} were asked for"
    for c in completions:
        if not 0 < len(c.token_ids) <= sampling.max_tokens or len(c.logprobs) != len(c.token_ids):
            return (
                f"garbage: a response of {len(c.token_ids)} tokens with {len(c.logprobs)} log-probs, where 1 to "
                f"{sampling.max_tokens} tokens were asked for"
            )
        if not all(-math.inf < lp <= 1e-3 for lp in c.logprobs):  # NaN fails too
            return "garbage: a log-prob that is none"
        if sum(n for _, n in c.versions) != len(c.token_ids):
            return f"garbage: {len(c.token_ids)} tokens, of which {sum(n for _, n in c.versions)} have a policy version"
    return None


def _last_line(e: BaseException) -> str:
    """Of a traceback from an engine; when the engine is gone Ray has an essay on it, of which the start says what
    happened."""
    if isinstance(e, ray.exceptions.RayActorError):
        return "its process is gone"
    return str(e).strip().splitlines()[-1]
