"""Plans of measured attention: where the mass of each head is, in blocks, and files of that."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dittune.errors import ConfigError
from dittune.patterns import Plan, TokenOrder
from dittune.sparse.plan import Place, image_plan

PROBABILITIES_AT_ONCE = 2**26


class Frame(NamedTuple):
    """A sequence cut into blocks, before anything is known of the heads.

    Attributes:
        place: where attention is computed.
        plan: every block.
        image: first and one-past-last block of the image.
        asked: places of the image's queries that are asked, int64 `[image blocks, queries]`.
    """

    place: Place
    plan: Plan
    image: tuple[int, int]
    asked: torch.Tensor


def frame_of(place: Place, block: int, queries: int) -> Frame:
    """The frame of one place, `queries` evenly spaced ones of each block asked, all if 0."""
    plan = image_plan(place, True, TokenOrder(place.layout.grid), block=block)
    segment = next(s for s in plan.queries.segments if s.name == "image")
    blocks = plan.queries.blocks(segment, block)
    many = min(queries or block, block)
    inside = torch.arange(many) * blocks.count[:, None] // many
    first = (blocks.first + torch.arange(len(blocks.count))) * block
    asked = first[:, None] + inside
    image = blocks.first, blocks.first + len(blocks.count)
    return Frame(place, plan.to(place.device), image, asked.to(place.device))


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    frame: Frame,
    key_count: torch.Tensor | None = None,
    repeated: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Mean probability with which image queries of a block look at a block, `[H, nq, nk]`.

    Args:
        query: `[B, H, S, D]` in the order of the plan, as the kernels get them.
        key: likewise.
        scale: of the logits.
        frame: the blocks.
        key_count: real keys of each block, int `[1 or B, nk]`; None are those of the plan.
        repeated: place of the one key that stands for several, and for how many.

    Returns:
        Rows of image blocks, columns of all blocks, in at least float32; means over the batch.
    """
    size = frame.plan.block[1]
    count = frame.plan.tensors["key_count"] if key_count is None else key_count
    is_real = torch.arange(size, device=key.device) < count[..., None]  # (1 or B, nk, size)
    exact = torch.promote_types(query.dtype, torch.float32)
    bias = is_real.flatten(1)[:, : key.shape[2]].to(exact).log()  # 0 or -inf
    bias[:, repeated[0]] += math.log(repeated[1])
    columns, many = count.shape[1], frame.asked.shape[1]
    mass = torch.zeros(query.shape[1], len(frame.asked), columns, dtype=exact, device=key.device)
    at_once = max(1, PROBABILITIES_AT_ONCE // (many * key.shape[2]))
    for b in range(len(query)):
        for head in range(query.shape[1]):
            keys = key[b, head].to(exact).T * scale
            for i in range(0, len(frame.asked), at_once):
                rows = frame.asked[i : i + at_once]
                logits = query[b, head][rows.flatten()].to(exact) @ keys
                found = (logits + bias[b % len(bias)]).softmax(-1)
                found = torch.nn.functional.pad(found, (0, columns * size - found.shape[1]))
                found = found.unflatten(1, (columns, size)).sum(2)
                mass[head, i : i + at_once] += found.unflatten(0, (len(rows), many)).mean(1)
    return mass / len(query)


def best_blocks(mass: torch.Tensor, frame: Frame, keep: float) -> torch.Tensor:
    """The blocks of most mass of each row, and the row's own: bool `[H, nq, image blocks]`."""
    first, last = frame.image
    many = last - first
    best = mass[..., first:last].topk(min(many, int(keep * many) + 1), -1).indices
    kept = torch.zeros_like(mass[..., first:last], dtype=torch.bool).scatter_(-1, best, True)
    return kept | torch.eye(many, dtype=torch.bool, device=mass.device)


def plan_of(kept: torch.Tensor, frame: Frame) -> Plan:
    """Image blocks see those that are kept, `[H, nq, nq]`, and all text; text sees all."""
    plan, (first, last) = frame.plan, frame.image
    rows, columns = (plan.tensors[f"{name}_order"].shape[1] for name in ("row", "column"))
    used = torch.ones(len(kept), rows, columns, dtype=torch.bool, device=kept.device)
    used[:, first:last, first:last] = kept
    masked = torch.zeros(columns, dtype=torch.bool, device=kept.device)
    masked[plan.tensors["row_partial_index"].long()] = True
    tensors = dict(plan.tensors)
    for name, blocks, is_partial in (
        ("row", used, masked),
        ("column", used.transpose(1, 2), masked[:, None]),
    ):
        for kind, part in (("full", blocks & ~is_partial), ("partial", blocks & is_partial)):
            ends = part.sum(2).flatten().cumsum(0).view(part.shape[:2])
            begin = torch.nn.functional.pad(ends[:-1, -1:], (0, 0, 1, 0))
            tensors[f"{name}_{kind}_start"] = torch.cat([begin, ends], 1).int()
            tensors[f"{name}_{kind}_index"] = part.nonzero()[:, 2].int()
        tensors[f"{name}_partial_slot"] = torch.full_like(tensors[f"{name}_partial_index"], -1)
        order = torch.argsort(blocks.sum(2), dim=1, descending=True, stable=True)
        tensors[f"{name}_order"] = order.int()
    heads = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
    tensors["head_plan"] = heads
    for name in ("query_table", "key_table"):
        tensors[name] = tensors[name].expand(len(kept), -1, -1)
    return replace(plan, tensors=tensors, heads=tuple(heads.tolist()))


def save_patterns(path: str | Path, about: dict[str, Any], kept: dict[str, torch.Tensor]) -> None:
    """Writes patterns to a safetensors file, at once or not at all.

    Args:
        path: of the file.
        about: what they were measured on and how; compared at loading.
        kept: by name of the site, bool `[H, n, n]`.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: blocks.cpu() for name, blocks in kept.items()}, part,
              metadata={"sparsed": json.dumps(about)})  # fmt: skip
    os.replace(part, path)


def patterns_at(path: str | Path, about: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The patterns of a file, or none where there is no file yet, but can be.

    Raises:
        ConfigError: as `load_patterns`, or its folder cannot be made or written to.
    """
    if Path(path).exists():
        return load_patterns(path, about)
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise ConfigError(f"sparsed: cannot write patterns to {path}: {error}") from error
    return {}


def load_patterns(path: str | Path, about: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The patterns of a file that was written for the same settings, model and geometry.

    Raises:
        ConfigError: it cannot be read, is no file of patterns, or is for something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = dict(json.loads((file.metadata() or {})["sparsed"]))
            kept = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"sparsed: {path} is no file of patterns it has written: {error}"
        ) from error
    if wrong := sorted(n for n in {*found, *about} if found.get(n) != about.get(n)):
        raise ConfigError(
            f"sparsed: {path} was measured with {', '.join(f'{n} {found.get(n)}' for n in wrong)}; "
            f"now it is {', '.join(f'{n} {about.get(n)}' for n in wrong)}; name another file, "
            "where they are measured anew"
        )
    if bad := [n for n, t in kept.items() if t.dtype != torch.bool or t.ndim != 3]:
        raise ConfigError(f"sparsed: {path} has no blocks of heads at {bad[0]}; delete it")
    return kept
