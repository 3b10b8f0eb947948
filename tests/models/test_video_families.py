"""Facts about the video models: what they say is what the models do."""

import pytest
import torch
from diffusers import LTXConditionPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

import dittune
from dittune.errors import ConfigError, SelectionError
from dittune.models import facts_for
from tests.tiny import denoiser, latents, silent
from tests.tiny_video import (
    VIDEO_FAMILIES,
    cogvideox,
    hunyuan_video,
    mochi,
    wan,
    wan22,
    wan_transformer,
)

PLACES = {  # a token of the tiny grid (3, rows, columns), and where it is in the sample
    "wan": ((1, 2, 3), lambda x: x[0, :, 1, 4, 6]),
    "wan2.2": ((1, 2, 3), lambda x: x[0, :, 1, 4, 6]),
    "cogvideox": ((1, 1, 0), lambda x: x[0, 1, :, 2, 0]),
    "hunyuan_video": ((1, 1, 0), lambda x: x[0, :, 1, 2, 0]),
    "ltx": ((1, 2, 3), lambda x: x[0, 64 + 2 * 8 + 3]),
    "mochi": ((1, 1, 0), lambda x: x[0, :, 1, 2, 0]),
}


class Watch(dittune.Method):
    """Keeps each denoiser call's inputs and the queries, keys and layouts of its sites."""

    def around_model(self, inputs, model):
        CALLS.append((inputs, []))
        return model(inputs)

    def attend(self, call, proceed):
        CALLS[-1][1].append(call)
        return proceed(call)


CALLS: list = []


def watched(pipe, **settings):
    CALLS.clear()
    with dittune.attach(pipe, Watch()):
        latents(pipe, **settings)
    return list(CALLS)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_video_tokens_are_rows_of_the_grid(family):
    """The latent at one place is changed: the queries of one token of the first site move."""
    pipe = VIDEO_FAMILIES[family]()
    model, (place, where) = denoiser(pipe), PLACES[family]
    inputs, (first, *_) = watched(pipe, steps=1)[0]
    kwargs = dict(inputs.kwargs)
    name = inputs.batched[0]
    kwargs[name] = kwargs[name].clone()
    where(kwargs[name]).add_(1)
    CALLS.clear()
    with torch.no_grad(), dittune.attach(model, Watch()):
        model(**kwargs)
    second = CALLS[0][1][0]
    moved = (first.query[0] != second.query[0]).any(0).any(-1).nonzero().flatten().tolist()
    frame, row, column = place
    _, height, width = first.layout.grid
    assert moved == [first.layout.image[0] + (frame * height + row) * width + column]


@pytest.mark.parametrize("build", [cogvideox, hunyuan_video])
def test_text_stands_where_the_layout_says(build):
    pipe = build()
    model = denoiser(pipe)
    inputs, (first, *_) = watched(pipe, steps=1)[0]
    kwargs = dict(inputs.kwargs)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"] + 1
    CALLS.clear()
    with torch.no_grad(), dittune.attach(model, Watch()):
        model(**kwargs)
    moved = (first.query[0] != CALLS[0][1][0].query[0]).any(0).any(-1).nonzero().flatten()
    start, end = first.layout.text
    assert moved.min() >= start and moved.max() < end and moved[0] == start


def roles_of(calls):
    return [(inputs.run.step, inputs.roles) for inputs, _ in calls]


@pytest.mark.parametrize("family", ["wan", "cogvideox", "ltx", "mochi"])
def test_roles_with_guidance_and_without(family):
    pipe = VIDEO_FAMILIES[family]()
    seen = []

    class Roles(dittune.Method):
        def around_model(self, inputs, model):
            seen.append((inputs.run.step, inputs.roles, len(inputs.kwargs["hidden_states"])))
            return model(inputs)

    with dittune.attach(pipe, Roles()):
        latents(pipe, guidance_scale=1.0)
        assert seen == [(0, ("cond",), 1), (1, ("cond",), 1)]
        seen.clear()
        latents(pipe, guidance_scale=3.0)
    if family == "wan":
        assert seen == [(i, (role,), 1) for i in (0, 1) for role in ("cond", "uncond")]
    else:
        assert seen == [(i, ("uncond", "cond"), 2) for i in (0, 1)]


