"""The guider in a real modular pipeline, against the classic pipeline with `attach`."""

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

import dittune
from dittune.errors import ConfigError, SeamError, SelectionError
from tests.tiny import latents, sd3


def modular(pipe, guider):
    names = ("transformer", "scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    names += ("tokenizer", "tokenizer_2", "tokenizer_3")
    made = StableDiffusion3AutoBlocks().init_pipeline()
    made.update_components(**{name: getattr(pipe, name) for name in names}, guider=guider)
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe, guider, steps=3):
    return modular(pipe, guider)(
        prompt="a red circle",
        negative_prompt="",  # without one, this pipeline has nothing to guide away from
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        height=32,
        width=32,
        max_sequence_length=8,
        output_type="latent",
        output="images",
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": "1:*"},
        {"heads": "0:1,2:0", "u": 0.6, "scale": 2.0, "rows": "image"},
        {"heads": "0:1,2:0", "perturbation": "blurred_query", "first": 1},
    ],
)
def test_equals_the_classic_pipeline(guidance_scale, settings):
    pipe = sd3()
    guider = dittune.SoftPAGGuidance(guidance_scale=guidance_scale, **settings)
    with dittune.attach(pipe, dittune.SoftPAG(**settings)):
        classic = latents(pipe, steps=3, guidance_scale=guidance_scale)
    plain = latents(pipe, steps=3, guidance_scale=guidance_scale)
    ours = run(pipe, guider)
    torch.testing.assert_close(ours, classic, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-2


def test_neutral_settings_are_plain_guidance():
    pipe = sd3()
    plain = run(pipe, ClassifierFreeGuidance(guidance_scale=4.0))
    for settings in ({}, {"heads": "0:0", "u": 0.0}, {"heads": "0:0", "scale": 0.0}):
        assert torch.equal(run(pipe, dittune.SoftPAGGuidance(4.0, **settings)), plain)


def test_start_and_stop():
    pipe, passes = sd3(), []
    hook = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    guider = dittune.SoftPAGGuidance(4.0, heads="0:0", perturbed_start=0.5, stop=0.5)
    run(pipe, guider, steps=4)
    hook.remove()
    assert len(passes) == 2 * 2 + 2 * 2  # two steps with uncond, two with the perturbed pass


def test_the_denoiser_is_untouched_between_passes_and_after_an_error():
    pipe = sd3()
    processors = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    plain = run(pipe, ClassifierFreeGuidance(guidance_scale=4.0))
    guider = dittune.SoftPAGGuidance(4.0, heads="1:0")

    def untouched():
        blocks = pipe.transformer.transformer_blocks
        same = all(b.attn.processor is p for b, p in zip(blocks, processors, strict=True))
        return same and not pipe.transformer._forward_pre_hooks

    wanted = run(pipe, guider)
    assert untouched()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:  # the perturbed pass of the second step
            raise RuntimeError("no more")

    hook = pipe.transformer.transformer_blocks[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        run(pipe, guider)
    hook.remove()
    assert untouched()
    assert torch.equal(run(pipe, ClassifierFreeGuidance(guidance_scale=4.0)), plain)
    assert torch.equal(run(pipe, guider), wanted)


def test_its_configuration_is_saved(tmp_path):
    guider = dittune.SoftPAGGuidance(3.0, heads="2:1,0:0", u=0.5, scale=2.0, perturbed_stop=0.8)
    guider.save_pretrained(tmp_path)
    again = dittune.SoftPAGGuidance.from_pretrained(tmp_path)
    assert again.method == guider.method and again.guidance_scale == 3.0
    assert guider.new(u=0.25).method.u == 0.25


def test_errors_are_clear():
    pipe = sd3()
    with pytest.raises(ConfigError, match=r"u is in \[0, 1\], got 2"):
        dittune.SoftPAGGuidance(u=2.0)
    with pytest.raises(SelectionError, match="no layer 7"):
        run(pipe, dittune.SoftPAGGuidance(heads="7:0"))
    with (
        dittune.attach(pipe, dittune.SoftPAG(heads="0:0")),
        pytest.raises(SeamError, match="detach before another pipeline uses it"),
    ):
        run(pipe, dittune.SoftPAGGuidance(heads="0:0"))
