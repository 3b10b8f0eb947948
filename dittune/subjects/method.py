"""The base of methods in which pictures of one call look at each other's subjects.

The first pictures of the batch are references; the others are targets, and may take keys and values
from them. Everything here is bookkeeping: who is in which picture, where, and what each sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.heads import parse_layers
from dittune.method import Method
from dittune.run import ModelInputs, Run
from dittune.subjects.boxes import on_grid
from dittune.subjects.masks import Masks, masks_from_maps, read_masks
from dittune.subjects.row_groups import PicturePlan, attend_by_plans
from dittune.words.attn_maps import MapMean, text_maps, word_sites
from dittune.words.tokens import parse_concepts, words_of_pictures

SEED = 411  # of the tokens that are kept


@dataclass(frozen=True, kw_only=True)
class SubjectMethod(Method):
    """Derive from it and say what a picture sees: `plan`.

    Args:
        subjects: `red circle, blue square`, phrases of the prompts; the words of one may stand
            apart, `red+circle`. A picture shows those that its prompt names.
        references: how many pictures of the call, the first ones, are references.
        masks: where the subjects are: a folder of `PICTURE-SUBJECT.png`, counted from 0, or boxes
            `x0,y0,x1,y1: SUBJECT @PICTURE; ...`. Empty: from the model's own attention to the
            words, the mean of the steps so far, so that nothing is shared at the first step.
        layers: where keys are shared, `3,5-7`, counted among the joint layers, or the self layers
            of a model without joint ones; empty is all joint layers, or the later half of the self
            layers.
        keep: share of the shared tokens that are kept, drawn anew at each step.
        bias: added to the logits of the shared tokens; 2.0 lets them count 7 times as much.
        cover: how much of a token a subject must cover to have it, relative to the token it covers
            most. Near 1 the tokens at its edge, which hold the background too, are left out.

    Raises:
        ConfigError: a value outside its range; while generating, what `read_masks` raises, as many
            references as pictures, a subject that no reference names, or no prompt.
        SelectionError: at `attach`, layers the model does not have.

    Pictures must be made in one call. Passes over single pictures, as in the gradient steps of
    other methods, are left alone. List these methods last: what follows them sees chosen keys only.
    """

    chooses_keys: ClassVar[bool] = True
    masks_of_targets: ClassVar[bool] = True  # whether it must be known where subjects are in them

    subjects: str = ""
    references: int = 1
    masks: str = ""
    layers: str = ""
    keep: float = 0.5
    bias: float = 0.0
    cover: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.layers)
        names = self.labels
        if len(set(names)) < len(names):
            raise ConfigError(f"{self.name}: a subject is given twice in {self.subjects!r}")
        if self.masks and not names:
            raise ConfigError(f"{self.name}: masks say where subjects are; name those in subjects")
        if self.references < 0:
            raise ConfigError(f"{self.name}: references is a number of pictures")
        for name in ("keep", "cover"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{self.name}: {name} is in [0, 1], got {getattr(self, name)}")
        if not math.isfinite(self.bias):
            raise ConfigError(f"{self.name}: bias is a finite number, got {self.bias}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The subjects as `PromptWords` labels them."""
        return tuple(" ".join(concept) for concept in parse_concepts(self.subjects))

    @property
    def changes_keys(self) -> bool:
        """Whether references are looked at."""
        return self.references > 0 and self.keep > 0

    def needs_masks(self) -> bool:
        """Whether the places of the subjects matter."""
        return bool(self.labels)

    def plan(
        self, picture: int, call: AttnCall, masks: Masks, shares: bool, draw: torch.Generator
    ) -> PicturePlan | None:
        """What a picture sees; None leaves it alone.

        Args:
            masks: of each picture on the grid of this call, bool `[S, h, w]`, apart.
            shares: whether this is a site where references are looked at.
            draw: for `keep`.
        """
        raise NotImplementedError

    def sharing(self, available: Sequence[Site]) -> list[Site]:
        """The sites where references are looked at."""
        for kind in ("joint", "self"):
            sites = [site for site in available if site.kind == kind]
            if sites:
                break
        else:
            raise SelectionError(f"{self.name} needs joint or self attention; the model has none")
        layers = parse_layers(self.layers)
        missing = [layer for layer in layers if layer >= len(sites)]
        if missing:
            raise SelectionError(
                f"{self.name}: the model has no {kind} layer {missing[0]}; it has "
                f"0..{len(sites) - 1}"
            )
        first = 0 if kind == "joint" else len(sites) // 2
        return [s for s in sites if (s.layer in layers if layers else s.layer >= first)]

    def acting(self, available: Sequence[Site]) -> list[Site]:
        """The sites at which `plan` is asked."""
        return self.sharing(available)

    def watching(self, available: Sequence[Site]) -> list[Site]:
        """The sites whose maps of words say where the subjects are."""
        if self.masks or not self.needs_masks():
            return []
        return word_sites(available, (), self.name)

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        wanted = {*self.acting(available), *self.watching(available)}
        return [site for site in available if site in wanted]

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        run, memory = inputs.run, inputs.run.memory(self)
        if not hasattr(memory, "pictures"):
            if "cond" not in inputs.roles:
                return model(inputs)
            self._begin(inputs, memory)
        if getattr(memory, "step", None) != run.step:
            memory.step, memory.plans = run.step, {}
        memory.layer_maps = MapMean()
        prediction = model(inputs)
        if memory.watching and "cond" in inputs.roles:
            memory.maps.append(memory.layer_maps.take())
            memory.maps[:] = [sum(memory.maps)]  # Otsu's threshold does not need the mean
            memory.masks = masks_from_maps(memory.maps[0], memory.words, self.labels, memory.kind)
        return prediction

    def _begin(self, inputs: ModelInputs, memory: Any) -> None:
        run = inputs.run
        name = inputs.batched[0]
        memory.pictures = len(inputs.only("cond").kwargs[name])
        if self.changes_keys and self.references >= memory.pictures:
            raise ConfigError(
                f"{self.name}: references={self.references}, but the call makes {memory.pictures} "
                "pictures; pass the prompts of the references first, then at least one more"
            )
        available = run.host.facts.sites(run.host.model)
        memory.sharing = {*self.sharing(available)} if self.changes_keys else set()
        memory.acting = {*self.acting(available)}
        memory.watching = {*self.watching(available)}
        memory.maps, memory.masks, memory.words = [], None, []
        if not self.needs_masks():
            return
        asked = parse_concepts(self.subjects)
        memory.words = words_of_pictures(inputs, (), lambda prompt: asked, self.name)
        named = [[label in words.labels for label in self.labels] for words in memory.words]
        for index, label in enumerate(self.labels):
            if self.changes_keys and not any(has[index] for has in named[: self.references]):
                raise ConfigError(
                    f"{self.name}: no prompt of the {self.references} references names {label!r}; "
                    "name it in one, in the same words"
                )
        if self.masks:
            if not self.masks_of_targets:
                nobody = [False] * len(self.labels)
                named = [has if i < self.references else nobody for i, has in enumerate(named)]
            layouts = run.host.facts.layouts(run.host.model, inputs.kwargs)
            grid = next(iter(layouts.values())).grid[1:]
            memory.masks = read_masks(self.masks, self.labels, named, grid)

    @torch.compiler.disable  # shapes depend on where the subjects are
    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        memory = call.run.memory(self)
        count = call.query.shape[0] // len(call.roles)
        if getattr(memory, "pictures", None) != count:
            return proceed(call)
        rows = call.chunk_of("cond")
        if call.site in memory.watching and rows is not None:
            memory.layer_maps.add(text_maps(call.take_rows(*rows)))
            memory.kind = call.site.kind
        if call.site not in memory.acting or (self.needs_masks() and memory.masks is None):
            return proceed(call)
        shares = call.site in memory.sharing
        key = (call.site.kind, call.site.stage, call.key.shape[2], shares)
        if key not in memory.plans:
            memory.plans[key] = self._plans(call, memory, shares)
        return attend_by_plans(call, memory.plans[key], proceed)

    def _plans(self, call: AttnCall, memory: Any, shares: bool) -> list[PicturePlan]:
        grid = call.layout.grid[1:]
        masks = memory.masks if self.needs_masks() else []
        masks = [on_grid(own, *grid, self.cover) for own in masks]
        draw = torch.Generator().manual_seed(SEED + call.run.step)
        plans = [self.plan(i, call, masks, shares, draw) for i in range(memory.pictures)]
        memory.masked = [int(own.sum()) for own in masks]
        device = call.query.device
        return [plan.to(device) for plan in plans if plan is not None]

    def kept(self, tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """The tokens, bool of any shape, without those that are not kept this time."""
        return tokens & (torch.rand(tokens.shape, generator=draw) < self.keep)

    def report(self, run: Run) -> dict[str, Any]:
        """How many tokens of each picture the subjects had at the last step."""
        memory = run.memory(self)
        return {"pictures": getattr(memory, "pictures", 0), "masked": getattr(memory, "masked", [])}


def image_rows(layout: TokenLayout, length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Image tokens, bool `[N]`, as rows of a sequence of `length`, bool."""
    first, last = layout.image
    rows = torch.zeros(length, dtype=torch.bool)
    rows[first:last] = tokens
    return rows