def test_true_guidance_of_hunyuan_video_is_two_calls():
    calls = roles_of(watched(hunyuan_video(), steps=1, true_cfg_scale=2.0, negative_prompt="red"))
    assert [roles for _, roles in calls] == [("cond",), ("uncond",)]


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_the_latents_are_a_view_of_the_sample(family):
    inputs, _ = watched(pipe := VIDEO_FAMILIES[family](), steps=1)[0]
    sample = inputs.kwargs[inputs.batched[0]]
    view = facts_for(denoiser(pipe)).latents(denoiser(pipe), inputs.kwargs)
    assert view.shape == sample.shape and view.data_ptr() == sample.data_ptr()


def test_both_denoisers_of_wan_2_2_are_attached():
    """The first step is made by one, the second by the other; each gets the extra pass."""
    pipe, calls = wan22(), {"transformer": 0, "transformer_2": 0}
    for name in calls:
        block = getattr(pipe, name).blocks[0]
        block.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    plain = latents(pipe, guidance_scale=1.0)
    assert calls == {"transformer": 1, "transformer_2": 1}
    for heads in ("0:1", "1:*"):
        method = dittune.SoftPAG(heads=heads, batched=False)
        with dittune.attach(pipe, method) as handle:
            assert not torch.equal(latents(pipe, guidance_scale=1.0), plain)
            assert handle.report()["softpag"]["perturbed_passes"] == 2
    assert calls == {"transformer": 5, "transformer_2": 5}


@pytest.mark.parametrize("batched", [True, False])
def test_a_perturbed_head_of_wan_is_the_identity(batched, monkeypatch):
    """`uncond + g (cond - uncond) + w (cond - perturbed)`, computed without any of our code."""
    from diffusers.models.transformers import transformer_wan

    pipe, chosen, predictions = wan(), {0: [1], 1: [0]}, []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda noise, *a, **k: (predictions.append(noise), step(noise, *a, **k))[
        1
    ]
    method = dittune.SoftPAG(heads="0:1,1:0", scale=2.0, batched=batched)
    CALLS.clear()
    with dittune.attach(pipe, Watch(), method):
        latents(pipe, steps=1, guidance_scale=3.0)
    cond_call, uncond_call = (inputs.kwargs for inputs, _ in CALLS)
    count = []

    def identity(query, key, value, **options):
        out = dispatch_attention_fn(query, key, value, **options)
        if len(count) % 2 == 0:  # self attention
            for head in chosen[len(count) // 2]:
                out[:, :, head] = value[:, :, head]
        count.append(1)
        return out

    with torch.no_grad():
        cond, uncond = (pipe.transformer(**kwargs)[0] for kwargs in (cond_call, uncond_call))
        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", identity)
        perturbed = pipe.transformer(**cond_call)[0]
    wanted = uncond + 3.0 * (cond - uncond) + 2.0 * (cond - perturbed)
    assert (cond - perturbed).abs().max() > 1e-2
    torch.testing.assert_close(predictions[0], wanted, atol=1e-4, rtol=1e-4)


def image_to_video(tokens=5):
    """A bare image-to-video denoiser of Wan 2.1, and its inputs: text is always 512 tokens."""
    torch.manual_seed(0)
    model = wan_transformer(in_channels=9, image_dim=8, added_kv_proj_dim=24)
    inputs = {
        "hidden_states": torch.randn(2, 9, 2, 4, 4),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 512, 32),
        "encoder_hidden_states_image": torch.randn(2, tokens, 8),
    }
    return model, inputs


def test_the_branch_to_the_image_is_left_alone():
    model, inputs = image_to_video()
    CALLS.clear()
    with torch.no_grad(), dittune.attach(model, Watch()):
        model(**inputs)
    sites = [(call.site.kind, call.key.shape[2]) for call in CALLS[0][1]]
    assert sites == [("self", 8), ("cross", 512)] * 2
    plain = model(**inputs).sample
    for kind, perturbation in (("self", "identity"), ("cross", "uniform")):
        method = dittune.SoftPAG(heads="0:1", kind=kind, perturbation=perturbation)
        with torch.no_grad(), dittune.attach(model, method):
            assert (model(**inputs).sample - plain).abs().max() > 1e-3
    view = facts_for(model).latents(model, inputs)
    assert torch.equal(view, inputs["hidden_states"][:, :4])


