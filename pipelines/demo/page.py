"""The page itself: its tabs, its looks, and how it is served."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr

import dittune
from dittune.errors import DittuneError
from dittune.pipelines.demo.attention_tab import AttentionTab
from dittune.pipelines.demo.gallery_tab import GalleryTab
from dittune.pipelines.demo.generate_tab import GenerateTab
from dittune.pipelines.demo.parts import QUIET, guidance
from dittune.pipelines.demo.story_tab import StoryTab
from dittune.pipelines.demo.studio import Studio
from dittune.pipelines.demo.uploads import MOST_BYTES
from dittune.pipelines.demo.video_tab import VideoTab

FIRST = "shapes-sd3"  # of the bundled models
NO_PICTURES = "### No picture model here\nThe model of this page makes videos; see the tab Video."
TITLE = (
    "# dittune\nAttention control for diffusion transformers: the same prompt and seed, "
    "without a method and with it."
)
CACHE = 3600  # seconds after which files of results are removed
SESSIONS = (
    32  # gradio keeps components of those that wait and so many; a request of its client is one
)
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.status {display: flex; gap: .8em; align-items: center; min-height: 2.2em; padding: 0 .2em}
.status progress {
  appearance: none; flex: 0 0 40%; height: .6em; border: 0; border-radius: 1em; overflow: hidden;
  background: var(--border-color-primary)
}
.status progress::-webkit-progress-bar {background: var(--border-color-primary)}
.status progress::-webkit-progress-value {background: var(--color-accent)}
.status progress::-moz-progress-bar {background: var(--color-accent)}
.status.failed {
  background: #fdecec; color: #7d1414; border-left: 4px solid #b23a3a; padding: .6em .9em;
  border-radius: 4px
}
.dark .status.failed {background: #3a1d1d; color: #ffd7d7}
.seed {align-items: end}
.seed button {flex: 0 0 auto; min-height: 42px}
.picture .fixed-height {min-height: 120px !important; max-height: none !important}
.picture .caption-label {
  bottom: 2px; right: 2px; padding: 0 .4em; font-size: .75em; opacity: .85
}
.heads img {cursor: pointer; object-fit: contain}
.card {
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 6px; padding: 1em
}
"""
CRISP = """
.picture img, .picture video {
  image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain
}
"""
SMALL = 256  # pixels a side; such pictures are enlarged without blur


def build(studio: Studio) -> gr.Blocks:
    """The page over the models of a studio."""
    names = studio.models(videos=False)
    with gr.Blocks(title="dittune", analytics_enabled=False, delete_cache=(CACHE, CACHE)) as page:
        gr.Markdown(TITLE)
        model = gr.Dropdown(
            names, value=names[0] if names else None, label="Picture model", visible=len(names) > 1
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio, model) if names else gr.Markdown(NO_PICTURES)
            with gr.Tab("Attention", id="attention"):
                attention = AttentionTab(studio, model) if names else gr.Markdown(NO_PICTURES)
            with gr.Tab("Story", id="story"):
                story = StoryTab(studio, model) if names else gr.Markdown(NO_PICTURES)
            with gr.Tab("Video", id="video"):
                VideoTab(studio)
            if names:
                with gr.Tab("Gallery", id="gallery"):
                    GalleryTab(studio, model, generate, tabs)
        if names:
            _follow_model(model, generate, attention, story)

        def leave(request: gr.Request) -> None:
            studio.cancel(request.session_hash or "")

        page.unload(leave)
    return page


def _follow_model(
    model: gr.Dropdown, generate: GenerateTab, attention: AttentionTab, story: StoryTab
) -> None:
    """Another model brings its own recommended settings; only the user's choice does, not ours."""

    def recommend(name: str) -> list[Any]:
        scales = [guidance(name)] * 3
        return [*scales, *generate.picker.recommend(name), *story.picker.recommend(name)]

    fields = [*generate.picker.components, *story.picker.components]
    scales = [tab.call.guidance for tab in (generate, attention, story)]
    model.input(recommend, model, [*scales, *fields], **QUIET)


def launch(studio: Studio, port: int, share: bool, waiting: int, **more: Any) -> gr.Blocks:
    """Serve the page, on this machine only unless it is shared.

    Args:
        waiting: requests that may wait; one more is refused with a message.
        more: further arguments of `gr.Blocks.launch`.
    """
    page = build(studio)
    page.queue(max_size=waiting, default_concurrency_limit=1)
    page.launch(
        server_name="127.0.0.1",
        server_port=port or None,
        share=share,
        ssr_mode=False,
        max_file_size=MOST_BYTES,
        state_session_capacity=waiting + SESSIONS,
        theme=gr.themes.Soft(primary_hue="blue", **FONTS),
        css=CSS + (CRISP if _small(studio) else ""),
        footer_links=["api"],
        **more,
    )
    return page


def _small(studio: Studio) -> bool:
    """Whether the pictures of the first model are small."""
    for name in studio.models(videos=False)[:1]:
        pipe = studio.pipe(name)
        return getattr(pipe, "default_sample_size", 128) * pipe.vae_scale_factor <= SMALL
    return True


def serve(model: str | None, port: int, share: bool, waiting: int, device: str, dtype: str) -> None:
    """Load the models and serve the page until it is interrupted.

    Args:
        model: a bundled name, folder or hub id; None is all that are bundled.

    Raises:
        DittuneError: a model cannot be loaded, or the port is taken.
    """
    names = [model] if model else sorted(dittune.available_checkpoints(), key=lambda n: n != FIRST)
    studio = Studio(names, device, dtype)
    try:
        page = launch(studio, port, share, waiting, prevent_thread_lock=True, quiet=True)
    except OSError as error:  # what gradio says of it is about its own settings
        raise DittuneError(f"cannot serve at port {port}: it is taken; add --port") from error
    except ValueError as error:  # its look at its own address failed
        raise DittuneError(
            "the page does not answer at 127.0.0.1: is a proxy set (then NO_PROXY=127.0.0.1), or "
            "the machine too busy? Try again"
        ) from error
    print(page.local_url, page.share_url or "", flush=True)
    page.block_thread()
