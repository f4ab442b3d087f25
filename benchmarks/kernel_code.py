"""What Triton makes of our kernel, without a GPU: registers, spills and the width of its loads.

    pip install 'triton>=3.7'
    python benchmarks/kernel_code.py [--arch 80 90 100]

The kernel is compiled ahead of time for each architecture (90 is sm_90, an H100 or H200), once for
rows of logits that are padded to a multiple of 16, as goldfish.linear pads them, and once for rows
that are not: those of GPT-2's 50,257 logits. A vector load moves 16 bytes.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def compiled(arch: int, dtype: str, padded: bool) -> Any:
    """The kernel with its gradient, for rows of logits whose pitch is a multiple of 16 or not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from goldfish.kernels import _softmax_rows

    signature = {
        "logits": f"*{dtype}",
        "pitch": "i32",
        "labels": "*i64",
        "nll": "*fp32",
        "vocabulary": "i32",
        "scale": "fp32",
        "softcap": "fp32",
        "CAPPED": "constexpr",
        "GRAD": "constexpr",
        "BLOCK": "constexpr",
    }
    # As `softmax_rows` launches it for a vocabulary of 4,096 and more.
    constants = {"CAPPED": False, "GRAD": True, "BLOCK": 4096}
    aligned = [["tt.divisibility", 16]]
    names = list(signature)
    # What Triton finds out when it launches: pointers are aligned; the pitch is, if it is padded.
    known = ["logits", "labels", "nll", *(["pitch"] if padded else [])]
    attributes = {(names.index(name),): aligned for name in known}
    source = ASTSource(_softmax_rows, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8}
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as ptxas' companion cuobjdump reports them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", output)
    spilled = re.search(r"LOCAL:(\d+)", output)
    if not (registers and spilled):
        raise ValueError(f"cuobjdump printed no registers: {output}")
    return int(registers[1]), int(spilled[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    arguments = parser.parse_args()
    print(
        "| sm | logits | rows | registers | spilled bytes | vector loads | narrower loads |"
    )
    print("|---|---|---|---|---|---|---|")
    for arch in arguments.arch:
        for dtype in ("bf16", "fp32"):
            for padded in (True, False):
                kernel = compiled(arch, dtype, padded)
                registers, spilled = resources(kernel.asm["cubin"])
                # ld.global.v4.b32 moves 4 x 4 bytes: a vector load. The label and its logit are
                # single loads in any case.
                loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
                wide = sum(".v4." in load for load in loads)
                rows = "padded" if padded else "not padded"
                print(
                    f"| {arch} | {dtype} | {rows} | {registers} | {spilled} | {wide} | "
                    f"{len(loads) - wide} |"
                )


if __name__ == "__main__":
    main()
