"""What `dittune headhunt` does: prompts and settings in, a configuration with heads out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dittune.config import RunConfig, write_yaml
from dittune.errors import ConfigError
from dittune.methods.softpag import KINDS
from dittune.models import DENOISER_NAMES, facts_for
from dittune.pipelines.arguments import call_settings, check_numbers, read_lines
from dittune.pipelines.evaluate import load_prompts, with_seeds
from dittune.pipelines.headhunt import heat_map
from dittune.pipelines.headhunt.objectives import SHAPES_OBJECTIVES, load_objective
from dittune.pipelines.headhunt.search import Found, Search, Trial, hunt
from dittune.pipelines.loading import fingerprint, placed
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import RowLog, claim
from dittune.pipelines.scorers import Scorer, check_readable, scorer_for
from dittune.pipelines.team import Team


def headhunt_command(
    config: RunConfig,
    objective: str,
    objective_model: str | None,
    prompts: str,
    limit: int | None,
    seeds: int,
    rounds: int,
    per_round: int,
    halving: bool,
    batch: int,
    out: Path,
) -> dict[str, Any] | None:
    """Search, and write `out` (YAML for `--config`), its `.csv` of trials and its `.png` heat map.

    Args:
        config: model, steps, guidance and the settings of softpag.
        prompts: a prompt set or a file.
        limit: take this many prompts.
        seeds: images a prompt.

    Returns:
        The document for `--json`; None in all processes but the first.

    Raises:
        ConfigError: nothing to search, or `out` belongs to another search.
    """
    check_numbers(config)
    if objective in SHAPES_OBJECTIVES:
        check_readable(config)
    if out.suffix not in (".yaml", ".yml") or out.is_dir():  # beside it: .csv, .json, .png
        raise ConfigError(f"--out is the file for the heads, such as heads.yaml, got {out}")
    team = Team()
    method = dict(config.methods["softpag"])
    method.pop("heads")  # those of a preset
    if method.pop("first") is not None:
        raise ConfigError("softpag.first cuts a list of heads; a search tries each alone")
    device = team.device(config.device)
    pipeline = Pipeline.from_pretrained(config.model, device=device, dtype=config.dtype)
    texts = _prompts(prompts, limit, objective, scorer_for(pipeline.pipe))
    settings = call_settings(pipeline.pipe, config)
    search = Search(
        rounds=rounds,
        per_round=per_round,
        halving=halving,
        batch=batch,
        method=method,
        pipeline=settings,
    )
    identity = {
        "model": config.model,
        "weights": fingerprint(config.model),
        "objective": objective,
        "objective_model": objective_model,
        "method": method,
        "pipeline": settings,
        **placed(pipeline.pipe),
    }
    log = out.with_suffix(".csv")
    if team.rank == 0:  # scores of two searches would not compare
        claim(log, identity)
    judge = load_objective(objective, objective_model, str(pipeline.pipe.device))
    heads = head_pool(pipeline, method.get("kind", ""))
    if rounds * per_round > len(heads):
        raise ConfigError(
            f"{rounds} rounds of {per_round} heads need {rounds * per_round} heads, "
            f"{config.model} has {len(heads)}"
        )
    pairs = with_seeds(texts, seeds)
    found, plain = hunt(pipeline, judge, heads, pairs, search, log, team)
    if team.rank > 0:
        return None
    config.methods = {"softpag": {**config.methods["softpag"], "heads": _joined(found)}}
    out.write_text(_comment(found, plain, objective) + write_yaml(config), encoding="utf-8")
    _draw(team, log, pairs, found, plain, objective, out)
    return {
        "plain": plain,
        "heads": [dataclasses.asdict(head) for head in found],
        "config": vars(config),
        "pairs": len(pairs),
        "out": str(out),
    }


def head_pool(pipeline: Pipeline, kind: str) -> list[str]:
    """All heads of one kind of site, `layer:head`, in execution order."""
    pipe = pipeline.pipe
    model = next(getattr(pipe, name) for name in DENOISER_NAMES if getattr(pipe, name, None))
    sites = facts_for(model).sites(model)
    kind = kind or next(k for k in KINDS if any(site.kind == k for site in sites))
    return [f"{s.layer}:{head}" for s in sites if s.kind == kind for head in range(s.heads)]


def _prompts(prompts: str, limit: int | None, objective: str, scorer: Scorer) -> list[str]:
    if scorer.modality == "video" and objective != "shapes" and ":" not in objective:
        raise ConfigError(f"objective {objective} scores pictures; videos: shapes, MODULE:FUNCTION")
    if objective in SHAPES_OBJECTIVES or not Path(prompts).is_file():
        return load_prompts(prompts, limit, scorer=scorer)
    texts = read_lines(Path(prompts))[:limit]
    if not texts:
        raise ConfigError(f"{prompts} holds no prompt")
    return texts


def _joined(found: Sequence[Found]) -> str:
    return ",".join(head.head for head in found)


def _comment(found: Sequence[Found], plain: float, objective: str) -> str:
    lines = [f"# heads found for the objective {objective}; plain model: {plain:.4f}"]
    lines += [f"# round {f.round}: {f.head} {f.score:.4f}" for f in found]
    return "\n".join(lines) + "\n"


def _draw(
    team: Team,
    log: Path,
    pairs: Sequence[tuple[str, int]],
    found: Sequence[Found],
    plain: float,
    objective: str,
    out: Path,
) -> None:
    """The first round, on the pairs of this search: every head alone."""
    rows, tried = [], set(pairs)
    for path in team.logs(log):
        rows += RowLog(path, Trial).read()
    alone: dict[str, list[float]] = {}
    for row in rows:
        if not row.base and row.head and (row.prompt, row.seed) in tried:
            alone.setdefault(row.head, []).append(row.score)
    scores = {head: fmean(values) for head, values in alone.items()}
    title = f"{objective}: each head alone"
    picture = heat_map.draw(scores, plain, [f.head for f in found], title)
    picture.save(out.with_suffix(".png"))
