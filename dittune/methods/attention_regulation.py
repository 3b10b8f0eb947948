"""Attention Regulation: every word gets a high point and an equal share of the attention.

At each chosen site a small optimisation finds bumps to be added to the logits of the words, without
gradients through the model.

Source: "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion
Models" (arXiv 2403.06381), and its reference code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dittune.call import AttnCall, Site
from dittune.errors import ConfigError
from dittune.heads import parse_layers
from dittune.method import Method
from dittune.run import ModelInputs, Run
from dittune.words.attn_maps import logits, rows_at_once, word_sites
from dittune.words.cond_core import with_core
from dittune.words.map_losses import unevenness
from dittune.words.tokens import (
    Concept,
    PromptWords,
    find_rivals,
    parse_concepts,
    words_of_pictures,
)

FIRST_WEIGHT = 0.5  # of each bump: the mean of the reference's random start
# Of the descent, a bump: 100 for the 49 bumps of the paper; fewer bumps move more each. In joint
# attention only the prompt's tokens compete, whose shares answer faster.
RATE = {"cross": 100.0 / 49, "joint": 30.0 / 49}
BLEND = 0.75  # share of this step's solution, the rest is the step's before
DECAY = 0.99  # of the whole, a step


@dataclass(frozen=True, kw_only=True)
class AttentionRegulation(Method):
    """Add bumps to the logits of words where they are found to even out the attention.

    Only image rows of the conditional rows are changed. In cross attention the columns of the
    first token and of the end of the text keep their probabilities, so that rows no longer sum to
    one; in joint attention all keys compete, and shares are of what the prompt's tokens get.

    Args:
        concepts: `red+circle, blue+square`, every word counts by itself; empty takes the nouns of
            the noun groups found in each prompt, two or more. A picture without a concept is left
            alone.
        scale: factor of the bumps; 0 leaves the logits alone.
        iterations: of the descent, at each site and step.
        layers: where, `3,5-7`, counted among the joint or cross layers; empty is the model's own
            choice. They must have one resolution.

    Raises:
        ConfigError: a value outside its range; while generating, a word that is not in the prompt,
            or no prompt at all.
        SelectionError: at `attach`, no attention to text, or layers the model does not have.

    Differs: starts at equal weights, not at random ones, and at the first step from its own
    solution; keeps the best iteration of each picture, not of the batch; steps are remembered by
    site; bumps fit any grid, and the rate of descent goes with their number. A word of several
    tokens has the sum of its maps.
    """

    weighs_words: ClassVar[bool] = True

    concepts: str = ""
    scale: float = 1.0
    iterations: int = 20
    layers: str = ""
    stop: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_concepts(self.concepts)
        parse_layers(self.layers)
        if not math.isfinite(self.scale):
            raise ConfigError(f"attention_regulation: scale is a finite number, got {self.scale}")
        if self.iterations < 1:
            raise ConfigError(
                f"attention_regulation: iterations is a number from 1 on, got {self.iterations}"
            )

    @property
    def is_neutral(self) -> bool:
        return super().is_neutral or self.scale == 0.0

    def sites(self, available: Sequence[Site]) -> Sequence[Site]:
        return word_sites(available, parse_layers(self.layers), self.name)

    def find(self, prompt: str) -> Sequence[Concept]:
        return [concept[-1:] for concept in find_rivals(prompt)]

    def around_model(
        self, inputs: ModelInputs, model: Callable[[ModelInputs], torch.Tensor]
    ) -> torch.Tensor:
        memory = inputs.run.memory(self)
        if "cond" in inputs.roles and not hasattr(memory, "words"):
            asked = parse_concepts(self.concepts)
            memory.words = words_of_pictures(inputs, asked, self.find, self.name)
            memory.solved, memory.losses = {}, []
        return model(inputs)

    def attend(self, call: AttnCall, proceed: Callable[[AttnCall], torch.Tensor]) -> torch.Tensor:
        return with_core(self._core, call, proceed)

    @torch.compiler.disable  # a descent inside
    def _core(self, core: Callable[[AttnCall], torch.Tensor], call: AttnCall) -> torch.Tensor:
        """The model's attention core, but regulated in the conditional rows that have words."""
        call = call._replace(core=core)
        words = call.run.memory(self).words
        cond, batch = call.chunk_of("cond"), call.query.shape[0]
        if cond is None or not any(w.concepts for w in words):
            return core(call)
        first, last = cond
        parts = [core(call.take_rows(0, first))] if first else []
        own = call.take_rows(first, last)
        own = own._replace(roles=own.roles * (last - first))  # so that each row is a chunk
        for i in range(last - first):
            one = own.take_rows(i, i + 1)
            parts.append(self._regulated(one, i, words[i]) if words[i].concepts else core(one))
        if last < batch:
            parts.append(core(call.take_rows(last, batch)))
        return torch.cat(parts)

    def _regulated(self, call: AttnCall, picture: int, words: PromptWords) -> torch.Tensor:
        """The output of one picture's row, `[1, H, Sq, D]`."""
        first, last = call.layout.image
        begin, end = call.layout.text
        is_cross = call.site.kind == "cross"
        rivals = range(end - begin) if is_cross else words.tokens
        member = torch.zeros(len(words.words), end - begin, device=call.query.device)
        for row, tokens in zip(member, words.words, strict=True):
            row[list(tokens)] = 1  # (W, T)
        text = logits(call.take_queries(first, last), slice(begin, end))[0]  # (H, N, T)
        added = self._added(call, picture, text[..., list(rivals)], member[:, list(rivals)])
        change = torch.einsum("hwn,wt->hnt", added, member.to(added))
        kept = [0, words.tokens[-1] + 1] if is_cross else []  # start and end of the text
        size = rows_at_once(call)
        out = [call.core(call.take_queries(0, first))] if first else []
        for a in range(first, last, size):
            b = min(a + size, last)
            plain = logits(call.take_queries(a, b))
            raised = plain.clone()
            raised[..., begin:end] += change[:, a - first : b - first]
            probabilities = raised.softmax(-1)
            if kept:
                probabilities[..., kept] = plain.softmax(-1)[..., kept]
            out.append((probabilities @ call.value.to(plain.dtype)).to(call.value.dtype))
        if last < call.query.shape[2]:
            out.append(call.core(call.take_queries(last, call.query.shape[2])))
        return torch.cat(out, 2)

    def _added(
        self, call: AttnCall, picture: int, text: torch.Tensor, member: torch.Tensor
    ) -> torch.Tensor:
        """What is added to the logits of each word, `[H, W, N]`."""
        memory = call.run.memory(self)
        fields = bumps(*call.layout.grid[1:]).to(text)
        rate = RATE[call.site.kind] * len(fields)
        solution, losses = solve(text.detach(), member.to(text), fields, rate, self.iterations)
        memory.losses.append(losses)
        key = call.site, picture, call.layout.grid  # beside scale_dit, the picture grows
        before = memory.solved.get(key, solution)
        memory.solved[key] = solution
        return self.scale * DECAY**call.run.step * torch.lerp(before, solution, BLEND)

    def report(self, run: Run) -> dict[str, Any]:
        """Mean loss over sites, steps, pictures and heads: at the start of the descent, at best."""
        losses = getattr(run.memory(self), "losses", [])
        if not losses:
            return {"solved": 0}
        before, after = torch.stack(losses).mean(0).tolist()
        return {"solved": len(losses), "loss_before": before, "loss_after": after}


