"""What mpq's Triton kernels compile to for Hopper, on a machine without a GPU: `TRITON_INTERPRET=0 python tests/hopper.py`.

The kernels' own Python runs as it would there, with its specialisations, down to the launch, which compiles for compute
capability 9.0, or 10.0 (Blackwell) where a format asks for it, and stops. Prints one JSON object a line: kernel, formats, matrix instructions, registers and stack (spills)
of a thread, shared memory of a block.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = (
    227 * 1024
)  # bytes of shared memory that a block may have there (CUDA programming guide, compute capability 9.0)


class Hopper:
    """Triton's idea of a GPU of which only the name is needed."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: list[Any] = []
_run = JITFunction.run


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    compiled.append(_run(self, *args, grid=grid, warmup=True, **kwargs))


def told(kernel: Any) -> dict[str, Any]:
    """The compiled kernel's instructions and resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name.lower(): int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\S*", kernel.asm["ptx"])))
    return {
        "kernel": kernel.name,
        "matrix": matrix,
        **found,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.run = _compile_only
    from mpq.formats.format import BLOCKED, get_format
    from mpq.kernels import bgemm, block_codes, flash, fp8, grouped

    e4m3 = get_format("fp8_e4m3")

    def tell(**about: object) -> None:
        while compiled:
            print(json.dumps(told(compiled.pop()) | about), flush=True)

    for width in (2048, 14336):
        fp8.quantize_rows(torch.empty(1024, width, dtype=torch.bfloat16), e4m3)
        tell(width=width)
    for dim, qk, av in (
        (64, e4m3, e4m3),
        (128, e4m3, e4m3),
        (128, e4m3, None),
        (128, None, e4m3),
        (256, e4m3, e4m3),
    ):
        q, k, v = (torch.empty(2, h, 512, dim, dtype=torch.bfloat16) for h in (32, 8, 8))
        flash.attention(q, k, v, qk, av, scaling=dim**-0.5, causal=True)
        tell(head_dim=dim, qk=qk and qk.name, av=av and av.name)
    bgemm.matmul(q, k.mT, e4m3)
    tell()
    one = torch.empty(1024, dtype=torch.float32)
    for dtype, blocks in ((torch.int8, False), (torch.float8_e4m3fn, True)):
        a, b = (torch.empty(n, 2048, dtype=dtype) for n in (512, 1024))
        bgemm.linear((a, one), (b, one), torch.bfloat16, blocks)
        tell(of=str(dtype))
        held = block_codes.Operand(torch.empty(8, 1024, 2048, dtype=dtype), one)
        for rows in (512, 4096):  # tiles of 64 and of 128 rows
            of_rows = block_codes.Operand(torch.empty(rows, 2048, dtype=dtype), one)
            ends = torch.zeros(8, dtype=torch.int32)
            grouped.product(of_rows, held, ends, 1024, torch.bfloat16, blocks)
            tell(of=str(dtype), rows=rows)
    x = torch.empty(512, 2048, dtype=torch.bfloat16)
    fp8.quantize_rows(x, get_format("int8"))
    tell(of="int8")
    for name in ("fp8_e4m3_128", "mxfp8", "mxfp4", "nvfp4"):
        Hopper.capability = 90 if name.startswith("fp8") else 100
        block_codes.quantize_blocks(x, BLOCKED[name])
        tell(of=name)


if __name__ == "__main__":
    main()
