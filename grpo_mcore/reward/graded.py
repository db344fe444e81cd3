"""A group of responses and what the grader said of each."""

from dataclasses import dataclass

from grpo_mcore.reward.grader import Verdict
from grpo_mcore.types import Group


@dataclass(frozen=True)
class Graded:
    position: int  # of its prompt in the stream (of an evaluation: in the list of prompts)
    group: Group
    verdicts: tuple[Verdict, ...]  # of the group's responses, in their order

    @property
    def rewards(self) -> list[float]:
        """G of them, before shaping."""
        return [verdict.reward for verdict in self.verdicts]
