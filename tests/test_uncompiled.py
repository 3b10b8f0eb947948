"""What must not be compiled is not, and what else runs in the process is compiled afterwards."""

import threading

import pytest
import torch

from dittune.uncompiled import uncompiled


@pytest.fixture
def is_compiled():
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def says(x):
        return x + 1 if torch.compiler.is_compiling() else x

    yield lambda: bool(says(torch.zeros(())))
    torch._dynamo.reset()


def test_nested_and_after_an_error(is_compiled):
    assert is_compiled()
    with pytest.raises(RuntimeError, match="inside"), uncompiled():
        with uncompiled():
            assert not is_compiled()
        assert not is_compiled()
        raise RuntimeError("inside")
    assert is_compiled()


def test_the_stance_of_the_user_is_put_back(is_compiled):
    with torch.compiler.set_stance("fail_on_recompile"):
        with uncompiled():
            assert not is_compiled()
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            is_compiled()
    assert is_compiled()


def test_threads_that_overlap(is_compiled):
    """The first to come is the first to go: the other is still uncompiled, and nobody later."""
    second_came, first_went = threading.Event(), threading.Event()
    seen = []

    def second():
        with uncompiled():
            second_came.set()
            assert first_went.wait(60)
            seen.append(is_compiled())

    thread = threading.Thread(target=second)
    with uncompiled():
        thread.start()
        assert second_came.wait(60)
    first_went.set()
    thread.join()
    assert seen == [False]
    assert is_compiled()
