"""The gradient step on the latents: what it computes, for whom, and what it leaves behind."""

import dataclasses
import itertools

import pytest
import torch

import dittune
from dittune.errors import ConfigError, SelectionError
from dittune.methods.a_star import AStar
from dittune.methods.attend_and_excite import AttendAndExcite
from dittune.methods.conform import Conform
from dittune.words.latent_step import LatentStep
from dittune.words.map_losses import segregation
from tests.tiny import FAMILIES, denoiser, flux, latents, sd, sd3

TWO = "a red circle and a blue square"
METHODS = {
    "attend_and_excite": AttendAndExcite(refinements=0),
    "a_star": AStar(),
    "conform": Conform(refinements=0),
}
LONG = {"max_sequence_length": 16}  # room for two objects in the T5 of FLUX


def make(pipe, prompt=TWO, **settings):
    own = LONG if type(pipe).__name__ == "FluxPipeline" else {}
    return latents(pipe, prompt, **{**own, **settings})


def noise(pipe, count=1):
    """Starting latents of the shape the pipeline makes."""
    torch.manual_seed(5)
    shape = {"FluxPipeline": (count, 16, 16)}.get(type(pipe).__name__, (count, 4, 8, 8))
    return torch.randn(shape)


class Segregate(LatentStep):
    """Keeps the gradient of its first update."""

    name = "segregate"

    def loss(self, picture, before):
        return segregation(picture.of(picture.words.words))

    def _gradient(self, branch, latents, model):
        losses, gradient = super()._gradient(branch, latents, model)
        kept.append((losses, gradient))
        return losses, gradient


