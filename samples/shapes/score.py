"""An exact scorer for pictures of the Shapes world: segmentation and geometry, nothing learned.

A picture is read back into its background and objects (`segment`), and these are compared with what
a caption asks for (`score`). Object colours are decided in the core of an object, never at its rim,
where it mixes with the background; shapes are decided by the overlap with drawn templates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dittune.samples.shapes import world

NEAR = 80.0  # RGB distance below which a pixel can be of a palette colour
MIXED = 45.0  # RGB distance from the line background..colour below which a pixel is a mix
MIN_AREA = 16.0  # pixels; less is a speck
MIN_FIT = 0.75  # overlap with the best template below which a shape is "unknown"
MIN_ASPECT = 0.75  # an object whose box is flatter than this is no shape of the world

_PALETTE = np.array(list(world.COLORS.values()), np.float32)
_COLOR_NAMES = list(world.COLORS)
_SIZE_NAMES = list(world.SIZES)
_SIZE_LIMITS = [
    (max(world.SIZES[a]) + min(world.SIZES[b])) / 2 for a, b in itertools.pairwise(_SIZE_NAMES)
]


@dataclass(frozen=True)
class FoundObject:
    """One object read from a picture, in pixels of the 64-pixel canvas.

    Attributes:
        shape: a shape of the world, or "unknown" if no template fits.
        radius: half extent of its box.
        fit: overlap (intersection over union) with the best template.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float
    fit: float
    area: float

    @property
    def size(self) -> str:
        return _SIZE_NAMES[int(np.searchsorted(_SIZE_LIMITS, self.radius))]


class Outline(NamedTuple):
    """An object: numbers of its colour and shade, and how much of each pixel is of it, 0 to 1."""

    color: int
    shade: int
    alpha: np.ndarray


@dataclass(frozen=True)
class Score:
    """Answers to a caption's questions; None where the caption says nothing.

    Attributes:
        objects: for each named object, whether it is there with its own colour and shape.
        sizes: for each named object, whether it has the size stated.
        relation: whether the stated relation holds.
        background: whether the background is the one stated.
        extra: how many objects nobody asked for.
    """

    objects: tuple[bool, ...]
    sizes: tuple[bool | None, ...]
    relation: bool | None
    background: bool | None
    extra: int

    @property
    def success(self) -> bool:
        stated = (*self.sizes, self.relation, self.background)
        return all(self.objects) and self.extra == 0 and all(s is not False for s in stated)


def segment(picture: np.ndarray) -> tuple[str, list[FoundObject]]:
    """Read a picture: the name of its background and the objects on it.

    Args:
        picture: uint8 `[side, side, 3]`, side a multiple of 64.

    Raises:
        ValueError: another shape or type.
    """
    background, found = outlines(picture)
    measured = [measure(outline) for outline in found]
    return background, [thing for thing in measured if thing.area >= MIN_AREA]


