"""One attached denoiser: its facts, its sites, who acts where, and how a call of it runs."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dittune.call import Role
from dittune.class_swap import calling_subclass, owner_of, set_class
from dittune.errors import AlreadyAttachedError, SeamError, UnsupportedModelError
from dittune.method import Method
from dittune.models import facts_for
from dittune.run import Host, ModelInputs, Run
from dittune.seam import InstalledSite, Link, make_processor, stock_attention
from dittune.together import check_together


class AttachedModel:
    """One attached denoiser: its facts, its sites, and who acts where."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...], owner: Any):
        if owner_of(model) is not None:
            raise AlreadyAttachedError(
                f"{type(model).__name__} is attached already; detach its handle first"
            )
        self.model, self.methods, self.owner = model, methods, owner
        self.inner = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
        self.facts: ModuleType = facts_for(self.inner)
        available = self.facts.sites(self.inner)
        self.wanted = [list(method.sites(available)) for method in methods]  # one list a method
        check_together(self.methods, self.wanted)
        self.signature = inspect.signature(type(self.inner).forward)
        self.installed: list[tuple[nn.Module, object, object]] = []
        for site in available:
            if any(site in sites for sites in self.wanted):
                module = self.inner.get_submodule(site.name)
                stock = module.processor
                calls = self.facts.CORE_CALLS.get(type(stock).__name__)
                self.installed.append((module, stock, make_processor(stock, site, calls)))
        self.active: tuple[Method, ...] | None = None
        self.checked: set[int] = set()  # ids: a method need not be hashable

    def swaps(self) -> list[tuple]:
        """(write, place, old, new) for everything to be changed."""
        swaps = [(_set_processor, module, stock, ours) for module, stock, ours in self.installed]
        stock_class = type(self.model)
        swaps.append((set_class, self.model, stock_class, self._calling_class(stock_class)))
        return swaps

    def _calling_class(self, stock: type) -> type:
        owner = self.owner

        def call(self, *args, **kwargs):
            return owner.call_model(self, stock.__call__, args, kwargs)

        return calling_subclass(owner, stock, __call__=call)

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
            if any(method.makes_pictures for method in self.methods):
                run.scheduler = copy.deepcopy(pipe.scheduler)
        run.host = Host(pipe, self.inner, self.facts)
        self._activate(run, kwargs[self.facts.BATCHED[0]].device)
        raw: list[Any] = []

        def model(inputs: ModelInputs) -> torch.Tensor:
            run.roles = inputs.roles
            run.expect(self.facts, self.inner, inputs.kwargs)
            # Some denoisers empty the lists they are given; a second call needs them again.
            given = {k: list(v) if type(v) is list else v for k, v in inputs.kwargs.items()}
            raw[:] = [stock_call(self.model, **given)]
            self._check_fired(inputs)
            return raw[0][0]

        around = model
        for method in reversed(self.active):
            if type(method).around_model is not Method.around_model:
                around = functools.partial(method.around_model, model=around)
        roles = self._roles(run, pipe, kwargs)
        run.calls += 1
        sample = around(ModelInputs(kwargs, roles, self.facts.BATCHED, run))
        if sample is raw[0][0]:
            return raw[0]
        if isinstance(raw[0], tuple):
            return (sample, *raw[0][1:])
        return type(raw[0])(**{**raw[0], "sample": sample})

    def _roles(self, run: Run, pipe: Any, kwargs: dict[str, Any]) -> tuple[Role, ...]:
        """What the chunks of a batch are; asked once a generation for calls that are alike.

        The guidance scale of CogVideoX may change from step to step, and be 1 at one of them.
        """
        rows = len(kwargs[self.facts.BATCHED[0]])
        if run.step >= run.num_steps:
            raise UnsupportedModelError(
                f"{type(pipe).__name__} calls its denoiser after the last of {run.num_steps} steps"
            )
        if (run.calls, rows) not in run.roles_at:
            run.roles_at[run.calls, rows] = self.facts.roles(pipe, kwargs, run.calls)
        roles = run.roles_at[run.calls, rows]
        pictures = run.pictures or rows // len(roles)
        if rows != pictures * len(roles):
            raise UnsupportedModelError(
                f"{type(pipe).__name__} has {rows} rows in a batch, expected {' and '.join(roles)} "
                "of each picture; use the plain pipeline"
            )
        run.pictures = pictures
        return roles

    def _activate(self, run: Run, device: torch.device) -> None:
        """Build the chains of the methods that act at this step, if they changed."""
        active = tuple(m for m in self.methods if m.acts_at(run.step, run.num_steps))
        if active == self.active:
            return
        for _, _, ours in self.installed:
            installed: InstalledSite = ours.installed
            chain: Callable = stock_attention
            for method, sites in reversed(list(zip(self.methods, self.wanted, strict=True))):
                if method in active and installed.site in sites:
                    chain = Link(method, method.site_state(installed.site, device), chain)
            installed.run = run
            installed.chain = None if chain is stock_attention else chain
        self.active = active

    def _check_fired(self, inputs: ModelInputs) -> None:
        """A site that never fires is an error, no silent no-op. Checked once a method and run."""
        new = {id(method) for method in self.active} - self.checked
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


def _set_processor(module: nn.Module, processor: object) -> None:
    module.processor = processor
