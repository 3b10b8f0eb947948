"""Folders of the real classes, as `from_pretrained` finds them: components, offloading, int8."""

import pytest
import torch

import dittune
from tests.tiny import denoiser, flux, latents, sd35, sdxl

BUILDS = [sd35, flux, sdxl]
STEER = dittune.SoftPAG(heads="0:1", scale=2.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {build: tmp_path_factory.mktemp("hub") / build.__name__ for build in BUILDS}
    for build, folder in made.items():
        build().save_pretrained(folder)
    return made


def load(folder, **settings):
    pipe = dittune.Pipeline.from_pretrained(str(folder), device="cpu", dtype="float32", **settings)
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe.pipe


def steered(pipe):
    with dittune.attach(pipe, STEER):
        return latents(pipe)


@pytest.mark.parametrize("build", BUILDS)
def test_a_folder_is_what_was_saved_and_offloading_changes_no_bit(folders, build):
    pipe = load(folders[build])
    wanted = steered(build())
    assert torch.equal(steered(pipe), wanted)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(steered(pipe), wanted)
    pipe.remove_all_hooks()


def test_a_component_that_was_made_before(folders):
    other = flux(num_single_layers=1).transformer
    assert load(folders[flux], transformer=other).transformer is other


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("build", BUILDS)
def test_int8_weights_of_torchao(folders, build):
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    name = "unet" if build is sdxl else "transformer"
    mapping = {name: TorchAoConfig(Int8WeightOnlyConfig())}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = load(folders[build], quantization_config=config)
    kinds = {type(parameter.data).__name__ for parameter in denoiser(pipe).parameters()}
    assert "Int8Tensor" in kinds
    plain, wanted = latents(pipe), steered(build())
    error = (steered(pipe) - wanted).abs().mean() / wanted.abs().mean()
    effect = (plain - wanted).abs().mean() / wanted.abs().mean()
    assert error < 0.05 < effect
    assert torch.equal(latents(pipe), plain)
