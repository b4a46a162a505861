"""What the parts of three GPUs do in a cycle, each with its source: the one table that predictions are made from."""

from __future__ import annotations

from typing import NamedTuple

SOURCES = {
    "A100": "NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020; A100 80GB SXM data sheet, 2021",
    "H100": "NVIDIA H100 Tensor Core GPU Architecture, whitepaper, 2022; H100 SXM data sheet, 2022",
    "Ada": "NVIDIA Ada GPU Architecture, whitepaper, 2022 (appendix A: GeForce RTX 4090)",
    "guide": "CUDA C++ Programming Guide 13.0, tables of arithmetic throughput and of technical specifications",
    "Luo 2024": "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, 2024 (arXiv:2402.13499)",
    "Luo 2025": "Luo et al., Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level "
    "Analysis, 2025 (arXiv:2501.12084)",
    "Abdelkhalik 2022": "Abdelkhalik et al., Demystifying the Nvidia Ampere Architecture through Microbenchmarking and "
    "Instruction-level Analysis, 2022 (arXiv:2208.11174)",
    "Bekman 2024": "Bekman, Machine Learning Engineering, Maximum Achievable Matmul FLOPS comparison table, 2024",
    "He 2024": "He, H100 peak matmul FLOPS, gist.github.com/Chillee, 2024: 780 TFLOP/s",
    "HGEMM 2024": "DefTruth, CUDA-Learn-Notes, hgemm, 2024: cuBLAS at 105 to 113 of an L20's (Ada) 119.5 TFLOP/s",
    "quack 2025": "Dao-AILab, quack, 2025: softmax at 3.01 TB/s on an H100; taken for all three",
    "Lam 2022": "Lam, Microbenchmarking Nvidia's RTX 4090, Chips and Cheese, 2022: about 5 TB/s",
    "as A100": "none is published: the A100's bytes a cycle of the whole cache",
}  # fmt: skip


class Rate(NamedTuple):
    value: float
    source: str


class Part(NamedTuple):
    """One GPU.

    Args:
        code: whose machine code it runs: "sm_80".
        multiprocessors, clock: cycles a second, as the peak is stated for.
        peak: operations a second by the matrix units of 16-bit operands summed in float32; peak_int8 of 8-bit ones.
        bandwidth: bytes a second of device memory.
        mma: multiply-adds a cycle of one scheduler by mma.sync of 16 bits; mma_int8; wgmma, wgmma_int8 where there is.
        float32: cycles of a scheduler for a warp's FFMA; imad; integer; special: the same.
        shared: bytes a cycle of a multiprocessor's shared memory and first cache.
        l2: bytes a cycle that a multiprocessor gets from the second cache.
        memory, cache, local: cycles until what is loaded from device memory, the second cache, shared memory is there.
        exponential: cycles until a special function's result is there.
        warps, blocks, registers, shared_bytes: what a multiprocessor holds.
        sustained: of the peak, what a large library's product reaches: power lowers the clock. streamed: of the
            bandwidth, what the best kernel that only reads and writes reaches.
    """

    name: str
    code: str
    multiprocessors: Rate
    clock: Rate
    peak: Rate
    peak_int8: Rate
    bandwidth: Rate
    mma: Rate
    mma_int8: Rate
    wgmma: Rate | None
    wgmma_int8: Rate | None
    float32: Rate
    half: Rate  # two results a lane
    bfloat16: Rate
    imad: Rate
    integer: Rate
    special: Rate
    shared: Rate
    l2: Rate
    memory: Rate
    cache: Rate
    local: Rate
    exponential: Rate
    warps: Rate
    blocks: Rate
    registers: Rate
    shared_bytes: Rate
    sustained: Rate
    streamed: Rate


SCHEDULERS = 4
WARP = 32


def _lanes(results: int) -> float:
    """Cycles of a scheduler for a warp's instruction, of the guide's results a cycle and multiprocessor."""
    return SCHEDULERS * WARP / results


