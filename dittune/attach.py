"""`attach(pipe, *methods)`: the only install and uninstall.

Three things are swapped and restored by identity: the processor object of each attention site that
a method wants, the class of the denoiser (so that its calls come to us first), and the class of the
pipeline (so that a generation has a beginning and an end). No `__dict__` gets a new key.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from dittune.class_swap import calling_subclass, owner_of, set_class
from dittune.denoiser import AttachedModel
from dittune.errors import (
    AlreadyAttachedError,
    ConfigError,
    SeamError,
    SelectionError,
    UnsupportedModelError,
)
from dittune.method import Method
from dittune.models import DENOISER_NAMES, available_models
from dittune.run import Run
from dittune.scheduler_seam import stepping_from
from dittune.step_end import with_step_end

PROMPTS = ("prompt", "prompt_2", "prompt_3")  # arguments of a pipeline


def attach(target: Any, *methods: Method) -> Attachment:
    """Let methods control the attention of a diffusers pipeline (or of one denoiser).

    Use it as a context manager, or keep the handle and call `detach()`.

    Args:
        target: a diffusers pipeline, or a bare denoiser for a loop of your own, whose every call is
            then a generation of one step.
        methods: applied in this order, the first one outermost.

    Returns:
        The handle. `handle.report()` tells what each method said of the last generation.

    Raises:
        UnsupportedModelError: no denoiser that dittune knows.
        ConfigError: a method that begins later than at the first step, for a bare denoiser.
        AlreadyAttachedError: `target` already has an owner.
        SelectionError: a method names a layer or head that does not exist.
        TypeError: something in `methods` is no method.
    """
    return Attachment(target, methods)


class Attachment:
    """One owner of one pipeline; made by `attach`."""

    def __init__(self, target: Any, methods: tuple[Method, ...]):
        for method in methods:
            if not isinstance(method, Method):
                raise TypeError(f"expected methods such as dittune.SoftPAG(...), got {method!r}")
        if len({id(method) for method in methods}) < len(methods):
            raise SelectionError("the same method object is given twice; make a second one")
        if owner_of(target) is not None:
            raise AlreadyAttachedError(
                f"{type(target).__name__} is attached already; detach its handle first"
            )
        self.pipe = None if isinstance(target, nn.Module) else target
        self.run: Run | None = None
        self.last_run: Run | None = None  # of a bare denoiser only
        self._methods = methods
        self._acting = tuple(m for m in methods if not m.is_neutral)
        self._reports = self._reports_of(None)
        self._undo: list[Callable[[], None]] = []
        if self.pipe is None:
            _check_one_step(self._acting)
        # All that can fail comes before anything is changed.
        self._models = [AttachedModel(model, self._acting, self) for model in _denoisers(target)]
        swaps = [swap for model in self._models for swap in model.swaps()]
        if self.pipe is not None:
            stock = type(target)
            swaps.append((set_class, target, stock, _calling_class(self, stock)))
        try:
            for write, place, old, new in swaps:
                self._undo.append(functools.partial(write, place, old))
                write(place, new)
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore everything. Every step is tried even if one fails; a second call retries that."""
        failed = []
        for undo in reversed(self._undo):
            try:
                undo()
            except Exception as error:
                failed.append((undo, error))
        self._undo = [undo for undo, _ in reversed(failed)]
        if failed:
            raise failed[0][1]

    def report(self) -> dict[str, Any]:
        """What each method reports of the last generation, by method name; `{}` if it failed."""
        return self._reports_of(self.last_run) if self.last_run else dict(self._reports)

    def _reports_of(self, run: Run | None) -> dict[str, Any]:
        reports: dict[str, Any] = {}
        for method in self._methods:
            key, i = method.name, 2
            while key in reports:
                key, i = f"{method.name}-{i}", i + 1
            reports[key] = method.report(run) if run else {}
        return reports

    # ------------------------------------------------------------------ one generation

    def call_pipeline(self, pipe: Any, stock_call: Callable, args: tuple, kwargs: dict) -> Any:
        if self.run is not None:
            raise SeamError("a pipeline runs one generation at a time; wait, or load a second one")
        run = self.run = Run()
        self._reports = self._reports_of(None)
        try:
            self._check_installed()
            run.arguments = _arguments(stock_call, pipe, args, kwargs)
            run.prompts = _prompts(run.arguments)
            tells = "callback_on_step_end" in inspect.signature(stock_call).parameters
            if tells:
                kwargs = with_step_end(kwargs, run, self._end_step)
            with ExitStack() as stack:
                if not tells or any(method.changes_latents for method in self._acting):
                    ends = None if tells else self._end_step
                    stack.enter_context(stepping_from(run, getattr(pipe, "scheduler", None), ends))
                out = stock_call(pipe, *args, **kwargs)
            if run.num_steps and not run.step:
                raise UnsupportedModelError(
                    f"{type(pipe).__name__} ends no step that dittune hears of: it has no "
                    "callback_on_step_end, and does not step its scheduler"
                )
            self._reports = self._reports_of(run)
            return out
        finally:
            for model in self._models:
                model.forget_run()
            self.run = None

    def _check_installed(self) -> None:
        now = _denoisers(self.pipe)
        if [id(model) for model in now] != [id(model.model) for model in self._models]:
            raise SeamError(
                "the denoiser of the pipeline was replaced after attaching, by "
                f"{', '.join(type(model).__name__ for model in now)}; attach after that"
            )
        for model in self._models:
            model.check_installed()

    def _end_step(self, latents: torch.Tensor) -> torch.Tensor:
        """What the next step starts from."""
        run = self.run
        assert run is not None
        if run.pictures and len(latents) != run.pictures:
            roles = " and for ".join(next(iter(run.roles_at.values())))
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} makes {len(latents)} pictures, but gives its denoiser "
                f"{run.pictures} for {roles}: it has rows that dittune does not know; use the "
                "plain pipeline, or try guidance_scale=1"
            )
        for method in self._acting:
            if method.acts_at(run.step, run.num_steps):
                latents = method.on_step(run, latents)
        run.step, run.calls = run.step + 1, 0
        return latents

    def call_model(self, model: nn.Module, stock_call: Callable, args: tuple, kwargs: dict) -> Any:
        seam = next(m for m in self._models if m.model is model)
        if self.run is not None:
            return seam.call(self.run, self.pipe, stock_call, args, kwargs)
        if self.pipe is not None:
            raise SeamError(
                f"{type(model).__name__} was called outside the pipeline it is attached through; "
                "detach before another pipeline uses it, or attach to the denoiser itself"
            )
        run = self.last_run = Run(num_steps=1)
        seam.forget_run()  # not after the call: gradient checkpointing runs the sites again later
        seam.check_installed()
        return seam.call(run, None, stock_call, args, kwargs)


