"""The base of methods whose image tokens attend to few others; the plan is built once a geometry.

Everything that is no image token, text and reference pictures, sees all and is seen by all. Tokens
are brought into the order of the plan at each site and back: between two sites the pipelines' own
code adds rotary positions, control signals and patches in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.patterns import Plan
from dittune.run import ModelInputs, Run
from dittune.sparse.core import Built, Core, CoreMethod, built_by, key_of
from dittune.sparse.plan import BACKENDS, Place, Ready, choose_backend


@dataclass(frozen=True, kw_only=True)
class SparseMethod(CoreMethod):
    """Derive from it and say which plan a place gets.

    Args:
        start: share of the steps that stay dense, the first ones; the picture's layout forms there.
        backend: `auto`; `dense` (PyTorch's own attention under a mask), `triton`, `flex`, `cpu` or
            `reference`. `auto` on a CPU is `dense` where blocks would be slower.

    Raises:
        ConfigError: an unknown back-end; while generating, a mask of single pairs.
    """

    backend: str = field(default="auto", metadata={"choices": BACKENDS})

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def site_state(self, site: Site, device: torch.device) -> Any:
        return built_by(self, site.kind, site.stage, device)

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
        device = inputs.kwargs[inputs.batched[0]].device
        if layouts == getattr(memory, "layouts", None):
            for at, ready in memory.ready.items():  # another generation may have dropped it
                built_by(self, *at, device).get(layouts[at], lambda ready=ready: ready)
            return
        memory.layouts, memory.ready = layouts, {}
        for site in self.sites(facts.sites(model)):
            at = site.kind, site.stage
            if at not in memory.ready:
                place = Place(layouts[at], site.heads, device)
                built = built_by(self, *at, device)
                memory.ready[at] = built.get(place.layout, lambda place=place: self.ready(place))

    def ready(self, place: Place) -> Ready:
        """The plan of one place, on its device."""
        plan = self.plan(place)
        return Ready(plan, place, choose_backend(plan, place, self.backend))

    def core(self, stock: Core, state: Built, call: AttnCall) -> torch.Tensor:
        ready: Ready = state.at[key_of(call.layout)]
        scale = self.scale(call)
        if ready.backend == "plain":
            options = call.options if scale is None else {**call.options, "scale": scale}
            return stock(call._replace(options=options))
        return ready(self.extended(call), scale, self.real_text(call))

    def report(self, run: Run) -> dict[str, Any]:
        """Back-end and densities, by kind and stage of the sites; `computed`, of the generation."""
        ready = getattr(run.memory(self), "ready", {})
        places = {
            f"{kind} {stage}" if stage else kind: r.report for (kind, stage), r in ready.items()
        }
        share = {at: r.report["image_density"] for at, r in ready.items()}
        return {**places, "computed": self.computed(run, share)} if places else {}
