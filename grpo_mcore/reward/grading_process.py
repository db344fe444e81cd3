r"""The process that compares answers, which may take for ever: `python -m grpo_mcore.reward.grading_process`.

It gets the boxed answer and the gold answer, never a response's text.
"""

import logging
import resource
import sys
from typing import NamedTuple

from grpo_mcore.reward import channel, killable
from grpo_mcore.reward.verifiers import VERIFIERS


class Question(NamedTuple):
    verifier: str  # a key of VERIFIERS
    answer: str
    gold: str


def pool(limits: killable.Limits, num_processes: int) -> killable.Pool:
    """Of processes whose reply is [equal, the rule that decided]."""
    command = (__name__, repr(limits.cpu_s), str(limits.memory_bytes))
    remedy = f"install math-verify, or raise memory_bytes = {limits.memory_bytes}"
    return killable.Pool(command, limits, num_processes=num_processes, remedy=remedy)


def _compare(question: Question) -> tuple[bool, str]:
    verifier, answer, gold = question
    return VERIFIERS[verifier].compare(answer, gold)


def _serve(cpu_s: float, memory_bytes: int) -> None:
    to_parent = channel.Channel()
    channel.limit(resource.RLIMIT_AS, memory_bytes)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    for verifier in VERIFIERS.values():
        verifier.compare("x+1", "1+x")  # the imports and the parser's tables belong to the start-up
    to_parent.ready()
    to_parent.serve(_compare, cpu_s)


if __name__ == "__main__":
    _serve(cpu_s=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
