"""Curves of success against a swept setting, or against the work that was left, as SVGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PANEL, HEIGHT, LEFT, TOP, BOTTOM = 340, 280, 48, 34, 44
INK, BASE = "#1f5fbf", "#8a8a85"
INKS = (INK, "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#52525b")
WIDE, LEGEND = 520, 150  # of the panel of `against_work`


def draw(
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]], baseline: Mapping[str, Any], title: str
) -> str:
    """One panel a sweep: points with 95 % intervals, and the baseline as a dashed line.

    Args:
        sweeps: rows of `summarize` by `LABEL.FIELD`; each row's variant ends in `=VALUE`.
        baseline: the row to compare with.
    """
    shares = [row["success"] for rows in sweeps.values() for row in rows] + [baseline["success"]]
    low = max(0.0, min(share["low"] for share in shares) - 0.03)
    high = min(1.0, max(share["high"] for share in shares) + 0.03)

    def y(share: float) -> float:
        return TOP + (high - share) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = _sheet(PANEL * len(sweeps), f"success, {title}")
    for i, (name, rows) in enumerate(sweeps.items()):
        left, right = i * PANEL + LEFT, (i + 1) * PANEL - 16
        for tick in range(5):
            value = low + (high - low) * tick / 4
            parts.append(_line(left, y(value), right, y(value), "#e4e4e0"))
            parts.append(
                f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>'
            )
        base = y(baseline["success"]["share"])
        parts.append(_line(left, base, right, base, BASE, ' stroke-dasharray="5 4"'))
        parts.append(f'<text x="{right}" y="{base - 4:.1f}" text-anchor="end" fill="{BASE}">'
                     f'{baseline["variant"]}</text>')  # fmt: skip
        points = []
        for j, row in enumerate(rows):
            x = left + (j + 0.5) / len(rows) * (right - left)
            share = row["success"]
            points.append((x, y(share["share"])))
            parts.append(_line(x, y(share["low"]), x, y(share["high"]), INK))
            value = row["variant"].rpartition("=")[2]
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{value[:12]}</text>'
            )
        line = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{h:.1f}" r="3.5" fill="{INK}"/>' for x, h in points]
        parts.append(f'<text x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
                     f'font-weight="bold">{name}</text>')  # fmt: skip
    return "\n".join([*parts, "</svg>"]) + "\n"


def against_work(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> str:
    """One panel: paired differences of success, with 95 % intervals, over the pairs computed.

    Args:
        sweeps: rows of `summarize` by `LABEL.FIELD`, each with `computed` and `difference`.
    """
    rows = [row for group in sweeps.values() for row in group]
    low = min(0.0, *(row["difference"][1] for row in rows)) - 0.02
    high = max(0.0, *(row["difference"][2] for row in rows)) + 0.02
    right, bottom = LEFT + WIDE, HEIGHT - BOTTOM

    def y(gap: float) -> float:
        return TOP + (high - gap) / (high - low) * (bottom - TOP)

    parts = _sheet(right + LEGEND, f"points of success against dense, {title}")
    for tick in range(5):
        gap = low + (high - low) * tick / 4
        parts.append(_line(LEFT, y(gap), right, y(gap), "#e4e4e0"))
        parts.append(f'<text x="{LEFT - 6}" y="{y(gap) + 4:.1f}" text-anchor="end">'
                     f"{100 * gap:+.0f}</text>")  # fmt: skip
        x = LEFT + WIDE * tick / 4
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick / 4:.0%}</text>')
    parts.append(_line(LEFT, y(0), right, y(0), BASE, ' stroke-dasharray="5 4"'))
    parts.append(f'<text x="{LEFT + WIDE / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
                 'font-weight="bold">pairs of image tokens computed</text>')  # fmt: skip
    for i, (name, group) in enumerate(sweeps.items()):
        ink, points = INKS[i % len(INKS)], []
        for row in sorted(group, key=lambda row: row["computed"]):
            x, (gap, least, most) = LEFT + WIDE * row["computed"], row["difference"]
            points.append(f"{x:.1f},{y(gap):.1f}")
            parts.append(_line(x, y(least), x, y(most), ink, ' stroke-opacity="0.5"'))
            parts.append(f'<circle cx="{x:.1f}" cy="{y(gap):.1f}" r="3.5" fill="{ink}">'
                         f"<title>{row['variant']}</title></circle>")  # fmt: skip
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{ink}"/>')
        parts.append(f'<text x="{right + 12}" y="{TOP + 16 * i + 10}" fill="{ink}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sheet(width: int, title: str) -> list[str]:
    """The beginning of a picture: its size, a white ground, the title."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{title}</text>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}"{more}/>'
