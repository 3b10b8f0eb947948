"""SoftPAG: guide away from a prediction made with some attention heads perturbed.

In an extra pass over the conditional rows the map `A` of each chosen head becomes `(1-u) A + u P`,
with `P` the identity or another perturbation, and the difference to the undisturbed prediction,
times `scale`, is added to the result.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv 2506.10978),
section 3 (HeadHunter and SoftPAG).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError, SelectionError
from dittune.heads import HeadSet
from dittune.method import Method
from dittune.perturbation import (
    argmax,
    blurred_query,
    identity,
    mean_query,
    self_and_text,
    temperature,
    uniform,
)
from dittune.run import ModelInputs, Run

PERTURBATIONS = ("identity", "uniform", "mean_query", "blurred_query", "argmax", "temperature")
KINDS = ("joint", "self", "cross")


class _Heads(NamedTuple):
    chosen: torch.Tensor  # int64 head numbers
    kept: torch.Tensor
    order: torch.Tensor  # of the heads in `cat([chosen, kept])`


@dataclass(frozen=True, kw_only=True)
class SoftPAG(Method):
    """Perturbed-attention guidance on chosen heads.

    Args:
        heads: `layer:head,layer:head`; `layer:*` is all heads of a layer, which is PAG.
        first: use only this many of the heads, from the first on; a search lists the best first.
        perturbation: what a chosen head's map becomes: `identity` (each token sees itself),
            `uniform` (all tokens alike), `mean_query` (all rows ask with their mean query),
            `blurred_query` (image queries blurred on their grid, SEG), `argmax` (only the token
            seen most), `temperature` (softmax at another temperature).
        sigma: of `blurred_query`, in tokens; `inf` is the mean query of the image.
        temperature: of `temperature`; above 1 flatter, below 1 sharper.
        u: strength of the perturbation in [0, 1]; 0 leaves the map alone, 1 replaces it.
        scale: guidance scale `w`; the prediction becomes `pred + w (cond - perturbed)`.
        rows: which queries are perturbed: `all` tokens, or `image` tokens only.
        cols: which keys the identity replaces: `all`, or `image` only, so that an image token keeps
            its attention to the text and to itself (diffusers' own SD3 PAG); needs `rows="image"`.
        kind: kind of attention site the layers are counted in, `joint`, `self` or `cross` (not with
            `identity`); empty is joint where the model has it, else self.
        batched: make the perturbed pass part of the same denoiser call. None: yes, unless that runs
            out of memory, then a call of its own for the rest of the generation.

    Raises:
        ConfigError: a value outside its range, or a head set that cannot be read.
        SelectionError: at `attach`, a layer or head the model does not have.
    """

    heads: str = ""
    first: int | None = None
    perturbation: str = field(default="identity", metadata={"choices": PERTURBATIONS})
    u: float = 1.0
    sigma: float = 2.0
    temperature: float = 4.0
    scale: float = 3.0
    rows: str = field(default="all", metadata={"choices": ("all", "image")})
    cols: str = field(default="all", metadata={"choices": ("all", "image")})
    kind: str = field(default="", metadata={"choices": ("", *KINDS)})
    batched: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", str(HeadSet(self.heads)))
        if self.first is not None and self.first < 0:
            raise ConfigError(f"softpag: first is a number of heads, got {self.first}")
        if not 0.0 <= self.u <= 1.0:
            raise ConfigError(f"softpag: u is in [0, 1], got {self.u}")
        if not math.isfinite(self.scale):
            raise ConfigError(f"softpag: scale is a finite number, got {self.scale}")
        for name in ("rows", "cols"):
            if getattr(self, name) not in ("all", "image"):
                raise ConfigError(
                    f"softpag: {name} is 'all' or 'image', got {getattr(self, name)!r}"
                )
        if self.perturbation not in PERTURBATIONS:
            raise ConfigError(
                f"softpag: perturbation is one of {', '.join(PERTURBATIONS)}; "
                f"got {self.perturbation!r}"
            )
        if self.cols == "image" and (self.rows == "all" or self.perturbation != "identity"):
            raise ConfigError("softpag: cols='image' needs rows='image' and the identity")
        for name in ("sigma", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"softpag: {name} is above 0, got {getattr(self, name)}")
        if math.isinf(self.temperature):
            raise ConfigError("softpag: temperature is finite; for its limit use 'uniform'")
        if self.kind not in ("", *KINDS):
            raise ConfigError(f"softpag: kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "cross" and self.perturbation == "identity":
            raise ConfigError(
                "softpag: the identity needs as many keys as queries, which cross attention has "
                "not; choose another perturbation"
            )

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or not len(self.chosen) or self.u == 0.0 or self.scale == 0.0

    @property
    def chosen(self) -> HeadSet:
        """The heads that are perturbed."""
        heads = HeadSet(self.heads)
        return heads if self.first is None else heads.first(self.first)

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        for kind in (self.kind,) if self.kind else ("joint", "self"):
            sites = [site for site in available if site.kind == kind]
            if sites:
                return self.chosen.select(sites)
        kinds = ", ".join(sorted({site.kind for site in available}))
        raise SelectionError(
            f"softpag needs {self.kind or 'self'} attention; the model has {kinds}"
        )

    def site_state(self, site: Site, device: torch.device) -> _Heads:
        chosen = self.chosen.at(site)
        kept = [head for head in range(site.heads) if head not in chosen]
        order = torch.tensor(chosen + kept).argsort()
        return _Heads(*(torch.as_tensor(x, device=device).long() for x in (chosen, kept, order)))

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if "cond" not in inputs.roles:  # the unconditional call of a pipeline that makes two
            return model(inputs) + getattr(memory, "delta", 0.0)
        separate = getattr(memory, "separate", self.batched is False)
        if not separate:
            try:
                both = model(inputs.plus(self, like="cond"))
                plain, perturbed = both.tensor_split(
                    [len(both) - len(both) // (len(inputs.roles) + 1)]
                )
            except torch.OutOfMemoryError:
                if self.batched:
                    raise
                separate = True
        if separate:
            plain = model(inputs)
            perturbed = model(inputs.only("cond", named=self))
        memory.separate = separate
        return self._guided(inputs, plain, perturbed)

    def _guided(
        self, inputs: ModelInputs, plain: torch.Tensor, perturbed: torch.Tensor
    ) -> torch.Tensor:
        """Add `scale (cond - perturbed)` to the prediction of every role."""
        memory = inputs.run.memory(self)
        cond = plain[inputs.rows("cond", len(plain))]
        memory.delta = self.scale * (cond - perturbed)
        memory.calls = getattr(memory, "calls", 0) + 1
        return plain + memory.delta.repeat(len(inputs.roles), *[1] * (plain.ndim - 1))

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        rows = call.chunk_of(self)
        if rows is None:
            return proceed(call)
        first, last = rows
        batch = call.query.shape[0]
        parts = [self._perturb(call.take_rows(first, last), proceed)]
        if first > 0:
            parts.insert(0, proceed(call.take_rows(0, first)))
        if last < batch:
            parts.append(proceed(call.take_rows(last, batch)))
        return torch.cat(parts)

    def _perturb(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        """`(1-u) A V + u P V` on the chosen heads, without forming a map."""
        chosen, kept, order = call.state
        goal = self._goal(call.take_heads(chosen), proceed)
        if self.rows == "all" and self.u == 1.0:
            if kept.numel() == 0:
                return goal
            return torch.cat([goal, proceed(call.take_heads(kept))], 1).index_select(1, order)
        out = proceed(call)
        first, last = self._rows(call)
        mixed = out.index_select(1, chosen)
        mixed = torch.cat(
            [
                mixed[:, :, :first],
                torch.lerp(mixed[:, :, first:last], goal, self.u),
                mixed[:, :, last:],
            ],
            dim=2,
        )
        return out.index_copy(1, chosen, mixed)

    def _rows(self, call: AttnCall) -> tuple[int, int]:
        return call.layout.image if self.rows == "image" else (0, call.query.shape[2])

    def _goal(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        """What perturbed heads put out at `u = 1` in the perturbed rows, `[B, H, rows, D]`."""
        rows = self._rows(call)
        if self.cols == "image":
            return self_and_text(call)
        if self.perturbation == "uniform":
            goal = uniform(call, proceed)
        elif self.perturbation == "mean_query":
            goal = mean_query(call, rows, proceed)
        elif self.perturbation == "blurred_query":
            goal = blurred_query(call, self.sigma, proceed)
        elif self.perturbation == "temperature":
            goal = temperature(call, self.temperature, proceed)
        elif self.perturbation == "argmax":
            goal = argmax(call)
        else:
            goal = identity(call)
        return goal[:, :, slice(*rows)]

    def report(self, run: Run) -> dict[str, Any]:
        memory = run.memory(self)
        calls = getattr(memory, "calls", 0)
        return {
            "heads": len(self.chosen),
            "perturbed_passes": calls,
            "batched": bool(calls) and not getattr(memory, "separate", True),
        }
