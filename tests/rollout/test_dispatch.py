"""Dispatch: worked examples, and what holds over long random lives of engines and requests."""

import random
from collections import Counter

import pytest

from grpo_mcore.rollout.dispatch import Dispatch


def dispatch(*engines, max_running_responses=4):
    d = Dispatch(max_running_responses)
    for engine in engines:
        d.join(engine)
    return d


def test_requests_go_to_the_engine_with_the_fewest_responses_in_the_order_of_their_keys():
    d = dispatch("a", "b")
    for key, num_responses in (((3,), 2), ((1,), 5), ((2,), 2), ((4,), 4)):
        d.submit(key, num_responses)
    # Loads: a 5 | b 2 | b 4 | b 8
    assert list(d.deal()) == [("a", (1,)), ("b", (2,)), ("b", (3,)), ("b", (4,))]
    assert d.dealt_to("b") == [(2,), (3,), (4,)] and d.num_dealt == 4 and d.num_waiting == 0


def test_an_engine_holds_what_it_runs_and_as_much_again():
    d = dispatch("a", max_running_responses=4)
    for i in range(6):
        d.submit((i,), 3)
    assert [key for _, key in d.deal()] == [(0,), (1,), (2,)]  # 9 responses: 6 are fewer than 2 x 4, 9 are not
    assert d.num_waiting == 3 and list(d.deal()) == []
    assert d.done("a", (1,))  # 6
    assert list(d.deal()) == [("a", (3,))]


def test_a_request_larger_than_an_engine_goes_to_one_that_has_nothing_else():
    d = dispatch("a", "b", max_running_responses=2)
    for i in range(3):
        d.submit((i,), 100)
    assert list(d.deal()) == [("a", (0,)), ("b", (1,))] and d.num_waiting == 1


def test_a_conversation_stays_with_its_engine_unless_that_is_full_or_gone():
    d = dispatch("a", "b", max_running_responses=1)  # two at a time
    d.submit((0,), 1)
    d.submit((1, 0), 1, (1,))
    assert list(d.deal()) == [("a", (0,)), ("b", (1, 0))]
    d.done("b", (1, 0))
    d.done("a", (0,))
    d.submit((1, 1), 1, (1,))  # a comes first among equals
    assert list(d.deal()) == [("b", (1, 1))]
    d.submit((2,), 1)
    d.submit((3,), 1)
    assert list(d.deal()) == [("a", (2,)), ("a", (3,))]
    d.submit((1, 2), 1, (1,))
    d.submit((1, 3), 1, (1,))
    assert list(d.deal()) == [("b", (1, 2))] and d.num_waiting == 1
    assert d.leave("b") == [(1, 1), (1, 2)]
    d.done("a", (2,))
    assert list(d.deal()) == [("a", (1, 1))]
    d.done("a", (1, 1))
    d.end((1,))
    d.join("c")
    assert list(d.deal()) == [("c", (1, 2)), ("c", (1, 3))]


def test_without_engines_everything_waits():
    d = dispatch()
    d.submit((0,), 1)
    assert list(d.deal()) == []
    d.join("a")
    assert list(d.deal()) == [("a", (0,))]


def test_an_engine_that_leaves_gives_its_requests_to_the_others_ahead_of_later_ones():
    d = dispatch("a", "b", max_running_responses=1)
    for i in range(4):
        d.submit((i,), 2)
    assert list(d.deal()) == [("a", (0,)), ("b", (1,))]
    assert d.leave("a") == [(0,)] and d.engines == ["b"]
    assert list(d.deal()) == []  # b is full
    d.join("c")
    assert list(d.deal()) == [("c", (0,))]
    assert not d.done("a", (0,)), "an answer of the engine that left came late"
    assert d.done("c", (0,)) and not d.done("c", (0,)), "none is answered twice"


