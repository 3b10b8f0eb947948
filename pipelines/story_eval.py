"""Do subjects stay the same? Marks that no prompt names, from references to scenes, by method.

A story is a reference of each subject and one scene with all of them, in the Shapes world, all on
one background. Its marks are in no prompt, so only the references can tell them. The plain pictures
are segmented exactly to give every method the same masks.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dittune.errors import ConfigError
from dittune.method import Method
from dittune.methods.isolation import Isolation
from dittune.methods.merge_padding import MergePadding
from dittune.methods.shared_attention import SharedAttention
from dittune.pipelines.evaluate import PeakMemory
from dittune.pipelines.media import grid
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import RowLog
from dittune.pipelines.segment import shapes, write_masks
from dittune.pipelines.story import phrase_of, with_subjects
from dittune.samples.shapes import score_marks, world

PLAIN = "none"
MOST_SUBJECTS = 4  # as in the scenes of the world
STORY_SEED = 808  # of the stories; pictures have seeds of their own


@dataclass(frozen=True)
class SubjectRow:
    """One subject of one scene.

    Attributes:
        prompt, seed: of the scene, and of the first reference.
        count: how many subjects it has.
        readable: whether the reference shows the subject, and so its mark.
        found: whether the scene shows it.
        kept: whether it does so with the mark of the reference.
        fused: objects of the scene in the colour of a subject that are not of its shape.
        distance: between its centres in the plain reference and the plain scene, in sides; nan if
            one of them is missing.
        seconds, peak_mib: of the call that made references and scene.
    """

    variant: str
    prompt: str
    seed: int
    count: int
    subject: str
    readable: bool
    found: bool
    kept: bool
    fused: int
    distance: float
    seconds: float
    peak_mib: float


def variants(shared: SharedAttention, both: Isolation) -> dict[str, tuple[Method, ...]]:
    """The methods that are compared, by label; the first is the baseline."""
    return {
        PLAIN: (),
        "shared_attention": (shared,),
        "isolation": (dataclasses.replace(both, reposition=False),),
        "reposition": (dataclasses.replace(both, isolate=False),),
        "both": (both,),
    }


def stories(split: str, each: int, counts: Sequence[int] = (2, 3, 4)) -> Iterator[list[str]]:
    """The subjects of `each` stories of every number of subjects, of one split of the world.

    Raises:
        ConfigError: there is no such split, or no stories of so many subjects.
    """
    if split not in world.SPLITS:
        raise ConfigError(f"stories are of {', '.join(world.SPLITS)}, got {split!r}")
    if not counts or any(not 1 <= count <= MOST_SUBJECTS for count in counts):
        raise ConfigError(f"a story has 1 to {MOST_SUBJECTS} subjects, got {[*counts]}")
    rng = np.random.default_rng(STORY_SEED)
    for count in counts:
        for _ in range(each):
            kinds = world.sample_kinds(rng, count, split)
            yield [world.article(f"{color} {shape}") for color, shape in kinds]


def scene_prompt(subjects: Sequence[str]) -> str:
    """A caption with all the subjects."""
    return " and ".join(filter(None, (", ".join(subjects[:-1]), subjects[-1])))


def evaluate_stories(
    pipeline: Pipeline,
    compared: Mapping[str, tuple[Method, ...]],
    told: Sequence[Sequence[str]],
    out: Path,
    **settings,
) -> list[SubjectRow]:
    """Make every story under every variant, and read what the scenes show.

    Args:
        out: folder for `subjects.csv`, by which it resumes, and `stories.png`, the newest story.
        settings: of each call.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = RowLog(out / "subjects.csv", SubjectRow)
    rows = log.read()
    done = {(row.variant, row.prompt, row.seed) for row in rows}
    for number, subjects in enumerate(tqdm(told, desc="stories", unit="story")):
        tale = Tale(tuple(subjects), number)
        todo = [v for v in compared if (v, tale.prompt, tale.seed) not in done]
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            plain = tale.make(pipeline, (), subjects, settings)
            phrases = {phrase_of(subject): subject for subject in subjects}
            seen = [phrases[p] for p in write_masks(Path(folder), plain, list(phrases), shapes)]
            pictures = []
            for label in todo:
                methods = with_subjects(compared[label], seen, folder)
                started = time.perf_counter()
                with PeakMemory() as memory:
                    made = tale.make(pipeline, methods, seen, settings)
                cost = round(time.perf_counter() - started, 4), round(memory.mib, 1)
                shown = dict(zip(subjects, plain[:-1], strict=True))
                shown |= dict(zip(seen, made[:-1], strict=True))
                new = [_judge(label, tale, one, shown[one], made[-1], plain, cost)
                       for one in subjects]  # fmt: skip
                log.append(new)
                rows += new
                pictures += [*shown.values(), made[-1]]
        names = [f"{label}: {what}" for label in todo for what in (*subjects, tale.prompt)]
        grid(pictures, len(subjects) + 1, names).save(out / "stories.png")
    prompts = {Tale(tuple(subjects), number).prompt for number, subjects in enumerate(told)}
    return [row for row in rows if row.prompt in prompts and row.variant in compared]


class Tale(NamedTuple):
    """One story: reference `i` has seed `seed + i`, the scene the one after them."""

    subjects: tuple[str, ...]
    number: int

    @property
    def seed(self) -> int:
        return 1000 * self.number

    @property
    def prompt(self) -> str:
        return self.placed(scene_prompt(self.subjects))

    def placed(self, prompt: str) -> str:
        """The prompt with the background of the story."""
        names = [*world.BACKGROUNDS]
        return f"{prompt} on {world.article(names[self.number % len(names)])} background"

    def make(
        self, pipeline: Pipeline, methods: Sequence[Method], shown: Sequence[str], settings
    ) -> list[Image.Image]:
        """The references of the subjects that are `shown`, then the scene."""
        pipeline.methods = [MergePadding(), *methods]
        seeds = [self.seed + self.subjects.index(subject) for subject in shown]
        seeds.append(self.seed + len(self.subjects))
        prompts = [*(self.placed(subject) for subject in shown), self.prompt]
        return pipeline(prompts, seed=seeds, progress=False, **settings).images


def _judge(label, tale: Tale, subject: str, reference, scene, plain, cost) -> SubjectRow:
    (named,) = world.parse(subject).objects
    before, after, was, would = (
        _find(picture, named)
        for picture in (reference, scene, plain[tale.subjects.index(subject)], plain[-1])
    )
    kinds = {(o.color, o.shape) for o in world.parse(tale.prompt).objects}
    colors = {color for color, _ in kinds}
    found = score_marks.segment(_pixels(scene))[1]
    moved = math.hypot(was.x - would.x, was.y - would.y) / world.CANVAS if was and would else None
    return SubjectRow(
        variant=label,
        prompt=tale.prompt,
        seed=tale.seed,
        count=len(tale.subjects),
        subject=subject,
        readable=before is not None,
        found=after is not None,
        kept=before is not None and after is not None and after.mark == before.mark,
        fused=sum(f.color in colors and (f.color, f.shape) not in kinds for f in found),
        distance=math.nan if moved is None else round(moved, 4),
        seconds=cost[0],
        peak_mib=cost[1],
    )


def _find(picture: Image.Image, named: world.NamedObject) -> score_marks.MarkedObject | None:
    kind = named.color, named.shape
    found = score_marks.segment(_pixels(picture))[1]
    return next((thing for thing in found if (thing.color, thing.shape) == kind), None)


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))
