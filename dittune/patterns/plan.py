"""Block-sparse plans: what a pattern on given token orders means to the sparse kernels.

A plan lists the blocks of the score matrix that are used, for each row of blocks and, for the
gradient, for each column; the blocks that need no mask apart from those that do. It is built once
for a geometry, from coordinates and never from a tokens x tokens mask, and reaches a kernel as
plain tensors (`Plan.tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import GivenBlocks
from dittune.patterns.layout import FrozenRules, Layout, Rules, make_layout
from dittune.patterns.report import PlanStats, picture, plan_stats
from dittune.patterns.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by `make_plan` and `per_head`.

    Attributes:
        queries: the query sequence.
        keys: the key sequence; the same one in self-attention.
        block: tokens of a block, `(queries, keys)`.
        rules: of each different plan (see `per_head`), one entry for a shared plan.
        exact: False if every touched block is used as a whole.
        layouts: the blocks of each different plan.
        heads: number of the plan that each head uses; `(0,)` where all heads share one.
        tensors: what a kernel takes, by the names of the fields of `BlockLists` in
            `dittune.kernels.block_sparse`, described there.
        rule: of the element blocks, `none`, `window`, `disc` or `bits`.
    """

    queries: Sequence
    keys: Sequence
    block: tuple[int, int]
    rules: tuple[FrozenRules, ...]
    exact: bool
    layouts: tuple[Layout, ...]
    heads: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    rule: str

    def to(self, device: torch.device | str) -> Plan:
        """The plan with its tensors on `device`."""
        return replace(self, tensors={k: v.to(device) for k, v in self.tensors.items()})

    def key_count(self, valid: Mapping[str, int | torch.Tensor]) -> torch.Tensor:
        """Real keys of each block when segments hold fewer keys than planned.

        Args:
            valid: for segments with `is_variable`, how many of their first tokens are real keys,
                an integer or int `[B]`, one for each batch row.

        Returns:
            int32 `[1 or B, nk]`, to be given to the kernel in place of the plan's own.

        Raises:
            ConfigError: a segment that does not exist or is not variable.
        """
        segments = {s.name: s for s in self.keys.segments if s.is_variable}
        count = self.tensors["key_count"]
        for name, number in valid.items():
            if name not in segments:
                raise ConfigError(f"{name!r} is not among the variable segments {list(segments)}")
            start, stop = self.keys.spans[name]
            start, stop = start // self.block[1], -(-stop // self.block[1])
            number = torch.as_tensor(number, device=count.device).reshape(-1, 1)
            number = number.clamp(max=segments[name].order.tokens)
            first = torch.arange(stop - start, device=count.device) * self.block[1]
            count = count.expand(max(len(count), len(number)), -1).clone()
            count[:, start:stop] = (number - first).clamp(0, self.block[1]).int()
        return count

    def stats(self) -> PlanStats:
        """Densities, balance and memory, over all heads."""
        return plan_stats(self)

    def draw(self, head: int = 0, cell: int = 4) -> torch.Tensor:
        """The score matrix as a picture, uint8 `[rows, columns, 3]`; see `report.picture`."""
        return picture(self, head, cell)


def make_plan(
    queries: Sequence,
    keys: Sequence,
    rules: Rules,
    block: tuple[int, int] = (128, 128),
    exact: bool = True,
    as_bits: bool = False,
) -> Plan:
    """The plan of one pattern for all heads; cached by its arguments, hence not to be written into.

    Rules of `GivenBlocks` are not cached.

    Args:
        queries: the query sequence, for example text and image.
        keys: the key sequence; may have more segments than `queries`.
        rules: for each pair `(query segment, key segment)` a pattern, a block rule, True (all
            attend: text rows, text or sink columns) or False.
        block: tokens of a block, `(queries, keys)`.
        exact: False uses every block with an attending pair as a whole: faster, not the same.
        as_bits: store one bit a pair of the element blocks even where a smaller rule would do.

    Returns:
        The plan, with tensors on the CPU.

    Raises:
        ConfigError: a pair of segments without rule or a rule without segments; a pattern of
            another grid; a segment that does not start on a block; padding inside a block.
    """
    if min(block) < 1:
        raise ConfigError(f"a block has at least 1 token on each side, got {tuple(block)}")
    grids = {segment.name: segment.order.grid for segment in queries.segments}
    for (name, _), rule in rules.items():
        made_for = getattr(rule, "grid", None)
        if made_for is not None and made_for != grids.get(name, made_for):
            raise ConfigError(f"{rule} is for another grid than {grids[name]}, that of {name!r}")
    frozen = tuple(sorted(rules.items(), key=lambda item: item[0]))
    is_geometry = not any(isinstance(rule, GivenBlocks) for _, rule in frozen)
    build = _build if is_geometry else _build.__wrapped__
    return build(queries, keys, frozen, tuple(block), exact, as_bits)


