"""Merging equal text tokens: the same picture from fewer tokens."""

import pytest
import torch

import dittune
from dittune.errors import SelectionError
from dittune.methods.merge_padding import MergePadding
from tests.tiny import FAMILIES, latents, sd3

TEXT = "encoder_hidden_states"


def seen_text(pipe):
    """Records the text that reaches the denoiser."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs[TEXT].shape[1])

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    return seen, hook


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sd3_without_t5_is_the_same_with_one_zero_token(guidance_scale):
    pipe = sd3()
    settings = {"prompt": ["a red circle", "a blue ring"], "guidance_scale": guidance_scale}
    plain = latents(pipe, steps=3, max_sequence_length=100, **settings)
    seen, _ = seen_text(pipe)
    with dittune.attach(pipe, MergePadding()) as handle:
        ours = latents(pipe, steps=3, max_sequence_length=100, **settings)
        assert handle.report()["merge_padding"] == {"merged_tokens": 100}
    assert set(seen) == {32 + 1}
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    with dittune.attach(pipe, MergePadding()):
        few = latents(pipe, steps=3, max_sequence_length=8, **settings)
    assert (few - ours).abs().max() > 1e-2  # their number matters


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": "0:1,2:*"},
        {"heads": "0:1", "u": 0.5, "rows": "image"},
        {"heads": "1:0,2:1", "perturbation": "uniform"},
        {"heads": "1:0,2:1", "perturbation": "blurred_query"},
        {"heads": "1:0,2:1", "perturbation": "mean_query", "rows": "image"},
        {"heads": "1:0,2:1", "perturbation": "mean_query"},
        {"heads": "1:0,2:1", "rows": "image", "cols": "image"},
        {"heads": "1:0,2:1", "perturbation": "temperature"},
        {"heads": "1:0,2:1", "perturbation": "argmax"},
    ],
)
def test_perturbed_heads_see_what_they_saw(settings):
    pipe, method = sd3(), dittune.SoftPAG(**settings, scale=2.0)
    with dittune.attach(pipe, method):
        wanted = latents(pipe)
    with dittune.attach(pipe, MergePadding(), method):
        ours = latents(pipe)
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=1e-3)
    with pytest.raises(SelectionError, match="list merge_padding before softpag"):
        dittune.attach(pipe, method, MergePadding())


@pytest.mark.parametrize(
    "method",
    [
        dittune.Natten(window=3),
        dittune.Clear(radius=1.5, pooled=2),
        dittune.Clear(radius=1.5, base_tokens=10),
        dittune.Vmoba(start=0.0, chunks="1x2x2"),
        dittune.ScaleDiT(window=2, factor=2),
    ],
    ids=repr,
)
def test_sparse_attention_scales_as_before(method):
    pipe = sd3()
    settings = {"steps": 3, "max_sequence_length": 100, "guidance_scale": 4.0}
    with dittune.attach(pipe, method):
        wanted = latents(pipe, **settings)
    with dittune.attach(pipe, MergePadding(), method):
        ours = latents(pipe, **settings)
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["a_star", "attend_and_excite", "conform"])
def test_the_maps_of_words_are_those_of_all_tokens(name):
    pipe = sd3()
    more = {} if name == "a_star" else {"refinements": 0}
    method = dittune.load_method(name)(concepts="red+circle, blue+square", scale=5.0, **more)
    settings = {"prompt": "a red circle and a blue square", "max_sequence_length": 100}
    plain = latents(pipe, steps=3, **settings)
    with dittune.attach(pipe, method):
        wanted = latents(pipe, steps=3, **settings)
    with dittune.attach(pipe, MergePadding(), method):
        ours = latents(pipe, steps=3, **settings)
    effect = (wanted - plain).abs().max()
    assert (ours - wanted).abs().max() < effect / 50
    with pytest.raises(SelectionError, match="list merge_padding before"):
        dittune.attach(pipe, method, MergePadding())


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_last_tokens_differ_nothing_changes(family):
    pipe = FAMILIES[family]()
    if family.startswith("sd3"):
        pipe.text_encoder_3.encoder.final_layer_norm.weight.data.fill_(1.0)
    plain = latents(pipe)
    with dittune.attach(pipe, MergePadding()) as handle:
        ours = latents(pipe)
        merged = handle.report()["merge_padding"]["merged_tokens"]
    if merged < 2:
        assert torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
