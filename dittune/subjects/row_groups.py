"""Attention in which groups of rows see different sets of keys, their own and other pictures'.

Instead of a mask of rows x keys each group is one call of the attention core with the keys it sees,
gathered: exact, nothing is formed that is larger than the joined keys, and any back-end can run it.

Shape letters: `C` chunks of the batch (roles), `N` image tokens, `K` joined keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dittune.call import AttnCall, TokenLayout
from dittune.errors import ConfigError, UnsupportedModelError


class RowGroup(NamedTuple):
    """Rows that see the same keys.

    Attributes:
        rows: query tokens, int64.
        keys: which of the joined keys they see, int64, the picture's own first and in order.
        text: where the text is among these keys, as in a `TokenLayout`.
        bias: `[keys]`, added to the logits; None adds nothing.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    text: tuple[int, int]
    bias: torch.Tensor | None = None


class Foreign(NamedTuple):
    """Keys of another picture.

    Attributes:
        picture: which.
        tokens: its image tokens, int64, counted from the first of them.
        shift: `[n, 2]`, rows and columns by which each is moved; None leaves them.
    """

    picture: int
    tokens: torch.Tensor
    shift: torch.Tensor | None = None


class PicturePlan(NamedTuple):
    """What one picture sees. `groups` share out all rows; keys of `foreign` follow its own."""

    picture: int
    groups: tuple[RowGroup, ...]
    foreign: tuple[Foreign, ...] = ()

    def to(self, device: torch.device) -> PicturePlan:
        groups = (RowGroup(*(_on(value, device) for value in group)) for group in self.groups)
        foreign = (Foreign(*(_on(value, device) for value in one)) for one in self.foreign)
        return PicturePlan(self.picture, tuple(groups), tuple(foreign))


def _on(value, device: torch.device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def row_group(
    rows: torch.Tensor,
    own: torch.Tensor,
    layout: TokenLayout,
    foreign: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    foreign_bias: float = 0.0,
) -> RowGroup:
    """The group of `rows` that see some keys.

    Args:
        rows: bool `[Sq]`.
        own: bool `[Skv]`, which of the picture's own keys they see.
        layout: of the keys.
        foreign: places of further keys among the joined ones, int64.
        bias: `[Skv]`, of the own keys.
        foreign_bias: of the further keys, all of them.
    """
    first, last = layout.text
    before = int(own[:first].sum())
    text = (before, before + int(own[first:last].sum()))
    keys = own.nonzero().flatten()
    extra = keys.new_zeros(0) if foreign is None else foreign
    if bias is None and foreign_bias and len(extra):
        bias = torch.zeros(len(own))
    if bias is not None:
        bias = torch.cat([bias[own], bias.new_full((len(extra),), foreign_bias)])
    return RowGroup(rows.nonzero().flatten(), torch.cat([keys, extra]), text, bias)


def attend_by_plans(
    call: AttnCall, plans: Sequence[PicturePlan], proceed: Callable[[AttnCall], torch.Tensor]
) -> torch.Tensor:
    """Attention of all pictures, `[B, H, Sq, D]`; those without a plan are left alone.

    A role sees only keys of its own chunk, so the conditional and the unconditional half, and the
    extra branches of other methods, stay apart.

    Raises:
        ConfigError: the model masks its attention already.
    """
    if call.options.get("attn_mask") is not None:
        raise ConfigError("cannot choose keys where the model masks its attention; leave out masks")
    if not plans:
        return proceed(call)
    count = call.query.shape[0] // len(call.roles)
    planned = [plan.picture for plan in plans]
    plain = [picture for picture in range(count) if picture not in planned]
    order = [*plain, *planned]
    parts = [_chunked(proceed(call.take_pictures(plain)), call)] if plain else []
    for plan in plans:
        parts.append(_chunked(_attend(call, plan, proceed), call))
    out = torch.cat(parts, 1)  # (C, pictures, H, Sq, D)
    back = torch.tensor(order, device=out.device).argsort()
    return out[:, back].flatten(0, 1)


def _chunked(out: torch.Tensor, call: AttnCall) -> torch.Tensor:
    return out.unflatten(0, (len(call.roles), -1))


def _attend(call: AttnCall, plan: PicturePlan, proceed) -> torch.Tensor:
    own = call.take_pictures([plan.picture])
    keys, values = [own.key], [own.value]
    for foreign in plan.foreign:
        other = call.take_pictures([foreign.picture])
        tokens = foreign.tokens + call.layout.image[0]
        key = other.key[:, :, tokens]
        if foreign.shift is not None:
            key = _moved(call, key, foreign.shift)
        keys.append(key)
        values.append(other.value[:, :, tokens])
    key, value = torch.cat(keys, 2), torch.cat(values, 2)  # (C, H, K, D)
    parts = []
    for group in plan.groups:
        options = own.options
        if group.bias is not None:
            bias = group.bias.to(own.query)[None, None, None]
            options = {**options, "attn_mask": bias}
        few = own._replace(
            query=own.query[:, :, group.rows],
            key=key[:, :, group.keys],
            value=value[:, :, group.keys],
            layout=own.layout._replace(text=group.text),
            options=options,
        )
        parts.append(proceed(few))
    rows = torch.cat([group.rows for group in plan.groups])
    return torch.cat(parts, 2)[:, :, rows.argsort()]


def _moved(call: AttnCall, key: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    host = call.run.host
    if not hasattr(host.facts, "move_keys"):
        raise UnsupportedModelError(
            f"dittune does not know how {type(host.model).__name__} marks places in its keys; use "
            "isolation with reposition=False"
        )
    return host.facts.move_keys(host.model, key, shift)
