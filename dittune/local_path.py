"""What users type as a path."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(text: str) -> Path:
    """`text` as a path, with `~` resolved; what cannot be one is left, and will not be there."""
    try:
        return Path(os.path.expanduser(text))  # unlike Path's own, leaves an unknown user
    except ValueError:  # a null byte
        return Path(text)
