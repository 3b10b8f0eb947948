"""The tab for stories: the same subjects in several scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import dittune
from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines.demo import status
from dittune.pipelines.demo.controls import MethodPicker
from dittune.pipelines.demo.parts import (
    LANE,
    Buttons,
    CallSettings,
    Repeat,
    configuration,
    seed_row,
    strip,
    work_on,
)
from dittune.pipelines.demo.repeat import story_command, yaml_command
from dittune.pipelines.demo.studio import Studio
from dittune.pipelines.demo.works import Told, tell_story

SUBJECTS = "a red circle\na blue square"
SCENES = "a red circle and a blue square\nthe blue square above the red circle"
MASKS = ("maps", "shapes")  # never MODULE:FUNCTION, which would import what a visitor names


class StoryTab:
    """Its components and what its button does."""

    def __init__(self, studio: Studio, model: gr.Dropdown):
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.subjects = gr.Textbox(
                    SUBJECTS, label="Subjects", info="one a line; each gets a reference", lines=2
                )
                self.scenes = gr.Textbox(
                    SCENES, label="Scenes", info="one a line, in the words of the subjects", lines=3
                )
                self.masks = gr.Radio(
                    [("the model's own attention", "maps"), ("exact, for shapes only", "shapes")],
                    value="shapes" if model.value in dittune.available_checkpoints() else "maps",
                    label="Where the subjects are",
                )
                self.picker = MethodPicker(
                    model.value, ["isolation", "shared_attention"], "isolation",
                    hidden=("subjects", "references", "masks"), optional=False,
                )  # fmt: skip
                self.seed = seed_row(0)
                self.call = CallSettings(model.value)
                self.buttons = Buttons("Tell the story")
            with gr.Column(scale=3, min_width=320):
                self.line = gr.HTML(status.IDLE)
                self.references = strip("References", 4)
                self.plain = strip("Scenes without references", 2)
                self.pictures = strip("Scenes with them", 2)
                self.repeat = Repeat()
        running = self.buttons.start.click(
            self.tell,
            [model, self.subjects, self.scenes, self.masks, self.seed, self.picker.choice,
             *self.call.components, *self.picker.components],
            [self.line, self.references, self.plain, self.pictures, *self.repeat.components],
            api_name="story", show_progress="minimal", show_progress_on=self.line, **LANE,
        )  # fmt: skip
        self.buttons.wire(studio, self.line, [running])

    def tell(
        self,
        request: gr.Request,
        model: str,
        subjects: str,
        scenes: str,
        masks: str,
        seed: int | None,
        method: str,
        negative: str,
        steps: int,
        guidance: float | None,
        size: str,
        *settings: Any,
    ) -> Iterator[dict]:
        """Make a reference of each subject, and the scenes that show them."""

        def ask() -> RunConfig:
            if masks not in MASKS:
                raise ConfigError(f"masks is one of {', '.join(MASKS)}, got {masks!r}")
            call = negative, steps, guidance, size
            methods = self.picker.methods(method, settings)
            return configuration(self.studio, model, lines(scenes), seed, call, methods)

        def show(told: Told) -> dict:
            named = lines(subjects)
            extra = [*(f"--subject={subject}" for subject in named), "--masks", masks]
            return {
                self.line: status.done(f"{len(told.scenes)} scenes of {len(named)} subjects."),
                self.references: told.references,
                self.plain: told.plain,
                self.pictures: told.scenes,
                **self.repeat.show(
                    story_command(told.config, named, masks), told.config,
                    yaml_command("story", extra), [told.sheet],
                ),
            }  # fmt: skip

        yield from work_on(
            self.studio, request, self.line, ask,
            lambda watch, config: tell_story(self.studio, watch, config, lines(subjects), masks),
            show,
        )  # fmt: skip


def lines(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]
