"""The command line: thin, every heavy import inside a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_bench import bench_app
from dittune.pipelines.cli_config import config_app
from dittune.pipelines.cli_demo import demo
from dittune.pipelines.cli_options import (
    ConfigFile,
    Device,
    DryRun,
    Dtype,
    Guidance,
    Json,
    Methods,
    Model,
    PromptsFile,
    Seed,
    Sets,
    Size,
    Steps,
    emit,
    make,
    read_prompts,
    resolve_flags,
    say,
)
from dittune.pipelines.cli_scores import evaluate, headhunt
from dittune.pipelines.cli_story import story, story_eval
from dittune.pipelines.cli_video import video

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

UsageError = typer.BadParameter.__base__  # typer exports the leaf classes only

app = typer.Typer(
    help="Attention control for diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what to draw")] = None,
    prompts_file: PromptsFile = None,
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    region: Annotated[list[str] | None, typer.Option(help="'x0,y0,x1,y1: PHRASE'")] = None,
    config: ConfigFile = None,
    from_: Annotated[Path | None, typer.Option("--from", help="repeat this PNG")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    seed: Seed = None,
    num_images: Annotated[int | None, typer.Option(help="images a prompt")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("outputs"),
    show_maps: Annotated[bool, typer.Option(help="also draw where concepts are seen")] = False,
    maps_of: Annotated[str | None, typer.Option(help="'red, circle': maps of these")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make images; run again, it continues where it stopped."""
    flags = {"model": model, "negative_prompt": negative_prompt, "seed": seed, "size": size}
    flags |= {"num_images": num_images, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype, "prompts": read_prompts(prompt, prompts_file)}
    if region:
        from dittune.pipelines.region_prompts import joined, naming

        method = [*(method or ()), "regions"]
        set_ = [*(set_ or ()), f"regions.regions={joined(region)}"]
    resolved = resolve_flags(config, from_, flags, method, set_)
    if region:
        resolved.prompts = naming(resolved.prompts, region)
    make(resolved, out, ".png", dry_run, as_json, "" if show_maps and not maps_of else maps_of)


app.command("video")(video)
app.command("eval")(evaluate)
app.command("headhunt")(headhunt)
app.command("story")(story)
app.command("story-eval")(story_eval)
app.command("demo")(demo)


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

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        " ".join(arguments).encode()
        code = app(arguments, standalone_mode=False)
    except UnicodeEncodeError:
        say("error: the arguments must be text in UTF-8")
        code = 2
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
