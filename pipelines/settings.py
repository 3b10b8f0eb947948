"""The settings of a method as its dataclass and docstring tell them: for the site and the page."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One field of a method.

    Attributes:
        type: as it is annotated, such as `int | None`.
        help: its words in the docstring.
        choices: the values it can have; none if it is free.
        is_path: whether it names a file, which a page must not let its visitors do.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    is_path: bool = False


def settings_of(cls: type) -> list[Setting]:
    """The settings of a method, its own first, `start` and `stop` last.

    Raises:
        LookupError: a field that no docstring of the class or of its bases describes.
    """
    about: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            about |= described(base)
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name in ("start", "stop"))
    for field in fields:
        if field.name not in about:
            raise LookupError(f"{cls.__name__} does not describe {field.name} in its docstring")
    return [Setting(f.name, f.type, f.default, about[f.name], **f.metadata) for f in fields]


def described(cls: type) -> dict[str, str]:
    """The section `Args:` of a class's own Google docstring, by name."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    if not section:
        return {}
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:     .*\n?)*)", section[1], re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}
