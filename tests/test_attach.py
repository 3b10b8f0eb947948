"""`attach` works with what people do with their pipelines, and says why where it does not."""

import gc
import weakref
from dataclasses import dataclass

import accelerate
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.callbacks import PipelineCallback

import dittune
from dittune.errors import SeamError, SelectionError, UnsupportedModelError
from dittune.method import Method
from tests.tiny import LAYERS, latents, sd3, sd35


def steered():
    return dittune.SoftPAG(heads="0:1,1:0", scale=2.0)


def both(pipe, **settings):
    """(plain, attached) latents."""
    plain = latents(pipe, **settings)
    with dittune.attach(pipe, steered()):
        return plain, latents(pipe, **settings)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_images_of_a_batch_are_what_each_gives_alone(guidance_scale):
    pipe = sd3()
    prompts = ["a red circle", "a large blue square on a black background"]
    plain, attached = both(pipe, prompt=prompts, guidance_scale=guidance_scale)
    for i, prompt in enumerate(prompts):
        alone = both(pipe, prompt=prompt, seed=i, guidance_scale=guidance_scale)
        torch.testing.assert_close(plain[i : i + 1], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(attached[i : i + 1], alone[1], atol=1e-4, rtol=1e-4)
    assert (plain - attached).abs().max() > 1e-3


def test_num_images_per_prompt_and_negative_prompt():
    pipe = sd3()
    settings = {"num_images_per_prompt": 3, "negative_prompt": "a green ring"}
    attached = both(pipe, **settings)[1]
    assert len(attached) == 3
    third = both(pipe, seed=2, negative_prompt="a green ring")[1]
    torch.testing.assert_close(attached[2:], third, atol=1e-4, rtol=1e-4)
    assert not torch.equal(attached, both(pipe, num_images_per_prompt=3)[1])


class Shift(Method):
    """Adds one to the latents after each step, and remembers what it saw."""

    def on_step(self, run, z):
        run.memory(self).steps = [*getattr(run.memory(self), "steps", []), run.step]
        return z + 1

    def report(self, run):
        return vars(run.memory(self))


def test_on_step_runs_once_a_step_and_before_the_callback_of_the_user():
    pipe = sd3()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0}

    settings = {"callback_on_step_end": callback, "steps": 3}
    settings["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    latents(pipe, **settings)
    alone, seen[:] = list(seen), []
    with dittune.attach(pipe, Shift()) as handle:
        result = latents(pipe, **settings)
        assert handle.report() == {"test_attach": {"steps": [0, 1, 2]}}
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert all(names == ["latents", "prompt_embeds"] for _, names, _ in seen)
    torch.testing.assert_close(seen[0][2], alone[0][2] + 1)
    assert torch.equal(result, torch.zeros_like(result))  # what the user returns is kept


def test_what_a_generation_remembers_is_gone_when_it_ends():
    kept = []

    class Big(Method):
        def around_model(self, inputs, model):
            tensor = torch.zeros(10)
            inputs.run.memory(self).tensor = tensor
            kept.append(weakref.ref(tensor))
            return model(inputs)

        def report(self, run):
            return {"tokens": len(run.memory(self).tensor)}

    with dittune.attach(pipe := sd3(), Big()) as handle:
        assert handle.report() == {"test_attach": {}}
        latents(pipe, steps=1)
        gc.collect()
        assert kept[-1]() is None
        assert handle.report() == {"test_attach": {"tokens": 10}}
        with pytest.raises(ValueError, match="divisible"):
            latents(pipe, steps=1, height=33)
        assert handle.report() == {"test_attach": {}}


def test_a_callback_object_of_diffusers():
    class Zero(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

        def callback_fn(self, pipe, step, timestep, tensors):
            assert list(tensors) == ["prompt_embeds"]
            return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    pipe = sd3()
    settings = {"callback_on_step_end": Zero(cutoff_step_ratio=0.5), "steps": 3}
    plain = latents(pipe, **settings)
    assert not torch.equal(plain, latents(pipe, steps=3))
    with dittune.attach(pipe, steered()):
        assert not torch.equal(latents(pipe, **settings), latents(pipe, steps=3))
    with dittune.attach(pipe, Shift(start=1.0)):
        assert torch.equal(latents(pipe, **settings), plain)


def test_what_a_method_did_to_the_latents_stays_if_the_callback_returns_none():
    pipe = sd3()
    with dittune.attach(pipe, Shift()):
        wanted = latents(pipe)
        assert torch.equal(latents(pipe, callback_on_step_end=lambda *_: {}), wanted)
        assert torch.equal(latents(pipe, callback_on_step_end=lambda *_: None), wanted)
    assert not torch.equal(latents(pipe), wanted)


def test_start_and_stop_limit_all_three_places_where_a_method_acts():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Method):
        words: list  # a method need not be hashable

        def attend(self, call, proceed):
            seen.append("attend")
            return proceed(call)

        def around_model(self, inputs, model):
            seen.append(f"step {inputs.run.step} of {inputs.run.num_steps}")
            return model(inputs)

        def on_step(self, run, z):
            seen.append(f"end {run.step}")
            return z

    with dittune.attach(pipe := sd3(), Watch(words=["red"], start=0.25, stop=0.75)):
        latents(pipe, steps=4)
    attends = ["attend"] * LAYERS
    assert seen == ["step 1 of 4", *attends, "end 1", "step 2 of 4", *attends, "end 2"]


def test_an_empty_list_of_tensor_inputs_stays_empty():
    pipe, seen = sd3(), []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors)
        return {}

    with dittune.attach(pipe, steered(), Shift()):
        latents(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [{}, {}]


def test_a_callback_may_not_start_a_second_generation_of_the_same_pipeline():
    pipe = sd3()
    plain = latents(pipe)
    with dittune.attach(pipe, steered()):
        with pytest.raises(SeamError, match="one generation at a time"):
            latents(pipe, callback_on_step_end=lambda pipe, *_: latents(pipe))
        assert not torch.equal(latents(pipe), plain)  # the failed one has left nothing behind


def test_interrupting_and_detaching_from_a_callback():
    pipe = sd3()
    plain = latents(pipe, steps=3)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    with dittune.attach(pipe, steered()) as handle:
        latents(pipe, steps=3, callback_on_step_end=stop)
        assert handle.report()["softpag"]["perturbed_passes"] == 1

    def detach(pipe, step, timestep, tensors):
        handle.detach()
        return {}

    handle = dittune.attach(pipe, steered())
    half = latents(pipe, steps=3, callback_on_step_end=detach)
    assert handle.report()["softpag"]["perturbed_passes"] == 1
    assert not torch.equal(half, plain)
    assert torch.equal(latents(pipe, steps=3), plain)


def test_steps_are_counted_from_where_image_to_image_begins():
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = StableDiffusion3Img2ImgPipeline(**sd3().components)
    pipe.set_progress_bar_config(disable=True)
    settings = {"image": torch.rand(1, 3, 32, 32), "strength": 0.5}
    plain = latents(pipe, steps=8, **settings)
    with dittune.attach(pipe, steered(), Shift()) as handle:
        assert not torch.equal(latents(pipe, steps=8, **settings), plain)
        assert handle.report()["softpag"]["perturbed_passes"] == 4
        assert handle.report()["test_attach"]["steps"] == [0, 1, 2, 3]
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:0", start=0.5)) as handle:
        latents(pipe, steps=8, **settings)
        assert handle.report()["softpag"]["perturbed_passes"] == 2


def add_lora(pipe):
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "add_k_proj"]))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.2)


