"""Which engine samples what. Decisions only: no engine, no clock. engines.py drives it with real engines, simulate.py
in virtual time.

A request is one prompt with its responses; its key is unique, and keys are served in their order. It goes to the engine
with the fewest responses to sample. An engine holds what it runs at once and as much again, so that it never waits for
more; what is beyond that waits here, where any engine can take it. Requests of one conversation go to the engine that
has had the first of them, whose cache holds their beginning, unless it is full.
"""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = tuple[int, ...]
Engine = TypeVar("Engine", bound=Hashable)


class Dispatch(Generic[Engine]):
    def __init__(self, max_running_responses: int):
        """`max_running_responses` of one engine."""
        self._capacity = 2 * max_running_responses
        self._waiting: list[Key] = []  # a heap
        self._num_responses: dict[Key, int] = {}  # of all requests, waiting or dealt
        self._conversation: dict[Key, Key] = {}  # of those that are of one
        self._home: dict[Key, Engine] = {}  # of conversations
        self._owner: dict[Key, Engine] = {}  # of those dealt
        self._dealt: dict[Engine, set[Key]] = {}
        self._load: dict[Engine, int] = {}  # responses dealt
        # a heap of (load, tie, engine); entries whose load has moved are skipped
        self._by_load: list[tuple[int, int, Engine]] = []
        self._ties: dict[Engine, int] = {}  # equal loads: the engine that joined first
        self._num_joined = 0

    @property
    def engines(self) -> list[Engine]:
        return list(self._dealt)

    @property
    def num_waiting(self) -> int:
        return len(self._num_responses) - len(self._owner)

    @property
    def num_dealt(self) -> int:
        return len(self._owner)

    def owner(self, key: Key) -> Engine | None:
        return self._owner.get(key)

    def dealt_to(self, engine: Engine) -> list[Key]:
        return sorted(self._dealt[engine])

    def join(self, engine: Engine) -> None:
        """The engine takes requests from now on."""
        self._dealt[engine], self._ties[engine] = set(), self._num_joined
        self._num_joined += 1
        self._set_load(engine, 0)

    def leave(self, engine: Engine) -> list[Key]:
        """The engine takes part no longer; its requests wait again, and are returned."""
        left = sorted(self._dealt.pop(engine))
        del self._load[engine], self._ties[engine]
        for key in left:
            del self._owner[key]
            heapq.heappush(self._waiting, key)
        return left

    def submit(self, key: Key, num_responses: int, conversation: Key | None = None) -> None:
        """Raises ValueError for a key that is under way already."""
        if key in self._num_responses:
            raise ValueError(f"request {key} is under way already")
        self._num_responses[key] = num_responses
        if conversation is not None:
            self._conversation[key] = conversation
        heapq.heappush(self._waiting, key)

    def deal(self) -> Iterator[tuple[Engine, Key]]:
        """What goes to which engine now."""
        while self._waiting and self._by_load:
            load, tie, engine = self._by_load[0]
            if self._load.get(engine) != load or self._ties[engine] != tie:
                heapq.heappop(self._by_load)
                continue
            if load >= self._capacity:
                return
            key = heapq.heappop(self._waiting)
            if key not in self._num_responses or key in self._owner:  # cancelled; cancelled and submitted again
                continue
            if (conversation := self._conversation.get(key)) is not None:
                home = self._home.get(conversation)
                if home in self._load and self._load[home] < self._capacity:
                    engine = home
                self._home[conversation] = engine
            self._owner[key] = engine
            self._dealt[engine].add(key)
            self._set_load(engine, self._load[engine] + self._num_responses[key])
            yield engine, key

    def done(self, engine: Engine, key: Key) -> bool:
        """Whether this answer counts: not if the request was taken from the engine meanwhile, so that none is answered
        twice."""
        if self._owner.get(key) != engine:
            return False
        self._forget(key)
        return True

    def end(self, conversation: Key) -> None:
        """No more requests of it will come."""
        self._home.pop(conversation, None)

    def cancel(self, key: Key) -> Engine | None:
        """Drops a request. Returns the engine that had it."""
        engine = self._owner.get(key)
        if engine is not None:
            self._forget(key)
        else:
            self._num_responses.pop(key, None)  # its place in the heap is skipped
            self._conversation.pop(key, None)
        return engine

    def _forget(self, key: Key) -> None:
        engine = self._owner.pop(key)
        self._conversation.pop(key, None)
        self._dealt[engine].remove(key)
        self._set_load(engine, self._load[engine] - self._num_responses.pop(key))

    def _set_load(self, engine: Engine, load: int) -> None:
        self._load[engine] = load
        heapq.heappush(self._by_load, (load, self._ties[engine], engine))
