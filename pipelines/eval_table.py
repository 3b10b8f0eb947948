"""Tables of scored images: success with intervals, and paired differences to the first variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dittune.pipelines.evaluate import ImageScore

Z95 = 1.959964
SIGNED = "{:+.1f} ({:+.1f} to {:+.1f})"


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(
    scores: Sequence[ImageScore], baseline: Sequence[ImageScore], what: str = "success"
) -> tuple[float, float, float] | None:
    """Mean difference to the baseline on the same prompts and seeds, with a 95 % interval.

    Images of one prompt are not independent, so the interval is over per-prompt means. A baseline
    of several variants counts by its mean.
    """
    means = _prompt_means(scores, baseline, what)
    if len(means) < 2:
        return None
    gain = means[:, 1] - means[:, 0]
    half = Z95 * gain.std(ddof=1) / math.sqrt(len(gain))
    return float(gain.mean()), float(gain.mean() - half), float(gain.mean() + half)


def failures_removed(
    scores: Sequence[ImageScore], baseline: Sequence[ImageScore]
) -> tuple[float, float, float] | None:
    """Share of the baseline's failures that are gone, net of new ones, with a 95 % interval.

    A ratio of means over prompts; its interval is by the delta method. None without failures.
    """
    means = _prompt_means(scores, baseline, "success")
    if len(means) < 2 or (means[:, 0] == 1).all():
        return None
    gain, failed = means[:, 1] - means[:, 0], 1 - means[:, 0]
    ratio = gain.mean() / failed.mean()
    spread = (gain - ratio * failed).std(ddof=1) / (math.sqrt(len(gain)) * failed.mean())
    return float(ratio), float(ratio - Z95 * spread), float(ratio + Z95 * spread)


def _prompt_means(
    scores: Sequence[ImageScore], baseline: Sequence[ImageScore], what: str
) -> np.ndarray:
    """(baseline, variant) mean over the seeds that both have, for each prompt, `[prompts, 2]`."""
    base = {key: float(np.mean(values)) for key, values in _grouped(baseline, what).items()}
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for s in scores:
        if (s.prompt, s.seed) in base:
            pair = (base[s.prompt, s.seed], float(getattr(s, what)))
            by_prompt.setdefault(s.prompt, []).append(pair)
    return np.array([np.mean(pairs, 0) for pairs in by_prompt.values()]).reshape(-1, 2)


def _grouped(scores: Sequence[ImageScore], what: str) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for s in scores:
        found.setdefault((s.prompt, s.seed), []).append(float(getattr(s, what)))
    return found


def against_sweep(
    scores: Sequence[ImageScore], labels: Sequence[str], swept: Sequence[str]
) -> dict[str, tuple[float, float, float] | None]:
    """Paired difference of each label to the mean of the swept variants, e.g. random head sets."""
    mean = [s for s in scores if s.variant in swept]
    return {
        label: paired_difference([s for s in scores if s.variant == label], mean)
        for label in labels
    }


def summarize(scores: Sequence[ImageScore]) -> list[dict[str, Any]]:
    """One row a variant, in the order in which they first occur; the first is the baseline."""
    labels = list(dict.fromkeys(s.variant for s in scores))
    groups = {label: [s for s in scores if s.variant == label] for label in labels}
    return [_row(label, groups[label], groups[labels[0]]) for label in labels]


def _row(label: str, own: Sequence[ImageScore], baseline: Sequence[ImageScore]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": label, "images": len(own)}
    row["success"] = _share(own, "success")
    for count in sorted({s.num_objects for s in own}):
        row[f"success_{count}"] = _share([s for s in own if s.num_objects == count], "success")
    row["objects_right"] = _share(own, "objects_right")
    row["stated_right"] = _share(own, "stated_right")
    row["no_extra"] = _share(own, "extra", wanted=0)
    difference = paired_difference(own, baseline) if own is not baseline else None
    row["difference"] = [round(x, 4) for x in difference] if difference else None
    removed = failures_removed(own, baseline) if own is not baseline else None
    row["failures_removed"] = [round(x, 4) for x in removed] if removed else None
    if not any(math.isnan(s.objective) for s in own):
        row["objective"] = round(float(np.mean([s.objective for s in own])), 4)
        moved = paired_difference(own, baseline, "objective") if own is not baseline else None
        row["objective_difference"] = [round(x, 4) for x in moved] if moved else None
    unsteady = [s.flicker for s in own if not math.isnan(s.flicker)]
    if unsteady:
        row["flicker"] = round(float(np.mean(unsteady)), 4)
    computed = [s.computed for s in own if not math.isnan(s.computed)]
    if computed:
        row["computed"] = round(float(np.mean(computed)), 4)
    row["seconds_per_image"] = round(float(np.median([s.seconds for s in own])), 4)
    row["peak_mib"] = max(s.peak_mib for s in own)
    return row


def _share(scores: Sequence[ImageScore], what: str, wanted: Any = True) -> dict[str, float]:
    hits = sum(getattr(s, what) == wanted for s in scores)
    low, high = wilson(hits, len(scores))
    share = hits / len(scores) if scores else float("nan")
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown; shares in per cent with their 95 % interval."""
    shares = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    judged = "objective" in rows[0]
    head = ["variant", "images", *shares, "difference", "failures removed"]
    head += ["objective", "its difference"] if judged else []
    filmed = any("flicker" in row for row in rows)
    is_sparse = any("computed" in row for row in rows)
    head += ["flicker"] * filmed + ["pairs computed"] * is_sparse + ["s/image", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["variant"], str(row["images"])]
        for key in shares:
            value = row.get(key)  # a variant still under way may lack some numbers of objects
            if value is None:
                cells.append("")
                continue
            share, low, high = (100 * value[part] for part in ("share", "low", "high"))
            cells.append(f"{share:.1f} ({low:.1f} to {high:.1f})")
        for gap in (row["difference"], row["failures_removed"]):
            cells.append("" if gap is None else SIGNED.format(*(100 * x for x in gap)))
        if judged:
            gap = row["objective_difference"]
            cells.append(f"{row['objective']:.3f}")
            cells.append("" if gap is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap))
        cells += [f"{row['flicker']:.2f}" if "flicker" in row else ""] * filmed
        cells += [f"{row['computed']:.0%}" if "computed" in row else ""] * is_sparse
        cells += [f"{row['seconds_per_image']:.2f}", f"{row['peak_mib']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
