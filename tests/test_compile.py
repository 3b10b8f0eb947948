"""`torch.compile`: blocks in one graph each, the whole denoiser, in the orders that are allowed."""

from pathlib import Path

import pytest
import torch

import dittune
from dittune.errors import SeamError
from dittune.models import facts_for
from tests.test_contract import ACTIVE, FAMILIES_OF, PROMPTS
from tests.tiny import FAMILIES, Nothing, denoiser, flux, latents, sd3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


BLOCKS = (
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "BasicTransformerBlock",
    "WanTransformerBlock",
)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_blocks(pipe, backend):
    """The repeated blocks of any family, each one a graph of its own."""
    for module in denoiser(pipe).modules():
        if type(module).__name__ in BLOCKS:
            module.compile(fullgraph=True, backend=backend)


COMBINATIONS = [
    pytest.param(backend, u, first, marks=() if quick else pytest.mark.slow)
    for backend in ("aot_eager", "inductor")
    for u in (0.5, 1.0)
    for first in (True, False)
    for quick in [backend == "aot_eager" and first == (u == 0.5)]
]


@pytest.mark.parametrize(("backend", "u", "compile_first"), COMBINATIONS)
def test_compiled_blocks_equal_eager(backend, u, compile_first):
    """`block.compile(fullgraph=True)`, before or after attaching; no graph for more steps."""
    method = dittune.SoftPAG(heads="0:1,1:0,2:1", u=u)
    pipe = sd3()
    plain = latents(pipe, steps=3)
    with dittune.attach(pipe, method):
        eager = latents(pipe, steps=3)
    pipe = sd3()
    if compile_first:
        compile_blocks(pipe, backend)
        latents(pipe, steps=1)
    with dittune.attach(pipe, method):
        if not compile_first:
            compile_blocks(pipe, backend)
        compiled = latents(pipe, steps=3)
        count = graphs()
        latents(pipe, steps=6)
        assert graphs() == count
    torch.testing.assert_close(compiled, eager, atol=2e-4, rtol=1e-3)
    assert (compiled - plain).abs().max() > 1e-2
    assert count <= 4 * (2 if compile_first else 1)
    torch.testing.assert_close(latents(pipe, steps=3), plain, atol=2e-4, rtol=1e-3)  # detached


@pytest.mark.parametrize("family", ["flux", "sd", "sdxl"])
def test_blocks_of_the_other_families_are_whole_graphs(family):
    """With methods at all sites, and at a second size."""
    pipe = FAMILIES[family]()
    method = dittune.SoftPAG(heads="0:1,1:0,2:*", u=0.5)
    wide = {"height": 16, "width": 64}
    with dittune.attach(pipe, method):
        eager = [latents(pipe, steps=1, **size) for size in ({}, wide)]
    with dittune.attach(pipe, method, Nothing()):
        compile_blocks(pipe, "aot_eager")
        compiled = [latents(pipe, steps=1, **size) for size in ({}, wide)]
    assert graphs() >= 2
    torch.testing.assert_close(compiled, eager, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_under_clear_are_whole_graphs(backend):
    """The kernel is one operator in it, and no graph more for a second attach."""
    pipe, sizes = flux(num_layers=1, num_single_layers=1), [{}]
    if backend == "inductor":  # slow anyway: a second size, too
        sizes.append({"height": 16, "width": 64})

    def made():
        with dittune.attach(pipe, dittune.Clear(radius=1.5, pooled=2, backend="cpu")):
            return [latents(pipe, steps=1, **size) for size in sizes]

    eager = made()
    compile_blocks(pipe, backend)
    torch.testing.assert_close(made(), eager, atol=2e-4, rtol=1e-3)
    count = graphs()
    made()
    assert graphs() == count >= 2


@pytest.mark.parametrize(
    ("build", "deep"),
    [(sd3, {"num_layers": 7}), (flux, {"num_layers": 5, "num_single_layers": 9})],
)
def test_the_number_of_graphs_does_not_grow_with_layers(build, deep):
    """Blocks share one code object: what differs by layer must be a tensor, not a constant."""
    counts = []
    for changes in ({}, deep):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        pipe = build(**changes)
        layers = len(facts_for(pipe.transformer).sites(pipe.transformer))
        compile_blocks(pipe, "eager")
        with dittune.attach(pipe, dittune.SoftPAG(heads=",".join(f"{i}:1" for i in range(layers)))):
            latents(pipe, steps=1)
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


def test_attaching_again_and_again_compiles_once():
    """`dittune.Pipeline` attaches for the length of each call; the recompile limit is 8."""
    pipe = sd3()
    plain = latents(pipe, steps=1)
    compile_blocks(pipe, "eager")
    latents(pipe, steps=1)
    results, counts = [], []
    for _ in range(10):
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0")):
            results.append(latents(pipe, steps=1))
        assert torch.equal(latents(pipe, steps=1), plain)
        counts.append(graphs())
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], plain)
    assert counts[-1] == counts[0]


