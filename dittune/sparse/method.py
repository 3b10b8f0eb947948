"""The base of methods whose image tokens attend to few others; the plan is built once a geometry.

Everything that is no image token, text and reference pictures, sees all and is seen by all. Tokens
are brought into the order of the plan at each site and back: between two sites the pipelines' own
code adds rotary positions, control signals and patches in the model's order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.heads import parse_layers
from dittune.method import Method
from dittune.patterns import Plan
from dittune.run import ModelInputs, Run
from dittune.sparse.plan import Place, Ready

BACKENDS = ("auto", "dense", "triton", "flex", "cpu", "reference")
GEOMETRIES = 8  # plans kept for one method and kind of site


class Plans:
    """All plans of one method at the sites of one kind and stage, by geometry."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, ...], Ready] = {}

    def build(self, method: SparseMethod, place: Place) -> Ready:
        key = _key(place.layout)
        if key not in self.at:
            if len(self.at) >= GEOMETRIES:
                del self.at[next(iter(self.at))]
            self.at[key] = Ready(method.plan(place), place, method.backend)
        return self.at[key]


@functools.lru_cache(maxsize=64)
def plans_of(method: SparseMethod, kind: str, stage: int, device: torch.device) -> Plans:
    """Shared by all generations with equal settings, so that compiled code meets no new object."""
    return Plans()


def _key(layout: TokenLayout) -> tuple[int, ...]:
    return (*layout.image, *layout.text, *layout.grid, layout.references)


@dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """Derive from it and say which plan a place gets.

    Args:
        start: share of the steps that stay dense, the first ones; the picture's layout forms there.
        dense_layers: layers that stay dense, such as `0,3-5`; the others are sparse.
        backend: `auto`; `dense` (PyTorch's own attention under a mask), `triton`, `flex`, `cpu` or
            `reference`. `auto` on a CPU is `dense` where blocks would be slower.

    Raises:
        ConfigError: an unknown back-end, or layers that cannot be read; while generating, another
            method before this one that changes the attention core.
        SelectionError: at `attach`, no attention among image tokens.
    """

    dense_layers: str = ""
    backend: str = field(default="auto", metadata={"choices": BACKENDS})

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.dense_layers)
        if self.backend not in BACKENDS:
            raise ConfigError(f"{self.name}: backend is one of {BACKENDS}, got {self.backend!r}")

    def plan(self, place: Place) -> Plan:
        """The plan of one place."""
        raise NotImplementedError

    def scale(self, call: AttnCall) -> float | None:
        """Of the logits; None is the model's own."""
        return call.options.get("scale")

    def extended(self, call: AttnCall) -> AttnCall:
        """The call with further keys and values behind the model's own."""
        return call

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        dense = parse_layers(self.dense_layers)
        joint = any(site.kind == "joint" for site in available)
        found = [s for s in available if s.kind in (("joint", "self") if joint else ("self",))]
        if not found:
            raise SelectionError(f"{self.name} needs joint or self attention; the model has none")
        if missing := [n for n in dense if all(site.layer != n for site in found)]:
            raise SelectionError(f"{self.name}: dense_layers names layer {missing[0]}; not there")
        return [site for site in found if site.layer not in dense]

    def site_state(self, site: Site, device: torch.device) -> Any:
        return plans_of(self, site.kind, site.stage, device)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        self.prepare(inputs)
        return model(inputs)

    def prepare(self, inputs: ModelInputs) -> None:
        """Build the plans of this call's geometry, unless they are there."""
        run, memory = inputs.run, inputs.run.memory(self)
        facts, model = run.host.facts, run.host.model
        layouts = facts.layouts(model, inputs.kwargs)
        if layouts == getattr(memory, "layouts", None):
            return
        memory.layouts, memory.ready = layouts, {}
        device = inputs.kwargs[inputs.batched[0]].device
        for site in self.sites(facts.sites(model)):
            at = site.kind, site.stage
            if at not in memory.ready:
                place = Place(layouts[at], site.heads, device)
                memory.ready[at] = plans_of(self, *at, device).build(self, place)

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        if isinstance(call.core, functools.partial) and call.repeats == 1:
            raise ConfigError(
                f"{self.name}: a method before it changes the attention core too; only one can"
            )
        return proceed(call._replace(core=functools.partial(self._core, call.core, call.state)))

    def _core(self, core: Callable, plans: Plans, call: AttnCall) -> torch.Tensor:
        """The sparse core; where a method asks for a few queries only, these see all."""
        if call.query.shape[2] != call.key.shape[2]:
            return core(call)
        ready = plans.at[_key(call.layout)]
        scale = self.scale(call)
        if ready.backend == "plain":
            options = call.options if scale is None else {**call.options, "scale": scale}
            return core(call._replace(options=options))
        if call.options.get("attn_mask") is not None:
            raise ConfigError(f"{self.name}: the model masks its attention, which it cannot do yet")
        return ready(self.extended(call), scale)

    def report(self, run: Run) -> dict[str, Any]:
        """Back-end and densities, by kind and stage of the sites."""
        ready = getattr(run.memory(self), "ready", {})
        return {
            f"{kind} {stage}" if stage else kind: r.report for (kind, stage), r in ready.items()
        }
