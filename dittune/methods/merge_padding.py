"""Compute equal text tokens once: the same result from fewer tokens.

Models without positions on their text keep equal tokens equal through every block: the zero vectors
that stand for a missing T5 in SD3, or the padding of a text encoder that gives all of it one
vector. One of `n` such tokens is kept, and `log n` is added to its logit wherever it is a key, so
that every softmax stays what it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.method import Method
from dittune.run import ModelInputs, Run

TEXT, POSITIONS = "encoder_hidden_states", "txt_ids"
COUNTING = ("encoder_attention_mask", "encoder_hidden_states_image")  # by tokens of the text


@dataclass(frozen=True, kw_only=True)
class MergePadding(Method):
    """Merge the equal tokens at the end of the text; exact up to rounding.

    List it first, but after `attention_regulation` and `reweight`: methods after it see the shorter
    text. Where the last tokens differ it does nothing.

    Raises:
        ConfigError: while generating, if the model masks its attention already, or splits its text
            by a fixed length (Wan's image to video).
    """

    merges_text: ClassVar[bool] = True

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        return [site for site in available if site.kind in ("joint", "cross")]

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        memory.equal = count = _equal_at_the_end(inputs.kwargs)
        if count < 2:
            return model(inputs)
        kwargs = dict(inputs.kwargs)
        for name in COUNTING:
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"merge_padding: with {name} the model counts on the length of its text; "
                    "leave it out"
                )
        kept = kwargs[TEXT].shape[1] - count + 1
        kwargs[TEXT] = kwargs[TEXT][:, :kept]
        if kwargs.get(POSITIONS) is not None:
            kwargs[POSITIONS] = kwargs[POSITIONS][..., :kept, :]
        return model(replace(inputs, kwargs=kwargs))

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        count = call.run.memory(self).equal
        if count < 2:
            return proceed(call)
        core = functools.partial(_weighted, call.core, count)
        return proceed(call._replace(core=core, repeats=count))

    def report(self, run: Run) -> dict[str, Any]:
        return {"merged_tokens": getattr(run.memory(self), "equal", 0)}


def _weighted(core: Callable, count: int, call: AttnCall) -> torch.Tensor:
    """The core with `log count` added to the logit of the last text token.

    Methods after this one may have chosen other keys, and the layout says where the text is now.
    """
    mask = call.options.get("attn_mask")
    if mask is not None and (mask.dtype == torch.bool or mask.shape[:3] != (1, 1, 1)):
        raise ConfigError("merge_padding: the model masks its attention already; leave it out")
    bias = call.query.new_zeros(1, 1, 1, call.key.shape[2])
    bias[..., call.layout.text[1] - 1] = math.log(count)
    if mask is not None:
        bias = bias + mask
    return core(call._replace(options={**call.options, "attn_mask": bias}))


def _equal_at_the_end(kwargs: dict[str, Any]) -> int:
    """How many tokens at the end of every row's text are equal to its last one, positions too."""
    text = kwargs[TEXT]
    same = (text == text[:, -1:]).all(-1).all(0)  # (T,)
    positions = kwargs.get(POSITIONS)
    if positions is not None:
        positions = positions[0] if positions.ndim == 3 else positions
        same = same & (positions == positions[-1:]).all(-1)
    return int(same.flip(0).long().cumprod(0).sum())
