"""The tab for videos: the same prompt and seed without a method and with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dittune.config import RunConfig, preset
from dittune.pipelines.demo import status
from dittune.pipelines.demo.controls import MethodPicker
from dittune.pipelines.demo.parts import (
    LANE,
    Buttons,
    CallSettings,
    Repeat,
    configuration,
    seed_row,
    work_on,
)
from dittune.pipelines.demo.repeat import video_command, yaml_command
from dittune.pipelines.demo.studio import Studio
from dittune.pipelines.demo.works import Pair, make_pair

METHODS = ["radial", "natten", "vmoba", "sparsed", "softpag", "merge_padding"]
PROMPT = "a yellow circle moving left and a still orange square on a black background"
SEED = 96  # with which the preset of shapes-wan mends what the plain model makes of that
NO_MODEL = (
    "### No video model here\n"
    "The model of this page makes pictures. Start it without `--model`, or with one that makes "
    "videos: Wan, HunyuanVideo, CogVideoX, Mochi or LTX-Video."
)


class VideoTab:
    """Its components and what its button does; only a message where no model makes videos."""

    def __init__(self, studio: Studio):
        self.studio = studio
        names = studio.models(videos=True)
        if not names:
            gr.Markdown(NO_MODEL)
            return
        recommended = preset(names[0])
        first = next(iter(recommended.get("methods", {})), "vmoba")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.model = gr.Dropdown(names, value=names[0], label="Video model")
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2)
                self.frames = gr.Number(recommended.get("frames", 17), precision=0, label="Frames")
                self.fps = gr.Number(
                    recommended.get("fps", 16), precision=0, minimum=1, label="Frames a second"
                )
                self.seed = seed_row(SEED)
                choice = gr.Column()
                self.buttons = Buttons("Film")
                self.picker = MethodPicker(names[0], METHODS, first, choice)
                self.call = CallSettings(names[0])
            with gr.Column(scale=3, min_width=320):
                self.line = gr.HTML(status.IDLE)
                with gr.Row():
                    self.before, self.after = (
                        gr.Video(
                            label=label,
                            interactive=False,
                            autoplay=True,
                            loop=True,
                            elem_classes="picture",
                        )
                        for label in ("Before", "After")
                    )
                self.repeat = Repeat()
        running = self.buttons.start.click(
            self.film,
            [self.model, self.prompt, self.seed, self.frames, self.fps, self.picker.choice,
             *self.call.components, *self.picker.components],
            [self.line, self.before, self.after, *self.repeat.components],
            api_name="video", show_progress="minimal", show_progress_on=self.line, **LANE,
        )  # fmt: skip
        self.buttons.wire(studio, self.line, [running])

    def film(
        self,
        request: gr.Request,
        model: str,
        prompt: str,
        seed: int | None,
        frames: int | None,
        fps: int,
        method: str,
        negative: str,
        steps: int,
        guidance: float | None,
        size: str,
        *settings: Any,
    ) -> Iterator[dict]:
        """Make a video without a method and one with it; both from the same seed."""

        def ask() -> RunConfig:
            return configuration(
                self.studio, model, [prompt], seed, (negative, steps, guidance, size),
                self.picker.methods(method, settings), frames=frames, fps=fps or 1,
            )  # fmt: skip

        yield from work_on(
            self.studio, request, self.line, ask,
            lambda watch, config: make_pair(self.studio, watch, config, suffix=".mp4"),
            self._shown,
        )  # fmt: skip

    def _shown(self, pair: Pair) -> dict:
        return {
            self.line: status.done(f"Done in {pair.seconds:.1f} s, seed {pair.config.seed}."),
            self.before: pair.before and str(pair.before),
            self.after: str(pair.after),
            **self.repeat.show(
                video_command(pair.config), pair.config, yaml_command("video"), [pair.after]
            ),
        }
