r"""Whether a data set's right answers can be given: each is stated (in a box, for most verifiers), as a response would,
and graded against itself.

What no response can be right about trains nothing, and looks like a model that is always wrong: a whole solution in
the place of its answer ("... #### 72", or sentences), or an answer that the verifier does not take for equal to itself.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import replace

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.reward.grader import Grader
from grpo_mcore.reward.verifiers import VERIFIERS

SECONDS = 15.0  # algebra may take longer than there is time: then a part of the answers is looked at
AT_ONCE, NUM_EXAMPLES, EXAMPLE_CHARS = 256, 3, 60
# What announces the answer at the end of a solution, and no box of a response holds.
MARKS = (r"####\s*(.+)", r"<answer>(.+)</answer>", r"nswer(?: is:?|:)\s*(.+)")
BOX = r"\\boxed\{(.+)\}"  # of which some verifiers take the contents
# Words of an answer, LaTeX's not counted: one of so many is sentences. None of DeepScaleR's 40,308 has even 4, 97 % of
# GSM8K's solutions have more.
WORD, NUM_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}"), 8


def check(answers: Sequence[str], cfg: config.Reward, name: str, source: str) -> str | None:
    """What to say of the answers of the data set that `name` = `source` names, if some can never be right by the
    verifiers of `cfg`. Raises InputError if none can."""
    said = [_check(answers, replace(cfg, verifier=verifier, functions=()), name, source) for verifier in cfg.verifiers]
    return "; ".join(filter(None, said)) or None


def _check(answers: Sequence[str], cfg: config.Reward, name: str, source: str) -> str | None:
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
    if 2 * len(never) < len(looked):
        return f"warning: {name}: {words}. Remedy: mend or remove these rows"
    marks = [mark for mark in (*MARKS, BOX) if sum(bool(re.search(mark, a)) for a in never) > len(looked) / 2]
    remedy = "name another column (data.answer_key), or take the answer out of it (data.answer_regex)"
    if marks:
        remedy = f"set data.answer_regex='{marks[0]}', or name another column (data.answer_key)"
    if len(never) == len(looked):
        raise InputError(name, source, words, remedy)
    return f"warning: {name}: {words}. Remedy: {remedy}, or mend or remove these rows"


def _never_right(answers: Sequence[str], cfg: config.Reward, grader: Grader) -> list[str]:
    thought, verifier = "</think>" if cfg.require_think else "", VERIFIERS[cfg.verifier]
    boxes = [verifier.extract(a) for a in answers]
    verdicts = grader.grade(
        [(thought + verifier.stated % (box or a), a, False) for a, box in zip(answers, boxes, strict=True)]
    )
    return [
        a
        for a, box, verdict in zip(answers, boxes, verdicts, strict=True)
        if not verdict.reward or (box is None and _is_solution(a))
    ]


def _is_solution(answer: str) -> bool:
    return any(re.search(mark, answer) for mark in MARKS) or len(WORD.findall(answer)) >= NUM_WORDS
