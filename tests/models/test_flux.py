"""Facts about FLUX: what they say is what the model does."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.models.transformers import transformer_flux

import dittune
from dittune.call import TokenLayout
from dittune.errors import UnsupportedModelError
from dittune.models import flux as facts
from tests.tiny import HEADS, Nothing, flux, latents

TRUE_GUIDANCE = {"negative_prompt": "a green ring", "true_cfg_scale": 3.0}


class Calls(dittune.Method):
    """Keeps the inputs of each denoiser call the pipeline makes; changes nothing."""

    def around_model(self, inputs, model):
        memory = inputs.run.memory(self)
        memory.calls = [*getattr(memory, "calls", []), (inputs.run.step, inputs)]
        return model(inputs)

    def report(self, run):
        return vars(run.memory(self))


def roles_of(handle):
    return [(step, inputs.roles) for step, inputs in handle.report()["test_flux"]["calls"]]


def test_double_blocks_then_single_blocks_are_one_count():
    sites = facts.sites(flux(num_layers=19, num_single_layers=38).transformer)
    assert [site.layer for site in sites] == list(range(57))
    assert {(site.kind, site.heads, site.stage) for site in sites} == {("joint", HEADS, 0)}
    assert sites[18].name == "transformer_blocks.18.attn"
    assert sites[19].name == "single_transformer_blocks.0.attn"
    assert sites[56].name == "single_transformer_blocks.37.attn"


class Queries(dittune.Method):
    """Keeps the queries of one layer, and the layout."""

    def attend(self, call, proceed):
        QUERIES.setdefault(call.site.layer, []).append((call.query, call.layout))
        return proceed(call)


QUERIES: dict = {}


def changed_tokens(layer):
    """Which tokens differ between the two calls recorded at a layer, and the layout."""
    (first, layout), (second, _) = QUERIES[layer]
    moved = (first != second).flatten(0, 1).any(0).any(-1)
    return moved.nonzero().flatten().tolist(), layout


@pytest.fixture
def inputs():
    """One row of a 4 x 6 picture and 5 text tokens."""
    QUERIES.clear()
    return {
        "hidden_states": torch.randn(1, 24, 16),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": flux()._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32),
        "txt_ids": torch.zeros(5, 3),
    }


def test_text_comes_first_and_image_tokens_are_rows_of_the_grid(inputs):
    """In a double block: one text token, or the latent at one position, is changed."""
    transformer = flux().transformer
    row, column = 2, 5
    position = torch.tensor([0.0, row, column])
    packed = (inputs["img_ids"] == position).all(-1).nonzero().item()
    for name, token in (("encoder_hidden_states", 3), ("hidden_states", packed)):
        QUERIES.clear()
        other = {**inputs, name: inputs[name].clone()}
        other[name][:, token] += 1
        with torch.no_grad(), dittune.attach(transformer, Queries()):
            transformer(**inputs)
            transformer(**other)
        moved, layout = changed_tokens(0)
        first = layout.text[0] if name == "encoder_hidden_states" else layout.image[0]
        wanted = 3 if name == "encoder_hidden_states" else row * layout.grid[2] + column
        assert moved == [first + wanted]
    assert layout == TokenLayout((5, 29), (0, 5), (1, 4, 6))


@pytest.mark.parametrize("stream", [0, 1], ids=["text", "image"])
def test_single_blocks_have_the_same_order(inputs, stream):
    """One token of one stream is changed on its way from the last double to the first single."""
    transformer = flux().transformer
    with torch.no_grad(), dittune.attach(transformer, Queries()):
        transformer(**inputs)

        def change(block, args, output):
            output[stream][:, 2] += 1

        transformer.transformer_blocks[-1].register_forward_hook(change)
        transformer(**inputs)
    moved, layout = changed_tokens(len(transformer.transformer_blocks))
    assert moved == [(layout.text if stream == 0 else layout.image)[0] + 2]


def test_the_grid_is_that_of_the_first_picture_in_any_precision():
    def layout(ids, text=7):
        kwargs = {"encoder_hidden_states": torch.zeros(1, text, 1), "img_ids": ids}
        return facts.layouts(None, kwargs)["joint", 0]

    ids = flux()._prepare_latent_image_ids
    assert layout(ids(1, 3, 5, "cpu", torch.float32)) == TokenLayout((7, 22), (0, 7), (1, 3, 5))
    many = ids(1, 301, 3, "cpu", torch.bfloat16)
    assert len(many[:, 1].unique()) < 301  # rounded
    assert layout(many, text=0) == TokenLayout((0, 903), (0, 0), (1, 301, 3))
    assert layout(ids(1, 2, 300, "cpu", torch.bfloat16)).grid == (1, 2, 300)
    picture, reference = (ids(1, *side, "cpu", torch.float32) for side in ((3, 2), (4, 4)))
    reference[:, 0] = 1
    both = torch.cat([picture, reference])
    assert layout(both) == layout(both[None]) == TokenLayout((7, 13), (0, 7), (1, 3, 2), 16)


def test_distilled_guidance_is_one_call_a_step_and_true_guidance_two():
    pipe = flux()
    with dittune.attach(pipe, Calls()) as handle:
        latents(pipe, steps=2)
        assert roles_of(handle) == [(0, ("cond",)), (1, ("cond",))]
        latents(pipe, steps=2, **TRUE_GUIDANCE)
        pairs = [(step, (role,)) for step in (0, 1) for role in ("cond", "uncond")]
        assert roles_of(handle) == pairs
        first, second = (inputs for _, inputs in handle.report()["test_flux"]["calls"][:2])
    embeds = pipe.encode_prompt("a red circle", None, max_sequence_length=8)[1]
    assert torch.equal(first.kwargs["pooled_projections"], embeds)
    assert not torch.equal(second.kwargs["pooled_projections"], embeds)


def test_the_two_calls_are_told_apart_in_a_pipeline_that_does_not_name_them():
    pipe = FluxImg2ImgPipeline(**flux().components)
    pipe.set_progress_bar_config(disable=True)
    settings = {"image": torch.rand(1, 3, 32, 32), "strength": 0.5, **TRUE_GUIDANCE}
    method = dittune.SoftPAG(heads="0:1,3:0", scale=2.0)
    plain = latents(pipe, steps=4, **settings)
    with dittune.attach(pipe, Calls(), method) as handle:
        assert not torch.equal(latents(pipe, steps=4, **settings), plain)
        assert handle.report()["softpag"]["perturbed_passes"] == 2
        pairs = [(step, (role,)) for step in (0, 1) for role in ("cond", "uncond")]
        assert roles_of(handle) == pairs


@pytest.mark.parametrize("batched", [True, False])
def test_true_guidance_gets_the_term_in_both_calls(batched, monkeypatch):
    """`uncond + g (cond - uncond) + w (cond - perturbed)`, computed without any of our code."""
    pipe, scale, chosen = flux(), 2.0, {0: [1], 2: [0, 1], 3: [0]}
    heads = ",".join(f"{layer}:{head}" for layer in chosen for head in chosen[layer])
    predictions = []
    step = pipe.scheduler.step

    def recording(noise, *args, **kwargs):
        predictions.append(noise)
        return step(noise, *args, **kwargs)

    pipe.scheduler.step = recording
    method = dittune.SoftPAG(heads=heads, scale=scale, batched=batched)
    with dittune.attach(pipe, Calls(), method) as handle:
        latents(pipe, steps=3, **TRUE_GUIDANCE)
        assert handle.report()["softpag"]["perturbed_passes"] == 3
        calls = [inputs.kwargs for _, inputs in handle.report()["test_flux"]["calls"]]
    stock, layers = transformer_flux.dispatch_attention_fn, []

    def identity(query, key, value, **options):
        out = stock(query, key, value, **options)
        for head in chosen.get(len(layers), ()):
            out[:, :, head] = value[:, :, head]  # [B, S, H, D] here
        layers.append(1)
        return out

    assert len(predictions) == 3 and len(calls) == 6
    for i, prediction in enumerate(predictions):
        with torch.no_grad():
            cond, uncond = (pipe.transformer(**call)[0] for call in calls[2 * i : 2 * i + 2])
            with monkeypatch.context() as patch:
                patch.setattr(transformer_flux, "dispatch_attention_fn", identity)
                perturbed = pipe.transformer(**calls[2 * i])[0]
        layers.clear()
        term = scale * (cond - perturbed)
        assert term.abs().max() > 1e-2
        torch.testing.assert_close(
            prediction, uncond + 3.0 * (cond - uncond) + term, atol=1e-4, rtol=1e-4
        )


def test_start_and_stop_count_steps_not_calls():
    pipe = flux()
    method = dittune.SoftPAG(heads="0:1", start=0.25, stop=0.75)
    with dittune.attach(pipe, method) as handle:
        latents(pipe, steps=4, **TRUE_GUIDANCE)
        assert handle.report()["softpag"]["perturbed_passes"] == 2


def test_batched_names_the_residuals_of_both_kinds_of_blocks(inputs):
    transformer, results = flux().transformer, []
    rows = {
        name: value if "ids" in name else value.repeat(2, *[1] * (value.ndim - 1))
        for name, value in inputs.items()
    }
    rows["controlnet_block_samples"] = [torch.randn(2, 24, 32) for _ in range(2)]
    rows["controlnet_single_block_samples"] = [torch.randn(2, 24, 32) for _ in range(2)]
    for batched in (True, False):
        method = dittune.SoftPAG(heads="0:1,3:0", batched=batched)
        with torch.no_grad(), dittune.attach(transformer, method):
            results.append(transformer(**rows).sample)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        with torch.no_grad(), dittune.attach(transformer, method):
            assert (transformer(**{**rows, name: None}).sample - results[0]).abs().max() > 1e-2


@pytest.mark.parametrize("fuse_first", [True, False])
def test_fused_projections_in_either_order(fuse_first):
    """FLUX keeps its processors when it fuses, so that is allowed while attached."""
    pipe = flux()
    method = dittune.SoftPAG(heads="0:1,3:0")
    with dittune.attach(pipe, method):
        wanted = latents(pipe)
    if fuse_first:
        pipe.transformer.fuse_qkv_projections()
        plain = latents(pipe)
        with dittune.attach(pipe, Nothing()):
            assert torch.equal(latents(pipe), plain)
    with dittune.attach(pipe, method):
        if not fuse_first:
            pipe.transformer.fuse_qkv_projections()
        assert pipe.transformer.transformer_blocks[0].attn.fused_projections
        torch.testing.assert_close(latents(pipe), wanted, atol=1e-4, rtol=1e-4)


def test_processors_of_an_ip_adapter_are_refused():
    pipe = flux()
    attn = pipe.transformer.transformer_blocks[1].attn
    attn.set_processor(transformer_flux.FluxIPAdapterAttnProcessor(32, 32))
    before = type(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match=r"FluxIPAdapterAttnProcessor at joint layer 1"):
        dittune.attach(pipe, Nothing())
    assert type(pipe.transformer) is before
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:0")):
        pass  # a site that is left alone may keep it


def test_the_latents_come_before_the_tokens_of_a_reference_and_the_channels_of_a_mask():
    ids = flux()._prepare_latent_image_ids
    picture, reference = (ids(1, 2, 3, "cpu", torch.float32) for _ in range(2))
    reference[:, 0] = 1
    sample = torch.randn(2, 12, 24)
    kwargs = {"hidden_states": sample, "img_ids": torch.cat([picture, reference])}
    view = facts.latents(SimpleNamespace(out_channels=16), kwargs)
    assert torch.equal(view, sample[:, :6, :16]) and view.data_ptr() == sample.data_ptr()
