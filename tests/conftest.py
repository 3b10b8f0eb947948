"""Every test: no hub, one thread (tiny models gain nothing from two, and lose much), a seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config):
    """Several processes for the whole suite, none for parts of it, slow, GPU and browser tests."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count()) if is_whole and "not slow" in config.option.markexpr else 0


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