PARTS = (
    Part(
        name="A100", code="sm_80",
        multiprocessors=Rate(108, "A100"), clock=Rate(1.41e9, "A100"),
        peak=Rate(312e12, "A100"), peak_int8=Rate(624e12, "A100"), bandwidth=Rate(2.039e12, "A100"),
        mma=Rate(256, "A100"), mma_int8=Rate(512, "A100"), wgmma=None, wgmma_int8=None,
        float32=Rate(_lanes(64), "guide"), imad=Rate(_lanes(64), "guide"), integer=Rate(_lanes(64), "guide"),
        half=Rate(_lanes(128), "guide"), bfloat16=Rate(_lanes(64), "guide"),
        special=Rate(_lanes(16), "guide"),
        shared=Rate(128, "A100"), l2=Rate(5120 / 108, "A100"),
        memory=Rate(466, "Luo 2024"), cache=Rate(262, "Luo 2024"), local=Rate(29, "Luo 2024"),
        exponential=Rate(18, "Abdelkhalik 2022"),
        warps=Rate(64, "guide"), blocks=Rate(32, "guide"), registers=Rate(65536, "guide"),
        shared_bytes=Rate(164 * 1024, "guide"), sustained=Rate(0.869, "Bekman 2024"), streamed=Rate(0.9, "quack 2025"),
    ),
    Part(
        name="H100 SXM", code="sm_90",
        multiprocessors=Rate(132, "H100"), clock=Rate(1.83e9, "H100"),
        peak=Rate(989.4e12, "H100"), peak_int8=Rate(1978.9e12, "H100"), bandwidth=Rate(3.35e12, "H100"),
        # mma.sync reaches 62.9% of the peak; nvcc spaces m16n8k16 by 6 cycles, which were 66.7%.
        mma=Rate(0.629 * 512, "Luo 2025"), mma_int8=Rate(0.629 * 1024, "Luo 2025"),
        wgmma=Rate(512, "H100"), wgmma_int8=Rate(1024, "H100"),
        float32=Rate(_lanes(128), "guide"), imad=Rate(_lanes(64), "guide"), integer=Rate(_lanes(64), "guide"),
        half=Rate(_lanes(128), "guide"), bfloat16=Rate(_lanes(128), "guide"),
        special=Rate(_lanes(16), "guide"),
        shared=Rate(128, "H100"), l2=Rate(5120 / 132, "as A100"),
        memory=Rate(479, "Luo 2024"), cache=Rate(263, "Luo 2024"), local=Rate(29, "Luo 2024"),
        exponential=Rate(18, "Abdelkhalik 2022"),
        warps=Rate(64, "guide"), blocks=Rate(32, "guide"), registers=Rate(65536, "guide"),
        shared_bytes=Rate(228 * 1024, "guide"), sustained=Rate(0.788, "He 2024"), streamed=Rate(0.9, "quack 2025"),
    ),
    Part(
        name="RTX 4090", code="sm_80",
        multiprocessors=Rate(128, "Ada"), clock=Rate(2.52e9, "Ada"),
        # With 16-bit sums it were twice that; the kernels sum in float32.
        peak=Rate(165.2e12, "Ada"), peak_int8=Rate(660.6e12, "Ada"), bandwidth=Rate(1.008e12, "Ada"),
        mma=Rate(64, "Ada"), mma_int8=Rate(256, "Ada"), wgmma=None, wgmma_int8=None,
        float32=Rate(_lanes(128), "guide"), imad=Rate(_lanes(64), "guide"), integer=Rate(_lanes(64), "guide"),
        half=Rate(_lanes(64), "guide"), bfloat16=Rate(_lanes(64), "guide"),
        special=Rate(_lanes(16), "guide"),
        shared=Rate(128, "Ada"), l2=Rate(5.0e12 / 128 / 2.52e9, "Lam 2022"),
        memory=Rate(541, "Luo 2024"), cache=Rate(273, "Luo 2024"), local=Rate(30, "Luo 2024"),
        exponential=Rate(18, "Abdelkhalik 2022"),
        warps=Rate(48, "guide"), blocks=Rate(24, "guide"), registers=Rate(65536, "guide"),
        shared_bytes=Rate(100 * 1024, "guide"), sustained=Rate(0.92, "HGEMM 2024"), streamed=Rate(0.9, "quack 2025"),
    ),
)  # fmt: skip


def occupancy(part: Part, registers: int, threads: int, shared: int, reserved: int = 1024) -> int:
    """Blocks of so many threads, registers a thread and bytes of shared memory that a multiprocessor holds."""
    warps = -(-threads // WARP)
    # A warp gets registers by 256, of its scheduler's quarter.
    each = -(-registers * WARP // 256) * 256
    by_registers = int(part.registers.value) // SCHEDULERS // each * SCHEDULERS // warps
    by_shared = int(part.shared_bytes.value) // (-(-(shared + reserved) // 128) * 128)
    return min(by_registers, by_shared, int(part.warps.value) // warps, int(part.blocks.value))
