"""Scenes of coloured shapes with captions: what the bundled checkpoints are trained on.

A scene is 1 to 4 objects of different colours on a plain background, drawn 64 x 64. Its caption
comes from a small grammar::

    OBJECTS [on a COLOR background]    OBJECTS = OBJECT joined by ", ", " and " or a RELATION
    OBJECT = a|an [small|large] COLOR SHAPE

Everything a caption states can be checked in the picture; `score.py` does so. Train, validation and
test scenes differ in which *pairs of objects* may stand together (`split_of_pair`), so a model that
does well on `test` has composed objects it never saw together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CANVAS = 64  # pixels a side; scene coordinates are in these units

COLORS = {
    "red": (228, 30, 38),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 30),
    "green": (40, 165, 60),
    "cyan": (40, 210, 230),
    "blue": (35, 75, 215),
    "purple": (140, 45, 185),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (128, 128, 128), "black": (12, 12, 12)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": (7, 8), "medium": (10, 11), "large": (14,)}  # half extents in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

MARGIN = 2  # pixels kept free at the canvas border
GAP = 3  # pixels kept free between the boxes of two objects
RELATION_MARGIN = 10  # a caption names a relation only if the centres are this far apart
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object. `x`, `y` are its centre and `radius` its half extent, in canvas pixels."""

    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def size(self) -> str:
        return next(name for name, radii in SIZES.items() if self.radius <= radii[-1])


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: str


def shape_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) to a shape of half extent `r` around the origin.

    Exact on straight edges; near corners it is a lower bound, which only sharpens them.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.75 * r) - 0.25 * r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - r
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy) - r) / np.sqrt(2.0)
    if shape == "cross":
        arm = r / 3
        upright = np.maximum(np.abs(dx) - arm, np.abs(dy) - r)
        across = np.maximum(np.abs(dx) - r, np.abs(dy) - arm)
        return np.minimum(upright, across)
    if shape == "triangle":  # apex up, base at the bottom of the box
        slope = (2 * np.abs(dx) - (dy + r)) / np.sqrt(5.0)
        return np.maximum(slope, dy - r)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """Share of each pixel the shape covers, float32 `[side, side]`, coordinates in pixels."""
    rows, cols = np.mgrid[0:side, 0:side].astype(np.float32) + 0.5
    distance = shape_distance(shape, cols - x, rows - y, radius)
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def draw(scene: Scene, side: int = CANVAS, shades: Sequence[float] = ()) -> np.ndarray:
    """The picture of a scene, uint8 `[side, side, 3]`; `shades` darken its objects one by one."""
    scale = side / CANVAS
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing, shade in zip(scene.objects, shades or [1] * len(scene.objects), strict=True):
        place = thing.x * scale, thing.y * scale, thing.radius * scale
        alpha = coverage(thing.shape, *place, side)[..., None]
        picture = (1 - alpha) * picture + alpha * np.float32(COLORS[thing.color]) * shade
    return np.round(picture).astype(np.uint8)


def split_of_pair(first: tuple[str, str], second: tuple[str, str]) -> str:
    """The split that owns a pair of (color, shape): 10 % `val`, 10 % `test`, else `train`."""
    key = " | ".join(" ".join(thing) for thing in sorted((first, second)))
    fold = hashlib.sha256(key.encode()).digest()[0] % 10
    return {0: "val", 1: "test"}.get(fold, "train")


def split_of(kinds: Sequence[tuple[str, str]]) -> str | None:
    """The split a set of (color, shape) belongs to, or None if it mixes `val` and `test` pairs.

    A set is `train` if all its pairs are; it belongs to `val` (`test`) if some pair does and none
    belongs to `test` (`val`). So no pair and no triple of `val` or `test` is ever seen in training.
    """
    splits = {split_of_pair(a, b) for a, b in itertools.combinations(kinds, 2)}
    if splits <= {"train"}:
        return "train"
    held_out = splits - {"train"}
    return held_out.pop() if len(held_out) == 1 else None


def sample_kinds(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str]]:
    """`count` (color, shape) of different colours that belong to `split`.

    Single objects have no pairs: each colour-shape is in every split.
    """
    while True:
        colors = rng.choice(list(COLORS), size=count, replace=False)
        kinds = [(str(color), str(rng.choice(SHAPES))) for color in colors]
        if count == 1 or split_of(kinds) == split:
            return kinds


