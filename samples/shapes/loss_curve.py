"""The loss log of a training run as a picture (SVG, logarithmic)."""

from __future__ import annotations

import csv
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 720, 320, 60, 20
INKS = ("#1f5fbf", "#c2410c", "#15803d")


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Named curves of (step, mean loss) from a `loss.csv` of the trainer."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for step, *cells in csv.reader(file):
            for cell in cells:
                name, _, value = cell.partition("=")
                curves.setdefault(name, []).append((int(step), float(value)))
    return curves


def draw(curves: dict[str, list[tuple[int, float]]], title: str) -> str:
    """All curves but the sum over one logarithmic axis."""
    curves = {name: points for name, points in curves.items() if name != "loss"}
    last = max(step for points in curves.values() for step, _ in points)
    logs = [math.log10(value) for points in curves.values() for _, value in points if value > 0]
    low, high = min(logs), max(logs)

    def place(step: int, value: float) -> tuple[float, float]:
        share = (high - math.log10(max(value, 10**low))) / (high - low or 1)
        return LEFT + step / last * (WIDTH - LEFT - 20), TOP + share * (HEIGHT - TOP - 40)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="14">{title}</text>',
    ]
    for tick in range(5):
        value = 10 ** (low + (high - low) * tick / 4)
        _, y = place(0, value)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 20}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x, _ = place(last * tick // 4, value)
        step = last * tick // 4
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{step}</text>')
    for i, (name, points) in enumerate(curves.items()):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        ink = INKS[i % len(INKS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}"/>')
        x = LEFT + 110 * i
        parts.append(f'<text x="{x}" y="{HEIGHT - 3}" fill="{ink}">{name} (by step)</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
