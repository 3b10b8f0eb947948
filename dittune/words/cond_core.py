"""An attention core of a method's own, in calls that have conditional rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dittune.call import AttnCall

Core = Callable[[AttnCall], torch.Tensor]


def with_core(
    core: Callable[[Core, AttnCall], torch.Tensor], call: AttnCall, proceed: Core
) -> torch.Tensor:
    """Proceed with `core(the model's core, call)` as the core of a call with conditional rows."""
    if call.chunk_of("cond") is None:
        return proceed(call)
    return proceed(call._replace(core=functools.partial(core, call.core)))
