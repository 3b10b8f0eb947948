"""What every method promises on every model: neutral is bitwise plain, detach is exact."""

import threading

import pytest
import torch

import dittune
from dittune import errors
from dittune.models import facts_for
from tests.tiny import FAMILIES, denoiser, latents, sd3
from tests.tiny_video import ALL_FAMILIES, VIDEO_FAMILIES, wide

# Settings under which a method must change nothing, and some under which it must not be idle.
NEUTRAL = {
    "softpag": [
        {},
        {"heads": "0:1", "u": 0.0},
        {"heads": "0:1", "scale": 0.0},
        {"heads": "0:1", "start": 0.5, "stop": 0.5},
    ],
    "merge_padding": [{"start": 0.5, "stop": 0.5}],
    "attend_and_excite": [
        {"concepts": "circle", "scale": 0.0},
        {"concepts": "circle", "start": 0.2, "stop": 0.2},
        {},  # one concept, and none is asked for
    ],
    "a_star": [{"concepts": "red, circle", "scale": 0.0}, {"concepts": "circle", "stop": 0.0}],
    "conform": [
        {"concepts": "red, circle", "scale": 0.0},
        {"concepts": "red, circle", "stop": 0.0},
        {"stop": 1.0, "refinements": 0},  # one concept
    ],
    "attention_regulation": [
        {"concepts": "circle", "scale": 0.0},
        {"concepts": "circle", "start": 0.3, "stop": 0.3},
    ],
    "reweight": [{}, {"weights": "circle:1"}, {"weights": "red:2", "stop": 0.0}],
    "shared_attention": [{"references": 0}, {"keep": 0.0}, {"start": 0.5, "stop": 0.5}],
    "isolation": [
        {},
        {"subjects": "red circle", "isolate": False, "references": 0},
        {"subjects": "red circle", "references": 0},  # one subject alone
    ],
    "regions": [{}, {"regions": "0,0,1,1: red circle", "scale": 0.0}, {"start": 0.1, "stop": 0.1}],
    "radial": [{"start": 0.5, "stop": 0.5}],
    "vmoba": [{"keep": 1.0}, {"chunks": "1x1x1", "start": 0.0}, {"start": 0.5, "stop": 0.5}],
    "sparsed": [{"keep": 1.0}, {"start": 0.5, "stop": 0.5}],
    "natten": [{"window": 99}, {"window": 3, "stop": 0.0}],
    "clear": [{"radius": 99.0}, {"radius": 2.0, "start": 1.0}],
    "scale_dit": [{"window": 64, "guide": False}, {"start": 0.5, "stop": 0.5}],
}
PAIR = ["a red circle", "a red circle and a blue square"]
BOXES = "0,0,0.5,1: red circle; 0.5,0,1,1: blue square"
PROMPTS = {  # of the active settings; else one picture of one object
    "shared_attention": PAIR,
    "isolation": PAIR,
    "attend_and_excite": PAIR[1],
    "a_star": PAIR[1],
}
ACTIVE = {
    "softpag": [
        {"heads": "0:1,1:*"},
        {"heads": "1:0", "u": 0.4},
        {"heads": "1:0", "u": 0.4, "rows": "image"},
        {"heads": "1:0", "rows": "image", "cols": "image"},
        {"heads": "1:0", "batched": False},
        {"heads": "1:0", "start": 0.5},
    ],
    "attend_and_excite": [{"refinements": 1}, {"concepts": "red, circle", "layers": "1"}],
    "a_star": [{}, {"concepts": "red, circle", "scale": 5.0, "checkpointing": True}],
    "conform": [{"concepts": "red, circle", "stop": 1.0, "refinements": 1}],
    "attention_regulation": [
        {"concepts": "circle"},
        {"concepts": "red+circle", "scale": 2.0, "layers": "0"},
    ],
    "reweight": [{"weights": "circle:2, red:-1"}],
    "shared_attention": [{}, {"subjects": "red circle", "masks": BOXES.partition(";")[0]}],
    "isolation": [
        {"subjects": "red circle", "isolate": False},
        {"subjects": "red circle, blue square", "references": 0, "masks": BOXES},
    ],
    "regions": [{"regions": "0,0,0.5,1: red circle"}, {"regions": "0,0,1,1: circle", "scale": 2.0}],
    "radial": [{"start": 0.0, "dense_layers": "", "block": 4, "sink": False}],
    "vmoba": [
        {"start": 0.0, "chunks": "1x2x2, 3x1x1"},
        {"start": 0.0, "chunks": "3x2x2", "select": "head", "keep": 0.4},
    ],
    "sparsed": [{"start": 0.0, "keep": 0.1, "block": 2}],
    "natten": [{"window": 2}, {"window": 3, "stride": 2, "frames": 2, "start": 0.5}],
    "clear": [{"radius": 1.5}, {"radius": 1.1, "pooled": 2, "base_tokens": 9}],
    "scale_dit": [{"window": 2, "factor": 2}, {"window": 4, "factor": 2, "guide": False}],
    "merge_padding": [],  # never changes the picture, only what it costs
}


