"""Dense masks: from the lists of a plan, and from the rules of its segments, pair by pair."""

import torch


def expand(plan, number=0, key_count=None, side="row"):
    """What the lists of plan `number` say, bool `[slots, slots]`, padded queries included.

    Written slowly and apart from the kernels: block by block from the tensors a kernel gets.
    """
    block_q, block_k = plan.block
    tensors = plan.tensors
    nq, nk = tensors["row_order"].shape[1], tensors["column_order"].shape[1]
    count = tensors["key_count"][0] if key_count is None else key_count
    mask = torch.zeros(nq * block_q, nk * block_k, dtype=torch.bool)
    listed = set()
    for line in range(nq if side == "row" else nk):
        for kind in ("full", "partial"):
            start = tensors[f"{side}_{kind}_start"][number]
            for at in range(int(start[line]), int(start[line + 1])):
                other = int(tensors[f"{side}_{kind}_index"][at])
                q, k = (line, other) if side == "row" else (other, line)
                assert (q, k) not in listed, "a block is listed twice"
                listed.add((q, k))
                inside = torch.ones(block_q, block_k, dtype=torch.bool)
                if kind == "partial":
                    inside = torch.arange(block_k)[None] < count[k]
                    slot = int(tensors[f"{side}_partial_slot"][at])
                    if slot >= 0:
                        inside = inside & rule_of(plan, number, slot, q, k)
                mask[q * block_q : (q + 1) * block_q, k * block_k : (k + 1) * block_k] = inside
    return mask[: plan.queries.slots, : plan.keys.slots]


def rule_of(plan, number, slot, q, k):
    block_q, block_k = plan.block
    if plan.rule == "bits":
        packed = plan.tensors["bits"][slot]
        return torch.stack([(packed[:, j // 8] >> (j % 8)) & 1 for j in range(block_k)], 1).bool()
    query = plan.tensors["query_table"][number][q * block_q : (q + 1) * block_q]
    key = plan.tensors["key_table"][number][k * block_k : (k + 1) * block_k]
    seen = torch.zeros(block_q, block_k, dtype=torch.bool)
    query, key = query[:, None], key[None]
    if plan.rule == "window":
        found = ((query[..., :3] <= key) & (key <= query[..., 3:])).all(-1)
    else:
        found = (query[..., :3] - key).square().sum(-1) < query[..., 3]
    seen[: found.shape[0], : found.shape[1]] = found
    return seen


def natural(plan, mask):
    """A mask over slots as a mask over the model's own order, padding dropped."""
    if plan.queries.permutation is not None:
        mask = mask[plan.queries.permutation.inverse]
    if plan.keys.permutation is not None:
        mask = mask[:, plan.keys.permutation.inverse]
    return mask


def places(grid):
    """All cells, row-major, as tuples."""
    frames, height, width = grid
    return [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]


def brute(grid, sees, key_grid=None):
    """The mask of a predicate on two cells, asked for each pair."""
    keys = places(key_grid or grid)
    return torch.tensor([[bool(sees(q, k)) for k in keys] for q in places(grid)])


def pattern_mask(pattern, grid, key_grid=None):
    """The mask of a pattern by its own definition, `allows`."""
    query, key = torch.tensor(places(grid)), torch.tensor(places(key_grid or grid))
    return pattern.allows(query[:, None], key[None])
