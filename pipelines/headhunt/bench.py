"""`dittune bench headhunt`: images scored per second by the search and by a loop, in one process.

The loop makes one image a call, with `softpag` on the same heads, the same prompts, seeds and
settings, and scores it. Both are timed one after the other in each round, in an order that
alternates; the ratio is the median over rounds. Scores are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dittune.errors import DittuneError
from dittune.methods.softpag import SoftPAG
from dittune.pipelines.bench import hardware
from dittune.pipelines.evaluate import load_prompts
from dittune.pipelines.headhunt.command import head_pool
from dittune.pipelines.headhunt.objectives import large
from dittune.pipelines.headhunt.search import Search, Trial, hunt
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import RowLog


def bench_headhunt(
    model: str, heads: int = 16, prompts: int = 2, steps: int = 14, batch: int = 16, rounds: int = 5
) -> dict[str, Any]:
    """Time one round of a search over `heads` heads and `prompts` prompts of `val`.

    Returns:
        Images per second of both (medians), and the median and range of their ratio.

    Raises:
        DittuneError: the two disagree in what they score.
    """
    pipeline = Pipeline.from_pretrained(model)
    pool = head_pool(pipeline, "")[:heads]
    pairs = [(prompt, 0) for prompt in load_prompts("val", max(2, prompts))[:prompts]]
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0}
    search = Search(
        rounds=1, per_round=1, halving=False, batch=batch, method={"scale": 2.0}, pipeline=settings
    )

    def searching() -> dict[tuple[str, str], float]:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "trials.csv"
            hunt(pipeline, large, pool, pairs, search, log)
            return {(trial.head, trial.prompt): trial.score for trial in RowLog(log, Trial).read()}

    def looping() -> dict[tuple[str, str], float]:
        scores = {}
        for prompt, seed in pairs:
            for head in ["", *pool]:
                pipeline.methods = [SoftPAG(heads=head, scale=2.0)]
                images = pipeline(prompt, seed=seed, progress=False, **settings).images
                scores[head, prompt] = large(images, [prompt])[0]
        return scores

    ours, theirs = searching(), looping()
    gaps = [abs(ours[key] - theirs[key]) for key in theirs]
    if np.median(gaps) > 1e-3:
        raise DittuneError(f"search and loop disagree by {np.median(gaps):.4f}; not timing them")
    rates: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds):
        for fast in (True, False) if i % 2 else (False, True):
            started = time.perf_counter()
            made = searching() if fast else looping()
            rates[fast].append(len(made) / (time.perf_counter() - started))
    ratios = sorted(a / b for a, b in zip(rates[True], rates[False], strict=True))
    return {
        "model": model,
        "images": len(theirs),
        "steps": steps,
        "batch": batch,
        "largest_gap": max(gaps),
        "search_images_per_second": statistics.median(rates[True]),
        "loop_images_per_second": statistics.median(rates[False]),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "rounds": rounds,
        "hardware": hardware(),
    }
