"""Line charts as inline SVG: where ticks, points and intervals stand. The template draws them.

Colours are Okabe and Ito's, which the colour-blind tell apart, and every series has a marker of its
own besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cometlm.device import readable_bytes

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 12, 40  # room around the plot
_TICKS = 6  # at most
_CLEAR = 4  # series at most whose intervals can be told apart
_APART = 3.0  # how far points of two methods stand from each other that have the same x
COLOURS = 8  # that the template has
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "M-3.6 -3.6h7.2v7.2h-7.2z",  # square
    "M0 -4.8L4.6 3.4H-4.6z",  # triangle
    "M0 -5L5 0L0 5L-5 0z",  # diamond
    "M0 4.8L4.6 -3.4H-4.6z",  # triangle, upside down
    "M-1.4 -4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z",  # plus
    "M0 -5L1.5 -1.5L5 0L1.5 1.5L0 5L-1.5 1.5L-5 0L-1.5 -1.5z",  # star
    "M-5 -2h10v4h-10z",  # bar
)


@dataclass(frozen=True)
class Point:
    """A figure, with its interval where it has one, and what it is of."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one method.

    Attributes:
        number: of the method, which says colour and marker.
    """

    name: str
    number: int
    points: Sequence[Point]

    @property
    def colour(self) -> int:
        """The number of its colour."""
        return self.number % COLOURS

    @property
    def marker(self) -> str:
        """The outline of its marker, around 0, 0."""
        return marker_of(self.number)


def marker_of(number: int) -> str:
    """The outline of a method's marker."""
    return _MARKERS[(number + number // COLOURS) % len(_MARKERS)]


@dataclass(frozen=True)
class Axis:
    """An axis: what it says, from where to where it goes, and its ticks.

    Attributes:
        readable: a value as people read it.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool
    readable: Callable[[float], str] = field(repr=False)

    def share(self, value: float) -> float:
        """Where a value stands, 0 … 1."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = (math.log(max(x, 1e-12)) for x in (low, high, value))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5


@dataclass(frozen=True)
class Chart:
    """A chart of some series."""

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    has_lines: bool = True

    def left(self, value: float, series: Series | None = None) -> float:
        """Where a value of x stands in the picture; a series' own beside those of others."""
        aside = 0.0
        if series is not None and self.has_lines:
            aside = _APART * (list(self.series).index(series) - (len(self.series) - 1) / 2)
        return round(LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT) + aside, 1)

    def top(self, value: float) -> float:
        """Where a value of y stands in the picture."""
        return round(HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, series: Series) -> str:
        """The line through a series."""
        places = [f"{self.left(p.x, series)} {self.top(p.y)}" for p in series.points]
        return "M" + "L".join(places)

    @property
    def has_intervals(self) -> bool:
        """Whether there is room to draw them."""
        return len(self.series) <= _CLEAR

    @property
    def said(self) -> str:
        """The picture in words."""
        names = ", ".join(series.name for series in self.series)
        return f"{self.title}: {self.y.label} by {self.x.label} of {names}"


def share_axis(label: str) -> Axis:
    """0 … 1."""
    return Axis(label, 0.0, 1.0, (0, 0.25, 0.5, 0.75, 1), False, lambda value: f"{value:g}")


def length_axis(label: str, values: Sequence[float]) -> Axis:
    """Tokens, with a tick for each length that occurs, or for some of many."""
    known = sorted(set(values))
    low, high = known[0], known[-1]
    room = (high / low) ** 0.08 if high > low else 2.0
    return Axis(label, low / room, high * room, _some(known), True, readable_count)


def value_axis(label: str, values: Sequence[float]) -> Axis:
    """Values of one order of magnitude, between round ticks."""
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    size = 10.0 ** math.floor(math.log10(spread / 2))
    step = size * next(factor for factor in (1, 2, 5, 10) if spread / (size * factor) <= 4)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    ticks = [n * step for n in range(first, max(last, first + 1) + 1)]
    return Axis(label, ticks[0], ticks[-1], ticks, False, lambda value: f"{value:.4g}")


def log_axis(
    label: str,
    values: Sequence[float],
    readable: Callable[[float], str],
    factors: Sequence[float] = (1, 2, 5),
    base: float = 10,
) -> Axis:
    """Values by their order of magnitude, between ticks of `factors × base ** n`.

    Those that have none, 0, stand a tick below the others, which says 0.
    """
    positive = [value for value in values if value > 0] or [1.0]
    least, most = min(positive), max(positive)
    powers = [base**n for n in range(math.floor(math.log(least, base)) - 1, 99)]
    known = [factor * power for power in powers for factor in factors]
    first = max(n for n, tick in enumerate(known) if tick <= least)
    last = next(n for n, tick in enumerate(known) if n > first and tick >= most)
    if len(positive) == len(values):
        ticks = known[first : last + 1]
        return Axis(label, ticks[0], ticks[-1], _some(ticks), True, readable)
    ticks, zero = known[first - 1 : last + 1], known[first - 1]

    def named(value: float) -> str:
        return readable(value if value > zero else 0.0)

    return Axis(label, zero, ticks[-1], _some(ticks), True, named)


def bytes_axis(label: str, values: Sequence[float]) -> Axis:
    """Bytes by their order of magnitude, with powers of two as ticks."""
    return log_axis(label, values, _short_bytes, factors=(1,), base=2)


def _short_bytes(count: float) -> str:
    return readable_bytes(count).replace(".00 ", " ").replace(".0 ", " ")


def _some(ticks: Sequence[float]) -> Sequence[float]:
    """Not more ticks than have room, the first among them."""
    return ticks[:: math.ceil(len(ticks) / _TICKS)]


def readable_count(count: float) -> str:
    """A count of tokens: 4000 is 4k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
