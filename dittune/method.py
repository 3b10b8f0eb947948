"""The base class of every method: frozen settings and three places to act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.run import ModelInputs, Run

NUMBERS = {"int": Integral, "float": Real}  # by annotation


@dataclass(frozen=True, kw_only=True)
class Method:
    """An attention control method. Derive from it, override what the method needs, nothing else.

    Args:
        start: share of the denoising steps after which the method begins to act, in [0, 1].
        stop: share of the steps after which it no longer acts, in [start, 1].

    Raises:
        ConfigError: `start` and `stop` are not ordered shares, or a setting that is a number by its
            annotation, `int` or `float`, is none.
    """

    start: float = 0.0
    stop: float = 1.0

    # What a method does that others must know of; `together.py` says why.
    replaces_attention: ClassVar[bool] = False  # at most one such method may act at a site
    weighs_words: ClassVar[bool] = False  # has its own core for the attention to words
    chooses_keys: ClassVar[bool] = False  # what follows sees single pictures and chosen keys
    merges_text: ClassVar[bool] = False  # what follows sees fewer words
    changes_latents: ClassVar[bool] = False  # before a step, through `run.latents`

    def __post_init__(self) -> None:
        for field in fields(self):
            kind = str(getattr(field.type, "__name__", field.type))  # a class, or its name
            value, known = getattr(self, field.name), NUMBERS.get(kind)
            if known and not (isinstance(value, known) and type(value) is not bool):
                raise ConfigError(f"{self.name}: {field.name} is {kind}, got {value!r}")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ConfigError(
                f"{self.name}: start and stop are shares of the steps with 0 <= start <= stop <= 1,"
                f" got start={self.start}, stop={self.stop}"
            )

    @property
    def name(self) -> str:
        """Registry key: the name of the file that defines the method."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def is_neutral(self) -> bool:
        """True if these settings change nothing; the method is then not installed at all."""
        return self.start == self.stop

    @property
    def makes_pictures(self) -> bool:
        """Whether the denoiser is called for pictures that nobody asked for."""
        return False

    def acts_at(self, step: int, num_steps: int) -> bool:
        """Whether step `step` (from 0) of `num_steps` is inside `start`..`stop`."""
        return self.start <= step / max(num_steps, 1) < self.stop

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        """The sites whose attention the method wants to see; raises SelectionError for none."""
        return available if type(self).attend is not Method.attend else ()

    def site_state(self, site: Site, device: torch.device) -> Any:
        """What `attend` needs to know of one site, as tensors on `device`; read as `call.state`."""
        return None

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        """Compute attention at one site, `[B, H, Sq, D]`; `proceed(call)` is what would be done."""
        return proceed(call)

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        """Call the denoiser, once or more; returns a prediction for every role of `inputs`."""
        return model(inputs)

    def on_step(self, run: Run, latents: torch.Tensor) -> torch.Tensor:
        """Change the latents after a step."""
        return latents

    def report(self, run: Run) -> dict[str, Any]:
        """What the method has to say of a finished generation, as plain values."""
        return {}
