"""`dittune bench`: what things cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_options import Json, Model, emit

bench_app = typer.Typer(help="Measure.", no_args_is_help=True)


@bench_app.command("attach")
def bench_attach(
    rounds: Annotated[int, typer.Option(min=3, help="timed pairs a setting")] = 21,
    as_json: Json = False,
) -> None:
    """What an attached method that does nothing costs, per denoising step."""
    from dittune.pipelines import bench

    result = bench.bench_attach(rounds)
    emit(result) if as_json else print(bench.as_text(result))


@bench_app.command("headhunt")
def bench_headhunt(
    model: Model = "shapes-sd3",
    rounds: Annotated[int, typer.Option(min=1, help="timed pairs")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="images a call")] = 16,
) -> None:
    """Images a second that the search scores, against a loop over single images; JSON."""
    from dittune.pipelines.headhunt import bench

    emit(bench.bench_headhunt(model, rounds=rounds, batch=batch))


@bench_app.command("memory")
def bench_memory() -> None:
    """Memory of a gradient step on the latents at the size of SD 1.5, against a plain one; JSON."""
    from dittune.pipelines import bench_memory

    emit(bench_memory.bench_memory())


@bench_app.command("regions")
def bench_regions(
    prompts: Annotated[str, typer.Option(help="train, val or test")] = "test",
    limit: Annotated[int, typer.Option(min=1, help="use this many prompts of two objects")] = 80,
    scale: Annotated[list[float] | None, typer.Option(help="of regions; one row each")] = None,
    stop: Annotated[float, typer.Option(help="share of the steps after which it stops")] = 0.7,
    model: Model = "shapes-sd3",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance_scale: Annotated[float, typer.Option()] = 3.5,
    as_json: Json = False,
) -> None:
    """Objects of the Shapes world inside their boxes, with and without `regions`."""
    from dittune.methods.regions import Regions
    from dittune.pipelines import region_eval as evaluation
    from dittune.pipelines.pipeline import Pipeline

    variants = [None, *(Regions(scale=value, stop=stop) for value in scale or [Regions.scale])]
    rows = evaluation.evaluate_regions(
        Pipeline.from_pretrained(model), evaluation.region_prompts(prompts, limit), variants,
        num_inference_steps=steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    emit(rows) if as_json else print(evaluation.as_markdown(rows), end="")


@bench_app.command("attention")
def bench_attention(
    cpu: Annotated[bool, typer.Option("--cpu", help="shapes for a CPU")] = False,
    only: Annotated[str, typer.Option(help="part of SHAPE/PATTERN/BACKEND")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="timed calls of each kernel")] = 30,
    out: Annotated[Path, typer.Option(help="folder of attention.csv and .svg")] = Path(
        "outputs/attention"
    ),
    as_json: Json = False,
) -> None:
    """Sparse attention against dense, on the shapes of real models."""
    from dittune.pipelines.attention_bench import bench

    result = bench.bench_attention(cpu, only, rounds, out)
    emit(result) if as_json else print(bench.as_text(result))


@bench_app.command("model")
def bench_model(
    cpu: Annotated[bool, typer.Option("--cpu", help="a size for a CPU")] = False,
    only: Annotated[str, typer.Option(help="part of SIZE/METHOD")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="timed steps of each method")] = 5,
    out: Annotated[Path, typer.Option(help="folder of model.csv")] = Path("outputs/attention"),
    as_json: Json = False,
) -> None:
    """Steps of whole video models with sparse attention against dense, and attention's share."""
    from dittune.pipelines.attention_bench import model_bench

    result = model_bench.bench_model(cpu, only, rounds, out)
    emit(result) if as_json else print(model_bench.as_text(result))
