"""Sorts the blocks of one pattern into full, tail and element blocks; never tokens x tokens.

* A *full* block is used without any mask: all its pairs attend and it has no padded key.
* A *tail* block is used up to its number of real keys.
* An *element* block asks, besides, a rule for each pair.
* All others are absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dittune.errors import ConfigError
from dittune.patterns.algebra import BlockRule, Boxes, Pattern, Tables
from dittune.patterns.sequence import Blocks, Sequence

Rules = dict[tuple[str, str], "Pattern | BlockRule | bool"]
FrozenRules = tuple[tuple[tuple[str, str], "Pattern | BlockRule | bool"], ...]

ENTRIES_AT_ONCE = 2**21  # of a bool matrix being worked on; bounds the memory of building


class _Open(NamedTuple):
    """Element blocks of one pair of segments, `[n, 2]` numbers within the segments."""

    pattern: Pattern
    query: Blocks
    key: Blocks
    blocks: torch.Tensor


class Layout(NamedTuple):
    """The blocks that are used, as `(query block, key block)` in row-major order.

    Attributes:
        full: int64 `[n, 2]`.
        partial: tail and element blocks, int64 `[n, 2]`.
        slot: int32 `[n]` for each partial block; -1 for tail blocks, else the element block's
            number, counted from 0.
        tables: of the rule of the element blocks, or None.
        bits: one bit a pair of the element blocks, uint8 `[elements, block_q, block_k / 8]`;
            no rows if there are `tables`.
        sure: number of attending pairs of real tokens outside the element blocks.
        open: what the pairs of the element blocks are decided by; for counting them.
    """

    full: torch.Tensor
    partial: torch.Tensor
    slot: torch.Tensor
    tables: Tables | None
    bits: torch.Tensor
    sure: int
    open: tuple[_Open, ...]

    def allowed(self) -> int:
        """Number of attending pairs of real tokens; looks at each pair of the element blocks."""
        return self.sure + sum(
            int(seen.sum()) for each in self.open for _, seen in _evaluate(*each)
        )


def make_layout(
    queries: Sequence,
    keys: Sequence,
    rules: FrozenRules,
    block: tuple[int, int],
    exact: bool,
    as_bits: bool,
) -> Layout:
    """The layout of one geometry; see `make_plan` for the arguments.

    `as_bits` stores the element blocks as bits even where tables would do.
    """
    full, partial, is_element, opened, sure = [], [], [], [], 0
    for (query_segment, key_segment), rule in _pairs(queries, keys, dict(rules)):
        query = queries.blocks(query_segment, block[0])
        key = keys.blocks(key_segment, block[1])
        some, every = _classify(rule, query, key, block)
        if not exact:
            every = some
        whole = (key.count == block[1]) & (not key_segment.is_variable)
        offset = torch.tensor([query.first, key.first])
        full.append((every & whole).nonzero() + offset)
        rest = (some & ~(every & whole)).nonzero()
        element = ~every[rest[:, 0], rest[:, 1]]
        partial.append(rest + offset)
        is_element.append(element)
        used = every.nonzero()
        sure += int((query.count[used[:, 0]] * key.count[used[:, 1]]).sum())
        if bool(element.any()):
            opened.append(_Open(rule, query, key, rest[element]))
    partial, is_element = torch.cat(partial), torch.cat(is_element)
    full, order = torch.cat(full), torch.argsort(_row_major(partial))
    partial, is_element = partial[order], is_element[order]
    slot = torch.where(is_element, is_element.cumsum(0) - 1, -1).int()
    tables = None
    if len(opened) == 1 and not as_bits:
        tables = _tables(queries, keys, opened[0])
    bits = torch.zeros(0, block[0], -(-block[1] // 8), dtype=torch.uint8)
    if opened and tables is None:
        bits = _bits(opened, _row_major(partial[is_element]), bits)
    full = full[torch.argsort(_row_major(full))]
    return Layout(full, partial, slot, tables, bits, sure, tuple(opened))


def _bits(opened: list[_Open], numbers: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """The bits of all element blocks, in the order of their ascending `numbers`."""
    bits = torch.empty(len(numbers), *empty.shape[1:], dtype=torch.uint8)
    for each in opened:
        offset = torch.tensor([each.query.first, each.key.first])
        at = torch.searchsorted(numbers, _row_major(each.blocks + offset))
        for part, seen in _evaluate(*each):
            bits[at[part]] = _pack(seen)
    return bits


def _pairs(queries: Sequence, keys: Sequence, rules: Rules):
    """Each pair of segments that attends, with its rule."""
    known = {(q.name, k.name): (q, k) for q in queries.segments for k in keys.segments}
    if unknown := set(rules) - set(known):
        raise ConfigError(f"rules for {sorted(unknown)}, but the segments are {sorted(known)}")
    if missing := set(known) - set(rules):
        raise ConfigError(f"no rule for {sorted(missing)}; give a pattern, True or False")
    return [(known[names], rule) for names, rule in rules.items() if rule is not False]


def _classify(
    rule: Pattern | BlockRule | bool, query: Blocks, key: Blocks, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly: does some real pair of a block attend, do all? bool `[nq, nk]` twice."""
    present = (query.count > 0)[:, None] & (key.count > 0)
    if rule is True:
        return present, present
    if isinstance(rule, BlockRule):
        kept = rule.keep(*block)
        if kept.shape != present.shape:
            raise ConfigError(
                f"{rule} keeps blocks of a {tuple(kept.shape)} grid, "
                f"the segments have {tuple(present.shape)} blocks"
            )
        return kept & present, kept & present
    some, every = torch.empty_like(present), torch.empty_like(present)
    step = max(1, ENTRIES_AT_ONCE // len(key.count))
    for i in range(0, len(query.count), step):
        box = Boxes(query.boxes.low[i : i + step], query.boxes.high[i : i + step])
        some[i : i + step], every[i : i + step] = rule.bounds(box, key.boxes)
    some, every = some & present, every & present
    decided = every | ~some
    if rule.exact_on_boxes:
        decided |= query.is_solid[:, None] & key.is_solid
    open_blocks = (~decided).nonzero()
    for part, seen in _evaluate(rule, query, key, open_blocks):
        rows, columns = open_blocks[part].unbind(1)
        found = seen.sum((1, 2))
        some[rows, columns] = found > 0
        every[rows, columns] = found == query.count[rows] * key.count[columns]
    return some, every


def _evaluate(
    pattern: Pattern, query: Blocks, key: Blocks, blocks: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which pairs of real tokens attend, bool `[some blocks, block_q, block_k]`, in parts."""
    step = max(1, ENTRIES_AT_ONCE // (query.place.shape[1] * key.place.shape[1]))
    for i in range(0, len(blocks), step):
        rows, columns = blocks[i : i + step].unbind(1)
        seen = pattern.allows(query.place[rows][:, :, None], key.place[columns][:, None])
        seen = seen & query.is_real[rows][:, :, None] & key.is_real[columns][:, None]
        yield slice(i, i + step), seen


def _row_major(blocks: torch.Tensor) -> torch.Tensor:
    """A number that grows with the row, then with the column: `[n, 2]` to `[n]`."""
    return (blocks[:, 0] << 32) + blocks[:, 1]


def _pack(seen: torch.Tensor) -> torch.Tensor:
    """Bit `j % 8` of byte `j // 8` is pair `j`: bool `[..., k]` to uint8 `[..., ceil(k / 8)]`."""
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (seen * (1 << torch.arange(8))).sum(-1).to(torch.uint8)


def _tables(queries: Sequence, keys: Sequence, each: _Open) -> Tables | None:
    """The pattern's tables for all slots of both sequences; those of other segments are unused."""
    query, key = each.query, each.key
    inside = each.pattern.tables(query.place.flatten(0, 1), key.place.flatten(0, 1))
    if inside is None:
        return None
    block_q, block_k = query.place.shape[1], key.place.shape[1]
    return Tables(
        inside.rule,
        _placed(inside.query, query.first * block_q, queries.slots),
        _placed(inside.key, key.first * block_k, keys.slots),
    )


def _placed(table: torch.Tensor, start: int, slots: int) -> torch.Tensor:
    whole = table.new_zeros(slots, table.shape[1])
    whole[start : start + len(table)] = table[: slots - start]
    return whole
