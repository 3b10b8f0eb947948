"""Where a model comes from, and on which device and in which precision it goes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dittune
from dittune.errors import CheckpointError, ConfigError
from dittune.local_path import local_path

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> str:
    """A torch device name; `auto` is cuda, else mps, else cpu."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot use device {name!r}: {reason}") from error
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """A torch dtype by name; `auto` is bfloat16 or float16 on a GPU and float32 on the CPU."""
    if name == "auto":
        if device.startswith("cuda"):
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float16 if device == "mps" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def locate(name_or_path: str) -> str:
    """A folder or hub id; checked as far as that is possible without loading."""
    folder = local_path(name_or_path)
    if name_or_path in dittune.available_checkpoints():
        folder = Path(dittune.checkpoint(name_or_path))
    elif not os.path.isdir(folder):  # False also for what is too long to be a path
        if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
            return name_or_path  # a hub id
        return dittune.checkpoint(name_or_path)  # raises, naming what there is
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{name_or_path} is no diffusers pipeline: no model_index.json")
    for path in sorted(folder.rglob("*")):
        if (
            path.parent != folder
            and path.suffix in PICKLES
            and not list(path.parent.glob("*.safetensors"))
        ):
            raise CheckpointError(
                f"{path.parent.name}/{path.name} is a pickle, which can run code when loaded; "
                "only safetensors are loaded: save the model again with safe_serialization=True"
            )
        if path.suffix == ".safetensors":
            _check_safetensors(path)
    return str(folder)


def public_name(name_or_path: str) -> str:
    """What a record may say of a model: of a local folder its own name only."""
    folder = local_path(name_or_path)
    return folder.resolve().name if os.path.isdir(folder) else name_or_path


def fingerprint(name_or_path: str) -> str | None:
    """Tells weights of one name apart: a hash of names, sizes and ends of the safetensors.

    None for a hub id: its weights are not looked at before they are needed.
    """
    folder = Path(locate(name_or_path))
    if not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def placed(pipe: Any) -> dict[str, str]:
    """Kind of device and precision of a pipeline: rows made on others are not the same rows."""
    return {"device": pipe.device.type, "dtype": str(pipe.dtype).removeprefix("torch.")}


@contextlib.contextmanager
def quiet(local: bool) -> Iterator[None]:
    """No progress bars while reading from disk; a download keeps them."""
    import diffusers
    import transformers

    loggers = [diffusers.utils.logging, transformers.utils.logging] if local else []
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.enable_progress_bar()


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.parent.name}/{path.name} is truncated or damaged: {error}"
        ) from error
