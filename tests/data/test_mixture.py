"""Which source a mixture draws from, and what a stream of several sources draws.

Not covered here: a stream of one source (test_prompts.py).
"""

import random

import pytest

from grpo_mcore.config import config, data_sources
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.data.mixture import Mixture
from grpo_mcore.data.prompts import Stream
from grpo_mcore.types import Prompt
from tests.data.test_sources import PLAIN, jsonl


def test_shares_are_exact_over_each_block_and_near_everywhere():
    rng = random.Random(0)
    for _ in range(100):
        weights = [rng.randint(1, 30) for _ in range(rng.randint(1, 5))]
        mixture, shares = Mixture(weights), data_sources.shares(weights)
        counts, block = [0] * len(weights), sum(shares)
        for position in range(3 * block):
            source, cursor = mixture.at(position)
            assert cursor == counts[source]
            counts[source] += 1
            assert all(abs(n - (position + 1) * s / block) < 2 for n, s in zip(counts, shares, strict=True))
            if (position + 1) % block == 0:
                assert counts == [s * (position + 1) // block for s in shares]


def test_weights_are_taken_as_they_are_written():
    assert data_sources.shares([0.7, 0.3]) == [7, 3]
    assert data_sources.shares([75.0, 25.0]) == [3, 1]
    assert data_sources.shares([0.1, 0.1, 0.1]) == [1, 1, 1]
    assert data_sources.shares([1e-3, 2.0]) == [1, 2000]


def made(*sizes: int) -> list[Prompt]:
    """Prompts of sources 0, 1, ... with so many each."""
    several = len(sizes) > 1
    return [Prompt(i, "", "", (), source=str(s) if several else "") for s, n in enumerate(sizes) for i in range(n)]


def drawn(stream: Stream, start: int, end: int) -> list[tuple[str, int]]:
    return [(p.source, p.id) for p in map(stream.at, range(start, end))]


def test_three_to_one_draws_three_of_four_and_each_source_once_an_epoch_of_its_own():
    order = drawn(Stream(made(30, 7), 5, weights=[3, 1]), 0, 280)
    of = {name: [i for source, i in order if source == name] for name in ("0", "1")}
    assert (len(of["0"]), len(of["1"])) == (210, 70)
    for name, size in (("0", 30), ("1", 7)):
        epochs = [of[name][start : start + size] for start in range(0, len(of[name]), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_stream_taken_up_anywhere_goes_on_as_the_undisturbed_one():
    whole = drawn(Stream(made(30, 7), 5, weights=[3, 1]), 0, 300)
    for cursor in (1, 2, 31, 128, 299):
        assert drawn(Stream(made(30, 7), 5, weights=[3, 1]), cursor, 300) == whole[cursor:]
        assert drawn(Stream(made(30, 7), 5, weights=[3, 1], skip=cursor), 0, 300 - cursor) == whole[cursor:]


def test_one_source_draws_what_it_always_drew():
    order = list(range(30))
    random.Random("5/1").shuffle(order)
    assert [i for _, i in drawn(Stream(made(30), 5), 30, 60)] == order


def test_sources_of_equal_length_have_orders_of_their_own():
    order = drawn(Stream(made(30, 30), 5, weights=[1, 1]), 0, 60)
    assert [i for source, i in order if source == "0"] != [i for source, i in order if source == "1"]


def test_what_a_run_learns_from_has_another_digest_with_other_weights():
    of = [prompts.digest(made(3, 3), weights) for weights in ((3, 1), (6, 2), (1, 3), (1, 1))]
    assert of[0] == of[1] and len(set(of)) == 3
    assert prompts.digest(made(6)) == prompts.digest(made(6), [2.0]) not in of  # of one source as ever


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> prompts.Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    arithmetic.make_model(folder, seed=0)
    return prompts.Tokenizer(str(folder))


def test_prompts_of_several_sources_bear_their_names_and_ids_of_their_own(tmp_path, tokenizer):
    a = jsonl(tmp_path / "a.jsonl", {"problem": "1+2", "answer": "3"}, {"problem": "2+2", "answer": "4"})
    b = jsonl(tmp_path / "b.jsonl", {"q": "5+5", "answer": "10"})
    given = (config.Source(a), config.Source(b, name="other", problem_key="q"))
    found, _ = prompts.load(given, PLAIN, tokenizer, "data.train")
    assert [(p.source, p.id, p.problem) for p in found] == [("a", 0, "1+2"), ("a", 1, "2+2"), ("other", 0, "5+5")]


def test_an_evaluation_takes_the_first_problems_of_each_source(tmp_path, tokenizer):
    texts = ("1+2", "111+222", "11+22", "3+4", "333+444")
    a, b = (jsonl(tmp_path / n, *({"problem": p, "answer": "1"} for p in texts)) for n in ("a.jsonl", "b.jsonl"))
    data = config.Data(train="", chat_template=False, max_prompt_tokens=5)

    def taken(most: int | None) -> tuple[list[tuple[str, int]], int]:
        evaluation = config.Eval(data=(config.Source(a), config.Source(b)), max_prompts=most)
        kept, left_out = prompts.load_evaluation(config.Config("", "", 1, data, eval=evaluation), tokenizer)
        return [(p.source, p.id) for p in kept], left_out

    assert taken(2) == ([("a", 0), ("a", 2), ("b", 0), ("b", 2)], 2)
    assert taken(None) == ([(s, i) for s in "ab" for i in (0, 2, 3)], 4)


def test_a_source_without_a_column_is_named(tmp_path, tokenizer):
    a = jsonl(tmp_path / "a.jsonl", {"problem": "1+2", "answer": "3"})
    b = jsonl(tmp_path / "b.jsonl", {"question": "1+2", "answer": "3"})
    with pytest.raises(InputError, match=r"data.train\[1\]: .*b.jsonl, line 1 = .*: has no column 'problem'. Remedy: "):
        prompts.load((config.Source(a), config.Source(b)), PLAIN, tokenizer, "data.train")
