"""`dittune bench attention`: gated, recorded, drawn; and what the Python layer costs."""

import time
import types
from xml.etree import ElementTree

import pytest
import torch

import dittune
from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import DittuneError
from dittune.kernels.block_sparse import op
from dittune.pipelines.attention_bench import bench
from dittune.pipelines.attention_bench.shapes import GPU_SHAPES, Shape, patterns_of, plan_of
from dittune.pipelines.row_log import RowLog
from dittune.run import Run
from dittune.seam import Link, stock_attention
from dittune.sparse.core import built_by
from dittune.sparse.plan import Place

TINY = (Shape("joint", (1, 10, 12), 5, 2, 8), Shape("video", (3, 6, 5), 0, 2, 8))


def test_rows_are_recorded_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CPU_SHAPES", TINY)
    result = bench.bench_attention(True, "", 2, tmp_path)
    bench.bench_attention(True, "joint/tiles", 2, tmp_path)
    log = RowLog(tmp_path / "attention.csv", bench.Timing).read()
    assert len(result["rows"]) == sum(len(patterns_of(shape)) for shape in TINY) == len(log) - 1
    assert {row.shape for row in log if row.pattern == "radial"} == {"video"}
    assert not result["skipped"] and "of the bound" in bench.as_text(result)
    ElementTree.fromstring((tmp_path / "attention.svg").read_text())


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def wrong(query, *rest):
        return query * 0.1, None

    monkeypatch.setattr(bench, "CPU_SHAPES", TINY[:1])
    monkeypatch.setattr(bench, "block_sparse_attention", wrong)
    with pytest.raises(DittuneError, match="joint/tiles-3/cpu is wrong: error"):
        bench.bench_attention(True, "", 2, tmp_path)
    assert not (tmp_path / "attention.csv").exists()


@pytest.mark.slow
def test_plans_of_all_models_but_the_largest():
    for shape in GPU_SHAPES:
        for pattern in patterns_of(shape) if shape.name != "flux-8k" else ():
            plan = plan_of(shape, pattern, torch.device("cuda"))
            (layout,), rows = plan.layouts, -(-plan.queries.slots // 128)
            visited = torch.cat([layout.full, layout.partial])[:, 0]
            assert plan.block == (128, 128) and len(visited) < rows**2
            assert len(visited.unique()) == rows, "each block of queries sees something"


@pytest.mark.slow
def test_the_python_layer_costs_less_than_30_microseconds(monkeypatch, capsys):
    """From the call of a site to a kernel that does nothing, tokens in order already."""
    empty = types.SimpleNamespace(
        forward=lambda query, key, value, task: (query, query.new_empty(query.shape[:3]))
    )
    monkeypatch.setattr(op, "backend_module", lambda name: empty)
    monkeypatch.setattr("dittune.kernels.block_sparse.api.backend_module", lambda name: empty)
    layout, device = TokenLayout((0, 256), (256, 256), (1, 16, 16)), torch.device("cpu")
    method = dittune.Clear(radius=3, backend="cpu")
    plans = built_by(method, "joint", 0, device)
    ready = plans.get(layout, lambda: method.ready(Place(layout, 1, device)))
    assert ready.order == (None, None)
    link, tensor = Link(method, plans, stock_attention), torch.zeros(1, 1, 256, 16)
    call = AttnCall(
        tensor, tensor, tensor, {}, ("cond",), layout, Site(0, "joint", "x", 1), None,
        stock_attention, Run(),
    )  # fmt: skip
    rounds = []
    for _ in range(10):
        started = time.process_time()
        for _ in range(1000):
            link(call)
        rounds.append(1e3 * (time.process_time() - started))
    with capsys.disabled():
        print(f"{min(rounds):.1f} microseconds a call")
    assert min(rounds) < 30
