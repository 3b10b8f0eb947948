"""The command line: thin, every heavy import inside a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_config import config_app
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
    read_prompts,
    resolve_flags,
    say,
)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

UsageError = typer.BadParameter.__base__  # typer exports the leaf classes only

app = typer.Typer(
    help="Attention control for diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what to draw")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="one prompt a line")] = None,
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    config: ConfigFile = None,
    from_: Annotated[Path | None, typer.Option("--from", help="repeat this PNG")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    seed: Annotated[int | None, typer.Option(help="drawn at random if absent")] = None,
    num_images: Annotated[int | None, typer.Option(help="images a prompt")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    size: Annotated[str | None, typer.Option(help="SIDE or WIDTHxHEIGHT in pixels")] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("outputs"),
    show_maps: Annotated[bool, typer.Option(help="also draw where concepts are seen")] = False,
    dry_run: Annotated[bool, typer.Option(help="print the resolved configuration only")] = False,
    as_json: Json = False,
) -> None:
    """Make images; run again, it continues where it stopped."""
    from dittune.config import write_yaml
    from dittune.pipelines import generate as generation

    flags = {"model": model, "negative_prompt": negative_prompt, "seed": seed, "size": size}
    flags |= {"num_images": num_images, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype, "prompts": read_prompts(prompt, prompts_file)}
    resolved = resolve_flags(config, from_, flags, method, set_)
    if dry_run:
        generation.check(resolved)
        emit(vars(resolved)) if as_json else print(write_yaml(resolved), end="")
        return
    drawn = resolved.seed is None
    todo = generation.prepare(resolved, out)
    pipeline = generation.load(resolved) if todo else None
    total = len(resolved.prompts) * resolved.num_images
    if len(todo) < total:
        say(f"{total - len(todo)} of {total} images are there already")
    made = []
    for job, record in generation.run(resolved, todo, pipeline, show_maps):
        if drawn and not made:
            say(f"seed {resolved.seed}")
        made.append({"path": str(job.path), **record})
        if not as_json:
            print(job.path)
    if as_json:
        emit({"images": made, "skipped": total - len(todo)})


@app.command("eval")
def evaluate(
    prompts: Annotated[str, typer.Option(help="train, val, test, or a file")] = "val",
    seeds: Annotated[int, typer.Option(min=1, help="images a prompt")] = 1,
    limit: Annotated[int | None, typer.Option(min=2, help="use this many prompts")] = None,
    model: Model = "shapes-sd3",
    method: Methods = None,
    set_: Sets = None,
    sweep: Annotated[list[str] | None, typer.Option(help="METHOD.FIELD=V1;V2;...")] = None,
    objective: Annotated[str | None, typer.Option(help="one more score, as of headhunt")] = None,
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

    `LABEL@G` is a variant under guidance scale G; the first variant is the baseline.
    """
    from dittune.pipelines.eval_command import eval_command, without_guidance

    flags = {"model": model, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype}
    labels = list(dict.fromkeys(method or ["none"]))
    wanted = dict.fromkeys(map(without_guidance, labels))
    resolved = resolve_flags(config, None, flags, [m for m in wanted if m != "none"], set_)
    result = eval_command(
        resolved, labels, sweep or [], prompts, seeds, limit, batch, objective, merge_padding, out
    )
    if result is not None:  # else a further process of `accelerate launch`
        table, document = result
        emit(document) if as_json else print(table)


@app.command()
def headhunt(
    objective: Annotated[
        str,
        typer.Option(help="shapes, warm, large, white, clip, pickscore, hpsv2 or MODULE:FUNCTION"),
    ] = "shapes",
    objective_model: Annotated[str | None, typer.Option(help="its weights: folder, hub id")] = None,
    prompts: Annotated[str, typer.Option(help="train, val, or a file")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="use this many prompts")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="images a prompt")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="how often heads are added")] = 1,
    per_round: Annotated[int, typer.Option(min=1, help="heads added in a round")] = 3,
    halving: Annotated[bool, typer.Option(help="drop hopeless heads early")] = False,
    model: Model = None,
    set_: Sets = None,
    config: ConfigFile = None,
    steps: Steps = None,
    guidance_scale: Guidance = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="images a call")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="YAML with the heads, for --config")] = Path(
        "outputs/heads.yaml"
    ),
    as_json: Json = False,
) -> None:
    """Search the heads whose perturbation guides best; run again, it continues."""
    from dittune.pipelines.headhunt.command import headhunt_command

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


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and their settings."""
    from dittune.pipelines.listing import list_methods

    list_methods(emit if as_json else None)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="a model to look into")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="its attention sites")] = False,
    as_json: Json = False,
) -> None:
    """List bundled checkpoints and model families, or the attention sites of one model."""
    from dittune.pipelines.listing import list_models, list_sites

    if name is None and not layers:
        list_models(emit if as_json else None)
    else:
        list_sites(name or "shapes-sd3", emit if as_json else None)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line and exit code 2 for whatever the user can mend."""
    from dittune.errors import DittuneError

    try:
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except UsageError as error:
        if error.format_message():  # none where the help was shown instead
            say(f"error: {' '.join(error.format_message().split())}")
        code = 2
    except (DittuneError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        code = 2
    if code == 130:  # Typer itself makes this of a KeyboardInterrupt
        say("interrupted; run the same command again to continue")
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":  # for `accelerate launch -m dittune.pipelines.cli`
    main()