def test_text_whose_length_matters_is_not_merged():
    model, inputs = image_to_video()
    inputs["encoder_hidden_states"][:, 3:] = 0
    with (
        dittune.attach(model, dittune.load_method("merge_padding")()),
        pytest.raises(ConfigError, match="length"),
    ):
        model(**inputs)


def test_merged_padding_gives_the_same_video_in_wan():
    pipe = wan()
    plain = latents(pipe, max_sequence_length=64)
    with dittune.attach(pipe, dittune.load_method("merge_padding")()) as handle:
        torch.testing.assert_close(
            latents(pipe, max_sequence_length=64), plain, atol=1e-4, rtol=1e-4
        )
        assert handle.report()["merge_padding"]["merged_tokens"] > 50


@pytest.mark.parametrize("name", ["a_star", "attention_regulation"])
def test_methods_that_read_maps_of_pictures_say_so(name):
    pipe, method = wan(), dittune.load_method(name)
    with pytest.raises(SelectionError, match="which layers of this model show words"):
        dittune.attach(pipe, method(concepts="red, circle"))
    with dittune.attach(pipe, method(layers="0")), pytest.raises(ConfigError, match="not yet in a"):
        latents(pipe)


def test_rows_of_mochi_have_their_role_and_the_padding_of_their_own_text():
    """Two prompts of different length, guided: uncond rows first. Bitwise the plain pipeline."""
    pipe, settings = mochi(), {"prompt": ["a red circle", "a red circle moving up"]}
    settings |= {"steps": 1, "guidance_scale": 3.0}
    plain = latents(pipe, **settings)
    (_, calls), *_ = watched(pipe, **settings)
    seen = [(c.site.layer, c.roles, int(c.options["attn_mask"].sum()) - 12) for c in calls]
    found = [pipe.tokenizer(text)["attention_mask"] for text in ("", *settings["prompt"])]
    real = [sum(mask) for mask in found]
    real = [real[0], real[0], *real[1:]]
    assert real[2] < real[3] <= 8
    roles = [("uncond",), ("uncond",), ("cond",), ("cond",)]
    assert seen == [(i, *row) for i in (0, 1) for row in zip(roles, real)]
    assert all(c.query.shape[2] == c.layout.text[1] == 20 for c in calls)
    with dittune.attach(pipe, Watch()):
        assert torch.equal(latents(pipe, **settings), plain)


def test_a_row_of_mochi_that_fails_is_not_counted_into_the_next_call():
    pipe, failing = mochi(), [True]

    class Fail(dittune.Method):
        def attend(self, call, proceed):
            if failing and call.roles == ("uncond",):
                raise RuntimeError(failing.pop())
            assert call.roles == (("uncond", "cond")[call.run.rows_done[call.site.name] - 1],)
            return proceed(call)

    with dittune.attach(pipe, Fail()):
        with pytest.raises(RuntimeError, match="True"):
            latents(pipe, guidance_scale=3.0)
        latents(pipe, guidance_scale=3.0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("frames", [(), (0,), (8, 4)])
def test_frames_of_conditions_come_before_the_video_of_ltx(frames):
    """Those of frame 0 are mixed into it. The denoiser gets coordinates instead of sides."""
    pipe = silent(LTXConditionPipeline(**VIDEO_FAMILIES["ltx"]().components))
    picture = Image.new("RGB", (64, 32), (200, 30, 30))
    conditions = [LTXVideoCondition(image=picture, frame_index=frame) for frame in frames]

    def make():
        settings = {"width": 64, "height": 32, "num_frames": 9, "max_sequence_length": 8}
        return pipe(
            conditions=conditions or None, prompt="a red circle", num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="latent", **settings,
        ).frames  # fmt: skip

    plain = make()
    CALLS.clear()
    with dittune.attach(pipe, Watch()):
        assert torch.equal(make(), plain)
    (_, (self_call, cross_call, *_)), *_ = CALLS
    before = 128 * sum(frame > 0 for frame in frames)
    assert self_call.layout[:3] == ((before, before + 384), (before + 384,) * 2, (3, 8, 16))
    assert cross_call.layout[:3] == ((before, before + 384), (0, 8), (3, 8, 16))
    assert self_call.query.shape[2] == before + 384
    with dittune.attach(pipe, dittune.Natten(frames=1, window=3, start=0.0)) as handle:
        assert not torch.equal(make(), plain)
        assert handle.report()["natten"]["self"]["image_density"] == 9 / 384
