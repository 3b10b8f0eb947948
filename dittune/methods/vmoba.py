"""VMoBA: each token of a video sees the chunks of tokens whose mean key fits it best.

Layers take turns in how the video is cut: in time, in space, in both. Text, and whatever else is
no video, sees all and is seen by all.

Source: "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" and the repository
KwaiVGI/VMoBA; after "MoBA: Mixture of Block Attention for Long-Context LLMs". Differs: the number
of chunks is given, not their size, and they need not divide the video.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError
from dittune.kernels.routed_attention import routed_attention
from dittune.patterns.grid import coordinates
from dittune.run import ModelInputs, Run
from dittune.sparse.core import Built, Core, CoreMethod, built_by, key_of
from dittune.sparse.plan import count_again

SELECT = ("query", "head")
BACKENDS = ("auto", "triton", "gather", "reference")


class Chunks(NamedTuple):
    """A sequence cut into chunks of video, in front, and one of everything else.

    Attributes:
        order: the token at each place, int64 `[S]`.
        inverse: the place of each token, int64 `[S]`.
        owner: the chunk of each token of the video in that order, int64 `[N]`.
        mean: row `c` takes the mean over chunk `c`, float32 `[C, N]`.
        start: first place of each chunk and the end, int32 `[C + 1]` or, with the rest, `[C + 2]`.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    owner: torch.Tensor
    mean: torch.Tensor
    start: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Vmoba(CoreMethod):
    """Attention of single tokens to chosen chunks; a token's own chunk is always among them.

    Published settings at 480p are the defaults; at 720p `chunks="7x1x1, 1x5x8, 3x3x4"`. The paper
    trains with `select="head"` and warns of it without training.

    Args:
        chunks: for the layers in turn, into how many parts frames, rows and columns are cut.
        keep: share that is computed. Of a token's chunks where it selects by itself, rounded up; of
            the mass of all scores of a head where they compete.
        select: `query`, each token takes the chunks that fit it best; `head`, all tokens of a head
            compete for one budget, so that some see many chunks and others few.
        backend: `auto`, `triton`, `gather` or `reference`.

    Raises:
        ConfigError: chunks that cannot be read, `keep` outside `(0, 1]`, an unknown selection or
            back-end; while generating, a mask of single pairs.
    """

    start: float = 0.25
    chunks: str = "7x1x1, 1x6x4, 3x6x4"
    keep: float = 0.25
    select: str = field(default="query", metadata={"choices": SELECT})
    backend: str = field(default="auto", metadata={"choices": BACKENDS})

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_chunks(self.chunks)
        if not 0 < self.keep <= 1:
            raise ConfigError(f"vmoba: keep is above 0 and at most 1, got {self.keep}")
        for name, known in (("select", SELECT), ("backend", BACKENDS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"vmoba: {name} is one of {known}, got {getattr(self, name)!r}")

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or self.keep == 1

    def site_state(self, site: Site, device: torch.device) -> Built:
        cuts = parse_chunks(self.chunks)
        return built_by(self, cuts[site.layer % len(cuts)], site.kind, site.stage, device)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        host = inputs.run.host
        device = inputs.kwargs[inputs.batched[0]].device
        for (kind, stage), layout in host.facts.layouts(host.model, inputs.kwargs).items():
            for cut in parse_chunks(self.chunks) if kind in ("joint", "self") else ():
                built = built_by(self, cut, kind, stage, device)
                built.get(layout, functools.partial(cut_into, layout, cut, device))
        return model(inputs)

    def core(self, stock: Core, state: Built, call: AttnCall) -> torch.Tensor:
        chunks: Chunks = state.at[key_of(call.layout)]
        many, scale = len(chunks.mean), call.options.get("scale")
        if many == 1 or (self.select == "query" and most_chunks(self.keep, many) == many):
            self._note(call, 1.0)
            return stock(call)
        real_text, video = self.real_text(call), len(chunks.owner)
        query, key, value = (
            t.index_select(2, chunks.order) for t in (call.query, call.key, call.value)
        )
        with torch.no_grad():
            exact = torch.promote_types(key.dtype, torch.float32)
            mean = chunks.mean.to(exact) @ key[:, :, :video].to(exact)
            scores = mean @ query[:, :, :video].to(exact).transpose(2, 3)  # (B, H, C, N)
            choose = by_query if self.select == "query" else by_head
            chosen = choose(scores, chunks.owner, self.keep)
        if not torch.compiler.is_compiling():  # a sum over all that was chosen
            share = (chosen.float().mean((0, 1, 3)) * chunks.start.diff()[:many]).sum() / video
            self._note(call, share)
        parts = len(chunks.start) - 1
        rest = len(chunks.order) - video, parts - many  # queries and chunks that are not chosen
        chosen = torch.nn.functional.pad(chosen, (0, rest[0], 0, rest[1]), value=True)
        count = chunks.start.diff()[None]
        if real_text is not None:
            count = torch.cat([count[:, :-1].expand(len(real_text), -1), real_text[:, None]], 1)
        out, lse = routed_attention(
            query, key, value, chosen, chunks.start, count.int(), scale, self.backend
        )
        out, lse = out.index_select(2, chunks.inverse), lse.index_select(2, chunks.inverse)
        return out if call.repeats == 1 else count_again(out, lse, call, scale)

    def _note(self, call: AttnCall, share: torch.Tensor | float) -> None:
        if not torch.compiler.is_compiling():
            vars(call.run.memory(self)).setdefault("shares", []).append(share)

    def report(self, run: Run) -> dict[str, Any]:
        """Share of the pairs of video tokens computed: in sparse steps and layers, and of all.

        Empty where it was not seen, in compiled code.
        """
        shares = getattr(run.memory(self), "shares", [])
        if not shares:
            return {}
        share = sum(map(float, shares)) / len(shares)
        return {"image_density": share, "computed": self.computed(run, share)}


def by_query(scores: torch.Tensor, owner: torch.Tensor, keep: float) -> torch.Tensor:
    """Each token's own chunk and the best others, bool like `scores` `[B, H, C, N]`."""
    many = scores.shape[2]
    own = torch.nn.functional.one_hot(owner, many).T.bool()  # (C, N)
    best = scores.masked_fill(own, torch.inf).topk(most_chunks(keep, many), 2).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True)


