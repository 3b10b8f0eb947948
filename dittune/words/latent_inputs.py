"""The latents in the inputs of a denoiser call: read, replaced, differentiated by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dittune.run import ModelInputs


def latents_of(inputs: ModelInputs) -> torch.Tensor:
    """The pipeline's latents at this step, before the scheduler's scaling, one row a picture."""
    run = inputs.run
    rows = inputs.rows("cond", len(inputs.kwargs[inputs.batched[0]]))
    if run.latents is not None:
        return run.latents
    if run.unscaled is not None:  # one copy for each role of the pipeline's own
        return run.unscaled[: rows.stop - rows.start]
    return run.host.facts.latents(run.host.model, inputs.kwargs)[rows]


def with_latents(inputs: ModelInputs, latents: torch.Tensor) -> ModelInputs:
    """The call with other latents in the rows of every role; gradients flow to them.

    Args:
        latents: `[B, ...]`, one row a picture, before the scheduler's scaling.
    """
    host, name = inputs.run.host, inputs.batched[0]
    kwargs: dict[str, Any] = {**inputs.kwargs, name: inputs.kwargs[name].clone()}
    scaled = inputs.run.scale(latents)
    part = host.facts.latents(host.model, kwargs)
    part.copy_(scaled.repeat(len(inputs.roles), *[1] * (scaled.ndim - 1)))
    return ModelInputs(kwargs, inputs.roles, inputs.batched, inputs.run)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep no activations for gradients of the parameters."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Switch the model's gradient checkpointing on, and leave no trace of it."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(m, {n: m.__dict__[n] for n in names if n in m.__dict__}) for m in model.modules()]
    try:
        model.enable_gradient_checkpointing()
        yield
    finally:
        for module, values in before:
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)
