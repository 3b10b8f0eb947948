"""Shared attention: pictures of one call also look at the subject in the reference pictures.

Keys and values of the references' subject tokens are joined to those of every other picture; the
references see each other. Without subjects, tokens from all over the references are shared.

Source: ConsiStory (arXiv 2402.03286), its subject-driven self-attention, and StoryDiffusion (arXiv
2405.01434), its consistent self-attention; and their reference code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittune.call import AttnCall
from dittune.subjects.masks import Masks
from dittune.subjects.method import SubjectMethod, image_rows
from dittune.subjects.row_groups import Foreign, PicturePlan, row_group


@dataclass(frozen=True, kw_only=True)
class SharedAttention(SubjectMethod):
    """Join the keys of the references' subjects to those of every picture.

    With `subjects` it is ConsiStory's shared attention, without them StoryDiffusion's. Any image
    token may look at any subject; which subject belongs where is left to the model.

    Differs: no feature injection and no blending of queries (ConsiStory); references are computed
    along with the pictures instead of being kept in a bank; a layer always shares (StoryDiffusion
    skips layers at random).
    """

    masks_of_targets: ClassVar[bool] = False

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or not self.changes_keys

    def plan(
        self, picture: int, call: AttnCall, masks: Masks, shares: bool, draw: torch.Generator
    ) -> PicturePlan | None:
        first, last = call.layout.image
        foreign = []
        for reference in range(self.references):
            shown = masks[reference].any(0).flatten() if masks else torch.ones(last - first) > 0
            kept = self.kept(shown, draw)  # drawn for every picture: others do not shift the draw
            if reference != picture and kept.any():
                foreign.append(Foreign(reference, kept.nonzero().flatten()))
        if not foreign:
            return None
        length = call.query.shape[2]
        own = torch.ones(length, dtype=torch.bool)
        rows = image_rows(call.layout, length, torch.ones(last - first, dtype=torch.bool))
        count = sum(len(one.tokens) for one in foreign)
        extra = length + torch.arange(count)
        groups = [row_group(rows, own, call.layout, extra, foreign_bias=self.bias)]
        if not rows.all():
            groups.append(row_group(~rows, own, call.layout))
        return PicturePlan(picture, tuple(groups), tuple(foreign))
