"""A picture of a search: layers x heads, coloured by mean score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, BAND = 30, 56, 46
WORSE, SAME, BETTER = (178, 58, 58), (245, 245, 242), (38, 110, 150)


def draw(
    scores: Mapping[str, float],
    plain: float,
    selected: Sequence[str],
    title: str,
    meaning: str = "plain",
) -> Image.Image:
    """One cell for each head.

    Args:
        scores: mean score by `layer:head`.
        plain: score of the plain model, drawn white; worse is red, better is blue.
        selected: heads in order of selection, marked with their number.
        title: above the map.
        meaning: what `plain` is, for the key.
    """
    cells = {tuple(map(int, name.split(":"))): value for name, value in scores.items()}
    layers, heads = (max(axis) + 1 for axis in zip(*cells, strict=True))
    reach = max(abs(value - plain) for value in cells.values()) or 1.0
    font = ImageFont.load_default(size=11)
    size = (MARGIN + max(heads * CELL, 300) + 10, BAND + layers * CELL + 40)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, 8), title, font=ImageFont.load_default(size=13), fill="black")
    for head in range(heads):
        pen.text((MARGIN + head * CELL + 11, BAND - 15), str(head), font=font, fill="black")
    for (layer, head), value in cells.items():
        x, y = MARGIN + head * CELL, BAND + layer * CELL
        color = _color((value - plain) / reach)
        pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=color)
        place = f"{layer}:{head}"
        if place in selected:
            pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), outline="black", width=2)
            number = str(list(selected).index(place) + 1)
            ink = "white" if abs(value - plain) > 0.6 * reach else "black"
            pen.text((x + CELL / 2 - 1, y + CELL / 2 - 1), number, font=font, fill=ink, anchor="mm")
    for layer in range(layers):
        y = BAND + layer * CELL + CELL / 2
        pen.text((MARGIN - 8, y), f"layer {layer}", font=font, fill="black", anchor="rm")
    key = f"{meaning} {plain:.3f} (white), {plain - reach:.3f} (red) to {plain + reach:.3f} (blue)"
    pen.text((MARGIN, BAND + layers * CELL + 8), key, font=font, fill="black")
    return picture


def head_at(scores: Mapping[str, float], x: float, y: float) -> str | None:
    """The `layer:head` drawn at a pixel; None beside the cells."""
    place = f"{int((y - BAND) // CELL)}:{int((x - MARGIN) // CELL)}"
    return place if place in scores else None


def _color(value: float) -> tuple[int, ...]:
    """-1..1 -> red, white, blue."""
    end = BETTER if value > 0 else WORSE
    return tuple(round(a + (b - a) * min(1.0, abs(value))) for a, b in zip(SAME, end, strict=True))
