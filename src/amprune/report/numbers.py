"""Figures as text, rounded to what their standard errors support."""

import math

MINUS = "\u2212"
MISSING = "\u2013"
_SCIENTIFIC = 1e6


def number(value: float | None, error: float | None = None, *, signed: bool = False, scale: float = 1.0) -> str:
    """Returns a value with its standard error, both times `scale`, to the error's first digit (two where it is 1 or 2).

    Without an error the value has four significant digits; from a million on it is written as 5.3e+08; None is missing.
    """
    if value is None:
        return MISSING
    value, error = scale * value, None if error is None else scale * error
    if abs(value) >= _SCIENTIFIC:
        text = _scientific(abs(value), error)
    elif error is None or not math.isfinite(error) or error <= 0:
        text = f"{abs(value):,.{_decimals(abs(value), 4)}f}"
    else:
        places = decimals(error)
        shown = max(0, places)
        text = f"{round(abs(value), places):,.{shown}f} \u00b1 {round(error, places):,.{shown}f}"
    return _sign(value, text, signed) + text


def decimals(error: float) -> int:
    """Returns how many decimal places a standard error supports; negative: only tens, hundreds, ..."""
    exponent = math.floor(math.log10(error))
    return (1 if error / 10**exponent < 3 else 0) - exponent


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0


def _scientific(value: float, error: float | None) -> str:
    exponent = math.floor(math.log10(value))
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.1e}"
    places = min(4, max(0, exponent - math.floor(math.log10(error))))
    return f"{value:.{places}e} \u00b1 {error:.0e}"


def _sign(value: float, text: str, signed: bool) -> str:
    zero = not any(digit in "123456789" for digit in text.split("\u00b1")[0].split("e")[0])
    if zero:
        return ""
    return MINUS if value < 0 else ("+" if signed else "")


def percent(share: float | None, places: int = 1) -> str:
    """Returns a share as `20.0 %`; None is missing."""
    if share is None:
        return MISSING
    text = f"{abs(share):.{places}%}".replace("%", " %")
    return MINUS + text if share < 0 and any(digit in "123456789" for digit in text) else text


def scaled(count: float, unit: str = "") -> str:
    """Returns a large number in thousands, millions or billions: `134.5 M`, `269.0 MB`."""
    prefixes = (("T", 1e12), ("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3))
    for prefix, size in prefixes:
        if abs(count) >= size * 0.9995:
            return f"{count / size:,.{_decimals(abs(count) / size, 4)}f} {prefix}{unit}"
    return f"{count:,.0f} {unit}".rstrip()


def seconds(value: float) -> str:
    """Returns a time with three digits, in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("\u00b5s", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:,.{_decimals(abs(value) / size, 3)}f} {unit}"
    return f"{value:.1e} s"


def times(ratio: float) -> str:
    """Returns a factor as `1.18x`."""
    if ratio >= 1000:
        return f"{ratio:.1e}x"
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}x"


def probability(value: float) -> str:
    """Returns a p-value with as many digits as are read."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def shortened(name: str, most: int = 28) -> str:
    """Cuts the middle of a name that is too long for a figure."""
    if len(name) <= most:
        return name
    front = (most - 1) // 2
    return f"{name[:front]}\u2026{name[len(name) - (most - 1 - front) :]}"
