"""Attend-and-excite: every word owns at least one image token.

Source: "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models"
(arXiv 2301.13826), and its reference code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dittune.errors import ConfigError
from dittune.words.attn_maps import WordMaps, smooth
from dittune.words.latent_step import LatentStep
from dittune.words.map_losses import neglect
from dittune.words.tokens import Concept

# Share of the steps at which updates are repeated, and the loss that is enough there.
REFINEMENT = ((0.0, 0.95), (0.2, 0.5), (0.4, 0.2))


@dataclass(frozen=True, kw_only=True)
class AttendAndExcite(LatentStep):
    """Raise the highest attention that the most neglected word gets anywhere.

    Every word of `concepts` counts by itself; of the noun groups that are found in a prompt, their
    nouns.

    Args:
        refinements: how often an update is repeated at most, at the first step and after a fifth
            and two fifths of the steps, until the words have the attention they should have by
            then; 0 updates once everywhere.
        enough: attention, in (0, 1], that a word must have somewhere; one that has it moves
            nothing at this step, so that it is not drawn twice. 1 is the paper's.

    Raises:
        ConfigError: `refinements` below 0, `enough` outside (0, 1].

    Differs: a word of several tokens, or in two text encoders, has the sum of its maps.
    """

    stop: float = 0.5
    refinements: int = 20
    enough: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refinements < 0:
            raise ConfigError(
                f"attend_and_excite: refinements is a number from 0 on, got {self.refinements}"
            )
        if not 0.0 < self.enough <= 1.0:
            raise ConfigError(f"attend_and_excite: enough is in (0, 1], got {self.enough}")

    def find(self, prompt: str) -> Sequence[Concept]:
        return [concept[-1:] for concept in super().find(prompt)]

    def loss(self, picture: WordMaps, before: Any) -> torch.Tensor:
        return neglect(smooth(picture.tempered().of(picture.words.words)), self.enough)

    def refinement(self, step: int, num_steps: int) -> tuple[int, float]:
        for share, loss in REFINEMENT:
            if step == int(share * num_steps):
                return self.refinements, max(0.0, loss - (1 - self.enough))
        return 0, 0.0
