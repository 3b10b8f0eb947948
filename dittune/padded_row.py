"""Where a model attends one row of the batch at a time, without the padding of its text (Mochi)."""

from __future__ import annotations

import torch
from torch.nn import functional

from dittune.call import AttnCall


def padded_row(given: AttnCall) -> AttnCall:
    """The call of the next row as methods see it: with the padding, under a mask, with its role.

    Its core cuts the padding off and is bitwise the model's own; in the output the padding is 0.

    Args:
        given: what the model computes, without roles, but with the layout of the padded sequence.
    """
    run, real, tokens = given.run, given.query.shape[2], given.layout.text[1]
    row = run.rows_done.get(given.site.name, 0)
    run.rows_done[given.site.name] = row + 1
    role = run.roles[row * len(run.roles) // run.rows_apart]
    query, key, value = (functional.pad(t, (0, 0, 0, tokens - real)) for t in given[:3])
    mask = (torch.arange(tokens, device=key.device) < real)[None, None, None]

    def core(call: AttnCall) -> torch.Tensor:
        inputs = (tensor[:, :, :real].contiguous() for tensor in call[:3])
        options = {name: value for name, value in call.options.items() if name != "attn_mask"}
        bare = call._replace(**dict(zip(("query", "key", "value"), inputs)), options=options)
        out = given.core(bare)
        return functional.pad(out, (0, 0, 0, call.query.shape[2] - out.shape[2]))

    options = {**given.options, "attn_mask": mask}
    return given._replace(
        query=query, key=key, value=value, options=options, roles=(role,), core=core
    )
