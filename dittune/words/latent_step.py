"""A gradient step on the latents before the denoiser call of a step, down a loss on maps of words.

The forward pass for the gradient has the conditional rows only, stops after the last map, and keeps
no gradient of a parameter. Its latents go to the denoiser call of the pipeline and, through the
seam of the scheduler, into the pipeline's own variable. The rows of a batch do not see each other,
so the gradient of the sum of the losses is the gradient of each picture's own loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.heads import parse_layers
from dittune.method import Method
from dittune.run import ModelInputs, Run
from dittune.scheduler_seam import takes_latents
from dittune.uncompiled import uncompiled
from dittune.words.attn_maps import MapMean, WordMaps, text_maps, word_maps, word_sites
from dittune.words.latent_inputs import checkpointed, frozen, latents_of, with_latents
from dittune.words.tokens import Concept, find_rivals, parse_concepts, words_of_pictures


class _LastMapSeen(Exception):
    """Ends a forward pass that is made for its maps only."""


@dataclass(frozen=True, kw_only=True)
class LatentStep(Method):
    """Moves the latents down the gradient of a loss on maps of words. Derive and give the loss.

    Args:
        concepts: `red+circle, blue+square`; empty finds the noun groups of each prompt, two or
            more. A picture without a concept is left alone.
        scale: step size; the step at a step of the generation is `scale` times the root of a line
            from 1 at its first step to 0.5 at its last.
        layers: whose maps are read, `3,5-7`, counted among the joint or cross layers; empty is the
            model's own choice. They must have one resolution.
        checkpointing: recompute blocks on the way back: more time, less memory where activations
            are large (at the size of SD 1.5 on 512 x 512 pixels it needs more).

    Raises:
        ConfigError: a value outside its range; while generating, a word that is not in the prompt,
            no prompt at all, or a gradient that is not finite.
        SelectionError: at `attach`, no attention to text, or layers the model does not have.

    Source: attend-and-excite (arXiv 2301.13826), whose step size its followers share.
    """

    concepts: str = ""
    scale: float = 20.0
    layers: str = ""
    checkpointing: bool = False

    changes_latents: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_concepts(self.concepts)
        parse_layers(self.layers)
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ConfigError(f"{self.name}: scale is a number from 0 on, got {self.scale}")

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or self.scale == 0.0

    # ------------------------------------------------------------- what a method has to say

    def find(self, prompt: str) -> Sequence[Concept]:
        """The concepts of a prompt when none are given."""
        return find_rivals(prompt)

    def loss(self, picture: WordMaps, before: Any) -> torch.Tensor:
        """Loss of one picture; `before` is what `remember` kept of the step before, or None."""
        raise NotImplementedError

    def remember(self, picture: WordMaps) -> Any:
        """What the next step needs of the maps of this one, after the update."""
        return None

    def measure(self, picture: WordMaps, before: Any) -> dict[str, torch.Tensor]:
        """Further numbers of one picture for the report, averaged over pictures and steps."""
        return {}

    def refinement(self, step: int, num_steps: int) -> tuple[int, float]:
        """Further updates at a step: at most how many, and the loss above which they are made."""
        return 0, 0.0

    # ------------------------------------------------------------- how it is done

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        return word_sites(available, parse_layers(self.layers), self.name)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        run = inputs.run
        memory = run.memory(self)
        if not hasattr(memory, "done"):
            memory.done, memory.updates, memory.before, memory.history = -1, 0, {}, []
            memory.watch = None
        if run.latents is not None:  # set by an earlier call of this step
            inputs = with_latents(inputs, run.latents)
        if "cond" not in inputs.roles:
            return model(inputs)
        if not hasattr(memory, "words"):
            memory.words = words_of_pictures(
                inputs, parse_concepts(self.concepts), self.find, self.name
            )
            memory.last = self.sites(run.host.facts.sites(run.host.model))[-1]
        if not any(words.concepts for words in memory.words):
            return model(inputs)
        if memory.done != run.step and takes_latents(run.host.pipe.scheduler):
            memory.done = run.step
            run.latents = self._moved(inputs, model)
            inputs = with_latents(inputs, run.latents)
        memory.watch = MapMean()
        prediction = model(inputs)
        self._look_back(run, memory.watch.take())
        memory.watch = None
        return prediction

    @torch.compiler.disable  # it looks at the site, and keeps what it sees
    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        memory = call.run.memory(self)
        own, cond = call.chunk_of(self), call.chunk_of("cond")
        if own is not None:
            memory.maps.add(text_maps(call.take_rows(*own)))
            if memory.may_stop and call.site == memory.last:
                raise _LastMapSeen
        elif cond is not None and memory.watch is not None:
            memory.watch.add(text_maps(call.take_rows(*cond)))
        return proceed(call)

    def _moved(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        """The latents of this step after all its updates."""
        run, memory = inputs.run, inputs.run.memory(self)
        branch = inputs.only("cond", named=self)
        given = latents_of(inputs)
        latents = given.to(torch.promote_types(given.dtype, torch.float32))
        size = self.scale * math.sqrt(1 - 0.5 * run.step / max(run.num_steps - 1, 1))
        most, enough = self.refinement(run.step, run.num_steps)
        for i in range(most + 1):
            losses, gradient = self._gradient(branch, latents, model)
            if i == 0:
                memory.history.append(SimpleNamespace(before=losses, after=None, more={}))
            chosen = losses > enough
            is_last = i == most or not chosen.any()
            if is_last:
                chosen = torch.ones_like(chosen)
            chosen = chosen.reshape(-1, *[1] * (latents.ndim - 1))
            latents = torch.where(chosen, latents - size * gradient, latents)
            memory.updates += 1
            if is_last:
                break
        return latents.to(given.dtype)

    def _gradient(
        self,
        branch: ModelInputs,
        latents: torch.Tensor,
        model: Callable[[ModelInputs], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each picture `[B]` and its gradient, shaped as the latents."""
        if torch.is_inference_mode_enabled():
            raise ConfigError(f"{self.name} needs gradients; use torch.no_grad, no inference_mode")
        memory, host = branch.run.memory(self), branch.run.host
        memory.maps = MapMean()
        latents = latents.detach().requires_grad_()
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen(host.model))
            if self.checkpointing:
                stack.enter_context(checkpointed(host.model))
            # A block that is computed again must run to its end, as it did before.
            memory.may_stop = not getattr(host.model, "is_gradient_checkpointing", False)
            with suppress(_LastMapSeen):
                model(with_latents(branch, latents))
            losses = self._losses(memory, memory.maps.take())
            (gradient,) = torch.autograd.grad(losses.sum(), latents)
        if not gradient.isfinite().all():
            raise ConfigError(
                f"{self.name}: the gradient is not finite in {host.model.dtype}; "
                "use bfloat16 or float32"
            )
        return losses.detach(), gradient

    def _losses(self, memory: SimpleNamespace, maps: torch.Tensor) -> torch.Tensor:
        """`[B]`; 0 for a picture without a concept."""
        return torch.stack(
            [
                self.loss(self._picture(memory, maps, i), memory.before.get(i))
                if words.concepts
                else maps[i].sum() * 0
                for i, words in enumerate(memory.words)
            ]
        )

    def _picture(self, memory: SimpleNamespace, maps: torch.Tensor, i: int) -> WordMaps:
        return word_maps(maps[i], memory.words[i], memory.last.kind)

    def _look_back(self, run: Run, maps: torch.Tensor) -> None:
        """Take down what the updates have done, and what the next step needs."""
        memory = run.memory(self)
        pictures = {
            i: self._picture(memory, maps, i)
            for i, words in enumerate(memory.words)
            if words.concepts
        }
        if memory.done == run.step:
            record = memory.history[-1]
            record.after = self._losses(memory, maps)
            more = [self.measure(p, memory.before.get(i)) for i, p in pictures.items()]
            record.more = {
                key: torch.stack([numbers[key] for numbers in more if key in numbers]).mean()
                for key in dict.fromkeys(key for numbers in more for key in numbers)
            }
        memory.before = {i: self.remember(picture) for i, picture in pictures.items()}

    def report(self, run: Run) -> dict[str, Any]:
        """Mean loss over pictures and steps, before and after the updates, and `measure`."""
        memory = run.memory(self)
        history = getattr(memory, "history", [])
        report: dict[str, Any] = {"updates": getattr(memory, "updates", 0)}
        if history:
            for name in ("before", "after"):
                losses = torch.stack([getattr(record, name) for record in history])
                report[f"loss_{name}"] = losses.mean().item()
        for key in dict.fromkeys(key for record in history for key in record.more):
            numbers = [record.more[key] for record in history if key in record.more]
            report[key] = torch.stack(numbers).mean().item()
        return report