def test_lora_before_and_after():
    before, after = sd3(), sd3()
    without = both(before)[1]
    torch.manual_seed(5)
    add_lora(before)
    with dittune.attach(before, steered()):
        wanted = latents(before)
    torch.manual_seed(5)
    with dittune.attach(after, steered()):
        add_lora(after)
        assert torch.equal(latents(after), wanted)
    assert (wanted - without).abs().max() > 1e-3


def test_lora_from_a_file_loaded_fused_and_unloaded_while_attached(tmp_path):
    from peft.utils import get_peft_model_state_dict

    source = sd3()
    add_lora(source)
    weights = get_peft_model_state_dict(source.transformer)
    source.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    before, after = sd3(), sd3()
    without = both(after)[1]
    before.load_lora_weights(tmp_path)
    with dittune.attach(before, steered()):
        wanted = latents(before)
    assert (wanted - without).abs().max() > 1e-3
    with dittune.attach(after, steered()):
        after.load_lora_weights(tmp_path)
        assert torch.equal(latents(after), wanted)
        after.fuse_lora()
        torch.testing.assert_close(latents(after), wanted, atol=1e-3, rtol=1e-3)
        after.unfuse_lora()
        after.unload_lora_weights()
        torch.testing.assert_close(latents(after), without, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain, attached = both(sd3().to(dtype))
    assert attached.dtype == dtype and attached.isfinite().all()
    assert not torch.equal(plain, attached)
    exact = both(sd3())[1]
    assert (attached.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading_that_wraps_forward(offload_first):
    """accelerate's hooks, which model and sequential CPU offload consist of."""
    pipe = sd3()
    wanted = both(pipe)[1]
    if offload_first:
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with dittune.attach(pipe, steered()):
        if not offload_first:
            accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert torch.equal(latents(pipe), wanted)
    plain = latents(pipe)
    assert torch.equal(plain, latents(sd3()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("offload_first", [True, False])
def test_model_cpu_offload(device, offload_first):
    pipe = sd3()
    plain, wanted = both(pipe)
    if offload_first:
        pipe.enable_model_cpu_offload(device=device)
    with dittune.attach(pipe, steered()):
        if not offload_first:
            pipe.enable_model_cpu_offload(device=device)
        assert hasattr(pipe.transformer, "_hf_hook")
        close = {"atol": 0, "rtol": 0} if device == "cpu" else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(latents(pipe).cpu(), wanted, **close)
    torch.testing.assert_close(latents(pipe).cpu(), plain, **close)
    pipe.remove_all_hooks()


def test_group_offload():
    pipe = sd3()
    wanted = both(pipe)[1]
    with dittune.attach(pipe, steered()):
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        assert torch.equal(latents(pipe), wanted)


def test_a_bare_denoiser():
    pipe = sd35()
    model = pipe.transformer
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 9, 128),
        "pooled_projections": torch.randn(2, 128),
        "timestep": torch.tensor([500.0, 200.0]),
    }
    with torch.no_grad():
        plain = model(**inputs).sample
        with dittune.attach(model, steered()) as handle:
            steered_output = model(**inputs).sample
            as_tuple = model(*inputs.values(), return_dict=False)[0]  # their order is forward's
            assert handle.report()["softpag"]["perturbed_passes"] == 1
            one = {**inputs, "timestep": torch.tensor([500.0])}  # for both rows
            each = {**inputs, "timestep": torch.tensor([500.0, 500.0])}
            torch.testing.assert_close(model(**one).sample, model(**each).sample)
        assert torch.equal(model(**inputs).sample, plain)
    assert torch.equal(as_tuple, steered_output)
    assert (steered_output - plain).abs().max() > 1e-3


def test_the_class_looks_like_the_stock_one_while_attached(tmp_path):
    pipe = sd3()
    with dittune.attach(pipe, steered()):
        assert type(pipe).__name__ == "StableDiffusion3Pipeline"
        assert isinstance(pipe, StableDiffusion3Pipeline)
        pipe.save_pretrained(tmp_path)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert type(again) is StableDiffusion3Pipeline


class Replacing(Method):
    replaces_attention = True

    def attend(self, call, proceed):
        return call.value


def test_two_methods_that_replace_attention_do_not_share_a_site():
    with pytest.raises(SelectionError, match="test_attach and test_attach both replace"):
        dittune.attach(sd3(), Replacing(), Replacing())


def test_two_equal_methods_both_act():
    pipe = sd3()
    plain = latents(pipe, steps=1)
    with dittune.attach(pipe, steered()):
        once = latents(pipe, steps=1) - plain
    with dittune.attach(pipe, steered(), steered()):
        torch.testing.assert_close(latents(pipe, steps=1) - plain, 2 * once, atol=1e-3, rtol=1e-3)


def test_methods_act_in_order_first_outermost():
    order = []

    class Log(Method):
        def attend(self, call, proceed):
            order.append(id(self))
            return proceed(call)

    first, second = Log(), Log(start=0.0)
    pipe = sd3()
    with dittune.attach(pipe, first, second):
        latents(pipe, steps=1)
    assert order[:2] == [id(first), id(second)]


@pytest.mark.parametrize("target", ["a string", torch.nn.Linear(2, 2)])
def test_unsupported_targets_are_named(target):
    with pytest.raises(UnsupportedModelError, match=type(target).__name__):
        dittune.attach(target, steered())


def test_things_that_are_no_methods():
    with pytest.raises(TypeError, match=r"dittune.SoftPAG\(...\), got 'softpag'"):
        dittune.attach(sd3(), "softpag")
    method = steered()
    with pytest.raises(SelectionError, match="given twice"):
        dittune.attach(sd3(), method, method)
