"""Triton kernels of block-sparse attention: forward, gradient of queries, of keys and values.

Each kernel has two loops over the listed blocks of its row or column: full blocks without any mask
or bounds check on keys, then partial blocks with `_seen`. A program takes `BM` queries or `BN` keys
of a block of `BQ x BK` tokens, and blocks are walked in steps of `BN` or `BM`. The number of the
next block is loaded one step ahead, so that loads of keys and values can be issued early.

Names: `i_` program and loop numbers, `o_` offsets, `b_` block values. Logits are in base 2.
"""

import triton
import triton.language as tl


@triton.jit
def _seen(
    o_q, o_k, i_row, i_column, slot, count, query_table, key_table, bits, Sq, Skv,
    RULE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Which pairs of a partial block attend, for any two shapes of offsets that broadcast.

    `o_q` and `o_k` are token numbers, `i_row` and `i_column` the numbers of their blocks.
    """
    seen = o_k - i_column * BK < count
    if RULE == "window":
        found = o_q >= 0
        for axis in tl.static_range(3):
            place = tl.load(key_table + o_k * 3 + axis, mask=o_k < Skv, other=0)
            first = tl.load(query_table + o_q * 6 + axis, mask=o_q < Sq, other=0)
            last = tl.load(query_table + o_q * 6 + axis + 3, mask=o_q < Sq, other=0)
            found = found & (first <= place) & (place <= last)
        seen = seen & (found | (slot < 0))
    elif RULE == "disc":
        distance = (o_q + o_k) * 0
        for axis in tl.static_range(3):
            place = tl.load(key_table + o_k * 3 + axis, mask=o_k < Skv, other=0)
            centre = tl.load(query_table + o_q * 6 + axis, mask=o_q < Sq, other=0)
            distance += (centre - place) * (centre - place)
        limit = tl.load(query_table + o_q * 6 + 3, mask=o_q < Sq, other=0)
        seen = seen & ((distance < limit) | (slot < 0))
    elif RULE == "bits":
        WIDTH: tl.constexpr = (BK + 7) // 8
        inside = o_k - i_column * BK
        at = tl.maximum(slot, 0).to(tl.int64) * BQ * WIDTH
        byte = tl.load(bits + at + (o_q - i_row * BQ) * WIDTH + inside // 8).to(tl.int32)
        seen = seen & ((((byte >> (inside % 8)) & 1) > 0) | (slot < 0))
    return seen


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product into float32; the interpreter cannot multiply bfloat16 and asks to upcast."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load(base, rows, stride, length, o_d, D: tl.constexpr, BD: tl.constexpr, SAFE: tl.constexpr):
    """Rows of a `[S, D]` matrix, zero beyond `D` and, unless `SAFE`, beyond `length`."""
    at = base + rows[:, None].to(tl.int64) * stride + o_d[None, :]
    if SAFE and D == BD:
        return tl.load(at)
    if SAFE:
        return tl.load(at, mask=o_d[None, :] < D, other=0.0)
    return tl.load(at, mask=(rows[:, None] < length) & (o_d[None, :] < D), other=0.0)


@triton.jit
def _walk_forward(
    acc, total, top, b_q, o_q, i_row, first, last, index, slots, key, value, stride_k, stride_v,
    count, query_table, key_table, bits, Sq, Skv, scale2, MASKED: tl.constexpr,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over some listed blocks of one row."""
    STEPS: tl.constexpr = BK // BN
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    i_column = tl.load(index + first, mask=first < last, other=0)
    for i in range(0, (last - first) * STEPS):
        o_k = i_column * BK + (i % STEPS) * BN + o_n
        b_k = _load(key, o_k, stride_k, Skv, o_d, D, BD, not MASKED)
        b_s = _dot(b_q, tl.trans(b_k), UPCAST, PRECISION) * scale2  # (BM, BN)
        if MASKED:
            slot = tl.load(slots + first + i // STEPS)
            real = tl.load(count + i_column)
            seen = _seen(
                o_q[:, None], o_k[None, :], i_row, i_column, slot, real, query_table, key_table,
                bits, Sq, Skv, RULE, BQ, BK,
            )  # fmt: skip
            b_s = tl.where(seen, b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        shift = new_top
        if MASKED:  # nothing seen yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is NaN
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        b_p = tl.exp2(b_s - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(b_p, 1)
        b_v = _load(value, o_k, stride_v, Skv, o_d, D, BD, not MASKED)
        acc = acc * kept[:, None] + _dot(b_p.to(b_v.dtype), b_v, UPCAST, PRECISION)
        top = new_top
        following = first + (i + 1) // STEPS
        i_column = tl.load(index + following, mask=following < last, other=0)
    return acc, total, top


@triton.jit
def forward_kernel(
    query, key, value, out, lse, full_start, full_index, partial_start, partial_index, slots,
    order, key_count, head_plan, query_table, key_table, bits,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_count, stride_plan, H, Sq, Skv, nq, scale2,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(nq * BQ / BM, B * H)`: output and natural-log LSE of `BM` queries."""
    PIECES: tl.constexpr = BQ // BM
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    plan = tl.load(head_plan + i_h * stride_plan)
    i_row = tl.load(order + plan * nq + tl.program_id(0) // PIECES)
    o_q = i_row * BQ + (tl.program_id(0) % PIECES) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    query += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    key += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    value += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    count = key_count + i_b * stride_count
    query_table += plan.to(tl.int64) * Sq * 6
    key_table += plan.to(tl.int64) * Skv * 3
    line = plan * (nq + 1) + i_row

    b_q = _load(query, o_q, stride_q, Sq, o_d, D, BD, False)
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    first, last = tl.load(full_start + line), tl.load(full_start + line + 1)
    acc, total, top = _walk_forward(
        acc, total, top, b_q, o_q, i_row, first, last, full_index, slots, key, value, stride_k,
        stride_v, count, query_table, key_table, bits, Sq, Skv, scale2, False, RULE, D, BD, BQ, BK,
        BN, UPCAST, PRECISION,
    )  # fmt: skip
    first, last = tl.load(partial_start + line), tl.load(partial_start + line + 1)
    acc, total, top = _walk_forward(
        acc, total, top, b_q, o_q, i_row, first, last, partial_index, slots, key, value, stride_k,
        stride_v, count, query_table, key_table, bits, Sq, Skv, scale2, True, RULE, D, BD, BQ, BK,
        BN, UPCAST, PRECISION,
    )  # fmt: skip

    is_empty = total == 0.0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    b_lse = (top + tl.log2(tl.where(is_empty, 1.0, total))) * 0.6931471805599453
    b_lse = tl.where(is_empty, -float("inf"), b_lse)
    out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    at = out + o_q[:, None].to(tl.int64) * stride_o + o_d[None, :]
    inside = (o_q[:, None] < Sq) & (o_d[None, :] < D)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + tl.program_id(1).to(tl.int64) * Sq + o_q, b_lse, mask=o_q < Sq)


@triton.jit
def _walk_query_gradient(
    acc, b_q, b_do, b_lse2, b_delta, o_q, i_row, first, last, index, slots, key, value, stride_k,
    stride_v, count, query_table, key_table, bits, Sq, Skv, scale2, MASKED: tl.constexpr,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of `dS K` over some listed blocks of one row."""
    STEPS: tl.constexpr = BK // BN
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    i_column = tl.load(index + first, mask=first < last, other=0)
    for i in range(0, (last - first) * STEPS):
        o_k = i_column * BK + (i % STEPS) * BN + o_n
        b_k = _load(key, o_k, stride_k, Skv, o_d, D, BD, not MASKED)
        b_v = _load(value, o_k, stride_v, Skv, o_d, D, BD, not MASKED)
        b_s = _dot(b_q, tl.trans(b_k), UPCAST, PRECISION) * scale2  # (BM, BN)
        b_p = tl.exp2(b_s - b_lse2[:, None])
        if MASKED:
            slot = tl.load(slots + first + i // STEPS)
            real = tl.load(count + i_column)
            seen = _seen(
                o_q[:, None], o_k[None, :], i_row, i_column, slot, real, query_table, key_table,
                bits, Sq, Skv, RULE, BQ, BK,
            )  # fmt: skip
            b_p = tl.where(seen, b_p, 0.0)
        b_dp = _dot(b_do, tl.trans(b_v), UPCAST, PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc += _dot(b_ds.to(b_k.dtype), b_k, UPCAST, PRECISION)
        following = first + (i + 1) // STEPS
        i_column = tl.load(index + following, mask=following < last, other=0)
    return acc


@triton.jit
def query_gradient_kernel(
    query, key, value, grad_out, grad_query, lse2, delta, full_start, full_index, partial_start,
    partial_index, slots, order, key_count, head_plan, query_table, key_table, bits,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_count, stride_plan, H, Sq, Skv, nq, scale, scale2,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(nq * BQ / BM, B * H)`: gradient of `BM` queries, `[B, H, Sq, D]` without gaps."""
    PIECES: tl.constexpr = BQ // BM
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    plan = tl.load(head_plan + i_h * stride_plan)
    i_row = tl.load(order + plan * nq + tl.program_id(0) // PIECES)
    o_q = i_row * BQ + (tl.program_id(0) % PIECES) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    query += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    key += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    value += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    grad_out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    count = key_count + i_b * stride_count
    query_table += plan.to(tl.int64) * Sq * 6
    key_table += plan.to(tl.int64) * Skv * 3
    line = plan * (nq + 1) + i_row
    start = tl.program_id(1).to(tl.int64) * Sq

    b_q = _load(query, o_q, stride_q, Sq, o_d, D, BD, False)
    b_do = _load(grad_out, o_q, stride_o, Sq, o_d, D, BD, False)
    b_lse2 = tl.load(lse2 + start + o_q, mask=o_q < Sq, other=float("inf"))
    b_delta = tl.load(delta + start + o_q, mask=o_q < Sq, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    first, last = tl.load(full_start + line), tl.load(full_start + line + 1)
    acc = _walk_query_gradient(
        acc, b_q, b_do, b_lse2, b_delta, o_q, i_row, first, last, full_index, slots, key, value,
        stride_k, stride_v, count, query_table, key_table, bits, Sq, Skv, scale2, False, RULE, D,
        BD, BQ, BK, BN, UPCAST, PRECISION,
    )  # fmt: skip
    first, last = tl.load(partial_start + line), tl.load(partial_start + line + 1)
    acc = _walk_query_gradient(
        acc, b_q, b_do, b_lse2, b_delta, o_q, i_row, first, last, partial_index, slots, key, value,
        stride_k, stride_v, count, query_table, key_table, bits, Sq, Skv, scale2, True, RULE, D,
        BD, BQ, BK, BN, UPCAST, PRECISION,
    )  # fmt: skip
    at = grad_query + (start + o_q[:, None]) * D + o_d[None, :]
    inside = (o_q[:, None] < Sq) & (o_d[None, :] < D)
    tl.store(at, (acc * scale).to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _walk_key_gradient(
    acc_k, acc_v, b_k, b_v, o_k, i_column, first, last, index, slots, query, grad_out, lse2, delta,
    stride_q, stride_o, real, query_table, key_table, bits, Sq, Skv, scale2, MASKED: tl.constexpr,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of `dS^T Q` and `P^T dO` over some listed blocks of one column."""
    STEPS: tl.constexpr = BQ // BM
    o_d, o_m = tl.arange(0, BD), tl.arange(0, BM)
    i_row = tl.load(index + first, mask=first < last, other=0)
    for i in range(0, (last - first) * STEPS):
        o_q = i_row * BQ + (i % STEPS) * BM + o_m
        b_q = _load(query, o_q, stride_q, Sq, o_d, D, BD, False)
        b_do = _load(grad_out, o_q, stride_o, Sq, o_d, D, BD, False)
        b_lse2 = tl.load(lse2 + o_q, mask=o_q < Sq, other=float("inf"))
        b_delta = tl.load(delta + o_q, mask=o_q < Sq, other=0.0)
        b_s = _dot(b_k, tl.trans(b_q), UPCAST, PRECISION) * scale2  # (BN, BM)
        b_p = tl.exp2(b_s - b_lse2[None, :])
        if MASKED:
            slot = tl.load(slots + first + i // STEPS)
            seen = _seen(
                o_q[None, :], o_k[:, None], i_row, i_column, slot, real, query_table, key_table,
                bits, Sq, Skv, RULE, BQ, BK,
            )  # fmt: skip
            b_p = tl.where(seen, b_p, 0.0)
        acc_v += _dot(b_p.to(b_do.dtype), b_do, UPCAST, PRECISION)
        b_dp = _dot(b_v, tl.trans(b_do), UPCAST, PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        acc_k += _dot(b_ds.to(b_q.dtype), b_q, UPCAST, PRECISION)
        following = first + (i + 1) // STEPS
        i_row = tl.load(index + following, mask=following < last, other=0)
    return acc_k, acc_v


@triton.jit
def key_gradient_kernel(
    query, key, value, grad_out, grad_key, grad_value, lse2, delta, full_start, full_index,
    partial_start, partial_index, slots, order, key_count, head_plan, query_table, key_table, bits,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_count, stride_plan, H, Sq, Skv, nk, scale, scale2,
    RULE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(nk * BK / BN, B * H)`: gradients of `BN` keys and values, without gaps."""
    PIECES: tl.constexpr = BK // BN
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    plan = tl.load(head_plan + i_h * stride_plan)
    i_column = tl.load(order + plan * nk + tl.program_id(0) // PIECES)
    o_k = i_column * BK + (tl.program_id(0) % PIECES) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    query += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    key += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    value += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    grad_out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    lse2 += tl.program_id(1).to(tl.int64) * Sq
    delta += tl.program_id(1).to(tl.int64) * Sq
    real = tl.load(key_count + i_b * stride_count + i_column)
    query_table += plan.to(tl.int64) * Sq * 6
    key_table += plan.to(tl.int64) * Skv * 3
    line = plan * (nk + 1) + i_column

    b_k = _load(key, o_k, stride_k, Skv, o_d, D, BD, False)
    b_v = _load(value, o_k, stride_v, Skv, o_d, D, BD, False)
    acc_k, acc_v = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    first, last = tl.load(full_start + line), tl.load(full_start + line + 1)
    acc_k, acc_v = _walk_key_gradient(
        acc_k, acc_v, b_k, b_v, o_k, i_column, first, last, full_index, slots, query, grad_out,
        lse2, delta, stride_q, stride_o, real, query_table, key_table, bits, Sq, Skv, scale2, False,
        RULE, D, BD, BQ, BK, BM, UPCAST, PRECISION,
    )  # fmt: skip
    first, last = tl.load(partial_start + line), tl.load(partial_start + line + 1)
    acc_k, acc_v = _walk_key_gradient(
        acc_k, acc_v, b_k, b_v, o_k, i_column, first, last, partial_index, slots, query, grad_out,
        lse2, delta, stride_q, stride_o, real, query_table, key_table, bits, Sq, Skv, scale2, True,
        RULE, D, BD, BQ, BK, BM, UPCAST, PRECISION,
    )  # fmt: skip
    start = tl.program_id(1).to(tl.int64) * Skv
    at = (start + o_k[:, None]) * D + o_d[None, :]
    inside = (o_k[:, None] < Skv) & (o_d[None, :] < D)
    tl.store(grad_key + at, (acc_k * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + at, acc_v.to(grad_value.dtype.element_ty), mask=inside)
