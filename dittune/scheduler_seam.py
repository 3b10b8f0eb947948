"""The seam of the scheduler: a step may start from other latents than the pipeline's own.

A pipeline keeps its latents in a local variable: it hands the denoiser a (scaled, doubled) copy and
the scheduler the variable itself, in `scheduler.step(prediction, t, latents)`, whose result becomes
the variable. So the one place where other latents reach any pipeline at any step, the first one
included, is that call. For the length of a generation the class of the scheduler instance is
swapped: `scale_model_input` comes to us, which tells the unscaled latents and how they are scaled,
and `step`, which takes `run.latents` if a method has set them. The scheduler keeps its state, its
`__dict__` gets no key, and its class is restored by identity.

The ways not taken: `callback_on_step_end` comes too late for the first step; writing into the
sample in place reaches FLUX only, others hand over a copy; wrapping `prepare_latents` has neither
the timestep nor the text.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dittune.class_swap import calling_subclass, owner_of, set_class
from dittune.errors import AlreadyAttachedError, SeamError, UnsupportedModelError
from dittune.run import Run, as_it_is


@contextmanager
def stepping_from(
    run: Run, scheduler: Any, end_step: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[None]:
    """Let the steps of a scheduler start from `run.latents` where a method has set them.

    Args:
        run: the generation.
        scheduler: of its pipeline, None if that has none.
        end_step: gets the latents after each step, gives those to go on with; for pipelines that
            have no `callback_on_step_end`.

    Raises:
        AlreadyAttachedError: another generation is using the scheduler.
        UnsupportedModelError: there is none.
        SeamError: when a step gets latents of another shape.
    """
    if scheduler is None:
        raise UnsupportedModelError(
            "the pipeline has no scheduler, by which dittune would know of its steps"
        )
    if owner_of(scheduler) is not None:
        raise AlreadyAttachedError(
            f"this {type(scheduler).__name__} steps another generation; give each pipeline its own"
        )
    stock = type(scheduler)
    signature = inspect.signature(stock.step)

    def step(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        if run.latents is not None:
            if run.latents.shape != given["sample"].shape:
                raise SeamError(
                    f"the pipeline steps latents {tuple(given['sample'].shape)}, a method has set "
                    f"{tuple(run.latents.shape)}; this pipeline is not supported"
                )
            if getattr(self, "last_sample", None) is not None:
                self.last_sample = None  # UniPC would correct our latents back to its own
            given["sample"] = run.latents.to(given["sample"].dtype)
        run.latents = run.unscaled = None
        run.scale = as_it_is
        more = given.pop("kwargs", {})
        out = stock.step(**given, **more)
        if end_step is None:
            return out
        if isinstance(out, tuple):
            return (end_step(out[0]), *out[1:])
        out.prev_sample = end_step(out.prev_sample)
        return out

    def scale_model_input(self, sample, *args, **kwargs):
        scale = functools.partial(_scaled, stock.scale_model_input, self, args, kwargs)
        run.unscaled, run.scale = sample, scale
        return scale(sample)

    ours = {"step": step}
    if hasattr(stock, "scale_model_input"):
        ours["scale_model_input"] = scale_model_input
    set_class(scheduler, calling_subclass(run, stock, **ours))
    try:
        yield
    finally:
        set_class(scheduler, stock)


def takes_latents(scheduler: Any) -> bool:
    """Whether the coming step starts from the latents it is given.

    The later stages of a step of higher order start again from what they kept of its first one.
    """
    if hasattr(scheduler, "prk_timesteps"):  # PNDM
        if scheduler.counter < len(scheduler.prk_timesteps) and not scheduler.config.skip_prk_steps:
            return scheduler.counter % 4 == 0
        return not (scheduler.counter == 1 and len(scheduler.ets) == 1)
    if hasattr(scheduler, "order_list"):  # DPM-Solver, single-step
        return scheduler.order_list[scheduler.step_index or 0] == 1
    return getattr(scheduler, "state_in_first_order", True)


def starting_at(scheduler: Any, first: int) -> Any:
    """A copy of a scheduler that has not stepped yet, to be stepped from `timesteps[first]` on."""
    found = copy.deepcopy(scheduler)
    if hasattr(found, "set_begin_index"):
        found.set_begin_index(first)
        found._step_index = None  # which the scaling of a sample may have set
    return found


def step_options(run: Run, scheduler: Any) -> dict[str, Any]:
    """What the pipeline gives the steps of its scheduler; its generators are copied, not used."""
    takes = inspect.signature(scheduler.step).parameters
    options = {
        k: run.arguments[k] for k in ("eta", "generator") if k in takes & run.arguments.keys()
    }
    given = options.get("generator")
    if given is not None:
        many = isinstance(given, list)
        options["generator"] = [g.clone_state() for g in given] if many else given.clone_state()
    return options


def _scaled(stock, scheduler, args, kwargs, sample):
    return stock(scheduler, sample, *args, **kwargs)
