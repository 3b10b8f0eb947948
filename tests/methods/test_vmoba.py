"""VMoBA cuts videos as published, and its attention is that of its definition."""

import math

import pytest
import torch

import dittune
from dittune.call import TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.method import Method
from dittune.methods import vmoba
from tests.sparse.test_video import PROMPTS
from tests.tiny import latents, sd3
from tests.tiny_video import cogvideox, hunyuan_video, ltx, wan

CPU = torch.device("cpu")


def cut(grid, parts, before=0, after=0):
    tokens = grid[0] * grid[1] * grid[2]
    text = (0, before) if before else (tokens, tokens + after)
    return vmoba.cut_into(TokenLayout((before, before + tokens), text, grid), parts, CPU)


@pytest.mark.parametrize(
    ("grid", "parts", "size"),
    [
        ((21, 30, 52), (7, 1, 1), 3 * 30 * 52),
        ((21, 30, 52), (1, 6, 4), 21 * 5 * 13),
        ((21, 30, 52), (3, 6, 4), 7 * 5 * 13),
        ((21, 45, 80), (1, 5, 8), 21 * 9 * 10),
        ((21, 45, 80), (3, 3, 4), 7 * 15 * 20),
        ((24, 36, 64), (3, 3, 8), 8 * 12 * 8),
    ],
)
def test_chunks_of_published_sizes(grid, parts, size):
    chunks = cut(grid, parts)
    assert (chunks.start.diff() == size).all() and len(chunks.mean) == math.prod(parts)


@pytest.mark.parametrize("grid", [(5, 7, 3), (1, 3, 5), (1, 1, 1), (3, 4, 4)], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (4, 0), (0, 6)])
def test_chunks_are_boxes_of_about_one_size_and_nothing_is_lost(grid, before, after):
    chunks = cut(grid, (2, 3, 4), before, after)
    tokens = math.prod(grid)
    assert torch.equal(chunks.order[chunks.inverse], torch.arange(tokens + before + after))
    sizes, at = [], chunks.start.tolist()
    for c in range(len(chunks.mean)):
        mine = chunks.order[at[c] : at[c + 1]] - before
        assert (chunks.owner[at[c] : at[c + 1]] == c).all()
        frame, rest = mine // (grid[1] * grid[2]), mine % (grid[1] * grid[2])
        axes = frame, rest // grid[2], rest % grid[2]
        sides = [int(axis.max() - axis.min()) + 1 for axis in axes]
        assert math.prod(sides) == len(mine) > 0
        sizes.append(sides)
        mean = torch.zeros(tokens).index_fill(0, torch.arange(at[c], at[c + 1]), 1 / len(mine))
        torch.testing.assert_close(chunks.mean[c], mean)
    for axis in zip(*sizes):
        assert max(axis) - min(axis) <= 1
    if before + after:
        assert at[-1] - at[-2] == before + after


def scores_of(many=5, tokens=23):
    random = torch.Generator().manual_seed(2)
    owner = torch.randint(many, (tokens,), generator=random).sort()[0]
    return torch.randn(2, 3, many, tokens, generator=random, dtype=torch.float64), owner


@pytest.mark.parametrize("keep", [0.01, 0.4, 0.5, 1.0])
def test_selection_by_query(keep):
    scores, owner = scores_of()
    chosen = vmoba.by_query(scores, owner, keep)
    for b, h, q in torch.cartesian_prod(
        torch.arange(2), torch.arange(3), torch.arange(23)
    ).tolist():
        order = scores[b, h, :, q].argsort(descending=True).tolist()
        own = int(owner[q])
        others = [c for c in order if c != own][: max(0, math.ceil(5 * keep) - 1)]
        assert set(chosen[b, h, :, q].nonzero()[:, 0].tolist()) == {own, *others}


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.6, 0.99])
def test_selection_by_head(keep):
    """The shortest prefix of the others that, with the own chunks, has the share of the mass."""
    scores, owner = scores_of()
    chosen = vmoba.by_head(scores, owner, keep)
    counts = set()
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        mine = scores[b, h]
        mass = (mine - mine.min()) / (mine.max() - mine.min())
        wanted = {(int(c), q) for q, c in enumerate(owner)}
        have = sum(mass[c, q] for c, q in wanted)
        others = [(c, q) for c in range(5) for q in range(23) if (c, q) not in wanted]
        for c, q in sorted(others, key=lambda at: -mass[at]):
            if have >= keep * mass.sum():
                break
            wanted.add((c, q))
            have += mass[c, q]
        assert {tuple(at) for at in chosen[b, h].nonzero().tolist()} == wanted
        counts.add(len(wanted))
    assert keep < 0.1 or len(counts) > 1  # heads differ; of a small share only own chunks are left


def test_equal_scores_leave_the_own_chunk():
    _, owner = scores_of()
    chosen = vmoba.by_head(torch.full((1, 1, 5, 23), 3.0), owner, 0.5)
    assert torch.equal(chosen[0, 0], torch.nn.functional.one_hot(owner, 5).T.bool())


