"""The command that serves the page."""

from __future__ import annotations

from typing import Annotated

import typer

from dittune.pipelines.cli_options import Device, Dtype, Model


def demo(
    model: Model = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="a public link, through gradio")] = False,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait")] = 32,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Open a page in the browser: methods, attention, stories, videos (needs the extra `demo`)."""
    from dittune.errors import ConfigError

    try:
        from dittune.pipelines.demo.page import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ConfigError("the page needs gradio; pip install 'dittune[demo]'") from error
    serve(model, port, share, queue, device or "auto", dtype or "auto")
