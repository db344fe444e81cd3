"""Which source of a mixture stands at which position of its order, and how many of that source stand before it. Pure.

Weights are whole numbers after data_sources.shares: 3 : 1 makes a block of 4 positions, which repeats and has exactly 3
of the first source. Within a block the source goes next that is furthest behind its share, so that in every stretch of
the order, a step's prompts too, the shares are as near as whole prompts can be:

    3 : 1    0 0 1 0 | 0 0 1 0 | ...
    1 : 1    0 1 | 0 1 | ...
"""

from collections.abc import Sequence

from grpo_mcore.config import data_sources


class Mixture:
    def __init__(self, weights: Sequence[float]):
        """`weights` of the sources, above 0."""
        self._shares = data_sources.shares(weights)
        block, behind = sum(self._shares), [0] * len(weights)
        counts = [0] * len(weights)
        self._block: list[tuple[int, int]] = []  # position in a block -> (source, how many of it stand before)
        for _ in range(block):
            behind = [b + share for b, share in zip(behind, self._shares, strict=True)]
            source = max(range(len(behind)), key=lambda i: (behind[i], -i))
            behind[source] -= block
            self._block.append((source, counts[source]))
            counts[source] += 1

    def at(self, position: int) -> tuple[int, int]:
        """(source, its cursor: how many of its prompts stand before `position`)"""
        blocks, index = divmod(position, len(self._block))
        source, before = self._block[index]
        return source, blocks * self._shares[source] + before
