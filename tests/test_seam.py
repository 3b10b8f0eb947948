"""The run-time subclass: identical when idle, loud when bypassed, compilable, copyable."""

import copy
import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
from diffusers.models import attention_processor

import dittune
from dittune import seam
from dittune.errors import SeamError, UnsupportedModelError
from dittune.method import Method
from tests.tiny import FAMILIES, latents, sd3


class Nothing(Method):
    """Present at every site, changes nothing."""

    def attend(self, call, proceed):
        return proceed(call)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_do_nothing_method_is_bitwise_plain(family):
    pipe = FAMILIES[family]()
    plain = latents(pipe)
    with dittune.attach(pipe, Nothing()):
        assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_in_execution_order(family):
    pipe = FAMILIES[family]()
    seen = []

    class Watch(Method):
        def attend(self, call, proceed):
            seen.append((call.site.kind, call.site.layer, call.site.name))
            return proceed(call)

    order = []
    for name, module in pipe.transformer.named_modules():
        if hasattr(module, "processor"):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with dittune.attach(pipe, Watch()):
        latents(pipe, steps=1)
    assert [name for _, _, name in seen] == order
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


def processor_classes():
    """Every class of the installed diffusers whose name says processor and that can be called."""
    import diffusers.models as models

    found = {}
    for package in (models, *map(importlib.import_module, SUBPACKAGES)):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, value in vars(module).items():
                if isinstance(value, type) and "Processor" in name and "__call__" in vars(value):
                    found[value.__module__, name] = value
    return found


SUBPACKAGES = [f"diffusers.models.{name}" for name in ("transformers", "unets", "controlnets")]


def test_the_rewrite_covers_the_processors_of_the_installed_diffusers():
    covered, refused = [], []
    for (_, name), cls in processor_classes().items():
        try:
            generated = seam.processor_class(cls)
        except UnsupportedModelError:
            refused.append(name)
            continue
        assert inspect.signature(generated.__call__) == inspect.signature(cls.__call__)
        assert generated.__name__.endswith(name)
        covered.append(name)
    assert len(covered) >= 101, f"refused: {sorted(refused)}"
    explicit = ("XFormers", "Sliced", "Sana", "IPAdapterAttnProcessor", "AddedKVProcessor")
    explicit += ("AttnProcessor", "CustomDiffusionAttnProcessor", "PAGIdentitySana")
    for name in refused:
        assert any(part in name for part in explicit), f"{name} is newly refused"


def test_an_unexpected_number_of_core_calls_is_an_error():
    with pytest.raises(UnsupportedModelError, match=r"makes 1 attention-core calls .* expected 2"):
        seam.processor_class(attention_processor.JointAttnProcessor2_0, 2)


def test_without_source_the_names_are_rebound(monkeypatch):
    def no_source(_):
        raise OSError("could not get source code")

    pipe = sd3()
    plain = latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1")):
        steered = latents(pipe)
    seam.processor_class.cache_clear()
    monkeypatch.setattr(inspect, "getsource", no_source)
    try:
        with dittune.attach(pipe, Nothing()):
            assert torch.equal(latents(pipe), plain)
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1")):
            assert torch.equal(latents(pipe), steered)
    finally:
        seam.processor_class.cache_clear()


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


class ExplicitScores:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        raise NotImplementedError


class WithWeights(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("processor", "match"),
    [
        (ExplicitScores(), "ExplicitScores makes 0 attention-core"),
        (WithWeights(), "WithWeights at"),
    ],
)
def test_processors_that_cannot_be_redirected_are_refused(processor, match):
    pipe = sd3()
    pipe.transformer.transformer_blocks[2].attn.processor = processor
    with pytest.raises(UnsupportedModelError, match=match):
        dittune.attach(pipe, Nothing())
    assert type(pipe).__call__ is type(sd3()).__call__


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
        pipe.transformer = model.eval()
        assert torch.equal(latents(pipe), plain)


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


def compile_blocks(pipe, backend):
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend=backend)


@pytest.mark.parametrize("compile_first", [True, False])
@pytest.mark.parametrize("u", [0.5, 1.0])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_eager(backend, u, compile_first):
    """`block.compile(fullgraph=True)`, before or after attaching; no graph per layer or step."""
    torch._dynamo.reset()
    method = dittune.SoftPAG(heads="0:1,1:0,2:1", u=u)
    pipe = sd3()
    with dittune.attach(pipe, method):
        eager = latents(pipe, steps=3)
    pipe = sd3()
    torch._dynamo.utils.counters.clear()
    if compile_first:
        compile_blocks(pipe, backend)
        latents(pipe, steps=1)
    with dittune.attach(pipe, method):
        if not compile_first:
            compile_blocks(pipe, backend)
        compiled = latents(pipe, steps=3)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        latents(pipe, steps=6)
    torch.testing.assert_close(compiled, eager, atol=2e-4, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # none for more steps
    assert graphs <= 4 * (2 if compile_first else 1)
    torch._dynamo.reset()