# The others read or change what only pictures have.
FAMILIES_OF = {
    "softpag": ALL_FAMILIES,
    "natten": ALL_FAMILIES,
    # Of two steps, either denoiser of Wan 2.2 makes one, at which it measures.
    "sparsed": {name: build for name, build in ALL_FAMILIES.items() if name != "wan2.2"},
    "radial": VIDEO_FAMILIES,
    "vmoba": VIDEO_FAMILIES,
}


def cases(table):
    return [
        pytest.param(name, settings, family, id=f"{name}-{settings}-{family}")
        for name in dittune.available_methods()
        for settings in table[name]
        for family in FAMILIES_OF.get(name, FAMILIES)
    ]


def snapshot(pipe):
    """Everything an uninstall must restore: classes, keys, and values by identity."""
    modules = {
        f"{part}.{name}": module
        for part, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
        for name, module in component.named_modules()
    }
    assert len(modules) > 100
    return (
        type(pipe),
        {name: id(value) for name, value in pipe.__dict__.items() if name in pipe.components},
        {name: type(module) for name, module in modules.items()},
        {name: set(module.__dict__) for name, module in modules.items()},
        {n: id(m.processor) for n, m in modules.items() if hasattr(m, "processor")},
        (type(pipe.scheduler), set(pipe.scheduler.__dict__)),
    )


def test_every_method_and_model_is_in_the_tables():
    assert set(NEUTRAL) == set(ACTIVE) == set(dittune.available_methods())
    served = {facts_for(denoiser(build())).__name__ for build in ALL_FAMILIES.values()}
    assert served == {f"dittune.models.{name}" for name in dittune.available_models()}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("name", "settings", "family"), cases(NEUTRAL))
def test_neutral_is_bitwise_plain(name, settings, family, guidance_scale):
    pipe = ALL_FAMILIES[family]()
    plain = latents(pipe, guidance_scale=guidance_scale)
    with dittune.attach(pipe, dittune.load_method(name)(**settings)):
        assert torch.equal(latents(pipe, guidance_scale=guidance_scale), plain)


