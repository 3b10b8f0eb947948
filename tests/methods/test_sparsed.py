"""SparseD measures right, computes what it has chosen, and keeps it in files."""

import math

import pytest
import torch
from safetensors.torch import save_file

import dittune
from dittune.call import TokenLayout
from dittune.errors import ConfigError
from dittune.kernels.block_sparse.lists import unpack
from dittune.kernels.block_sparse.reference import dense_mask
from dittune.method import Method
from dittune.sparse import measured
from dittune.sparse.plan import Place
from tests.sparse.test_video import PROMPTS
from tests.tiny import flux, latents
from tests.tiny_video import cogvideox, hunyuan_video, wan, wan22

BLOCK = 4


def frame(before=0, after=0, grid=(3, 3, 5), queries=0, is_masked=False):
    end = before + math.prod(grid)
    text = (0, before) if before else (end, end + after)
    layout = TokenLayout((before, end), text, grid, is_masked=is_masked)
    return measured.frame_of(Place(layout, 2, torch.device("cpu")), BLOCK, queries)


def tensors_for(one, batch=2):
    random, tokens = torch.Generator().manual_seed(4), one.plan.queries.tokens
    query, key = (
        torch.randn(batch, 2, tokens, 6, generator=random, dtype=torch.float64) for _ in range(2)
    )
    order = one.plan.queries.permutation
    return (query, key) if order is None else (order.permute(query), order.permute(key))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (6, 0), (0, 7)])
