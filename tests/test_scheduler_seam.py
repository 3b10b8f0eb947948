"""Steps that start from other latents than the pipeline's own, with any scheduler."""

import copy
import inspect
import pickle

import diffusers
import pytest
import torch

import dittune
from dittune.errors import AlreadyAttachedError, SeamError
from dittune.run import Run
from dittune.scheduler_seam import stepping_from, takes_latents
from tests.tiny import flux, latents, sd, sd3

# diffusers' own schedulers, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

NOISE = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
]  # fmt: skip
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
NOT_FOR_SD = {"EDMEulerScheduler", "IPNDMScheduler", "LMSDiscreteScheduler"}
SETTINGS = {"PNDMScheduler": {"skip_prk_steps": True}}


def scheduler(name):
    made = getattr(diffusers, name)(**SETTINGS.get(name, {}))
    made.set_timesteps(6)
    return made


class Shift(dittune.Method):
    """Moves the latents at some steps, by the same amount everywhere."""

    changes_latents = True
    steps = (0,)
    by = 0.5

    def around_model(self, inputs, model):
        from dittune.words.latent_inputs import latents_of, with_latents

        run = inputs.run
        if run.step in self.steps and run.latents is None:
            run.latents = latents_of(inputs) + self.by
        if run.latents is not None:
            inputs = with_latents(inputs, run.latents)
        return model(inputs)


def step(scheduler, prediction, t, sample):
    torch.manual_seed(0)  # of the noise of stochastic ones
    return scheduler.step(prediction, t, sample, return_dict=False)[0]


@pytest.mark.parametrize("name", [*NOISE, *FLOW, "PNDMScheduler with Runge-Kutta steps"])
def test_it_is_known_which_steps_start_from_the_latents_they_are_given(name):
    """Given a shifted sample, exactly these steps give another result."""
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    if " " in name:
        ours = diffusers.PNDMScheduler(skip_prk_steps=False)
        ours.set_timesteps(8)
    else:
        ours = scheduler(name)
    sample, taken = torch.randn(1, 4, 4, 4), []
    for t in ours.timesteps:
        if hasattr(ours, "scale_model_input"):
            ours.scale_model_input(sample, t)
        prediction = torch.randn_like(sample)
        takes = takes_latents(ours)
        run, shifted = Run(), copy.deepcopy(ours)
        with stepping_from(run, shifted):
            run.latents = sample + 0.5
            other = step(shifted, prediction, t, sample)
        sample = step(ours, prediction, t, sample)
        differs = bool((other - sample).abs().max() > 1e-4)
        # The single-step solver goes on from an earlier sample, and reads this one's prediction.
        assert differs == (takes or name == "DPMSolverSinglestepScheduler"), t
        taken.append(takes)
    assert taken[0] and len(taken) / 4 <= sum(taken)
    if name == "DPMSolverSinglestepScheduler":
        assert taken == [True, False, True, False, True, True]


@pytest.mark.parametrize("name", [n for n in NOISE if n not in NOT_FOR_SD])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_first_step_of_a_unet_starts_from_ours(name, guidance_scale):
    """As if the pipeline had been given the moved latents, whatever the scheduler scales."""
    pipe = sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(4)
    noise = torch.randn(1, 4, 8, 8)
    moved = noise + Shift.by / pipe.scheduler.init_noise_sigma
    expected = latents(pipe, steps=4, latents=moved, guidance_scale=guidance_scale)
    with dittune.attach(pipe, Shift()):
        ours = latents(pipe, steps=4, latents=noise, guidance_scale=guidance_scale)
    plain = latents(pipe, steps=4, latents=noise, guidance_scale=guidance_scale)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (ours - plain).abs().max() > 0.05


def shift_between(steps):
    def step_end(pipe, step, t, tensors):
        move = step + 1 in steps
        return {"latents": tensors["latents"] + Shift.by} if move else {}

    return step_end


TWO_CALLS = {"true_cfg_scale": 3.0, "negative_prompt": "a square"}  # a step, of FLUX only


