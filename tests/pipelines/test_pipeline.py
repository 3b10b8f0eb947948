"""The wrapper: loads, checks, attaches for the length of a call, records."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import dittune
from dittune.errors import CheckpointError, ConfigError, DittuneError, UnsupportedModelError
from tests.tiny import FAMILIES

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "progress": False}


def pixels(result):
    return [np.asarray(image) for image in result.images]


def test_call_record_and_detach(saved):
    method = dittune.SoftPAG(heads="0:1", u=0.5)
    pipe = dittune.Pipeline.from_pretrained(str(saved), methods=[method])
    result = pipe("a red circle", seed=5, guidance_scale=3.0, **SMALL)
    assert type(pipe.pipe) is StableDiffusion3Pipeline
    record = result.record
    assert record["model"] == "tiny-sd3" and record["seeds"] == [5]
    assert record["settings"]["guidance_scale"] == 3.0
    assert record["settings"]["num_inference_steps"] == 2
    assert record["methods"][0]["heads"] == "0:1" and record["methods"][0]["method"] == "softpag"
    assert record["report"]["softpag"]["perturbed_passes"] == 2
    assert record["versions"]["torch"] == torch.__version__ and record["seconds"] > 0
    pipe.methods = []
    assert not np.array_equal(pixels(pipe("a red circle", seed=5, **SMALL))[0], pixels(result)[0])


def test_each_image_of_a_call_has_a_seed_of_its_own(saved):
    pipe = dittune.Pipeline.from_pretrained(str(saved))
    both = pixels(pipe(["a red circle", "a red circle"], seed=5, **SMALL))
    second = pixels(pipe("a red circle", seed=6, **SMALL))[0]
    assert np.abs(both[1].astype(int) - second).max() <= 1
    assert not np.array_equal(both[0], both[1])
    named = pixels(pipe(["a red circle", "a red circle"], seed=[6, 5], **SMALL))
    assert np.abs(named[0].astype(int) - second).max() <= 1
    by_hand = pipe("a red circle", generator=torch.Generator().manual_seed(6), **SMALL)
    assert np.array_equal(pixels(by_hand)[0], second)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_negative_prompt_serves_all_prompts(family):
    pipe = dittune.Pipeline(FAMILIES[family]())
    guide = {"true_cfg_scale": 3.0} if family == "flux" else {"guidance_scale": 3.0}
    prompts = ["a red circle", "a blue ring"]
    one = pipe(prompts, negative_prompt="a square", seed=5, **guide, **SMALL)
    each = pipe(prompts, negative_prompt=["a square"] * 2, seed=5, **guide, **SMALL)
    without = pipe(prompts, seed=5, **guide, **SMALL)
    assert np.array_equal(pixels(one), pixels(each))
    assert not np.array_equal(pixels(one), pixels(without))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_inference_step": 2}, "did you mean 'num_inference_steps'"),
        ({"width": 36}, "width must be a multiple of 8 from 8 to 128, got 36"),
        ({"height": 136}, "height must be a multiple of 8 from 8 to 128, got 136"),
        ({"seed": [1, 2]}, "expected 1 seeds, one an image, got 2"),
        ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"seed": 2**64}, "seeds are from 0 to"),
        ({"seed": -1}, "seeds are from 0 to"),
        ({"prompt": []}, "the list of prompts is empty"),
    ],
)
def test_bad_arguments(saved, arguments, match):
    pipe = dittune.Pipeline.from_pretrained(str(saved))
    with pytest.raises(ConfigError, match=match):
        pipe(**{"prompt": "a red circle", **SMALL, **arguments})


@pytest.mark.parametrize(("family", "most"), [("sd3", 128), ("flux", 2**20), ("sd", 2**20)])
def test_sides_are_those_the_family_can_make(family, most):
    side = 8  # the autoencoder's factor is 4
    pipe = dittune.Pipeline(FAMILIES[family]())
    settings = {**SMALL, "num_inference_steps": 1}
    image = pipe("a red circle", **{**settings, "width": 3 * side, "height": 2 * side}).images[0]
    assert image.size == (3 * side, 2 * side)
    wanted = f"multiple of {side} from {side} to {most}, got"
    for wrong in (side // 2, 0, side + side // 2, most + side):
        with pytest.raises(ConfigError, match=f"height must be a {wanted} {wrong}"):
            pipe("a red circle", **{**settings, "height": wrong})


def test_sides_of_a_compiled_denoiser():
    pipe = FAMILIES["flux"]()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ConfigError, match="width must be a multiple of 8"):
        dittune.Pipeline(pipe)("a red circle", **{**SMALL, "width": 36})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_out_of_memory_says_what_to_lower(saved, error):
    pipe = dittune.Pipeline.from_pretrained(str(saved))

    def fail(*_):
        raise error

    pipe.pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(DittuneError, match="lower the number of images"):
        pipe("a red circle", **SMALL)


def test_a_back_end_that_cannot_run_here(saved):
    method = dittune.Clear(radius=2, backend="flex")
    pipe = dittune.Pipeline.from_pretrained(str(saved), methods=[method])
    with pytest.raises(ConfigError, match="'flex' cannot run: it needs CUDA tensors, got cpu"):
        pipe("a red circle", **SMALL)


def test_pixels_of_nan_are_an_error(saved):
    pipe = dittune.Pipeline.from_pretrained(str(saved))
    with pytest.raises(DittuneError, match="pixels came out as nan; lower the guidance scale"):
        pipe("a red circle", guidance_scale=1e38, **SMALL)


def test_out_of_memory_while_loading(saved, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(StableDiffusion3Pipeline, "to", fail)
    with pytest.raises(DittuneError, match=r"out of memory while loading .*tiny-sd3; choose"):
        dittune.Pipeline.from_pretrained(str(saved))


def test_a_model_without_known_denoiser(saved):
    pipe = dittune.Pipeline.from_pretrained(str(saved))
    pipe.pipe.transformer = None
    with pytest.raises(UnsupportedModelError, match="model families"):
        pipe("a red circle", **SMALL)


def test_torch_and_numpy_values_are_understood(saved):
    pipe = dittune.Pipeline.from_pretrained(
        str(saved), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert pipe.pipe.dtype == torch.bfloat16
    assert pipe("a red circle", seed=np.int64(5), **SMALL).record["seeds"] == [5]


def test_other_errors_are_not_hidden(saved):
    pipe = dittune.Pipeline.from_pretrained(str(saved))

    def fail(*_):
        raise RuntimeError("something else")

    pipe.pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        pipe("a red circle", **SMALL)


def test_truncated_checkpoint(model):
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"transformer/diffusion_pytorch_model.safetensors is trunc"
    ):
        dittune.Pipeline.from_pretrained(str(model))


def test_pickle_checkpoint(model):
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model.bin is a pickle"):
        dittune.Pipeline.from_pretrained(str(model))


def test_missing_weights(model):
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        dittune.Pipeline.from_pretrained(str(model))


@pytest.mark.parametrize(
    ("name", "match"),
    [("shapes-sd33", "no bundled checkpoint 'shapes-sd33'"), ("{tmp}", "no model_index.json")],
)
def test_no_such_model(tmp_path, name, match):
    with pytest.raises(CheckpointError, match=match):
        dittune.Pipeline.from_pretrained(name.format(tmp=tmp_path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"device": "cuda:99"}, "device 'cuda:99'"), ({"dtype": "int8"}, "int8")],
)
def test_device_and_dtype(saved, settings, match):
    with pytest.raises(ConfigError, match=match):
        dittune.Pipeline.from_pretrained(str(saved), **settings)
