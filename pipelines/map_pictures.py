"""Heat maps: where in a picture each concept of its prompt was looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

import dittune
from dittune.call import AttnCall, Site
from dittune.pipelines.media import grid
from dittune.run import ModelInputs
from dittune.words.attn_maps import MapMean, text_maps, word_maps, word_sites
from dittune.words.tokens import find_concepts, parse_concepts, words_of_pictures

HOT = np.array([255.0, 40.0, 0.0])  # colour of the highest attention
COVER = 0.75  # how much of the picture it covers there


@dataclass(frozen=True, kw_only=True)
class WatchWords(dittune.Method):
    """Sees the maps of concepts and changes nothing.

    Args:
        concepts: as of the methods for prompt fidelity; empty finds the noun groups.

    Attributes:
        seen: of the last generation, for each picture: label and map `[h, w]` of each concept, the
            mean over steps and layers.
    """

    concepts: str = ""
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list, compare=False, repr=False)

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        return word_sites(available, (), "the maps of words")

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        if "cond" not in inputs.roles:
            return model(inputs)
        memory = inputs.run.memory(self)
        if not hasattr(memory, "words"):
            asked = parse_concepts(self.concepts)
            memory.words = words_of_pictures(inputs, asked, find_concepts, "showing maps")
            memory.steps = MapMean()
        memory.layers = MapMean()
        prediction = model(inputs)
        memory.steps.add(memory.layers.take())
        return prediction

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        rows = call.chunk_of("cond")
        if rows is not None:
            memory = call.run.memory(self)
            memory.layers.add(text_maps(call.take_rows(*rows)))
            memory.kind = call.site.kind
        return proceed(call)

    def report(self, run: Any) -> dict[str, Any]:
        """Nothing for the record; the maps go into `seen`."""
        memory = run.memory(self)
        self.seen.clear()
        for maps, words in zip(memory.steps.take(), memory.words, strict=True):
            picture = word_maps(maps, words, memory.kind)
            groups = [sorted({t for word in c for t in word}) for c in words.concepts]
            found = picture.of(groups).cpu() if groups else ()
            self.seen.append(dict(zip(words.labels, found, strict=True)))
        return {}


def overlay(image: Image.Image, values: torch.Tensor) -> Image.Image:
    """A picture with a map `[h, w]` over it, from its lowest value (nothing) to its highest."""
    low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp_min(1e-12)).float().numpy()
    heat = Image.fromarray(scaled).resize(image.size, Image.Resampling.BILINEAR)
    share = COVER * np.asarray(heat)[..., None]
    mixed = (1 - share) * np.asarray(image.convert("RGB"), dtype=np.float64) + share * HOT
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def sheet(image: Image.Image, maps: dict[str, torch.Tensor]) -> Image.Image:
    """The picture, then the picture under the map of each concept."""
    pictures = [image.convert("RGB"), *(overlay(image, values) for values in maps.values())]
    return grid(pictures, len(pictures), ["picture", *maps], scale=2 if image.width < 256 else 1)
