"""The run-time subclass: identical when idle, loud when bypassed, copyable."""

import copy
import inspect
import pickle
from unittest.mock import Mock

import pytest
import torch
from diffusers.models import attention_processor

import dittune
from dittune import seam
from dittune.errors import AlreadyAttachedError, SeamError
from dittune.method import Method
from dittune.models import facts_for
from tests.tiny import Nothing, denoiser, latents, sd3
from tests.tiny_video import ALL_FAMILIES


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_do_nothing_method_is_bitwise_plain(family):
    pipe = ALL_FAMILIES[family]()
    plain = latents(pipe)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sites_are_in_execution_order(family):
    pipe = ALL_FAMILIES[family]()
    seen = []

    class Watch(Method):
        def attend(self, call, proceed):
            if call.run.step == 0:  # Mochi makes another
                seen.append((call.site.kind, call.site.layer, call.site.name))
            return proceed(call)

    order = []
    for name, module in denoiser(pipe).named_modules():
        left_alone = getattr(facts_for(denoiser(pipe)), "LEFT_ALONE", ("nothing",))
        if hasattr(module, "processor") and not name.startswith(left_alone):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with dittune.attach(pipe, Watch()):
        latents(pipe, steps=1, guidance_scale=1.0)  # so that none makes a second call
    assert [name for _, _, name in seen] == order[: len(seen)]
    for kind in {kind for kind, _, _ in seen}:
        layers = [layer for k, layer, _ in seen if k == kind]
        assert layers == list(range(len(layers)))


def test_the_layout_tells_image_from_text():
    pipe = sd3()
    seen = []

    class Watch(Method):
        def attend(self, call, proceed):
            seen.append((call.layout, call.query.shape, call.roles))
            return proceed(call)

    with dittune.attach(pipe, Watch()):
        latents(pipe, height=16, width=48, steps=1)
    layout, shape, roles = seen[0]
    assert layout.grid == (1, 2, 6) and layout.image == (0, 12)
    assert layout.text == (12, 12 + 32 + 8) and shape[2] == layout.text[1]
    assert roles == ("uncond", "cond")


def test_a_processor_replaced_after_attaching_is_an_error():
    pipe = sd3()
    with dittune.attach(pipe, Nothing()):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(
            SeamError, match=r"replaced by FusedJointAttnProcessor2_0 .* attach after"
        ):
            latents(pipe)


def test_attaching_after_fusing_works():
    pipe = sd3()
    pipe.transformer.fuse_qkv_projections()
    plain = latents(pipe)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe), plain)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:0")):
        assert not torch.equal(latents(pipe), plain)


def test_a_site_that_never_fires_is_an_error():
    pipe = sd3()
    block = pipe.transformer.transformer_blocks[1]
    stock = block.attn.processor
    with dittune.attach(pipe, Nothing()):
        block.attn.forward = lambda *args, **kwargs: stock(block.attn, *args, **kwargs)
        with pytest.raises(SeamError, match=r"joint layer 1 .* never called its attention core"):
            latents(pipe)


def test_attention_slicing_after_attaching_is_an_error():
    pipe = sd3()
    before = type(pipe.transformer)
    with dittune.attach(pipe, Nothing()):
        pipe.transformer.transformer_blocks[1].attn.set_attention_slice(1)
        with pytest.raises(SeamError, match=r"joint layer 1 .* replaced by SlicedAttn"):
            latents(pipe)
    assert type(pipe.transformer) is before


@pytest.mark.parametrize("has_source", [True, False])
def test_processors_that_fusing_has_put_aside_and_back_work_again(has_source, monkeypatch):
    """`unfuse_qkv_projections` puts back what was there at `fuse`, even if that was ours."""
    monkeypatch.setattr(seam, "processor_class", seam.processor_class.__wrapped__)  # no cache
    if not has_source:
        monkeypatch.setattr(inspect, "getsource", Mock(side_effect=OSError))
    pipe = sd3()
    plain = latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:0")):
        steered = latents(pipe)
        pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(latents(pipe), plain)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:0")):
        assert torch.equal(latents(pipe), steered)
    assert torch.equal(latents(pipe), plain)


def test_a_denoiser_replaced_after_attaching_is_an_error():
    pipe, other = sd3(), sd3().transformer
    with dittune.attach(pipe, Nothing()):
        pipe.transformer = other
        with pytest.raises(SeamError, match=r"replaced after attaching, by SD3Transformer2DModel"):
            latents(pipe)


def test_a_pipeline_that_shares_an_attached_denoiser_is_not_steered_by_accident():
    pipe = sd3()
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    plain = latents(other)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:0")):
        with pytest.raises(SeamError, match="called outside the pipeline it is attached through"):
            latents(other)
        with pytest.raises(AlreadyAttachedError, match="SD3Transformer2DModel"):
            dittune.attach(other, Nothing())
        assert not torch.equal(latents(pipe), plain)
    assert torch.equal(latents(other), plain)


def test_calls_keep_their_signature_while_attached():
    pipe = sd3()
    stock = [inspect.signature(f) for f in (pipe.__call__, pipe.transformer.forward, type(pipe))]
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    stock.append(inspect.signature(processor.__call__))
    with dittune.attach(pipe, Nothing()):
        ours = [inspect.signature(f) for f in (pipe.__call__, pipe.transformer.forward, type(pipe))]
        replaced = pipe.transformer.transformer_blocks[0].attn.processor
        assert replaced is not processor
        ours.append(inspect.signature(replaced.__call__))
    assert ours == stock


def test_copies_and_pickles_are_not_attached(tmp_path):
    pipe = sd3()
    stock_model, stock_processor = type(pipe.transformer), attention_processor.JointAttnProcessor2_0
    plain = latents(pipe)
    keys = list(pipe.transformer.state_dict())
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:0")):
        assert list(pipe.transformer.state_dict()) == keys
        pipe.transformer.save_pretrained(tmp_path)
        copies = [
            copy.deepcopy(pipe.transformer),
            pickle.loads(pickle.dumps(pipe.transformer)),
            stock_model.from_pretrained(tmp_path),
        ]
    for model in copies:
        assert type(model) is stock_model
        assert type(model.transformer_blocks[0].attn.processor) is stock_processor
        assert not vars(model.transformer_blocks[0].attn.processor)
        pipe.transformer = model.eval()
        assert torch.equal(latents(pipe), plain)


def test_a_copy_of_an_attached_pipeline_is_an_ordinary_pipeline():
    pipe = sd3()
    stock, plain = type(pipe), latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:0")):
        twin = copy.deepcopy(pipe)
        steered = latents(pipe)
        assert torch.equal(latents(twin), plain)  # while the first is attached
        with dittune.attach(twin, dittune.SoftPAG(heads="0:0")):
            assert torch.equal(latents(twin), steered)
    assert type(twin) is stock and type(twin.transformer) is type(pipe.transformer)


def test_gradients_reach_the_latents():
    pipe = sd3()
    model = pipe.transformer
    inputs = {
        "encoder_hidden_states": torch.randn(1, 9, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([500.0]),
    }
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with dittune.attach(model, dittune.SoftPAG(heads="0:1,1:0", u=0.5)):
            out = model(hidden_states=z, return_dict=False, **inputs)[0]
            grads.append(torch.autograd.grad(out.square().sum(), z)[0])
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])
