"""SoftPAG: guide away from a prediction made with some attention heads perturbed.

In an extra pass over the conditional rows the map `A` of each chosen head becomes `(1-u) A + u I`,
and the difference to the undisturbed prediction, times `scale`, is added to the result.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv 2506.10978),
section 3 (HeadHunter and SoftPAG); the identity perturbation is that of PAG (arXiv 2403.17377).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError, SelectionError
from dittune.heads import HeadSet
from dittune.kernels.diagonal_columns import diagonal_columns_attention
from dittune.method import Method
from dittune.run import ModelInputs, Run


class _Heads(NamedTuple):
    chosen: torch.Tensor  # int64 head numbers
    kept: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SoftPAG(Method):
    """Perturbed-attention guidance on chosen heads.

    Args:
        heads: `layer:head,layer:head`; `layer:*` is all heads of a layer, which is PAG.
        u: strength of the perturbation in [0, 1]; 0 leaves the map alone, 1 is the identity.
        scale: guidance scale `w`; the prediction becomes `pred + w (cond - perturbed)`.
        rows: which queries are perturbed: `all` tokens, or `image` tokens only.
        cols: which keys the identity replaces: `all`, or `image` only, so that an image token keeps
            its attention to the text and to itself (diffusers' own SD3 PAG); needs `rows="image"`.
        kind: kind of attention site the layers are counted in, `joint` or `self`; empty picks the
            one that the model has, joint first.
        batched: make the perturbed pass part of the same denoiser call. None: yes, unless that runs
            out of memory, then a call of its own for the rest of the generation.

    Raises:
        ConfigError: a value outside its range, or a head set that cannot be read.
        SelectionError: at `attach`, a layer or head the model does not have.
    """

    heads: str = ""
    u: float = 1.0
    scale: float = 3.0
    rows: str = "all"
    cols: str = "all"
    kind: str = ""
    batched: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", str(HeadSet(self.heads)))
        if not 0.0 <= self.u <= 1.0:
            raise ConfigError(f"softpag: u is in [0, 1], got {self.u}")
        if not math.isfinite(self.scale):
            raise ConfigError(f"softpag: scale is a finite number, got {self.scale}")
        for name in ("rows", "cols"):
            if getattr(self, name) not in ("all", "image"):
                raise ConfigError(
                    f"softpag: {name} is 'all' or 'image', got {getattr(self, name)!r}"
                )
        if self.cols == "image" and self.rows == "all":
            raise ConfigError("softpag: cols='image' needs rows='image'")
        if self.kind not in ("", "joint", "self"):
            raise ConfigError(f"softpag: kind is 'joint', 'self' or empty, got {self.kind!r}")

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or not self.heads or self.u == 0.0 or self.scale == 0.0

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        for kind in (self.kind,) if self.kind else ("joint", "self"):
            sites = [site for site in available if site.kind == kind]
            if sites:
                return HeadSet(self.heads).select(sites)
        kinds = ", ".join(sorted({site.kind for site in available}))
        raise SelectionError(
            f"softpag needs {self.kind or 'self'} attention; the model has {kinds}"
        )

    def site_state(self, site: Site, device: torch.device) -> _Heads:
        chosen = HeadSet(self.heads).at(site)
        kept = [head for head in range(site.heads) if head not in chosen]
        return _Heads(
            *(torch.tensor(part, dtype=torch.long, device=device) for part in (chosen, kept))
        )

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if "cond" not in inputs.roles:  # the unconditional call of a pipeline that makes two
            return model(inputs) + memory.delta
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
        """`(1-u) A V + u P V` on the chosen heads, without a map: with `P = I`, `P V` is `V`."""
        chosen, kept = call.state
        whole = self.rows == "all"
        if whole and self.u == 1.0:
            if kept.numel() == 0:
                return call.value
            return call.value.index_copy(1, kept, proceed(call.take_heads(kept)))
        out = proceed(call)
        first, last = (0, call.query.shape[2]) if whole else call.layout.image
        if self.cols == "image":
            goal = _self_and_text(call.take_heads(chosen))
        else:
            goal = call.value.index_select(1, chosen)[:, :, first:last]
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

    def report(self, run: Run) -> dict[str, Any]:
        memory = run.memory(self)
        calls = getattr(memory, "calls", 0)
        return {
            "heads": len(HeadSet(self.heads)),
            "perturbed_passes": calls,
            "batched": bool(calls) and not memory.separate,
        }


def _self_and_text(call: AttnCall) -> torch.Tensor:
    """Image rows attend to themselves and the text only, `[B, H, image, D]`."""
    image, text = slice(*call.layout.image), slice(*call.layout.text)
    return diagonal_columns_attention(
        call.query[:, :, image],
        call.key[:, :, image],
        call.value[:, :, image],
        call.key[:, :, text],
        call.value[:, :, text],
        call.options.get("scale"),
    )
