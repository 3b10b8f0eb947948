"""What gradio warns of by itself, in tests for which warnings are errors."""

import pytest

IGNORED = pytest.mark.filterwarnings(
    "ignore:unclosed event loop:ResourceWarning",  # it leaves them to the garbage collector
    # of pandas 3, once it has statistics of its queue
    "ignore:'future.no_silent_downcasting' is deprecated",
    "ignore:The copy keyword is deprecated",
)