kept: list = []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_finite_differences(family, checkpointing):
    pipe = FAMILIES[family]()
    start = noise(pipe)
    method = Segregate(concepts="circle, square", checkpointing=checkpointing)

    def at(values):
        kept.clear()
        with dittune.attach(pipe, method):
            make(pipe, latents=values, steps=1)
        return kept[0]

    _, gradient = at(start)
    direction = gradient / gradient.norm()
    width = 0.05
    rise = at(start + width * direction)[0] - at(start - width * direction)[0]
    assert gradient.norm() > 1e-5
    assert (rise / (2 * width)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_step_lowers_the_loss(family, name):
    pipe = FAMILIES[family]()
    method = type(METHODS[name])(
        scale=2.0, stop=0.5, **({} if name == "a_star" else {"refinements": 0})
    )
    with dittune.attach(pipe, method) as handle:
        make(pipe)
        report = handle.report()[name]
    assert report["updates"] == 1
    assert report["loss_after"] < report["loss_before"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_batch_do_not_depend_on_each_other(family, name):
    """Two prompts, two pictures each: every picture as if it were made alone."""
    pipe, prompts = FAMILIES[family](), [TWO, "a red ring and of"]
    method = type(METHODS[name])(
        scale=2.0, stop=0.75, **({} if name == "a_star" else {"refinements": 2})
    )
    with dittune.attach(pipe, method):
        together = make(pipe, prompts, num_images_per_prompt=2, steps=4)
        alone = [make(pipe, prompts[i // 2], seed=i, steps=4)[0] for i in range(4)]
    plain = make(pipe, prompts, num_images_per_prompt=2, steps=4)
    for i in range(4):
        plain_alone = make(pipe, prompts[i // 2], seed=i, steps=4)[0]
        change = (alone[i] - plain_alone).abs().max().item()
        rounding = (plain[i] - plain_alone).abs().max().item()
        error = (together[i] - alone[i]).abs().max().item()
        assert error <= 0.01 * change + 3 * rounding
        if i < 2:
            assert change > max(0.005, 10 * rounding)
        else:  # a concept alone competes with none
            assert change == 0


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "flux true"])
def test_beside_softpag_in_both_orders(family, batched):
    guidance = {"guidance_scale": 3.0}
    if family == "flux true":
        guidance = {"true_cfg_scale": 3.0, "negative_prompt": "a ring"}
    pipe = FAMILIES[family.split()[0]]()
    softpag = dittune.SoftPAG(heads="0:1,1:0", scale=1.0, batched=batched)
    # With checkpointing the pass for the gradient runs to its end, through softpag.
    ours = AttendAndExcite(refinements=1, scale=2.0, checkpointing=not batched)
    results = []
    for methods in ((ours,), (ours, softpag), (softpag, ours)):
        with dittune.attach(pipe, *methods) as handle:
            results.append(make(pipe, steps=4, **guidance))
            assert handle.report()["attend_and_excite"]["updates"] >= 2
    torch.testing.assert_close(results[1], results[2], rtol=1e-3, atol=1e-3)
    assert (results[1] - results[0]).abs().max() > 0.01


def test_two_of_them_act_one_after_the_other():
    """The second one starts from what the first one has made."""
    pipe = sd3()
    results = {}
    for pair in itertools.permutations(("attend_and_excite", "a_star")):
        for names in (pair, pair[:1]):
            with dittune.attach(pipe, *(METHODS[name] for name in names)) as handle:
                results[names] = make(pipe)
                reports = handle.report()
            assert all(reports[name]["updates"] > 0 for name in names)
    assert len(results) == 4
    for one, other in itertools.combinations(results.values(), 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("build", [sd3, flux, sd])
def test_guidance_of_the_pipeline_sees_the_moved_latents(build):
    """With guidance and without, the same first update; the maps have conditional rows only."""
    pipe = build()
    true = build is flux
    guided = {"true_cfg_scale": 4.0, "negative_prompt": "a ring"} if true else {}
    reports = []
    for guidance in (guided or {"guidance_scale": 4.0}, {"guidance_scale": 1.0}):
        if true:
            guidance = {**guidance, "guidance_scale": 3.5}
        with dittune.attach(pipe, AttendAndExcite(refinements=0)) as handle:
            make(pipe, **guidance)
            reports.append(handle.report()["attend_and_excite"])
    for key in ("loss_before", "loss_after"):
        assert reports[0][key] == pytest.approx(reports[1][key], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, name, dtype):
    reports = []
    method = dataclasses.replace(METHODS[name], stop=0.5)  # before masks of A-STAR can tip over
    for chosen in (torch.float32, dtype):
        pipe = FAMILIES[family]().to(chosen)
        with dittune.attach(pipe, method) as handle:
            result = make(pipe)
            reports.append(handle.report()[name])
    assert result.dtype == dtype and result.isfinite().all()
    assert reports[1]["loss_before"] == pytest.approx(reports[0]["loss_before"], rel=0.05, abs=0.05)
    assert reports[1]["updates"] == reports[0]["updates"] > 0


def test_the_step_size_goes_down_a_root():
    """`scale * sqrt(l)`, `l` from 1 at the first step to 0.5 at the last of all."""
    pipe, sizes = sd3(), []

    class Look(AStar):
        name = "look"

        def around_model(self, inputs, model):
            def watch(given):
                if given.run.latents is not None:
                    moved = given.run.latents - given.run.memory(self).given
                    sizes.append((moved / kept[-1][1]).nanmedian().item())
                return model(given)

            from dittune.words.latent_inputs import latents_of

            inputs.run.memory(self).given = latents_of(inputs)
            return super().around_model(inputs, watch)

        _gradient = Segregate._gradient

    Look._gradient = lambda self, *given: _kept(LatentStep._gradient(self, *given))
    with dittune.attach(pipe, Look(concepts="red, circle", scale=20.0)):
        make(pipe, steps=3)
    expected = [-20.0, -20 * 0.75**0.5, -20 * 0.5**0.5]
    assert sizes == pytest.approx(expected, rel=1e-2)


def _kept(pair):
    kept.append(pair)
    return pair


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forward_pass_stops_after_the_last_map(checkpointing):
    pipe, counts = sd3(), [0, 0, 0]
    for i, block in enumerate(pipe.transformer.transformer_blocks):

        def count(module, args, i=i):
            counts[i] += 1

        block.register_forward_pre_hook(count)
    with dittune.attach(pipe, AStar(layers="0", checkpointing=checkpointing)):
        make(pipe, steps=1)
    # With checkpointing blocks run to the end, and again on the way back where a map needs them.
    assert counts[1:] == ([2, 2] if checkpointing else [1, 1])
    assert counts[0] >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing_and_leaves_no_trace(family):
    pipe = FAMILIES[family]()
    results = []
    for checkpointing in (False, True):
        with dittune.attach(pipe, AStar(checkpointing=checkpointing, scale=2.0)):
            results.append(make(pipe))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert not denoiser(pipe).is_gradient_checkpointing
    of_the_user = FAMILIES[family]()
    denoiser(of_the_user).enable_gradient_checkpointing()
    with dittune.attach(of_the_user, AStar(scale=2.0)):
        torch.testing.assert_close(make(of_the_user), results[0], rtol=1e-3, atol=1e-4)
    assert denoiser(of_the_user).is_gradient_checkpointing


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_frozen_for_the_gradient_only(fails):
    pipe, seen = sd3(), []
    first = next(pipe.transformer.parameters())
    first.requires_grad_(False)

    class Look(AStar):
        name = "look"

        def loss(self, picture, before):
            seen.append({p.requires_grad for p in pipe.transformer.parameters()})
            if fails:
                raise RuntimeError("of the loss")
            return super().loss(picture, before)

    with dittune.attach(pipe, Look(checkpointing=True)):
        if fails:
            with pytest.raises(RuntimeError, match="of the loss"):
                make(pipe)
        else:
            make(pipe)
    assert seen[0] == {False}
    frozen = [p for p in pipe.transformer.parameters() if not p.requires_grad]
    assert len(frozen) == 1 and frozen[0] is first
    assert all(p.grad is None for p in pipe.transformer.parameters())


def test_nothing_of_a_step_is_kept_with_its_graph():
    class Kept(Conform):
        def report(self, run):
            return run.memory(self)

    pipe = sd3()
    with dittune.attach(pipe, Kept(refinements=0, stop=1.0)) as handle:
        make(pipe, steps=3)
        (memory,) = handle.report().values()
    held = [memory.before, [vars(record) for record in memory.history], memory.watch]
    tensors = list(_tensors(held))
    assert tensors and all(tensor.grad_fn is None for tensor in tensors)
    assert not list(_tensors(vars(memory.maps)))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def test_embeddings_instead_of_a_prompt_are_refused():
    pipe = sd3()
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeds = pipe.encode_prompt("a circle", None, None, max_sequence_length=8)
    given = dict(zip([*names, *(f"{n[:-13]}pooled_prompt_embeds" for n in names)], embeds))
    with (
        dittune.attach(pipe, AStar()),
        pytest.raises(ConfigError, match=r"a_star needs the words .* pass it `prompt`, not embedd"),
    ):
        latents(pipe, None, max_sequence_length=8, **given)


def test_a_bare_denoiser_has_no_prompt():
    model, given = sd3().transformer, {}
    with dittune.attach(model, AStar()), pytest.raises(ConfigError, match="attach to the pipeline"):
        given["hidden_states"] = torch.randn(1, 4, 8, 8)
        given["encoder_hidden_states"] = torch.randn(1, 5, model.config.joint_attention_dim)
        given["pooled_projections"] = torch.randn(1, model.config.pooled_projection_dim)
        model(**given, timestep=torch.tensor([500.0]))


def test_a_word_that_is_not_in_the_prompt():
    pipe = sd3()
    with (
        dittune.attach(pipe, AStar(concepts="ring, circle")),
        pytest.raises(ConfigError, match="'ring' is not a word of the prompt 'a red circle"),
    ):
        make(pipe)


def test_found_words_that_the_encoder_does_not_read_are_left_out():
    pipe, far = sd3(), "a red circle " + "and " * 40 + "a square"
    with dittune.attach(pipe, AStar()) as handle:
        make(pipe, far)
        assert "overlap" not in handle.report()["a_star"]  # one concept only
    with (
        dittune.attach(pipe, AStar(concepts="square")),
        pytest.raises(ConfigError, match="'square' is beyond the 32 tokens"),
    ):
        make(pipe, far)


def test_inference_mode_is_refused():
    pipe = sd3()
    with (
        torch.inference_mode(),
        dittune.attach(pipe, AStar()),
        pytest.raises(ConfigError, match=r"needs gradients; use torch.no_grad"),
    ):
        make(pipe)


def test_a_gradient_that_is_not_finite_is_refused():
    class Broken(AStar):
        name = "broken"

        def loss(self, picture, before):
            return super().loss(picture, before) / 0.0

    with (
        dittune.attach(sd3(), Broken()) as handle,
        pytest.raises(ConfigError, match=r"not finite in torch.float32; use bfloat16 or float32"),
    ):
        make(handle.pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "a_star: scale is a number from 0 on, got -1.0"),
        ({"scale": float("nan")}, "a_star: scale is"),
        ({"concepts": "a,,b"}, "concepts are written like"),
        ({"layers": "x"}, "layers are written like"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        AStar(**settings)


def test_layers_the_model_does_not_have():
    with pytest.raises(SelectionError, match=r"a_star: the model has no joint layer 3; it has 0"):
        dittune.attach(sd3(), AStar(layers="1,3"))
    with pytest.raises(SelectionError, match=r"a_star: the layers must have one resolution"):
        dittune.attach(sd(), AStar(layers="0,1"))
