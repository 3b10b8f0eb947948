"""Methods: one file per paper, found by its name, imported on demand."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from dittune.errors import ConfigError
from dittune.method import Method


def available_methods() -> list[str]:
    """Names of all methods."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def load_method(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        ConfigError: there is no such method; the message names the nearest one.
    """
    if name not in available_methods():
        near = difflib.get_close_matches(name, available_methods(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(available_methods())}"
        raise ConfigError(f"unknown method {name!r}; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(f"{module.__name__} must define exactly one method, has {len(classes)}")
    return classes[0]
