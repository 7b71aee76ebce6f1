"""The GPUs that people train on, in numbers from their data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU in numbers."""

    name: str
    memory_gb: float
    """GiB that torch may reserve: what the card reports, less the CUDA context."""
    tflops: float
    """Peak fp16 matrix rate, 10**12 operations a second, dense."""
    bandwidth: float
    """Memory bandwidth, 10**9 bytes a second."""
    efficiency: float
    """Share of the peak rate that QLoRA training reaches."""

    @property
    def is_old(self) -> bool:
        """Whether it is older than Ampere: no bf16, no FlashAttention."""
        return self.efficiency == OLD


# a CUDA context with cuBLAS takes about this much of what a card reports
CONTEXT_GB = 0.74
# Without FlashAttention (before Ampere) 15 %: the published 3B runs on a T4, 6.6 s for
# 8 rows of about 400 tokens. Else 35 %: measured on an H100 with Llama-3.2-1B, packed.
OLD, NEW = 0.15, 0.35
KNOWN = {
    "T4": (65, 320, OLD),
    "P100": (18.7, 732, OLD),
    "V100": (125, 900, OLD),
    "L4": (121, 300, NEW),
    "A10": (125, 600, NEW),
    "A100": (312, 1555, NEW),
    "RTX 3090": (71, 936, NEW),
    "RTX 4090": (165, 1008, NEW),
    "H100": (989, 3350, NEW),
    "H200": (989, 4800, NEW),
}
T4 = Gpu("Tesla T4", 14.0, *KNOWN["T4"])  # it reports 14.74 GiB


def this_gpu() -> Gpu | None:
    """Returns this machine's GPU, under the cap of `TUNEBOOK_GPU_GB`; None without.

    One that is not in the table is taken for a T4, which is what Colab lends.
    """
    import torch

    from helpers import runtime

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = [name for name in KNOWN if name in properties.name]
    numbers = KNOWN[max(known, key=len, default="T4")]
    free = properties.total_memory / 2**30 - CONTEXT_GB
    return Gpu(properties.name, min(free, runtime.memory_cap_gb()), *numbers)