def outlines(picture: np.ndarray, shades: Sequence[float] = (1.0,)) -> tuple[str, list[Outline]]:
    """The name of the background, and the objects, each in the nearest of the shades."""
    pixels = _to_canvas(picture)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    middle = np.median(border, axis=0)
    background = min(
        world.BACKGROUNDS, key=lambda name: np.linalg.norm(middle - world.BACKGROUNDS[name])
    )
    ground = np.float32(world.BACKGROUNDS[background])
    inks = (_PALETTE[:, None] * np.float32(shades)[:, None]).reshape(-1, 3)
    distance = np.linalg.norm(pixels[:, :, None] - np.concatenate([inks, ground[None]]), axis=-1)
    label = np.where(distance.min(-1) < NEAR, distance.argmin(-1) // len(shades), -1)
    cores = []
    for color, full in enumerate(_PALETTE):
        for part in _components(label == color):
            inner = pixels[_eroded(part)]
            if len(inner) >= 3:  # a rim is too thin to survive this
                brightness = np.median(inner @ full / (full @ full))
                shade = int(np.abs(np.subtract(shades, brightness)).argmin())
                cores.append((color, shade, part))
    taken = sum((part.astype(int) for *_, part in cores), np.zeros(label.shape, int))
    found = []
    for color, shade, part in cores:
        ink = _PALETTE[color] * np.float32(shades[shade])
        alpha = _alpha(pixels, ground, ink, part, taken - part)
        found.append(Outline(color, shade, alpha))
    return background, found


def score(picture: np.ndarray, request: world.Request | str) -> Score:
    """Answer every question a caption raises about a picture.

    Args:
        picture: uint8 `[side, side, 3]`, side a multiple of 64.
        request: a caption, or what `world.parse` made of it.

    Raises:
        ValueError: the caption cannot be parsed, or the picture has another shape.
    """
    if isinstance(request, str):
        request = world.parse(request)
    return judge(*segment(picture), request)


def judge(background: str, found: list[FoundObject], request: world.Request) -> Score:
    """Answer every question about what was read from a picture."""
    free, matched = list(found), [None] * len(request.objects)
    for i in sorted(range(len(matched)), key=lambda i: request.objects[i].size is None):
        named = request.objects[i]  # those with a size take theirs first
        fitting = [f for f in free if (f.color, f.shape) == (named.color, named.shape)]
        fitting.sort(key=lambda f: (f.size != named.size, -f.fit))
        if fitting:
            matched[i] = fitting[0]
            free.remove(fitting[0])
    sizes = tuple(
        None if named.size is None else thing is not None and thing.size == named.size
        for named, thing in zip(request.objects, matched, strict=True)
    )
    relation = None
    if request.relation is not None:
        (first, second), (sx, sy) = matched, world.RELATIONS[request.relation]
        apart = sx * (first.x - second.x) + sy * (first.y - second.y) if first and second else 0
        if request.objects[0] == request.objects[1]:  # whichever is meant by which
            apart = abs(apart)
        relation = apart >= world.RELATION_MARGIN / 2
    return Score(
        objects=tuple(thing is not None for thing in matched),
        sizes=sizes,
        relation=None if relation is None else bool(relation),
        background=None if request.background is None else background == request.background,
        extra=len(free),
    )


def _to_canvas(picture: np.ndarray) -> np.ndarray:
    side = picture.shape[0] if picture.ndim == 3 else 0
    is_square = bool(side) and picture.shape == (side, side, 3)
    if not is_square or side % world.CANVAS or picture.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 picture [side, side, 3] with side a multiple of {world.CANVAS}, "
            f"got {picture.dtype} {picture.shape}"
        )
    k = side // world.CANVAS
    return picture.reshape(world.CANVAS, k, world.CANVAS, k, 3).mean((1, 3), dtype=np.float32)


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Connected parts (8 neighbours) of a mask."""
    rest = mask.copy()
    while rest.any():
        part = np.zeros_like(rest)
        part[np.unravel_index(rest.argmax(), rest.shape)] = True
        while True:
            grown = _dilated(part) & rest
            if (grown == part).all():
                break
            part = grown
        rest &= ~part
        yield part


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """The mask shifted to each of the 3 x 3 places, `[9, H, W]`."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.stack([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)])


def _dilated(mask: np.ndarray) -> np.ndarray:
    return _neighbours(mask).any(0)


def _eroded(mask: np.ndarray) -> np.ndarray:
    return _neighbours(mask).all(0)


def _alpha(pixels, ground, ink, part: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How much of each pixel in and around a core is of its ink, `[64, 64]` in [0, 1]."""
    towards = ink - ground
    offset = pixels - ground
    share = (offset @ towards) / (towards @ towards)
    residual = np.linalg.norm(offset - share[..., None] * towards, axis=-1)
    around = _dilated(_dilated(part)) & (others == 0)
    alpha = np.where(around & (residual < MIXED), share.clip(0, 1), 0)
    return np.where(part, np.maximum(alpha, 0.5), alpha)


def measure(outline: Outline) -> FoundObject:
    """Shape, place and size of an object, by the overlap with drawn templates."""
    alpha = outline.alpha
    solid = alpha >= 0.5
    rows, cols = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    half_h, half_w = (rows[-1] - rows[0] + 1) / 2, (cols[-1] - cols[0] + 1) / 2
    y, x = rows[0] + half_h, cols[0] + half_w
    best = (0.0, "unknown", x, y, (half_h + half_w) / 2)
    for grow in (0.0, 0.5, 1.0):  # thin corners fall below the threshold that gave the box
        radius = (half_h + half_w) / 2 + grow
        for name in world.SHAPES:
            is_thin = name == "triangle" and grow  # only its apex is
            for rise in (0.0, grow) if is_thin else (0.0,):
                template = world.coverage(name, x, y - rise, radius, world.CANVAS)
                fit = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
                best = max(best, (float(fit), name, float(x), float(y - rise), float(radius)))
    fit, shape, x, y, radius = best
    if fit < MIN_FIT or min(half_h, half_w) < MIN_ASPECT * max(half_h, half_w):
        shape = "unknown"
    color = _COLOR_NAMES[outline.color]
    return FoundObject(color, shape, x, y, radius, round(fit, 4), float(alpha.sum()))
