"""Layers, written `3,5-7`, and sets of heads, written `layer:head,layer:head`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dittune.call import Site
from dittune.errors import ConfigError, SelectionError

ALL = "*"
NUMBER = re.compile(r"\d{1,6}")


def parse_layers(text: str) -> tuple[int, ...]:
    """`3,5-7` as `(3, 5, 6, 7)`; "" is `()`.

    Raises:
        ConfigError: anything else.
    """
    found: list[int] = []
    for part in text.split(",") if text.strip() else ():
        numbers = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if not numbers:
            raise ConfigError(f"layers are written like '3,5-7', got {text!r}")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            raise ConfigError(f"layers are written like '3,5-7', from first to last, got {text!r}")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


class HeadSet:
    """An ordered set of (layer, head); the head may be `*`, all heads of the layer.

    Args:
        text: for example `"2:1,3:0,5:*"`. An empty text is the empty set.

    Raises:
        ConfigError: the text is not of that form.
    """

    def __init__(self, text: str | Iterable[tuple[int, int]] = ""):
        if not isinstance(text, str):
            text = ",".join(f"{layer}:{head}" for layer, head in text)
        pairs: dict[tuple[int, int | str], None] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            layer, colon, head = (side.strip() for side in part.partition(":"))
            if not (colon and NUMBER.fullmatch(layer) and (head == ALL or NUMBER.fullmatch(head))):
                raise ConfigError(
                    f"heads are written layer:head,layer:head (head may be *), got {part!r}"
                )
            pairs[int(layer), head if head == ALL else int(head)] = None
        self.pairs = tuple(pairs)

    def __str__(self) -> str:
        return ",".join(f"{layer}:{head}" for layer, head in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, count: int) -> HeadSet:
        """The first `count` heads, in the order in which they were given."""
        return HeadSet(",".join(f"{layer}:{head}" for layer, head in self.pairs[:count]))

    def at(self, site: Site) -> list[int]:
        """Head numbers selected at a site, ascending."""
        chosen = {head for layer, head in self.pairs if layer == site.layer}
        if ALL in chosen:
            return list(range(site.heads))
        return sorted(head for head in chosen if isinstance(head, int))

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """The sites (all of one kind) at which a head is selected.

        Raises:
            SelectionError: a layer or head does not exist.
        """
        by_layer = {site.layer: site for site in sites}
        for layer, head in self.pairs:
            if layer not in by_layer:
                raise SelectionError(
                    f"head {layer}:{head}: no layer {layer}; "
                    f"this model has layers 0 to {len(by_layer) - 1}"
                )
            heads = by_layer[layer].heads
            if isinstance(head, int) and head >= heads:
                raise SelectionError(
                    f"head {layer}:{head}: no head {head}; layer {layer} has heads 0 to {heads - 1}"
                )
        return [site for site in sites if self.at(site)]
