"""Regions: words of the prompt act only inside a box.

Image tokens see the words of their own region and those that belong to no region; the words of a
region see only its image tokens and no other region's words.

Source: own design after "Training-free Regional Prompting for Diffusion Transformers" (arXiv
2411.02395), which encodes each region's text by itself and keeps apart the image tokens too, and
"Dense Text-to-Image Generation with Attention Modulation" (arXiv 2308.12964), which has `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.method import Method
from dittune.run import ModelInputs
from dittune.subjects.boxes import on_grid, parse_boxes, refuse_overlap
from dittune.subjects.row_groups import PicturePlan, attend_by_plans, row_group
from dittune.words.tokens import words_of_pictures


@dataclass(frozen=True, kw_only=True)
class Regions(Method):
    """Keep phrases of the prompt inside boxes.

    Args:
        regions: `x0,y0,x1,y1: a red circle; ...`, shares of the picture; the phrase is one of the
            prompt. Boxes must not overlap.
        scale: added to the logits of a region's words inside it. This and `stop` were chosen on
            the bundled `shapes-sd3`; a larger scale soon spoils its pictures.

    Raises:
        ConfigError: boxes that cannot be read or overlap; while generating, a phrase that is not in
            the prompt, or no prompt.
        SelectionError: at `attach`, no attention to text.

    List it after methods that perturb attention: what follows it sees chosen keys only. The pooled
    text and tokens without words (start, end, padding) still know the whole prompt.
    """

    chooses_keys: ClassVar[bool] = True

    regions: str = ""
    scale: float = 0.5
    stop: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        boxes = parse_boxes(self.regions)
        labels = [label for _, label in boxes]
        if len(set(labels)) < len(labels):
            raise ConfigError(
                "regions: a phrase has two boxes; number its occurrences, 'a dog#1' and 'a dog#2'"
            )
        if not math.isfinite(self.scale):
            raise ConfigError(f"regions: scale is a finite number, got {self.scale}")
        if boxes:
            refuse_overlap(self._masks(), labels, self.name)

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or not parse_boxes(self.regions)

    def _masks(self) -> torch.Tensor:
        return torch.stack([box.mask() for box, _ in parse_boxes(self.regions)])

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        found = [site for site in available if site.kind in ("joint", "cross")]
        if not found:
            raise SelectionError("regions needs attention to text (joint or cross)")
        return found

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if "cond" in inputs.roles and not hasattr(memory, "words"):
            asked = [(label,) for _, label in parse_boxes(self.regions)]
            memory.words = words_of_pictures(inputs, asked, lambda prompt: (), self.name)
            memory.plans = {}
        return model(inputs)

    @torch.compiler.disable  # shapes depend on the boxes
    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        memory = call.run.memory(self)
        size = call.query.shape[0] // len(call.roles)
        if size != len(getattr(memory, "words", ())):
            return proceed(call)
        key = (call.site.kind, call.site.stage, call.key.shape[2])
        if key not in memory.plans:
            plans = [self._plan(call, i, words.words) for i, words in enumerate(memory.words)]
            memory.plans[key] = [p.to(call.query.device) for p in plans if p is not None]
        parts = []
        for i, role in enumerate(call.roles):
            rows = call.take_rows(i * size, (i + 1) * size)
            plain = role == "uncond"  # has another prompt
            plans = [] if plain else memory.plans[key]
            parts.append(attend_by_plans(rows, plans, proceed))
        return torch.cat(parts)

    def _plan(
        self, call: AttnCall, picture: int, words: Sequence[Sequence[int]]
    ) -> PicturePlan | None:
        """What one picture sees; None if every region's words may be seen everywhere."""
        layout, queries, keys = call.layout, call.query.shape[2], call.key.shape[2]
        places = on_grid(self._masks(), *layout.grid[1:]).flatten(1)  # (R, N)
        image = _image(layout, queries, places | True)[0]
        said = torch.zeros(len(words), keys, dtype=torch.bool)
        for row, tokens in zip(said, words, strict=True):
            row[[layout.text[0] + token for token in tokens]] = True
        groups, rest = [], torch.ones(queries, dtype=torch.bool)
        for i, place in enumerate(_image(layout, queries, places)):
            own = ~said[torch.arange(len(words)) != i].any(0)
            bias = self.scale * said[i].double() if self.scale else None
            asking = [(place, own, bias)]
            if call.site.kind == "joint":  # the words ask too, and see themselves and their place
                asking.append((said[i], own & ~(image & ~place), None))
            for rows, seen, added in asking:
                if rows.any():
                    groups.append(row_group(rows, seen, layout, bias=added))
                    rest &= ~rows
        everything = torch.ones(keys, dtype=torch.bool)
        for rows, seen in ((rest & image, ~said.any(0)), (rest & ~image, everything)):
            if rows.any():
                groups.append(row_group(rows, seen, layout))
        if all(len(group.keys) == keys and group.bias is None for group in groups):
            return None
        return PicturePlan(picture, tuple(groups))


def _image(layout: TokenLayout, length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Masks of image tokens, bool `[R, N]`, as masks of a sequence, `[R, length]`."""
    first, last = layout.image
    found = torch.zeros(len(tokens), length, dtype=torch.bool)
    found[:, first:last] = tokens
    return found
