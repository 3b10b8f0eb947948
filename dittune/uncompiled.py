"""Denoiser calls that compiled code cannot make: for a gradient, or for tensors seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock, _stance, _many = threading.Lock(), ExitStack(), 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Ignore what the user has compiled, blocks, denoiser or a wrapper, until the end.

    PyTorch's stance is one for the process, so that other threads run uncompiled meanwhile, too;
    the first to come sets it and the last to leave puts the user's own back.
    """
    global _many
    with _lock:
        if not _many:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _many += 1
    try:
        yield
    finally:
        with _lock:
            _many -= 1
            if not _many:
                _stance.close()
