"""A vLLM engine in virtual time: what it does with its requests, and when something changes.

Responses run in the order in which they came, at most max_running_responses and what the cache holds; without room for
the next tokens the youngest response goes back to the queue. What happens within an iteration takes effect at its end.
A prompt is computed when its first response starts, its siblings find all whole blocks of it. Between two changes every
running response gains one token an iteration, so that their ends keep their order on the engine's count of iterations.
"""

import heapq
from collections import deque

from grpo_mcore.plan.cluster import Draw, EngineProfile
from grpo_mcore.rollout.dispatch import Key


class Attempt:
    """A request at an engine."""

    __slots__ = ("cancelled", "draw", "key", "left", "prompt_computed", "spans")

    def __init__(self, key: Key, draw: Draw):
        self.key, self.draw = key, draw
        # (version, tokens) of each response
        self.spans: list[list[tuple[int, int]]] = [[] for _ in draw.response_tokens]
        self.left = len(draw.response_tokens)
        self.cancelled = self.prompt_computed = False


class _Response:
    __slots__ = ("attempt", "index", "since", "tokens")

    def __init__(self, attempt: Attempt, index: int):
        self.attempt, self.index = attempt, index
        self.tokens = 0  # credited to versions
        self.since = 0  # iteration up to which they are

    @property
    def length(self) -> int:
        return self.attempt.draw.response_tokens[self.index]

    @property
    def context(self) -> int:
        return self.attempt.draw.prompt_tokens + self.tokens


class SimulatedEngine:
    """Lazily up to date: `settle` brings it to the present before anything is done to it from outside."""

    def __init__(self, profile: EngineProfile, max_running_responses: int, version: int, at: float):
        self._profile, self._max_running = profile, max_running_responses
        self.version = version
        self.at = at  # the iteration under way began then; idle: none begins before
        self.iteration = 0  # number of those before it
        self.ahead = 0  # iterations to the next change
        self.busy_s: float = 0
        self.slots_s: float = 0
        self.preemptions = 0
        self._cancelled = False  # something that runs
        self.attempts: dict[Key, Attempt] = {}
        self._kv = 0  # tokens in the cache
        self._queue: deque[_Response] = deque()
        self._running: list[tuple[int, int, _Response]] = []  # a heap by (iteration of the end, order of the start)
        self._num_started = 0

    def add(self, attempt: Attempt) -> None:
        self.attempts[attempt.key] = attempt
        self._queue.extend(_Response(attempt, i) for i in range(attempt.left))

    def cancel(self, key: Key) -> None:
        self.attempts.pop(key).cancelled = self._cancelled = True

    def settle(self, now: float) -> None:
        """Counts the iterations that are over."""
        if self._running:
            self._advance(self._profile.iterations_within(now - self.at, len(self._running), self._kv))
        else:
            self.at = max(self.at, now)

    def look_ahead(self) -> float | None:
        """When something changes at the soonest, for `change`. To be called after `settle` and whatever was added or
        cancelled."""
        if not self._running:
            self.ahead = 0
            return self.at if self._queue else None
        self.ahead = self._to_the_next_change()
        if self._cancelled or (self._queue and len(self._running) < self._max_running):
            self.ahead = min(self.ahead, 1)
        return self.at + self._seconds(self.ahead)

    def change(self) -> tuple[list[Attempt], float | None]:
        """(requests that are done, when something changes next), at the time that look_ahead gave."""
        self._advance(self.ahead)
        if self._cancelled:
            self._leave([entry for entry in self._running if entry[2].attempt.cancelled])
            self._cancelled = False
        done = []
        while self._running and self._running[0][0] <= self.iteration:
            response = heapq.heappop(self._running)[2]
            self._credit(response)
            self._kv -= response.context
            response.attempt.left -= 1
            if not response.attempt.left:
                done.append(self.attempts.pop(response.attempt.key))
        self._make_room()
        self._start()
        if not self._running:
            return done, None
        self.ahead = self._to_the_next_change()
        return done, self.at + self._seconds(self.ahead)

    def refit(self, now: float, seconds: float, version: int, *, recompute: bool) -> None:
        """Sampling pauses; what is sampled from now on has this version."""
        self.settle(now)
        for _, _, response in self._running:
            self._credit(response)
        self.version = version
        self.at += seconds
        if recompute and self._running:
            self._prefill(self._kv, 0)

    def _to_the_next_change(self) -> int:
        until_end, n, capacity = self._running[0][0] - self.iteration, len(self._running), self._profile.kv_cache_tokens
        return until_end if capacity is None or n == 1 else min(until_end, max((capacity - self._kv) // n, 1))

    def _seconds(self, iterations: int) -> float:
        return self._profile.decode_s(iterations, len(self._running), self._kv) if iterations else 0

    def _advance(self, iterations: int) -> None:
        seconds, n = self._seconds(iterations), len(self._running)
        self.at += seconds
        self.iteration += iterations
        self._kv += n * iterations
        self.busy_s += seconds
        self.slots_s += n * seconds

    def _credit(self, response: _Response) -> None:
        """Its new tokens, to the version."""
        tokens = self.iteration - response.since
        if tokens:
            response.attempt.spans[response.index].append((self.version, tokens))
        response.tokens += tokens
        response.since = self.iteration

    def _make_room(self) -> None:
        """For the next iteration's tokens."""
        capacity, kept, kv = self._profile.kv_cache_tokens, len(self._running), self._kv
        if capacity is None or kept == 1 or kv + kept <= capacity:
            return
        by_age = sorted(self._running, key=lambda entry: entry[1])
        while kept > 1 and kv + kept > capacity:
            kept -= 1
            response = by_age[kept][2]
            kv -= response.context + self.iteration - response.since
        self._leave(by_age[kept:])
        self._queue.extendleft(response for _, _, response in reversed(by_age[kept:]))
        self.preemptions += len(by_age) - kept

    def _leave(self, entries: list[tuple[int, int, _Response]]) -> None:
        gone = {id(response) for _, _, response in entries}
        for _, _, response in entries:
            self._credit(response)
            self._kv -= response.context
        self._running = [entry for entry in self._running if id(entry[2]) not in gone]
        heapq.heapify(self._running)

    def _start(self) -> None:
        """As many of the queue as there is room for."""
        tokens, started, capacity = 0, 0, self._profile.kv_cache_tokens
        while self._queue and len(self._running) < self._max_running:
            response = self._queue[0]
            if not response.attempt.cancelled:
                n = len(self._running) + 1
                if n > 1 and capacity is not None and self._kv + response.context + n > capacity:
                    break
                tokens += self._prompt_tokens(response)
                started += 1
                response.since = self.iteration
                self._num_started += 1
                self._kv += response.context
                end = self.iteration + response.length - response.tokens
                heapq.heappush(self._running, (end, self._num_started, response))
            self._queue.popleft()
        if started:
            self._prefill(tokens, started)

    def _prompt_tokens(self, response: _Response) -> int:
        """Those to compute: of a sibling only what fills no block of the prefix cache; of one that lost its place
        all."""
        if response.tokens or not response.attempt.prompt_computed:
            response.attempt.prompt_computed = True
            return response.context
        block = self._profile.block_tokens
        return (response.context - 1) % block + 1 if block else response.context

    def _prefill(self, tokens: int, responses: int) -> None:
        seconds = tokens * self._profile.prefill_token_s + responses * self._profile.response_s
        self.at += seconds
        self.busy_s += seconds
        self.slots_s += len(self._running) * seconds
