"""Attention over chosen blocks of the score matrix: one plan, several back-ends, one result."""

from dittune.kernels.block_sparse.api import block_sparse_attention
from dittune.kernels.block_sparse.merge import merge_attention
from dittune.kernels.block_sparse.reference import block_sparse_reference

__all__ = ["block_sparse_attention", "block_sparse_reference", "merge_attention"]
