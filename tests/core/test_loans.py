"""Who gets how much: floors first, then the most goodput per byte, a higher class before all."""

from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.loans import Holder, Rung, share_out


def holder(name="a", gains=(), floor=0, lent=0, priority=0, nbytes=10) -> Holder:
    return Holder(
        name, priority, floor, floor + lent * nbytes, tuple(Rung(nbytes, g) for g in gains)
    )


def test_the_rung_that_gains_more_per_byte_is_lent_first():
    small = Holder("small", 0, 0, 0, (Rung(10, 2.0), Rung(10, 1.0)))
    large = Holder("large", 0, 0, 0, (Rung(40, 6.0),))
    assert share_out(10, [small, large]) == (1, 0)
    assert share_out(50, [small, large]) == (1, 1)
    assert share_out(60, [small, large]) == (2, 1)


def test_a_higher_class_goes_first_however_little_it_gains():
    low, high = holder(gains=[9.0] * 3), holder("b", gains=[0.1] * 2, priority=1)
    assert share_out(30, [low, high]) == (1, 2)


def test_floors_are_never_lent_and_leave_nothing_where_they_do_not_fit():
    one, other = holder(gains=[1.0], floor=60), holder("b", gains=[1.0], floor=30)
    assert share_out(100, [one, other]) == (1, 0)
    assert share_out(80, [one, other]) == (0, 0)


def test_rungs_that_gain_only_together_are_weighed_together():
    """Two mirrors that gain nothing alone and much with the third."""
    late, early = holder(gains=[0.0, 0.0, 9.0]), holder("b", gains=[2.0, 2.0, 2.0])
    assert share_out(30, [late, early]) == (3, 0)
    assert share_out(20, [late, early]) == (0, 2), "two of the three would be wasted"


def test_what_nobody_else_wants_is_lent_even_where_it_gains_nothing_yet():
    late = holder(gains=[0.0, 0.0, 9.0])
    assert share_out(20, [late]) == (2,)


def test_a_rung_without_use_is_left_alone():
    assert share_out(100, [holder(gains=[3.0, 0.0, 0.0])]) == (1,)
    assert share_out(100, [holder()]) == (0,)


def test_who_has_a_rung_keeps_it_against_a_gain_that_is_not_clearly_larger():
    has, wants = holder(gains=[1.0], lent=1), holder("b", gains=[1.15])
    assert share_out(10, [has, wants]) == (1, 0)
    assert share_out(10, [has, wants], hysteresis=0.1) == (0, 1)
    assert share_out(10, [has, holder("b", gains=[1.3])]) == (0, 1)


def test_lent_are_the_rungs_that_are_held_whole():
    rungs = (Rung(10, 1.0), Rung(20, 1.0))
    held = [Holder("a", 0, 5, nbytes, rungs).lent for nbytes in (0, 5, 14, 15, 34, 35, 99)]
    assert held == [0, 0, 0, 1, 1, 2, 2]


ladders = st.lists(st.builds(Rung, st.integers(1, 30), st.sampled_from([0.0, 0.5, 1.0, 4.0])))


@st.composite
def domains(draw):
    drawn = draw(
        st.lists(
            st.tuples(st.integers(0, 2), st.integers(0, 40), ladders, st.integers(0, 200)),
            max_size=5,
        )
    )
    return [
        Holder(str(number), priority, floor, floor + loan, tuple(rungs))
        for number, (priority, floor, rungs, loan) in enumerate(drawn)
    ]


@given(domains(), st.integers(0, 400))
def test_all_that_is_shared_out_fits_and_whatever_still_fits_nobody_wants(holders, capacity):
    rungs = share_out(capacity, holders)
    floors = sum(each.floor_bytes for each in holders)
    used = sum(each.bytes_of(count) for each, count in zip(holders, rungs, strict=True))
    if floors > capacity:
        assert not any(rungs)
        return
    assert used <= capacity
    for each, count in zip(holders, rungs, strict=True):
        assert count <= each.wanted
        if count < each.wanted:
            assert each.rungs[count].nbytes > capacity - used


@given(domains(), st.integers(0, 400), st.randoms(use_true_random=False))
def test_what_was_shared_out_stays_so_when_gains_waver(holders, capacity, chance):
    rungs = share_out(capacity, holders)
    settled = [
        Holder(
            each.id,
            each.priority,
            each.floor_bytes,
            each.bytes_of(count),
            tuple(
                Rung(rung.nbytes, rung.gain_per_s * chance.uniform(1.0, 1.09))
                for rung in each.rungs
            ),
        )
        for each, count in zip(holders, rungs, strict=True)
    ]
    fine = all(len(set(each.rungs)) <= 1 for each in holders)  # no bundle straddles what is lent
    if fine:
        assert share_out(capacity, settled) == rungs
