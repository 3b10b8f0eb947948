"""What `dittune methods` and `dittune models` print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

import dittune
from dittune.errors import UnsupportedModelError
from dittune.models import DENOISER_NAMES, facts_for, load_facts

Emit = Callable[[Any], None] | None


def _print(columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def list_methods(emit: Emit) -> None:
    """Every method with its settings and their defaults."""
    found = []
    for name in dittune.available_methods():
        cls = dittune.load_method(name)
        settings = {f.name: f.default for f in dataclasses.fields(cls)}
        found.append({"name": name, "about": cls.__doc__.splitlines()[0], "settings": settings})
    if emit:
        emit(found)
        return
    for method in found:
        settings = " ".join(f"{key}={value!r}" for key, value in method["settings"].items())
        _print([method["name"], method["about"]], [["", settings]])


def list_models(emit: Emit) -> None:
    """Bundled checkpoints, and the denoiser classes each family serves."""
    families = {name: list(load_facts(name).MODEL_CLASSES) for name in dittune.available_models()}
    checkpoints = dittune.available_checkpoints()
    if emit:
        emit({"checkpoints": checkpoints, "families": families})
        return
    _print(["bundled checkpoint"], [[name] for name in checkpoints])
    _print(["family", "denoisers"], [[name, ", ".join(v)] for name, v in families.items()])


def list_sites(model: str, emit: Emit) -> None:
    """The attention sites of one model in execution order."""
    from dittune.pipelines.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model).pipe
    denoisers = [getattr(pipe, name, None) for name in DENOISER_NAMES]
    sites = [s for d in denoisers if d is not None for s in facts_for(d).sites(d)]
    if not sites:
        raise UnsupportedModelError(f"{model} has no attention dittune knows")
    if emit:
        emit([dataclasses.asdict(site) for site in sites])
        return
    _print(
        ["layer", "kind", "heads", "stage", "module"],
        [[s.layer, s.kind, s.heads, s.stage, s.name] for s in sites],
    )
