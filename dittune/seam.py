"""The seam: a run-time subclass of a stock attention processor whose core calls come to us.

The stock `__call__` is parsed, its calls of `dispatch_attention_fn` and of
`F.scaled_dot_product_attention` are turned into calls of a method of the processor itself, and the
result is compiled into a subclass. Projections, norms, rotary embedding, LoRA and the user's
attention back-end stay the model's own code; nothing global is patched; `torch.compile` sees plain
Python. Without methods at a site the stock core is called with the stock arguments.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from dittune.call import AttnCall, Site
from dittune.errors import UnsupportedModelError
from dittune.method import Method
from dittune.padded_row import padded_row
from dittune.run import Run

DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"
REDIRECT = {DISPATCH: "_dittune_dispatch", SDPA: "_dittune_sdpa"}


class Link:
    """One method in the chain of a site; calling it is `proceed` for the method before it."""

    __slots__ = ("method", "next", "state")

    def __init__(self, method: Method, state: Any, following: Callable):
        self.method, self.state, self.next = method, state, following

    def __call__(self, call: AttnCall) -> torch.Tensor:
        return self.method.attend(call._replace(state=self.state), self.next)


def stock_attention(call: AttnCall) -> torch.Tensor:
    """The end of every chain: the model's own attention core."""
    return call.core(call)


def _sdpa_core(call: AttnCall) -> torch.Tensor:
    return functional.scaled_dot_product_attention(call.query, call.key, call.value, **call.options)


def _dispatch_core(call: AttnCall) -> torch.Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out = dispatch_attention_fn(
        call.query.transpose(1, 2),
        call.key.transpose(1, 2),
        call.value.transpose(1, 2),
        **call.options,
    )
    return out.transpose(1, 2)


class InstalledSite:
    """What a processor of ours knows: its site, its chain of methods, and the current run."""

    def __init__(self, site: Site):
        self.site = site
        self.chain: Callable | None = None  # None: nothing to do here, call the stock core
        self.run: Run | None = None
        self.fired = False  # written, never read, inside compiled code

    def attend(self, core: Callable, query, key, value, options: dict[str, Any]) -> torch.Tensor:
        run = self.run
        layout = run.layouts[self.site.kind, self.site.stage]
        if run.rows_apart:
            self.fired = True
            given = AttnCall(query, key, value, options, (), layout, self.site, None, core, run)
            return self.chain(padded_row(given))[:, :, : query.shape[2]]
        call = AttnCall(query, key, value, options, run.roles, layout, self.site, None, core, run)
        if self.site.kind == "cross" and key.shape[2] != layout.text[1]:
            return core(call)  # not to the text: the image branch of Wan
        self.fired = True
        return self.chain(call)


class DittuneProcessor:
    """Mixed into every generated class. `installed` is inert by default: the stock behaviour."""

    installed: InstalledSite | None = None

    def _dittune_sdpa(self, query, key, value, attn_mask=None, **options):
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        if self.installed is None or self.installed.chain is None:
            return functional.scaled_dot_product_attention(query, key, value, **options)
        return self.installed.attend(_sdpa_core, query, key, value, options)

    def _dittune_dispatch(self, query, key, value, attn_mask=None, **options):
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        if self.installed is None or self.installed.chain is None:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            return dispatch_attention_fn(query, key, value, **options)
        out = self.installed.attend(
            _dispatch_core,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            options,
        )
        return out.transpose(1, 2)

    def __reduce__(self):
        """Copies and pickles are the stock processor: a generated class cannot be imported."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("installed", "_rebound")}
        return _restore, (type(self).stock_class, state)


def _restore(stock_class: type, state: dict[str, Any]) -> object:
    processor = object.__new__(stock_class)
    processor.__dict__.update(state)
    return processor


class _Redirect(ast.NodeTransformer):
    """Turns core calls into calls of `self`'s methods and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in REDIRECT:
            self.count += 1
            node.func = ast.Attribute(ast.Name("self", ast.Load()), REDIRECT[name], ast.Load())
        return node


