"""Circular local attention: each token sees the tokens closer than a radius (CLEAR).

Source: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"
(arXiv 2412.16112) and the repository Huage001/CLEAR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import Pattern, Tables


@dataclass(frozen=True)
class Local(Pattern):
    """Tokens at a distance *below* `radius` attend; at borders the disc is clipped.

    On grids of several frames the disc is a ball over frame, row and column.

    Attributes:
        radius: in tokens, above 0. 8 means 193 tokens of an image, 16 means 793, 32 means 3205.

    Raises:
        ConfigError: a radius that is not above 0.
    """

    radius: float
    exact_on_boxes = True

    def __post_init__(self):
        if not 0 < self.radius < 2**15:
            raise ConfigError(f"radius is above 0 and below 32768 tokens, got {self.radius}")

    @property
    def limit(self) -> int:
        """Squared distances are integers: those below `limit` are below `radius ** 2`."""
        limit = math.ceil(self.radius**2)  # of the root of 2 it is 3, for want of digits
        return limit if math.sqrt(limit - 1) < self.radius else limit - 1

    def allows(self, query, key):
        return (query - key).square().sum(-1) < self.limit

    def bounds(self, query, key):
        nearest = farthest = torch.zeros((), dtype=torch.int64)
        for i in range(3):
            behind = key.low[None, :, i] - query.high[:, None, i]  # (nq, nk), as all below
            before = query.low[:, None, i] - key.high[None, :, i]
            nearest = nearest + torch.maximum(behind, before).clamp(min=0).square()
            farthest = farthest + torch.minimum(behind, before).square()
        return nearest < self.limit, farthest < self.limit

    def tables(self, query, key):
        limit = torch.tensor([self.limit, 0, 0]).expand(len(query), 3)
        return Tables("disc", torch.cat([query, limit], dim=1).int(), key.int())


def local_rules(radius: float, pooled: bool = False) -> dict[tuple[str, str], Pattern | bool]:
    """Who sees whom among the segments `text`, `image` and, among the keys only, `pooled`.

    Text sees text and image, the image sees text and its disc. With `pooled`, the image also sees
    all of a coarse copy of the keys (one for each cell of `d x d` tokens); text does not.
    """
    rules = {
        ("text", "text"): True,
        ("text", "image"): True,
        ("image", "text"): True,
        ("image", "image"): Local(radius),
    }
    return rules | {("image", "pooled"): True, ("text", "pooled"): False} if pooled else rules
