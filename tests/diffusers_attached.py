"""A pytest plugin that runs diffusers' own pipeline tests with a method attached that does nothing.

The packages of diffusers hold no tests; they are in its repository, best at the version that is
installed. In a checkout of it, without its `src` so that the installed one is tested:

    pip install parameterized requests_mock
    mkdir plugin && cp DITTUNE/tests/diffusers_attached.py plugin
    export PYTHONPATH=plugin:DITTUNE HF_HUB_OFFLINE=1
    pytest -p diffusers_attached -rA tests/pipelines/{flux,wan,...} > plain.txt
    DITTUNE_ATTACH=1 pytest -p diffusers_attached -rA ... > attached.txt

What is PASSED in one list must be PASSED in the other, but for what dittune refuses: IP-Adapter,
attention slicing, batches with other rows (InstructPix2Pix), pipelines without a denoiser. The
small tokenizers and configurations that the tests want from the hub are stood in for; those that
compare with recorded numbers then fail, with and without.
"""

import functools
import os

import diffusers
import transformers

import dittune
from dittune.class_swap import owner_of
from dittune.pipelines.bench import DoNothing
from dittune.samples.shapes import models

FAMILIES = ("StableDiffusion", "Flux", "CogVideoX", "LTX", "Wan", "HunyuanVideo", "Mochi")
PIPELINES = [
    cls
    for name in dir(diffusers)
    if name.startswith(FAMILIES) and name.endswith("Pipeline")
    and "__call__" in vars(cls := getattr(diffusers, name))
]  # fmt: skip


def attached(stock):
    """A pipeline's `__call__` under a method that does nothing."""

    @functools.wraps(stock)
    def call(self, *args, **kwargs):
        if owner_of(self) is not None:
            return stock(self, *args, **kwargs)
        with dittune.attach(self, DoNothing()):
            return self(*args, **kwargs)

    return call


def stood_in(cls, builds):
    """`cls.from_pretrained` that builds what the hub would send, by a part of its name."""
    stock = cls.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        for part, build in builds.items():
            if part in str(name) and not os.path.isdir(name):
                return build()
        return stock(name, *args, **kwargs)

    cls.from_pretrained = from_pretrained


def t5_config():
    vocabulary = len(models.build_t5_tokenizer())
    return transformers.T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )


def pytest_configure(config):
    stood_in(transformers.CLIPTokenizer, {"tiny-random-clip": models.build_tokenizer})
    stood_in(
        transformers.AutoTokenizer,
        {"tiny-random-clip": models.build_tokenizer, "tiny-random-t5": models.build_t5_tokenizer},
    )
    stood_in(transformers.AutoConfig, {"tiny-random-t5": t5_config})
    if os.environ.get("DITTUNE_ATTACH") == "1":
        for cls in PIPELINES:
            cls.__call__ = attached(cls.__call__)
