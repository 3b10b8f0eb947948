"""One tiny SD3 pipeline on disk for all tests of this folder."""

import shutil

import pytest

from tests.tiny import sd3


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    sd3().save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "tiny-sd3"
    shutil.copytree(saved, folder)
    return folder
