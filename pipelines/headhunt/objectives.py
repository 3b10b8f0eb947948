"""What a search maximises: (images, prompts) -> one number an image, higher is better."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from dittune.errors import CheckpointError, ConfigError
from dittune.samples.shapes import score, world
from dittune.samples.shapes.score_video import score_video

Objective = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]

WARM = ("red", "orange", "yellow", "pink")

# name -> (weights, processor) on the hub; all are CLIP models that transformers loads
PREFERENCE_MODELS = {
    "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2": (None, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}


def shapes(
    made: Sequence[Image.Image | Sequence[Image.Image]], prompts: Sequence[str]
) -> list[float]:
    """Share of a prompt's questions that the Shapes scorer answers with yes; videos are frames.

    The questions: each object there with its colour and shape (in all frames, without a jump), each
    stated size, motion, relation and background, and nothing else there.
    """
    return [_share(one, prompt) for one, prompt in zip(made, prompts, strict=True)]


def _share(made: Image.Image | Sequence[Image.Image], prompt: str) -> float:
    if isinstance(made, Image.Image):
        found = score.score(_pixels(made), prompt)
        answers = (*found.objects, *found.sizes, found.relation, found.background)
    else:
        found = score_video([_pixels(frame) for frame in made], prompt)
        answers = (*found.kept, *found.sizes, *found.motions, found.background)
    given = [answer for answer in (*answers, found.extra == 0) if answer is not None]
    return sum(given) / len(given)


def warm(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Share of the object area that is red, orange, yellow or pink."""
    return [_area_share(image, lambda thing: thing.color in WARM) for image in images]


def large(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Share of the picture that objects cover."""
    found = (score.segment(_pixels(image))[1] for image in images)
    return [sum(thing.area for thing in things) / world.CANVAS**2 for things in found]


def white(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 where the background is white."""
    return [float(score.segment(_pixels(image))[0] == "white") for image in images]


SHAPES_OBJECTIVES = {"shapes": shapes, "warm": warm, "large": large, "white": white}


def load_objective(name: str, model: str | None = None, device: str = "cpu") -> Objective:
    """An objective by name.

    Args:
        name: `shapes`, `warm`, `large`, `white`; `clip`, `pickscore`, `hpsv2`; or a Python
            callable as `MODULE:FUNCTION`.
        model: folder or hub id of the weights of a CLIP-like objective instead of the usual one.

    Raises:
        ConfigError: there is no such objective or function.
        CheckpointError: the weights cannot be loaded.
    """
    if name in SHAPES_OBJECTIVES:
        return SHAPES_OBJECTIVES[name]
    if name in PREFERENCE_MODELS:
        return _Preference(name, model, device)
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join([*SHAPES_OBJECTIVES, *PREFERENCE_MODELS])
        raise ConfigError(f"unknown objective {name!r}; known: {known}, or MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # it may be anybody's module
        raise ConfigError(f"cannot import objective {name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"objective {name} is no function")
    return found


class _Preference:
    """Similarity of image and prompt by a CLIP model, times its learned scale.

    PickScore (arXiv 2305.01569) and HPS v2 (arXiv 2306.09341) are CLIP models trained on choices.
    """

    def __init__(self, name: str, model: str | None, device: str):
        from transformers import AutoModel, AutoProcessor

        weights, processor = PREFERENCE_MODELS[name]
        if model is None and weights is None:
            raise ConfigError(
                f"objective {name} has no weights that transformers can load on the hub; give a "
                "folder with --objective-model"
            )
        try:
            self.model = AutoModel.from_pretrained(model or weights, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(model or processor)
        except Exception as error:  # the hub and transformers raise what they like
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"cannot load objective {name}: {reason}") from error
        self.model.to(device).eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor(
            images=list(images),
            text=list(prompts),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
        )
        logits = self.model(**inputs.to(self.model.device)).logits_per_image
        return logits.diagonal().float().tolist()


def _area_share(image: Image.Image, wanted: Callable[[score.FoundObject], bool]) -> float:
    things = score.segment(_pixels(image))[1]
    area = sum(thing.area for thing in things)
    return sum(thing.area for thing in things if wanted(thing)) / area if area else 0.0


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))