class Explicit(Method):
    """By definition: of chunks given as boxes, each token sees its own and the next best."""

    def __init__(self, cuts, many):
        object.__setattr__(self, "cuts", cuts)
        object.__setattr__(self, "many", many)
        super().__init__()

    def sites(self, available):
        return [site for site in available if site.kind in ("joint", "self")]

    def attend(self, call, proceed):
        (first, last), grid = call.layout.image, call.layout.grid
        parts = self.cuts[call.site.layer % len(self.cuts)]
        axes = [
            [i for i, part in enumerate(torch.arange(n).tensor_split(min(p, n))) for _ in part]
            for n, p in zip(grid, parts)
        ]
        chunk = [(t, y, x) for t in axes[0] for y in axes[1] for x in axes[2]]
        names = sorted(set(chunk))
        members = {c: [first + i for i, mine in enumerate(chunk) if mine == c] for c in names}
        means = torch.stack([call.key[:, :, members[c]].mean(2) for c in names])
        mask = torch.ones(*call.query.shape[:3], call.key.shape[2], dtype=torch.bool)
        for b, h in ((b, h) for b in range(len(mask)) for h in range(mask.shape[1])):
            for i, mine in enumerate(chunk):
                fit = {c: float(means[n, b, h] @ call.query[b, h, first + i])
                       for n, c in enumerate(names)}  # fmt: skip
                others = sorted(set(names) - {mine}, key=lambda c: -fit[c])
                mask[b, h, first + i, first:last] = False
                for c in [mine, *others[: self.many - 1]]:
                    mask[b, h, first + i, members[c]] = True
        if "attn_mask" in call.options:
            mask = mask & call.options["attn_mask"]
        logits = call.query @ call.key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
        return logits.masked_fill(~mask, -math.inf).softmax(-1) @ call.value


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("build", [wan, hunyuan_video, cogvideox, ltx])
def test_is_attention_by_definition(build, backend):
    """Layers in turn; frames, rows and columns that the cuts do not divide."""
    pipe, settings = build(), {"steps": 1, "prompt": PROMPTS, "num_frames": 9}
    if build is not ltx:
        settings |= {"height": 48, "width": 80, "num_frames": 17}
    cuts = "2x1x1, 1x2x3"
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, Explicit(((2, 1, 1), (1, 2, 3)), 1)):
        one = latents(pipe, **settings)
    found = []
    for keep in (0.5, 0.1):  # 1 of 2 chunks, then 3 of 6; 1 and 1
        with dittune.attach(
            pipe, dittune.Vmoba(start=0.0, chunks=cuts, keep=keep, backend=backend)
        ) as handle:
            found.append(latents(pipe, **settings))
            assert 0.1 < handle.report()["vmoba"]["image_density"] < 0.6
    assert (found[1] - one).abs().max() < 1e-4
    assert (found[1] - plain).abs().max() > 1e-3 and (found[1] - found[0]).abs().max() > 1e-3


def test_layers_with_one_chunk_count_as_dense():
    pipe = sd3()  # three layers; time cannot be cut
    with dittune.attach(pipe, dittune.Vmoba(start=0.0, chunks="7x1x1, 1x2x2")) as handle:
        latents(pipe, steps=1)
        assert handle.report()["vmoba"]["computed"] == pytest.approx((1 + 1 / 4 + 1) / 3)


def test_compiled_code_reports_nothing():
    pipe = wan()
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    with dittune.attach(pipe, dittune.Vmoba(start=0.0, chunks="1x2x2")) as handle:
        latents(pipe, steps=1)
        assert handle.report() == {"vmoba": {}}


def test_some_of_many_chunks_by_definition():
    pipe, settings = wan(), {"steps": 1, "height": 32, "width": 32}
    with dittune.attach(pipe, Explicit(((3, 2, 2),), 4)):
        wanted = latents(pipe, **settings)
    with dittune.attach(pipe, dittune.Vmoba(start=0.0, chunks="3x2x2", keep=0.3)) as handle:
        assert (latents(pipe, **settings) - wanted).abs().max() < 1e-4
        assert handle.report()["vmoba"]["image_density"] == pytest.approx(1 / 3)


def test_first_steps_and_layers_stay_dense_and_layers_take_turns(monkeypatch):
    pipe, seen = wan(), []

    class Count(vmoba.Vmoba):
        def core(self, stock, state, call):
            chunks = state.at[vmoba.key_of(call.layout)]
            seen.append((call.run.step, call.site.layer, len(chunks.mean)))
            return super().core(stock, state, call)

    for settings in ({"start": 0.5}, {"start": 0.0, "dense_layers": "0"}):
        with dittune.attach(pipe, Count(chunks="1x2x2, 3x1x1", **settings)):
            latents(pipe, steps=2, guidance_scale=1.0)
    assert seen == [(1, 0, 4), (1, 1, 3), (0, 1, 3), (1, 1, 3)]


def test_it_goes_with_softpag_and_merged_padding():
    pipe, results = wan(), []
    steered = dittune.SoftPAG(heads="0:1,1:0", scale=2.0)
    sparse = dittune.Vmoba(start=0.0, chunks="1x2x2")
    for methods in ((sparse, steered), (steered, sparse)):
        with dittune.attach(pipe, *methods):
            results.append(latents(pipe))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    pipe, results = sd3(), []
    for methods in ((), (dittune.load_method("merge_padding")(),)):
        with dittune.attach(pipe, *methods, sparse):
            results.append(latents(pipe, guidance_scale=4.0))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    with pytest.raises(SelectionError, match="both replace the attention"):
        dittune.attach(pipe, sparse, dittune.Natten(window=2))


def test_compiled_blocks_are_one_graph():
    pipe = wan()
    method = dittune.Vmoba(start=0.0, chunks="1x2x2, 3x1x1", select="head")
    with dittune.attach(pipe, method):
        eager = latents(pipe, steps=1)
    torch._dynamo.reset()
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with dittune.attach(pipe, method):
        torch.testing.assert_close(latents(pipe, steps=1), eager, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"chunks": "7x1"}, "FRAMESxROWSxCOLUMNS"),
        ({"chunks": "1x0x2"}, "FRAMESxROWSxCOLUMNS"),
        ({"chunks": ""}, "FRAMESxROWSxCOLUMNS"),
        ({"keep": 0.0}, "above 0 and at most 1"),
        ({"select": "all"}, "select is one of"),
        ({"backend": "cpu"}, "backend is one of"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        dittune.Vmoba(**settings)
