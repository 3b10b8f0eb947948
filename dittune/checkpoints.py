"""The bundled checkpoints: ordinary diffusers folders inside the package."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from dittune.errors import CheckpointError


def _folder() -> Path:
    spec = importlib.util.find_spec("dittune.samples")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("the package dittune.samples is missing; install dittune again")
    return Path(next(iter(spec.submodule_search_locations))) / "checkpoints"


def available_checkpoints() -> list[str]:
    """Names of the bundled checkpoints."""
    return sorted(path.parent.name for path in _folder().glob("*/model_index.json"))


def checkpoint(name: str) -> str:
    """Folder of a bundled checkpoint, to be given to `from_pretrained`.

    Raises:
        CheckpointError: there is none of that name.
    """
    names = available_checkpoints()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled: {', '.join(names) or 'none'}"
        raise CheckpointError(f"no bundled checkpoint {name!r}; {hint}")
    return str(_folder() / name)
