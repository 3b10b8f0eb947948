"""Attention in which each query has chosen the chunks of keys it attends to."""

from dittune.kernels.routed_attention.api import routed_attention
from dittune.kernels.routed_attention.reference import routed_reference

__all__ = ["routed_attention", "routed_reference"]
