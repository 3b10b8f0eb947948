"""What holds for every family of models."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

import dittune
from dittune import models
from dittune.errors import ConfigError, UnsupportedModelError
from dittune.samples.shapes.models import build_t5_tokenizer
from dittune.words.tokens import words_of_pictures
from tests.tiny import FAMILIES, denoiser, flux, latents, sd, sd3, sdxl
from tests.tiny_video import ALL_FAMILIES, VIDEO_FAMILIES


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_attention_module_is_a_site_and_its_processor_is_known(family):
    model = denoiser(ALL_FAMILIES[family]())
    facts = models.facts_for(model)
    sites = {site.name: site for site in facts.sites(model)}
    found = {name for name, module in model.named_modules() if hasattr(module, "processor")}
    left_alone = getattr(facts, "LEFT_ALONE", ("nothing",))
    assert set(sites) == {name for name in found if not name.startswith(left_alone)}
    for name, site in sites.items():
        module = model.get_submodule(name)
        assert site.heads == module.heads
        calls = 2 if type(module).__name__ == "WanAttention" else 1  # one for an image, if any
        assert facts.CORE_CALLS[type(module.processor).__name__] == calls


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_layout_fits_the_tokens_of_every_call(family):
    pipe, seen = ALL_FAMILIES[family](), []

    class Watch(dittune.Method):
        def attend(self, call, proceed):
            seen.append((call.site, call.layout, call.query.shape, call.key.shape))
            return proceed(call)

    with dittune.attach(pipe, Watch()):
        height = 32 if family == "ltx" else 16
        latents(pipe, steps=1, height=height, width=3 * height, guidance_scale=0.5)
    steps = 2 if family == "mochi" else 1  # its pipeline cannot make one
    assert len(seen) == steps * len(models.facts_for(denoiser(pipe)).sites(denoiser(pipe)))
    for site, layout, query, key in seen:
        frames, height, width = layout.grid
        assert frames == (3 if family in VIDEO_FAMILIES else 1) and width == 3 * height
        assert layout.image[1] - layout.image[0] == frames * height * width
        assert query[1] == key[1] == site.heads
        text = range(*layout.text)
        if site.kind == "cross":
            assert layout.image == (0, query[2]) and layout.text == (0, key[2])
        else:
            covered = sorted([*range(*layout.image), *text])
            assert covered == list(range(query[2])) and query == key
            assert (site.kind == "joint") == bool(text)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_call_with_more_rows_equals_a_call_of_its_own(family):
    """The extra pass extends every argument with batch rows, so use more than one row."""
    pipe, results = ALL_FAMILIES[family](), []
    prompts = ["a red circle", "a blue square on a black background"]
    for batched in (True, False):
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0", batched=batched)) as handle:
            results.append(latents(pipe, prompts, steps=1, guidance_scale=2.0))
            assert handle.report()["softpag"]["batched"] == batched
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_half_precision(family, dtype):
    """With a method the result errs about as much as without."""
    method = dittune.SoftPAG(heads="0:1,1:0", scale=2.0)
    plain, steered = [], []
    for chosen in (torch.float32, dtype):
        pipe = ALL_FAMILIES[family]().to(chosen)
        plain.append(latents(pipe))
        with dittune.attach(pipe, method):
            steered.append(latents(pipe))
        assert not torch.equal(plain[-1], steered[-1])
    assert steered[1].dtype == plain[1].dtype and steered[1].isfinite().all()

    def error(exact, rounded):
        return (rounded.float() - exact).abs().mean() / exact.abs().mean()

    assert 0 < error(*steered) < 3 * error(*plain)


def test_unknown_models_are_named_with_what_is_known():
    class ChromaTransformer2DModel(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError,
        match=r"ChromaTransformer2DModel is not .* FluxTr.*, .*SD3.*, UNet2DConditionM",
    ):
        models.facts_for(ChromaTransformer2DModel())

    class Mine(type(sd3().transformer)):
        pass

    mine = sd3().transformer
    mine.__class__ = Mine
    assert models.facts_for(mine).__name__ == "dittune.models.sd3"  # served as its parent


def inputs_of(pipe, prompt, **settings):
    """The denoiser's arguments at the first step, and the run."""
    seen = []

    class Look(dittune.Method):
        def around_model(self, inputs, model):
            seen.append(inputs)
            return model(inputs)

    with dittune.attach(pipe, Look()):
        latents(pipe, prompt, steps=1, **settings)
    return seen[0]


def with_t5():
    """A tiny SD3 whose T5 says something."""
    pipe = sd3()
    tokenizer, width = build_t5_tokenizer(), pipe.text_encoder_3.config.d_model
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    pipe.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=tokenizer)
    return pipe


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (sd3, ((2,), (3,))),  # zeros stand for T5: no axis
        (with_t5, ((2, 32 + 1), (3, 32 + 2))),
        (flux, ((1,), (2,))),
        (sd, ((2,), (3,))),
        (sdxl, ((2,), (3,))),
    ],
)
def test_the_words_of_each_picture_are_found_on_the_text_axis(build, words):
    prompts = ["a red circle", "a small red circle"]
    inputs = inputs_of(build(), prompts, num_images_per_prompt=2, guidance_scale=3.0)
    assert inputs.run.prompts["prompt"] == [p for p in prompts for _ in range(2)]
    found = words_of_pictures(inputs, [("red", "circle")], lambda prompt: [], "me")
    later = tuple(tuple(token + 1 for token in word) for word in words)
    assert [f.words for f in found] == [words, words, later, later]


def test_each_text_encoder_may_have_a_prompt_of_its_own():
    for build, name in ((with_t5, "prompt_3"), (flux, "prompt_2")):
        inputs = inputs_of(build(), "a red circle", **{name: "a blue circle"})
        for word, place in (("blue", 1), ("circle", 2)):
            (found,) = words_of_pictures(inputs, [(word,)], lambda prompt: [], "me")
            assert found.words[0][-1] == place + (32 if build is with_t5 else 0)
        if build is flux:
            with pytest.raises(ConfigError, match="'red' is not a word of the prompt 'a blue c"):
                words_of_pictures(inputs, [("red",)], lambda prompt: [], "me")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_latents_are_a_view_of_the_sample_that_the_scheduler_steps(family):
    pipe, stepped = FAMILIES[family](), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (stepped.append(args[2]), step(*args, **kwargs))[
        1
    ]
    inputs = inputs_of(pipe, "a circle", guidance_scale=3.0)
    view = models.facts_for(denoiser(pipe)).latents(denoiser(pipe), inputs.kwargs)
    assert torch.equal(view[-1:], stepped[0])
    assert view.data_ptr() == inputs.kwargs[inputs.batched[0]].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_that_show_words_have_text_and_one_resolution(family):
    sites = models.facts_for(denoiser(pipe := FAMILIES[family]())).sites(denoiser(pipe))
    sharp = [site for site in sites if site.shows_words]
    assert sharp and {site.kind for site in sharp} <= {"joint", "cross"}
    assert len({site.stage for site in sharp}) == 1
