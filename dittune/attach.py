"""`attach(pipe, *methods)`: the only install and uninstall.

Three things are swapped and restored by identity: the processor object of each attention site that
a method wants, the class of the denoiser (so that its calls come to us first), and the class of the
pipeline (so that a generation has a beginning and an end). No `__dict__` gets a new key.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dittune.call import Site
from dittune.errors import AlreadyAttachedError, SeamError, SelectionError, UnsupportedModelError
from dittune.method import Method
from dittune.models import DENOISER_NAMES, available_models, facts_for
from dittune.run import ModelInputs, Run
from dittune.seam import InstalledSite, Link, make_processor, stock_attention


def attach(target: Any, *methods: Method) -> Attachment:
    """Let methods control the attention of a diffusers pipeline (or of one denoiser).

    Use it as a context manager, or keep the handle and call `detach()`.

    Args:
        target: a diffusers pipeline, or a bare denoiser for a loop of your own; every call of a bare
            denoiser is then a generation of one step.
        methods: applied in this order, the first one outermost.

    Returns:
        The handle. `handle.report()` tells what each method said of the last generation.

    Raises:
        UnsupportedModelError: no denoiser that dittune knows.
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
        self.pipe = None if isinstance(target, nn.Module) else target
        self.run: Run | None = None
        self.last_run: Run | None = None
        self._methods = methods
        self._acting = tuple(m for m in methods if not m.is_neutral)
        self._undo: list[Callable[[], None]] = []
        # All that can fail comes before anything is changed.
        self._models = [_Model(self, model) for model in _denoisers(target)]
        swaps = [swap for model in self._models for swap in model.swaps()]
        if self.pipe is not None:
            swaps.append((_set_class, target, type(target), _pipeline_class(self, type(target))))
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
        """Restore everything; a second call does nothing. Every step is tried even if one fails."""
        failures = []
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def report(self) -> dict[str, Any]:
        """What each method reports of the last generation, by method name."""
        reports: dict[str, Any] = {}
        for method in self._methods:
            key, i = method.name, 2
            while key in reports:
                key, i = f"{method.name}-{i}", i + 1
            reports[key] = method.report(self.last_run) if self.last_run else {}
        return reports

    # ------------------------------------------------------------------ one generation

    def call_pipeline(self, pipe: Any, stock_call: Callable, args: tuple, kwargs: dict) -> Any:
        if self.run is not None:
            raise SeamError("a pipeline runs one generation at a time; wait, or load a second one")
        self.run = self.last_run = Run()
        try:
            for model in self._models:
                model.check_installed()
            if "callback_on_step_end" in inspect.signature(stock_call).parameters:
                kwargs = self._with_step_end(kwargs)
            return stock_call(pipe, *args, **kwargs)
        finally:
            for model in self._models:
                model.forget_run()
            self.run = None

    def _with_step_end(self, kwargs: dict) -> dict:
        """The user's own `callback_on_step_end` still runs, after the methods."""
        users = kwargs.get("callback_on_step_end")
        wanted = list(kwargs.get("callback_on_step_end_tensor_inputs") or ["latents"])
        if hasattr(users, "tensor_inputs"):  # diffusers' PipelineCallback brings its own list
            wanted = list(users.tensor_inputs)

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            run, given = self.run, tensors["latents"]
            latents = given
            for method in self._acting:
                if method.acts_at(run.step, run.num_steps):
                    latents = method.on_step(run, latents)
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

    def call_model(self, model: nn.Module, stock_call: Callable, args: tuple, kwargs: dict) -> Any:
        seam = next(m for m in self._models if m.model is model)
        if self.run is not None:
            return seam.call(self.run, self.pipe, stock_call, args, kwargs)
        run = self.last_run = Run(num_steps=1)
        try:
            seam.check_installed()
            return seam.call(run, None, stock_call, args, kwargs)
        finally:
            seam.forget_run()


