"""`dittune.Pipeline`: a diffusers pipeline with methods that act during its calls."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dittune
from dittune.attach import attach
from dittune.errors import CheckpointError, ConfigError, DittuneError
from dittune.kernels.errors import BackendError
from dittune.method import Method
from dittune.models import DENOISER_NAMES, facts_for
from dittune.pipelines.loading import locate, pick_device, pick_dtype, public_name, quiet

MAX_SEED = 2**63 - 1

# What pipelines call the compression of their autoencoder.
SPACE = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


@dataclass
class Result:
    """What one call made.

    Attributes:
        output: the diffusers pipeline's own output.
        record: plain values: resolved settings, versions, seconds, what each method reports.
    """

    output: Any
    record: dict[str, Any]

    @property
    def images(self) -> list:
        """The pictures; of a video pipeline the frames of each video."""
        return self.output.frames if hasattr(self.output, "frames") else self.output.images


class Pipeline:
    """A diffusers pipeline, loaded, checked, and attached to for the length of each call.

    Attributes:
        pipe: the diffusers pipeline; between calls it is untouched.
        methods: acting in later calls, first one outermost; may be replaced.
        name: what it was loaded from, without the path of a local folder.
    """

    def __init__(self, pipe: Any, methods: Sequence[Method] = (), name: str = ""):
        self.pipe, self.methods, self.name = pipe, list(methods), name

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        methods: Sequence[Method] = (),
        *,
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = "auto",
        **load: Any,
    ) -> Pipeline:
        """Load a bundled checkpoint by name, a local folder, or a hub id.

        Args:
            device: `auto` is cuda, else mps, else cpu.
            dtype: `auto` is bfloat16 or float16 on a GPU, float32 on the CPU.
            load: further arguments of diffusers' `from_pretrained`, e.g. `quantization_config`,
                `variant`, or a component made before (`transformer=...`).

        Raises:
            CheckpointError: not found, unreadable, or stored as pickles (only safetensors are).
            ConfigError: an unknown device or dtype.
            DittuneError: the model does not fit into memory.
        """
        from diffusers import DiffusionPipeline

        device = pick_device(str(device or "auto"))
        torch_dtype = pick_dtype(str(dtype or "auto").removeprefix("torch."), device)
        source = locate(name_or_path)
        try:
            with quiet(Path(source).is_dir()):
                pipe = DiffusionPipeline.from_pretrained(
                    source, dtype=torch_dtype, use_safetensors=True, **load
                ).to(device)
        except Exception as error:  # diffusers, transformers and the hub raise what they like
            if _is_out_of_memory(error):
                raise DittuneError(
                    f"out of memory while loading {name_or_path}; choose a dtype of half the size "
                    "(float16, bfloat16), another device, or a smaller model"
                ) from error
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"cannot load {name_or_path}: {reason}") from error
        return cls(pipe, methods, name=public_name(name_or_path))

    def __call__(
        self,
        *args: Any,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Result:
        """Run the diffusers pipeline, with its own arguments, under the methods.

        Args:
            seed: instead of `generator`. Image `i` of the call gets `seed + i` (or `seed[i]`), so
                each can be made again alone, on any device.
            progress: show a progress bar on standard error.

        Raises:
            ConfigError: an argument the pipeline does not have, no prompt, a seed out of range, a
                size it cannot make, or a method's back-end that cannot run here.
            DittuneError: out of memory, or pictures of nan; says what to lower.
        """
        signature = inspect.signature(self.pipe.__call__)
        arguments = self._bind(signature, args, kwargs)
        seeds = self._add_generators(arguments, seed)
        self._check_size(arguments)
        self.pipe.set_progress_bar_config(disable=not progress)
        started = time.perf_counter()
        try:
            with attach(self.pipe, *self.methods) as handle, np.errstate(invalid="raise"):
                output = self.pipe(**arguments)
                report = handle.report()
        except FloatingPointError as error:  # NumPy's, on its way from floats to pixels
            raise DittuneError(
                "the pixels came out as nan; lower the guidance scale and the scales of methods, "
                "or choose dtype float32 or bfloat16"
            ) from error
        except BackendError as error:
            raise ConfigError(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise DittuneError(
                "out of memory; lower the number of images or prompts per call or the size, or set "
                "batched=False on methods that add a pass"
            ) from error
        seconds = time.perf_counter() - started
        return Result(output, self._record(signature, arguments, seeds, seconds, report))

    def _bind(self, signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
        for name in kwargs:
            if name not in signature.parameters:
                near = difflib.get_close_matches(name, signature.parameters, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{type(self.pipe).__name__} takes no {name!r}{hint}")
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        prompt, negative = arguments.get("prompt"), arguments.get("negative_prompt")
        if isinstance(prompt, (list, tuple)):
            if not prompt:
                raise ConfigError("the list of prompts is empty")
            if isinstance(negative, str):  # for all of them, which not every pipeline takes
                arguments["negative_prompt"] = [negative] * len(prompt)
        return arguments

    def _add_generators(self, arguments: dict[str, Any], seed: Any) -> list[int] | None:
        if seed is None:
            return None
        if arguments.get("generator") is not None:
            raise ConfigError("give either seed or generator, not both")
        prompts = arguments.get("prompt")
        count = len(prompts) if isinstance(prompts, (list, tuple)) else 1
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            count *= arguments.get(name, 1)
        one = isinstance(seed, numbers.Integral)
        seeds = [int(seed) + i for i in range(count)] if one else [int(s) for s in seed]
        if len(seeds) != count:
            raise ConfigError(f"expected {count} seeds, one an image, got {len(seeds)}")
        if not all(0 <= s <= MAX_SEED for s in seeds):
            raise ConfigError(f"seeds are from 0 to {MAX_SEED}, got {seeds}")
        arguments["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
        return seeds

    def _check_size(self, arguments: dict[str, Any]) -> None:
        """Ask the family of the denoiser which sides it can make; frames are its autoencoder's."""
        models = [getattr(self.pipe, name, None) for name in DENOISER_NAMES]
        model = next((model for model in models if model is not None), None)
        if model is None:
            return  # `attach` says which models it knows
        sides = facts_for(model).sides(model, self._factor(SPACE))
        for name in ("width", "height"):
            side = arguments.get(name)
            if side is not None and side not in sides:
                raise ConfigError(
                    f"{name} must be a multiple of {sides.step} from {sides[0]} to {sides[-1]}, "
                    f"got {side}"
                )
        frames, factor = arguments.get("num_frames"), self._factor(TIME)
        if frames is not None and (frames < 1 or (frames - 1) % factor):
            raise ConfigError(
                f"frames must be 1 more than a multiple of {factor}, such as {2 * factor + 1}, "
                f"got {frames}"
            )

    def _factor(self, names: tuple[str, ...]) -> int:
        """How much the autoencoder compresses, as the pipeline calls it."""
        return next((getattr(self.pipe, name) for name in names if hasattr(self.pipe, name)), 1)

    def _record(self, signature, arguments, seeds, seconds, report) -> dict[str, Any]:
        import diffusers
        import transformers

        plain = (str, int, float, bool, list, tuple, type(None))
        settings = {
            name: arguments.get(name, parameter.default)
            for name, parameter in signature.parameters.items()
            if name != "generator"
            and isinstance(arguments.get(name, parameter.default), plain)
            and "embeds" not in name
        }
        return {
            "model": self.name,
            "pipeline": type(self.pipe).__name__,
            "methods": [{"method": m.name, **dataclasses.asdict(m)} for m in self.methods],
            "seeds": seeds,
            "settings": settings,
            "device": str(self.pipe.device),
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "report": report,
            "versions": {
                "dittune": dittune.__version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        }


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
