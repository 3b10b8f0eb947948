"""Tables of kept marks: shares with intervals, differences to plain, against distance, and cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dittune.method import Method
from dittune.methods.merge_padding import MergePadding
from dittune.pipelines import curves
from dittune.pipelines.eval_table import SIGNED, paired_difference, wilson
from dittune.pipelines.evaluate import PeakMemory
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.story import with_subjects
from dittune.pipelines.story_eval import SubjectRow, scene_prompt

MANY = 3  # subjects, from which on they are many
BINS = (0.0, 0.15, 0.3, 0.45, 1.5)  # of the distance, in sides of the picture


def share(rows: Sequence[SubjectRow], what: str) -> dict[str, float]:
    """Share of rows in which `what` holds, with its 95 % interval."""
    hits = sum(getattr(row, what) for row in rows)
    low, high = wilson(hits, len(rows))
    return {"share": hits / len(rows) if rows else float("nan"), "low": low, "high": high}


def summarize(rows: Sequence[SubjectRow]) -> list[dict[str, Any]]:
    """One row a variant; `kept` is of all subjects, and those that a reference lacks are not kept.

    `difference` and `fused_difference` are to the first variant, `over_second` to the second.
    """
    labels = list(dict.fromkeys(row.variant for row in rows))
    groups = {label: [row for row in rows if row.variant == label] for label in labels}
    scenes = {label: _scenes(own) for label, own in groups.items()}
    first, second = (*labels, labels[0])[:2]
    table = []
    for label, own in groups.items():
        line: dict[str, Any] = {"variant": label, "subjects": len(own), "kept": share(own, "kept")}
        for count in sorted({row.count for row in own}):
            line[f"kept_{count}"] = share([row for row in own if row.count == count], "kept")
        line |= {name: share(own, name) for name in ("readable", "found")}
        line["difference"] = line["over_second"] = line["fused_difference"] = None
        if label != first:
            line["difference"] = paired_difference(own, groups[first], "kept")
            line["fused_difference"] = paired_difference(scenes[label], scenes[first], "fused")
        if label not in (first, second):
            line["over_second"] = paired_difference(own, groups[second], "kept")
        line["fused_a_scene"] = float(np.mean([row.fused for row in scenes[label]]))
        line["seconds"] = float(np.median([row.seconds for row in scenes[label]]))
        line["peak_mib"] = max(row.peak_mib for row in own)
        table.append(line)
    return table


def _scenes(rows: Sequence[SubjectRow]) -> list[SubjectRow]:
    """A row of each scene."""
    return list({(row.prompt, row.seed): row for row in rows}.values())


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table; shares in per cent with their 95 % interval."""
    shares = [key for key, value in table[0].items() if isinstance(value, dict)]
    second = table[min(1, len(table) - 1)]["variant"]
    head = ["variant", "subjects", *shares, "difference", f"over {second}", "fused a scene"]
    head += ["difference", "s a story", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for line in table:
        cells = [line["variant"], str(line["subjects"])]
        for key in shares:
            low, high = 100 * line[key]["low"], 100 * line[key]["high"]
            cells.append(f"{100 * line[key]['share']:.1f} ({low:.1f} to {high:.1f})")
        for gap in (line["difference"], line["over_second"]):
            cells.append("" if gap is None else SIGNED.format(*(100 * x for x in gap)))
        gap = line["fused_difference"]
        cells.append(f"{line['fused_a_scene']:.2f}")
        cells.append("" if gap is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*gap))
        cells.append(f"{line['seconds']:.2f}")
        lines.append("| " + " | ".join([*cells, f"{line['peak_mib']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def against_distance(rows: Sequence[SubjectRow], labels: Sequence[str], title: str) -> str:
    """Curves of kept marks against how far the subject is from its place in the reference, SVG."""
    panels = {}
    for label in labels:
        own = [row for row in rows if row.variant == label]
        bins = []
        for low, high in itertools.pairwise(BINS):
            near = [row for row in own if low <= row.distance < high]
            if near:
                bins.append({"variant": f"d={low:g}+", "success": share(near, "kept")})
        panels[label] = bins
    first = rows[0].variant
    plain = [row for row in rows if row.variant == first]
    return curves.draw(panels, {"variant": first, "success": share(plain, "kept")}, title)


def costs(
    pipeline: Pipeline,
    compared: Mapping[str, tuple[Method, ...]],
    references: Sequence[int] = (1, 2, 4),
    rounds: int = 3,
    **settings,
) -> list[dict[str, Any]]:
    """Seconds and memory of a scene with so many references, relative to the plain scene alone.

    Subjects are `red circle`, `blue square`, ... in quarters of the picture. The fastest round
    counts; memory is that of the device, or of the process, which does not shrink again.
    """
    subjects = ["a red circle", "a blue square", "a green ring", "a pink cross"]
    places = ["0,0,0.5,0.5", "0.5,0,1,0.5", "0,0.5,0.5,1", "0.5,0.5,1,1"]
    alone = _cost(pipeline, (), ["a red circle"], rounds, settings)
    found = [{"variant": "scene alone", "references": 0, **alone, "times": 1.0}]
    for count in references:
        own = subjects[:count]
        boxes = [f"{box}: {one[2:]}" for box, one in zip(places, own, strict=False)]
        for label, methods in compared.items():
            told = with_subjects(methods, own, "; ".join(boxes))
            line = _cost(pipeline, told, [*own, scene_prompt(own)], rounds, settings)
            times = line["seconds"] / alone["seconds"]
            found.append({"variant": label, "references": count, **line, "times": round(times, 2)})
    return found


def _cost(pipeline, methods, prompts, rounds: int, settings) -> dict[str, float]:
    pipeline.methods = [MergePadding(), *methods]
    seconds = []
    with PeakMemory() as memory:
        for _ in range(rounds):
            started = time.perf_counter()
            pipeline(prompts, seed=0, progress=False, **settings)
            seconds.append(time.perf_counter() - started)
    return {"seconds": round(min(seconds), 6), "peak_mib": round(memory.mib)}


def costs_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    head = "| variant | references | s | times | peak MiB |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(
        f"| {c['variant']} | {c['references']} | {c['seconds']:.2f} | {c['times']:.2f} "
        f"| {c['peak_mib']:.0f} |\n"
        for c in lines
    )
