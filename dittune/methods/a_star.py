"""A-STAR: concepts keep apart from each other, and stay where they were.

Source: "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis"
(arXiv 2306.14544).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dittune.words.attn_maps import WordMaps, otsu
from dittune.words.latent_step import LatentStep
from dittune.words.map_losses import retention, segregation
from dittune.words.tokens import Concept


@dataclass(frozen=True, kw_only=True)
class AStar(LatentStep):
    """Segregate the maps of the concepts, and retain where each was high a step before.

    The map of a concept is the sum over its words; of the noun groups that are found in a prompt,
    only the nouns are taken. The retention loss of a concept is at least a half.

    Its report adds `overlap`, the mean overlap of two concepts (0 to 0.5), and `retention_iou`, the
    intersection over union of where a concept is high with where it was a step before.

    Differs: the paper does not say how a map becomes a mask; here by Otsu's threshold. Nor does its
    main part give the step size, which is that of attend-and-excite.
    """

    def find(self, prompt: str) -> Sequence[Concept]:
        return [concept[-1:] for concept in super().find(prompt)]

    def loss(self, picture: WordMaps, before: Any) -> torch.Tensor:
        maps = _concepts(picture)
        loss = segregation(maps)
        return loss if before is None else loss + retention(maps, before)

    def remember(self, picture: WordMaps) -> torch.Tensor:
        """Where each concept is high, booleans `[W, h, w]`."""
        return torch.stack([otsu(values) for values in _concepts(picture).detach()])

    def measure(self, picture: WordMaps, before: Any) -> dict[str, torch.Tensor]:
        maps = _concepts(picture)
        pairs = len(maps) * (len(maps) - 1) // 2
        numbers = {"overlap": segregation(maps) / pairs} if pairs else {}
        if before is not None:
            now = self.remember(picture)
            both, either = (now & before).sum((1, 2)), (now | before).sum((1, 2))
            numbers["retention_iou"] = (both / either.clamp_min(1)).mean()
        return numbers


def _concepts(picture: WordMaps) -> torch.Tensor:
    """`[W, h, w]`: a token that two words of a concept share counts once."""
    tokens = [{t for word in concept for t in word} for concept in picture.words.concepts]
    return picture.of([sorted(group) for group in tokens])
