"""The line that says how far a request is, or why it failed, as HTML that is read aloud."""

from __future__ import annotations

import html
import traceback

from dittune.errors import DittuneError
from dittune.pipelines.demo.studio import Cancelled, News

IDLE = '<div class="status" role="status">&nbsp;</div>'


def working(news: News) -> str:
    """A bar and what is being done."""
    return (
        f'<div class="status" role="status"><progress max="1" value="{news.share:.3f}" '
        f'aria-label="share that is done"></progress><span>{html.escape(news.text)}</span></div>'
    )


def done(text: str) -> str:
    return f'<div class="status" role="status"><span>{html.escape(text)}</span></div>'


def failed(error: BaseException) -> str:
    """What the user can mend; anything else goes to the server's log, never to the page."""
    if isinstance(error, Cancelled):
        return done(str(error))
    if isinstance(error, (DittuneError, OSError)):
        text = " ".join(str(error).split())
    else:
        traceback.print_exception(error)
        text = "Something went wrong that dittune did not expect; the server's log says what."
    return f'<div class="status failed" role="alert">{html.escape(text)}</div>'
