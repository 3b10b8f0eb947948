"""What `dittune eval` does: variants and sweeps in, a table, a picture grid and curves out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dittune.attach import attach
from dittune.config import RunConfig, build_methods, resolve
from dittune.errors import ConfigError
from dittune.methods.merge_padding import MergePadding
from dittune.pipelines import curves
from dittune.pipelines.arguments import call_settings, check_numbers
from dittune.pipelines.eval_table import against_sweep, as_markdown, summarize
from dittune.pipelines.evaluate import Variant, evaluate, load_prompts
from dittune.pipelines.headhunt.objectives import load_objective
from dittune.pipelines.loading import fingerprint, placed, public_name
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import claim
from dittune.pipelines.scorers import check_readable, scorer_for
from dittune.pipelines.team import Team

PLAIN = "none"


def eval_command(
    config: RunConfig,
    labels: Sequence[str],
    sweeps: Sequence[str],
    prompts: str,
    seeds: int,
    limit: int | None,
    objects: Sequence[int],
    batch: int,
    objective: str | None,
    objective_model: str | None,
    merge_padding: bool,
    out: Path,
) -> tuple[str, dict[str, Any]] | None:
    """Score variants of a model.

    Args:
        config: its methods are the labels without `none` and without `@`.
        labels: variants in order, the first one is the baseline: `none` is the plain model, others
            are labels of methods; `LABEL@G` is one under guidance scale G.
        sweeps: `LABEL.FIELD=V1;V2;...`: one more variant of a method for each value.
        objective: a further score, see `load_objective`; `objective_model` are its weights.
        merge_padding: compute equal text tokens once in every variant: the same, but for rounding.

    Returns:
        The table as Markdown, and the document for `--json`; both are also written to `out`, with
        `curves.svg` if there are sweeps, and `work.svg` if these are of sparse methods. None in all
        processes but the first.

    Raises:
        ConfigError: a variant, sweep, prompt or objective that cannot be understood.
    """
    check_numbers(config)
    check_readable(config)
    built = build_methods(config)
    variants = [_variant(label, built) for label in labels]
    swept = {sweep: _sweep(sweep, config) for sweep in sweeps}
    variants += [variant for group in swept.values() for variant in group]
    twice = [label for label, n in Counter(v.label for v in variants).items() if n > 1]
    if twice:
        raise ConfigError(f"a variant is given twice: {', '.join(twice)}")
    if merge_padding:
        variants = [_merged(variant) for variant in variants]
    team = Team()
    device = team.device(config.device)
    pipeline = Pipeline.from_pretrained(config.model, device=device, dtype=config.dtype)
    scorer = scorer_for(pipeline.pipe)
    texts = load_prompts(prompts, limit, objects, scorer)
    if objective and scorer.modality == "video":
        raise ConfigError("objectives score pictures; leave --objective out for a video model")
    place = str(pipeline.pipe.device)
    judge = load_objective(objective, objective_model, place) if objective else None
    for variant in variants:  # what the model refuses, before the first picture is made
        with attach(pipeline.pipe, *variant.methods):
            pass
    settings = call_settings(pipeline.pipe, config)
    if team.rank == 0:
        about = {"model": config.model, "weights": fingerprint(config.model)}
        about |= {"objective": objective, "objective_model": objective_model}
        about |= {"pipeline": settings, **placed(pipeline.pipe)}
        about |= {f"variant {v.label}": repr(v) for v in variants}
        claim(out / "images.csv", about)
    scores = evaluate(
        pipeline,
        variants,
        texts,
        seeds,
        out,
        batch,
        objective=judge,
        scorer=scorer,
        **settings,
    )
    if team.rank > 0:
        return None
    rows = summarize(scores)
    table = as_markdown(rows)
    versus = {}
    for sweep, group in swept.items():
        gaps = against_sweep(scores, [v.label for v in variants[: len(labels)]],
                             [v.label for v in group])  # fmt: skip
        versus[sweep.partition("=")[0]] = gaps
        table += "\n" + "".join(
            "{} - mean of {}: {:+.1f} ({:+.1f} to {:+.1f})\n".format(
                label, sweep.partition("=")[0], *(100 * x for x in gap)
            )
            for label, gap in gaps.items()
            if gap
        )
    document = {"prompts": prompts, "seeds": seeds, "config": vars(config), "rows": rows}
    document["against_sweeps"] = versus
    (out / "table.md").write_text(table, encoding="utf-8")
    (out / "table.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    if sweeps:
        by_label = {row["variant"]: row for row in rows}
        lines = {
            sweep.partition("=")[0]: [by_label[v.label] for v in group]
            for sweep, group in swept.items()
        }
        picture = curves.draw(lines, rows[0], f"{public_name(config.model)}, {prompts} prompts")
        (out / "curves.svg").write_text(picture, encoding="utf-8")
        if all(
            "computed" in row and row["difference"] for group in lines.values() for row in group
        ):
            picture = curves.against_work(lines, f"{public_name(config.model)}, {prompts} prompts")
            (out / "work.svg").write_text(picture, encoding="utf-8")
    return table, document


def without_guidance(label: str) -> str:
    """`LABEL` of `LABEL@G`."""
    return label.partition("@")[0]


def _merged(variant: Variant) -> Variant:
    """The variant with `merge_padding` at the place it must have."""
    methods = sorted((MergePadding(), *variant.methods), key=lambda m: not m.weighs_words)
    return replace(variant, methods=tuple(methods))


def _variant(label: str, built: dict) -> Variant:
    text, at, scale = label.partition("@")
    name = text.partition("=")[0]  # of `LABEL=METHOD`
    methods = () if name == PLAIN else (built[name],)
    if not at:
        return Variant(name, methods)
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{label}: after @ comes a guidance scale, got {scale!r}")
    return Variant(f"{name}@{scale}", methods, number)


def _sweep(sweep: str, config: RunConfig) -> list[Variant]:
    path, equals, values = sweep.partition("=")
    label = path.partition(".")[0]
    if not (equals and values and label != path):
        raise ConfigError(f"--sweep is written METHOD.FIELD=V1;V2;..., got {sweep!r}")
    if label not in config.methods:
        raise ConfigError(f"--sweep {sweep}: method {label!r} is not in use; add --method {label}")
    content = asdict(config)
    variants = []
    for value in values.split(";"):
        changed = resolve(content, (), [f"{path}={value}"])
        variants.append(Variant(f"{path}={value}", (build_methods(changed)[label],)))
    return variants
