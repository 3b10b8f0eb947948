"""The base of methods that put an attention core of their own into chosen layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.heads import parse_layers
from dittune.method import Method
from dittune.run import Run

GEOMETRIES = 8  # of which one method keeps what it has built, for each kind of site

Core = Callable[[AttnCall], torch.Tensor]


class Built:
    """What a method has built for the sites of one kind, by geometry; the oldest is dropped."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, ...], Any] = {}

    def get(self, layout: TokenLayout, build: Callable[[], Any]) -> Any:
        """What was built for a layout; now, if it was not."""
        key = key_of(layout)
        if key not in self.at:
            if len(self.at) >= GEOMETRIES:
                del self.at[next(iter(self.at))]
            self.at[key] = build()
        return self.at[key]


@functools.lru_cache(maxsize=64)
def built_by(method: Method, *which: Hashable) -> Built:
    """Shared by all generations with equal settings, so that compiled code meets no new object."""
    return Built()


def key_of(layout: TokenLayout) -> tuple[int, ...]:
    """A layout as plain numbers, which compiled code may look up."""
    return (*layout.image, *layout.text, *layout.grid, layout.references, layout.is_masked)


@dataclass(frozen=True, kw_only=True)
class CoreMethod(Method):
    """Derive from it and compute attention in `core`.

    Args:
        dense_layers: layers that stay as they are, such as `0,3-5`; the others are changed.

    Raises:
        ConfigError: layers that cannot be read.
        SelectionError: at `attach`, no attention among image tokens.
    """

    replaces_attention: ClassVar[bool] = True

    dense_layers: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.dense_layers)

    def core(self, stock: Core, state: Any, call: AttnCall) -> torch.Tensor:
        """Attention of a call with as many keys as queries, `[B, H, S, D]`.

        Args:
            stock: the core that would be called otherwise.
            state: what `site_state` returned.
            call: the call.
        """
        raise NotImplementedError

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        dense = parse_layers(self.dense_layers)
        joint = any(site.kind == "joint" for site in available)
        found = [s for s in available if s.kind in (("joint", "self") if joint else ("self",))]
        if not found:
            raise SelectionError(f"{self.name} needs joint or self attention; the model has none")
        if missing := [n for n in dense if all(site.layer != n for site in found)]:
            raise SelectionError(f"{self.name}: dense_layers names layer {missing[0]}; not there")
        return [site for site in found if site.layer not in dense]

    def attend(self, call: AttnCall, proceed: Core) -> torch.Tensor:
        return proceed(call._replace(core=functools.partial(self._core, call.core, call.state)))

    def _core(self, stock: Core, state: Any, call: AttnCall) -> torch.Tensor:
        """Where a method asks for a few queries only, these see all."""
        if call.query.shape[2] != call.key.shape[2]:
            return stock(call)
        return self.core(stock, state, call)

    def computed(
        self, run: Run, share: float | dict[tuple[str, str], float], dense_steps: int = 0
    ) -> float:
        """Share of the pairs of image tokens computed in a generation, all layers and steps.

        Args:
            run: the generation.
            share: of them, where the method acts; one number, or one by kind and stage of the site.
            dense_steps: steps at which it acts, but leaves attention dense.
        """
        sites = run.host.facts.sites(run.host.model)
        own = self.sites(sites)
        kinds = {site.kind for site in own}
        every = sum(_pairs(run, site) for site in sites if site.kind in kinds)
        spared = 0.0
        for site in own:
            here = share[site.kind, site.stage] if isinstance(share, dict) else share
            spared += _pairs(run, site) * (1 - here)
        acts = sum(self.acts_at(step, run.num_steps) for step in range(run.num_steps))
        return 1 - spared / every * max(0, acts - dense_steps) / max(run.num_steps, 1)

    def real_text(self, call: AttnCall) -> torch.Tensor | None:
        """How many of the first text tokens are no padding, int `[B]`; None without a mask.

        Raises:
            ConfigError: the mask is not one of the text's padding.
        """
        mask = call.options.get("attn_mask")
        if mask is None:
            return None
        last = call.key.shape[2]
        if mask.dtype != torch.bool or mask.shape[-2] != 1 or mask.shape[-1] != last:
            raise ConfigError(
                f"{self.name}: expected a mask of the text's padding, bool [B, 1, 1, {last}], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        return mask[..., slice(*call.layout.text)].sum(-1).flatten()


def _pairs(run: Run, site: Site) -> int:
    """Of image tokens at a site."""
    first, last = run.layouts[site.kind, site.stage].image
    return (last - first) ** 2
