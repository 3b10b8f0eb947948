"""Many candidates in one denoiser call: another set of perturbed heads for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dittune.call import AttnCall, Site
from dittune.heads import HeadSet
from dittune.methods.softpag import SoftPAG
from dittune.run import ModelInputs


@dataclass(frozen=True, kw_only=True)
class SoftPAGPerImage(SoftPAG):
    """SoftPAG with its own head set for each image of a batch.

    Args:
        per_image: a head set for each image; `heads` is their union and need not be given.
        twin_of: for each image, the first image with the same prompt and seed. In the first step
            twins still have equal latents, so the plain prediction is made once for all of them.
    """

    per_image: tuple[str, ...] = ()
    twin_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        pairs = dict.fromkeys(pair for text in self.per_image for pair in HeadSet(text).pairs)
        object.__setattr__(self, "heads", ",".join(f"{layer}:{head}" for layer, head in pairs))
        super().__post_init__()

    def site_state(self, site: Site, device: torch.device) -> torch.Tensor:
        """Which heads are perturbed in which image, float32 `[images, heads, 1, 1]`."""
        chosen = torch.zeros(len(self.per_image), site.heads, 1, 1)
        for image, heads in enumerate(self.per_image):
            chosen[image, HeadSet(heads).at(site)] = 1
        return chosen.to(device)

    def _perturb(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        out, goal = proceed(call), self._goal(call, proceed)
        first, last = self._rows(call)
        weight = self.u * call.state.to(out.dtype)
        mixed = torch.lerp(out[:, :, first:last], goal, weight)
        return torch.cat([out[:, :, :first], mixed, out[:, :, last:]], dim=2)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        singles = sorted(set(self.twin_of))
        images = len(self.twin_of)
        if inputs.run.step > 0 or len(singles) == images or "cond" not in inputs.roles:
            return super().around_model(inputs, model)
        chunks = range(len(inputs.roles))
        few = model(inputs.take([chunk * images + one for chunk in chunks for one in singles]))
        place = [singles.index(twin) for twin in self.twin_of]
        plain = few[[chunk * len(singles) + one for chunk in chunks for one in place]]
        perturbed = model(inputs.only("cond", named=self))
        return self._guided(inputs, plain, perturbed)
