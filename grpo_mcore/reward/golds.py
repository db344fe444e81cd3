r"""Whether a data set's right answers can be given: each is put into a box, as a response would, and graded against
itself.

What no response can be right about trains nothing, and looks like a model that is always wrong: a whole solution in
the place of its answer ("... #### 72"), or an answer that the verifier does not take for equal to itself.
"""

import time
from collections.abc import Sequence

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.reward.grader import Grader
from grpo_mcore.reward.verifiers import VERIFIERS

SECONDS = 15.0  # algebra may take longer than there is time: then a part of the answers is looked at
AT_ONCE, NUM_EXAMPLES, EXAMPLE_CHARS = 256, 3, 60
# What announces the answer at the end of a solution, and no box of a response holds.
MARKS = {"####": r"####\s*(.+)", "nswer is": r"nswer is:?\s*(.+)"}
BOX = {r"\boxed{": r"\\boxed\{(.+)\}"}  # of which some verifiers take the contents


def check(answers: Sequence[str], cfg: config.Reward, name: str, source: str) -> str | None:
    """What to say of the answers of the data set that `name` = `source` names, if some can never be right. Raises
    InputError if none can."""
    each = list(dict.fromkeys(answers))
    parts, looked, never = -(-len(each) // AT_ONCE), [], []
    end = time.monotonic() + SECONDS
    with Grader(cfg) as grader:
        for part in (each[i::parts] for i in range(parts)):  # each from all over the data set
            looked += part
            never += _never_right(part, cfg, grader)
            if time.monotonic() > end:
                break
    if not never:
        return None
    words = (
        f"{len(never)} of {len(looked)} answers can never be right, by reward.verifier={cfg.verifier}: "
        f"{', '.join(repr(a[-EXAMPLE_CHARS:]) for a in never[:NUM_EXAMPLES])}"
    )
    marks = [pattern for mark, pattern in (MARKS | BOX).items() if sum(mark in a for a in never) > len(looked) / 2]
    remedy = f"set data.answer_regex='{marks[0]}', or name another column" if marks else "name another column"
    if len(never) == len(looked):
        raise InputError(name, source, words, f"{remedy} (data.answer_key)")
    return f"warning: {name}: {words}. Remedy: {remedy} (data.answer_key), or mend or remove these rows"


def _never_right(answers: Sequence[str], cfg: config.Reward, grader: Grader) -> list[str]:
    thought, extract = "</think>" if cfg.require_think else "", VERIFIERS[cfg.verifier].extract
    boxes = [extract(a) for a in answers]
    verdicts = grader.grade(
        [(rf"{thought}\boxed{{{box or a}}}", a, False) for a, box in zip(answers, boxes, strict=True)]
    )
    return [
        a
        for a, box, verdict in zip(answers, boxes, verdicts, strict=True)
        if not verdict.reward or (box is None and any(mark in a for mark in MARKS))
    ]
