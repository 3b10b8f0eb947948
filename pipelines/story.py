"""Scenes with the same subjects: one picture a scene, made along with its references, resumable."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.method import Method
from dittune.pipelines.arguments import call_settings
from dittune.pipelines.generate import load
from dittune.pipelines.loading import fingerprint, public_name
from dittune.pipelines.media import grid, read_record, save_png
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import RowLog
from dittune.pipelines.scorers import check_readable
from dittune.pipelines.segment import Segmenter, load_segmenter, write_masks
from dittune.subjects.method import SubjectMethod

OWN_MAPS = "maps"  # masks from the model's own attention


@dataclass(frozen=True)
class SceneRow:
    """One scene that was made; `subjects` are those it could be given, joined by commas."""

    scene: int
    prompt: str
    seed: int
    subjects: str
    path: str
    seconds: float


def phrase_of(subject: str) -> str:
    """`a red circle` without its article, as scenes may say `the red circle`."""
    return re.sub(r"^(a|an|the)\s+", "", subject.strip(), flags=re.IGNORECASE)


def named_in(prompt: str, subjects: Sequence[str]) -> list[str]:
    """The subjects whose phrase is in a prompt."""
    found = []
    for subject in subjects:
        words = r"\s+".join(re.escape(word) for word in phrase_of(subject).split())
        if re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE):
            found.append(subject)
    return found


def with_subjects(
    methods: Sequence[Method], subjects: Sequence[str], masks: str = ""
) -> list[Method]:
    """The methods, those for subjects told of these, each with one reference.

    Without subjects those methods are left out.
    """
    told = []
    for method in methods:
        if isinstance(method, SubjectMethod):
            if not subjects:
                continue
            names = ", ".join(phrase_of(subject) for subject in subjects)
            method = dataclasses.replace(
                method, subjects=names, references=len(subjects), masks=masks or method.masks
            )
        told.append(method)
    return told


class Story:
    """References of the subjects, and scenes that show them.

    Args:
        config: model, methods, seed and settings of a call; its prompts are the scenes. Reference
            `i` has seed `seed + i`, scene `k` comes after all of them.
        subjects: prompts of the references, such as `a red circle`.
        masks: `maps`, or a segmenter: then each scene is first made without methods and segmented.
        out: gets `reference-I.png`, `scene-K.png`, `masks/K/`, `story.csv` and `story.png`.

    Raises:
        ConfigError: no subject or no scene, a subject given twice, or `out` holds pictures of other
            settings.
    """

    def __init__(self, config: RunConfig, subjects: Sequence[str], masks: str, out: Path):
        phrases = [phrase_of(subject).lower() for subject in subjects]
        if not subjects or not all(phrases):
            raise ConfigError("a story needs subjects; add --subject 'a red circle'")
        if len(set(phrases)) < len(phrases):
            raise ConfigError("a subject is given twice; name each once")
        if any("," in phrase or "+" in phrase for phrase in phrases):
            raise ConfigError("a subject is one phrase, without commas and plus signs")
        if not config.prompts:
            raise ConfigError("a story needs scenes; one a line in --scenes")
        one_line = [" ".join(prompt.split()) for prompt in config.prompts]
        self.config = dataclasses.replace(config, prompts=one_line)
        self.subjects, self.out = list(subjects), out
        if masks == "shapes":
            check_readable(config)
        self.segmenter: Segmenter | None = None if masks == OWN_MAPS else load_segmenter(masks)
        self.settings = {
            **dataclasses.asdict(config), "model": public_name(config.model), "prompts": [],
            "subjects": self.subjects, "masks": masks,
        }  # fmt: skip
        self.log = RowLog(out / "story.csv", SceneRow)
        self.weights = fingerprint(config.model)

    def path(self, name: str, i: int) -> Path:
        return self.out / f"{name}-{i:03d}.png"

    @property
    def references(self) -> list[Path]:
        """The picture of each subject."""
        return [self.path("reference", i) for i in range(len(self.subjects))]

    @property
    def sheet(self) -> Path:
        """All pictures on one."""
        return self.out / "story.png"

    def todo(self) -> list[int]:
        """The scenes still to be made; raises for pictures of other settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        done = {(row.scene, row.prompt, row.seed) for row in self.log.read()}
        left = []
        for k, prompt in enumerate(self.config.prompts):
            path = self.path("scene", k)
            if not path.exists():
                left.append(k)
                continue
            if (k, prompt, self.seed_of(k)) not in done:
                raise ConfigError(f"{path} was made with other settings; choose another --out")
        there = [self.path("scene", k) for k in range(len(self.config.prompts)) if k not in left]
        for path in [*there, *filter(Path.exists, self.references)]:
            record = read_record(path)
            if record.get("config") != self.settings or record.get("weights") != self.weights:
                raise ConfigError(f"{path} was made with other settings; choose another --out")
        return left

    def run(self, pipeline: Pipeline | None = None) -> Iterator[SceneRow]:
        """Make what is missing; yields each scene once it is on disk.

        Args:
            pipeline: with the methods of the configuration; None loads it.
        """
        todo = self.todo()
        if not todo and all(path.exists() for path in (*self.references, self.sheet)):
            return
        pipeline = pipeline or load(self.config)
        methods = pipeline.methods
        if not all(path.exists() for path in self.references):
            self._make_references(pipeline)
        for k in todo:
            yield self._scene(pipeline, methods, k)
        self._draw_sheet()

    def seed_of(self, scene: int) -> int:
        """The seed of a scene."""
        return self.config.seed + len(self.subjects) + scene

    def _make(self, pipeline: Pipeline, methods, subjects: Sequence[str], scene: int | None):
        """The pictures of some references, and of a scene; and the record of the call."""
        pipeline.methods = list(methods)
        prompts = list(subjects)
        seeds = [self.config.seed + self.subjects.index(subject) for subject in subjects]
        if scene is not None:
            prompts, seeds = (
                [*prompts, self.config.prompts[scene]], [*seeds, self.seed_of(scene)],
            )  # fmt: skip
        settings = call_settings(pipeline.pipe, self.config)
        return pipeline(prompts, seed=seeds, progress=False, **settings)

    def _make_references(self, pipeline: Pipeline) -> None:
        images = self._make(pipeline, (), self.subjects, None).images
        for i, (image, subject) in enumerate(zip(images, self.subjects, strict=True)):
            record = self._record(subject, self.config.seed + i, image)
            save_png(image, self.path("reference", i), record)

    def _scene(self, pipeline: Pipeline, methods: Sequence[Method], k: int) -> SceneRow:
        prompt = self.config.prompts[k]
        subjects, masks = named_in(prompt, self.subjects), ""
        if self.segmenter is not None and subjects:
            folder = self.out / "masks" / f"{k:03d}"
            pictures = self._make(pipeline, (), subjects, k).images
            phrases = {phrase_of(subject): subject for subject in subjects}
            found = write_masks(folder, pictures, list(phrases), self.segmenter)
            subjects, masks = [phrases[phrase] for phrase in found], str(folder)
        result = self._make(pipeline, with_subjects(methods, subjects, masks), subjects, k)
        image = result.images[-1]
        row = SceneRow(
            k, prompt, self.seed_of(k), ", ".join(subjects), self.path("scene", k).name,
            result.record["seconds"],
        )  # fmt: skip
        record = self._record(prompt, row.seed, image) | {"report": result.record["report"]}
        self.log.append([row])  # first: a picture without its row would be taken for another's
        save_png(image, self.path("scene", k), record)
        return row

    def _record(self, prompt: str, seed: int, image: Image.Image) -> dict[str, Any]:
        size = "{}x{}".format(*image.size)
        return {"prompt": prompt, "seed": seed, "size": size, "config": self.settings,
                "weights": self.weights}  # fmt: skip

    def _draw_sheet(self) -> None:
        """The references in one row, the scenes below."""
        texts = {"reference": self.subjects, "scene": self.config.prompts}
        opened = {
            name: [Image.open(self.path(name, i)).convert("RGB") for i in range(len(group))]
            for name, group in texts.items()
        }
        columns = min(max(len(self.subjects), len(self.config.prompts)), max(4, len(self.subjects)))
        blank = Image.new("RGB", opened["reference"][0].size, "white")
        fill = columns - len(self.subjects)
        images = [*opened["reference"], *[blank] * fill, *opened["scene"]]
        labels = [*self.subjects, *[""] * fill, *self.config.prompts]
        scale = 2 if images[0].width < 256 else 1
        grid(images, columns, labels, scale).save(self.sheet)
