"""What natten, clear and scale_dit share, against attention written out by definition."""

import math

import pytest
import torch

import dittune
from dittune.errors import ConfigError, SelectionError
from dittune.method import Method
from dittune.methods.merge_padding import MergePadding
from dittune.models import unet
from dittune.sparse import method as sparse
from dittune.sparse.core import GEOMETRIES, built_by
from tests.tiny import FAMILIES, denoiser, flux, latents, sd, sd3

WIDE = {"height": 24, "width": 40}  # 3 x 5 tokens: neither square nor divisible


class Explicit(Method):
    """Attention by definition: text sees all, image tokens see text and what `sees` says."""

    def __init__(self, sees, pooled=0):
        object.__setattr__(self, "sees", sees)
        object.__setattr__(self, "pooled", pooled)
        super().__init__()

    def sites(self, available):
        return [site for site in available if site.kind in ("joint", "self")]

    def attend(self, call, proceed):
        first, last = call.layout.image
        _, height, width = call.layout.grid
        places = [(y, x) for y in range(height) for x in range(width)]
        mask = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool)
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                mask[first + i, first + j] = self.sees(query, key, (height, width))
        key, value = call.key, call.value
        for y in range(0, height if self.pooled else 0, self.pooled or 1):
            for x in range(0, width, self.pooled):
                cell = [i for i, (r, c) in enumerate(places)
                        if y <= r < y + self.pooled and x <= c < x + self.pooled]  # fmt: skip
                cell = torch.tensor(cell) + first
                key = torch.cat([key, call.key[:, :, cell].mean(2, keepdim=True)], 2)
                value = torch.cat([value, call.value[:, :, cell].mean(2, keepdim=True)], 2)
                is_image = torch.zeros(len(mask), 1, dtype=torch.bool)
                is_image[first:last] = True
                mask = torch.cat([mask, is_image], 1)
        logits = call.query @ key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
        return logits.masked_fill(~mask, -math.inf).softmax(-1) @ value


def disc(radius):
    return lambda q, k, grid: math.dist(q, k) < radius


