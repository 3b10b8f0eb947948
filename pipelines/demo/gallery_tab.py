"""The tab of presets: what is recommended for each model, tried with one click."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

import dittune
from dittune.config import preset_files
from dittune.pipelines.demo import status
from dittune.pipelines.demo.controls import NONE, defaults, method_of
from dittune.pipelines.demo.generate_tab import PROMPT, SEED, GenerateTab, picture, verdict
from dittune.pipelines.demo.parts import (
    LANE,
    QUIET,
    STEPS,
    Repeat,
    configuration,
    guidance,
    work_on,
)
from dittune.pipelines.demo.repeat import picture_command, yaml_command
from dittune.pipelines.demo.studio import Studio
from dittune.pipelines.demo.works import Pair, make_pair


class GalleryTab:
    """A card for each preset."""

    def __init__(self, studio: Studio, model: gr.Dropdown, generate: GenerateTab, tabs: gr.Tabs):
        self.studio = studio
        gr.Markdown("Recommended settings of the bundled models; try each on a picture.")
        own, presets = studio.models(videos=False), preset_files()
        for name in sorted(presets, key=lambda n: own.index(n) if n in own else len(own)):
            path = presets[name]
            with gr.Row(equal_height=False, elem_classes="card"):
                with gr.Column(scale=2, min_width=300):
                    gr.Markdown(f"### {name}\n{about(path)}")
                    gr.Code(
                        settings_text(path), label=path.name, language="yaml", interactive=False
                    )
                self._sides(name, model, generate, tabs)

    def _sides(self, name: str, model: gr.Dropdown, generate: GenerateTab, tabs: gr.Tabs) -> None:
        """The part of a card that does something."""
        with gr.Column(scale=3, min_width=300):
            if name not in self.studio.models(videos=False):
                gr.Markdown(f"`{name}` {missing(self.studio, name)}")
                return
            with gr.Row():
                before = picture("Before", "the picture without the method of the preset", 200)
                after = picture("After", "the picture with the method of the preset", 200)
            line = gr.HTML(status.IDLE)
            repeat = Repeat()
            with gr.Row():
                show = gr.Button(f"Show {name}", size="sm", variant="primary")
                take = gr.Button("Open in Generate", size="sm")
        show.click(
            self.shower(name, line, before, after, repeat), None,
            [line, before, after, *repeat.components],
            api_visibility="private", show_progress="minimal", show_progress_on=line, **LANE,
        )  # fmt: skip
        picker = generate.picker
        take.click(
            lambda: [
                gr.Tabs(selected="generate"), name, method_of(name) or NONE, guidance(name),
                *picker.recommend(name),
            ],
            None, [tabs, model, picker.choice, generate.call.guidance, *picker.components],
            **QUIET,
        )  # fmt: skip

    def shower(
        self, name: str, line: gr.HTML, before: gr.Image, after: gr.Image, repeat: Repeat
    ) -> Callable:
        """What the button of a card does."""

        def show(request: gr.Request) -> Iterator[dict]:
            method = method_of(name)
            methods = {method: defaults(name, method)} if method else {}
            call = "", STEPS, None, ""

            def shown(pair: Pair) -> dict:
                return {
                    line: status.done(verdict(pair)),
                    before: pair.before and str(pair.before),
                    after: str(pair.after),
                    **repeat.show(
                        picture_command(pair.config), pair.config, yaml_command("generate"),
                        [pair.after],
                    ),
                }  # fmt: skip

            yield from work_on(
                self.studio, request, line,
                lambda: configuration(self.studio, name, [PROMPT], SEED, call, methods),
                lambda watch, config: make_pair(self.studio, watch, config), shown,
            )  # fmt: skip

        return show


def missing(studio: Studio, name: str) -> str:
    """Why a preset cannot be tried."""
    if name in studio.models(videos=True):
        return "makes videos: see the tab Video, which starts from this preset."
    if name in dittune.available_checkpoints():
        return "is not loaded: the page was started with another model."
    return "is not bundled in this version."


def about(path: Path) -> str:
    """The comment at the top of a preset."""
    text = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in text if line.startswith("#"))


def settings_text(path: Path) -> str:
    """A preset without its comment."""
    text = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in text if not line.startswith("#"))
