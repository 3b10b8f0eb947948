"""What the tabs share: settings of a call, the two buttons, and how a result is repeated."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dittune.config import RunConfig, preset, resolve, write_yaml
from dittune.pipelines.demo import status
from dittune.pipelines.demo.repeat import YAML_NAME
from dittune.pipelines.demo.studio import CANCELLED, News, Studio, Watch

QUIET = {"queue": False, "api_visibility": "private"}  # for what only changes the page
LANE = {"concurrency_id": "models", "concurrency_limit": 1}  # for what uses a model
STEPS = 20  # of a first picture; the model's own number takes longer
MOST_SEED = 2**31 - 1


def strip(title: str, columns: int) -> gr.Gallery:
    """Pictures in a row under a title, each with its words."""
    gr.Markdown(f"**{title}**")
    return gr.Gallery(
        label=title,
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        interactive=False,
        format="png",
        buttons=[],
        elem_classes="picture",
    )


class CallSettings:
    """Steps, guidance and size; and the seed, which `seed` shows where the tab wants it."""

    def __init__(self, model: str):
        with gr.Accordion("More settings", open=False):
            self.negative = gr.Textbox(label="Negative prompt", info="what not to show")
            self.steps = gr.Slider(1, 100, STEPS, step=1, label="Steps")
            self.guidance = gr.Number(
                guidance(model),
                label="Guidance scale",
                info="classifier-free guidance; 1 is off, empty is the preset's",
            )
            self.size = gr.Textbox(label="Size", info="SIDE or WIDTHxHEIGHT; empty is the preset's")
        self.components = [self.negative, self.steps, self.guidance, self.size]


def guidance(model: str) -> float | None:
    """The guidance scale a model's preset recommends."""
    return preset(model).get("guidance_scale")


def seed_row(value: int) -> gr.Number:
    """A seed, and a button that draws another."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(value, precision=0, minimum=0, label="Seed", min_width=120)
        another = gr.Button("New seed", size="sm", min_width=90)
    another.click(lambda: secrets.randbelow(MOST_SEED), None, seed, **QUIET)
    return seed


def configuration(
    studio: Studio,
    model: str,
    prompts: list[str],
    seed: int | None,
    call: tuple[Any, ...],
    methods: dict[str, dict[str, Any]],
    **more: Any,
) -> RunConfig:
    """The checked configuration of a request.

    Args:
        call: values of the components of `CallSettings`.
    """
    negative, steps, scale, size = call
    content = {
        "model": model,
        "prompts": [prompt.strip() for prompt in prompts],
        "negative_prompt": negative or "",
        "seed": secrets.randbelow(MOST_SEED) if seed is None else int(seed),
        "steps": int(steps),
        "device": studio.device,
        "dtype": studio.dtype,
        "methods": methods,
        **more,
    }
    if (size or "").strip():  # else the preset's
        content["size"] = size.strip()
    if scale is not None:
        content["guidance_scale"] = float(scale)
    return resolve(content)


class Buttons:
    """Start and cancel."""

    def __init__(self, text: str):
        with gr.Row():
            self.start = gr.Button(text, variant="primary", scale=3)
            self.cancel = gr.Button("Cancel", variant="stop", scale=1, min_width=80)

    def wire(self, studio: Studio, line: gr.HTML, running: list) -> None:
        """Let Cancel stop what this user has running, or waiting in the queue."""

        def cancel(request: gr.Request) -> None:
            studio.cancel(request.session_hash or "")

        stopped = self.cancel.click(cancel, None, None, cancels=running, **QUIET)
        # Afterwards, so that no news still on their way are shown last.
        stopped.then(lambda: updates({line: status.done(CANCELLED)}), None, line, **QUIET)


class Repeat:
    """The command and the YAML of a result, and its files."""

    def __init__(self) -> None:
        with gr.Accordion("Repeat this result", open=True, visible=False) as self.box:
            self.command = gr.Code(
                label="Command", language="shell", lines=1, wrap_lines=True, interactive=False
            )
            with gr.Accordion("As a file", open=False):
                self.yaml = gr.Code(
                    label=YAML_NAME, language="yaml", max_lines=16, interactive=False
                )
                self.note = gr.Markdown()
                self.files = gr.File(label="Files", file_count="multiple", interactive=False)
        self.components = [self.box, self.command, self.yaml, self.note, self.files]

    def show(self, command: str, config: RunConfig, runs: str, files: list[Path]) -> dict:
        """Fill it in.

        Args:
            runs: the command that runs the YAML.
            files: what to offer beside it; the YAML is written into the folder of the last one.
        """
        text = write_yaml(config)
        path = files[-1].parent / YAML_NAME
        path.write_text(text, encoding="utf-8")
        note = f"Saved as `{YAML_NAME}`, it is run by `{runs}`."
        if any(file.parent.name == "masks" for file in files):
            note += " The masks belong into a folder `masks` beside it."
        return {
            self.box: gr.update(visible=True),
            self.command: command,
            self.yaml: text,
            self.note: note,
            self.files: [str(file) for file in [*files, path]],
        }


def work_on(
    studio: Studio,
    request: gr.Request,
    line: gr.HTML,
    ask: Callable[[], RunConfig],
    work: Callable[[Watch, RunConfig], Any],
    show: Callable[[Any], dict],
    preview: Callable[[News], dict] = lambda news: {},
) -> Iterator[dict]:
    """Run a request and say how it goes, to its end or its error.

    Args:
        ask: reads what the user wants; what cannot be is said on the line.
        work: given a watch and that, returns the result.
        show: updates of components for the result, the status line among them.
        preview: updates for news that have a preview.
    """
    try:
        config = ask()
        for news in studio.run(request.session_hash or "", lambda watch: work(watch, config)):
            if news.result is None:
                shown = preview(news) if news.preview else {}
                yield updates({line: status.working(news), **shown})
            else:
                yield updates(show(news.result))
    except Exception as error:
        yield updates({line: status.failed(error)})


def updates(values: dict) -> dict:
    """Values of components as updates.

    gradio takes a component that is left out for one that gets an update, and keeps a copy of the
    component, for as long as the session, for each plain value that comes after one.
    """

    def update(component: gr.blocks.Block, value: Any) -> Any:
        is_one = isinstance(value, dict) and "__type__" in value
        return value if is_one or isinstance(component, gr.State) else gr.update(value=value)

    return {component: update(component, value) for component, value in values.items()}