class _Model:
    """One attached denoiser: its facts, its sites, and who acts where."""

    def __init__(self, owner: Attachment, model: nn.Module):
        if hasattr(type(model), "_dittune_owner"):
            raise AlreadyAttachedError(
                f"{type(model).__name__} is attached already; detach its handle first"
            )
        self.owner, self.model, self.inner = owner, model, getattr(model, "_orig_mod", model)
        self.facts: ModuleType = facts_for(self.inner)
        available = self.facts.sites(self.inner)
        self.wanted = {method: list(method.sites(available)) for method in owner._acting}
        self._check_replacers()
        self.signature = inspect.signature(type(self.inner).forward)
        self.installed: list[tuple[nn.Module, object, object]] = []
        for site in available:
            if any(site in sites for sites in self.wanted.values()):
                module = self.inner.get_submodule(site.name)
                stock = module.processor
                calls = self.facts.CORE_CALLS.get(type(stock).__name__)
                self.installed.append((module, stock, make_processor(stock, site, calls)))
        self.active: tuple[Method, ...] | None = None
        self.checked: set[Method] = set()

    def _check_replacers(self) -> None:
        replacers = [method for method in self.wanted if method.replaces_attention]
        for i, first in enumerate(replacers):
            for second in replacers[i + 1 :]:
                both = [site for site in self.wanted[first] if site in self.wanted[second]]
                if both:
                    raise SelectionError(
                        f"{first.name} and {second.name} both replace the attention of {both[0]}; "
                        "give them different sites, or use one"
                    )

    def swaps(self) -> list[tuple]:
        """(write, place, old, new) for everything to be changed."""
        swaps = [(_set_processor, module, stock, ours) for module, stock, ours in self.installed]
        stock_class = type(self.model)
        swaps.append((_set_class, self.model, stock_class, _model_class(self.owner, stock_class)))
        return swaps

    def check_installed(self) -> None:
        for module, _, ours in self.installed:
            if module.processor is not ours:
                raise SeamError(
                    f"the processor at {ours.installed.site} was replaced by "
                    f"{type(module.processor).__name__} after attaching (attention slicing, "
                    "fused projections, IP-Adapter?); attach after that call"
                )

    def forget_run(self) -> None:
        self.active = None
        self.checked = set()
        for _, _, ours in self.installed:
            ours.installed.chain = ours.installed.run = None
            ours.installed.fired = False

    def call(self, run: Run, pipe: Any, stock_call: Callable, args: tuple, kwargs: dict) -> Any:
        if args:
            kwargs = dict(self.signature.bind(self.model, *args, **kwargs).arguments)
            kwargs.pop("self")
            kwargs.update(kwargs.pop("kwargs", {}))
        if not run.num_steps:
            run.num_steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        self._activate(run)
        raw: list[Any] = []

        def model(inputs: ModelInputs) -> torch.Tensor:
            run.roles = inputs.roles
            run.layouts = self.facts.layouts(self.inner, inputs.kwargs)
            raw[:] = [stock_call(self.model, **inputs.kwargs)]
            self._check_fired(inputs)
            return raw[0][0]

        around = model
        for method in reversed(self.active):
            if type(method).around_model is not Method.around_model:
                around = functools.partial(method.around_model, model=around)
        roles = self.facts.roles(pipe, kwargs)
        sample = around(ModelInputs(kwargs, roles, self.facts.BATCHED, run))
        if sample is raw[0][0]:
            return raw[0]
        if isinstance(raw[0], tuple):
            return (sample, *raw[0][1:])
        return type(raw[0])(**{**raw[0], "sample": sample})

    def _activate(self, run: Run) -> None:
        """Build the chains of the methods that act at this step, if they changed."""
        active = tuple(m for m in self.owner._acting if m.acts_at(run.step, run.num_steps))
        if active == self.active:
            return
        device = next(self.inner.parameters()).device
        for _, _, ours in self.installed:
            installed: InstalledSite = ours.installed
            chain: Callable = stock_attention
            for method in reversed(active):
                if installed.site in self.wanted[method]:
                    chain = Link(method, method.site_state(installed.site, device), chain)
            installed.run = run
            installed.chain = None if chain is stock_attention else chain
        self.active = active

    def _check_fired(self, inputs: ModelInputs) -> None:
        """A site that never fires is an error, not a silent no-op. Checked once a method and run."""
        new = set(self.active) - self.checked
        if not new or "cond" not in inputs.roles:
            return
        self.checked |= new
        for _, stock, ours in self.installed:
            installed = ours.installed
            if installed.chain is not None and not installed.fired:
                raise SeamError(
                    f"{installed.site} never called its attention core: "
                    f"{type(stock).__name__} is bypassed by a cache, a compiled copy or another "
                    "back-end; switch that off, or attach before compiling"
                )


def _denoisers(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in DENOISER_NAMES]
    found = [model for model in found if isinstance(model, nn.Module)]
    if not found:
        raise UnsupportedModelError(
            f"expected a diffusers pipeline or denoiser, got {type(target).__name__}, which has no "
            f"{' or '.join(DENOISER_NAMES)}; model families: {', '.join(available_models())}"
        )
    return found


def _set_processor(module: nn.Module, processor: object) -> None:
    module.processor = processor


def _set_class(instance: object, cls: type) -> None:
    object.__setattr__(instance, "__class__", cls)


def _subclass(owner: Attachment, stock: type, call: Callable) -> type:
    """A class that is `stock` in name and nature, except that calling an instance comes to us."""

    def reduce(self, protocol):
        """A copy or pickle is not attached: it is of the stock class."""
        function, arguments, *rest = stock.__reduce_ex__(self, protocol)
        arguments = tuple(stock if argument is generated else argument for argument in arguments)
        return (function, arguments, *rest)

    functools.update_wrapper(call, stock.__call__)
    namespace = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_dittune_owner": owner,
    }
    generated = type(stock.__name__, (stock,), namespace)
    return generated


def _model_class(owner: Attachment, stock: type) -> type:
    def call(self, *args, **kwargs):
        return owner.call_model(self, stock.__call__, args, kwargs)

    return _subclass(owner, stock, call)


def _pipeline_class(owner: Attachment, stock: type) -> type:
    if hasattr(stock, "_dittune_owner"):
        raise AlreadyAttachedError(f"{stock.__name__} is attached already; detach its handle first")

    def call(self, *args, **kwargs):
        return owner.call_pipeline(self, stock.__call__, args, kwargs)

    return _subclass(owner, stock, call)
