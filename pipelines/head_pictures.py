"""How widely each head of a model looks, as a generation goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dittune
from dittune.call import AttnCall, Site
from dittune.errors import SelectionError
from dittune.words.attn_maps import logits, rows_at_once

ROWS = 256  # of the image, from its middle: enough for a mean


@dataclass(frozen=True, kw_only=True)
class WatchHeads(dittune.Method):
    """Sees the attention of image tokens and changes nothing.

    Attributes:
        seen: of the last generation, for each `layer:head` that `softpag` can perturb, the entropy
            of its rows as a share of the highest: 0 looks at one token, 1 at all alike; the mean
            over steps and image tokens.
    """

    seen: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        for kind in ("joint", "self"):
            sites = [site for site in available if site.kind == kind]
            if sites:
                return sites
        raise SelectionError("watching heads needs joint or self attention; the model has none")

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        rows = call.chunk_of("cond")
        if rows is not None:
            memory = call.run.memory(self)
            if not hasattr(memory, "sums"):
                memory.sums, memory.counts = {}, {}
            layer = call.site.layer
            spread = _spread(call.take_rows(*rows))
            memory.sums[layer] = memory.sums.get(layer, 0.0) + spread
            memory.counts[layer] = memory.counts.get(layer, 0) + 1
        return proceed(call)

    def report(self, run: Any) -> dict[str, Any]:
        """Nothing for the record; the means go into `seen`."""
        memory = run.memory(self)
        self.seen.clear()
        for layer, total in getattr(memory, "sums", {}).items():
            means = (total / memory.counts[layer]).tolist()
            self.seen.update({f"{layer}:{head}": value for head, value in enumerate(means)})
        return {}


def _spread(call: AttnCall) -> torch.Tensor:
    """Mean entropy of rows, as a share of the highest, by head `[H]`."""
    first, last = call.layout.image
    count = min(last - first, ROWS, rows_at_once(call))
    start = first + (last - first - count) // 2
    chances = logits(call.take_queries(start, start + count)).softmax(-1)
    entropy = -torch.xlogy(chances, chances).sum(-1)
    return (entropy / math.log(chances.shape[-1])).mean((0, 2)).double().cpu()
