"""Line charts as inline SVG: axes with round numbers, units, a legend in the page around them, and no script.

Each chart is drawn twice, wide and narrow. An SVG that is scaled down to a telephone shrinks its letters too, and letters that cannot be read
are decoration; the style sheet shows whichever fits. Where curves coincide, the first is drawn broad and pale and the second thin on top, so
both can be seen. A value that is missing interrupts its curve.
"""

import math
from dataclasses import dataclass
from html import escape

SHAPES = {"wide": (860, 300), "narrow": (360, 240)}
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 8, 40


@dataclass
class Curve:
    """`points` are (step, value); `style` is the CSS class that colours it."""

    style: str
    points: list[tuple[float, float | None]]


def chart(title: str, unit: str, curves: list[Curve], zero_based: bool = False, band: float | None = None) -> str:
    """A figure of `curves` over the step number; `band` shades the strip of ±band around zero."""
    values = [value for curve in curves for _, value in curve.points if value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    if zero_based:
        low, high = min(0.0, low), max(0.0, high)
    if band is not None:
        high = 1.15 * max(abs(low), abs(high)) or 1.15 * band
        # A tolerance far above the differences would press them flat; it is then named in words below the chart.
        high = max(high, 1.15 * band) if high > band / 8 else high
        low = -high
    ticks = round_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    drawn = "".join(_svg(shape, title, curves, ticks, low, high, band) for shape in SHAPES)
    return f'<figure class="chart"><figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>{drawn}</figure>'


def _svg(
    shape: str,
    title: str,
    curves: list[Curve],
    ticks: list[float],
    low: float,
    high: float,
    band: float | None,
) -> str:
    width, height = SHAPES[shape]
    last = max(step for curve in curves for step, _ in curve.points)
    first = min(1, last)

    def x(step: float) -> float:
        return LEFT + (step - first) / max(last - first, 1) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - low) / ((high - low) or 1) * (height - TOP - BOTTOM)

    parts = [
        f'<svg class="{shape}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)} over the steps">'
    ]
    if band is not None:
        top, bottom = y(min(band, high)), y(max(-band, low))
        parts.append(
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{width - LEFT - RIGHT}" height="{bottom - top:.1f}"/>'
        )
    for value in ticks:
        kind = "axis" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value, ticks)}</text>'
        )
    for step in step_ticks(first, last, 10 if shape == "wide" else 5):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{step}</text>'
        )
    parts.append(
        f'<text class="label" x="{(LEFT + width - RIGHT) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
    )
    for curve in curves:
        for piece in _pieces(curve.points):
            if len(piece) == 1:
                parts.append(
                    f'<circle class="{curve.style} dot" cx="{x(piece[0][0]):.1f}" cy="{y(piece[0][1]):.1f}" r="3"/>'
                )
            else:
                path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in piece)
                parts.append(f'<polyline class="{curve.style}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def _pieces(points: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The unbroken stretches of a curve."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    return [piece for piece in pieces if piece]


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, from at or below `low` to at or above `high`."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [
        round(step * index, 12 - math.floor(math.log10(step)))
        for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


def step_ticks(first: int, last: int, count: int) -> list[int]:
    """The first step, then round step numbers up to the last."""
    if last - first < count:
        return list(range(int(first), int(last) + 1))
    rough = max(1.0, (last - first) / count)
    power = 10 ** math.floor(math.log10(rough))
    step = int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough))
    return [int(first), *range(step, int(last) + 1, step)]


def number(value: float, ticks: list[float]) -> str:
    """A tick's label, with as many decimals as tell the ticks apart."""
    spacing = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1
    if value and (spacing < 1e-4 or abs(value) >= 1e6):
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(spacing) + 1e-9))
        return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:,.{max(0, -math.floor(math.log10(spacing) + 1e-9))}f}".replace("-", "−")
