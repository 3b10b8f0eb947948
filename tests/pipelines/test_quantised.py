"""Denoisers with 4 or 8 bits a weight: a method does what it does on the same weights written out.

torchao is in test_checkpoints.py. diffusers refuses bitsandbytes without a GPU; that check is taken
away here, for what comes after it runs on a CPU too.
"""

import pytest
import torch

import dittune
from tests.pipelines.test_checkpoints import load
from tests.tiny import flux, latents, sd35

METHODS = [
    dittune.SoftPAG(heads="0:1", scale=2.0),
    dittune.Natten(window=2),
    dittune.Clear(radius=1.5),
]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


def check(quantised, stock, written_out, most):
    """Compare a quantised pipeline with a stock one of the same weights.

    Args:
        stock: as it was before it was quantised.
        written_out: the weight of a quantised module, or None for other modules.
        most: mean difference that the arithmetic may make, as a share of the latents.
    """

    def share(found, wanted):
        return (found - wanted).abs().mean() / wanted.abs().mean()

    weights = stock.transformer.state_dict()
    for name, module in quantised.transformer.named_modules():
        if (weight := written_out(module)) is not None:
            torch.testing.assert_close(weight, weights[f"{name}.weight"], atol=0.1, rtol=0)
            weights[f"{name}.weight"] = weight
    assert not torch.equal(latents(quantised), latents(stock))
    stock.transformer.load_state_dict(weights)
    plain = latents(quantised)
    for method in METHODS:
        with dittune.attach(quantised, method):
            found = latents(quantised)
        with dittune.attach(stock, method):
            wanted = latents(stock)
        assert share(found, wanted) < most and share(found, plain) > 0.05
        assert torch.equal(latents(quantised), plain)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("build", [flux, sd35])
def test_gguf(tmp_path, build, kind):
    """Tensors are named as diffusers does: its converter of other names knows real widths only."""
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor

    kind, file, stock = gguf.GGMLQuantizationType[kind], tmp_path / "t.gguf", build()
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in stock.transformer.state_dict().items():
        values = tensor.numpy()
        if name.endswith("weight") and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stock.save_pretrained(tmp_path)
    transformer = type(stock.transformer).from_single_file(
        str(file),
        config=str(tmp_path),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert sum(isinstance(module, GGUFLinear) for module in transformer.modules()) > 40

    def written_out(module):
        if isinstance(module, GGUFLinear):
            return dequantize_gguf_tensor(module.weight).as_subclass(torch.Tensor).float()

    check(load(tmp_path, transformer=transformer), stock, written_out, most=1e-4)


@pytest.mark.parametrize(("bits", "build"), [(4, sd35), (8, sd35), (8, flux)])
def test_bitsandbytes(tmp_path, build, bits, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    stock = build()
    stock.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit",
        quant_kwargs={
            f"load_in_{bits}bit": True,
            "llm_int8_skip_modules": ["proj_out"],  # on a CPU 32 outputs are the least
        },
        components_to_quantize=["transformer"],
    )
    if not torch.cuda.is_available():
        cls = getattr(bnb_quantizer, f"BnB{bits}BitDiffusersQuantizer")
        with pytest.raises(dittune.errors.CheckpointError, match="No GPU found"):
            load(tmp_path, quantization_config=config)
        monkeypatch.setattr(cls, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(cls, "update_device_map", lambda *_: {"": "cpu"})
    quantised = load(tmp_path, quantization_config=config)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    assert sum(isinstance(module, kind) for module in quantised.transformer.modules()) > 40

    def written_out(module):
        if not isinstance(module, kind):
            return None
        packed = module.weight
        if bits == 8:
            return packed.data.float() * packed.SCB[:, None] / 127
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()

    check(quantised, stock, written_out, most=0.05)
