"""What holds for every family of models."""

import pytest
import torch

import dittune
from dittune import models
from dittune.errors import UnsupportedModelError
from tests.tiny import FAMILIES, denoiser, latents, sd3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_module_is_a_site_and_its_processor_is_known(family):
    model = denoiser(FAMILIES[family]())
    facts = models.facts_for(model)
    sites = {site.name: site for site in facts.sites(model)}
    assert set(sites) == {n for n, m in model.named_modules() if hasattr(m, "processor")}
    for name, site in sites.items():
        module = model.get_submodule(name)
        assert site.heads == module.heads
        assert facts.CORE_CALLS[type(module.processor).__name__] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_fits_the_tokens_of_every_call(family):
    pipe, seen = FAMILIES[family](), []

    class Watch(dittune.Method):
        def attend(self, call, proceed):
            seen.append((call.site, call.layout, call.query.shape, call.key.shape))
            return proceed(call)

    with dittune.attach(pipe, Watch()):
        latents(pipe, steps=1, height=16, width=48)
    assert len(seen) == len(models.facts_for(denoiser(pipe)).sites(denoiser(pipe)))
    for site, layout, query, key in seen:
        frames, height, width = layout.grid
        assert frames == 1 and width == 3 * height
        assert layout.image[1] - layout.image[0] == height * width
        assert query[1] == key[1] == site.heads
        text = range(*layout.text)
        if site.kind == "cross":
            assert layout.image == (0, query[2]) and layout.text == (0, key[2])
        else:
            covered = sorted([*range(*layout.image), *text])
            assert covered == list(range(query[2])) and query == key
            assert (site.kind == "joint") == bool(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_with_more_rows_equals_a_call_of_its_own(family):
    """The extra pass extends every argument with batch rows, so use more than one row."""
    pipe, results = FAMILIES[family](), []
    prompts = ["a red circle", "a blue square on a black background"]
    for batched in (True, False):
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0", batched=batched)) as handle:
            results.append(latents(pipe, prompts, steps=1, guidance_scale=2.0))
            assert handle.report()["softpag"]["batched"] == batched
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype):
    """With a method the result errs about as much as without."""
    method = dittune.SoftPAG(heads="0:1,1:0", scale=2.0)
    plain, steered = [], []
    for chosen in (torch.float32, dtype):
        pipe = FAMILIES[family]().to(chosen)
        plain.append(latents(pipe))
        with dittune.attach(pipe, method):
            steered.append(latents(pipe))
        assert not torch.equal(plain[-1], steered[-1])
    assert steered[1].dtype == dtype and steered[1].isfinite().all()

    def error(exact, rounded):
        return (rounded.float() - exact).abs().mean() / exact.abs().mean()

    assert 0 < error(*steered) < 3 * error(*plain)


def test_unknown_models_are_named_with_what_is_known():
    class ChromaTransformer2DModel(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError,
        match=r"ChromaTransformer2DModel is not .* FluxTransformer2DModel, SD3.*, UNet2DConditionM",
    ):
        models.facts_for(ChromaTransformer2DModel())

    class Mine(type(sd3().transformer)):
        pass

    mine = sd3().transformer
    mine.__class__ = Mine
    assert models.facts_for(mine).__name__ == "dittune.models.sd3"  # served as its parent