@pytest.mark.parametrize(("name", "settings", "family"), cases(ACTIVE))
def test_active_changes_the_output_and_detach_restores_everything(name, settings, family):
    pipe, prompt = ALL_FAMILIES[family](), PROMPTS.get(name, "a red circle")
    plain = latents(pipe, prompt)
    before = snapshot(pipe)
    with dittune.attach(pipe, dittune.load_method(name)(**settings)):
        assert snapshot(pipe) != before
        changed = latents(pipe, prompt)
        assert torch.equal(latents(pipe, prompt), changed)  # equal seeds, equal images
        other_size = latents(pipe, prompt, **wide(family))
    assert (changed - plain).abs().max() > 1e-4
    assert other_size.isfinite().all()
    if family in FAMILIES:
        assert other_size.shape[-2:] == (4, 16)
    else:  # LTX gives packed latents
        assert other_size.shape != plain.shape
    assert snapshot(pipe) == before
    assert torch.equal(latents(pipe, prompt), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_concept_is_found_nothing_changes(family, guidance_scale):
    pipe, settings = FAMILIES[family](), {"prompt": "of and the", "guidance_scale": guidance_scale}
    plain = latents(pipe, **settings)
    for name in ("attend_and_excite", "a_star", "conform", "attention_regulation"):
        with dittune.attach(pipe, dittune.load_method(name)()):
            assert torch.equal(latents(pipe, **settings), plain)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_method_whose_time_never_comes_is_bitwise_plain(family):
    pipe = ALL_FAMILIES[family]()
    plain = latents(pipe, steps=3)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:*", start=0.9)) as handle:
        assert torch.equal(latents(pipe, steps=3), plain)
        assert handle.report()["softpag"]["perturbed_passes"] == 0


def active():
    return dittune.SoftPAG(heads="0:1,2:0")


def test_restored_after_an_error_in_the_body():
    pipe = sd3()
    before = snapshot(pipe)
    with pytest.raises(RuntimeError, match="of the user"), dittune.attach(pipe, active()):
        raise RuntimeError("of the user")
    assert snapshot(pipe) == before


def test_untouched_if_the_second_method_cannot_be_installed():
    pipe = sd3()
    before = snapshot(pipe)
    with pytest.raises(errors.SelectionError, match="layer 9"):
        dittune.attach(pipe, active(), dittune.SoftPAG(heads="9:0"))
    assert snapshot(pipe) == before


def test_restored_if_a_swap_fails_half_way(monkeypatch):
    pipe = sd3()
    before = snapshot(pipe)
    from dittune import denoiser

    write, written = denoiser._set_processor, []

    def fail_at_second(module, processor):
        written.append(module)
        if len(written) == 2:
            raise RuntimeError("no room")
        write(module, processor)

    monkeypatch.setattr(denoiser, "_set_processor", fail_at_second)
    with pytest.raises(RuntimeError, match="no room"):
        dittune.attach(pipe, active())
    assert len(written) >= 2
    assert snapshot(pipe) == before


def test_an_error_while_removing_leaves_no_other_piece_behind(monkeypatch):
    pipe = sd3()
    before = snapshot(pipe)
    from dittune import denoiser

    write, writes = denoiser._set_processor, []

    def fail_once(module, processor):
        writes.append(module)
        write(module, processor)
        if len(writes) == 4:  # 2 installs, then the second removal
            raise RuntimeError("while removing")

    monkeypatch.setattr(denoiser, "_set_processor", fail_once)
    handle = dittune.attach(pipe, active())
    with pytest.raises(RuntimeError, match="while removing"):
        handle.detach()
    assert snapshot(pipe) == before
    handle.detach()
    assert snapshot(pipe) == before


def test_a_piece_that_cannot_be_removed_is_tried_again(monkeypatch):
    pipe = sd3()
    plain, before = latents(pipe), snapshot(pipe)
    from dittune import denoiser

    write, refused = denoiser._set_processor, pipe.transformer.transformer_blocks[2].attn
    broken = False

    def refuse(module, processor):
        if broken and module is refused:
            raise RuntimeError("cannot remove")
        write(module, processor)

    monkeypatch.setattr(denoiser, "_set_processor", refuse)
    handle = dittune.attach(pipe, active())
    latents(pipe)
    broken = True
    with pytest.raises(RuntimeError, match="cannot remove"):
        handle.detach()
    assert [a == b for a, b in zip(snapshot(pipe), before)] == [True] * 4 + [False, True]
    assert torch.equal(latents(pipe), plain)  # what is left behind does nothing
    broken = False
    handle.detach()
    assert snapshot(pipe) == before
    handle.detach()  # idempotent
    assert snapshot(pipe) == before


def test_a_second_attach_is_refused_and_harmless():
    pipe = sd3()
    handle = dittune.attach(pipe, active())
    attached = snapshot(pipe)
    with pytest.raises(errors.AlreadyAttachedError, match="detach its handle first"):
        dittune.attach(pipe, active())
    with pytest.raises(errors.AlreadyAttachedError, match="SD3Transformer2DModel"):
        dittune.attach(pipe.transformer, active())
    assert snapshot(pipe) == attached
    handle.detach()
    dittune.attach(pipe, active()).detach()


def test_two_pipelines_of_one_class_do_not_see_each_other():
    first, second = sd3(), sd3()
    plain = latents(second)
    with dittune.attach(first, active()):
        changed = latents(first)
        assert torch.equal(latents(second), plain)
        with dittune.attach(second, dittune.SoftPAG(heads="1:1", u=0.3)):
            latents(second)
            assert torch.equal(latents(first), changed)


def test_two_threads_with_a_pipeline_each():
    methods = [active(), dittune.SoftPAG(heads="1:*", u=0.5, scale=1.5)]
    pipes = [sd3(), sd3()]
    alone = []
    for pipe, method in zip(pipes, methods, strict=True):
        with dittune.attach(pipe, method):
            alone.append(latents(pipe, steps=4))
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(i):
        with dittune.attach(pipes[i], methods[i]):
            for _ in range(3):
                results[i].append(latents(pipes[i], steps=4))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(results[i]) == 3
        for result in results[i]:
            torch.testing.assert_close(result, alone[i], atol=1e-5, rtol=1e-5)