def _check_one_step(methods: tuple[Method, ...]) -> None:
    for method in methods:
        if not method.acts_at(0, 1):
            raise ConfigError(
                f"{method.name}: with start={method.start} it never acts: each call of a denoiser "
                "without its pipeline is a generation of one step; set start=0"
            )


def _arguments(stock_call: Callable, pipe: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call of the pipeline, by name."""
    try:
        return inspect.signature(stock_call).bind_partial(pipe, *args, **kwargs).arguments
    except TypeError:  # the pipeline will say so itself
        return {}


def _prompts(given: dict[str, Any]) -> dict[str, list[str]]:
    """The prompt of each picture, by pipeline argument; one that is not given is the first one."""
    if given.get("prompt") is None:
        return {}
    found = {}
    for name in PROMPTS:
        texts = given.get(name) or given["prompt"]
        texts = [texts] if isinstance(texts, str) else texts
        found[name] = [t for t in texts for _ in range(given.get("num_images_per_prompt") or 1)]
    return found


def _denoisers(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [target]
    parts = [getattr(target, name, None) for name in DENOISER_NAMES]
    found = [model for model in parts if isinstance(model, nn.Module)]
    if not found:
        raise UnsupportedModelError(
            f"expected a diffusers pipeline or denoiser, got {type(target).__name__}, which has no "
            f"{' or '.join(DENOISER_NAMES)}; model families: {', '.join(available_models())}"
        )
    return found


def _calling_class(owner: Attachment, stock: type) -> type:
    def call(self, *args, **kwargs):
        return owner.call_pipeline(self, stock.__call__, args, kwargs)

    return calling_subclass(owner, stock, __call__=call)
