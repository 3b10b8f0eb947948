"""Model families: one file of facts each, found by the class name of the denoiser."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from torch import nn

from dittune.errors import UnsupportedModelError

DENOISER_NAMES = ("transformer", "transformer_2", "unet")  # attributes of a pipeline


def available_models() -> list[str]:
    """Names of the model families dittune knows."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def load_facts(family: str) -> ModuleType:
    """The facts of one family; see `sd3.py` for what a file of facts states."""
    return importlib.import_module(f"{__name__}.{family}")


def facts_for(model: nn.Module) -> ModuleType:
    """The facts about a denoiser.

    Raises:
        UnsupportedModelError: no file of facts serves its class.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    names = {cls.__name__ for cls in type(inner).__mro__}
    known = []
    for family in available_models():
        facts = load_facts(family)
        if names & set(facts.MODEL_CLASSES):
            return facts
        known += facts.MODEL_CLASSES
    raise UnsupportedModelError(
        f"{type(inner).__name__} is not a model dittune knows; it knows {', '.join(known)} "
        "(see `dittune models`)"
    )
