"""What a method sees of one attention call: values, and slices of rows and heads.

Shape letters: `B` batch rows, `H` heads, `Sq`/`Skv` query/key tokens, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Role = object  # "uncond", "cond", or the method whose extra branch it is


@dataclass(frozen=True)
class Site:
    """One place of a model where attention is computed.

    Attributes:
        layer: position in execution order among the sites of the same `kind`.
        kind: `joint` (text and image in one sequence), `self`, `cross` or `temporal`.
        name: module path inside the denoiser, for messages.
        heads: number of attention heads.
        stage: how often the grid has been halved on the way here; 0 outside of U shapes.
        shows_words: its maps of single words are sharp; methods that read such maps take it first.
    """

    layer: int
    kind: str
    name: str
    heads: int
    stage: int = 0
    shows_words: bool = False

    def __str__(self) -> str:
        return f"{self.kind} layer {self.layer} ({self.name}, {self.heads} heads)"


class TokenLayout(NamedTuple):
    """Which tokens of a sequence are image and which are text.

    At a `cross` site `image` counts in the queries and `text` in the keys.

    Attributes:
        image: first and one-past-last token of the picture that is being made.
        text: first and one-past-last text token; equal where there is no text.
        grid: image tokens as `(frames, height, width)`, slow to fast.
        references: tokens of reference pictures, behind all others.
        is_masked: the model hides the padding at the end of the text; then there are no references.
    """

    image: tuple[int, int]
    text: tuple[int, int]
    grid: tuple[int, int, int]
    references: int = 0
    is_masked: bool = False


class TextAxis(NamedTuple):
    """Where the tokens of one tokenizer are on the model's text axis.

    Attributes:
        tokenizer: a fast tokenizer of transformers, which knows the characters of each token.
        argument: the pipeline argument whose text it reads, e.g. `prompt_2`.
        first: first token on the text axis.
        length: number of tokens, those of the padding included.
    """

    tokenizer: Any
    argument: str
    first: int
    length: int


class AttnCall(NamedTuple):
    """One call of the attention core, after projections, norms and rotary embedding.

    Attributes:
        query: `[B, H, Sq, D]`.
        key: `[B, H, Skv, D]`.
        value: `[B, H, Skv, D]`.
        options: further keyword arguments of the model's own core (mask, scale, back-end).
        roles: what the equal chunks of the batch are, in row order, e.g. `("uncond", "cond")`.
        layout: where text and image tokens are.
        site: which attention this is. Do not read it inside compiled code: a value that differs by
            layer costs one compilation a layer. Put tensors into `state` instead.
        state: what the method's own `site_state` returned for this site.
        core: the model's own attention core; `proceed` ends in it.
        run: the generation this call belongs to.
        repeats: how many equal text tokens the last text token stands for; `core` knows of it, a
            method that computes attention by itself adds the log of it to that key's logit.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]
    roles: tuple[Role, ...]
    layout: TokenLayout
    site: Site
    state: Any
    core: Callable[[AttnCall], torch.Tensor]
    run: Any
    repeats: int = 1

    def chunk_of(self, role: Role) -> tuple[int, int] | None:
        """First and one-past-last batch row of a role, or None if the batch has no such rows."""
        return rows_of(role, self.roles, self.query.shape[0])

    def take_rows(self, first: int, last: int) -> AttnCall:
        """The call for batch rows `first..last` only; they must be whole chunks."""
        size = self.query.shape[0] // len(self.roles)
        options = self.options
        mask = options.get("attn_mask")
        if mask is not None and mask.ndim > 2 and mask.shape[0] > 1:
            options = {**options, "attn_mask": mask[first:last]}
        return self._replace(
            query=self.query[first:last],
            key=self.key[first:last],
            value=self.value[first:last],
            options=options,
            roles=self.roles[first // size : last // size],
        )

    def take_pictures(self, pictures: Sequence[int]) -> AttnCall:
        """The call for the rows of some pictures only, in every role's chunk."""
        count = self.query.shape[0] // len(self.roles)
        rows = [i * count + picture for i in range(len(self.roles)) for picture in pictures]
        options, mask = self.options, self.options.get("attn_mask")
        if mask is not None and mask.ndim > 2 and mask.shape[0] > 1:
            options = {**options, "attn_mask": mask[rows]}
        return self._replace(
            query=self.query[rows], key=self.key[rows], value=self.value[rows], options=options
        )

    def take_queries(self, first: int, last: int) -> AttnCall:
        """The call for query tokens `first..last` only, for a core: the layout is not adapted."""
        options, mask = self.options, self.options.get("attn_mask")
        if mask is not None and mask.shape[-2] > 1:
            options = {**options, "attn_mask": mask[..., first:last, :]}
        return self._replace(query=self.query[:, :, first:last], options=options)

    def take_heads(self, index: torch.Tensor) -> AttnCall:
        """The call for some heads only, `index` an int64 tensor of head numbers."""
        options = self.options
        mask = options.get("attn_mask")
        if mask is not None and mask.ndim > 3 and mask.shape[1] > 1:
            options = {**options, "attn_mask": mask.index_select(1, index)}
        return self._replace(
            query=self.query.index_select(1, index),
            key=self.key.index_select(1, index),
            value=self.value.index_select(1, index),
            options=options,
        )


def rows_of(role: Role, roles: tuple[Role, ...], batch: int) -> tuple[int, int] | None:
    """First and one-past-last row of `role` in a batch made of equal chunks, one a role."""
    for i, other in enumerate(roles):
        if other is role or (isinstance(role, str) and other == role):
            size = batch // len(roles)
            return i * size, (i + 1) * size
    return None
