"""Pipes of a GPU's multiprocessor as ``multiprocessor.py`` models them: what goes through each, and for how long."""

from __future__ import annotations

SCHEDULERS = 4
ALU, INTEGER, FLOAT, MATRIX, SPECIAL, MEMORY, NO_PIPE = range(7)
PIPES = ("ALU", "integer FMA", "float FMA", "MMA", "special", "memory")
NAMES = {
    ALU: "LOP3 SHF PRMT IADD3 VIADD SEL ISETP FMNMX LEA MOV FSETP FSEL VIMNMX PLOP3 VOTE I2FP F2FP P2R R2P IABS IMNMX",
    INTEGER: "IMAD",
    FLOAT: "FADD FFMA FMUL HADD2 HFMA2 HMUL2",
    MATRIX: "HMMA",
    SPECIAL: "MUFU I2F F2F F2I POPC FLO",
    MEMORY: "LDS STS LD ST LDG STG LDGSTS SHFL LDC S2R",
}
PIPE_OF = {name: pipe for pipe, names in NAMES.items() for name in names.split()}
LATENCY = 29  # cycles from a load of shared memory to its result, without conflicts


def busy(architecture: int) -> dict[int, int]:
    """Cycles that a scheduler's pipe is busy with one instruction of a warp: 32 over the lanes that CUDA's guide gives
    to it ("Arithmetic instructions"). A product of 16 x 8 x 16 in bfloat16 takes what dense products take at best on
    sm_80; others reach their best by other instructions alone, and 2/3 of it is assumed.
    """
    older = architecture == 80
    return {ALU: 2, INTEGER: 2, FLOAT: 2 if older else 1, MATRIX: 8 if older else 6, SPECIAL: 8}