def test_mass_is_the_mean_of_the_maps(before, after):
    """Blocks of text, of video and the short last ones; columns sum to one, padding has none."""
    one = frame(before, after)
    query, key = tensors_for(one)
    mass = measured.block_mass(query, key, 0.3, one)
    slots = one.plan.queries
    is_real = torch.zeros(slots.slots, dtype=torch.bool)
    for segment in slots.segments:
        start, _ = slots.spans[segment.name]
        is_real[start : start + segment.order.tokens] = True
    maps = (query @ key.transpose(2, 3) * 0.3).masked_fill(~is_real, -math.inf).softmax(-1)
    first, last = slots.spans["image"]
    for i in range(first, last, BLOCK):
        rows = [r for r in range(i, i + BLOCK) if r < last and is_real[r]]
        # The last, short block asks some of its queries more than once.
        rows = [rows[j * len(rows) // BLOCK] for j in range(BLOCK)]
        for j in range(0, slots.slots, BLOCK):
            wanted = maps[:, :, rows, j : j + BLOCK].sum(-1).mean((0, 2))
            assert (mass[:, (i - first) // BLOCK, j // BLOCK] - wanted).abs().max() < 1e-12
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)))


def test_a_key_that_stands_for_several_has_their_mass():
    many, few = frame(after=7), frame(after=5)
    query, key = tensors_for(many)
    (image, _), (text, _) = (many.plan.queries.spans[name] for name in ("image", "after"))
    assert (image, text) == tuple(few.plan.queries.spans[name][0] for name in ("image", "after"))
    last = text + 4
    key[:, :, last + 1 : last + 3] = key[:, :, last : last + 1]
    short = few.plan.queries.slots
    wanted = measured.block_mass(query, key, 0.3, many)[..., : text // BLOCK]
    given = query[:, :, :short], key[:, :, :short], 0.3, few
    found = measured.block_mass(*given, repeated=(last, 3))[..., : text // BLOCK]
    assert (found - wanted).abs().max() < 1e-12
    assert (measured.block_mass(*given)[..., : text // BLOCK] - wanted).abs().max() > 1e-3


def test_padding_of_text_has_no_mass_and_few_queries_agree_with_all():
    one = frame(after=7, is_masked=True)
    query, key = tensors_for(one)
    count = one.plan.key_count({"after": torch.tensor([3, 7])})
    mass = measured.block_mass(query, key, 0.3, one, count)
    alone = [measured.block_mass(query[i, None], key[i, None], 0.3, one, count[i, None])
             for i in range(2)]  # fmt: skip
    torch.testing.assert_close(mass, (alone[0] + alone[1]) / 2)
    assert (alone[0][..., -1] == 0).all() and (alone[1][..., -1] > 0).all()
    one = frame(after=7, queries=1)
    assert torch.equal(one.asked[:, 0], torch.arange(12) * BLOCK)
    one = frame(after=7, queries=2)
    query[:, :] = query[:, :, :1]  # all queries of a head are alike
    few = measured.block_mass(query, key, 0.3, one, count)
    torch.testing.assert_close(few, measured.block_mass(query, key, 0.3, frame(after=7), count))


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.99])
def test_the_best_blocks_and_the_own_one_are_kept(keep):
    one = frame(after=7)
    mass = torch.rand(2, 12, 14, generator=torch.Generator().manual_seed(1))
    kept = measured.best_blocks(mass, one, keep)
    for head in range(2):
        for row in range(12):
            best = mass[head, row, :12].argsort(descending=True)[: int(12 * keep) + 1]
            assert set(kept[head, row].nonzero()[:, 0].tolist()) == {row, *best.tolist()}


@pytest.mark.parametrize(
    "settings", [{}, {"before": 6}, {"after": 7}, {"after": 7, "is_masked": 1}]
)
def test_plans_are_the_blocks_in_rows_and_columns(settings):
    one = frame(**settings)
    (first, last) = one.image
    kept = (
        torch.rand(3, last - first, last - first, generator=torch.Generator().manual_seed(1)) < 0.3
    )
    kept[1, 2], kept[2, :, 3] = False, False
    plan = measured.plan_of(kept, one)
    nq = plan.tensors["row_order"].shape[1]
    used = torch.ones(3, nq, nq, dtype=torch.bool)
    used[:, first:last, first:last] = kept
    count = plan.tensors["key_count"][0]
    for name, blocks in (("row", used), ("column", used.transpose(1, 2))):
        for p in range(3):
            order = plan.tensors[f"{name}_order"][p].tolist()
            assert sorted(order) == list(range(nq))
            assert (blocks[p].sum(1)[order].diff() <= 0).all()
            for i in range(nq):
                found = [plan.tensors[f"{name}_{kind}_index"][slice(
                    *plan.tensors[f"{name}_{kind}_start"][p, i : i + 2].tolist())].tolist()
                    for kind in ("full", "partial")]  # fmt: skip
                assert sorted(found[0] + found[1]) == blocks[p, i].nonzero()[:, 0].tolist()
                for j in found[0] if name == "row" else ():
                    assert count[j] == BLOCK and (j < last or not settings.get("is_masked"))
    mask = dense_mask(unpack(plan.tensors, plan.block, "none", 1.0), plan.queries.slots, nq * BLOCK)
    is_real = torch.arange(BLOCK) < count[:, None]
    wanted = used.repeat_interleave(BLOCK, 1)[:, : plan.queries.slots].repeat_interleave(BLOCK, 2)
    assert torch.equal(mask[0], wanted & is_real.flatten()[: mask.shape[-1]])


class Explicit(Method):
    """By definition, from whole maps; for one block size that divides frames and text."""

    def __init__(self, keep):
        object.__setattr__(self, "keep", keep)
        super().__init__()

    def sites(self, available):
        return [site for site in available if site.kind in ("joint", "self")]

    def attend(self, call, proceed):
        known = vars(call.run.memory(self))
        (first, last), hidden = call.layout.image, call.options.get("attn_mask")
        logits = call.query @ call.key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
        if hidden is not None:
            logits = logits.masked_fill(~hidden, -math.inf)
        maps = logits.softmax(-1)
        step, mask = known.setdefault(call.site.name, (call.run.step, self.mask(maps, first, last)))
        if step < call.run.step:
            maps = logits.masked_fill(~mask, -math.inf).softmax(-1)
        return maps @ call.value

    def mask(self, maps, first, last):
        _, heads, tokens, _ = maps.shape
        mask, many = torch.ones(1, heads, tokens, tokens, dtype=torch.bool), (last - first) // BLOCK
        mask[:, :, first:last, first:last] = False
        for head in range(heads):
            for i in range(first, last, BLOCK):
                rows = maps[:, head, i : i + BLOCK].mean((0, 1))
                mass = [float(rows[j : j + BLOCK].sum()) for j in range(first, last, BLOCK)]
                best = sorted(range(many), key=lambda j: -mass[j])[: int(self.keep * many) + 1]
                for j in {*best, (i - first) // BLOCK}:
                    mask[:, head, i : i + BLOCK, first + j * BLOCK : first + (j + 1) * BLOCK] = True
        return mask


SETTINGS = {"start": 0.0, "keep": 0.3, "block": BLOCK, "queries": 0}


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("build", [wan, hunyuan_video, cogvideox, flux])
def test_is_attention_by_definition(build, backend):
    pipe, settings = build(), {"prompt": PROMPTS, "steps": 3, "guidance_scale": 3.0}
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, Explicit(0.3)):
        wanted = latents(pipe, **settings)
    with dittune.attach(pipe, dittune.SparseD(**SETTINGS, backend=backend)) as handle:
        found = latents(pipe, **settings)
        report = handle.report()["sparsed"]
    assert (found - wanted).abs().max() < 1e-3
    assert (found - plain).abs().max() > 1e-2
    assert report["image_density"] < report["computed"] < 1  # it measures at a dense step
    assert report["image_density"] < report["recall"] <= 1


@pytest.mark.parametrize(
    ("side", "block", "share", "backend"),
    [(8, 4, 0.4, "dense"), (60, 64, 0.1, "cpu"), (60, 64, 0.9, "dense"), (96, 64, 0.9, "cpu")],
)
def test_blocks_are_skipped_on_a_cpu_where_that_is_faster(side, block, share, backend):
    """The last of them would be faster under a mask, which would be too large."""
    layout = TokenLayout((0, side**2), (0, 0), (1, side, side))
    one = measured.frame_of(Place(layout, 1, torch.device("cpu")), block, 1)
    many = one.image[1] - one.image[0]
    kept = (torch.arange(many) < share * many).expand(1, many, many)
    assert dittune.SparseD(block=block)._ready(kept, one).backend == backend


def test_the_step_that_measures_is_dense_and_so_are_those_before():
    pipe = wan()
    plain = latents(pipe, steps=2, guidance_scale=3.0)
    with dittune.attach(pipe, dittune.SparseD(**{**SETTINGS, "start": 0.5})) as handle:
        assert torch.equal(latents(pipe, steps=2, guidance_scale=3.0), plain)
        assert handle.report()["sparsed"]["sites"] == 2
        assert not torch.equal(latents(pipe, steps=4), latents(pipe, steps=2))


@pytest.mark.parametrize("build", [wan, wan22, hunyuan_video])
def test_patterns_are_written_once_and_read_again(build, tmp_path):
    """With a file no step measures: all steps are sparse, along the patterns of the first run."""
    pipe, path = build(), tmp_path / "new" / "patterns.safetensors"
    method = dittune.SparseD(**SETTINGS, patterns=str(path))
    with dittune.attach(pipe, method) as handle:
        latents(pipe, steps=4)
        first = handle.report()["sparsed"]
        written = path.read_bytes()
        found = latents(pipe, steps=4)
        second = handle.report()["sparsed"]
    assert path.read_bytes() == written and list(path.parent.iterdir()) == [path]
    assert first["sites"] == second["sites"] == (4 if build is wan22 else 2)
    assert first["image_density"] == second["image_density"] and "recall" not in second
    kept = measured.load_patterns(path, method._about(*_about(pipe)))
    assert len(kept) == first["sites"]
    with dittune.attach(pipe, method):
        assert torch.equal(latents(pipe, steps=4), found)


def _about(pipe):
    found = []

    class Look(Method):
        def around_model(self, inputs, model):
            host = inputs.run.host
            found[:] = type(host.model).__name__, host.facts.layouts(host.model, inputs.kwargs)
            return model(inputs)

    with dittune.attach(pipe, Look()):
        latents(pipe, steps=1)
    return found


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    pipe, path = wan(), tmp_path / "patterns.safetensors"

    def run(**changes):
        settings = {**SETTINGS, "patterns": str(path)}
        size = {name: changes.pop(name) for name in ("height", "width") if name in changes}
        with dittune.attach(pipe, dittune.SparseD(**{**settings, **changes})):
            return latents(pipe, **size)

    run(dense_layers="0")
    for changes, match in (
        ({"keep": 0.5}, "was measured with keep 0.3; now it is keep 0.5"),
        ({"block": 8}, "block 4; now it is block 8"),
        ({"height": 16, "width": 64}, "was measured with layouts"),
        ({}, "has no .* blocks at transformer/self/0"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(**changes)
    path.write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="is no file of patterns"):
        run()


def test_each_of_two_denoisers_has_a_dense_step():
    pipe = wan22()
    with dittune.attach(pipe, dittune.SparseD(start=0.0, block=4, keep=0.1)) as handle:
        latents(pipe, steps=4)
        report = handle.report()["sparsed"]
    assert report["computed"] == pytest.approx((2 + 2 * report["image_density"]) / 4)


@pytest.mark.parametrize("about", ["[]", "null", '"text"', "{"])
def test_a_file_with_other_metadata_is_refused(about, tmp_path):
    path = tmp_path / "patterns.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"sparsed": about})
    with pytest.raises(ConfigError, match=r"sparsed: .* (is no file|was measured with)"):
        measured.load_patterns(path, {"keep": 0.3})


def test_a_file_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    pipe, calls = wan(), []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    method = dittune.SparseD(**SETTINGS, patterns=str(tmp_path / "file" / "patterns"))
    with (
        dittune.attach(pipe, method),
        pytest.raises(ConfigError, match="sparsed: cannot write patterns to"),
    ):
        latents(pipe)
    assert not calls


def test_the_size_may_change_without_a_file_not_with_one(tmp_path):
    pipe = wan()
    method = dittune.SparseD(**SETTINGS)
    with dittune.attach(pipe, method):
        wide = latents(pipe, height=16, width=64)
        latents(pipe)
        assert torch.equal(latents(pipe, height=16, width=64), wide)


def test_heads_computed_apart_are_refused():
    pipe = wan()
    pag = dittune.SoftPAG(heads="0:1", u=1.0, scale=2.0)
    with (
        dittune.attach(pipe, dittune.SparseD(**SETTINGS), pag),
        pytest.raises(ConfigError, match="some heads apart"),
    ):
        latents(pipe)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"block": 0}, "a power of two, got 0"),
        ({"block": 96}, "a power of two, got 96"),
        ({"queries": -1}, "0 <= queries"),
        ({"backend": "gather"}, "backend is one of"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        dittune.SparseD(**settings)


def test_a_denoiser_by_itself_needs_patterns(tmp_path):
    """Each of its calls is a generation: what is measured there is never used."""
    pipe = wan()
    text = torch.randn(1, 4, 32)
    inputs = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([5])}
    settings = {"block": BLOCK, "keep": 0.1}

    def call():
        with torch.no_grad():
            return pipe.transformer(encoder_hidden_states=text, **inputs).sample

    plain = call()
    with pytest.raises(ConfigError, match=r"start=0\.2 it never acts.* set start=0"):
        dittune.attach(pipe.transformer, dittune.SparseD(**settings))
    with (
        dittune.attach(pipe.transformer, dittune.SparseD(start=0.0, **settings)),
        pytest.raises(ConfigError, match="attach to the pipeline, or name a file of patterns"),
    ):
        call()
    method = dittune.SparseD(start=0.0, patterns=str(tmp_path / "p.safetensors"), **settings)
    with dittune.attach(pipe.transformer, method) as handle:
        assert torch.equal(call(), plain)  # measures, and writes the file
        assert not torch.equal(call(), plain)
        assert handle.report()["sparsed"]["computed"] < 0.9
