"""Which prompts may be sampled when, and which groups make a step. Decisions only, as dispatch.py.

A prompt is its position in the endless stream, which is also its name in the run. Steps take groups in the order of the
stream, never in that of arrival: which prompts a step trains on does not depend on how long their responses are. While
a step is waited for, its policy is version `step`, and max_staleness further steps are being sampled:

    prompts_per_step 2, max_staleness 1       step 0 waits for 0 1;  0 1 2 3 may be sampled, all with version 0
                                              step 1 waits for 2 3;  now also 4 5, begun with version 1

so the group at position p is begun with version p // prompts_per_step - max_staleness or a later one, and no token is
staler than max_staleness when it is trained on. 0 is the synchronous run. What is unfinished when a step ends goes on
in the next.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no gradient. It is
passed over, and one more prompt is drawn for it, up to max_draws * prompts_per_step prompts for one step; then such
groups fill the step. Over-sampling draws prompts ahead of that need. One that turns out not to be needed in time, so
that its tokens would become too stale, is dropped and sampled anew when its turn comes.

A prompt that is left out (data.max_pass_rate) is as if it did not stand in the stream.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """The groups of one step."""

    positions: list[int]
    passed_over: int  # groups without variance that were not needed
    kept: int  # groups without variance that had to fill the step


@dataclass
class _Group:
    version: int  # of the policy when it was begun
    has_variance: bool | None = None  # None: not arrived


class Admission:
    def __init__(
        self,
        *,
        prompts_per_step: int,
        max_staleness: int = 0,
        dynamic_sampling: bool = False,
        oversampling_frac: float = 0.0,
        max_draws: float = 1.0,
        cursor: int = 0,
        num_steps: float = math.inf,
        is_left_out: Callable[[int], bool] = lambda position: False,
    ):
        """`cursor`: positions before it have been trained on, or passed over. `oversampling_frac` and `max_draws` are
        multiples of prompts_per_step, and of no effect without dynamic sampling. Nothing is sampled ahead for steps
        from num_steps on. `is_left_out`: of the prompt at a position; what is left out stays so."""
        self._P, self._num_steps = prompts_per_step, num_steps
        self._max_staleness, self._dynamic = max_staleness, dynamic_sampling
        self._extra = math.ceil(oversampling_frac * prompts_per_step) if dynamic_sampling else 0
        self._max_draws = int(max_draws * prompts_per_step) if dynamic_sampling else prompts_per_step
        self._left_out = is_left_out
        self._groups: dict[int, _Group] = {}
        self._version = 0
        self._missing = cursor  # a position that the step cannot do without
        self.cursor = cursor
        self.num_dropped = 0  # groups that became too stale

    def begin(self, version: int) -> tuple[list[int], list[int]]:
        """(positions that may be sampled from now on, those to be dropped first): the policy has this version now."""
        self._version = version
        stale = [p for p, g in self._groups.items() if g.version < version - self._max_staleness]
        for position in stale:
            del self._groups[position]
        self.num_dropped += len(stale)
        return self._admit(), stale

    def arrived(self, position: int, has_variance: bool) -> list[int]:
        """The positions that may be sampled because of it."""
        self._groups[position].has_variance = has_variance
        return self._admit() if self._dynamic and not has_variance else []

    def take(self) -> Taken | None:
        """The step's groups, once all of them have arrived; the cursor moves behind them."""
        if self._missing in self._groups and not self._has_arrived(self._missing):
            return None
        found: list[int] = []
        flat: list[int] = []
        end = self.cursor
        while len(found) < self._P and len(found) + len(flat) < self._max_draws:
            position, end = end, end + 1
            if self._has_arrived(position):
                group = self._groups[position]
                (found if group.has_variance or not self._dynamic else flat).append(position)
            elif not self._is_left_out(position):
                self._missing = position
                return None
        filling = flat[: self._P - len(found)]
        for p in range(self.cursor, end):
            self._groups.pop(p, None)  # not there: it was left out
        self.cursor = self._missing = end
        return Taken(sorted(found + filling), len(flat) - len(filling), len(filling))

    def _has_arrived(self, position: int) -> bool:
        return position in self._groups and self._groups[position].has_variance is not None

    def _is_left_out(self, position: int) -> bool:
        """What was begun before its prompt was left out counts."""
        return position not in self._groups and self._left_out(position)

    def _admit(self) -> list[int]:
        """As many positions as the window has room for, from the cursor on."""
        steps = min(self._max_staleness + 1, self._num_steps - self._version)
        most = self._max_draws + (steps - 1) * self._P + self._extra
        admitted, hopeful, drawn, position = [], 0, 0, self.cursor
        while hopeful < steps * self._P + self._extra and drawn < most:
            if not self._is_left_out(position):
                group = self._groups.get(position)
                if group is None:
                    group = self._groups[position] = _Group(self._version)
                    admitted.append(position)
                hopeful += not self._dynamic or group.has_variance is not False
                drawn += 1
            position += 1
        return admitted
