"""Steps and rows of pipelines that say less than most: counted right, or refused."""

import inspect

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    T2IAdapter,
)

import dittune
from dittune.errors import UnsupportedModelError
from dittune.method import Method
from tests.tiny import Nothing, latents, randomise, sd, sd3, silent
from tests.tiny_video import cogvideox


class Watch(Method):
    """Takes down each call of the denoiser and each end of a step, and moves the latents."""

    def around_model(self, inputs, model):
        memory, rows = inputs.run.memory(self), len(inputs.kwargs[inputs.batched[0]])
        seen = (inputs.run.step, inputs.run.num_steps, inputs.roles, rows)
        memory.calls = [*getattr(memory, "calls", []), seen]
        return model(inputs)

    def on_step(self, run, z):
        memory = run.memory(self)
        memory.ends = [*getattr(memory, "ends", []), run.step]
        return z + 1

    def report(self, run):
        return vars(run.memory(self))


def only(pipe, pipeline_class):
    """The components of a pipeline that another one takes too."""
    takes = inspect.signature(pipeline_class.__init__).parameters
    return {name: part for name, part in pipe.components.items() if name in takes}


def adapter():
    pipe = sd()
    torch.manual_seed(2)
    of_picture = T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=pipe.vae_scale_factor
    )
    randomise(of_picture)
    cls = StableDiffusionAdapterPipeline
    return silent(cls(**only(pipe, cls), adapter=of_picture, requires_safety_checker=False))


def test_a_pipeline_without_a_callback_is_followed_through_its_scheduler():
    pipe = adapter()
    assert "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters
    settings = {"image": torch.rand(1, 3, 32, 32), "steps": 4, "guidance_scale": 3.0}
    plain = latents(pipe, **settings)
    stock = type(pipe.scheduler)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe, **settings), plain)
    with dittune.attach(pipe, Watch(start=0.25, stop=0.75)) as handle:
        moved = latents(pipe, **settings)
        roles = ("uncond", "cond")
        wanted = {"calls": [(1, 4, roles, 2), (2, 4, roles, 2)], "ends": [1, 2]}
        assert handle.report() == {"test_step_end": wanted}
    assert (moved - plain).abs().max() > 0.5
    assert type(pipe.scheduler) is stock
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:0", stop=0.5)) as handle:
        latents(pipe, **settings)
        assert handle.report()["softpag"]["perturbed_passes"] == 2
    with dittune.attach(pipe, dittune.AStar(concepts="red, circle", stop=1.0)) as handle:
        assert not torch.equal(latents(pipe, **settings), plain)
        assert handle.report()["a_star"]["updates"] == 4


class OwnLoop(DiffusionPipeline):
    """Makes denoiser calls, and steps by itself."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, calls, steps=2, stepped=0):
        self.scheduler.set_timesteps(steps)
        z, text = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 64)
        for i in range(calls):
            guess = self.unet(z, 5, text).sample
            if i < stepped:
                z = self.scheduler.step(guess, self.scheduler.timesteps[i], z, return_dict=False)[0]
        return z


def test_a_pipeline_whose_steps_cannot_be_counted_is_refused():
    pipe = OwnLoop(sd().unet, sd().scheduler)
    pipe.do_classifier_free_guidance = False
    plain = pipe(calls=2, stepped=2)
    with dittune.attach(pipe, Watch()) as handle:
        assert not torch.equal(pipe(calls=2, stepped=2), plain)
        assert handle.report()["test_step_end"]["ends"] == [0, 1]
        with pytest.raises(
            UnsupportedModelError, match=r"^OwnLoop ends no step that dittune hears"
        ):
            pipe(calls=2)
        assert handle.report() == {"test_step_end": {}}
        with pytest.raises(UnsupportedModelError, match="calls its denoiser after the last of 2"):
            pipe(calls=3, stepped=2)
    pipe.scheduler = None
    with (
        dittune.attach(pipe, Nothing()),
        pytest.raises(UnsupportedModelError, match="has no scheduler, by which"),
    ):
        pipe(calls=2)


def test_a_callback_that_is_told_no_latents_is_refused():
    class Untold(StableDiffusion3Pipeline):
        def __call__(self, prompt, callback_on_step_end=None, **settings):
            callback_on_step_end(self, 0, 999, {"latents": None})

    pipe = silent(Untold(**sd3().components))
    with (
        dittune.attach(pipe, Nothing()),
        pytest.raises(UnsupportedModelError, match="Untold tells its callback no latents, got Non"),
    ):
        pipe("a red circle")


def test_rows_that_no_role_explains_are_refused():
    cls = StableDiffusionUpscalePipeline
    pipe = sd(in_channels=7, num_class_embeds=1000)
    pipe.vae.register_to_config(scaling_factor=0.08333)
    pipe = silent(cls(**only(pipe, cls), low_res_scheduler=DDPMScheduler()))

    def picture(**settings):
        given = {"num_inference_steps": 3, "noise_level": 20, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, 16, 16, generator=generator)
        return pipe("a red circle", image, generator=generator, **given, **settings).images

    steered = dittune.SoftPAG(heads="0:0,1:1", start=0.5)
    with dittune.attach(pipe, steered) as handle:
        picture(guidance_scale=1.0)
        assert handle.report()["softpag"]["perturbed_passes"] == 1
        with pytest.raises(UnsupportedModelError, match=r"makes 1 pictures, .* 2 for cond: it has"):
            picture(guidance_scale=5.0)
    assert not torch.equal(picture(guidance_scale=5.0), picture(guidance_scale=1.0))


def test_batches_of_three_chunks_are_refused():
    edit = StableDiffusionInstructPix2PixPipeline
    pipe = sd(in_channels=8)
    pipe = silent(edit(**only(pipe, edit), requires_safety_checker=False))
    settings = {"image": torch.rand(1, 3, 32, 32), "guidance_scale": 3.0}
    with (
        dittune.attach(pipe, Nothing()),
        pytest.raises(UnsupportedModelError, match="3 rows in a batch, expected uncond and cond"),
    ):
        latents(pipe, **settings)
    pag = silent(
        StableDiffusion3PAGPipeline(
            **only(sd3(), StableDiffusion3PAGPipeline), pag_applied_layers=["blocks.2"]
        )
    )
    prompts = ["a red circle", "a blue ring"]
    shared = dittune.SharedAttention(layers="0,1")
    with (
        dittune.attach(pag, shared),
        pytest.raises(UnsupportedModelError, match=r"makes 2 pictures, .* 3 for uncond and for co"),
    ):
        latents(pag, prompts, pag_scale=2.0)


def test_guidance_that_is_one_at_a_step_keeps_its_rows():
    """CogVideoX can change its guidance scale from step to step, not its rows."""
    pipe = cogvideox()

    def dynamic(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {}

    with dittune.attach(pipe, Watch()) as handle:
        latents(pipe, guidance_scale=6.0, steps=3, callback_on_step_end=dynamic)
    calls = handle.report()["test_step_end"]["calls"]
    assert [call[2:] for call in calls] == [(("uncond", "cond"), 2)] * 3
