"""Which methods can act in one generation, and in which order they are listed.

The first method is the outermost: it sees a call of attention as the model makes it, the next ones
what it proceeds with. Methods that share no site do not meet there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from dittune.call import Site
from dittune.errors import SelectionError
from dittune.method import Method


def check_together(methods: Sequence[Method], sites: Sequence[Sequence[Site]]) -> None:
    """Refuse methods that would fail beside each other, or silently do nothing.

    Args:
        methods: that act, in their order.
        sites: those of each method.

    Raises:
        SelectionError: two cannot be together, or one must be listed before the other.
    """
    for (first, here), (second, there) in combinations(zip(methods, sites, strict=True), 2):
        if why := _other_picture(first, second) or _other_picture(second, first):
            raise SelectionError(f"{first.name} and {second.name} cannot act together: {why}")
        both = [site for site in here if site in there]
        if not both:
            continue
        if _has_own_core(first) and _has_own_core(second):
            raise SelectionError(
                f"{first.name} and {second.name} both replace the attention of {both[0]}; "
                "give them different sites, or use one"
            )
        if why := _apart(first, second) or _apart(second, first):
            raise SelectionError(f"{first.name} and {second.name} cannot act together: {why}")
        if why := _other_order(first, second):
            raise SelectionError(f"list {second.name} before {first.name}: {why}")


def _has_own_core(method: Method) -> bool:
    return method.replaces_attention or method.weighs_words


def _other_picture(one: Method, other: Method) -> str:
    """Why a method that makes pictures of its own cannot be beside another, at whatever sites."""
    if one.makes_pictures and (other.chooses_keys or other.changes_latents):
        return f"{one.name} makes another picture first, of which {other.name} does not know"
    return ""


def _apart(one: Method, other: Method) -> str:
    """Why two methods cannot be in use together, "" if they can or if the other way round says."""
    if one.weighs_words and other.chooses_keys:
        return f"{one.name} needs all words of all pictures, {other.name} leaves some out"
    if one.chooses_keys and (other.chooses_keys or other.replaces_attention):
        return "each chooses the keys that a token sees; give them different sites, or use one"
    return ""


def _other_order(first: Method, second: Method) -> str:
    """Why the second method must be listed before the first."""
    if first.merges_text and second.weighs_words:
        return f"what follows {first.name} does not see all words"
    if second.merges_text and not first.weighs_words and type(first).attend is not Method.attend:
        return f"{first.name} must see the text as it will be"
    if first.chooses_keys:
        return f"what follows {first.name} sees chosen keys of single pictures only"
    return ""
