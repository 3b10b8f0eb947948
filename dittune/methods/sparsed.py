"""SparseD: where each head looks is measured once in a generation, and kept from then on.

The first steps are dense. At the first sparse one, each head's attention is measured in blocks;
later steps compute the blocks of most mass. Text sees all and is seen by all.

Source: "SparseD: Sparse Attention for Diffusion Language Models" (arXiv 2509.24014) and the
repository INV-WZQ/SparseD, brought from text to pictures and video. Differs: text is always seen,
a few queries of each block are asked instead of all, and logits are scaled as the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.run import ModelInputs, Run
from dittune.sparse.core import Built, Core, CoreMethod, built_by, key_of
from dittune.sparse.measured import (
    Frame,
    best_blocks,
    block_mass,
    frame_of,
    patterns_at,
    plan_of,
    save_patterns,
)
from dittune.sparse.plan import BACKENDS, Place, Ready, cheaper_on_cpu


@dataclass(frozen=True, kw_only=True)
class SparseD(CoreMethod):
    """Block-sparse attention along patterns of single heads, measured or read from a file.

    All pictures of a call, and both halves of guidance, share the pattern of a head, the mean over
    the rows of the first call that measures.

    Args:
        keep: share of the image's blocks that a block of queries sees; one more, and its own.
        block: tokens of a block's side.
        queries: of each block are asked when measuring, evenly spaced; 0 asks all.
        patterns: file (safetensors) of patterns. If it is there it is used, and no step measures;
            else it is written once all layers have measured. It fits one size of picture or video.
        backend: `auto`; `dense` (PyTorch's own attention under a mask), `triton`, `flex`, `cpu` or
            `reference`.

    Raises:
        ConfigError: a setting out of range; while generating, a file that does not fit, a mask of
            single pairs, or heads that another method computes apart.
    """

    start: float = 0.2
    keep: float = 0.3
    block: int = 128
    queries: int = 16
    patterns: str = field(default="", metadata={"is_path": True})
    backend: str = field(default="auto", metadata={"choices": BACKENDS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1 or self.queries < 0:
            raise ConfigError(
                f"sparsed: 0 < keep <= 1 and 0 <= queries, got keep {self.keep}, "
                f"queries {self.queries}"
            )
        if self.block < 1 or self.block & (self.block - 1):
            raise ConfigError(f"sparsed: block is a power of two, got {self.block}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"sparsed: backend is one of {BACKENDS}, got {self.backend!r}")

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or self.keep == 1

    def site_state(self, site: Site, device: torch.device) -> Built:
        return built_by(self, site.kind, site.stage, device)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        host, memory = inputs.run.host, inputs.run.memory(self)
        if host.pipe is None and inputs.run.num_steps == 1 and not self.patterns:
            raise ConfigError(
                "sparsed: what a step measures is used in later ones, which a denoiser without its "
                "pipeline has not; attach to the pipeline, or name a file of patterns"
            )
        layouts = host.facts.layouts(host.model, inputs.kwargs)
        device = inputs.kwargs[inputs.batched[0]].device
        if not hasattr(memory, "ready"):
            memory.ready, memory.kept, memory.shares, memory.about = {}, {}, [], {}
        memory.denoiser, memory.is_new = _component(host), False
        sites = self.sites(host.facts.sites(host.model))
        for site in sites:
            place = Place(layouts[site.kind, site.stage], site.heads, device)
            built = built_by(self, site.kind, site.stage, device)
            built.get(place.layout, lambda p=place: frame_of(p, self.block, self.queries))
        if self.patterns:
            about = self._about(type(host.model).__name__, layouts)
            if memory.about not in ({}, about):
                raise ConfigError("sparsed: a file of patterns is for one size; the size changed")
            if not memory.about:
                memory.kept = patterns_at(self.patterns, about)
            memory.about = about
            self._take_loaded(memory, sites, layouts, device)
        out = model(inputs)
        if self.patterns and memory.is_new:
            save_patterns(self.patterns, memory.about, memory.kept)
        return out

    def _about(self, model: str, layouts: dict) -> dict[str, Any]:
        """What patterns depend on."""
        where = {f"{kind} {stage}": list(map(int, key_of(layout)))
                 for (kind, stage), layout in layouts.items() if kind != "cross"}  # fmt: skip
        return {"model": model, "layouts": where, "keep": self.keep, "block": self.block}

    def _take_loaded(self, memory, sites: list[Site], layouts: dict, device) -> None:
        """Patterns of the file become plans, unless the file knows nothing of this denoiser."""
        if not any(name.startswith(f"{memory.denoiser}/") for name in memory.kept):
            return
        for site in sites:
            layout, name = layouts[site.kind, site.stage], _name(memory.denoiser, site)
            if (name, key_of(layout)) in memory.ready:
                continue
            frame: Frame = built_by(self, site.kind, site.stage, device).at[key_of(layout)]
            wanted = (site.heads, *[frame.image[1] - frame.image[0]] * 2)
            if name not in memory.kept or memory.kept[name].shape != wanted:
                raise ConfigError(
                    f"sparsed: {self.patterns} has no {list(wanted)} blocks at {name}; it was "
                    "measured with other dense_layers or another model; name another file"
                )
            memory.ready[name, key_of(layout)] = -1, self._ready(memory.kept[name], frame)

    @torch.compiler.disable
    def core(self, stock: Core, state: Built, call: AttnCall) -> torch.Tensor:
        memory, frame = call.run.memory(self), state.at[key_of(call.layout)]
        if call.query.shape[1] != call.site.heads:
            raise ConfigError(
                "sparsed: another method computes some heads apart, whose patterns cannot be told"
            )
        at = _name(memory.denoiser, call.site), key_of(call.layout)
        if at not in memory.ready:
            memory.ready[at] = call.run.step, self._measure(call, frame, at[0])
        step, ready = memory.ready[at]
        if step == call.run.step:  # all calls of one step are alike
            return stock(call)
        return ready(call, call.options.get("scale"), self.real_text(call))

    def _measure(self, call: AttnCall, frame: Frame, name: str) -> Ready:
        memory, order = call.run.memory(self), frame.plan.queries.permutation
        query, key, last = call.query.detach(), call.key.detach(), call.layout.text[1] - 1
        if order is not None:
            order = order.to(query.device)
            query, key, last = order.permute(query), order.permute(key), int(order.inverse[last])
        real_text = self.real_text(call)
        count = None if real_text is None else frame.plan.key_count({"after": real_text})
        scale = call.options.get("scale") or query.shape[-1] ** -0.5
        mass = block_mass(query, key, scale, frame, count, (last, call.repeats))
        kept = best_blocks(mass, frame, self.keep)
        inside = mass[..., slice(*frame.image)]
        memory.shares.append((inside * kept).sum() / inside.sum())
        memory.is_new = True
        if self.patterns:
            memory.kept[name] = kept.cpu()
        return self._ready(kept, frame)

    def _ready(self, kept: torch.Tensor, frame: Frame) -> Ready:
        device, backend = frame.place.device, self.backend
        plan = plan_of(kept.to(device), frame)
        if backend == "auto" and device.type == "cpu":
            visited = sum(len(plan.tensors[f"row_{kind}_index"]) for kind in ("full", "partial"))
            backend = cheaper_on_cpu(plan, frame.place, visited, patterns=len(kept))
        return Ready(plan, frame.place, backend)

    def report(self, run: Run) -> dict[str, Any]:
        """Sites with a pattern, its share of the image's blocks, and of the mass when measured.

        `computed` is the share of the image's blocks over the whole generation.
        """
        memory = run.memory(self)
        plans = [ready.plan for _, ready in getattr(memory, "ready", {}).values()]
        if not plans:
            return {"sites": 0}
        used, every = 0, 0
        for plan in plans:
            rows, columns = (plan.tensors[f"{name}_order"].shape[1] for name in ("row", "column"))
            (image,) = (-(-s.order.tokens // plan.block[0])
                        for s in plan.queries.segments if s.name == "image")  # fmt: skip
            used += len(plan.tensors["row_full_index"]) + len(plan.tensors["row_partial_index"])
            used -= len(plan.heads) * (rows * columns - image**2)
            every += len(plan.heads) * image**2
        recall = {"recall": float(torch.stack(memory.shares).mean())} if memory.shares else {}
        share = used / every
        measured = {step for step, _ in memory.ready.values() if step >= 0}  # of each denoiser one
        computed = self.computed(run, share, dense_steps=len(measured))
        return {"sites": len(plans), "image_density": share, "computed": computed, **recall}


def _name(denoiser: str, site: Site) -> str:
    return f"{denoiser}/{site.kind}/{site.layer}"


def _component(host) -> str:
    """What the pipeline calls the denoiser; Wan 2.2 has two."""
    parts = host.pipe.components.items() if host.pipe is not None else ()
    return next((n for n, m in parts if getattr(m, "_orig_mod", m) is host.model), "denoiser")