@lru_cache(maxsize=32)
def _build(queries, keys, frozen, block, exact, as_bits) -> Plan:
    layout = make_layout(queries, keys, frozen, block, exact, as_bits)
    return _assemble(queries, keys, block, (frozen,), exact, (layout,), (0,))


def per_head(plans: ListOf[Plan], heads: ListOf[int]) -> Plan:
    """One plan in which heads differ.

    Args:
        plans: different ones, of the same sequences and block sizes.
        heads: for each head the number of its plan in `plans`.

    Raises:
        ConfigError: the plans differ in sequences or block sizes, are per head already, or a head
            names a plan that is not there.
    """
    if not plans:
        raise ConfigError("plans of heads are at least one, got none")
    first = plans[0]
    for plan in plans:
        same = (plan.queries, plan.keys, plan.block) == (first.queries, first.keys, first.block)
        if not same or len(plan.layouts) > 1:
            raise ConfigError("plans of heads have one pattern each, on the same sequences, blocks")
    if not heads or not all(0 <= number < len(plans) for number in heads):
        raise ConfigError(f"heads name plans 0 to {len(plans) - 1}, got {list(heads)}")
    if len({plan.rule for plan in plans} - {"none"}) > 1:  # a kernel knows one rule at a time
        plans = [
            make_plan(p.queries, p.keys, dict(p.rules[0]), p.block, p.exact, as_bits=True)
            for p in plans
        ]
    return _assemble(
        first.queries,
        first.keys,
        first.block,
        tuple(plan.rules[0] for plan in plans),
        all(plan.exact for plan in plans),
        tuple(plan.layouts[0] for plan in plans),
        tuple(heads),
    )


def _assemble(queries, keys, block, rules, exact, layouts, heads) -> Plan:
    nq, nk = -(-queries.slots // block[0]), -(-keys.slots // block[1])
    first_bit = torch.tensor([0] + [len(layout.bits) for layout in layouts]).cumsum(0)
    rows, columns = [], []
    for layout, offset in zip(layouts, first_bit):
        uses_bits = len(layout.bits) > 0
        slot = torch.where(layout.slot < 0, -1, layout.slot + (offset if uses_bits else 0)).int()
        rows.append(_lists(layout.full, layout.partial, slot, nq, 0))
        columns.append(_lists(layout.full, layout.partial, slot, nk, 1))
    found = {layout.tables.rule: layout.tables for layout in layouts if layout.tables}
    bits = torch.cat([layout.bits for layout in layouts])
    rule, tables = next(iter(found.items()), ("bits" if len(bits) else "none", None))
    tensors = {f"row_{name}": value for name, value in _stack(rows).items()}
    tensors |= {f"column_{name}": value for name, value in _stack(columns).items()}
    count = torch.zeros(1, nk, dtype=torch.int32)
    for segment in keys.segments:
        part = keys.blocks(segment, block[1])
        count[0, part.first : part.first + len(part.count)] = part.count
    tensors |= {"key_count": count, "head_plan": torch.tensor(heads, dtype=torch.int32)}
    empty = torch.zeros(0, 6, dtype=torch.int32), torch.zeros(0, 3, dtype=torch.int32)
    if tables is not None:
        empty = torch.zeros_like(tables.query), torch.zeros_like(tables.key)
    each = [(x.tables.query, x.tables.key) if x.tables else empty for x in layouts]
    tensors["query_table"] = torch.stack([query for query, _ in each])
    tensors["key_table"] = torch.stack([key for _, key in each])
    tensors["bits"] = bits
    return Plan(queries, keys, block, rules, exact, layouts, heads, tensors, rule)


def _lists(full, partial, slot, lines: int, axis: int) -> dict[str, torch.Tensor]:
    """The blocks of each row (`axis` 0) or column (1), rows one after the other."""
    full_order = torch.argsort(full[:, axis], stable=True)
    partial_order = torch.argsort(partial[:, axis], stable=True)
    full_many = torch.bincount(full[:, axis], minlength=lines)
    partial_many = torch.bincount(partial[:, axis], minlength=lines)
    return {
        "full_start": torch.nn.functional.pad(full_many.cumsum(0), (1, 0)),
        "full_index": full[full_order, 1 - axis],
        "partial_start": torch.nn.functional.pad(partial_many.cumsum(0), (1, 0)),
        "partial_index": partial[partial_order, 1 - axis],
        "partial_slot": slot[partial_order],
        "order": torch.argsort(full_many + partial_many, descending=True, stable=True),
    }


def _stack(lists: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The lists of several plans behind one another, all int32."""
    out = {}
    for kind in ("full", "partial"):
        sizes = [len(each[f"{kind}_index"]) for each in lists]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        out[f"{kind}_start"] = torch.stack(
            [each[f"{kind}_start"] + start for each, start in zip(lists, starts)]
        )
        out[f"{kind}_index"] = torch.cat([each[f"{kind}_index"] for each in lists])
    out["partial_slot"] = torch.cat([each["partial_slot"] for each in lists])
    out["order"] = torch.stack([each["order"] for each in lists])
    return {name: value.int() for name, value in out.items()}
