"""What a perturbed head computes, each without its `Sq x Skv` map.

Every function takes the call of the perturbed heads and gives what these heads would put out if
their map `A` were replaced by another one. Identity is that of PAG (arXiv 2403.17377), blurred and
mean queries are those of SEG (arXiv 2408.00760), the rest is from HeadHunter (arXiv 2506.10978).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from dittune.call import AttnCall
from dittune.kernels.diagonal_columns import diagonal_columns_attention

Proceed = Callable[[AttnCall], torch.Tensor]

ARGMAX_LOGITS = 2**24  # logits held at once


def identity(call: AttnCall) -> torch.Tensor:
    """Each token sees itself only: the output is `value`, `[B, H, S, D]`."""
    return call.value


def uniform(call: AttnCall, proceed: Proceed) -> torch.Tensor:
    """Each token sees all (unmasked) tokens alike."""
    return _one_query(call, torch.zeros_like(call.query[:, :, :1]), proceed)


def mean_query(call: AttnCall, rows: tuple[int, int], proceed: Proceed) -> torch.Tensor:
    """All tokens ask with the mean query of `rows`: the limit of `blurred_query`."""
    asked, (image, text) = call.query[:, :, slice(*rows)], call.layout[:2]
    mean = asked.mean(2, keepdim=True)
    is_joint = text[0] >= image[1] or text[1] <= image[0]  # else the queries are no text
    if call.repeats > 1 and is_joint and rows[0] < text[1] <= rows[1]:
        again = call.repeats - 1
        last = call.query[:, :, text[1] - 1 : text[1]]
        mean = mean + (last - mean) * (again / (asked.shape[2] + again))
    return _one_query(call, mean, proceed)


def blurred_query(call: AttnCall, sigma: float, proceed: Proceed) -> torch.Tensor:
    """Image queries are blurred on each frame's grid, which blurs the logits over rows.

    Text rows keep their queries. On models with rotary embedding the rotated queries are blurred.

    Args:
        sigma: standard deviation in tokens; `inf` is the mean over the image.
    """
    first, last = call.layout.image
    height, width = call.layout.grid[1:]
    image = call.query[:, :, first:last]
    if math.isinf(sigma):
        blurred = image.mean(2, keepdim=True).expand_as(image)
    else:
        grid = image.transpose(2, 3).reshape(-1, 1, height, width)  # one plane per B, H, D, frame
        grid = _blur(_blur(grid, sigma).transpose(2, 3), sigma).transpose(2, 3)
        blurred = grid.reshape(*image.transpose(2, 3).shape).transpose(2, 3)
    query = torch.cat([call.query[:, :, :first], blurred, call.query[:, :, last:]], 2)
    return proceed(call._replace(query=query))


def temperature(call: AttnCall, tau: float, proceed: Proceed) -> torch.Tensor:
    """The softmax at temperature `tau`: above 1 flatter, below 1 sharper."""
    options = call.options
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options = {**options, "attn_mask": mask / tau}
    return proceed(call._replace(query=call.query / tau, options=options))


def argmax(call: AttnCall) -> torch.Tensor:
    """Each token sees only the one it sees most; rows of the map are made a few at a time."""
    batch, heads, rows, dim = call.query.shape
    scale = call.options.get("scale")
    scale = dim**-0.5 if scale is None else scale
    mask = _added(call.options.get("attn_mask"))
    chunk = max(1, ARGMAX_LOGITS // (batch * heads * call.key.shape[2]))
    exact = torch.promote_types(call.query.dtype, torch.float32)
    keys, parts = call.key.to(exact).transpose(-1, -2) * scale, []
    for first in range(0, rows, chunk):
        logits = call.query[:, :, first : first + chunk].to(exact) @ keys
        if mask is not None:
            logits = logits + (mask if mask.shape[-2] == 1 else mask[..., first : first + chunk, :])
        index = logits.argmax(-1, keepdim=True).expand(-1, -1, -1, call.value.shape[-1])
        parts.append(call.value.gather(2, index))
    return torch.cat(parts, 2)


def self_and_text(call: AttnCall) -> torch.Tensor:
    """Image rows see themselves and the (unmasked) text only, `[B, H, image, D]`."""
    image, text = slice(*call.layout.image), slice(*call.layout.text)
    bias = _added(call.options.get("attn_mask"))
    if bias is not None:
        bias = bias[..., image if bias.shape[-2] > 1 else slice(None), text]
    if call.repeats > 1:
        again = call.key.new_zeros(text.stop - text.start, dtype=torch.float32)
        again[-1] = math.log(call.repeats)
        bias = again if bias is None else bias + again
    return diagonal_columns_attention(
        call.query[:, :, image],
        call.key[:, :, image],
        call.value[:, :, image],
        call.key[:, :, text],
        call.value[:, :, text],
        call.options.get("scale"),
        bias,
    )


def _added(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as what it adds to the logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def _one_query(call: AttnCall, query: torch.Tensor, proceed: Proceed) -> torch.Tensor:
    """Attention of one query `[B, H, 1, D]`, which every row asks."""
    batch, heads, rows, _ = call.query.shape
    mask = call.options.get("attn_mask")
    if mask is not None and mask.shape[-2] > 1:  # rows differ in what they may see
        return proceed(call._replace(query=query.expand_as(call.query)))
    out = call.core(call._replace(query=query))
    return out.expand(batch, heads, rows, -1)


def _blur(planes: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of `[N, 1, height, width]` along the width, mirrored at the borders."""
    width = planes.shape[-1]
    radius = min(math.ceil(6 * sigma) // 2, (width - 1) // 2)
    offsets = torch.arange(-radius, radius + 1, device=planes.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).to(planes.dtype)
    padded = functional.pad(planes, (radius, radius, 0, 0), mode="reflect")
    return functional.conv2d(padded, weights[None, None, None])
