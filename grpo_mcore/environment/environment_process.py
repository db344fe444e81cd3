"""The process that plays the user's environments and agents: `python -m grpo_mcore.environment.environment_process`.

An agent is `async def run(session, row)`, which may call `await session.generate(...)` and returns a reward or None. An
environment class is played by one: `play`. A session is started by a question, and each of its replies asks for a turn,
or ends it:

    ("start", id, messages, row)    ->  {"generate": conversation or text or None}
    ("go on", id, reply)            ->  {"generate": ...} or {"reward": number or None}
    ("end", id)                     ->  {}
"""

import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_mcore.environment import tools
from grpo_mcore.reward import channel
from grpo_mcore.reward.function_process import Unusable, load, number, words

MANY = 100_000  # questions at a time: sessions that wait for nothing of each other
NUM_THREADS = 1024  # for methods that are not async
NO_TOOLS = ("reset", "get_reward", "close")
Agent = Callable[["Session", Mapping[str, Any]], Coroutine[Any, Any, Any]]


class Ended(Exception):
    """The session is over: no turn can be sampled."""


class Session:
    """What an agent sees of its session."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]):
        self.messages: list[dict[str, Any]] = [dict(m) for m in messages]
        self.truncated = False  # the last turn hit the limit of tokens
        self.asks: asyncio.Queue[Any] = asyncio.Queue()
        self.replies: asyncio.Queue[Any] = asyncio.Queue()

    async def generate(self, then: "str | Sequence[Mapping[str, Any]] | None" = None) -> str:
        """The model's next turn: to the conversation as it is (None), to a user's text behind it, or to a conversation
        that begins with what was recorded (the first turn: to any). Raises Ended."""
        if isinstance(then, str):
            then = [*self.messages, {"role": "user", "content": then}]
        conversation = [dict(m) for m in (self.messages if then is None else then)]
        await self.asks.put({"generate": conversation})
        reply = await self.replies.get()
        if "ended" in reply:
            raise Ended(reply["ended"])
        self.messages = [*conversation, {"role": "assistant", "content": reply["text"]}]
        self.truncated = reply["truncated"]
        text: str = reply["text"]
        return text


class Played:
    """An environment class as an agent: public methods are tools, called as the model's text says, until it calls none.

    `reset(**row)` begins a session, and what it returns stands behind the prompt's last message; `get_reward()`, if
    there is one, ends it.
    """

    def __init__(self, cls: type, max_turns: int):
        self._cls, self._max_turns = cls, max_turns
        methods = {
            name: method
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") and name not in NO_TOOLS
        }
        if not methods:
            raise Unusable(f"{cls.__name__} has no public method that could be a tool")
        self.schemas = [_schema(cls, name, method) for name, method in methods.items()]
        self._names = set(methods)

    async def __call__(self, session: Session, row: Mapping[str, Any]) -> Any:
        environment = await asyncio.to_thread(self._cls)
        said = await _called(environment.reset, **row) if hasattr(environment, "reset") else None
        if said is None:
            text = await session.generate()
        else:
            *before, last = session.messages
            text = await session.generate([*before, {**last, "content": f"{last['content']}\n{said}"}])
        for _ in range(self._max_turns - 1):
            calls = tools.calls(text)
            if not calls or session.truncated:
                break
            answers = [{"role": "tool", "content": await self._answer(environment, call)} for call in calls]
            try:
                text = await session.generate([*session.messages, *answers])
            except Ended:
                break
        return await _called(environment.get_reward) if hasattr(environment, "get_reward") else None

    async def _answer(self, environment: object, call: tools.Call | tools.Malformed) -> str:
        """What the model sees of a call."""
        if isinstance(call, tools.Malformed):
            return call.error
        if call.name not in self._names:
            return f"error: there is no tool {call.name!r}; there are {', '.join(sorted(self._names))}"
        method = getattr(environment, call.name)
        try:
            inspect.signature(method).bind(**call.arguments)
        except TypeError as e:
            return f"error: {call.name}: {e}"
        try:
            return str(await _called(method, **call.arguments))
        except Exception as e:  # the tool's own: the model may mend its call
            return f"error: {type(e).__name__}: {e}"


async def _called(function: Callable[..., Any], **arguments: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    return await asyncio.to_thread(function, **arguments)


def _schema(cls: type, name: str, method: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    if untyped := [p.name for p in parameters if p.annotation is p.empty]:
        raise Unusable(f"{cls.__name__}.{name} has no type hint for {', '.join(untyped)}: the model is told them")
    try:
        schema: dict[str, Any] = get_json_schema(method)
    except Exception as e:  # of several classes: no docstring, an argument that it leaves out
        raise Unusable(f"{cls.__name__}.{name} does not say what the model is to be told: {e}") from None
    return schema


class Stage:
    """The sessions of this process."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self._sessions: dict[int, tuple[Session, asyncio.Task[Any]]] = {}

    async def __call__(self, question: tuple[Any, ...]) -> dict[str, Any]:
        kind, name, *more = question
        if kind == "start":
            session = Session(more[0])
            self._sessions[name] = session, asyncio.create_task(self._agent(session, more[1]))
        elif name not in self._sessions:
            return {} if kind == "end" else {"error": "its process has ended since it began"}
        elif kind == "end":
            self._sessions.pop(name)[1].cancel()
            return {}
        else:
            await self._sessions[name][0].replies.put(more[0])
        session, task = self._sessions[name]
        asks = asyncio.create_task(session.asks.get())
        try:
            await asyncio.wait((task, asks), return_when=asyncio.FIRST_COMPLETED)
            if asks.done():
                asked: dict[str, Any] = asks.result()
                return asked
            del self._sessions[name]
            return _result(task)
        except asyncio.CancelledError:  # the clock: it will not be asked again
            self._sessions.pop(name, (None, task))[1].cancel()
            raise
        finally:
            asks.cancel()


def _result(task: "asyncio.Task[Any]") -> dict[str, Any]:
    try:
        result = task.result()
        extra = {}
        if isinstance(result, Mapping):
            if "score" not in result:
                raise Unusable("it returned a dict without 'score'")
            extra = {str(k): v for k, v in result.items() if k != "score" and isinstance(v, (int, float, str))}
            result = result["score"]
        return {"reward": number(result), "extra": extra}
    except Ended as e:
        return {"reward": None, "extra": {}, "ended": str(e)}
    except Exception as e:
        return {"error": words(e, __file__)}


def _serve(path: str, max_turns: int, wall_s: float, memory_bytes: int) -> None:
    to_parent = channel.Channel()
    try:
        found = load(path, classes=True)
        agent: Agent
        schemas: list[dict[str, Any]] = []
        if inspect.isclass(found):
            agent = played = Played(found, max_turns)
            schemas = played.schemas
        elif inspect.iscoroutinefunction(found):
            if len(inspect.signature(found).parameters) != 2:
                raise Unusable("an agent is async def run(session, row)")
            agent = found
        else:
            raise Unusable("it is neither an environment's class nor async def run(session, row)")
    except Exception as e:
        to_parent.ready(error=words(e, __file__))
        return
    channel.limit_memory(memory_bytes)
    to_parent.ready(tools=schemas, **{channel.AT_ONCE: MANY})
    asyncio.run(_play_all(to_parent, Stage(agent), wall_s))


async def _play_all(to_parent: channel.Channel, stage: Stage, wall_s: float) -> None:
    # A method that hangs keeps its thread: it must not be one of a few.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_THREADS))
    await to_parent.serve_many(stage, wall_s)


if __name__ == "__main__":
    _serve(sys.argv[1], *json.loads(sys.argv[2]))
