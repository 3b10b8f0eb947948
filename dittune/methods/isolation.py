"""Isolation and reposition: several subjects from references in one picture, apart and the same.

Where a subject is in the target, its tokens also look at the same subject in the references, moved
to that place (reposition), and do not look at the other subjects of the target (isolation).

Source: "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and
Reposition Attention" (arXiv 2411.19261), on the two attentions, and its reference code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dittune.call import AttnCall, Site
from dittune.subjects.masks import Masks
from dittune.subjects.method import SubjectMethod, image_rows
from dittune.subjects.row_groups import Foreign, PicturePlan, RowGroup, row_group


@dataclass(frozen=True, kw_only=True)
class Isolation(SubjectMethod):
    """Isolation and reposition attention; each can be used alone.

    Args:
        isolate: tokens of one subject do not see those of another, in all layers.
        reposition: a reference's subject is brought to the box of the target's before its keys are
            read, `keep` then drops rows only. Keys of FLUX get the place they are moved to; those
            of UNets and SD3 have none, and there only the size of the subject changes.

    References themselves are left alone. `references=0` is isolation in every picture; without
    `subjects` nothing changes.

    Differs: no mutual cross-attention and no feature injection; small masks are not widened to
    boxes; a subject has tokens to itself, where masks meet the nearer one has them.
    """

    isolate: bool = True
    reposition: bool = True

    @property
    def is_neutral(self) -> bool:
        nothing = not self.labels or not (self.isolate or self.changes_keys)
        return super().is_neutral or nothing

    def acting(self, available: Sequence[Site]) -> list[Site]:
        shared = self.sharing(available) if self.changes_keys else []
        kinds = ("joint", "self") if self.isolate else ()
        return [site for site in available if site in shared or site.kind in kinds]

    def plan(
        self, picture: int, call: AttnCall, masks: Masks, shares: bool, draw: torch.Generator
    ) -> PicturePlan | None:
        if picture < self.references:
            return None
        length, targets = call.query.shape[2], masks[picture]
        groups: list[RowGroup] = []
        foreign: list[Foreign] = []
        joined, rest = length, torch.ones(length, dtype=torch.bool)
        for subject, place in enumerate(targets):
            looking = self.kept(place, draw)  # drawn also where nothing is shared
            others = targets.any(0) & ~place
            if not place.any():
                continue
            brought = self._brought(subject, place, masks, draw) if shares else []
            own = torch.ones(length, dtype=torch.bool)
            if self.isolate:
                own &= ~image_rows(call.layout, length, others.flatten())
            if not brought and own.all():
                continue
            count = sum(len(one.tokens) for one in brought)
            extra = torch.arange(joined, joined + count)
            foreign, joined = [*foreign, *brought], joined + count
            rest &= ~image_rows(call.layout, length, place.flatten())
            parts = ((looking, extra), (place & ~looking, None)) if brought else ((place, None),)
            for tokens, keys in parts:
                if tokens.any():
                    rows = image_rows(call.layout, length, tokens.flatten())
                    groups.append(row_group(rows, own, call.layout, keys, foreign_bias=self.bias))
        if not groups:
            return None
        if rest.any():
            groups.append(row_group(rest, torch.ones(length, dtype=torch.bool), call.layout))
        return PicturePlan(picture, tuple(groups), tuple(foreign))

    def _brought(
        self, subject: int, place: torch.Tensor, masks: Masks, draw: torch.Generator
    ) -> list[Foreign]:
        """A subject's tokens in each reference that shows it."""
        found = []
        for reference in range(self.references):
            shown = masks[reference][subject]
            if self.reposition and shown.any():
                found.append(Foreign(reference, *reposition(shown, place)))
                continue
            kept = self.kept(shown, draw)
            if kept.any():
                found.append(Foreign(reference, kept.flatten().nonzero().flatten()))
        return found


def reposition(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the tokens of one mask to the box of another, by the nearest token.

    Args:
        source: bool `[h, w]`, where a subject is in the reference; not empty.
        target: bool `[h, w]`, where it is in the target; not empty.

    Returns:
        For each token of the target's box onto which the subject falls: the source token, counted
        along rows, and `[n, 2]`, the rows and columns by which it was moved.
    """
    (top, height, left, width), (up, tall, west, wide) = _box(source), _box(target)
    rows = top + torch.arange(tall) * height // tall
    cols = left + torch.arange(wide) * width // wide
    falls = source[rows][:, cols]
    tokens = (rows[:, None] * source.shape[1] + cols)[falls]
    down = (up + torch.arange(tall) - rows)[:, None].expand(tall, wide)[falls]
    across = (west + torch.arange(wide) - cols)[None].expand(tall, wide)[falls]
    return tokens, torch.stack([down, across], 1)


def _box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """First row and number of rows, first column and number of columns."""
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1] - rows[0]) + 1, int(cols[0]), int(cols[-1] - cols[0]) + 1
