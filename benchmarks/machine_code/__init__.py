"""What the GPU kernels' machine code is made of: registers, and instructions per element of the
inner loops. Needs nvcc and triton's disassembler, and no GPU.

    python -m benchmarks.machine_code [--save]

Compiles the CUDA kernels for every architecture that is shipped, and every Triton kernel as its
launcher asks for it. Prints the counts beside those of ``results/machine-code.json``, and every
rule that the machine code breaks: no spills, no accesses of fewer than 16 bytes, no float64 in
loops. The exit status is 1 if a count is worse or a rule is broken. ``--save`` writes the counts to
that file.

    cuda_kernels.py     csrc/cuda through nvcc
    loops.py            the innermost loops of machine code
    triton_kernels.py   the calls that Triton's kernels are compiled for
    rules.py            how a broken rule is reported
    __main__.py         the comparison
"""
