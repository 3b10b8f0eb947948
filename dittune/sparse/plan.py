"""What a plan is to one place of a model: which order, which back-end, and how to run it."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from dittune.call import AttnCall, TokenLayout
from dittune.kernels.block_sparse import block_sparse_attention, merge_attention
from dittune.kernels.block_sparse.lists import unpack
from dittune.kernels.block_sparse.reference import dense_mask
from dittune.patterns import BlockRule, Pattern, Plan, Segment, Sequence, TokenOrder, make_plan

BACKENDS = ("auto", "dense", "triton", "flex", "cpu", "reference")
MASK_TOKENS = 4096  # `auto` makes masks of as many numbers as tokens x tokens up to here

# Of the CPU path, in units of one pair of tokens of one head, measured on one core of a Zen 4: a
# row of blocks, and a pair of a visited block.
ROW_COST, PAIR_COST = 150_000, 1.8


class Place(NamedTuple):
    """Where attention is computed; what a plan depends on.

    Attributes:
        layout: of the tokens.
        heads: of the sites; with the length it decides whether blocks are worth it on a CPU.
        device: of the tensors.
    """

    layout: TokenLayout
    heads: int
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return max(self.layout.image[1], self.layout.text[1]) + self.layout.references

    @property
    def block(self) -> int:
        """Tokens of a block: what the kernels of the device like."""
        return 64 if self.device.type == "cpu" else 128


class Ready:
    """A plan on its device, and how to run it.

    Attributes:
        backend: `plain` (the model's own core will do), `dense` (under a mask), or a kernel's name.
        mask: bool `[1 or H, Sq, Skv]` in the model's order, for `dense`.
        lists: what the kernel takes.
        order: from the model's order to the plan's, for queries and for keys; None changes nothing.
    """

    def __init__(self, plan: Plan, place: Place, backend: str):
        self.plan, self.place = plan, place
        self.block, self.rule = plan.block, plan.rule
        self.backend = backend
        self.mask, self.lists, self.order = None, None, (None, None)
        if self.backend == "dense":
            self.mask = self._mask().to(place.device)
        elif self.backend != "plain":
            self.plan = plan.to(place.device)
            self.lists = self.plan.tensors
            both = plan.queries.permutation, plan.keys.permutation
            self.order = tuple(p and p.to(place.device) for p in both)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """Shares of all pairs, of the image's pairs (coarse keys added) and of the blocks."""
        stats, tokens = self.plan.stats(), self.place.tokens
        image = self.place.layout.image[1] - self.place.layout.image[0]
        pairs = stats.token_density * self.plan.queries.tokens * self.plan.keys.tokens
        inside = pairs - (tokens - image) * (tokens + image)
        return {
            "backend": self.backend,
            "density": pairs / tokens**2,
            "image_density": inside / image**2,
            "block_density": stats.block_density,
        }

    def _mask(self) -> torch.Tensor:
        """Whatever the plan is made of, its blocks say which slots attend."""
        plan = self.plan
        task = unpack(plan.tensors, self.block, self.rule, 1.0)
        mask = dense_mask(task, plan.queries.slots, plan.keys.slots)[0]
        for axis, sequence in ((-2, plan.queries), (-1, plan.keys)):
            if sequence.permutation is not None:
                mask = sequence.permutation.to(mask.device).unpermute(mask, axis)
        return mask

    def __call__(
        self, call: AttnCall, scale: float | None, real_text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention under the plan, `[B, H, Sq, D]`, tokens in the model's order.

        `real_text`, int `[B]`, is how many text tokens are no padding; None is all.
        """
        last, lists = call.layout.text[1] - 1, self.lists
        if real_text is not None and lists is not None:
            name = "after" if call.layout.image[0] == 0 else "before"
            lists = {**lists, "key_count": self.plan.key_count({name: real_text})}
        if self.backend == "dense":
            mask = self.mask
            if real_text is not None:
                hidden = call.options["attn_mask"]
                mask = mask & functional.pad(
                    hidden, (0, mask.shape[-1] - hidden.shape[-1]), value=True
                )
            if call.repeats > 1:
                mask = torch.zeros_like(mask, dtype=call.query.dtype).masked_fill(~mask, -math.inf)
                mask[..., last] += math.log(call.repeats)
            return functional.scaled_dot_product_attention(
                call.query, call.key, call.value, attn_mask=mask, scale=scale
            )
        query, key, value = (
            t if order is None else order.permute(t)
            for t, order in zip(
                (call.query, call.key, call.value), (self.order[0], self.order[1], self.order[1])
            )
        )
        out, lse = block_sparse_attention(
            query, key, value, lists, self.block, self.rule, scale, self.backend
        )
        if self.order[0] is not None:
            out = self.order[0].unpermute(out)
        if call.repeats == 1:
            return out
        lse = lse if self.order[0] is None else self.order[0].unpermute(lse, -1)
        return count_again(out, lse, call, scale)


def count_again(
    out: torch.Tensor, lse: torch.Tensor, call: AttnCall, scale: float | None
) -> torch.Tensor:
    """Adds the further copies of the last text token, which all see, to attention without them."""
    last = call.layout.text[1] - 1
    scale = call.query.shape[-1] ** -0.5 if scale is None else scale
    again = (call.query @ call.key[:, :, last, :, None])[..., 0].to(lse.dtype) * scale
    same = call.value[:, :, last : last + 1].expand_as(out)
    return merge_attention([out, same], [lse, again + math.log(call.repeats - 1)])[0]


def image_plan(
    place: Place,
    pattern: Pattern | BlockRule | bool,
    order: TokenOrder,
    coarse: dict[str, tuple[TokenOrder, Pattern | bool]] | None = None,
    block: int | None = None,
) -> Plan:
    """The plan of a sequence in which only the image tokens are choosy.

    Args:
        place: where the image is in the sequence.
        pattern: which image tokens see each other.
        order: of the image tokens.
        coarse: further keys, behind those of the model: their order, and which of them an image
            token sees. Other tokens do not see them.
        block: tokens of a block's side; None is what suits the device.
    """
    first, last = place.layout.image
    ends = {"before": first, "after": place.tokens - last}
    parts = {name: Segment(name, TokenOrder((1, 1, count)), place.layout.is_masked)
             for name, count in ends.items() if count}  # fmt: skip
    image = Segment("image", order)
    own = [parts[n] if n != "image" else image for n in ("before", "image", "after")
           if n == "image" or n in parts]  # fmt: skip
    rules = {(a.name, b.name): True for a in own for b in own}
    rules["image", "image"] = pattern
    keys = list(own)
    for name, (its_order, rule) in (coarse or {}).items():
        keys.append(Segment(name, its_order))
        rules |= {(part, name): False for part in parts} | {("image", name): rule}
    block = place.block if block is None else block
    sequences = [Sequence(tuple(each), block) for each in (own, keys)]
    return make_plan(*sequences, rules, (block, block))


def choose_backend(plan: Plan, place: Place, backend: str) -> str:
    """What to run a plan of one pattern with: `plain` if it is dense, and what `auto` means."""
    (layout,) = plan.layouts
    if layout.sure == plan.queries.tokens * plan.keys.tokens == place.tokens**2:
        return "plain"
    if backend == "auto" and place.device.type == "cpu":
        return cheaper_on_cpu(plan, place, len(layout.full) + len(layout.partial))
    return backend


def cheaper_on_cpu(plan: Plan, place: Place, visited: int, patterns: int = 1) -> str:
    """`cpu`, or `dense` where skipping blocks would be slower and masks are small.

    Args:
        visited: blocks, of all patterns together.
        patterns: how many there are; as many heads have each.
    """
    block_q, block_k = plan.block
    rows = -(-plan.queries.slots // block_q) * patterns
    pairs = place.heads // patterns * visited * block_q * block_k
    dense = place.heads * plan.queries.tokens * plan.keys.tokens
    is_small = patterns * place.tokens**2 <= MASK_TOKENS**2
    return "dense" if ROW_COST * rows + PAIR_COST * pairs > dense and is_small else "cpu"
