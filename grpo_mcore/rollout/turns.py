"""Responses of several turns: each is a session, whose turns the engines sample one by one, and what is given between
them comes from its environment.

A session's turns are seeded as a response's is, so it is a function of (seed, position, sample, weights) as long as its
environment is one of what it is told.
"""

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace

from grpo_mcore.config import config
from grpo_mcore.data.prompts import Tokenizer
from grpo_mcore.environment.environments import Environments
from grpo_mcore.environment.session import Refused, Session
from grpo_mcore.reward.grader import Status
from grpo_mcore.reward.killable import Stopped
from grpo_mcore.rollout.dispatch import Key
from grpo_mcore.rollout.engine import Completion, Sampling
from grpo_mcore.rollout.engines import Engines
from grpo_mcore.types import Outcome, Prompt

SEED_OF_TURN = 7919  # between the seeds of a session's turns


@dataclass(frozen=True)
class _Request:
    key: Key
    prompt: Prompt
    sampling: Sampling
    phase: str


class Turns:
    """Plays sessions. A thread with an event loop; any thread may ask."""

    def __init__(self, engines: Engines, environments: Environments, tokenizer: Tokenizer, data: config.Data):
        self._engines, self._environments, self._tokenizer, self._data = engines, environments, tokenizer, data
        self._loop = asyncio.new_event_loop()
        self._groups: dict[Key, Future[list[Completion]]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="turns", daemon=True)
        self._thread.start()

    def submit(self, key: Key, prompt: Prompt, sampling: Sampling, phase: str) -> "Future[list[Completion]]":
        """As Engines.submit, of whole sessions."""
        request = _Request(key, prompt, sampling, phase)
        answer = self._groups[key] = asyncio.run_coroutine_threadsafe(self._group(request), self._loop)
        answer.add_done_callback(lambda _: self._groups.pop(key, None))
        return answer

    def cancel(self, key: Key) -> None:
        """Ends the sessions of a request."""
        if (answer := self._groups.get(key)) is not None:
            answer.cancel()

    def close(self) -> None:
        for key in list(self._groups):
            self.cancel(key)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _group(self, request: _Request) -> list[Completion]:
        sessions = [self._session(request, sample) for sample in range(request.sampling.num_responses)]
        try:
            return list(await asyncio.gather(*sessions))
        finally:
            self._engines.end_conversation(request.key)

    async def _session(self, request: _Request, sample: int) -> Completion:
        """Raises what Engines' answers fail with, and StartError."""
        session = Session(request.prompt, request.sampling.max_tokens)
        name, answer = self._environments.start(request.prompt.messages, request.prompt.row)
        try:
            outcome = await self._play(session, request, sample, name, answer)
        finally:
            self._environments.end(name)
        if not session.num_turns:  # a response has a token at least
            await self._sample(session, request, sample)
        return Completion(
            session.token_ids,
            session.logprobs,
            session.truncated,
            tuple(session.versions),
            tuple(session.given),
            replace(outcome, num_turns=session.num_turns),
            session.prompt if session.prompt is not request.prompt else None,
        )

    async def _play(
        self, session: Session, request: _Request, sample: int, name: int, answer: "Future[object]"
    ) -> Outcome:
        while True:
            reply = await asyncio.wrap_future(answer)
            if isinstance(reply, Stopped):
                return Outcome(None, Status.TIMED_OUT if reply.is_limit else Status.FAILED, reply.cause)
            assert isinstance(reply, dict)
            if "error" in reply:
                return Outcome(None, Status.FAILED, reply["error"].splitlines()[-1])
            if "generate" not in reply:
                status = Status.NOT_APPLICABLE if reply["reward"] is None else Status.SCORED
                return Outcome(reply["reward"], status, reply.get("ended", ""), reply["extra"])
            try:
                has_room = session.go_on(reply["generate"], self._tokenizer, self._data)
            except Refused as e:
                return Outcome(None, Status.FAILED, f"refused: {e}")
            if not has_room or session.room < 1:
                session.truncated = True
                answer = self._environments.go_on(name, {"ended": "no token is left for another turn"})
                continue
            text = await self._sample(session, request, sample)
            answer = self._environments.go_on(name, {"text": text, "truncated": session.truncated})

    async def _sample(self, session: Session, request: _Request, sample: int) -> str:
        """The text of one more turn."""
        turn = session.num_turns
        key = (*request.key, sample, turn)
        seed = (request.sampling.seed + sample + SEED_OF_TURN * turn) % 2**31
        sampling = replace(request.sampling, num_responses=1, max_tokens=session.room, seed=seed)
        prompt = (*session.prompt.token_ids, *session.token_ids)
        try:
            # The sessions of a prompt begin alike, and stay where that is cached.
            answer = self._engines.submit(key, prompt, sampling, request.phase, request.key)
            (c,) = await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._engines.cancel([key])
            raise
        text = self._tokenizer.decode(c.token_ids)
        session.take(c.token_ids, c.logprobs, c.versions, c.truncated, text)
        return text


def open_turns(cfg: config.Config, engines: Engines, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> Turns | None:
    """None without an environment. Raises InputError."""
    if cfg.environment is None:
        return None
    environments = stack.enter_context(Environments(cfg.environment))
    turns = Turns(engines, environments, tokenizer, cfg.data)
    stack.callback(turns.close)
    return turns
