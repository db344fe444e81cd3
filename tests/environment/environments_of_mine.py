"""Environments and agents as users bring them. Read by tests, as a file."""

import asyncio
import itertools
import os
import pathlib
import time


class Calculator:
    """Adds and multiplies."""

    def reset(self, **row):
        self.gold, self.calls = row.get("answer"), 0

    def add(self, a: int, b: int) -> int:
        """
        Adds two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.calls += 1
        return a + b

    def divide(self, a: float, b: float) -> float:
        """
        Divides a number by another.

        Args:
            a: The one.
            b: The other.
        """
        return a / b

    def wait(self, seconds: float) -> str:
        """
        Waits.

        Args:
            seconds: For so long.
        """
        time.sleep(seconds)
        return "done"

    def fill(self, gigabytes: int) -> str:
        """
        Takes memory.

        Args:
            gigabytes: So much.
        """
        return str(len(bytes(gigabytes << 30)))

    def get_reward(self):
        return {"score": self.calls, "gold": self.gold}


class Game:
    def reset(self, **row):
        return "the door is shut"

    def open(self) -> str:
        """Opens the door."""
        return "it is open"


class Untyped:
    def look(self, where):
        """Looks."""


class Silent:
    def look(self, where: str) -> str:
        return where


class Empty:
    pass


async def three_turns(session, row):
    """Of which the first has a prompt of its own."""
    own = [{"role": "user", "content": f"1{session.messages[-1]['content']}"}]
    texts = [await session.generate(own)]
    texts.append(await session.generate("12+34="))
    texts.append(await session.generate([*session.messages, {"role": "user", "content": "5+6="}]))
    return {"score": sum(map(len, texts)) / 100, "first": texts[0]}


async def three_turns_slowly(session, row):
    """A file says that a session is between two turns."""
    text = await session.generate()
    if between := os.environ.get("TEST_BETWEEN"):
        pathlib.Path(between).touch()
    await asyncio.sleep(0.3)
    return len(text + await session.generate("12+34=")) / 100


async def rewrites(session, row):
    await session.generate()
    await session.generate([{"role": "user", "content": "another"}])


async def says_nothing(session, row):
    return None


async def raises(session, row):
    await session.generate()
    raise KeyError("no such thing")


async def sleeps(session, row):
    await session.generate()
    await asyncio.sleep(1000)


async def for_ever(session, row):
    await session.generate()
    while True:
        await session.generate("1+1=")


def not_async(session, row):
    return 1.0


TURN = itertools.count()


async def one_of_many(session, row):
    """Each session of a process has another one of those that fail."""
    return await (rewrites, raises, says_nothing, for_ever, sleeps)[next(TURN) % 5](session, row)
