"""Facts about the UNets of Stable Diffusion: what they say is what the model does."""

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models import attention_processor

import dittune
from dittune.errors import SeamError, UnsupportedModelError
from dittune.models import unet as facts
from tests.tiny import UNET, Nothing, latents, sd, sdxl, silent

STEERED = {"heads": "0:1,1:0", "scale": 2.0}


def three_levels(**changes):
    """A bare UNet of three resolutions with attention in all of them."""
    torch.manual_seed(0)
    config = {
        **UNET,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def test_layers_are_counted_down_middle_up():
    unet = sd().unet
    sites = facts.sites(unet)
    stacks = ["down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0"]
    stacks += [f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1)]
    assert [(site.kind, site.layer, site.name) for site in sites] == [
        (kind, layer, f"{stack}.transformer_blocks.0.{attn}")
        for layer, stack in enumerate(stacks)
        for kind, attn in (("self", "attn1"), ("cross", "attn2"))
    ]
    assert [site.stage for site in sites[::2]] == [0, 1, 1, 1, 1, 0, 0]
    listed = [name.removesuffix(".processor") for name in unet.attn_processors]
    assert [site.name for site in sites] != listed  # diffusers lists the middle last


def test_layers_of_the_published_models():
    """The structures of SD 1.x and SDXL at small width."""
    crossed = ("CrossAttnDownBlock2D",) * 3
    old = three_levels(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=(*crossed, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in crossed)),
        layers_per_block=2,
    )
    stages = [site.stage for site in facts.sites(old) if site.kind == "self"]
    assert stages == [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    xl = three_levels(
        down_block_types=("DownBlock2D", *crossed[1:]),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
    )
    for kind in ("self", "cross"):
        sites = [site for site in facts.sites(xl) if site.kind == kind]
        spans = [("down_blocks.1", 4), ("down_blocks.2", 20), ("mid_block", 10)]
        spans += [("up_blocks.0", 30), ("up_blocks.1", 6)]
        wanted = [block for block, count in spans for _ in range(count)]
        assert [site.name.split(".attentions")[0] for site in sites] == wanted
        assert [site.layer for site in sites] == list(range(70))
        assert [(site.stage, site.heads) for site in sites] == [
            (1, 2) if block in ("down_blocks.1", "up_blocks.1") else (2, 4) for block in wanted
        ]


@pytest.mark.parametrize("size", [(16, 8), (7, 5), (6, 10), (9, 1)])
def test_the_grid_of_a_site_is_the_map_its_block_gets(size):
    """Also where a side is odd: halves round up, and the way up repeats the way down."""
    unet, maps, grids = three_levels(), [], []
    for name, module in unet.named_modules():
        if name.endswith(("attentions.0", "attentions.1")):
            module.register_forward_pre_hook(lambda _, args: maps.append(args[0].shape[2:]))

    class Watch(dittune.Method):
        def attend(self, call, proceed):
            grids.append((call.layout, call.query.shape[2], call.key.shape[2]))
            return proceed(call)

    with torch.no_grad(), dittune.attach(unet, Watch()):
        unet(torch.randn(1, 4, *size), 5, torch.randn(1, 3, 32))
    assert len(maps) == 10 and len(grids) == 20
    for i, (layout, queries, keys) in enumerate(grids):
        height, width = maps[i // 2]
        assert layout.grid == (1, height, width)
        assert layout.image == (0, height * width) == (0, queries)
        assert layout.text == ((0, 3) if i % 2 else (queries, queries))
        assert keys == (3 if i % 2 else queries)


def changed(pipe, kind, first, second):
    """For each site of a kind: which entries `[B, S]` of the keys differ between two calls."""
    runs = []

    class Watch(dittune.Method):
        def attend(self, call, proceed):
            if call.site.kind == kind:
                runs[-1].append(call.key)
            return proceed(call)

    with torch.no_grad(), dittune.attach(pipe, Watch()):
        for run in (first, second):
            runs.append([])
            run()
    return [(a != b).any(-1).any(1) for a, b in zip(*runs, strict=True)]


def test_keys_of_cross_attention_are_the_text_tokens():
    unet, image, text = three_levels(), torch.randn(1, 4, 8, 8), torch.randn(1, 6, 32)
    other = text.clone()
    other[:, 4] += 1
    found = changed(unet, "cross", lambda: unet(image, 5, text), lambda: unet(image, 5, other))
    assert len(found) == 10
    assert all(moved.nonzero().tolist() == [[0, 4]] for moved in found)
    first, *later = changed(
        unet, "self", lambda: unet(image, 5, text), lambda: unet(image, 5, other)
    )
    assert not first.any() and all(moved.all() for moved in later)


@pytest.mark.parametrize("build", [sd, sdxl])
def test_rows_are_unconditional_then_conditional(build):
    pipe = build()
    settings = {"steps": 1, "guidance_scale": 3.0}
    found = changed(
        pipe,
        "cross",
        lambda: latents(pipe, negative_prompt="a green ring", **settings),
        lambda: latents(pipe, negative_prompt="a red star", **settings),
    )
    assert all(moved[0].any() and not moved[1].any() for moved in found)
    roles = []

    class Watch(dittune.Method):
        def around_model(self, inputs, model):
            roles.append((inputs.roles, len(inputs.kwargs["sample"])))
            return model(inputs)

    with dittune.attach(pipe, Watch()):
        latents(pipe, ["a red circle", "a blue ring"], **settings)
        latents(pipe, steps=1, guidance_scale=1.0)
    assert roles == [(("uncond", "cond"), 4), (("cond",), 1)]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("build", "official"),
    [(sd, StableDiffusionPAGPipeline), (sdxl, StableDiffusionXLPAGPipeline)],
)
def test_a_whole_layer_is_the_pag_of_diffusers(build, official, guidance_scale):
    pipe = build()
    middle = [
        site.layer
        for site in facts.sites(pipe.unet)
        if site.kind == "self" and site.name.startswith("mid")
    ]
    method = dittune.SoftPAG(heads=",".join(f"{layer}:*" for layer in middle), scale=2.0)
    plain = latents(pipe, guidance_scale=guidance_scale)
    with dittune.attach(pipe, method):
        ours = latents(pipe, guidance_scale=guidance_scale)
    options = {"requires_safety_checker": False} if build is sd else {}
    pag = silent(official(**pipe.components, pag_applied_layers=["mid"], **options))
    theirs = latents(pag, guidance_scale=guidance_scale, pag_scale=2.0)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    assert (ours - plain).abs().max() > 1e-2
    with dittune.attach(pag, method), pytest.raises(UnsupportedModelError, match="PAGPipeline has"):
        latents(pag, pag_scale=2.0)


def test_size_conditions_of_sdxl_follow_their_rows():
    """The perturbed rows get the sizes of the conditional ones, not those of the others."""
    pipe, results = sdxl(), []
    sizes = {"original_size": (64, 32), "negative_original_size": (16, 16)}
    sizes |= {"target_size": (32, 32), "negative_target_size": (8, 8)}
    for batched in (True, False):
        with dittune.attach(pipe, dittune.SoftPAG(batched=batched, **STEERED)):
            results.append(latents(pipe, ["a red circle", "a blue ring"], steps=1, **sizes))
    torch.testing.assert_close(*results, atol=2e-3, rtol=1e-3)
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        other = latents(
            pipe, ["a red circle", "a blue ring"], steps=1, **{**sizes, "original_size": (16, 16)}
        )
    assert (other - results[0]).abs().max() > 1e-2


VARIANTS = [
    (StableDiffusionImg2ImgPipeline, sd, {"strength": 0.5}),
    (StableDiffusionInpaintPipeline, sd, {"strength": 0.5}),
    (StableDiffusionXLImg2ImgPipeline, sdxl, {"strength": 0.5}),
    (StableDiffusionXLInpaintPipeline, sdxl, {"strength": 0.5}),
]


@pytest.mark.parametrize(("variant", "build", "settings"), VARIANTS)
def test_image_to_image_and_inpainting(variant, build, settings):
    options = {"requires_safety_checker": False} if build is sd else {}
    pipe = silent(variant(**build().components, **options))
    settings = {**settings, "image": torch.rand(1, 3, 32, 32), "steps": 4}
    if "Inpaint" in variant.__name__:
        settings["mask_image"] = (torch.rand(1, 1, 32, 32) > 0.5).float()
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe, **settings), plain)
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)) as handle:
        assert (latents(pipe, **settings) - plain).abs().max() > 1e-3
        assert handle.report()["softpag"]["perturbed_passes"] == 2
    with dittune.attach(pipe, dittune.AStar(concepts="red, circle")) as handle:
        assert (latents(pipe, **settings) - plain).abs().max() > 1e-3
        assert handle.report()["a_star"]["updates"] == 2


