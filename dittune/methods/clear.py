"""CLEAR: each image token sees a disc around it, and optionally a coarse copy of the picture.

Source: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"
(arXiv 2412.16112) and the repository Huage001/CLEAR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from dittune.call import AttnCall
from dittune.errors import ConfigError
from dittune.patterns import Local, Plan, TokenOrder, best_order
from dittune.sparse.method import SparseMethod
from dittune.sparse.plan import Place, image_plan


@dataclass(frozen=True, kw_only=True)
class Clear(SparseMethod):
    """Circular local attention.

    Made for weights that were trained with it; a picture larger than its discs is not made well by
    others. Gradients flow, so that such a training can run with the method attached.

    Args:
        radius: of the disc in tokens; keys at a distance below it are seen. 8, 16 and 32 in the
            paper. On several frames the disc is a ball.
        pooled: if above 0, image tokens also see the mean key and value of each cell of so many by
            so many tokens, formed after rotary embedding. 4 in the paper.
        base_tokens: keys the model was trained with; logits are scaled by the root of the ratio of
            the logs of the numbers of keys, now to then. 0 does not scale. 4608 for FLUX.1.

    Raises:
        ConfigError: a radius or a number outside its range.

    Differs: the paper learns the weights within a cell, from these equal ones on.
    """

    radius: float = 16.0
    pooled: int = 0
    base_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Local(self.radius)
        if self.pooled < 0 or self.base_tokens < 0 or self.base_tokens == 1:
            raise ConfigError(
                "clear: pooled is 0 or a cell's side, base_tokens 0 or at least 2; "
                f"got {self.pooled} and {self.base_tokens}"
            )

    def plan(self, place: Place) -> Plan:
        grid, pattern = place.layout.grid, Local(self.radius)
        coarse = {}
        if self.pooled:
            height, width = (-(-side // self.pooled) for side in grid[1:])
            coarse = {"pooled": (TokenOrder((grid[0], height, width)), True)}
        return image_plan(place, pattern, best_order(pattern, grid, place.block), coarse)

    def scale(self, call: AttnCall) -> float | None:
        scale = super().scale(call)
        if not self.base_tokens:
            return scale
        keys = call.key.shape[2] + call.repeats - 1
        keys *= 10 if self.pooled else 1  # as the authors' code does
        scale = call.query.shape[3] ** -0.5 if scale is None else scale
        return scale * math.sqrt(math.log(keys) / math.log(self.base_tokens))

    def extended(self, call: AttnCall) -> AttnCall:
        if not self.pooled:
            return call
        key, value = (
            torch.cat([t, self._pool(t[:, :, slice(*call.layout.image)], call.layout.grid)], 2)
            for t in (call.key, call.value)
        )
        return call._replace(key=key, value=value)

    def _pool(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Means of the cells of each frame, clipped at the borders, `[B, H, cells, D]`."""
        batch, heads, _, dim = tokens.shape
        planes = tokens.transpose(2, 3).reshape(batch * heads * dim, grid[0], *grid[1:])
        cells = functional.avg_pool2d(planes, self.pooled, ceil_mode=True, count_include_pad=False)
        return cells.reshape(batch, heads, dim, -1).transpose(2, 3)
