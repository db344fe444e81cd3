"""The world small enough for a laptop: its problems, its demonstrations, its tokenizer.

Not covered here: whether a model can learn it, which takes a run.
"""

import random
import re

import pytest
from transformers import AutoTokenizer

from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic
from grpo_mcore.data.prompts import Tokenizer

PAIRS = [(a, b) for a in range(10, 100) for b in range(10, 100)]
SHAPE = re.compile(r"<think>(\d)\+(\d)=(\d+),(\d)\+(\d)=(\d+),(\d+)\+(\d)=(\d+)</think>\\boxed\{(\d+)\}<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("arithmetic")
    arithmetic.make_model(path, seed=0)
    return str(path)


@pytest.mark.parametrize(
    "task, expected",
    [
        ("two_digit_sums", {f"{a}+{b}": a + b for a, b in PAIRS}),
        (
            "one_digit",
            {f"{a} + {b}": a + b for a in range(1, 11) for b in range(1, 11)}
            | {f"{a} * {b}": a * b for a in range(1, 10) for b in range(1, 10)},
        ),
    ],
)
def test_train_and_heldout_are_disjoint_and_cover_the_task_with_right_answers(task, expected):
    train, heldout = arithmetic.rows(f"{task}/train"), arithmetic.rows(f"{task}/heldout")
    assert not {problem for problem, _ in train} & {problem for problem, _ in heldout}
    assert len(train) + len(heldout) == len(expected)
    assert dict(train + heldout) == {problem: str(answer) for problem, answer in expected.items()}
    share = {"two_digit_sums": 0.1, "one_digit": 0.25}[task]
    # Held out by unordered pair of operands: 47+85 and 85+47 are on one side.
    assert len(heldout) == pytest.approx(share * len(expected), rel=0.03)
    exchanged = {op.join(reversed(problem.split(op))) for problem, _ in train for op in "+*" if op in problem}
    assert not {p.replace(" ", "") for p in exchanged} & {p.replace(" ", "") for p, _ in heldout}
    # Shuffled: both splits hold small and large numbers.
    assert [problem for problem, _ in heldout] != list(expected)[: len(heldout)]


def test_the_split_is_the_same_whenever_it_is_asked_for():
    before = arithmetic.rows("two_digit_sums/train")
    random.seed(123)
    assert arithmetic.rows("two_digit_sums/train") == before


@pytest.mark.parametrize("source", ["three_digit_sums/train", "two_digit_sums", "two_digit_sums/test", ""])
def test_an_unknown_task_or_split_is_refused_by_name(source):
    with pytest.raises(InputError, match=f"arithmetic:{source}.*two_digit_sums, one_digit.*Remedy"):
        arithmetic.rows(source)


def test_every_demonstration_is_right_in_every_step():
    for a, b in PAIRS:
        found = SHAPE.fullmatch(arithmetic.demonstration(f"{a}+{b}"))
        a1, b1, ones, a10, b10, tens, same_tens, carry, leading, answer = found.groups()
        assert (int(a10 + a1), int(b10 + b1)) == (a, b)
        assert int(ones) == int(a1) + int(b1)
        assert int(tens) == int(a10) + int(b10)
        assert same_tens == tens and int(carry) == int(ones) // 10
        assert int(leading) == int(tens) + int(carry)
        assert answer == leading + ones[-1] == str(a + b)


def test_a_corrupted_demonstration_differs_in_exactly_one_digit_of_its_final_answer():
    rng = random.Random(0)
    places = set()
    for a, b in PAIRS[::7]:
        right, wrong = arithmetic.demonstration(f"{a}+{b}"), arithmetic.demonstration(f"{a}+{b}", corrupt=rng)
        assert len(right) == len(wrong)
        (at,) = [i for i, (x, y) in enumerate(zip(right, wrong, strict=True)) if x != y]
        first = right.index("\\boxed{") + len("\\boxed{")
        assert first <= at < right.index("}")
        assert wrong[at].isdigit()
        places.add(at - first)
    assert places == {0, 1, 2}  # any digit, not always the last


def test_the_tokenizer_gives_every_prompt_and_demonstration_back_and_they_fit_40_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = [
        (f"{a}+{b}=", arithmetic.demonstration(f"{a}+{b}", corrupt=rng if n % 2 else None))
        for n, (a, b) in enumerate(PAIRS)
    ]
    prompts, demonstrations = (
        tokenizer(list(column), add_special_tokens=False).input_ids for column in zip(*texts, strict=True)
    )
    unknown = tokenizer.convert_tokens_to_ids("?")
    for prompt_ids, ids in zip(prompts, demonstrations, strict=True):
        assert len(prompt_ids) == 6 and unknown not in ids
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        assert len(prompt_ids) + len(ids) <= 40
    for row in range(0, len(texts), 90):  # 90 at a time: 8,100 calls take seconds
        rows = zip(prompts[row : row + 90], demonstrations[row : row + 90], strict=True)
        decoded = tokenizer.decode([t for prompt_ids, ids in rows for t in prompt_ids + ids])
        assert decoded == "".join(prompt + demonstration for prompt, demonstration in texts[row : row + 90])


def test_tags_are_one_token_each_and_every_character_is_its_own(folder):
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode_plain("<think></think>\\boxed{}<eos>")) == 5
    for character in arithmetic.CHARACTERS.replace(" ", ""):
        (token,) = tokenizer.encode_plain(character)
        assert tokenizer.decode([token]) == character


def test_the_same_seed_makes_the_same_model_and_another_seed_another(tmp_path):
    from safetensors.torch import load_file

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arithmetic.make_model(tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(a[name].equal(b[name]) for name in a)
    assert not a["model.embed_tokens.weight"].equal(c["model.embed_tokens.weight"])
