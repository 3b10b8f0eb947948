"""A word counts more, or less, wherever the picture looks at it.

Source: "Prompt-to-Prompt Image Editing with Cross Attention Control" (arXiv 2208.01626), its
attention re-weighting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError, SelectionError
from dittune.method import Method
from dittune.run import ModelInputs
from dittune.words.cond_core import with_core
from dittune.words.tokens import PromptWords, parse_concepts, words_of_pictures


@dataclass(frozen=True, kw_only=True)
class Reweight(Method):
    """Multiply the attention of the picture to words, each by its own factor.

    Probabilities are not normalised again, so it is the words' values that are multiplied, and no
    map is formed. Only image rows of the conditional rows are changed.

    Args:
        weights: `large:2, red:0.5`; a word may be a phrase, and is written `dog#2` for its second
            occurrence. 1 changes nothing, 0 hides the word, below 0 turns away from it.

    Raises:
        ConfigError: weights that cannot be read; while generating, a word that is not in the
            prompt, or no prompt at all.
        SelectionError: at `attach`, no attention to text.

    Differs: in joint attention the other words see a word as before.
    """

    weighs_words: ClassVar[bool] = True

    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_weights(self.weights)

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or all(w == 1 for w in parse_weights(self.weights).values())

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        for kind in ("joint", "cross"):
            if sites := [site for site in available if site.kind == kind]:
                return sites
        raise SelectionError("reweight needs attention to text (joint or cross); there is none")

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if "cond" in inputs.roles and not hasattr(memory, "factors"):
            weights = parse_weights(self.weights)
            asked = [(word,) for word in weights]
            found = words_of_pictures(inputs, asked, lambda prompt: (), self.name)
            sample = inputs.kwargs[inputs.batched[0]]
            memory.factors = text_factors(found, tuple(weights.values()), sample)
        return model(inputs)

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        return with_core(self._core, call, proceed)

    def _core(self, core: Callable[[AttnCall], torch.Tensor], call: AttnCall) -> torch.Tensor:
        """The model's attention core, with the words' values multiplied for the image rows."""
        call = call._replace(core=core)
        rows, queries = call.chunk_of("cond"), call.query.shape[2]
        if rows is None:
            return core(call)
        factors, begin = call.run.memory(self).factors, call.layout.text[0]
        value = call.value.clone()
        value[slice(*rows), :, begin : begin + factors.shape[2]] *= factors.to(value)
        changed = call._replace(value=value)
        first, last = call.layout.image
        parts = [core(call.take_queries(0, first))] if first else []
        parts.append(core(changed.take_queries(first, last)))
        if last < queries:
            parts.append(core(call.take_queries(last, queries)))
        return torch.cat(parts, 2)


def text_factors(
    found: Sequence[PromptWords], weights: Sequence[float], like: torch.Tensor
) -> torch.Tensor:
    """What each text token is multiplied by, `[pictures, 1, T, 1]` with none named beyond `T`.

    Args:
        found: the words of each picture.
        weights: one a word; a token of two words gets the product.
        like: of the type and on the device that are wanted.
    """
    most = 1 + max(max(tokens) for words in found for tokens in words.words)
    factors = like.new_ones(len(found), 1, most, 1)
    for row, words in zip(factors, found):
        for tokens, weight in zip(words.words, weights, strict=True):
            row[:, list(tokens)] *= weight
    return factors


def parse_weights(text: str) -> dict[str, float]:
    """`large:2, red:0.5` as `{"large": 2.0, "red": 0.5}`; "" is `{}`.

    Raises:
        ConfigError: it is not written like that, or names a word twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        word, _, number = part.rpartition(":")
        try:
            (word,) = parse_concepts(word)[0]
            weight = float(number)
        except (ConfigError, ValueError, IndexError):
            weight = math.nan
        if not math.isfinite(weight) or word in weights:
            raise ConfigError(
                f"reweight: weights are written like 'large:2, red:0.5', got {text!r}"
            )
        weights[word] = weight
    return weights
