"""What a user may write, for `mypy` only: never imported. A type that got lost is told here."""

from typing import Any

import torch
from typing_extensions import assert_type

import dittune
from dittune.call import AttnCall, Site
from dittune.pipelines.pipeline import Result


def attach(pipe: Any) -> dict[str, Any]:
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:*", u=0.5, batched=None)) as handle:
        assert_type(handle, dittune.Attachment)
        return handle.report()


def pipeline() -> torch.Tensor:
    pipe = dittune.Pipeline.from_pretrained(
        "shapes-sd3", [dittune.AStar(scale=5.0)], dtype="bfloat16"
    )
    assert_type(pipe, dittune.Pipeline)
    result = pipe("a red circle", seed=[1, 2])
    assert_type(result, Result)
    assert_type(result.record, dict[str, Any])
    pipe.methods = [dittune.Conform(concepts="red, circle"), dittune.AttendAndExcite()]
    return result.images[0]


def names() -> list[str]:
    heads = dittune.HeadSet([(2, 1), (3, 0)])
    assert_type(heads.first(1), dittune.HeadSet)
    assert_type(dittune.checkpoint("shapes-sd3"), str)
    cls = dittune.load_method("softpag")
    assert_type(cls, type[dittune.Method])
    return [*dittune.available_methods(), *dittune.available_models(), str(heads)]


class Mine(dittune.Method):
    scale: float = 1.0

    def site_state(self, site: Site, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.scale, device=device)

    def attend(self, call: AttnCall, proceed: Any) -> torch.Tensor:
        assert_type(call.chunk_of("cond"), tuple[int, int] | None)
        return call.state * proceed(call)


dittune.SoftPAG(heads=3)  # type: ignore[arg-type]
dittune.SoftPAG(strength=1.0)  # type: ignore[call-arg]
dittune.SoftPug()  # type: ignore[attr-defined]