def free_place(
    rng: np.random.Generator, radius: int, taken: Sequence[tuple[int, int, int]]
) -> tuple[int, int] | None:
    """A centre for an object, clear of those `taken` (x, y, radius); None if none was found."""
    for _ in range(40):
        x, y = rng.integers(radius + MARGIN, CANVAS - radius - MARGIN + 1, size=2)
        if all(max(abs(x - px), abs(y - py)) >= radius + r + GAP for px, py, r in taken):
            return int(x), int(y)
    return None


def _place(rng: np.random.Generator, radii: Sequence[int]) -> list[tuple[int, int]] | None:
    placed: list[tuple[int, int, int]] = []
    for radius in radii:
        centre = free_place(rng, radius, placed)
        if centre is None:
            return None
        placed.append((*centre, radius))
    return [(x, y) for x, y, _ in placed]


def sample_scene(rng: np.random.Generator, count: int | None = None, split: str = "train") -> Scene:
    """A random scene of `split` with `count` objects (1 to 4; drawn at random if None)."""
    if count is None:
        count = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.4, 0.2, 0.15]))
    kinds = sample_kinds(rng, count, split)
    while True:
        sizes = rng.choice(list(SIZES), size=count, p=[0.3, 0.4, 0.3])
        radii = [int(rng.choice(SIZES[str(size)])) for size in sizes]
        centres = _place(rng, radii)
        if centres is not None:
            break
    objects = tuple(
        SceneObject(color, shape, x, y, r)
        for (color, shape), (x, y), r in zip(kinds, centres, radii, strict=True)
    )
    return Scene(objects, str(rng.choice(list(BACKGROUNDS))))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def listed(phrases: Sequence[str]) -> str:
    *others, last = phrases
    return f"{', '.join(others)} and {last}" if others else last


def true_relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Relations of `first` to `second` that hold with `RELATION_MARGIN` to spare."""
    dx, dy = first.x - second.x, first.y - second.y
    return [name for name, (sx, sy) in RELATIONS.items() if sx * dx + sy * dy >= RELATION_MARGIN]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is true of the scene and names all its objects."""
    phrases = []
    for thing in scene.objects:
        named = thing.size != "medium" and rng.random() < 0.4
        words = f"{thing.size} " if named else ""
        phrases.append(article(f"{words}{thing.color} {thing.shape}"))
    relations = true_relations(*scene.objects) if len(scene.objects) == 2 else []
    if relations and rng.random() < 0.35:
        text = f" {rng.choice(relations)} ".join(phrases)
    else:
        text = listed(phrases)
    if rng.random() < 0.4:
        text += f" on {article(scene.background)} background"
    return text


@dataclass(frozen=True)
class NamedObject:
    """What a caption says of one object; `size` is None where it says nothing."""

    color: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Request:
    """What a caption asks for. `relation` is of the first object to the second."""

    objects: tuple[NamedObject, ...]
    relation: str | None = None
    background: str | None = None


def parse(text: str) -> Request:
    """Read a caption of the grammar above.

    Raises:
        ValueError: the text is not in the grammar (says at which words).
    """
    words = text.lower().replace(",", " and ").rstrip(" .").strip()
    background = None
    for name in BACKGROUNDS:
        for tail in (f" on {article(name)} background", f" on the {name} background"):
            if words.endswith(tail):
                words, background = words[: -len(tail)], name
    relation = None
    for name in RELATIONS:
        if f" {name} " in words:
            relation = name
            words = words.replace(f" {name} ", " and ")
    objects = tuple(_parse_object(part, text) for part in words.split(" and ") if part.strip())
    if not objects:
        raise ValueError(f"no object in {text!r}; expected for example 'a red circle'")
    if relation and len(objects) != 2:
        raise ValueError(f"{relation!r} needs two objects, {text!r} names {len(objects)}")
    return Request(objects, relation, background)


def _parse_object(part: str, text: str) -> NamedObject:
    words = part.split()
    if words and words[0] in ("a", "an", "the"):
        words = words[1:]
    size = words.pop(0) if words and words[0] in SIZES else None
    if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
        raise ValueError(
            f"cannot read {part.strip()!r} in {text!r}; expected '[small|large] COLOR SHAPE' with "
            f"a colour of {', '.join(COLORS)} and a shape of {', '.join(SHAPES)}"
        )
    return NamedObject(words[0], words[1], size)


def vocabulary() -> list[str]:
    """Every word (and the comma) a caption can contain."""
    words = {"a", "an", "and", "on", "background", "the", ",", "medium"}
    words |= set(COLORS) | set(BACKGROUNDS) | set(SHAPES) | set(SIZES)
    words |= {word for relation in RELATIONS for word in relation.split()}
    return sorted(words)
