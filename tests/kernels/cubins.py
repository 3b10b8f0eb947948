"""Compiles the Triton kernels for Hopper without a GPU, and reads what they use.

Run in a process of its own, without TRITON_INTERPRET: prints one line of JSON a kernel.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dittune.kernels.block_sparse import triton as launcher
from dittune.kernels.block_sparse import triton_kernels as kernels
from dittune.kernels.routed_attention import triton as routed
from dittune.kernels.routed_attention.triton_kernels import chunk_kernel

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
LISTS = ("start", "index", "slots", "order", "count", "plan", "table", "rows", "many")
ALIGNED = [["tt.divisibility", 16]]


def source_of(kernel, dtype, constants):
    """Tensors of `dtype`, int32 lists, strides and pointers that are multiples of 16."""
    signature, attributes, constants = {}, {}, dict(constants)
    for i, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        if parameter.annotation is not inspect.Parameter.empty:
            signature[name] = "constexpr"
            continue
        if name.startswith("stride") or name in ("H", "Sq", "Skv", "nq", "nk", "i_c"):
            signature[name] = "i32"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        elif name in ("lse", "delta") or name.startswith("running"):
            signature[name] = "*fp32"
        elif name == "bits":
            signature[name] = "*u8"
        else:
            signature[name] = "*i32" if name.endswith(LISTS) else TYPES[dtype]
        if signature[name].startswith("*") or name in ("stride_q", "stride_k", "stride_v"):
            attributes[(i,)] = ALIGNED
        if name.startswith("stride_") and len(name) == 9 and name[-1] in "bh":
            attributes[(i,)] = ALIGNED
    return ASTSource(kernel, signature, constants, attributes)


def usage(kernel, table, dtype, dim, rule, block=128):
    """Registers and stack a thread, shared memory a program, for sm_90."""
    query = torch.empty(0, dim, dtype=dtype)
    if kernel is chunk_kernel:
        constants = routed.constants_for(query)
        tile = constants["BM"], constants["BN"]
    else:
        tile, constants = launcher.tile_for(table, query, (block, block))
        constants |= {"RULE": rule}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    source = source_of(kernel, dtype, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "kernel": kernel.fn.__name__,
        "type": str(dtype).removeprefix("torch."),
        "head_dim": dim,
        "rule": rule,
        "tile": tuple(tile),
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": binary.metadata.shared,
        "tensor_cores": len(re.findall(r"\b(wgmma\.mma_async|mma)\.sync", binary.asm["ptx"])),
    }


def main(names, cases):
    for name in names:
        if name == "chunk_kernel":  # without rules; float32 up to 128
            cases = {case[:2]: case for case in cases if case[:2] != (torch.float32, 256)}.values()
        for dtype, dim, rule in cases:
            table = name.removesuffix("_kernel").upper() + "_FP32" * (dtype == torch.float32)
            kernel = chunk_kernel if name == "chunk_kernel" else getattr(kernels, name)
            found = usage(kernel, getattr(launcher, table, None), dtype, dim, rule)
            print(json.dumps(found), flush=True)


CASES = [
    (torch.bfloat16, 64, "disc"),
    (torch.bfloat16, 128, "disc"),
    (torch.float16, 128, "none"),
    (torch.bfloat16, 128, "window"),
    (torch.bfloat16, 128, "bits"),
    (torch.bfloat16, 96, "disc"),
    (torch.bfloat16, 256, "disc"),
    (torch.float32, 64, "disc"),
    (torch.float32, 128, "disc"),
    (torch.float32, 256, "disc"),
]

if __name__ == "__main__":
    main(sys.argv[1:], CASES)
