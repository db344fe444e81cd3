"""Admission: the examples of its docstring, and what holds of every run: which prompts a step trains on, and how stale
they are."""

import random

import pytest

from grpo_mcore.rollout.admission import Admission, Taken


def arrive(admission, positions, has_variance=True):
    return [p for position in positions for p in admission.arrived(position, has_variance)]


def test_without_staleness_a_step_is_sampled_when_it_is_waited_for():
    a = Admission(prompts_per_step=2)
    assert a.begin(0) == ([0, 1], []) and a.take() is None
    assert arrive(a, [1]) == [] and a.take() is None
    arrive(a, [0])
    assert a.take() == Taken([0, 1], 0, 0) and a.cursor == 2
    assert a.take() is None and a.begin(1) == ([2, 3], [])


def test_one_step_ahead():
    """The docstring's example."""
    a = Admission(prompts_per_step=2, max_staleness=1)
    assert a.begin(0) == ([0, 1, 2, 3], [])
    arrive(a, [3, 0, 1])
    assert a.take() == Taken([0, 1], 0, 0)
    assert a.begin(1) == ([4, 5], []), "2, begun with version 0, goes on"
    assert a.take() is None
    arrive(a, [4, 2])
    assert a.take() == Taken([2, 3], 0, 0) and a.begin(2) == ([6, 7], [])


def test_a_run_goes_on_from_its_cursor():
    a = Admission(prompts_per_step=3, cursor=17)
    assert a.begin(5) == ([17, 18, 19], [])


def test_a_group_without_variance_is_passed_over_and_another_prompt_drawn_for_it():
    a = Admission(prompts_per_step=2, dynamic_sampling=True, max_draws=3)
    assert a.begin(0) == ([0, 1], [])
    assert a.arrived(0, False) == [2] and a.arrived(1, True) == [] and a.take() is None
    assert a.arrived(2, False) == [3]
    arrive(a, [3])
    assert a.take() == Taken([1, 3], passed_over=2, kept=0) and a.cursor == 4


def test_after_max_draws_groups_without_variance_fill_the_step():
    a = Admission(prompts_per_step=2, dynamic_sampling=True, max_draws=2)
    a.begin(0)
    assert [a.arrived(0, False), a.arrived(1, False), a.arrived(2, True)] == [[2], [3], []] and a.take() is None
    assert a.arrived(3, False) == [] and a.take() == Taken([0, 2], passed_over=2, kept=1)


def test_without_dynamic_sampling_variance_does_not_matter():
    a = Admission(prompts_per_step=2, max_draws=9, oversampling_frac=9)
    assert a.begin(0) == ([0, 1], []) and arrive(a, [0, 1], has_variance=False) == []
    assert a.take() == Taken([0, 1], 0, 0)


def test_over_sampling_draws_ahead_and_what_comes_too_late_is_sampled_anew():
    a = Admission(prompts_per_step=2, dynamic_sampling=True, max_draws=3, oversampling_frac=0.5)
    assert a.begin(0) == ([0, 1, 2], [])
    arrive(a, [0, 2])
    assert a.take() is None, "1 comes before 2 in the stream"
    arrive(a, [1])
    assert a.take() == Taken([0, 1], 0, 0)
    assert a.begin(1) == ([2, 3, 4], [2]) and a.num_dropped == 1


