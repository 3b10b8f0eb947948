"""Losses on maps of words. Pure functions; every map is `[W, h, w]` of one picture."""

from __future__ import annotations

import torch


def soft_ios(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Overlap `sum min(x, y) / sum (x + y)` of maps over their last two axes, 0 to 0.5.

    Source: A-STAR (arXiv 2306.14544).
    """
    both = (first + second).sum((-2, -1))
    return torch.minimum(first, second).sum((-2, -1)) / both.clamp_min(torch.finfo(both.dtype).tiny)


def segregation(maps: torch.Tensor) -> torch.Tensor:
    """Sum of the overlaps of all pairs of maps; 0 for one map.

    Source: A-STAR (arXiv 2306.14544), its segregation loss.
    """
    first, second = torch.triu_indices(len(maps), len(maps), 1, device=maps.device)
    return soft_ios(maps[first], maps[second]).sum()


def retention(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Sum over maps of `1 - overlap` with where they were high before; at least half their number.

    Args:
        maps: `[W, h, w]`.
        masks: `[W, h, w]`, booleans, of the step before.

    Source: A-STAR (arXiv 2306.14544), its retention loss.
    """
    return (1 - soft_ios(maps, masks.to(maps.dtype))).sum()


def neglect(maps: torch.Tensor, enough: float = 1.0) -> torch.Tensor:
    """How far the most neglected word is from having `enough` of one image token.

    `max_k max(0, enough - max A_k)`. Source: attend-and-excite (arXiv 2301.13826), `enough` is 1.
    """
    return (enough - maps.flatten(1).amax(1)).clamp_min(0).amax()


def contrast(vectors: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent: vectors of one label attract, those of different labels repel.

    `-log(e^{s_ij/t} / (e^{s_ij/t} + sum_{n: other label} e^{s_in/t}))` with `s` the cosine,
    averaged over ordered pairs of one label. 0 without such a pair or without a second label.

    Args:
        vectors: `[N, D]`.
        labels: `[N]`, integers.
        temperature: of the softmax.

    Source: CONFORM (arXiv 2312.06059), its reference code.
    """
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    logits = vectors @ vectors.T / temperature
    same = labels[:, None] == labels[None]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if not positive.any() or same.all():
        return logits.sum() * 0
    others = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    return (torch.logaddexp(logits, others) - logits)[positive].mean()


def unevenness(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How far words are from a high point each and from equal shares of the attention.

    `mean (Q_0.9 - 0.9)^2 + 80 mean (share - theta/W)^2 + 0.09 mean w^2`, with `Q_0.9` the quantile
    of a word's map over the picture, `share` its mean, and `theta = min(1, 0.2 W)`.

    Args:
        maps: `[..., W, pixels]`, probabilities.
        weights: `[..., W, C]`, of the bumps that were added to the logits.

    Returns:
        `[...]`.

    Source: Attention Regulation (arXiv 2403.06381), its reference code.
    """
    words = maps.shape[-2]
    peaks = (maps.quantile(0.9, dim=-1) - 0.9).square().mean(-1)
    shares = (maps.mean(-1) - min(1.0, 0.2 * words) / words).square().mean(-1)
    return peaks + 80 * shares + 0.09 * weights.square().mean((-2, -1))
