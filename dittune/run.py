"""The state of one generation, and the inputs of one denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from dittune.call import Role, TokenLayout, rows_of


class Host(NamedTuple):
    """What the generation runs on: the pipeline (None for a bare denoiser), denoiser and facts."""

    pipe: Any
    model: Any
    facts: ModuleType


class Run:
    """Everything that changes during one generation. Made at its start, dropped at its end.

    Attributes:
        step: index of the current denoising step, from 0.
        num_steps: number of steps, 0 until the first denoiser call.
        calls: number of denoiser calls the pipeline has made in this step.
        roles: what the chunks of the current batch are.
        roles_at: those of the pipeline's own calls of the denoiser, by `calls` and rows.
        layouts: token layout of the current denoiser call, by kind and stage of site.
        rows_apart: rows of the current batch where the model attends one at a time; else 0.
        rows_done: how many of them each site, by name, has attended.
        host: what it runs on, known from the first denoiser call on.
        pictures: number of pictures in each chunk, 0 until the first denoiser call.
        arguments: of the pipeline's call, by name.
        prompts: the prompt of each picture, by pipeline argument (`prompt`, `prompt_2`, ...); empty
            if the pipeline was given none.
        latents: what this step starts from instead of the pipeline's own latents, of the same shape
            and type; None leaves those. Only for methods with `changes_latents`.
        unscaled: the latents of this step as the pipeline gave them to the scheduler for scaling;
            None if it does not scale.
        scale: how the scheduler turns latents into the sample of this step.
        scheduler: a copy of the pipeline's from before the first step. Only for methods with
            `makes_pictures`.
    """

    def __init__(self, num_steps: int = 0):
        self.step = 0
        self.num_steps = num_steps
        self.calls = 0
        self.roles: tuple[Role, ...] = ()
        self.roles_at: dict[tuple[int, int], tuple[str, ...]] = {}
        self.layouts: dict[tuple[str, int], TokenLayout] = {}
        self.rows_apart = 0
        self.rows_done: dict[str, int] = {}
        self.host: Host | None = None
        self.pictures = 0
        self.arguments: dict[str, Any] = {}
        self.prompts: dict[str, list[str]] = {}
        self.latents: torch.Tensor | None = None
        self.unscaled: torch.Tensor | None = None
        self.scale: Callable[[torch.Tensor], torch.Tensor] = as_it_is
        self.scheduler: Any = None
        self._memory: dict[int, SimpleNamespace] = {}

    def expect(self, facts: ModuleType, model: Any, kwargs: dict[str, Any]) -> None:
        """Get ready for one denoiser call."""
        self.layouts = facts.layouts(model, kwargs)
        if getattr(facts, "ROWS_APART", False):
            self.rows_apart, self.rows_done = len(kwargs[facts.BATCHED[0]]), {}

    def memory(self, method: object) -> SimpleNamespace:
        """What a method wants to remember until the end of this generation."""
        key = id(method)
        if key not in self._memory:  # compiled code can read one, but cannot make one
            self._memory[key] = SimpleNamespace()
        return self._memory[key]


def as_it_is(latents: torch.Tensor) -> torch.Tensor:
    """The scale of a scheduler that does not scale."""
    return latents


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of one denoiser call, whose batch is made of equal chunks, one for each role.

    Attributes:
        kwargs: the denoiser's arguments by name.
        roles: what the chunks are, in row order.
        batched: names in `kwargs` whose first axis is the batch, the sample's first: tensors, or
            lists and dicts of tensors.
        run: the generation this call belongs to.
    """

    kwargs: dict[str, Any]
    roles: tuple[Role, ...]
    batched: tuple[str, ...]
    run: Run

    def rows(self, role: Role, batch: int) -> slice:
        """Rows of a role in a batch of `batch` rows."""
        found = rows_of(role, self.roles, batch)
        if found is None:
            raise KeyError(f"no {role!r} rows in a batch of {self.roles}")
        return slice(*found)

    def only(self, role: Role, named: Role | None = None) -> ModelInputs:
        """The call with the rows of one role, which may get another name."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[self.rows(role, tensor.shape[0])]

        return replace(self, kwargs=self._map(take), roles=(role if named is None else named,))

    def take(self, rows: Sequence[int]) -> ModelInputs:
        """The call with some rows of the batch only, as many of every role."""
        return replace(self, kwargs=self._map(lambda tensor: tensor[rows]))

    def plus(self, role: Role, like: Role) -> ModelInputs:
        """The call with one more chunk at the end, a copy of the rows of `like`."""

        def extend(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor[self.rows(like, tensor.shape[0])]])

        return replace(self, kwargs=self._map(extend), roles=(*self.roles, role))

    def _map(self, change) -> dict[str, Any]:
        kwargs = dict(self.kwargs)
        batch = len(kwargs[self.batched[0]])

        def over(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(over(item) for item in value)
            if isinstance(value, dict):
                return {key: over(item) for key, item in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            broadcasts = value.ndim == 0 or len(value) == 1 < batch  # one timestep for all rows
            return value if broadcasts else change(value)

        for name in self.batched:
            if name in kwargs:
                kwargs[name] = over(kwargs[name])
        return kwargs
