"""Sparse attention in three dimensions, against attention written out by definition."""

import math

import pytest
import torch

import dittune
from dittune.method import Method
from tests.tiny import latents
from tests.tiny_video import cogvideox, hunyuan_video, ltx, mochi, wan


class Explicit(Method):
    """Attention by definition: text sees all but its padding, tokens of the video what `sees` says.

    `sees` gets two `(frame, row, column)` and the grid.
    """

    def __init__(self, sees):
        object.__setattr__(self, "sees", sees)
        super().__init__()

    def sites(self, available):
        return [site for site in available if site.kind in ("joint", "self")]

    def attend(self, call, proceed):
        (first, _), grid = call.layout.image, call.layout.grid
        places = [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
        mask = torch.ones(1, 1, call.query.shape[2], call.key.shape[2], dtype=torch.bool)
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                mask[..., first + i, first + j] = self.sees(query, key, grid)
        if "attn_mask" in call.options:
            mask = mask & call.options["attn_mask"]
        logits = call.query @ call.key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
        return logits.masked_fill(~mask, -math.inf).softmax(-1) @ call.value


def box(frames, side):
    """A window shifted inside at the borders, all of an axis that is shorter."""

    def sees(query, key, grid):
        for q, k, n, size in zip(query, key, grid, (frames, side, side)):
            size = min(size, n)
            first = min(max(q - size // 2, 0), n - size)
            if not first <= k < first + size:
                return False
        return True

    return sees


SIZES = {  # 3 frames of 3 x 5 tokens, neither square nor divisible; one frame
    wan: ({"num_frames": 9, "height": 32, "width": 48}, {"num_frames": 1}),
    hunyuan_video: ({"num_frames": 9, "height": 48, "width": 80}, {"num_frames": 1}),
    cogvideox: ({"num_frames": 9, "height": 48, "width": 80}, {"num_frames": 1}),
    ltx: ({"num_frames": 9, "height": 32, "width": 32}, {"num_frames": 1}),
    mochi: ({"num_frames": 13, "height": 48, "width": 80}, {"num_frames": 1}),
}
PROMPTS = ["a red circle", "a large red circle moving up"]  # padding differs in each row


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("build", SIZES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("is_still", [False, True], ids=["video", "one frame"])
def test_windows_of_a_video(build, is_still, backend):
    pipe, settings = build(), {"steps": 1, "prompt": PROMPTS, **SIZES[build][is_still]}
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, Explicit(box(2, 3))):
        wanted = latents(pipe, **settings)
    with dittune.attach(pipe, dittune.Natten(frames=2, window=3, backend=backend)) as handle:
        found = latents(pipe, **settings)
    assert (found - wanted).abs().max() < 1e-4
    report, computed = handle.report()["natten"].values()
    if report["backend"] == "plain":  # 2 x 2 tokens: a window is all of them
        assert computed == 1.0 and torch.equal(found, plain)
    else:
        assert report["backend"] == backend and (wanted - plain).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_discs_are_balls_and_means_are_of_each_frame(backend):
    pipe, settings = hunyuan_video(), {"steps": 1, "prompt": PROMPTS, **SIZES[hunyuan_video][0]}
    with dittune.attach(pipe, Explicit(lambda q, k, grid: math.dist(q, k) < 1.5)):
        wanted = latents(pipe, **settings)
    with dittune.attach(pipe, dittune.Clear(radius=1.5, backend=backend)):
        found = latents(pipe, **settings)
    assert (found - wanted).abs().max() < 1e-4
    with dittune.attach(pipe, dittune.Clear(radius=1.5, pooled=2, backend=backend)):
        assert (latents(pipe, **settings) - wanted).abs().max() > 1e-4