def bumps(height: int, width: int) -> torch.Tensor:
    """Gaussians on a grid of image tokens, `[C, height * width]`.

    Their deviation is a sixteenth of a side, and two of these lie between their centres.
    """
    rows, columns = (_line(side) for side in (height, width))
    return torch.einsum("ay,bx->abyx", rows, columns).reshape(-1, height * width)


def _line(side: int) -> torch.Tensor:
    sigma = max(1, side // 16)
    centres = range(2 * sigma, side, 2 * sigma) or (side / 2,)
    distance = torch.arange(side) - torch.tensor([float(centre) for centre in centres])[:, None]
    return torch.exp(-distance.square() / (2 * sigma**2))


def solve(
    text: torch.Tensor, member: torch.Tensor, fields: torch.Tensor, rate: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Descend the unevenness of the words' maps over the weights of the bumps.

    Args:
        text: logits `[H, N, K]` of the text tokens that compete.
        member: `[W, K]`, 1 where a token belongs to a word.
        fields: `[C, N]`, the bumps.
        rate: of gradient descent.
        iterations: of it.

    Returns:
        What is added to the logits of each word at the best iteration, `[H, W, N]`, and the mean
        loss over heads at the first and at the best one.
    """
    weights = text.new_full((len(text), len(member), len(fields)), FIRST_WEIGHT)
    best, lowest, first = None, None, None
    for _ in range(iterations):
        weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            added = weights @ fields
            maps = (text + torch.einsum("hwn,wk->hnk", added, member)).softmax(-1)
            losses = unevenness(torch.einsum("hnk,wk->hwn", maps, member), weights)
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
        loss = losses.detach().mean()
        if best is None or loss < lowest:
            best, lowest = added.detach(), loss
        first = loss if first is None else first
        weights = weights - rate * gradient
    return best, torch.stack([first, lowest])
