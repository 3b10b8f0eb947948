"""The Triton kernel: the queries that chose one chunk attend to it, on top of what they have.

A launch is one chunk, in which no query is twice, so nothing is written by two programs, no sum
depends on the order of programs, and no partial result is stored but the running one. Logits are
in base 2.
"""

import triton
import triton.language as tl

from dittune.kernels.block_sparse.triton_kernels import _dot, _load


@triton.jit(do_not_specialize=["i_c"])
def chunk_kernel(
    query, key, value, running_out, running_lse2, rows, many, start, count,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_count, i_c, H, Sq, scale2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(ceil(Sq / BM), B * H)`; `rows` `[B * H, Sq]` begins with the `many` `[B * H]` queries.

    `running_out` `[B, H, Sq, D]` and `running_lse2` `[B, H, Sq]`, contiguous float32, are what was
    found so far.
    """
    i_bh = tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    length = tl.load(many + i_bh)
    first = tl.load(start + i_c)
    real = tl.load(count + i_b * stride_count + i_c)
    if (tl.program_id(0) * BM >= length) | (real == 0):
        return
    is_mine = o_m < length
    o_q = tl.load(rows + i_bh.to(tl.int64) * Sq + o_m, mask=is_mine, other=Sq)  # Sq: no query
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    query += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    key += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    value += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    at_out = running_out + i_bh.to(tl.int64) * Sq * D
    at_lse = running_lse2 + i_bh.to(tl.int64) * Sq + o_q

    b_q = _load(query, o_q, stride_q, Sq, o_d, D, BD, False)
    acc = _load(at_out, o_q, D, Sq, o_d, D, BD, False)
    top = tl.load(at_lse, mask=is_mine, other=-float("inf"))
    total = tl.where(top == -float("inf"), 0.0, 1.0)
    last = first + real
    for i in range(0, (real + BN - 1) // BN):
        o_k = first + i * BN + o_n
        b_k = _load(key, o_k, stride_k, last, o_d, D, BD, False)
        b_s = _dot(b_q, tl.trans(b_k), UPCAST, PRECISION) * scale2  # (BM, BN)
        b_s = tl.where(o_k[None, :] < last, b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))  # finite: at least one key is real
        b_p = tl.exp2(b_s - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(b_p, 1)
        b_v = _load(value, o_k, stride_v, last, o_d, D, BD, False)
        acc = acc * kept[:, None] + _dot(b_p.to(b_v.dtype), b_v, UPCAST, PRECISION)
        top = new_top
    at = at_out + o_q[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(at, acc / total[:, None], mask=is_mine[:, None] & (o_d[None, :] < D))
    tl.store(at_lse, top + tl.log2(total), mask=is_mine)
