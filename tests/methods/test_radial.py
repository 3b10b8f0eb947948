"""Radial attention computes exactly the blocks that are published, where it should."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_hunyuan_video, transformer_wan

import dittune
from dittune.errors import ConfigError, SelectionError
from dittune.methods.radial import Radial
from tests.tiny import latents, sd3
from tests.tiny_video import cogvideox, hunyuan_video, ltx, wan

ALWAYS = {"start": 0.0, "dense_layers": ""}


def frames_apart(frames, per_frame, sink):
    """Three frames: those next to each other see each other, the others only the sink."""
    frame = torch.arange(frames).repeat_interleave(per_frame)
    near = (frame[:, None] - frame[None]).abs() <= 1
    return near | (frame[None] == 0) if sink else near


@pytest.mark.parametrize(("sink", "backend"), [(None, "cpu"), (False, "cpu"), (False, "dense")])
def test_wan_sees_the_published_blocks_and_the_first_frame(sink, backend, monkeypatch):
    """16 tokens a frame, in whole blocks of 8: frames two apart are too thin a band to be kept."""
    pipe = wan()
    plain = latents(pipe)
    with dittune.attach(pipe, Radial(**ALWAYS, block=8, sink=sink, backend=backend)) as handle:
        found = latents(pipe)
        density = handle.report()["radial"]["self"]["density"]
    assert density == pytest.approx((7 if sink is False else 8) / 9)
    mask = frames_apart(3, 16, sink is None)

    def masked(query, key, value, **options):
        if query.shape[1] == key.shape[1]:
            options["attn_mask"] = mask
        return dispatch_attention_fn(query, key, value, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", masked)
    wanted = latents(pipe)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_text_and_its_padding_in_hunyuan_video(backend, monkeypatch):
    """4 tokens a frame; text of another length in each row sees all, and all see it."""
    pipe = hunyuan_video()
    prompts = ["a red circle", "a large red circle moving up"]
    with dittune.attach(pipe, Radial(**ALWAYS, block=4, backend=backend)):
        found = latents(pipe, prompts)
    allowed = torch.ones(12 + 8, 12 + 8, dtype=torch.bool)
    allowed[:12, :12] = frames_apart(3, 4, False)

    def masked(query, key, value, attn_mask, **options):
        return dispatch_attention_fn(query, key, value, attn_mask=attn_mask & allowed, **options)

    monkeypatch.setattr(transformer_hunyuan_video, "dispatch_attention_fn", masked)
    torch.testing.assert_close(found, latents(pipe, prompts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [wan, cogvideox, ltx])
def test_neighbouring_frames_are_dense(build):
    """So two frames lose nothing; frames and text are no whole blocks here."""
    pipe, settings = build(), {"num_frames": 5, "height": 32, "width": 96}
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, Radial(**ALWAYS)) as handle:
        torch.testing.assert_close(latents(pipe, **settings), plain, atol=1e-4, rtol=1e-4)
        report, computed = handle.report()["radial"].values()
        assert report["density"] == computed == 1.0


def test_blocks_are_no_larger_than_a_frame():
    pipe, results = cogvideox(), []
    for block in (4, 7, 128):  # of a frame of 4 tokens
        with dittune.attach(pipe, Radial(**ALWAYS, block=block)):
            results.append(latents(pipe))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_first_steps_and_layers_stay_dense():
    pipe, seen = wan(), []
    settings = {"block": 8, "start": 0.5, "dense_layers": "0"}

    class Count(Radial):
        def core(self, stock, state, call):
            seen.append((call.run.step, call.site.layer))
            return super().core(stock, state, call)

    with dittune.attach(pipe, Count(**settings)):
        latents(pipe, steps=4, guidance_scale=1.0)
    assert seen == [(2, 1), (3, 1)]


def test_it_goes_with_softpag_in_either_order():
    pipe, results = wan(), []
    steered = dittune.SoftPAG(heads="0:1,1:0", scale=2.0)
    sparse = Radial(**ALWAYS, block=8)
    for methods in ((sparse, steered), (steered, sparse)):
        with dittune.attach(pipe, *methods):
            results.append(latents(pipe))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    with dittune.attach(pipe, steered):
        assert (latents(pipe) - results[0]).abs().max() > 1e-3


def test_a_picture_stays_as_it_is():
    pipe = sd3()
    plain = latents(pipe)
    with dittune.attach(pipe, Radial(**ALWAYS)):
        assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"decay": 0.0}, "above 0 and at most 1"), ({"block": 0}, "number of tokens")],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        Radial(**settings)


def test_without_self_attention_it_is_refused():
    with pytest.raises(SelectionError, match="joint or self attention"):
        Radial().sites([dittune.call.Site(0, "cross", "x", 1)])
