"""Scale-DiT: local windows on a large picture, guided by a small one of the same scene.

First the model makes the small picture as usual. Its clean latents pass through the model once, at
timestep 0, each token seeing its near ones only; the keys and values it has at each site are what
the tokens of the large picture see besides the text and their own window.

Source: the repository PeterYYZhang/Scale-DiT; there the small picture is part of the sequence of
each step. As it sees neither text nor the large picture, one pass of its own is the same.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dittune.call import AttnCall, Role, TokenLayout
from dittune.errors import ConfigError
from dittune.patterns import Box, Plan, SameWindow, TokenOrder, best_order
from dittune.run import ModelInputs, Run
from dittune.scheduler_seam import starting_at, step_options, takes_latents
from dittune.sparse.method import SparseMethod
from dittune.sparse.plan import Place, Ready, choose_backend, image_plan
from dittune.uncompiled import uncompiled

Model = Callable[[ModelInputs], torch.Tensor]

GUIDE_REACH = 2  # how far tokens of the small picture see each other
CONTROL = re.compile("controlnet|additional_residual")  # arguments of the size of the large picture


@dataclass(frozen=True, kw_only=True)
class ScaleDiT(SparseMethod):
    """Windows of image tokens, and a small picture that holds them together.

    Args:
        window: side of a window in tokens, a multiple of `factor`. A token sees half a window to
            each side, and of the small picture its own window and the ones before and after it.
        factor: how much smaller the sides of the small picture are.
        guide: make and use the small picture; without it only windows are left.

    Raises:
        ConfigError: a window that is no multiple of the factor; while generating, sides in tokens
            that are not, a denoiser without its pipeline, pictures made under a mask, or a method
            beside it that computes some heads apart.

    Differs: no LoRA for the small picture; the published one is trained with it. Models without
    rotary positions (SD3, UNets) see the small picture at its own positions. It starts from the
    noise of the large one, every `factor`-th token; under true guidance of FLUX it is made from the
    prompt alone.
    """

    window: int = 16
    factor: int = 4
    guide: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 2 or self.window < self.factor or self.window % self.factor:
            raise ConfigError(
                "scale_dit: factor is at least 2 and window a multiple of it, got "
                f"factor {self.factor}, window {self.window}"
            )

    @property
    def makes_pictures(self) -> bool:
        return self.guide

    def plan(self, place: Place) -> Plan:
        grid, reach = place.layout.grid, self.window // 2
        sides = [min(self.window, size) for size in grid[1:]]
        order = TokenOrder(grid, (1, *sides), pad_to=place.block)
        coarse = {}
        if self.guide:
            small = self._small_grid(grid)
            tile, its_tile = (1, self.window, self.window), (1, *[self.window // self.factor] * 2)
            seen = SameWindow(grid, tile, its_tile)
            coarse = {"guide": (TokenOrder(small, its_tile), seen)}
        return image_plan(place, Box(grid, (0, reach, reach)), order, coarse)

    def _small_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        if grid[0] > 1 or grid[1] % self.factor or grid[2] % self.factor:
            raise ConfigError(
                f"scale_dit: one picture with sides that are multiples of {self.factor} tokens, "
                f"got {grid}; choose another size or factor, or guide=False"
            )
        return 1, grid[1] // self.factor, grid[2] // self.factor

    def around_model(self, inputs: ModelInputs, model: Model) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if self.guide:
            if not hasattr(memory, "picture"):
                memory.kept, memory.pass_ = {}, "small picture"
                memory.picture = self._make(inputs, model)
            if any(_name(role) not in memory.kept for role in inputs.roles):
                memory.pass_ = "guide"
                timestep = torch.zeros_like(inputs.kwargs["timestep"])
                with uncompiled():
                    model(self._small(inputs, memory.picture, timestep, spread=self.factor))
        memory.pass_ = "picture"
        return super().around_model(inputs, model)

    def _make(self, inputs: ModelInputs, model: Model) -> torch.Tensor:
        """The small picture's clean latents, `[n, ...]`, by the plain model."""
        run, name = inputs.run, inputs.batched[0]
        if run.host.pipe is None:
            raise ConfigError("scale_dit: a small picture needs a pipeline; attach to that, or "
                              "set guide=False")  # fmt: skip
        if not hasattr(run.host.facts, "text_axes"):
            raise ConfigError("scale_dit: no small video is made first; set guide=False")
        layouts = run.host.facts.layouts(run.host.model, inputs.kwargs)
        for site in self.sites(run.host.facts.sites(run.host.model)):
            self._small_grid(layouts[site.kind, site.stage].grid)
        now = copy.deepcopy(run.host.pipe.scheduler)
        first = len(now.timesteps) - run.num_steps + run.step
        sample, time = inputs.kwargs[name], now.timesteps[first]
        latents = self._strided(inputs, sample[: len(sample) // len(inputs.roles)])
        if hasattr(now, "scale_model_input"):
            latents = latents / now.scale_model_input(torch.ones_like(latents), time)
        given = inputs.kwargs["timestep"]
        is_time = math.isclose(given.flatten()[0], time, rel_tol=0.01)  # FLUX wants thousandths
        ratio = 1 if is_time else 1 / now.config.num_train_timesteps
        first += not takes_latents(now)  # in the middle of a step of second order
        scheduler = starting_at(run.scheduler, first)
        options = step_options(run, scheduler)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
        for time in scheduler.timesteps[first:]:
            timestep = torch.full_like(given, float(time * ratio))
            small = self._small(inputs, scaled(latents, time), timestep, spread=1)
            parts = model(small).chunk(len(inputs.roles))
            found = {_name(role): part for role, part in zip(inputs.roles, parts, strict=True)}
            guess = found.get("cond", parts[0])
            if "uncond" in found and "cond" in found:
                scale = run.host.pipe.guidance_scale
                guess = torch.lerp(found["uncond"], found["cond"], scale)
            if guess.shape != latents.shape:
                raise ConfigError("scale_dit: the model's input has channels that are not made, "
                                  "of a mask or a picture; set guide=False")  # fmt: skip
            latents = scheduler.step(guess, time, latents, return_dict=False, **options)[0]
        return latents

    def _strided(self, inputs: ModelInputs, sample: torch.Tensor) -> torch.Tensor:
        """Every `factor`-th place of `[n, tokens, C]` or `[n, C, height, width]`."""
        step = self.factor
        if sample.ndim == 4:
            return sample[..., ::step, ::step]
        height, width = _grid(inputs)
        tokens = sample[:, : height * width].unflatten(1, (height, width))
        return tokens[:, ::step, ::step].flatten(1, 2)

    def _small(
        self, inputs: ModelInputs, latents: torch.Tensor, timestep: torch.Tensor, spread: int
    ) -> ModelInputs:
        """The call for a small picture, whose tokens are `spread` apart where ids tell."""
        kwargs = {k: v for k, v in inputs.kwargs.items() if not CONTROL.search(k)}
        kwargs[inputs.batched[0]] = latents.repeat(len(inputs.roles), *[1] * (latents.ndim - 1))
        kwargs["timestep"] = timestep
        if "img_ids" in kwargs:
            height, width = _grid(inputs)
            ids = kwargs["img_ids"]
            ids = (ids[0] if ids.ndim == 3 else ids)[: height * width].view(height, width, -1)
            _, rows, columns = self._small_grid((1, height, width))
            ids = ids[::spread, ::spread][:rows, :columns]
            kwargs["img_ids"] = ids.flatten(0, 1)
        return replace(inputs, kwargs=kwargs)

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        if not self.guide:
            return super().attend(call, proceed)
        return self._guided(call, proceed)

    @torch.compiler.disable  # keys are kept by layer
    def _guided(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        memory = call.run.memory(self)
        if memory.pass_ == "small picture":
            return proceed(call)
        if memory.pass_ == "picture":
            return super().attend(call, proceed)
        first, last = call.layout.image
        image = call._replace(
            query=call.query[:, :, first:last],
            key=call.key[:, :, first:last],
            value=call.value[:, :, first:last],
            repeats=1,
        )
        for i, role in enumerate(call.roles):
            size = len(call.key) // len(call.roles)
            rows = slice(i * size, (i + 1) * size)
            kept = memory.kept.setdefault(_name(role), {})
            kept[call.site.name] = image.key[rows], image.value[rows]
        ready = _near(call.layout.grid, call.site.heads, call.key.device, self.backend)
        if ready.backend == "plain":
            tensors, scale = (image.query, image.key, image.value), call.options.get("scale")
            out = scaled_dot_product_attention(*tensors, scale=scale)
        else:
            out = ready(image, call.options.get("scale"))
        # What the text does in this pass is not seen by anyone.
        return torch.cat([call.value[:, :, :first], out, call.value[:, :, last:]], 2)

    def extended(self, call: AttnCall) -> AttnCall:
        if not self.guide:
            return call
        kept = call.run.memory(self).kept
        pairs = [kept[_name(role)][call.site.name] for role in call.roles]
        key, value = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        if key.shape[1] != call.key.shape[1]:
            raise ConfigError("scale_dit: another method computes some heads apart; set "
                              "guide=False beside it")  # fmt: skip
        return call._replace(
            key=torch.cat([call.key, key], 2), value=torch.cat([call.value, value], 2)
        )

    def report(self, run: Run) -> dict[str, Any]:
        return super().report(run) | {"guide": hasattr(run.memory(self), "picture")}


def _near(grid: tuple[int, int, int], heads: int, device: torch.device, backend: str) -> Ready:
    """How tokens of the small picture see each other; small, and used once a generation."""
    tokens = grid[1] * grid[2]
    place = Place(TokenLayout((0, tokens), (tokens, tokens), grid), heads, device)
    pattern = Box(grid, (0, GUIDE_REACH, GUIDE_REACH))
    plan = image_plan(place, pattern, best_order(pattern, grid, place.block))
    return Ready(plan, place, choose_backend(plan, place, backend))


def _grid(inputs: ModelInputs) -> tuple[int, int]:
    """Rows and columns of the picture's tokens, where these are one sequence."""
    host = inputs.run.host
    (layout,) = host.facts.layouts(host.model, inputs.kwargs).values()
    return layout.grid[1:]


def _name(role: Role) -> str | int:
    return role if isinstance(role, str) else id(role)
