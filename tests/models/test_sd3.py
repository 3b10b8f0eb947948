"""Facts about SD3: what they say is what the model does."""

import torch

import dittune
from dittune.call import TokenLayout
from dittune.models import sd3 as facts
from tests.tiny import HEADS, LAYERS, latents, sd3, sd35


def test_sites_of_sd3_and_of_dual_attention():
    plain = facts.sites(sd3().transformer)
    assert [(site.kind, site.layer) for site in plain] == [("joint", i) for i in range(LAYERS)]
    assert all(site.heads == HEADS for site in plain)
    dual = facts.sites(sd35().transformer)
    assert [(site.kind, site.layer) for site in dual] == [
        ("joint", 0), ("self", 0), ("joint", 1), ("self", 1), ("joint", 2),
    ]  # fmt: skip
    assert dual[3].name == "transformer_blocks.1.attn2"
    assert str(dual[3]) == "self layer 1 (transformer_blocks.1.attn2, 2 heads)"


def test_layout_counts_tokens_not_pixels():
    transformer = sd3().transformer
    kwargs = {
        "hidden_states": torch.zeros(2, 4, 6, 10),
        "encoder_hidden_states": torch.zeros(2, 7, 128),
    }
    layouts = facts.layouts(transformer, kwargs)
    assert layouts["joint", 0] == TokenLayout((0, 15), (15, 22), (1, 3, 5))
    assert layouts["self", 0] == TokenLayout((0, 15), (15, 15), (1, 3, 5))


def test_roles_follow_guidance_and_name_the_layer_skipping_pass():
    pipe = sd3()
    seen = []

    class Watch(dittune.Method):
        def around_model(self, inputs, model):
            seen.append((inputs.roles, len(inputs.kwargs["hidden_states"])))
            return model(inputs)

    with dittune.attach(pipe, Watch()):
        latents(pipe, steps=1, guidance_scale=1.0)
        latents(pipe, steps=1, guidance_scale=4.0, prompt=["a red circle", "a blue ring"])
        settings = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0}
        latents(pipe, steps=2, guidance_scale=4.0, skip_layer_guidance_stop=1.0, **settings)
    assert seen == [
        (("cond",), 1),
        (("uncond", "cond"), 4),
        (("uncond", "cond"), 2),
        (("uncond", "cond"), 2),
        (("skip",), 1),
    ]


def test_batched_names_every_argument_with_batch_rows():
    """An extra chunk must extend all of them: control residuals are lists of tensors."""
    transformer = sd3().transformer
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 128),
        "pooled_projections": torch.randn(2, 128),
        "timestep": torch.tensor([500.0, 400.0]),
        "block_controlnet_hidden_states": [torch.randn(2, 16, 64) for _ in range(LAYERS)],
    }
    results = []
    for batched in (True, False):
        method = dittune.SoftPAG(heads="1:0", batched=batched)
        with torch.no_grad(), dittune.attach(transformer, method):
            results.append(transformer(**inputs).sample)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    without = {k: v for k, v in inputs.items() if "controlnet" not in k}
    with torch.no_grad():
        assert (transformer(**without).sample - transformer(**inputs).sample).abs().max() > 1e-2
