"""The models of the page, and the work of its users on them, one at a time on each.

A request works in a thread of its own and owns its methods; only the diffusers pipeline is shared,
under a lock that is held for as long as something is attached to it.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dittune.errors import DittuneError
from dittune.models import DENOISER_NAMES
from dittune.pipelines.arguments import makes_videos
from dittune.pipelines.demo.preview import decode
from dittune.pipelines.pipeline import Pipeline, Result

PREVIEWS = 6  # a picture
KEPT = 64  # folders of results; the page has its own copies long before they go
CANCELLED = "Cancelled; the model is as it was."
POLL = 0.1  # seconds between two looks at a lock or a list of news


class Cancelled(DittuneError):
    """The user has stopped the work."""


@dataclass(frozen=True)
class News:
    """What the work of a request has to tell.

    Attributes:
        text: what is being done.
        share: how much of it is done, in [0, 1].
        preview: what the picture looks like by now.
        result: what the work returned; only of the last one.
    """

    text: str
    share: float
    preview: Image.Image | None = None
    result: Any = None


class Watch:
    """How the work of one request tells news, and learns that it is to stop."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[News | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()

    def tell(self, news: News | BaseException) -> None:
        self._news.put(news)

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Cancelled once the work is to stop."""
        if self._stop.is_set():
            raise Cancelled(CANCELLED)

    def latest(self) -> Iterator[News]:
        """News as they come, the newest of those that came meanwhile; ends with the result."""
        while True:
            news = self._news.get()
            while isinstance(news, News) and news.result is None and not self._news.empty():
                later = self._news.get()
                if isinstance(later, News) and later.preview is None:
                    later = News(later.text, later.share, news.preview, later.result)
                news = later
            if isinstance(news, BaseException):
                raise news
            yield news
            if news.result is not None:
                return


class WatchedPipeline(Pipeline):
    """A pipeline that is lent to one request: tells each step, and stops when that is cancelled.

    Attributes:
        title: what is being made, for the news.
        part: first and last share of the whole work that the next call is.
    """

    def __init__(self, pipe: Any, name: str, watch: Watch):
        super().__init__(pipe, (), name)
        self.watch, self.title, self.part = watch, "", (0.0, 1.0)
        self._size: tuple[int | None, int | None] = None, None

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        self.watch.check()
        self.watch.tell(News(self.title, self.part[0]))
        self._size = kwargs.get("width"), kwargs.get("height")
        kwargs |= {"progress": False, "callback_on_step_end": self._after_step}
        return super().__call__(*args, **kwargs)

    def _after_step(self, pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        self.watch.check()
        done, total = step + 1, pipe.num_timesteps
        first, last = self.part
        preview = None
        if done % max(1, -(-total // PREVIEWS)) == 0 and done < total:
            preview = decode(pipe, tensors["latents"], *self._size)
        text = f"{self.title}: step {done} of {total}"
        self.watch.tell(News(text, first + (last - first) * done / total, preview))
        return {}


class Studio:
    """Models, each loaded once.

    Args:
        models: bundled names, folders or hub ids.
        device: as of `Pipeline.from_pretrained`, and so is `dtype`.

    Raises:
        CheckpointError: one cannot be loaded.
    """

    def __init__(self, models: Sequence[str], device: str = "auto", dtype: str = "auto"):
        self.device, self.dtype = device, dtype
        self._pipes = {
            name: Pipeline.from_pretrained(name, device=device, dtype=dtype) for name in models
        }
        self._locks = {name: threading.Lock() for name in models}
        self._running: dict[str, set[Watch]] = {}
        self._folder = tempfile.mkdtemp(prefix="dittune-demo-")
        weakref.finalize(self, shutil.rmtree, self._folder, True)
        self._results: deque[Path] = deque()
        self._guard = threading.Lock()

    def models(self, videos: bool) -> list[str]:
        """Names of the models that make videos, or of those that make pictures."""
        return [name for name, own in self._pipes.items() if makes_videos(own.pipe) == videos]

    def pipe(self, model: str) -> Any:
        """The diffusers pipeline of a model, to look at."""
        return self._pipes[model].pipe

    def new_folder(self) -> Path:
        """An empty folder for the files of one request."""
        with self._guard:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            self._results.append(folder)
            if len(self._results) > KEPT:
                shutil.rmtree(self._results.popleft(), ignore_errors=True)
        return folder

    @contextlib.contextmanager
    def lend(self, model: str, watch: Watch) -> Iterator[WatchedPipeline]:
        """A model for this request alone, until the end of the block."""
        lock = self._locks[model]
        while not lock.acquire(timeout=POLL):
            watch.check()
            watch.tell(News("Waiting for the model", 0.0))
        pipe = self.pipe(model)
        denoisers = [pipe.components[name] for name in DENOISER_NAMES if name in pipe.components]
        hooks = [
            denoiser.register_forward_pre_hook(lambda *_: watch.check())  # a step may call it often
            for denoiser in denoisers
            if denoiser is not None
        ]
        try:
            yield WatchedPipeline(pipe, self._pipes[model].name, watch)
        finally:
            for hook in hooks:
                hook.remove()
            lock.release()

    def run(self, user: str, work: Callable[[Watch], Any]) -> Iterator[News]:
        """Do `work(watch)` in a thread and tell its news; the last one has what it returned.

        Args:
            user: who may `cancel` it.

        Raises:
            Cancelled: it was cancelled.
            Exception: what the work raised.
        """
        watch = Watch()
        with self._guard:
            self._running.setdefault(user, set()).add(watch)
        threading.Thread(target=_tell_result, args=(work, watch), daemon=True).start()
        try:
            yield from watch.latest()
        finally:  # also if the page has gone away meanwhile
            watch.stop()
            with self._guard:
                self._running[user].discard(watch)
                if not self._running[user]:
                    del self._running[user]

    def cancel(self, user: str) -> bool:
        """Stop the work of a user at its next step; whether there was any."""
        with self._guard:
            watches = set(self._running.get(user, ()))
        for watch in watches:
            watch.stop()
        return bool(watches)


def _tell_result(work: Callable[[Watch], Any], watch: Watch) -> None:
    try:
        watch.tell(News("Done", 1.0, result=work(watch)))
    except BaseException as error:
        watch.tell(error)