def test_start_and_stop_cost_a_bounded_number_of_graphs():
    pipe = sd3()
    method = dittune.SoftPAG(heads="0:1,1:0", start=0.25, stop=0.75)
    with dittune.attach(pipe, method):
        eager = latents(pipe, steps=4)
        compile_blocks(pipe, "eager")
        assert torch.equal(latents(pipe, steps=4), eager)
        count = graphs()
        latents(pipe, steps=8)
    assert graphs() == count <= 12


@pytest.mark.parametrize("compile_first", [True, False])
def test_a_denoiser_compiled_in_place(compile_first):
    """`pipe.transformer.compile()` works in both orders and survives the detach."""
    pipe = sd3(num_layers=2)
    plain = latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0")):
        eager = latents(pipe)
    if compile_first:
        pipe.transformer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(latents(pipe), plain)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0")) as handle:
        if not compile_first:
            pipe.transformer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(latents(pipe), eager)
        assert handle.report()["softpag"]["perturbed_passes"] == 2
    torch.testing.assert_close(latents(pipe), plain)


def test_a_denoiser_replaced_by_its_compiled_wrapper():
    """`pipe.transformer = torch.compile(pipe.transformer)` must come before attaching."""
    pipe = sd3(num_layers=2)
    plain = latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0")):
        eager = latents(pipe)
        stock = pipe.transformer
        pipe.transformer = torch.compile(stock, backend="eager")
        with pytest.raises(
            SeamError, match=r"replaced after attaching, by OptimizedModule; attach"
        ):
            latents(pipe)
        pipe.transformer = stock
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:0")):
        torch.testing.assert_close(latents(pipe), eager)
    torch.testing.assert_close(latents(pipe), plain)
    assert graphs() >= 2


# In these each block stays one graph; the others break it at attention (docs/checkpoints.md).
WHOLE_GRAPHS = {"softpag", "reweight", "natten", "clear", "radial", "vmoba", "merge_padding"}
# Tested elsewhere in this file, or like another method in all that the compiler sees.
LIKE_OTHERS = {"softpag", "clear", "sparsed", "attend_and_excite", "conform", "isolation"}
EVERY_METHOD = [
    pytest.param(backend, name, marks=pytest.mark.slow if is_slow else ())
    for backend in ("eager", "aot_eager", "inductor")
    for name in (ACTIVE if backend != "inductor" else ["a_star"])
    for is_slow in [backend != "eager" or name in LIKE_OTHERS]
]


@pytest.mark.parametrize(("backend", "name"), EVERY_METHOD)
def test_every_method_gives_in_compiled_blocks_what_it_gives_in_eager_ones(backend, name):
    """A method may break the graph of a block, but neither its result nor the generation.

    SD3 has more layers here than a function may have graphs: none belongs to one layer.
    """
    build = next(iter(FAMILIES_OF.get(name, {"sd3": sd3}).values()))
    method = dittune.load_method(name)(**(ACTIVE[name] or [{}])[0])
    pipe = sd3(num_layers=9) if build is sd3 else build()
    prompt = PROMPTS.get(name, "a red circle")
    with dittune.attach(pipe, method):
        eager = latents(pipe, prompt)
    for module in denoiser(pipe).modules():
        if type(module).__name__ in BLOCKS:
            module.compile(backend=backend, fullgraph=name in WHOLE_GRAPHS)
    with (
        dittune.attach(pipe, method),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        torch.testing.assert_close(latents(pipe, prompt), eager, atol=2e-4, rtol=1e-3)
    assert graphs() > 0
    assert bool(torch._dynamo.utils.counters["graph_break"]) == (name not in WHOLE_GRAPHS)


def test_the_page_on_compiling_names_the_methods_that_are_whole_graphs():
    page = Path(__file__).parent.parent / "docs" / "checkpoints.md"
    said = page.read_text().partition("stays one graph under ")[2].partition(";")[0]
    assert {part.strip("`") for part in said.replace(" and ", ", ").split(", ")} == WHOLE_GRAPHS


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["attend_and_excite", "scale_dit"])
def test_a_compiled_denoiser_under_methods_that_break_the_graph(name, wrapped):
    """Gradients, and keys that are kept, are taken outside of what is compiled."""
    pipe, method = sd3(), dittune.load_method(name)(**ACTIVE[name][0])
    plain = latents(pipe)
    with dittune.attach(pipe, method):
        eager = latents(pipe)
    if wrapped:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    with dittune.attach(pipe, method):
        torch.testing.assert_close(latents(pipe), eager, atol=2e-4, rtol=1e-3)
    assert graphs() > 0
    torch.testing.assert_close(latents(pipe), plain, atol=2e-4, rtol=1e-3)
