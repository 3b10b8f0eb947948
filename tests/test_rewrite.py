"""The rewrite of stock processors: which classes, with and without their source, and which not."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor

import dittune
from dittune import seam
from dittune.call import Site, TokenLayout
from dittune.errors import UnsupportedModelError
from dittune.method import Method
from tests.tiny import Nothing, latents, sd3


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


# Explicit scores, xformers, linear attention: there is no core to hand over.
REFUSED = {
    "AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor", "IPAdapterAttnProcessor", "XFormersAttnProcessor",
    "XFormersAttnAddedKVProcessor", "XFormersJointAttnProcessor", "IPAdapterXFormersAttnProcessor",
    "CustomDiffusionXFormersAttnProcessor", "SanaMultiscaleAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor3_0", "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
}  # fmt: skip


def test_the_rewrite_covers_the_processors_of_the_installed_diffusers():
    covered, refused = [], set()
    for (_, name), cls in processor_classes().items():
        try:
            generated = seam.processor_class(cls)
        except UnsupportedModelError as error:
            assert f"{name} makes 0 attention-core calls" in str(error)
            refused.add(name)
            continue
        assert inspect.signature(generated.__call__) == inspect.signature(cls.__call__)
        assert generated.__name__.endswith(name) and issubclass(generated, cls)
        covered.append(name)
    print(f"{len(covered)} processor classes covered; refused: {', '.join(sorted(refused))}")
    assert len(covered) >= 101
    assert refused <= REFUSED, f"newly refused: {sorted(refused - REFUSED)}"


def test_without_source_the_same_core_calls_are_found(monkeypatch):
    """And each class keeps its own signature, by which diffusers decides what to pass on."""
    with_source = {}
    for cls in processor_classes().values():
        stock_call = inspect.unwrap(cls.__call__)
        with_source[cls] = seam._rewrite(stock_call)[1]
        assert seam._count_core_names(stock_call) == with_source[cls], cls
    assert max(with_source.values()) >= 3  # a class with several core calls is among them
    monkeypatch.setattr(inspect, "getsource", no_source)
    seam.processor_class.cache_clear()
    try:
        generated = {c: seam.processor_class(c) for c, count in with_source.items() if count}
    finally:
        seam.processor_class.cache_clear()
    for cls, ours in generated.items():
        assert inspect.signature(ours.__call__) == inspect.signature(cls.__call__), cls


def no_source(_):
    raise OSError("could not get source code")


def test_a_closure_is_refused():
    class Child(attention_processor.JointAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match=r"Child.__call__ is a closure"):
        seam.processor_class(Child)


def test_an_unexpected_number_of_core_calls_is_an_error():
    with pytest.raises(UnsupportedModelError, match=r"makes 1 attention-core calls .* expected 2"):
        seam.processor_class(attention_processor.JointAttnProcessor2_0, 2)


def test_without_source_the_names_are_rebound(monkeypatch):
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


def flux_attention():
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

    attn = FluxAttention(
        query_dim=32,
        heads=4,
        dim_head=8,
        added_kv_proj_dim=32,
        context_pre_only=False,
        bias=True,
        processor=FluxAttnProcessor(),
    )
    return attn.eval()


@pytest.mark.parametrize("has_source", [True, False])
def test_processors_that_go_through_the_dispatcher(has_source, monkeypatch):
    """FLUX and most newer models; their core takes tokens before heads, methods see heads first."""
    attn = flux_attention()
    inputs = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        plain = attn(*inputs)
    seam.processor_class.cache_clear()
    if not has_source:
        monkeypatch.setattr(inspect, "getsource", no_source)
    try:
        ours = seam.make_processor(attn.processor, Site(0, "joint", "attn", 4), 1)
    finally:
        seam.processor_class.cache_clear()
    seen = []

    class Double(Method):
        def attend(self, call, proceed):
            seen.append((call.query.shape, call.state))
            return 2 * proceed(call)

    attn.set_processor(ours)
    layout = TokenLayout((3, 8), (0, 3), (1, 1, 5))
    with torch.no_grad():
        inert = attn(*inputs)
        layouts = {("joint", 0): layout}
        ours.installed.run = SimpleNamespace(roles=("cond",), layouts=layouts, rows_apart=0)
        ours.installed.chain = seam.stock_attention
        idle = attn(*inputs)
        ours.installed.chain = seam.Link(Double(), "state", seam.stock_attention)
        doubled = attn(*inputs)
    for a, b, c, d in zip(plain, inert, idle, doubled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert not torch.allclose(a, d)
    assert seen == [((2, 4, 8, 8), "state")]


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("AttnProcessor", (), "AttnProcessor makes 0 attention-core calls .* as AttnProcessor2_0"),
        ("SlicedAttnProcessor", (2,), "SlicedAttnProcessor makes 0 attention-core"),
        ("XFormersJointAttnProcessor", (), "XFormersJointAttnProcessor makes 0 .*no xformers"),
        (
            "SD3IPAdapterJointAttnProcessor2_0",
            (64, 64, 32, 2, 8),
            "SD3IPAdapterJointAttnProcessor2_0 at joint layer 2 .* unload it before attaching",
        ),
    ],
)
def test_processors_that_cannot_be_redirected_are_refused(name, arguments, match):
    pipe = sd3()
    processor = getattr(attention_processor, name)(*arguments)
    pipe.transformer.transformer_blocks[2].attn.processor = processor
    classes = type(pipe), type(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match=match):
        dittune.attach(pipe, Nothing())
    assert (type(pipe), type(pipe.transformer)) == classes
    assert pipe.transformer.transformer_blocks[2].attn.processor is processor
    assert all(
        not isinstance(block.attn.processor, seam.DittuneProcessor)
        for block in pipe.transformer.transformer_blocks
    )
