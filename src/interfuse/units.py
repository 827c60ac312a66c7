"""Numbers as people read them: three digits and a unit. Not for files: those hold the numbers themselves."""

from __future__ import annotations


def count(number: float, unit: str = "") -> str:
    """A count with a decimal prefix.

    >>> count(4_652_008), count(18_800_000, "B"), count(999), count(0)
    ('4.65 M', '18.8 MB', '999', '0')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = f"{number:.0f}" if prefix == "" or abs(number) >= 99.95 else f"{number:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def seconds(number: float) -> str:
    """A time span.

    >>> seconds(0.0123), seconds(2.5), seconds(4.2e-5)
    ('12.3 ms', '2.5 s', '42 us')
    """
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if number * scale >= 0.9995:
            return f"{_three(number * scale)} {unit}"
    return f"{_three(number * 1e6)} us"


def value(number: float, *, signed: bool = False) -> str:
    """A metric's value, with four decimals, or four digits where that says nothing.

    >>> value(0.97312), value(0.0042, signed=True), value(1234.56), value(0.00001234)
    ('0.9731', '+0.0042', '1235', '1.234e-05')
    """
    form = ".4f" if number == 0 or 0.001 <= abs(number) < 10 else ".4g"
    return f"{number:{'+' if signed else ''}{form}}"


def span(number: float, low: float, high: float, *, signed: bool = False) -> str:
    """A value with its interval.

    >>> span(0.97312, 0.9701, 0.9762)
    '0.9731 [0.9701, 0.9762]'
    """
    bounds = ", ".join(value(bound, signed=signed) for bound in (low, high))
    return f"{value(number, signed=signed)} [{bounds}]"


def _three(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.3g}"
