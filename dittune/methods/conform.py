"""CONFORM: words of one concept attract each other's attention, those of others repel it.

Source: "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models"
(arXiv 2312.06059), and its reference code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dittune.errors import ConfigError
from dittune.words.attn_maps import WordMaps, smooth
from dittune.words.latent_step import LatentStep
from dittune.words.map_losses import contrast

REFINED = (0.0, 0.2, 0.4)  # shares of the steps at which updates are repeated


@dataclass(frozen=True, kw_only=True)
class Conform(LatentStep):
    """Contrast the maps of words; the words of one concept are positive pairs.

    The maps of the step before take part, with the same concepts, so that words stay where they
    are. A picture with one concept has nothing to contrast and is left alone.

    Args:
        temperature: of the contrast.
        refinements: how often the update is repeated at the first step and after a fifth and two
            fifths of the steps.

    Raises:
        ConfigError: `temperature` not above 0, or `refinements` below 0.

    Differs: every picture of a batch keeps its own maps of the step before; the reference shares
    those of the last picture.
    """

    stop: float = 0.5
    temperature: float = 0.5
    refinements: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"conform: temperature is above 0, got {self.temperature}")
        if self.refinements < 0:
            raise ConfigError(f"conform: refinements is from 0 on, got {self.refinements}")

    def loss(self, picture: WordMaps, before: Any) -> torch.Tensor:
        vectors, labels = _vectors(picture)
        if before is not None:
            vectors, labels = torch.cat([vectors, before]), labels.repeat(2)
        return contrast(vectors, labels, self.temperature)

    def remember(self, picture: WordMaps) -> torch.Tensor:
        return _vectors(picture)[0].detach()

    def refinement(self, step: int, num_steps: int) -> tuple[int, float]:
        if any(step == int(share * num_steps) for share in REFINED):
            return self.refinements, 0.0
        return 0, 0.0


def _vectors(picture: WordMaps) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of each word as a vector `[W, h w]`, and the number of its concept `[W]`."""
    vectors = smooth(picture.of(picture.words.words)).flatten(1)
    numbers = [i for i, concept in enumerate(picture.words.concepts) for _ in concept]
    return vectors, torch.tensor(numbers, device=vectors.device)
