"""The tab for pictures: the same prompt and seed without a method and with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

import dittune
from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines.demo import status
from dittune.pipelines.demo.controls import NONE, MethodPicker
from dittune.pipelines.demo.parts import (
    LANE,
    Buttons,
    CallSettings,
    Repeat,
    configuration,
    seed_row,
    work_on,
)
from dittune.pipelines.demo.repeat import picture_command, yaml_command
from dittune.pipelines.demo.studio import News, Studio
from dittune.pipelines.demo.uploads import MASKS
from dittune.pipelines.demo.works import Pair, make_pair

PROMPT = "a yellow triangle, a purple cross and a red ring"
SEED = 0  # with which the preset of shapes-sd3 mends what the plain model makes of that
TAKE_MASKS = [
    name for name in dittune.available_methods() if hasattr(dittune.load_method(name), "masks")
]


class GenerateTab:
    """Its components and what its button does."""

    def __init__(self, studio: Studio, model: gr.Dropdown):
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6)
                self.seed = seed_row(SEED)
                choice = gr.Column()
                self.buttons = Buttons("Generate")
                self.picker = MethodPicker(
                    model.value, dittune.available_methods(), "softpag", choice
                )
                self.masks = gr.File(
                    label="Masks: a PNG a subject, bright where it is",
                    file_count="multiple",
                    file_types=[".png"],
                    visible=False,
                )
                self.call = CallSettings(model.value)
            with gr.Column(scale=3, min_width=320):
                self.line = gr.HTML(status.IDLE)
                with gr.Row(equal_height=True):
                    self.before = picture("Before", "the picture without the method")
                    self.after = picture("After", "the picture with the method")
                self.repeat = Repeat()
        self._wire(model)

    def _wire(self, model: gr.Dropdown) -> None:
        self.picker.choice.change(
            lambda name: gr.update(visible=name in TAKE_MASKS), self.picker.choice, self.masks,
            queue=False, api_visibility="private",
        )  # fmt: skip
        given = [model, self.prompt, self.seed, self.picker.choice, *self.call.components]
        running = gr.on(
            [self.buttons.start.click, self.prompt.submit],
            self.generate,
            [*given, self.masks, *self.picker.components],
            [self.line, self.before, self.after, *self.repeat.components],
            api_name="generate",
            show_progress="minimal",
            show_progress_on=self.line,
            **LANE,
        )
        self.buttons.wire(self.studio, self.line, [running])

    def generate(
        self,
        request: gr.Request,
        model: str,
        prompt: str,
        seed: int | None,
        method: str,
        negative: str,
        steps: int,
        guidance: float | None,
        size: str,
        masks: list[str] | None,
        *settings: Any,
    ) -> Iterator[dict]:
        """Make a picture without a method and one with it; both from the same seed."""
        files = (masks or []) if method in TAKE_MASKS else []

        def ask() -> RunConfig:
            methods = self.picker.methods(method, settings)
            refuse_folder(methods.get(method, {}).get("masks", ""))
            if files:
                methods[method]["masks"] = MASKS
            call = negative, steps, guidance, size
            return configuration(self.studio, model, [prompt], seed, call, methods)

        def preview(news: News) -> dict:
            first = method != NONE and news.share < 0.5
            return {self.before if first else self.after: news.preview}

        yield from work_on(
            self.studio, request, self.line, ask,
            lambda watch, config: make_pair(self.studio, watch, config, files),
            self._shown, preview,
        )  # fmt: skip

    def _shown(self, pair: Pair) -> dict:
        return {
            self.line: status.done(verdict(pair)),
            self.before: pair.before and str(pair.before),
            self.after: str(pair.after),
            **self.repeat.show(
                picture_command(pair.config), pair.config, yaml_command("generate"),
                [*pair.masks, pair.after],
            ),
        }  # fmt: skip


def refuse_folder(masks: str) -> None:
    """A visitor's boxes are read, folders of the server are not.

    Raises:
        ConfigError: these are no boxes.
    """
    if masks and ":" not in masks:
        raise ConfigError(
            f"masks are written 'x0,y0,x1,y1: SUBJECT' here, got {masks!r}; upload pictures instead"
        )


def picture(label: str, alt: str, height: int = 320) -> gr.Image:
    """A picture that is shown, not taken."""
    return gr.Image(
        label=label,
        alt_text=alt,
        interactive=False,
        format="png",
        height=height,
        buttons=["download", "fullscreen"],
        elem_classes="picture",
    )


def verdict(pair: Pair) -> str:
    """How long it took, and whether the method did anything."""
    text = f"Done in {pair.seconds:.1f} s, seed {pair.config.seed}."
    if pair.before is None:
        return text
    changed = changed_share(pair.before, pair.after)
    if not changed:
        return f"{text} The method changed nothing: its settings are neutral."
    return f"{text} The method changed {changed:.0%} of the pixels visibly."


def changed_share(before: Path, after: Path) -> float:
    """The share of the pixels that differ by more than a sixteenth of full scale; 0 if equal."""
    one, two = (_pixels(path) for path in (before, after))
    if (one == two).all():
        return 0.0
    return max(float((abs(one - two).max(-1) > 16).mean()), 1e-9)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)
