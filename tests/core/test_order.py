"""The order pi: which layers stream, and how an interval becomes a number of layers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.decisions.order import (
    interval_of_k,
    k_of_interval,
    offload_order,
    streamed_units,
)
from select_n_core.errors import InputError

LAYERS = st.integers(1, 200)


def cyclic_gaps(chosen: tuple[int, ...], units: int) -> list[int]:
    """Distances from each chosen layer to the next, across the end of the iteration too."""
    return [after - before for before, after in pairwise((*chosen, chosen[0] + units))]


@given(LAYERS)
def test_pi_names_every_layer_once(units):
    assert sorted(offload_order(units)) == list(range(units))


@given(LAYERS, st.data())
def test_streaming_one_more_layer_keeps_the_others_streamed(units, data):
    k = data.draw(st.integers(0, units - 1))
    assert set(streamed_units(units, k)) < set(streamed_units(units, k + 1))
    assert len(streamed_units(units, k)) == k


@given(LAYERS, st.data())
def test_no_prefix_leaves_a_long_gap(units, data):
    k = data.draw(st.integers(1, units))
    gaps = cyclic_gaps(streamed_units(units, k), units)
    even = 1 << (k.bit_length() - 1)  # the last power of two: those layers stand evenly
    assert max(gaps) <= math.ceil(1.1 * units / even)


@given(LAYERS)
def test_the_last_layer_streams_first(units):
    assert offload_order(units)[0] == units - 1


@given(LAYERS, st.data())
def test_streamed_layers_come_in_the_order_of_the_forward(units, data):
    chosen = streamed_units(units, data.draw(st.integers(0, units)))
    assert list(chosen) == sorted(chosen)


@pytest.mark.parametrize(
    ("interval", "k"), [(1, 30), (2, 15), (3, 10), (4, 7), (5, 6), (7, 4), (10, 3), (30, 1)]
)
def test_an_interval_streams_one_in_every_n_layers(interval, k):
    assert k_of_interval(interval, 30) == k


def test_an_interval_above_the_number_of_layers_streams_nothing():
    assert k_of_interval(31, 30) == 0


@given(LAYERS, st.data())
def test_the_interval_shown_for_k_asks_for_k_again(units, data):
    k = data.draw(st.integers(1, units))
    shown = interval_of_k(k, units)
    assert shown == pytest.approx(units / k, abs=1e-4)
    assert k_of_interval(units / k, units) == k


def test_streaming_nothing_has_no_interval():
    assert interval_of_k(0, 30) is None


@pytest.mark.parametrize("interval", [0.99, 0, -2, math.nan])
def test_an_interval_below_one_is_refused_with_the_way_to_stream_nothing(interval):
    with pytest.raises(InputError, match=r"interval must be 1 or more.*'off'") as caught:
        k_of_interval(interval, 30)
    assert caught.value.field == "interval"


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="at least one unit"):
        offload_order(0)
