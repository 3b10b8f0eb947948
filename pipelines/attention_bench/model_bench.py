"""`dittune bench model`: what sparse attention makes of a whole denoising step of a video model.

Real classes at true width and length, a few layers deep, random weights: time does not depend on
what they say. A step is timed dense, with each method in its sparse steps, and with attention left
out; that tells attention's share. What the embeddings around the layers take is timed with no layer
at all, and the rest is scaled to the depth of the real model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dittune.attach import attach
from dittune.errors import DittuneError
from dittune.method import Method
from dittune.methods.natten import Natten
from dittune.methods.radial import Radial
from dittune.methods.sparsed import SparseD
from dittune.methods.vmoba import Vmoba
from dittune.pipelines.attention_bench.model_sizes import CPU_SIZES, GPU_SIZES, Size
from dittune.pipelines.attention_bench.timing import commit, quantile, times
from dittune.pipelines.bench import hardware
from dittune.pipelines.row_log import RowLog
from dittune.run import Run

METHODS: dict[str, Method] = {  # in every step and layer
    "radial": Radial(start=0.0, dense_layers=""),
    "natten": Natten(start=0.0, frames=18, window=24),
    "vmoba": Vmoba(start=0.0),
    "sparsed": SparseD(start=0.0),
}


class NoAttention(Method):
    """The values instead of attention among image tokens."""

    def sites(self, available):
        return [site for site in available if site.kind != "cross"]

    def attend(self, call, proceed):
        return call.value


@dataclass(frozen=True)
class Timing:
    """One line of the table; milliseconds of a step, medians.

    `step` is of the timed layers, `model` of the real depth. `attention` is attention's share of
    the latter, and so for the dense step. Density is of pairs of image tokens.
    """

    commit: str
    device: str
    torch: str
    threads: str
    size: str
    tokens: int
    layers: int
    depth: float
    dtype: str
    method: str
    density: float
    step_ms: float
    step_p20: float
    step_p80: float
    fixed_ms: float
    model_ms: float
    attention: float
    dense_model_ms: float
    dense_attention: float
    speedup: float


@torch.no_grad()
def bench_model(cpu: bool, only: str, rounds: int, out: Path) -> dict[str, Any]:
    """Time every size x method whose `size/method` contains `only`.

    Returns:
        The document of `--json`; rows are appended to `out/model.csv`.

    Raises:
        DittuneError: a step gives numbers that are not finite.
    """
    device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
    log = RowLog(out / "model.csv", Timing)
    out.mkdir(parents=True, exist_ok=True)
    log.read()  # fails early where the file is another one
    rows, skipped = [], []
    for size in CPU_SIZES if device.type == "cpu" else GPU_SIZES:
        chosen = [name for name in METHODS if only in f"{size.name}/{name}"]
        if not chosen:
            continue
        try:
            for row in _time(size, chosen, device, rounds, skipped):
                log.append([row])
                rows.append(vars(row))
        except torch.OutOfMemoryError as error:
            skipped.append(f"{size.name}: {str(error).splitlines()[0]}")
    return {"method": __doc__, "hardware": hardware(), "rows": rows, "skipped": skipped}


def _time(
    size: Size, chosen: list[str], device: torch.device, rounds: int, skipped: list[str]
) -> Iterator[Timing]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = size.build().to(dtype).eval()
    inputs = size.inputs(device, dtype)
    with _layers_removed(model, size):
        fixed = statistics.median(_steps(model, inputs, None, device, rounds)[0])

    def whole(found: list[float]) -> float:
        return fixed + (statistics.median(found) - fixed) * size.depth

    dense, _ = _steps(model, inputs, None, device, rounds)
    bare, _ = _steps(model, inputs, NoAttention(), device, rounds)
    what, layers = hardware(), sum(size.layers.values())
    tokens = _tokens(model, inputs)
    for name in chosen:
        try:
            found, report = _steps(model, inputs, METHODS[name], device, rounds)
        except RuntimeError as error:  # cannot run here, or out of memory
            skipped.append(f"{size.name}/{name}: {str(error).splitlines()[0]}")
            continue
        yield Timing(
            commit=commit(), device=what["device"], torch=what["torch"], threads=what["threads"],
            size=size.name, tokens=tokens, layers=layers, depth=size.depth,
            dtype=str(dtype).removeprefix("torch."), method=name, density=_density(report),
            step_ms=statistics.median(found), step_p20=quantile(found, 0.2),
            step_p80=quantile(found, 0.8), fixed_ms=fixed, model_ms=whole(found),
            attention=1 - whole(bare) / whole(found), dense_model_ms=whole(dense),
            dense_attention=1 - whole(bare) / whole(dense), speedup=whole(dense) / whole(found),
        )  # fmt: skip


def _steps(
    model: nn.Module, inputs: dict[str, Any], method: Method | None, device, rounds: int
) -> tuple[list[float], dict[str, Any]]:
    """Times of steps of one generation, after those that measure and warm up; and the report."""
    if method is None:
        return times(lambda: _check(model(**inputs)[0]), device, rounds, warm=3), {}
    with attach(model, method) as handle:
        run = handle.run = handle.last_run = Run(num_steps=rounds + 10)

        def step() -> None:
            _check(model(**inputs)[0])
            run.step, run.calls = run.step + 1, 0

        try:
            step()  # what is built or measured once
            found = times(step, device, rounds, warm=3)
        finally:
            handle.run = None
        return found, next(iter(handle.report().values()))


def _check(sample: torch.Tensor) -> None:
    """Looks at one number only, so that a GPU does not wait for long."""
    if not sample.flatten()[0].isfinite():
        raise DittuneError("a step gives numbers that are not finite; not timing it")


@contextmanager
def _layers_removed(model: nn.Module, size: Size) -> Iterator[None]:
    kept = {name: getattr(model, name) for name in size.layers}
    for name in kept:
        setattr(model, name, nn.ModuleList())
    try:
        yield
    finally:
        for name, layers in kept.items():
            setattr(model, name, layers)


def _tokens(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Of the sequence in which image tokens attend."""
    from dittune.models import facts_for

    layouts = facts_for(model).layouts(model, inputs)
    (layout,) = (layout for (kind, _), layout in layouts.items() if kind != "cross")
    return max(layout.image[1], layout.text[1])


def _density(report: dict[str, Any]) -> float:
    """Methods report it as a whole, or by kind of site; there is one here."""
    inside = [report] if "image_density" in report else report.values()
    return next(part["image_density"] for part in inside if isinstance(part, dict))


def as_text(result: dict[str, Any]) -> str:
    """The document of `bench_model` for people."""
    lines = [" ".join(result["hardware"].values())]
    for r in result["rows"]:
        lines.append(
            f"{r['size']}/{r['method']}: {r['model_ms']:.0f} ms a step ({r['attention']:.0%} "
            f"attention, {r['density']:.1%} of pairs), dense {r['dense_model_ms']:.0f} ms "
            f"({r['dense_attention']:.0%} attention): {r['speedup']:.2f} x; "
            f"{r['layers']} layers timed, {r['step_ms']:.0f} ms ({r['step_p20']:.0f} to "
            f"{r['step_p80']:.0f})"
        )
    return "\n".join(lines + [f"not timed: {text}" for text in result["skipped"]])