def test_over_sampling_with_staleness_keeps_what_is_fresh_enough():
    a = Admission(prompts_per_step=2, max_staleness=1, dynamic_sampling=True, max_draws=3, oversampling_frac=0.5)
    assert a.begin(0) == ([0, 1, 2, 3, 4], [])
    arrive(a, [0, 1])
    a.take()
    assert a.begin(1) == ([5, 6], []), "2 3 4 may be one version old"
    arrive(a, [2, 3])
    a.take()
    assert a.begin(2) == ([4, 7, 8], [4]), "4 was begun with version 0"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_over_a_long_run(seed, dynamic):
    """Groups arrive in any order; some are taken late. No position is trained on twice or skipped, none is too stale,
    and a step draws no more than it may."""
    rng = random.Random(seed)
    P, S = rng.randint(1, 5), rng.randint(0, 3)
    max_draws, extra = (rng.choice([1, 1.5, 3]), rng.choice([0, 0.3, 1])) if dynamic else (1, 0)
    flat_frac, cursor = rng.random(), rng.randint(0, 20)
    a = Admission(
        prompts_per_step=P,
        max_staleness=S,
        dynamic_sampling=dynamic,
        max_draws=max_draws,
        oversampling_frac=extra,
        cursor=cursor,
    )
    has_variance = {}
    begun, arrived, start, dropped = {}, set(), cursor, 0  # begun: position -> version, of all that were not taken

    def admit(positions, version):
        for p in positions:
            assert p not in begun, "sampled twice at once"
            assert p >= a.cursor, "behind the cursor"
            begun[p] = version

    for step in range(40):
        admitted, stale = a.begin(step)
        for p in stale:
            assert begun.pop(p) < step - S, "dropped though fresh enough"
            arrived.discard(p)
        dropped += len(stale)
        assert a.num_dropped == dropped
        admit(admitted, step)
        if not dynamic:
            assert sorted(begun) == list(range(a.cursor, a.cursor + (S + 1) * P)), (
                "the whole window is under way or there"
            )
            assert all(v >= p_step - S for p_step, v in ((step + (p - a.cursor) // P, begun[p]) for p in begun))
        taken = a.take()
        while taken is None:
            p = rng.choice([p for p in begun if p not in arrived])  # never empty: else the run would hang
            arrived.add(p)
            has_variance[p] = rng.random() >= flat_frac
            admit(a.arrived(p, has_variance[p]), step)
            taken = a.take()
        seen = range(start, a.cursor)
        assert (
            len(taken.positions) == P
            and taken.positions == sorted(set(taken.positions))
            and set(taken.positions) <= set(seen)
        )
        assert len(seen) <= max(int(max_draws * P), P)
        flat = [p for p in seen if dynamic and not has_variance[p]]
        assert taken.passed_over + taken.kept == len(flat) and len(seen) == P + taken.passed_over
        if taken.kept:
            assert len(seen) == int(max_draws * P), "such groups fill a step only when it may draw no more"
            assert sum(p in flat for p in taken.positions) == taken.kept
        else:
            assert not set(flat) & set(taken.positions)
        assert a.cursor - 1 in taken.positions or taken.kept, "no more than needed"
        assert all(begun[p] >= step - S for p in taken.positions), "staler than max_staleness"
        for p in seen:
            del begun[p]
            arrived.discard(p)
        start = a.cursor


def test_nothing_is_sampled_for_steps_that_will_not_come():
    admission = Admission(prompts_per_step=2, max_staleness=2, num_steps=3)
    assert admission.begin(0) == ([0, 1, 2, 3, 4, 5], [])
    for version in range(3):
        for position in (2 * version, 2 * version + 1):
            admission.arrived(position, True)
        assert admission.take().positions == [2 * version, 2 * version + 1]
        assert admission.begin(version + 1) == ([], [])


def test_a_prompt_that_is_left_out_is_as_if_it_did_not_stand_in_the_stream():
    admission = Admission(prompts_per_step=2, is_left_out=lambda position: position in (0, 2, 3, 6))
    assert admission.begin(0) == ([1, 4], [])
    arrive(admission, [1, 4])
    assert admission.take().positions == [1, 4] and admission.cursor == 5
    assert admission.begin(1) == ([5, 7], [])


def test_what_is_left_out_counts_as_no_draw():
    admission = Admission(
        prompts_per_step=2, dynamic_sampling=True, max_draws=1.5, is_left_out=lambda position: position % 2 == 1
    )
    assert admission.begin(0)[0] == [0, 2]
    assert arrive(admission, [0, 2], has_variance=False) == [4]
    arrive(admission, [4])
    taken = admission.take()
    assert (taken.positions, taken.passed_over, taken.kept) == ([0, 4], 1, 1)


def test_a_group_that_was_begun_before_its_prompt_was_left_out_counts():
    out = set()
    admission = Admission(prompts_per_step=1, max_staleness=1, is_left_out=out.__contains__)
    assert admission.begin(0)[0] == [0, 1]
    arrive(admission, [0])
    assert admission.take().positions == [0]
    out |= {1, 2}
    assert admission.begin(1)[0] == [3]
    arrive(admission, [1])
    assert admission.take().positions == [1]
    arrive(admission, [3])
    assert admission.take().positions == [3]
