"""Counts and models the CUDA kernels from their compiled machine code, without a GPU.

    python -m benchmarks.issue_model stats:8192x151936 loss:8192x151936

compiles csrc/cuda for sm_90a, asks the launchers for kernel, grid and arguments, runs the first
cluster's machine code lane by lane on random logits (the log-probabilities must come out right),
counts what every warp executed by source function, and replays that in a model of a
multiprocessor's schedulers. What it prints is a model's word, never a measurement.

    build.py, capture.cpp            compiler, disassembler, launches
    listing.py, source_map.py        machine code as instructions, and the functions they come from
    operands.py, *_ops.py, warps.py  what instructions do to a warp
    machine.py                       a cluster of blocks
    scheduler.py, peers.py           cycles of what its warps executed
    model.py, __main__.py            counts and times of a call
"""
