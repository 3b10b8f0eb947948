"""Radial attention: the farther apart two frames of a video, the less of each other they see.

The blocks of the pattern `dittune.patterns.Radial` as published, on tokens in the model's own
order; text sees all and is seen by all. The first steps and layers stay dense: what a video shows
is decided there.

Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
(arXiv 2506.19852) and the repository mit-han-lab/radial-attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.heads import parse_layers
from dittune.kernels.block_sparse import block_sparse_attention
from dittune.method import Method
from dittune.patterns import (
    Plan,
    RadialBlocks,
    Segment,
    TokenOrder,
    make_plan,
    text_segment,
)
from dittune.patterns import (
    Radial as Bands,
)
from dittune.patterns import (
    Sequence as Tokens,
)
from dittune.run import Run


@dataclass(frozen=True, kw_only=True)
class Radial(Method):
    """Block-sparse self attention among the frames of a video; pictures stay as they are.

    Published settings: Wan 2.1 14B at 69 frames `decay=0.2`, Wan 2.2 at 77 frames `decay=0.8,
    start=0.275`, HunyuanVideo at 117 frames `decay=0.95, dense_layers=""`; 8-step models
    `start=0.25`.

    Args:
        start: share of the steps that stay dense, the first ones.
        decay: factor on the width of the bands, above 0, at most 1; below 0.2 nothing changes.
        dense_layers: layers that stay dense, written like `0,3-5`.
        sink: whether all tokens see the first frame; None is yes where the text is not part of the
            sequence (Wan), as published.
        block: tokens of a block's side, and the least half-width of a band. Where a frame has fewer
            tokens it is the largest power of two that fits: the rule would drop larger blocks.

    Raises:
        ConfigError: `decay` or `block` out of range; while generating, a mask of single pairs.
        SelectionError: at `attach`, no self or joint attention.
    """

    replaces_attention: ClassVar[bool] = True

    start: float = 0.24
    decay: float = 0.2
    dense_layers: str = "0"
    sink: bool | None = None
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ConfigError(f"radial: decay is above 0 and at most 1, got {self.decay}")
        if self.block < 1:
            raise ConfigError(f"radial: block is a number of tokens, got {self.block}")
        parse_layers(self.dense_layers)

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        dense = parse_layers(self.dense_layers)
        for kind in ("joint", "self"):
            found = [site for site in available if site.kind == kind]
            if found:
                return [site for site in found if site.layer not in dense]
        raise SelectionError("radial needs self or joint attention; the model has none")

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        if call.layout.grid[0] == 1:
            return proceed(call)
        return proceed(call._replace(core=functools.partial(self._core, call.core)))

    def _core(self, core: Callable[[AttnCall], torch.Tensor], call: AttnCall) -> torch.Tensor:
        if call.query.shape[2] != call.key.shape[2]:
            return core(call)  # a method asks for a few queries only; they see all
        mask = call.options.get("attn_mask")
        sink = call.layout.text[0] == call.layout.text[1] if self.sink is None else self.sink
        per_frame = call.layout.grid[1] * call.layout.grid[2]
        block = min(self.block, 2 ** (per_frame.bit_length() - 1))
        settings = self.decay, sink, block, mask is not None
        plan = _plan(call.layout, *settings, call.query.device)
        call.run.memory(self).plan = plan
        tensors = plan.tensors
        if mask is not None:
            tensors = {**tensors, "key_count": plan.key_count({"text": _words(call, mask)})}
        inputs, order = (call.query, call.key, call.value), plan.queries.permutation
        if order is not None:
            order = order.to(call.query.device)
            inputs = tuple(order.permute(tensor) for tensor in inputs)
        scale = call.options.get("scale")
        out, _ = block_sparse_attention(*inputs, tensors, plan.block, plan.rule, scale)
        return out if order is None else order.unpermute(out)

    def report(self, run: Run) -> dict[str, Any]:
        """Share of the pairs of tokens that were computed, in the layers that are sparse."""
        plan = getattr(run.memory(self), "plan", None)
        return {"density": 1.0 if plan is None else plan.stats().token_density}


@functools.lru_cache(maxsize=16)
def _plan(
    layout: TokenLayout, decay: float, sink: bool, block: int, is_masked: bool, device: torch.device
) -> Plan:
    """The plan of one geometry; text, if any, is a segment of its own before or after the video."""
    video = Segment("video", TokenOrder(layout.grid))
    segments: tuple[Segment, ...] = (video,)
    if words := layout.text[1] - layout.text[0]:
        text = text_segment(words, is_masked)
        segments = (text, video) if layout.text[0] < layout.image[0] else (video, text)
    tokens = Tokens(segments, block)
    rules = {(first.name, second.name): True for first in segments for second in segments}
    rules["video", "video"] = RadialBlocks(Bands(layout.grid, decay, block, sink))
    return make_plan(tokens, tokens, rules, (block, block)).to(device)


def _words(call: AttnCall, mask: torch.Tensor) -> torch.Tensor:
    """How many of the first text tokens are no padding, int `[B]`.

    Raises:
        ConfigError: the mask is not one of the text's padding.
    """
    if mask.dtype != torch.bool or mask.shape[-2] != 1 or mask.shape[-1] != call.key.shape[2]:
        raise ConfigError(
            f"radial: expected a mask of the text's padding, bool [B, 1, 1, {call.key.shape[2]}], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return mask[..., slice(*call.layout.text)].sum(-1).flatten()
