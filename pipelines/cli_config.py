"""`dittune config`: show and check configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dittune.pipelines.cli_options import Json, Methods, Model, Sets, emit, resolve_flags

config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)


@config_app.command("show")
def config_show(
    config: Annotated[Path | None, typer.Argument(help="YAML file")] = None,
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """Print the configuration as it would be run."""
    from dittune.config import write_yaml

    resolved = resolve_flags(config, None, {"model": model}, method, set_)
    emit(vars(resolved)) if as_json else print(write_yaml(resolved), end="")


@config_app.command("validate")
def config_validate(
    config: Annotated[Path, typer.Argument(help="YAML file")], as_json: Json = False
) -> None:
    """Check a configuration without running it."""
    from dittune.pipelines.arguments import check_numbers
    from dittune.pipelines.loading import locate, pick_dtype

    resolved = resolve_flags(config, None, {}, None, None)
    check_numbers(resolved)
    pick_dtype(resolved.dtype, "cpu")
    locate(resolved.model)
    emit({"valid": True, "path": str(config)}) if as_json else print(f"{config}: valid")
