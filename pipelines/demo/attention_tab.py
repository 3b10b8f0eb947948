"""The tab for attention: where words are seen, how widely heads look, and what each head does."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import gradio as gr

from dittune.pipelines.demo import status
from dittune.pipelines.demo.generate_tab import PROMPT, SEED, picture, verdict
from dittune.pipelines.demo.parts import (
    LANE,
    QUIET,
    Buttons,
    CallSettings,
    Repeat,
    configuration,
    seed_row,
    strip,
    updates,
    work_on,
)
from dittune.pipelines.demo.repeat import picture_command, yaml_command
from dittune.pipelines.demo.studio import News, Studio
from dittune.pipelines.demo.works import Look, Pair, look, make_pair, with_heads, words_of
from dittune.pipelines.headhunt import heat_map

HINT = (
    "Click a cell to perturb that head with `softpag`. Colours: blue heads look at many places, "
    "red ones at few."
)


class AttentionTab:
    """Its components and what its buttons do."""

    def __init__(self, studio: Studio, model: gr.Dropdown):
        self.studio = studio
        self.seen = gr.State(None)  # settings and heads of the last look, of this user
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6)
                self.seed = seed_row(SEED)
                self.call = CallSettings(model.value)
                self.buttons = Buttons("Look")
                self.line = gr.HTML(status.IDLE)
                self.repeat = Repeat()
            with gr.Column(scale=3, min_width=320):
                self.words = strip("Where the picture looks at each word", 6)
                with gr.Row(equal_height=False):
                    with gr.Column(min_width=300):
                        gr.Markdown("**Heads of the model**")
                        self.grid = gr.Image(
                            label="Heads of the model",
                            show_label=False,
                            alt_text="a grid of heads, one row a layer; click one to perturb it",
                            interactive=False,
                            format="png",
                            buttons=[],
                            elem_classes="heads",
                        )
                        gr.Markdown(HINT)
                    with gr.Column(min_width=240):
                        self.heads = gr.Textbox(
                            label="Heads to perturb",
                            info="layer:head, several with commas; layer:* is a whole layer",
                        )
                        self.u = gr.Slider(0, 1, 1.0, step=0.05, label="u", info="strength")
                        self.scale = gr.Slider(0, 6, 3.0, step=0.5, label="Scale of the guidance")
                        self.perturb = gr.Button("Perturb these heads")
                with gr.Row():
                    self.before = picture("Before", "the picture as the model makes it")
                    self.after = picture("After", "the picture guided away from these heads")
        self._wire(model)

    def _wire(self, model: gr.Dropdown) -> None:
        given = [model, self.prompt, self.seed, *self.call.components]
        shown = [self.line, self.before, self.after, *self.repeat.components]
        options: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": self.line}
        looking = self.buttons.start.click(
            self.look, given, [*shown, self.words, self.grid, self.seen],
            api_name="attention", **options, **LANE,
        )  # fmt: skip
        knobs = [self.seen, self.heads, self.u, self.scale]
        perturbing = self.perturb.click(
            self.perturb_heads, knobs, shown, api_name="perturb", **options, **LANE
        )
        clicking = self.grid.select(self.clicked, self.seen, [self.heads, self.grid], **QUIET)
        perturbing_clicked = clicking.success(
            self.perturb_heads, knobs, shown, api_visibility="private", **options, **LANE
        )
        self.buttons.wire(self.studio, self.line, [looking, perturbing, perturbing_clicked])

    def look(
        self,
        request: gr.Request,
        model: str,
        prompt: str,
        seed: int | None,
        negative: str,
        steps: int,
        guidance: float | None,
        size: str,
    ) -> Iterator[dict]:
        """Make a picture and show where its words and its heads look."""
        call = negative, steps, guidance, size
        yield from work_on(
            self.studio, request, self.line,
            lambda: configuration(self.studio, model, [prompt], seed, call, {}),
            lambda watch, config: look(self.studio, watch, config),
            self._looked, lambda news: {self.before: news.preview},
        )  # fmt: skip

    def _looked(self, seen: Look) -> dict:
        maps = ["--maps-of", words_of(seen.config.prompts[0])]
        return {
            self.line: status.done(f"{len(seen.words)} words, {len(seen.heads)} heads."),
            self.words: seen.words,
            self.grid: drawn(seen.heads, []),
            self.seen: (seen.config, seen.heads),
            self.before: str(seen.picture),
            self.after: None,
            **self.repeat.show(
                picture_command(seen.config, maps), seen.config, yaml_command("generate", maps),
                [seen.picture],
            ),
        }  # fmt: skip

    def clicked(self, seen: tuple | None, event: gr.SelectData) -> tuple[Any, Any]:
        """The head under the pointer, chosen and marked."""
        if seen is None:
            return gr.skip(), gr.skip()
        head = heat_map.head_at(seen[1], *event.index)
        return (head, drawn(seen[1], [head])) if head else (gr.skip(), gr.skip())

    def perturb_heads(
        self,
        request: gr.Request,
        seen: tuple | None,
        heads: str,
        u: float,
        scale: float,
    ) -> Iterator[dict]:
        """Make the picture again, guided away from what it is without these heads."""
        if seen is None:
            first = "Press Look first: it makes the picture to compare."
            yield updates({self.line: status.done(first)})
            return

        def preview(news: News) -> dict:
            return {self.after: news.preview} if news.share > 0.5 else {}

        yield from work_on(
            self.studio, request, self.line,
            lambda: with_heads(seen[0], heads, float(u), float(scale)),
            lambda watch, config: make_pair(self.studio, watch, config), self._perturbed, preview,
        )  # fmt: skip

    def _perturbed(self, pair: Pair) -> dict:
        heads = pair.config.methods["softpag"]["heads"]
        return {
            self.line: status.done(f"Heads {heads}. {verdict(pair)}"),
            self.before: pair.before and str(pair.before),
            self.after: str(pair.after),
            **self.repeat.show(
                picture_command(pair.config), pair.config, yaml_command("generate"), [pair.after]
            ),
        }


def drawn(heads: dict[str, float], selected: list[str]) -> Any:
    """The grid of heads, coloured by how widely they look."""
    mean = fmean(heads.values())
    return heat_map.draw(heads, mean, selected, "spread of attention", "mean")
