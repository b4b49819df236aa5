"""Makes interpreted Triton kernels faster, and no more exact than on a GPU.

The interpreter patches triton.language anew in every call of a device function, though what the
running kernel's first calls patched still holds. And it rounds correctly where a GPU's exp2 and
division are off by up to two units in the last place, as in ``tests/cpp/emulated_arithmetic.h``.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    run_kernel = interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def patch_once(fn):
        modules = list(map(id, fn.__globals__.values()))
        seen = (id(tl) in modules, id(tl.core) in modules)
        if seen in patched:
            return None
        patched.add(seen)
        return patch_language(fn)

    def run_patched(self, *args, **kwargs):
        patched.clear()
        return run_kernel(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_patched

    Builder = interpreter.InterpreterBuilder
    divide = Builder.create_fdiv

    def off_by_some(x, y, is_exact):
        """Float32 `y` moved by up to two units, a hash of `x`, where it is normal and inexact."""
        x, y = (np.ascontiguousarray(array, dtype=np.float32) for array in (x, y))
        units = (x.view(np.uint32) * np.uint32(2654435761) >> 16) % 5
        moved = (y.view(np.int32) + units.astype(np.int32) - 2).view(np.float32)
        size = np.abs(y)
        return np.where(is_exact | ~((size > 2e-38) & (size < 1e38)), y, moved)

    def exp2_approx(self, arg):
        x = arg.data
        y = np.exp2(x)
        if x.dtype == np.float32:
            y = off_by_some(x, np.where(y < 2.0**-126, np.float32(0.0), y), x == np.rint(x))
        return interpreter.TensorHandle(y, arg.dtype.scalar)

    def divide_approx(self, lhs, rhs):
        quotient = divide(self, lhs, rhs)
        y = quotient.data
        if y.dtype == np.float32:
            is_exact = y.astype(np.float64) * rhs.data == lhs.data
            quotient.data = off_by_some(rhs.data, y, is_exact)
        return quotient

    Builder.create_exp2, Builder.create_fdiv = exp2_approx, divide_approx
