"""Attention in which each row sees its own key and a few columns that all rows see."""

from dittune.kernels.diagonal_columns.api import diagonal_columns_attention
from dittune.kernels.diagonal_columns.reference import diagonal_columns_reference

__all__ = ["diagonal_columns_attention", "diagonal_columns_reference"]
