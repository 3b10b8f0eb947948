"""Swap the class of one instance so that its calls come to us; the instance keeps its state.

An instance's `__dict__` is not touched, and whatever else wraps `forward` (offloading, caches,
compilation) stays inside our call, in whichever order it was set up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable


def calling_subclass(owner: object, stock: type, **calls: Callable) -> type:
    """A class that is `stock` in name and nature, except that some methods of it are ours."""

    def reduce(self, protocol):
        """A copy or pickle is not attached: it is of the stock class."""
        _, _, *state = stock.__reduce_ex__(self, protocol)
        return (stock.__new__, (stock,), *state)

    for name, call in calls.items():
        functools.update_wrapper(call, getattr(stock, name))
    namespace = {
        **calls,
        "__reduce_ex__": reduce,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_dittune_owner": owner,
    }
    generated = type(stock.__name__, (stock,), namespace)
    return generated


def owner_of(instance: object) -> object | None:
    """Who has swapped the class of an instance, if anyone."""
    return getattr(type(instance), "_dittune_owner", None)


def set_class(instance: object, cls: type) -> None:
    object.__setattr__(instance, "__class__", cls)
