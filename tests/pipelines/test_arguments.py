"""A configuration as arguments of each family's pipeline."""

import pytest
import torch

from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines.arguments import call_settings, guidance, image_size
from tests.tiny import flux, latents, sd, sd3


def test_only_what_was_decided_is_given():
    assert call_settings(sd3(), RunConfig()) == {}
    config = RunConfig(steps=3, guidance_scale=4.0, negative_prompt="dull", size="32x16")
    assert call_settings(sd(), config) == {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "negative_prompt": "dull",
        "width": 32,
        "height": 16,
    }


def test_a_flux_that_was_not_distilled_is_guided_truly():
    assert guidance(flux(), 3.5) == {"guidance_scale": 3.5}
    pipe = flux(guidance_embeds=False)
    plain = latents(pipe)
    assert torch.equal(latents(pipe, **guidance(pipe, 1.0)), plain)
    assert (latents(pipe, **guidance(pipe, 4.0)) - plain).abs().max() > 1e-3
    config = RunConfig(guidance_scale=4.0, negative_prompt="dull")
    assert call_settings(pipe, config)["negative_prompt"] == "dull"


def test_sizes():
    assert image_size(RunConfig()) is None
    assert image_size(RunConfig(size="64")) == (64, 64)
    assert image_size(RunConfig(size="64x32")) == (64, 32)
    with pytest.raises(ConfigError, match="SIDE or WIDTHxHEIGHT"):
        image_size(RunConfig(size="64x"))
