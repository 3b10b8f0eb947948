"""The end of a step, told by a pipeline's `callback_on_step_end`; the user's own still runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dittune.errors import SeamError, UnsupportedModelError
from dittune.run import Run


def with_step_end(
    kwargs: dict[str, Any], run: Run, end_step: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """The arguments of a pipeline with a callback that ends our steps, then calls the user's.

    Args:
        kwargs: of the pipeline.
        run: the generation.
        end_step: gets the latents after each step, gives those to go on with.
    """
    users = kwargs.get("callback_on_step_end")
    wanted = list(kwargs.get("callback_on_step_end_tensor_inputs", ["latents"]))
    if users is not None and hasattr(users, "tensor_inputs"):
        wanted = list(users.tensor_inputs)  # diffusers' PipelineCallback brings its own list

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if run.latents is not None:
            raise SeamError(
                f"{type(pipe.scheduler).__name__}.step was not asked to step latents that a "
                "method has changed; is it wrapped, or another scheduler used?"
            )
        given = tensors["latents"]
        if not isinstance(given, torch.Tensor):
            raise UnsupportedModelError(
                f"{type(pipe).__name__} tells its callback no latents, got {type(given).__name__}"
            )
        latents = end_step(given)
        run.step = step + 1
        changed = {} if latents is given else {"latents": latents}
        if users is None:
            return changed
        shown = {k: v for k, v in tensors.items() if k in wanted}
        if "latents" in shown:
            shown["latents"] = latents
        return {**changed, **(users(pipe, step, timestep, shown) or {})}

    inputs = [*wanted, *(["latents"] if "latents" not in wanted else [])]
    return {
        **kwargs,
        "callback_on_step_end": step_end,
        "callback_on_step_end_tensor_inputs": inputs,
    }