def window(size):
    """Shifted inside at the borders, all of an axis that is shorter."""

    def sees(query, key, grid):
        for q, k, n in zip(query, key, grid):
            side = min(size, n)
            first = min(max(q - side // 2, 0), n - side)
            if not first <= k < first + side:
                return False
        return True

    return sees


CASES = [
    (lambda **s: dittune.Clear(radius=1.5, **s), Explicit(disc(1.5))),
    (lambda **s: dittune.Clear(radius=1.5, pooled=2, **s), Explicit(disc(1.5), pooled=2)),
    (lambda **s: dittune.Natten(window=3, **s), Explicit(window(3))),
]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("family", ["flux", "sd3.5", "sd"])
def test_is_attention_by_definition(family, case):
    build, explicit = CASES[case]
    pipe = FAMILIES[family]()
    with dittune.attach(pipe, explicit):
        wanted = latents(pipe, steps=1, **WIDE)
    for backend in ("dense", "cpu"):
        with dittune.attach(pipe, build(backend=backend)) as handle:
            assert (latents(pipe, steps=1, **WIDE) - wanted).abs().max() < 1e-4
        (report,) = handle.report().values()
        sites = [said for said in report.values() if isinstance(said, dict)]
        assert sites and all(site["backend"] == backend for site in sites)
    assert (wanted - latents(pipe, steps=1, **WIDE)).abs().max() > 1e-3


def call_inputs(pipe, batch=2):
    """Arguments of one call of a tiny FLUX: 3 x 5 image tokens, 7 of text."""
    torch.manual_seed(3)
    ids = torch.zeros(3, 5, 3)
    ids[..., 1], ids[..., 2] = torch.arange(3.0)[:, None], torch.arange(5.0)
    return {
        "hidden_states": torch.randn(batch, 15, 16),
        "encoder_hidden_states": torch.randn(batch, 7, 32),
        "pooled_projections": torch.randn(batch, pipe.transformer.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.0),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(7, 3),
    }


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_the_model_can_be_trained_under_it(backend):
    pipe = flux()
    model, inputs = pipe.transformer, call_inputs(pipe)
    weight = model.transformer_blocks[0].attn.to_k.weight
    grads = []
    for method in (Explicit(disc(1.5), pooled=2), dittune.Clear(radius=1.5, pooled=2,
                                                                backend=backend)):  # fmt: skip
        with dittune.attach(model, method):
            loss = model(**inputs)[0].square().mean()
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-3)


def test_the_first_steps_and_chosen_layers_stay_dense():
    pipe = flux()
    plain = latents(pipe, steps=1)
    with dittune.attach(pipe, dittune.Natten(window=3, start=0.5)) as handle:
        assert torch.equal(latents(pipe, steps=1), plain)
        assert handle.report() == {"natten": {}}
        latents(pipe, steps=2)
        report = handle.report()["natten"]
        assert report["joint"]["image_density"] == pytest.approx(9 / 16)
        assert report["computed"] == pytest.approx((1 + 9 / 16) / 2)  # one of two steps
    with dittune.attach(pipe, dittune.Natten(window=3, dense_layers="0-3")):
        assert torch.equal(latents(pipe, steps=1), plain)
    with dittune.attach(pipe, dittune.Natten(window=3, dense_layers="1-3")) as handle:
        few = latents(pipe, steps=1)
        computed = handle.report()["natten"]["computed"]
        assert computed == pytest.approx((3 + 9 / 16) / 4)  # in one of four layers
    with dittune.attach(pipe, dittune.Natten(window=3)):
        assert not torch.equal(latents(pipe, steps=1), few)
    assert not torch.equal(few, plain)


def test_a_plan_is_built_once_for_a_geometry(monkeypatch):
    pipe, built, build = sd3(), [], sparse.Ready
    monkeypatch.setattr(sparse, "Ready", lambda *a: built.append(a) or build(*a))
    built_by.cache_clear()
    for _ in range(2):  # generations; guidance doubles the batch
        with dittune.attach(pipe, dittune.Clear(radius=2)):
            latents(pipe, steps=3, guidance_scale=4.0)
    assert len(built) == 1
    with dittune.attach(pipe, dittune.Clear(radius=2)):
        latents(pipe, steps=1, **WIDE)
    assert len(built) == 2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("perturbation", ["identity", "mean_query"])
def test_with_softpag_in_both_orders(first, perturbation):
    pipe = sd3()
    pag = dittune.SoftPAG(heads="0:1,1:*", u=0.5, perturbation=perturbation)

    def made(method):
        methods = (method, pag) if first else (pag, method)
        with dittune.attach(pipe, *methods):
            return latents(pipe, guidance_scale=4.0)

    sparse_one, dense_one = made(dittune.Clear(radius=1.5)), made(dittune.Clear(radius=99))
    with dittune.attach(pipe, pag):
        assert torch.equal(dense_one, latents(pipe, guidance_scale=4.0))
    assert (sparse_one - dense_one).abs().max() > 1e-2
    if perturbation == "identity":  # needs no core: the definition may stand in for it
        with dittune.attach(pipe, pag, Explicit(disc(1.5))):
            torch.testing.assert_close(
                sparse_one, latents(pipe, guidance_scale=4.0), atol=1e-3, rtol=1e-3
            )


def test_with_maps_of_words_and_gradients_through_them():
    pipe = sd3()
    with dittune.attach(
        pipe, dittune.Clear(radius=1.5), dittune.AttendAndExcite(concepts="red, circle")
    ) as handle:
        changed = latents(pipe)
        assert handle.report()["attend_and_excite"]
    with dittune.attach(pipe, dittune.Clear(radius=1.5)):
        assert (latents(pipe) - changed).abs().max() > 1e-4


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_merged_padding_counts_as_often_as_it_was_there(backend):
    pipe = sd3()
    results = []
    for methods in ((), (MergePadding(),)):
        with dittune.attach(pipe, *methods, dittune.Clear(radius=1.5, backend=backend)) as handle:
            results.append(latents(pipe, guidance_scale=4.0))
    assert handle.report()["merge_padding"]["merged_tokens"] > 1
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_what_it_refuses():
    for settings, match in (
        ({"backend": "cuda"}, "backend is one of"),
        ({"dense_layers": "x"}, "layers are written"),
        ({"radius": 0}, "radius is above 0"),
        ({"radius": "3"}, "clear: radius is float, got '3'"),
        ({"pooled": 2.5}, "clear: pooled is int, got 2.5"),
        ({"start": True}, "clear: start is float, got True"),
        ({"pooled": -1}, "pooled is 0 or"),
    ):
        with pytest.raises(ConfigError, match=match):
            dittune.Clear(**settings)
    for settings in ({"window": 3, "stride": 4}, {"window": 0}, {"dilation": 0}, {"frames": -1}):
        with pytest.raises(ConfigError, match="1 <= stride <= window"):
            dittune.Natten(**settings)
    pipe = sd3()
    with pytest.raises(SelectionError, match="layer 9"):
        dittune.attach(pipe, dittune.Clear(dense_layers="9"))
    with (
        dittune.attach(pipe, dittune.Clear(radius=2, backend="triton")),
        pytest.raises(RuntimeError, match="'triton' cannot run"),
    ):
        latents(pipe)
    assert hasattr(denoiser(pipe), "config")


def test_what_is_computed_of_a_unet_counts_pairs():
    """The outer stage has fewer layers than the inner one, but 16 times their pairs."""
    pipe = sd()
    with dittune.attach(pipe, dittune.Natten(window=3)) as handle:
        latents(pipe, steps=1, height=64, width=64)
        report = handle.report()["natten"]
    stages = [site.stage for site in unet.sites(pipe.unet) if site.kind == "self"]
    densities = {0: report["self"]["image_density"], 1: report["self 1"]["image_density"]}
    assert densities == pytest.approx({0: 9 / 256, 1: 9 / 64})
    pairs = {0: 256**2, 1: 64**2}
    seen = sum(pairs[stage] * densities[stage] for stage in stages)
    assert report["computed"] == pytest.approx(seen / sum(pairs[stage] for stage in stages))


@pytest.mark.parametrize(
    ("settings", "density"),
    [
        ({"window": 8, "dilation": 2}, 1),  # 4 x 4 tokens
        ({"window": 2, "dilation": 2}, 1 / 4),
        ({"window": 2, "dilation": 3}, 1 / 4),
        ({"window": 3, "dilation": 2}, 9 / 16),
    ],
)
def test_small_grids_are_seen_with_fewer_gaps(settings, density):
    pipe = flux()
    with dittune.attach(pipe, dittune.Natten(**settings)) as handle:
        latents(pipe, steps=1, height=32, width=32)
        assert handle.report()["natten"]["joint"]["image_density"] == pytest.approx(density)


def test_many_sizes_beside_a_generation_do_not_take_its_plan():
    """Both pipelines share what was built for the settings, of which the oldest is dropped."""
    one, other, method = flux(), flux(), dittune.Clear(radius=1.5)
    settings = {"steps": 3, "height": 32, "width": 32}
    with dittune.attach(one, method):
        wanted = latents(one, **settings)

    def between(pipe, step, time, tensors):
        for side in range(GEOMETRIES + 1) if step == 0 else ():
            latents(other, steps=1, height=16, width=16 + 8 * side)
        return tensors

    with dittune.attach(one, method), dittune.attach(other, method):
        assert torch.equal(latents(one, callback_on_step_end=between, **settings), wanted)


def test_a_longer_sequence_scales_the_logits():
    call_scale = dittune.Clear(base_tokens=10).scale
    call = type("Call", (), {"query": torch.zeros(1, 1, 100, 4), "options": {}, "repeats": 1})()
    call.key = call.query
    assert call_scale(call) == pytest.approx(0.5 * math.sqrt(2))
    assert dittune.Clear(base_tokens=10, pooled=2).scale(call) == pytest.approx(0.5 * math.sqrt(3))
    assert dittune.Clear().scale(call) is None
