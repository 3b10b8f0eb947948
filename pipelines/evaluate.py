"""Prompts x seeds x variants -> scored images. What `dittune eval` runs.

Every variant makes the same prompts with the same seeds, so variants are compared image by image.
No two images of a variant share a seed: how well a picture turns out hangs on the noise it began
with, and a table of 200 prompts with the same 2 seeds would be one of 2 noises.
Each batch is appended to `images.csv` as it is scored; the same command run again makes only what
is missing there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from dittune.errors import ConfigError
from dittune.method import Method
from dittune.pipelines.arguments import guidance, read_lines
from dittune.pipelines.headhunt.objectives import Objective
from dittune.pipelines.media import table
from dittune.pipelines.pipeline import Pipeline, Result
from dittune.pipelines.row_log import RowLog
from dittune.pipelines.scorers import PICTURES, Scorer
from dittune.pipelines.team import Team
from dittune.samples.shapes.prompts import PROMPT_SETS, prompt_set

GRID_PROMPTS = 8  # columns of the picture grid


@dataclass(frozen=True)
class Variant:
    """A row of the table: a label and the methods it stands for (none: the plain model).

    `guidance_scale` overrides that of the other variants.
    """

    label: str
    methods: tuple[Method, ...] = ()
    guidance_scale: float | None = None


@dataclass(frozen=True)
class ImageScore:
    """One scored image or video. `success` is everything the prompt asks for and nothing else.

    `objective` is a further score, nan if none was asked for; `flicker` is of videos only.
    `computed` is the share of the pairs of image tokens that a sparse method computed, else nan.
    """

    variant: str
    prompt: str
    seed: int
    num_objects: int
    success: bool
    objects_right: bool
    stated_right: bool
    extra: int
    objective: float
    seconds: float
    peak_mib: float
    flicker: float = math.nan
    computed: float = math.nan


def load_prompts(
    name_or_file: str,
    limit: int | None = None,
    objects: Sequence[int] = (),
    scorer: Scorer = PICTURES,
) -> list[str]:
    """A named prompt set, or a file with one prompt a line.

    Args:
        limit: take about this many, spread evenly over the set.
        objects: only prompts that name so many objects; all if empty.
        scorer: that of pictures, or of videos, which has prompts of its own.

    Raises:
        ConfigError: neither a set nor a file, no prompt in it, or one the scorer cannot read.
    """
    if name_or_file in PROMPT_SETS:
        try:
            prompts = list(prompt_set(name_or_file, scorer.modality))
        except ValueError as error:
            raise ConfigError(f"{error}, for a {scorer.modality} model") from error
    elif Path(name_or_file).is_file():
        prompts = read_lines(Path(name_or_file))
    else:
        raise ConfigError(f"no prompt set or file {name_or_file!r}; sets: {', '.join(PROMPT_SETS)}")
    counts = {}
    for prompt in prompts:
        try:
            counts[prompt] = len(scorer.parse(prompt).objects)
        except ValueError as error:
            raise ConfigError(f"the Shapes scorer cannot judge a prompt: {error}") from error
    if objects:
        prompts = [prompt for prompt in prompts if counts[prompt] in objects]
    if not prompts:
        named = f" with {' or '.join(map(str, objects))} objects" if objects else ""
        raise ConfigError(f"{name_or_file} holds no prompt{named}")
    if limit is not None and limit < len(prompts):
        prompts = [prompts[int(i)] for i in np.linspace(0, len(prompts) - 1, limit)]
    return prompts


def with_seeds(prompts: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """Each prompt `seeds` times, every time with another seed, and none twice: 0, 1, 2, ..."""
    return [(prompt, seed) for seed, prompt in enumerate(list(prompts) * seeds)]


def evaluate(
    pipeline: Pipeline,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    seeds: int,
    out: Path,
    batch: int = 8,
    objective: Objective | None = None,
    scorer: Scorer = PICTURES,
    **settings,
) -> list[ImageScore]:
    """Score every prompt x seed under every variant.

    Args:
        pipeline: its own `methods` are replaced by each variant's.
        seeds: images a prompt; each has a seed of its own, see `with_seeds`.
        out: folder for `images.csv` (of further processes `images.1.csv`, ...) and `grid.png`.
        batch: images made in one call.
        objective: (images, prompts) -> one more score an image.
        scorer: that of pictures, or of videos.
        settings: passed to the pipeline (`num_inference_steps`, `guidance_scale`, ...).

    Returns:
        All scores, those of an earlier run included.
    """
    out.mkdir(parents=True, exist_ok=True)
    team = Team()
    log = RowLog(team.own(out / "images.csv"), ImageScore)
    paths = team.logs(out / "images.csv") if team.rank == 0 else []
    read = (score for path in paths for score in RowLog(path, ImageScore).read())
    scores = team.gather([*{(s.variant, s.prompt, s.seed): s for s in read}.values()])
    done = {(s.variant, s.prompt, s.seed) for s in scores}
    wanted = with_seeds(prompts, seeds)
    todo = {v.label: [w for w in wanted if (v.label, *w) not in done] for v in variants}
    total = sum(map(len, todo.values()))
    made: list[ImageScore] = []
    with tqdm(total=total, desc="eval", unit="image", disable=team.rank > 0) as bar:
        for variant in variants:
            for jobs in team.share(list(_chunks(todo[variant.label], batch))):
                new = _score_batch(pipeline, variant, jobs, objective, scorer, settings)
                log.append(new)
                made += new
                bar.update(len(jobs) * team.size)
    scores += team.gather(made)
    if team.rank == 0:
        _write_grid(pipeline, variants, wanted[: len(prompts)], out, scorer, settings)
    asked = set(wanted)
    asked_scores = [s for s in scores if s.variant in todo and (s.prompt, s.seed) in asked]
    return sorted(asked_scores, key=lambda s: list(todo).index(s.variant))


def _make(pipeline, variant: Variant, prompts, seeds, settings) -> Result:
    pipeline.methods = list(variant.methods)
    if variant.guidance_scale is not None:
        own = {name: settings[name] for name in settings if name == "negative_prompt"}
        settings = {**settings, **guidance(pipeline.pipe, variant.guidance_scale), **own}
    return pipeline(prompts, seed=seeds, progress=False, **settings)


def _score_batch(
    pipeline, variant: Variant, jobs, objective, scorer: Scorer, settings
) -> list[ImageScore]:
    prompts, seeds = [list(column) for column in zip(*jobs, strict=True)]
    started = time.perf_counter()
    with PeakMemory() as memory:
        result = _make(pipeline, variant, prompts, seeds, settings)
    seconds, images = (time.perf_counter() - started) / len(jobs), result.images
    shares = [said["computed"] for said in result.record["report"].values() if "computed" in said]
    further = objective(images, prompts) if objective else [math.nan] * len(images)
    found = []
    for prompt, seed, image, value in zip(prompts, seeds, images, further, strict=True):
        found.append(
            ImageScore(
                variant=variant.label,
                prompt=prompt,
                seed=seed,
                objective=float(value),
                seconds=round(seconds, 4),
                peak_mib=round(memory.mib, 1),
                computed=round(min(shares, default=math.nan), 4),
                **scorer.judge(image, prompt)._asdict(),
            )
        )
    return found


class PeakMemory:
    """Highest memory in use inside the block: of the CUDA device if there is one, else resident."""

    def __enter__(self) -> PeakMemory:
        self.mib = 0.0
        self._stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.02):
            self.mib = max(self.mib, process.memory_info().rss / 2**20)

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if torch.cuda.is_available():
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            self._thread.join()


def _chunks(items: list, size: int) -> Iterator[list]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _write_grid(pipeline, variants, wanted, out: Path, scorer, settings) -> None:
    """One row a variant, the same prompts and seeds in every row."""
    columns = [wanted[int(i)] for i in np.linspace(0, len(wanted) - 1, GRID_PROMPTS)]
    chosen, seeds = [list(column) for column in zip(*columns, strict=True)]
    pictures = []
    for variant in variants:
        made = _make(pipeline, variant, chosen, seeds, settings).images
        pictures += [scorer.show(image) for image in made]
    table(pictures, [variant.label for variant in variants], chosen).save(out / "grid.png")
