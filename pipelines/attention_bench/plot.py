"""Speed-up against its bound, as an SVG: a point a row, the bound as a line."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

SIDE, MARGIN = 420, 52
COLOURS = {"triton": "#1f5fbf", "flex": "#c2571a", "cpu": "#2b7a4b"}


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both axes are logarithmic; rows without a dense time are left out."""
    rows = [row for row in rows if math.isfinite(row["speedup"])]
    most = max([1 / row["block_density"] for row in rows] + [row["speedup"] for row in rows] + [2])
    least = min([row["speedup"] for row in rows] + [0.5])

    def at(value: float) -> float:
        return (math.log(value) - math.log(least)) / (math.log(most) - math.log(least)) * SIDE

    size = SIDE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 120} {size}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{size + 120}" height="{size}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="13">speed-up over dense attention</text>',
        f'<text x="{MARGIN + SIDE / 2}" y="{size - 10}" text-anchor="middle">'
        "bound: all blocks over visited blocks</text>",
    ]
    for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128):
        if least <= tick <= most:
            x, y = MARGIN + at(tick), MARGIN + SIDE - at(tick)
            parts.append(_line(MARGIN, y, MARGIN + SIDE, y, "#e4e4e0"))
            parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
            parts.append(f'<text x="{x:.1f}" y="{size - 30}" text-anchor="middle">{tick}</text>')
    parts.append(_line(MARGIN, MARGIN + SIDE, MARGIN + SIDE, MARGIN, "#8a8a85"))
    for row in rows:
        x, y = MARGIN + at(1 / row["block_density"]), MARGIN + SIDE - at(row["speedup"])
        label = html.escape("{shape} {pattern} {backend}, {commit}".format(**row))
        colour = COLOURS.get(row["backend"], "#555")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" '
                     f'fill-opacity="0.7"><title>{label}</title></circle>')  # fmt: skip
    for i, name in enumerate(sorted({row["backend"] for row in rows})):
        y = MARGIN + 18 * i
        colour = COLOURS.get(name, "#555")
        parts.append(f'<circle cx="{size}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{size + 9}" y="{y + 4}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