def by_head(scores: torch.Tensor, owner: torch.Tensor, keep: float) -> torch.Tensor:
    """Own chunks and the best others of all tokens of a head, up to a share of the scores' mass.

    Scores are scaled to [0, 1] within the head before they are summed; equal ones go together.
    """
    own = torch.nn.functional.one_hot(owner, scores.shape[2]).T.bool()
    low, high = scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True)
    mass = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    total = mass.sum((2, 3), dtype=torch.float64)
    target = keep * total - mass.masked_fill(~own, 0).sum((2, 3), dtype=torch.float64)
    others = mass.masked_fill(own, -1).flatten(2).sort(2, descending=True).values
    found = others.clamp(min=0).cumsum(2, dtype=torch.float64)
    last = (found < target[..., None]).sum(2, keepdim=True).clamp(max=others.shape[2] - 1)
    least = others.gather(2, last).masked_fill(target[..., None] <= 0, torch.inf)
    return own | (mass >= least[..., None])


def most_chunks(keep: float, many: int) -> int:
    """How many of `many` chunks a token sees that selects by itself."""
    return max(1, math.ceil(keep * many - 1e-9))


@functools.lru_cache(maxsize=64)
def parse_chunks(text: str) -> tuple[tuple[int, int, int], ...]:
    """`7x1x1, 1x6x4` as numbers of parts.

    Raises:
        ConfigError: it is not written like that.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){2}", part) for part in parts):
        raise ConfigError(
            "vmoba: chunks are numbers of parts FRAMESxROWSxCOLUMNS for the layers in turn, such "
            f"as '7x1x1, 1x6x4, 3x6x4', got {text!r}"
        )
    return tuple(tuple(int(n) for n in part.split("x")) for part in parts)


def cut_into(layout: TokenLayout, cut: tuple[int, int, int], device: torch.device) -> Chunks:
    """The chunks of one layout: on each axis as even as can be, at most one a token."""
    grid, (first, last) = layout.grid, layout.image
    end = max(last, layout.text[1]) + layout.references
    parts = [min(many, size) for many, size in zip(cut, grid, strict=True)]
    number = torch.zeros(last - first, dtype=torch.int64)
    for place, many, size in zip(coordinates(grid).unbind(1), parts, grid, strict=True):
        number = number * many + place * many // size
    order = torch.argsort(number, stable=True)
    owner, many = number[order], math.prod(parts)
    rest = torch.cat([torch.arange(first), torch.arange(last, end)])
    order = torch.cat([order + first, rest])
    mean = torch.nn.functional.one_hot(owner, many).T.float()
    sizes = mean.sum(1).int().tolist() + [len(rest)] * bool(len(rest))
    start = torch.tensor([0, *sizes]).cumsum(0).int()
    chunks = Chunks(order, torch.argsort(order), owner, mean / mean.sum(1, keepdim=True), start)
    return Chunks(*(tensor.to(device) for tensor in chunks))
