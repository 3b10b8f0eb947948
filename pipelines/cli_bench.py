"""`dittune bench`: what things cost."""

from __future__ import annotations

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
