"""Where there is no GPU, Triton's kernels are interpreted; see also the top of tests/conftest.py."""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _create_dot_of_bfloat16(self, a, b, *arguments):
        """The interpreter keeps bfloat16 as uint16 and would multiply the bit patterns; widen them first."""

        def widened(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return _create_dot(self, widened(a), widened(b), *arguments)

    def _round_to_nearest(self, source, kind):
        """The interpreter cuts fp32 off to bfloat16; GPUs round to nearest, ties to even."""
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return self.cast_impl(source, kind)
        bits = source.data.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

    setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot_of_bfloat16)  # noqa: B010
    setattr(interpreter.InterpreterBuilder, "create_fp_trunc", _round_to_nearest)  # noqa: B010