@functools.cache
def processor_class(stock_class: type, expected_calls: int | None = None) -> type:
    """The subclass of a stock processor class whose attention core can be redirected.

    Args:
        stock_class: a diffusers processor class with a `__call__`.
        expected_calls: number of core calls its `__call__` is known to make; None if unknown.

    Raises:
        UnsupportedModelError: no core call is found, or not the expected number.
    """
    stock_call = inspect.unwrap(stock_class.__call__)
    if stock_call.__code__.co_freevars:
        raise UnsupportedModelError(f"{stock_call.__qualname__} is a closure, not rewritable")
    try:
        rewritten, count = _rewrite(stock_call)
    except (OSError, TypeError):  # a frozen application carries no source
        rewritten, count = _rebinding(stock_call), _count_core_names(stock_call)
    if count == 0 or (expected_calls is not None and count != expected_calls):
        expected = "at least 1" if expected_calls is None else str(expected_calls)
        raise UnsupportedModelError(
            f"{stock_class.__name__} makes {count} attention-core calls dittune can redirect, "
            f"expected {expected}; use processors that call PyTorch's attention, as "
            "AttnProcessor2_0 does (no xformers or attention slicing), or another diffusers version"
        )
    functools.update_wrapper(rewritten, stock_class.__call__)
    namespace = {
        "__call__": rewritten,
        "__doc__": stock_class.__doc__,
        "stock_class": stock_class,
    }
    generated = type(f"Dittune{stock_class.__name__}", (DittuneProcessor, stock_class), namespace)
    _register_like(stock_class, generated)
    return generated


def _rewrite(stock_call: FunctionType) -> tuple[FunctionType, int]:
    source = textwrap.dedent(inspect.getsource(stock_call))
    tree = ast.parse(source)
    definition = tree.body[0]
    definition.decorator_list = []
    redirect = _Redirect()
    tree = ast.fix_missing_locations(redirect.visit(tree))
    ast.increment_lineno(tree, stock_call.__code__.co_firstlineno - 1)
    namespace: dict[str, Any] = {}
    flags = stock_call.__code__.co_flags & annotations.compiler_flag
    code = compile(tree, stock_call.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    exec(code, dict(stock_call.__globals__), namespace)
    function = namespace[definition.name]
    # The stock module's own globals, not a copy: what is patched there later is seen here too.
    rewritten = FunctionType(
        function.__code__, stock_call.__globals__, stock_call.__name__, stock_call.__defaults__
    )
    rewritten.__kwdefaults__ = stock_call.__kwdefaults__
    return rewritten, redirect.count


def _count_core_names(function: FunctionType) -> int:
    return sum(step.argval in REDIRECT for step in dis.get_instructions(function))


def _rebinding(stock_call: FunctionType) -> FunctionType:
    """Without source: run the stock code with its two core names bound to the processor."""

    def call(self, *args, **kwargs):
        rebound = self.__dict__.get("_rebound")
        if rebound is None:
            shim = SimpleNamespace(**vars(functional))
            setattr(shim, SDPA, self._dittune_sdpa)
            names = {**stock_call.__globals__, "F": shim, DISPATCH: self._dittune_dispatch}
            rebound = FunctionType(stock_call.__code__, names, "__call__", stock_call.__defaults__)
            rebound.__kwdefaults__ = stock_call.__kwdefaults__
            self._rebound = rebound
        return rebound(self, *args, **kwargs)

    return call


def _register_like(stock_class: type, generated: type) -> None:
    """diffusers' own hooks look a processor's class up in a registry; ours is like its parent."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(stock_class)
    except ValueError:
        return
    AttentionProcessorRegistry.register(generated, metadata)


def make_processor(stock: object, site: Site, expected_calls: int | None) -> object:
    """A processor with the state of `stock` whose attention core comes to us."""
    if isinstance(stock, torch.nn.Module):
        raise UnsupportedModelError(
            f"{type(stock).__name__} at {site} has weights of its own (IP-Adapter and the like); "
            "unload it before attaching"
        )
    stock_class = getattr(type(stock), "stock_class", type(stock))
    processor = object.__new__(processor_class(stock_class, expected_calls))
    processor.__dict__.update(stock.__dict__)
    processor.__dict__.pop("_rebound", None)  # of an earlier attach, put back by unfuse_...
    processor.installed = InstalledSite(site)
    return processor
