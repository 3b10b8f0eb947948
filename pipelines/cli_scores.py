"""The commands that score pictures: `eval` and `headhunt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_options import (
    ConfigFile,
    Device,
    Dtype,
    Guidance,
    Json,
    Methods,
    Model,
    Sets,
    Steps,
    emit,
    parse_counts,
    resolve_flags,
)

ObjectiveModel = Annotated[
    str | None, typer.Option(help="weights of the objective: folder, hub id")
]


def evaluate(
    prompts: Annotated[str, typer.Option(help="train, val, test, or a file")] = "val",
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="images a prompt")] = 1,
    limit: Annotated[int | None, typer.Option(min=2, help="use this many prompts")] = None,
    objects: Annotated[str, typer.Option(help="only prompts of so many objects: 2,3")] = "",
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    sweep: Annotated[list[str] | None, typer.Option(help="METHOD.FIELD=V1;V2;...")] = None,
    objective: Annotated[str | None, typer.Option(help="one more score, as of headhunt")] = None,
    objective_model: ObjectiveModel = None,
    merge_padding: Annotated[bool, typer.Option(help="compute equal text tokens once")] = False,
    config: ConfigFile = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    batch: Annotated[int, typer.Option(min=1, help="images a call")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for tables and pictures")] = Path(
        "outputs/eval"
    ),
    as_json: Json = False,
) -> None:
    """Score methods against the plain model (`--method none`) on the same prompts and seeds.

    `LABEL@G` is a variant under guidance scale G; the first variant is the baseline. Without
    `--method` the variants are `none` and the methods of the --config.
    """
    from dittune.pipelines.eval_command import eval_command, without_guidance

    flags = {"model": model, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype}
    wanted = dict.fromkeys(map(without_guidance, method or ()))
    resolved = resolve_flags(config, None, flags, [m for m in wanted if m != "none"], set_)
    labels = list(dict.fromkeys(method or ["none", *resolved.methods]))
    result = eval_command(
        resolved, labels, sweep or [], prompts, seeds, limit, parse_counts(objects), batch,
        objective, objective_model, merge_padding, out,
    )  # fmt: skip
    if result is not None:  # else a further process of `accelerate launch`
        table, document = result
        emit(document) if as_json else print(table)


def headhunt(
    objective: Annotated[
        str,
        typer.Option(help="shapes, warm, large, white, clip, pickscore, hpsv2 or MODULE:FUNCTION"),
    ] = "shapes",
    objective_model: ObjectiveModel = None,
    prompts: Annotated[str, typer.Option(help="train, val, or a file")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="use this many prompts")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="images a prompt")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="how often heads are added")] = 1,
    per_round: Annotated[int, typer.Option(min=1, help="heads added in a round")] = 3,
    halving: Annotated[bool, typer.Option(help="drop hopeless heads early")] = False,
    model: Model = None,
    set_: Sets = None,
    config: ConfigFile = None,
    steps: Steps = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="classifier-free guidance; off if absent")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a call")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="YAML with the heads, for --config")] = Path(
        "outputs/heads.yaml"
    ),
    as_json: Json = False,
) -> None:
    """Search the heads whose perturbation guides best; run again, it continues."""
    from dittune.config import read_yaml
    from dittune.pipelines.headhunt.command import headhunt_command

    if config is None or "guidance_scale" not in read_yaml(config):
        guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    flags = {"model": model, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype}
    resolved = resolve_flags(config, None, flags, ["softpag"], set_)
    result = headhunt_command(
        resolved, objective, objective_model, prompts, limit, seeds, rounds, per_round, halving,
        batch, out,
    )  # fmt: skip
    if result is None:  # a further process of `accelerate launch`
        return
    if as_json:
        emit(result)
    else:
        print(out)
