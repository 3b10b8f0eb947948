"""Are named objects inside their boxes? Prompts of two objects, halves of a picture as regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dittune.errors import ConfigError
from dittune.methods.merge_padding import MergePadding
from dittune.methods.regions import Regions
from dittune.pipelines.eval_table import wilson
from dittune.pipelines.evaluate import load_prompts
from dittune.pipelines.pipeline import Pipeline
from dittune.samples.shapes import score, world

HALVES = ("0,0,0.5,1", "0.5,0,1,1"), ("0,0,1,0.5", "0,0.5,1,1")
LAYOUTS = [halves[::order] for halves in HALVES for order in (1, -1)]


def region_prompts(name: str, limit: int) -> list[str]:
    """Prompts of a set that name two objects and no relation, spread over it.

    Raises:
        ConfigError: there is none.
    """
    requests = {prompt: world.parse(prompt) for prompt in load_prompts(name, objects=[2])}
    fitting = [p for p, r in requests.items() if r.relation is None]
    if not fitting:
        raise ConfigError(f"{name} holds no prompt of two objects without a relation")
    picked = np.linspace(0, len(fitting) - 1, min(limit, len(fitting)))
    return [fitting[int(i)] for i in picked]


def regions_of(request: world.Request, layout: Sequence[str]) -> str:
    """The objects of a request, one in each box of a layout, as `Regions` takes them."""
    phrases = [" ".join(filter(None, (o.size, o.color, o.shape))) for o in request.objects]
    return "; ".join(f"{box}: {phrase}" for box, phrase in zip(layout, phrases, strict=True))


def evaluate_regions(
    pipeline: Pipeline, prompts: Sequence[str], variants: Sequence[Regions | None], **settings
) -> list[dict[str, Any]]:
    """One row a variant: share of objects inside their box, of those anywhere, of right pictures.

    Args:
        variants: methods whose `regions` are set here; None is the plain model.
        settings: of each call.
    """
    rows = []
    for variant in variants:
        inside, anywhere, right = [], [], []
        for i, prompt in enumerate(prompts):
            request, layout = world.parse(prompt), LAYOUTS[i % len(LAYOUTS)]
            pipeline.methods = [MergePadding()]
            if variant is not None:
                fields = {n: getattr(variant, n) for n in ("scale", "start", "stop")}
                pipeline.methods.append(Regions(regions=regions_of(request, layout), **fields))
            image = pipeline(prompt, seed=i, progress=False, **settings).images[0]
            picture = np.asarray(image.convert("RGB"))
            found = score.segment(picture)[1]
            right.append(score.score(picture, request).success)
            for named, box in zip(request.objects, layout, strict=True):
                kind = named.color, named.shape
                own = [f for f in found if (f.color, f.shape) == kind]
                anywhere.append(bool(own))
                inside.append(any(_is_in(thing, box) for thing in own))
        low, high = wilson(sum(inside), len(inside))
        rows.append({
            "variant": "none" if variant is None else f"scale={variant.scale} stop={variant.stop}",
            "objects": len(inside), "inside": float(np.mean(inside)), "low": low, "high": high,
            "anywhere": float(np.mean(anywhere)), "success": float(np.mean(right)),
        })  # fmt: skip
    return rows


def _is_in(thing: score.FoundObject, box: str) -> bool:
    x0, y0, x1, y1 = (float(number) * world.CANVAS for number in box.split(","))
    return x0 <= thing.x <= x1 and y0 <= thing.y <= y1


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    head = "| variant | objects | inside their box | anywhere | all as asked |\n"
    lines = [head, "|" + " --- |" * 5 + "\n"]
    for row in rows:
        inside, low, high, anywhere, success = (
            100 * row[key] for key in ("inside", "low", "high", "anywhere", "success")
        )
        lines.append(
            f"| {row['variant']} | {row['objects']} | {inside:.1f} ({low:.1f} to {high:.1f}) "
            f"| {anywhere:.1f} | {success:.1f} |\n"
        )
    return "".join(lines)
