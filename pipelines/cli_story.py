"""The commands about stories: `story` makes one, `story-eval` measures whether subjects stay."""

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
    Size,
    Steps,
    emit,
    parse_counts,
    read_prompts,
    resolve_flags,
    say,
)

MASKS_HELP = "maps (the model's own attention), shapes, or MODULE:FUNCTION, a segmenter"


def story(
    subject: Annotated[list[str], typer.Option(help="prompt of a reference: 'a red circle'")],
    scenes: Annotated[Path | None, typer.Option(help="one scene a line; names subjects")] = None,
    masks: Annotated[str, typer.Option(help=MASKS_HELP)] = "maps",
    model: Model = None,
    method: Methods = None,
    set_: Sets = None,
    config: ConfigFile = None,
    seed: Annotated[int | None, typer.Option(help="of the first reference, 0 if absent")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("outputs/story"),
    as_json: Json = False,
) -> None:
    """Make scenes in which the same subjects appear; run again, it continues where it stopped.

    The method is `isolation` if none is given; `shared_attention` is the other one for subjects.
    Without --scenes, those are the prompts of the --config.
    """
    from dittune.config import read_yaml
    from dittune.pipelines import generate as generation
    from dittune.pipelines.story import Story

    flags = {"model": model, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"negative_prompt": negative_prompt, "size": size, "device": device, "dtype": dtype}
    flags["prompts"] = read_prompts(None, scenes)
    given = read_yaml(config) if config else {}
    wanted = method or ([] if given.get("methods") else ["isolation"])
    resolved = resolve_flags(config, None, flags, wanted, set_)
    resolved.seed = resolved.seed or 0
    generation.check(resolved)
    made = []
    for row in (tale := Story(resolved, subject, masks, out)).run():
        made.append(vars(row))
        if not as_json:
            print(out / row.path)
    left = len(resolved.prompts) - len(made)
    if left:
        say(f"{left} of {len(resolved.prompts)} scenes are there already")
    if as_json:
        emit({"scenes": made, "skipped": left, "sheet": str(tale.sheet)})


def story_eval(
    prompts: Annotated[str, typer.Option(help="train, val or test")] = "val",
    each: Annotated[
        int, typer.Option(min=1, max=1000, help="stories of each number of subjects")
    ] = 20,
    subjects: Annotated[str, typer.Option(help="numbers of subjects")] = "2,3,4",
    set_: Sets = None,
    cost: Annotated[bool, typer.Option(help="also measure 1, 2 and 4 references")] = False,
    model: Model = "shapes-flux-marked",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="folder for tables and pictures")] = Path(
        "outputs/story-eval"
    ),
    as_json: Json = False,
) -> None:
    """Measure in the Shapes world whether marks that no prompt names are kept; resumes.

    The model must have been trained on marks (`train FAMILY --marked 0.67`). Methods:
    shared_attention and isolation, with keep=1 unless set otherwise.
    """
    from dittune.config import build_methods
    from dittune.pipelines import story_eval as evaluation
    from dittune.pipelines import story_table as tables
    from dittune.pipelines.arguments import call_settings
    from dittune.pipelines.loading import fingerprint, placed
    from dittune.pipelines.pipeline import Pipeline
    from dittune.pipelines.row_log import claim

    flags = {"model": model, "steps": steps, "guidance_scale": guidance_scale}
    flags |= {"device": device, "dtype": dtype}
    names = ("shared_attention", "isolation")
    given = [*(f"{name}.keep=1" for name in names), *(set_ or ())]
    resolved = resolve_flags(None, None, flags, names, given)
    counts = [*parse_counts(subjects)]
    told = [*evaluation.stories(prompts, each, counts)]
    compared = evaluation.variants(*build_methods(resolved).values())
    pipeline = Pipeline.from_pretrained(
        resolved.model, device=resolved.device, dtype=resolved.dtype
    )
    settings = call_settings(pipeline.pipe, resolved)
    about = {"model": resolved.model, "weights": fingerprint(resolved.model)}
    about |= {f"variant {label}": repr(methods) for label, methods in compared.items()}
    claim(out / "subjects.csv", about | {"pipeline": settings, **placed(pipeline.pipe)})
    rows = evaluation.evaluate_stories(pipeline, compared, told, out, **settings)
    table = tables.summarize(rows)
    document = {"prompts": prompts, "config": vars(resolved), "rows": table}
    text = tables.as_markdown(table)
    many = [row for row in rows if row.count >= tables.MANY]
    if 0 < len(many) < len(rows):
        document["rows_of_many"] = tables.summarize(many)
        text += f"\nOf {tables.MANY} subjects and more:\n\n"
        text += tables.as_markdown(document["rows_of_many"])
    if cost:
        document["costs"] = tables.costs(pipeline, compared, **settings)
        text += "\n" + tables.costs_markdown(document["costs"])
    curves = tables.against_distance(
        rows, [evaluation.PLAIN, "isolation", "both"], "marks kept by distance"
    )
    (out / "distance.svg").write_text(curves, encoding="utf-8")
    (out / "table.md").write_text(text, encoding="utf-8")
    emit(document) if as_json else print(text)
