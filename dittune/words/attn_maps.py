"""Maps of words: how much each image token looks at each text token.

A map is the text columns of the attention of image rows, `softmax` over all keys (so that in joint
attention the image keys keep their share), averaged over heads and layers, in single precision.
Nothing larger than a block of rows is formed, with gradients too: then a block is computed again on
the way back.

Shape letters: `T` text tokens, `W` words or concepts, `h w` the grid of image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dittune.call import AttnCall, Site
from dittune.errors import SeamError, SelectionError
from dittune.words.tokens import PromptWords

PROBABILITIES = 2**24  # held at once while a map is computed


def word_sites(available: Sequence[Site], layers: tuple[int, ...], name: str) -> list[Site]:
    """The sites whose maps of words a method reads: those asked for, or the model's best.

    Args:
        available: all sites of the model.
        layers: layer numbers among the joint sites, or the cross sites where there are no joint
            ones; none means those the model's facts recommend.
        name: of the method, for messages.

    Raises:
        SelectionError: no attention to text, a layer that does not exist, or layers whose grids
            differ.
    """
    for kind in ("joint", "cross"):
        sites = [site for site in available if site.kind == kind]
        if sites:
            break
    else:
        kinds = ", ".join(sorted({site.kind for site in available})) or "none"
        raise SelectionError(
            f"{name} needs attention to text (joint or cross); the model has {kinds}"
        )
    missing = [layer for layer in layers if layer >= len(sites)]
    if missing:
        raise SelectionError(
            f"{name}: the model has no {kind} layer {missing[0]}; it has 0..{len(sites) - 1}"
        )
    chosen = [s for s in sites if (s.layer in layers if layers else s.shows_words)]
    if not chosen:
        raise SelectionError(
            f"{name}: it is not known which layers of this model show words; give layers"
        )
    if len({site.stage for site in chosen}) != 1:
        grids = ", ".join(f"{site.layer} at stage {site.stage}" for site in chosen)
        raise SelectionError(f"{name}: the layers must have one resolution, got {grids}")
    return chosen


def text_maps(call: AttnCall) -> torch.Tensor:
    """How much each image token of a call looks at each text token, averaged over heads.

    Differentiable where gradients are enabled.

    Returns:
        `[B, T, h, w]`, single precision (double if the model's is); sums over `T` are at most 1.
    """
    first, last = call.layout.image
    size = rows_at_once(call)
    blocks = []
    for row in range(first, last, size):
        few = call.take_queries(row, min(row + size, last))
        if torch.is_grad_enabled() and size < last - first:
            blocks.append(checkpoint(_text_columns, few, use_reentrant=False))
        else:
            blocks.append(_text_columns(few))
    maps = torch.cat(blocks, 1).transpose(1, 2)
    return maps.reshape(*maps.shape[:2], *call.layout.grid[1:])


def _text_columns(call: AttnCall) -> torch.Tensor:
    scores = logits(call)
    if call.repeats > 1:  # the last text token stands for so many, which the mask does not say yet
        several = scores.new_zeros(scores.shape[-1])
        several[call.layout.text[1] - 1] = math.log(call.repeats)
        scores = scores + several
    probabilities = scores.softmax(-1)
    return probabilities[..., slice(*call.layout.text)].mean(1)  # (B, rows, T)


def rows_at_once(call: AttnCall) -> int:
    """How many rows of a call's logits may be held."""
    batch, heads, keys = call.key.shape[:3]
    return max(1, PROBABILITIES // (batch * heads * keys))


def logits(call: AttnCall, columns: slice = slice(None)) -> torch.Tensor:
    """Logits `[B, H, Sq, columns]` under the call's mask, in single precision or better."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    scale = call.options.get("scale") or 1 / math.sqrt(call.query.shape[3])
    scores = scale * call.query.to(dtype) @ call.key[:, :, columns].to(dtype).transpose(2, 3)
    mask = call.options.get("attn_mask")  # as SDPA reads it: true attends, or what is added
    if mask is None:
        return scores
    mask = mask[..., columns]
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


class MapMean:
    """The mean of the maps of several layers, formed as they come."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, maps: torch.Tensor) -> None:
        self._sum = maps if self._sum is None else self._sum + maps
        self._count += 1

    def take(self) -> torch.Tensor:
        """The mean `[B, T, h, w]`, which is then forgotten."""
        if self._sum is None:
            raise SeamError("no map was seen; is a cache skipping blocks? Switch that off")
        mean = self._sum / self._count
        self._sum, self._count = None, 0
        return mean


class WordMaps(NamedTuple):
    """The maps of one picture and the words in them.

    Attributes:
        maps: `[T, h, w]`, all text tokens.
        words: which tokens are which words.
        rivals: the tokens that compete for an image token.
    """

    maps: torch.Tensor
    words: PromptWords
    rivals: tuple[int, ...]

    def of(self, groups: Sequence[Sequence[int]]) -> torch.Tensor:
        """The map of each group of tokens, their sum, `[W, h, w]`."""
        return torch.stack([self.maps[list(tokens)].sum(0) for tokens in groups])

    def tempered(self, factor: float = 100.0) -> WordMaps:
        """With a softmax of `factor` x probability over the rivals, for each image token.

        Source: attend-and-excite (arXiv 2301.13826), its reference code.
        """
        rivals = list(self.rivals)
        maps = torch.zeros_like(self.maps)
        maps[rivals] = (factor * self.maps[rivals]).softmax(0)
        return self._replace(maps=maps)


def word_maps(maps: torch.Tensor, words: PromptWords, kind: str) -> WordMaps:
    """Maps of one picture in which words can be compared.

    In cross attention all text tokens but the first and the last are rivals, as in the papers. In
    joint attention the image keys take most of the attention, so that maps become shares of what
    the tokens of the prompt get together, and only these are rivals.

    Args:
        maps: `[T, h, w]`, as captured.
        words: of the picture's prompt.
        kind: of the sites, `joint` or `cross`.
    """
    if kind == "cross":
        return WordMaps(maps, words, tuple(range(1, len(maps) - 1)))
    rivals = list(words.tokens)
    shares = torch.zeros_like(maps)
    total = maps[rivals].sum(0, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    shares[rivals] = maps[rivals] / total
    return WordMaps(shares, words, words.tokens)


def smooth(maps: torch.Tensor) -> torch.Tensor:
    """Blur maps `[W, h, w]` with a kernel of 3 x 3, the border mirrored.

    Source: attend-and-excite's reference code and its followers', with nominal sigma 0.5. Their
    exponent is `-(x / 2 sigma)^2`: the kernel is a Gaussian of standard deviation 0.71.
    """
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device))
    kernel = torch.outer(line, line) / line.sum() ** 2
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = functional.pad(maps[:, None], (1, 1, 1, 1), mode=mode)
    return functional.conv2d(padded, kernel[None, None])[:, 0]


def otsu(values: torch.Tensor) -> torch.Tensor:
    """Which values of a map `[h, w]` are high, by Otsu's threshold on 256 bins.

    The map is brought to [0, 1] first. Bins above the threshold are high, as a whole: scikit-image
    takes the centre of the last low bin, so that part of that bin is high. A constant map has no
    high values.
    """
    low, high = values.min(), values.max()
    if low == high:
        return torch.zeros_like(values, dtype=torch.bool)
    values = ((values - low) / (high - low)).double()
    counts = torch.histc(values, bins=256, min=0.0, max=1.0)
    centres = (torch.arange(256, dtype=counts.dtype, device=counts.device) + 0.5) / 256
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    weighted = counts * centres
    mean_below = weighted.cumsum(0) / below
    mean_above = weighted.flip(0).cumsum(0).flip(0) / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return values >= (between.argmax() + 1) / 256
