"""SoftPAG as a guider of diffusers' modular pipelines, beside classifier-free guidance.

Classic pipelines use `attach`; a modular pipeline calls its denoiser once for each branch, and a
guider says which branches there are and how their predictions are combined.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import nn

from dittune.methods.softpag import SoftPAG
from dittune.models import facts_for
from dittune.run import Run
from dittune.seam import Link, make_processor, stock_attention

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_perturbed"


class SoftPAGGuidance(BaseGuidance):
    """`uncond + g (cond - uncond) + w (cond - perturbed)`.

    For `pipe.update_components(guider=SoftPAGGuidance(heads="2:1,3:0", scale=3.0))`. Outside of the
    perturbed forward pass the denoiser is untouched, also after an error in it. `heads`, `first`,
    `perturbation`, `u`, `sigma`, `temperature`, `rows`, `cols` and `kind` are those of `SoftPAG`.

    Args:
        guidance_scale: `g`, of classifier-free guidance; 1 is off.
        scale: `w`; 0 is off.
        perturbed_start: share of the steps after which heads are perturbed.
        perturbed_stop: share of the steps after which they no longer are.
        guidance_rescale: of `rescale_noise_cfg` (arXiv 2305.08891, section 3.4).
        start: share of the steps after which classifier-free guidance begins.
        stop: share of the steps after which it ends.

    Raises:
        ConfigError: a setting of SoftPAG outside its range.
        SelectionError: in the first step, a head the denoiser does not have.
    """

    _input_predictions = [COND, UNCOND, PERTURBED]  # noqa: RUF012, diffusers reads it as a list

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        heads: str = "",
        first: int | None = None,
        perturbation: str = "identity",
        u: float = 1.0,
        sigma: float = 2.0,
        temperature: float = 4.0,
        scale: float = 3.0,
        rows: str = "all",
        cols: str = "all",
        kind: str = "",
        perturbed_start: float = 0.0,
        perturbed_stop: float = 1.0,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.method = SoftPAG(
            heads=heads,
            first=first,
            perturbation=perturbation,
            u=u,
            sigma=sigma,
            temperature=temperature,
            scale=scale,
            rows=rows,
            cols=cols,
            kind=kind,
            start=perturbed_start,
            stop=perturbed_stop,
        )
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self._perturbed: _PerturbedPass | None = None

    # ------------------------------------------------------------------ which branches

    @property
    def _branches(self) -> list[str]:
        """The forward passes of the current step, in order."""
        branches = [COND]
        if self._acts(self._start, self._stop) and not math.isclose(self.guidance_scale, 1.0):
            branches.append(UNCOND)
        if self._acts(self.method.start, self.method.stop) and not self.method.is_neutral:
            branches.append(PERTURBED)
        return branches

    def _acts(self, start: float, stop: float) -> bool:
        steps = self._num_inference_steps
        return self._enabled and (steps is None or start <= self._step / steps < stop)

    @property
    def num_conditions(self) -> int:
        return len(self._branches)

    @property
    def is_conditional(self) -> bool:
        return self._branches[self._count_prepared - 1] != UNCOND

    def prepare_inputs(self, data: dict[str, Any]) -> list:
        return [self._prepare_batch(data, int(b == UNCOND), b) for b in self._branches]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list:
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(b == UNCOND), b)
            for b in self._branches
        ]

    # ------------------------------------------------------------------ the passes

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._count_prepared += 1
        if self._branches[self._count_prepared - 1] != PERTURBED:
            return
        if self._perturbed is None or not self._perturbed.fits(denoiser):
            self._perturbed = _PerturbedPass(denoiser, self.method)
        self._perturbed.begin()

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._perturbed is not None:
            self._perturbed.end()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_perturbed: torch.Tensor | None = None,
    ) -> GuiderOutput:
        pred = pred_cond
        if pred_uncond is not None:
            pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_cond_perturbed is not None:
            pred = pred + self.method.scale * (pred_cond - pred_cond_perturbed)
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class _PerturbedPass:
    """Puts perturbing processors into a denoiser for the length of one forward pass."""

    def __init__(self, denoiser: nn.Module, method: SoftPAG):
        self.denoiser, self.method = denoiser, method
        self.inner = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile wrapped
        self.facts = facts_for(self.inner)
        self.signature = inspect.signature(type(self.inner).forward)
        self.run = Run()
        self.run.roles = (method,)
        self.places: list[tuple[nn.Module, object, object]] = []  # module, stock, ours
        for site in method.sites(self.facts.sites(self.inner)):
            module = self.inner.get_submodule(site.name)
            calls = self.facts.CORE_CALLS.get(type(module.processor).__name__)
            ours = make_processor(module.processor, site, calls)
            ours.installed.run = self.run
            self.places.append((module, module.processor, ours))
        self.device: torch.device | None = None
        self.hooks: list = []

    def fits(self, denoiser: nn.Module) -> bool:
        """Whether this was made for the processors that the denoiser has now."""
        stock = (module.processor is stock for module, stock, _ in self.places)
        return self.denoiser is denoiser and all(stock)

    def begin(self) -> None:
        for module, _, ours in self.places:
            module.processor = ours
        self.hooks = [
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(lambda *_: self.end(), always_call=True),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self.signature.bind(self.inner, *args, **kwargs).arguments
        self.run.expect(self.facts, self.inner, inputs)
        device = inputs[self.facts.BATCHED[0]].device
        if device == self.device:
            return
        self.device = device
        for _, _, ours in self.places:
            state = self.method.site_state(ours.installed.site, device)
            ours.installed.chain = Link(self.method, state, stock_attention)

    def end(self) -> None:
        """Once more does nothing."""
        for hook in self.hooks:
            hook.remove()
        for module, stock, ours in self.places:
            if module.processor is ours:
                module.processor = stock
        self.hooks = []