def test_an_inpainting_unet_predicts_fewer_channels_than_it_is_given():
    pipe = silent(
        StableDiffusionInpaintPipeline(
            **sd(in_channels=9).components, requires_safety_checker=False
        )
    )
    settings = {"image": torch.rand(1, 3, 32, 32), "mask_image": torch.ones(1, 1, 32, 32)}
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        steered = latents(pipe, **settings)
    assert steered.shape == plain.shape and not torch.equal(steered, plain)
    with dittune.attach(pipe, dittune.AStar(scale=5.0, concepts="red, circle")) as handle:
        moved = latents(pipe, **settings)
        assert handle.report()["a_star"]["updates"] == 2
    assert moved.shape == plain.shape and not torch.equal(moved, plain)


def test_words_are_read_at_a_thirty_second_of_the_side():
    """16 x 16 in a picture of 512, or the coarsest grid of a smaller model."""
    for model, stage in ((three_levels(), 2), (sd().unet, 1), (sdxl().unet, 1)):
        sharp = {site.stage for site in facts.sites(model) if site.shows_words}
        assert sharp == {stage}


def test_batched_names_every_argument_with_batch_rows():
    unet, results = three_levels(class_embed_type="timestep"), []
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "class_labels": torch.tensor([3.0, 40.0]),
        "encoder_attention_mask": (torch.arange(6) < torch.tensor([[3], [6]])).long(),
    }
    with torch.no_grad():
        seen = []
        hooks = [
            module.register_forward_hook(lambda _, args, output: seen.append(output))
            for module in (unet.conv_in, *unet.down_blocks, unet.mid_block)
        ]
        unet(**inputs)
        for hook in hooks:
            hook.remove()
    first, *downs, middle = seen
    skips = [first, *(skip for _, skips in downs for skip in skips)]
    adapters = [torch.randn_like(skips[i]) for i in (1, 3, 5)]
    residuals = [
        {
            "down_block_additional_residuals": tuple(torch.randn_like(skip) for skip in skips),
            "mid_block_additional_residual": torch.randn_like(middle),
        },
        {"down_intrablock_additional_residuals": adapters},
    ]
    for extra in residuals:
        results = []
        for batched in (True, False):
            given = {k: list(v) if isinstance(v, list) else v for k, v in extra.items()}
            method = dittune.SoftPAG(batched=batched, **STEERED)
            with torch.no_grad(), dittune.attach(unet, method):
                results.append(unet(**inputs, **given).sample)
                plain = unet(**inputs).sample
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        assert (results[0] - plain).abs().max() > 1e-2