@pytest.mark.parametrize(
    ("build", "guidance"),
    [
        *((build, given) for build in (sd3, flux, sd) for given in ({}, {"guidance_scale": 1.0})),
        (flux, TWO_CALLS),
    ],
)
def test_later_steps_start_from_ours(build, guidance):
    """As if the user's callback had moved the latents at the end of the step before."""
    pipe = build()

    class Later(Shift):
        steps = (1, 3)

    callback = shift_between(Later.steps)
    expected = latents(pipe, steps=4, callback_on_step_end=callback, **guidance)
    with dittune.attach(pipe, Later()):
        ours = latents(pipe, steps=4, **guidance)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, latents(pipe, steps=4, **guidance))


def test_the_class_and_the_keys_of_the_scheduler_come_back():
    pipe = sd()
    latents(pipe)
    stock, keys = type(pipe.scheduler), set(pipe.scheduler.__dict__)
    seen = []

    class Look(Shift):
        def around_model(self, inputs, model):
            now = pipe.scheduler
            seen.append(type(now))
            assert isinstance(now, stock) and type(now).__name__ == stock.__name__
            assert inspect.signature(now.step) == inspect.signature(stock().step)
            assert type(copy.deepcopy(now)) is type(pickle.loads(pickle.dumps(now))) is stock
            if inputs.run.step == 1:
                raise RuntimeError("of the model")
            return super().around_model(inputs, model)

    with dittune.attach(pipe, Look()):
        assert type(pipe.scheduler) is stock
        with pytest.raises(RuntimeError, match="of the model"):
            latents(pipe)
        assert type(pipe.scheduler) is stock and set(pipe.scheduler.__dict__) == keys
    assert seen[0] is not stock and len(seen) == 2
    assert type(pipe.scheduler) is stock and set(pipe.scheduler.__dict__) == keys


def test_without_such_a_method_the_scheduler_is_left_alone():
    pipe, seen = sd(), []
    stock = type(pipe.scheduler)

    class Look(dittune.Method):
        def around_model(self, inputs, model):
            seen.append(type(pipe.scheduler) is stock)
            return model(inputs)

    with dittune.attach(pipe, Look()):
        latents(pipe)
    assert seen == [True, True]


def test_a_scheduler_that_came_after_attaching_is_the_one_that_steps():
    pipe = sd()
    with dittune.attach(pipe, Shift()):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        moved = latents(pipe)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert (moved - latents(pipe)).abs().max() > 0.01


def test_two_generations_cannot_share_a_scheduler():
    made = scheduler("DDIMScheduler")
    with (
        stepping_from(Run(), made),
        pytest.raises(AlreadyAttachedError, match="give each pipeline its own"),
        stepping_from(Run(), made),
    ):
        pass
    assert type(made) is diffusers.DDIMScheduler


def test_latents_of_another_shape_are_refused():
    made, run, sample = scheduler("DDIMScheduler"), Run(), torch.zeros(1, 4, 4, 4)
    with stepping_from(run, made), pytest.raises(SeamError, match=r"\(1, 4, 4, 4\), .*\(2, 4"):
        run.latents = torch.zeros(2, 4, 4, 4)
        made.step(sample, made.timesteps[0], sample)


def test_a_step_that_never_comes_to_us_is_an_error():
    pipe = sd()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    with dittune.attach(pipe, Shift()), pytest.raises(SeamError, match="step was not asked to"):
        latents(pipe)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "SASolverScheduler"])
def test_a_corrector_does_not_take_our_latents_back(name):
    """It would go from the last step's sample to its own idea of this one's."""
    ours, sample = scheduler(name), torch.randn(1, 4, 4, 4)
    for t in ours.timesteps[:2]:
        sample = step(ours, torch.randn_like(sample), t, sample)
    expected, t, prediction = copy.deepcopy(ours), ours.timesteps[2], torch.randn_like(sample)
    expected.last_sample = None
    run = Run()
    with stepping_from(run, ours):
        run.latents = sample + 0.5
        moved = step(ours, prediction, t, sample)
    assert torch.equal(moved, step(expected, prediction, t, sample + 0.5))
