"""Quantities with units: what people write, and what they are told when it makes no sense."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from select_n_core.errors import InputError
from select_n_core.quantities import (
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("1GiB", 1 << 30),
        ("1.5GB", 1_500_000_000),
        ("2kB", 2000),
        ("7B", 7),
        ("-3B", -3),
        (268435456, 268435456),
        (1.6, 2),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("50ms", 0.05), ("2s", 2.0), ("1.5 min", 90.0), ("10us", 1e-5), (0.25, 0.25), (3, 3.0)],
)
def test_times(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2GB/s", 2e9), ("1 GiB/s", 2**30), ("8Gbit/s", 1e9), ("60GB/minute", 1e9), (5e8, 5e8)],
)
def test_rates(text, rate):
    assert parse_bytes_per_s(text) == pytest.approx(rate)


NOT_SIZES = ["50ms", "2GB/s", "256", "5 rad", "50%", "256M", "1gb", "5Hz"]
NOT_TIMES = ["256MiB", "0.1", "5m", "3 s/byte", "10Hz"]
NOT_RATES = ["2GB", "1s", "5Hz", "100"]
NOTHING = ["", "  ", "many", "nan s", "inf B", "@", None, True, [1], {}]
NO_NUMBERS = [math.nan, math.inf, -math.inf, 10**400]


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        *((parse_bytes, text, "256MiB") for text in [*NOT_SIZES, *NOTHING, *NO_NUMBERS]),
        *((parse_seconds, text, "50ms") for text in [*NOT_TIMES, *NOTHING, *NO_NUMBERS]),
        *((parse_bytes_per_s, text, "2GB/s") for text in [*NOT_RATES, *NOTHING, *NO_NUMBERS]),
    ],
)
def test_what_is_no_such_quantity_is_refused_with_an_example(parse, text, example):
    with pytest.raises(InputError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{text!r} is not a ")
    assert str(caught.value).endswith(f"for example '{example}'")


@given(st.text(max_size=12))
def test_no_text_at_all_raises_anything_else(text):
    for parse in (parse_bytes, parse_seconds, parse_bytes_per_s):
        try:
            assert math.isfinite(parse(text))
        except InputError as error:
            assert repr(text) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (900, "900 B"), (1536, "1.5 KiB"), (256 << 20, "256 MiB"), (3 << 30, "3 GiB")],
)
def test_bytes_for_people(value, text):
    assert format_bytes(value) == format_bytes(value, up=True) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0431, "43.1 ms"), (0.00012, "0.12 ms"), (2.0, "2 s"), (90.4, "90.4 s")]
)
def test_seconds_for_people(value, text):
    assert format_seconds(value) == text


@given(st.integers(1, 1 << 40))
def test_a_size_rounded_up_is_enough_and_hardly_more(nbytes):
    assert nbytes <= parse_bytes(format_bytes(nbytes, up=True)) <= nbytes * 1.0011 + 1


@given(st.floats(1e-6, 1e4))
def test_a_time_rounded_up_is_enough_and_hardly_more(seconds):
    enough = parse_seconds(format_seconds(seconds, up=True))
    assert seconds * (1 - 1e-12) <= enough <= seconds * 1.011