def test_an_engine_that_comes_back_begins_with_nothing():
    d = dispatch("a", "b", max_running_responses=1)
    d.submit((0,), 2)
    assert list(d.deal()) == [("a", (0,))]
    d.leave("a")
    d.join("a")
    d.submit((1,), 2)
    assert d.dealt_to("a") == [] and list(d.deal()) == [("b", (0,)), ("a", (1,))], "and is the one that joined last"


def test_a_cancelled_request_is_gone_and_may_be_submitted_again():
    d = dispatch("a", max_running_responses=1)
    d.submit((0,), 2)
    d.submit((1,), 2)
    list(d.deal())
    assert d.cancel((1,)) is None and d.cancel((0,)) == "a"  # one waits, one is dealt
    assert not d.done("a", (0,)) and d.num_waiting == d.num_dealt == 0 and list(d.deal()) == []
    d.submit((1,), 2)
    assert list(d.deal()) == [("a", (1,))], "once, though its first place in the queue is still there"
    assert d.done("a", (1,)) and list(d.deal()) == []


def test_a_key_that_is_under_way_is_refused():
    d = dispatch("a")
    d.submit((0,), 1)
    for _ in range(2):  # waiting, then dealt
        with pytest.raises(ValueError, match="under way"):
            d.submit((0,), 1)
        list(d.deal())


@pytest.mark.parametrize("seed", range(20))
def test_over_a_long_life_every_request_is_answered_once_and_the_load_is_even(seed):
    rng = random.Random(seed)
    max_running, group_size = rng.randint(1, 6), rng.randint(1, 4)
    d = Dispatch(max_running)
    alive, under_way, dealt, answered, cancelled, submitted = set(), set(), {}, Counter(), set(), 0
    for _ in range(1500):
        act = rng.choice(["submit", "submit", "done", "done", "join", "leave", "cancel", "late"])
        if act == "submit":
            d.submit((submitted,), group_size)
            under_way.add(submitted)
            submitted += 1
        elif act == "join" and len(alive) < 5:
            engine = rng.randrange(5)
            if engine not in alive:
                alive.add(engine)
                d.join(engine)
        elif act == "leave" and alive and rng.random() < 0.3:
            engine = rng.choice(sorted(alive))
            alive.remove(engine)
            lost = sorted(k for k, e in dealt.items() if e == engine)
            assert d.leave(engine) == [(k,) for k in lost]
            for k in lost:
                del dealt[k]
        elif act == "cancel" and under_way and rng.random() < 0.3:
            key = rng.choice(sorted(under_way))
            assert d.cancel((key,)) == dealt.pop(key, None)
            under_way.remove(key)
            if rng.random() < 0.5:
                d.submit((key,), group_size)
                under_way.add(key)
            else:
                cancelled.add(key)
        elif act == "done" and dealt:
            key = rng.choice(sorted(dealt))
            assert d.done(dealt.pop(key), (key,))
            under_way.remove(key)
            answered[key] += 1
        elif act == "late" and submitted:
            key, engine = rng.randrange(submitted), rng.randrange(5)
            if dealt.get(key) != engine:
                assert not d.done(engine, (key,))
        waiting = sorted(under_way - dealt.keys())
        loads = Counter({e: group_size * sum(o == e for o in dealt.values()) for e in alive})
        for engine, key in d.deal():
            assert key[0] == waiting.pop(0), "in order"
            assert loads[engine] == min(loads.values()), "to the one with the fewest"
            assert loads[engine] == 0 or loads[engine] < 2 * max_running
            dealt[key[0]] = engine
            loads[engine] += group_size
        assert not waiting or all(load >= 2 * max_running for load in loads.values()), (
            "nothing waits while there is room"
        )
        assert (d.num_waiting, d.num_dealt) == (len(waiting), len(dealt)) and set(d.engines) == alive
        assert all(d.owner((k,)) == e for k, e in dealt.items())
    assert set(answered) | cancelled | under_way == set(range(submitted)) and max(answered.values()) == 1
