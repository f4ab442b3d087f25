"""Figures in words: never rounded to a certainty, never without what they were counted from."""

from collections.abc import Mapping
from typing import Any

from goldfish.audit.results import Figure


def of_estimate(estimate: Mapping[str, Any]) -> Figure:
    """An estimate of the summary, by its value and not by its name."""
    point = next(estimate[key] for key in ("rate", "mean", "value") if key in estimate)
    others = {key: estimate.get(key) for key in ("lower95", "upper95", "k", "reason")}
    return Figure("", point, n=estimate["n"], documents=estimate["documents"], **others)


def percent(share: float) -> str:
    """0 and 1 only where exact: '<0.1%' and '>99.9%' beside them."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.0005 else ">99.9%" if share > 0.9995 else f"{100 * share:.1f}".removesuffix(".0") + "%"


def decimals(value: float) -> str:
    """Three digits or so, without exponents where people would not write one."""
    size = abs(value)
    return f"{value:.3g}" if 0 < size < 0.1 else f"{value:.2f}" if size < 10 else f"{value:,.{int(size < 100)}f}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    if value == 0:
        return "0"
    return f"{'−' if value < 0 else '+'}{decimals(abs(value))}"


def point(figure: Figure) -> str:
    """ "3 of 40", or 0.21."""
    if figure.k is not None:
        return f"{figure.k:,} of {figure.n:,}"
    if figure.value is not None:
        return decimals(figure.value)
    return "not estimable" if figure.lower95 is None else f"above {decimals(figure.lower95)}"


def interval(figure: Figure) -> str:
    """The 95% interval, or why there is none."""
    low, high = figure.lower95, figure.upper95
    write = decimals if figure.k is None else percent
    if low is None and high is None:
        return figure.reason or "no interval"
    if figure.value is None and high is None:
        return "no upper bound"
    if low is None or high is None:
        return f"at least {write(low)}" if low is not None else f"at most {write(high or 0.0)}"
    return f"{write(low).removesuffix('%')}–{write(high)}"


def bound(figure: Figure) -> str:
    """The interval for who decides: a rate that may be 0 is told by what it does not exceed."""
    if figure.k is not None and figure.lower95 == 0 and figure.upper95 is not None:
        return f"at most {percent(figure.upper95)}"
    return interval(figure)


def power_of_ten(log10: float) -> str:
    """10^log10 for people: 0.98, 0.0031, 12,000, 10⁻⁵³."""
    if log10 == float("-inf"):
        return "0"
    if -4 < log10 < 6:
        return f"{10**log10:,.0f}" if log10 >= 1 else f"{10**log10:.2g}"
    return "10" + f"{log10:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
