"""An attention core of a method's own, in calls that have conditional rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dittune.call import AttnCall
from dittune.errors import ConfigError

Core = Callable[[AttnCall], torch.Tensor]


def with_core(
    name: str, core: Callable[[Core, AttnCall], torch.Tensor], call: AttnCall, proceed: Core
) -> torch.Tensor:
    """Proceed with `core(the model's core, call)` as the core of a call with conditional rows.

    Raises:
        ConfigError: a method before the one called `name` changes the core already.
    """
    if call.chunk_of("cond") is None:
        return proceed(call)
    if isinstance(call.core, functools.partial):
        raise ConfigError(f"{name} must be listed before methods that change the attention core")
    return proceed(call._replace(core=functools.partial(core, call.core)))