def test_fused_projections():
    pipe = sd()
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        wanted = latents(pipe)
    pipe.unet.fuse_qkv_projections()
    plain = latents(pipe)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe), plain)
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        torch.testing.assert_close(latents(pipe), wanted, atol=1e-3, rtol=1e-3)
        pipe.unet.unfuse_qkv_projections()
        with pytest.raises(SeamError, match=r"replaced by AttnProcessor2_0 .* attach after"):
            latents(pipe)


@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_with_explicit_scores_are_refused(processor):
    pipe = sd()
    if processor == "AttnProcessor":
        pipe.unet.set_attn_processor(attention_processor.AttnProcessor())
    else:
        pipe.enable_attention_slicing(1)
    with pytest.raises(UnsupportedModelError, match=rf"^{processor} makes 0 .* or attention slic"):
        dittune.attach(pipe, dittune.SoftPAG(**STEERED))
    pipe = sd()
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        pipe.enable_attention_slicing(1)
        with pytest.raises(SeamError, match=r"self layer 0 .* replaced by SlicedAttnProcessor"):
            latents(pipe)


def test_an_ip_adapter_is_refused_where_it_acts_only():
    pipe = sd()
    site = next(site for site in facts.sites(pipe.unet) if site.kind == "cross")
    adapter = attention_processor.IPAdapterAttnProcessor2_0(8, 64)
    pipe.unet.get_submodule(site.name).set_processor(adapter)
    with pytest.raises(UnsupportedModelError, match=r"IPAdapterAttnProcessor2_0 at cross layer 0"):
        dittune.attach(pipe, Nothing())
    with dittune.attach(pipe, dittune.SoftPAG(**STEERED)):
        assert pipe.unet.get_submodule(site.name).processor is adapter


def test_other_models_of_the_class_are_refused():
    unet = three_levels(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")
    )
    with pytest.raises(UnsupportedModelError, match=r"^down_blocks.2.attentions.0 is no attention"):
        dittune.attach(unet, Nothing())
