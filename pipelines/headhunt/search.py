"""HeadHunter: rounds of trying every head beside those found so far, and keeping the best.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (arXiv 2506.10978),
algorithm 1. Beyond it: candidates share denoiser calls, hopeless ones can be dropped early, and
every score is on disk before the next image is begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from dittune.heads import HeadSet
from dittune.methods.merge_padding import MergePadding
from dittune.pipelines.headhunt.candidates import SoftPAGPerImage
from dittune.pipelines.headhunt.objectives import Objective
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.row_log import RowLog
from dittune.pipelines.team import Team

KEPT_SHARE = 0.5  # of the candidates, after each rung but the last of successive halving
RUNGS = (0.25, 0.5, 1.0)  # shares of the prompt-seed pairs that survivors have been tried on


@dataclass(frozen=True)
class Trial:
    """One scored image: `head` was perturbed beside the heads `base`; both may be empty."""

    base: str
    head: str
    prompt: str
    seed: int
    score: float


@dataclass(frozen=True)
class Found:
    """One selected head, its mean score when it was selected, and in which round (from 1)."""

    head: str
    score: float
    round: int


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to search.

    Args:
        rounds: how often the best heads are added.
        per_round: heads added in a round.
        halving: successive halving: all candidates are tried on a quarter of the pairs, the better
            half on another quarter, the best quarter on all.
        batch: images in one call.
        method: settings of softpag but `heads`: `scale`, `u`, `perturbation`, `kind`, ...
        pipeline: arguments of every call, e.g. `num_inference_steps`, `guidance_scale`.
    """

    rounds: int
    per_round: int
    halving: bool
    batch: int
    method: dict
    pipeline: dict

    def images(self, heads: int, pairs: int) -> int:
        """How many images the whole search makes."""
        total = pairs
        for done in range(self.rounds):
            pool, tried = heads - done * self.per_round, 0
            for count, kept in self.rungs(pool, pairs):
                total += pool * (count - tried)
                pool, tried = kept, count
        return total

    def rungs(self, pool: int, pairs: int) -> list[tuple[int, int]]:
        """(pairs that a candidate has been tried on, candidates kept) after each rung."""
        if not self.halving:
            return [(pairs, self.per_round)]
        counts = sorted({max(1, round(share * pairs)) for share in RUNGS})
        rungs = []
        for count in counts:
            pool = max(self.per_round, int(pool * KEPT_SHARE + 0.5))
            rungs.append((count, pool if count < pairs else self.per_round))
        return rungs


def hunt(
    pipeline: Pipeline,
    objective: Objective,
    heads: Sequence[str],
    pairs: Sequence[tuple[str, int]],
    search: Search,
    log: Path,
    team: Team | None = None,
) -> tuple[list[Found], float]:
    """Find the heads whose perturbation guides best.

    Args:
        heads: the pool, each `layer:head`.
        pairs: (prompt, seed), the same for every candidate.
        log: CSV file of trials; those in it are not made again. Each further process of the team
            writes its own beside it.

    Returns:
        The heads in order of selection, and the mean score of the plain model.
    """
    team = team or Team()
    table = _Table(pipeline, objective, search, RowLog(team.own(log), Trial), team)
    total = search.images(len(heads), len(pairs))
    table.bar = tqdm(total=total, desc="headhunt", unit="image", disable=team.rank > 0)
    with table.bar:
        table.load(log)
        plain = fmean(table.scores("", [""], pairs)[""])
        found: list[Found] = []
        for number in range(1, search.rounds + 1):
            base = ",".join(f.head for f in found)
            pool = [head for head in heads if head not in {f.head for f in found}]
            for count, kept in search.rungs(len(pool), len(pairs)):
                scores = table.scores(base, pool, pairs[:count])
                pool = sorted(pool, key=lambda head: -fmean(scores[head]))[:kept]  # ties by order
            found += [Found(head, fmean(scores[head]), number) for head in pool]
    return found, plain


class _Table:
    """All trials, those of earlier runs included; makes the missing ones."""

    def __init__(self, pipeline, objective, search: Search, log: RowLog, team: Team):
        self.pipeline, self.objective, self.search = pipeline, objective, search
        self.log, self.team, self.bar = log, team, None
        self.known: dict[tuple[str, str, str, int], float] = {}

    def load(self, log: Path) -> None:
        """Read what all processes of this and earlier runs have written, if this is the first."""
        rows = []
        if self.team.rank == 0:
            for path in self.team.logs(log):
                rows += RowLog(path, Trial).read()
        self._learn(self.team.gather(rows))
        self.bar.update(len(self.known))

    def scores(
        self, base: str, heads: Sequence[str], pairs: Sequence[tuple[str, int]]
    ) -> dict[str, list[float]]:
        """The scores of each head, in the order of the pairs."""
        wanted = [(base, head, *pair) for pair in pairs for head in heads]
        missing = [key for key in wanted if key not in self.known]
        batches = [
            missing[i : i + self.search.batch] for i in range(0, len(missing), self.search.batch)
        ]
        made = []
        for batch in self.team.share(batches):
            trials = self._try(batch)
            self.log.append(trials)
            made += trials
            self.bar.update(len(trials) * self.team.size)
        self._learn(self.team.gather(made))
        return {head: [self.known[(base, head, *pair)] for pair in pairs] for head in heads}

    def _learn(self, trials: Sequence[Trial]) -> None:
        for t in trials:
            self.known[t.base, t.head, t.prompt, t.seed] = t.score

    def _try(self, keys: Sequence[tuple[str, str, str, int]]) -> list[Trial]:
        prompts, seeds = [key[2] for key in keys], [key[3] for key in keys]
        pairs = list(zip(prompts, seeds, strict=True))
        self.pipeline.methods = [
            MergePadding(),
            SoftPAGPerImage(
                per_image=tuple(str(HeadSet(f"{base},{head}")) for base, head, *_ in keys),
                twin_of=tuple(pairs.index(pair) for pair in pairs),
                **self.search.method,
            ),
        ]
        arguments = {"prompt": prompts, "seed": seeds, **self.search.pipeline}
        images = self.pipeline(**arguments, progress=False).images
        values = self.objective(images, prompts)
        return [Trial(*key, float(value)) for key, value in zip(keys, values, strict=True)]
