"""Scale-DiT: the small picture, the pass that reads it, and who sees what of it."""

import functools

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)

import dittune
from dittune.errors import ConfigError
from dittune.run import ModelInputs
from tests.tiny import FAMILIES, flux, latents, sd, sd3
from tests.tiny_video import wan


class Kept(dittune.ScaleDiT):
    """Tells what it remembers."""

    def report(self, run):
        return run.memory(self)


def scale_dit(kind=dittune.ScaleDiT, **settings):
    return kind(**{"window": 2, "factor": 2, **settings})


@pytest.mark.parametrize("family", ["flux", "sd3.5", "sd"])
def test_back_ends_agree(family):
    pipe = FAMILIES[family]()
    results = []
    for backend in ("dense", "cpu", "reference"):
        with dittune.attach(pipe, scale_dit(backend=backend)):
            results.append(latents(pipe, steps=1, guidance_scale=4.0, height=32, width=48))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-3, rtol=1e-3)


def test_the_small_picture_is_what_the_plain_model_makes():
    """Of the same noise, every second token of it, under the same guidance and schedule."""
    pipe = sd3()
    noise = torch.randn(1, pipe.transformer.config.in_channels, 16, 16)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    side = 16 * pipe.vae_scale_factor
    with dittune.attach(pipe, scale_dit(Kept)) as handle:
        pipe("a red circle", latents=noise, height=side, width=side, max_sequence_length=8,
             **settings)  # fmt: skip
        (memory,) = handle.report().values()
    small = pipe("a red circle", latents=noise[..., ::2, ::2], height=side // 2, width=side // 2,
                 max_sequence_length=8, **settings).images  # fmt: skip
    torch.testing.assert_close(memory.picture, small, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("many", [True, False])
def test_a_scheduler_that_draws_noise_takes_it_from_the_generator(many):
    """And that of the pipeline goes on as if no small picture had been made."""
    pipe = sd()
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    settings = {
        "eta": 1.0,
        "num_inference_steps": 3,
        "output_type": "latent",
        "height": 32,
        "width": 32,
    }
    results, left = [], []
    for i in range(2):
        generator = torch.Generator().manual_seed(5)
        with dittune.attach(pipe, scale_dit()):
            torch.manual_seed(i)
            given = [generator] if many else generator
            results.append(pipe("a red circle", generator=given, **settings).images)
        left.append(generator.get_state())
    assert torch.equal(*results)
    generator.manual_seed(5)
    plain = pipe("a red circle", generator=generator, **settings).images
    assert not torch.equal(plain, results[0])
    assert torch.equal(generator.get_state(), left[0])


class Times(Kept):
    """Remembers when the model was asked for the small picture."""

    def _small(self, inputs, latents, timestep, spread):
        inputs.run.memory(self).times = [
            *getattr(inputs.run.memory(self), "times", []),
            float(timestep.flatten()[0]),
        ]
        return super()._small(inputs, latents, timestep, spread)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # theirs
@pytest.mark.parametrize("start", [0.0, 0.2, 0.3, 0.4])
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        (sd, functools.partial(PNDMScheduler, skip_prk_steps=True)),
        (sd, EulerDiscreteScheduler),
        (sd, DPMSolverMultistepScheduler),
        (sd, DEISMultistepScheduler),
        (sd, UniPCMultistepScheduler),
        (sd, HeunDiscreteScheduler),
        (sd, KDPM2DiscreteScheduler),
        (sd3, FlowMatchHeunDiscreteScheduler),
        (
            sd3,
            functools.partial(
                UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
            ),
        ),
    ],
)
def test_the_small_picture_begins_where_the_method_starts(family, scheduler, start):
    """With no trace of the large picture's steps before; pairs of second order begin anew."""
    pipe = family()
    pipe.scheduler = scheduler()
    with dittune.attach(pipe, scale_dit(Times, start=start)) as handle:
        made = latents(pipe, steps=4, guidance_scale=4.0, height=32, width=32)
        (memory,) = handle.report().values()
    times = pipe.scheduler.timesteps.tolist()
    step = next(i for i in range(len(times)) if i / len(times) >= start)
    if pipe.scheduler.order == 2 or (isinstance(pipe.scheduler, PNDMScheduler) and step == 1):
        step += step % 2
    assert memory.times[:-1] == pytest.approx(times[step:])
    assert memory.times[-1] == 0.0  # the pass that reads it
    assert memory.picture.shape[-1] * 2 == made.shape[-1]
    assert memory.picture.isfinite().all() and made.isfinite().all()


def test_control_is_for_the_large_picture():
    pipe = sd()
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    pipe = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    with dittune.attach(pipe, scale_dit()) as handle:
        pipe("a red circle", image=torch.rand(1, 3, 32, 32), height=32, width=32,
             num_inference_steps=2, output_type="latent")  # fmt: skip
        assert handle.report()["scale_dit"]["guide"] is True


def test_eta_is_that_of_the_pipeline():
    pipe, small = sd(), []
    for eta in (0.0, 1.0):
        with dittune.attach(pipe, scale_dit(Kept)) as handle:
            latents(pipe, steps=3, eta=eta)
            small += [memory.picture for memory in handle.report().values()]
    assert (small[0] - small[1]).abs().max() > 1e-2


def test_the_guide_is_read_once_at_scaled_places(monkeypatch):
    pipe, calls = flux(), []
    method = scale_dit()
    around = type(method).around_model

    def record(self, inputs, model):
        def seen(given: ModelInputs):
            kwargs = given.kwargs
            calls.append((kwargs["hidden_states"].shape[1], float(kwargs["timestep"][0]),
                          kwargs["img_ids"]))  # fmt: skip
            return model(given)

        return around(self, inputs, seen)

    monkeypatch.setattr(type(method), "around_model", record)
    with dittune.attach(pipe, method):
        latents(pipe, steps=2, height=32, width=48)  # 4 x 6 tokens
    assert [tokens for tokens, _, _ in calls] == [6, 6, 6, 24, 24]
    assert [time for _, time, _ in calls][2] == 0.0
    small, spread = calls[0][2], calls[2][2]
    assert torch.equal(spread[:, 1:], 2 * small[:, 1:])
    assert small[:, 1:].tolist() == [[y, x] for y in range(2) for x in range(3)]


def test_another_guide_gives_another_picture():
    pipe = sd3()
    with dittune.attach(pipe, scale_dit()):
        guided = latents(pipe)
    with dittune.attach(pipe, scale_dit(guide=False)) as handle:
        alone = latents(pipe)
        assert handle.report()["scale_dit"]["guide"] is False
    assert (guided - alone).abs().max() > 1e-2


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="window a multiple of it"):
        scale_dit(window=3)
    pipe = flux()
    with (
        dittune.attach(pipe, scale_dit(window=3, factor=3)),
        pytest.raises(ConfigError, match="multiples of 3 tokens"),
    ):
        latents(pipe)
    with (
        dittune.attach(small := sd3(), scale_dit(window=4, factor=4)),
        pytest.raises(ConfigError, match="multiples of 4 tokens"),
    ):
        latents(small, width=16, height=64)
    with (
        dittune.attach(video := wan(), scale_dit()),
        pytest.raises(ConfigError, match="no small video is made"),
    ):
        latents(video)
    apart = dittune.SoftPAG(heads="1:0", u=0.5, perturbation="temperature")
    with (
        dittune.attach(pipe, apart, scale_dit()),
        pytest.raises(ConfigError, match="another method computes some heads apart"),
    ):
        latents(pipe)
