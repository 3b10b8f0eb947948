"""`dittune bench model`: every method on small models, recorded; sizes are those of real models."""

import pytest
import torch

from dittune.errors import DittuneError
from dittune.models import facts_for
from dittune.pipelines.attention_bench import model_bench
from dittune.pipelines.attention_bench.model_sizes import GPU_SIZES, Size
from dittune.pipelines.row_log import RowLog
from tests.tiny_video import wan_transformer


def tiny(name="tiny", build=wan_transformer):
    def inputs(device, dtype):
        return {
            "hidden_states": torch.randn(1, 4, 3, 12, 20, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 5, 32, dtype=dtype),
            "timestep": torch.full((1,), 500),
        }

    return Size(name, build, {"blocks": 2}, 10, inputs)


def test_rows_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(model_bench, "CPU_SIZES", (tiny(),))
    result = model_bench.bench_model(True, "", 2, tmp_path)
    model_bench.bench_model(True, "tiny/vm", 2, tmp_path)
    log = RowLog(tmp_path / "model.csv", model_bench.Timing).read()
    assert [row.method for row in log] == [*model_bench.METHODS, "vmoba"]
    assert not result["skipped"] and "dense" in model_bench.as_text(result)
    for row in log:
        assert row.tokens == 180 and row.layers == 2 and row.depth == 10
        assert 0 < row.density <= 1
        # Scaled by hand: what is not the layers counts once.
        assert row.model_ms == pytest.approx(row.fixed_ms + 10 * (row.step_ms - row.fixed_ms))
        assert row.speedup == pytest.approx(row.dense_model_ms / row.model_ms)


def test_the_layers_come_back_and_sparse_steps_are_timed(tmp_path, monkeypatch):
    model, steps = wan_transformer(), []

    class Look(model_bench.SparseD):
        def core(self, stock, state, call):
            steps.append((call.run.step, call.run.calls))
            return super().core(stock, state, call)

    monkeypatch.setattr(model_bench, "CPU_SIZES", (tiny(build=lambda: model),))
    monkeypatch.setattr(model_bench, "METHODS", {"sparsed": Look(start=0.0, keep=0.2, block=16)})
    result = model_bench.bench_model(True, "", 2, tmp_path)
    assert len(model.blocks) == 2
    assert [step for step, _ in steps[::2]] == [0, 1, 2, 3] and {c for _, c in steps} == {1}
    assert result["rows"][0]["density"] < 0.5


def test_what_is_not_finite_is_not_timed(tmp_path, monkeypatch):
    def broken():
        model = wan_transformer()
        model.proj_out.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(model_bench, "CPU_SIZES", (tiny(build=broken),))
    with pytest.raises(DittuneError, match="not finite"):
        model_bench.bench_model(True, "", 1, tmp_path)


@pytest.mark.parametrize("size", GPU_SIZES, ids=lambda size: size.name)
def test_sizes_are_what_they_say(size):
    """Built without memory: parameters of all layers are about those in the name."""
    with torch.device("meta"):
        model = size.build()
    for name, count in size.layers.items():
        assert len(getattr(model, name)) == count
    parts = {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in size.layers
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(parts.values())
    billions = (rest + size.depth * sum(parts.values())) / 1e9
    wanted = 13 if "hunyuan" in size.name else float(size.name.split("-")[1].rstrip("b"))
    assert billions == pytest.approx(wanted, rel=0.1)
    inputs = size.inputs(torch.device("meta"), torch.bfloat16)
    layouts = facts_for(model).layouts(model, inputs)
    grid = next(layout.grid for (kind, _), layout in layouts.items() if kind != "cross")
    assert grid[1:] == {"480p": (30, 52), "720p": (45, 80)}[size.name.split("-")[-1]]
