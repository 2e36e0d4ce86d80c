"""Corrections to Triton's interpreter (TRITON_INTERPRET=1), so that it computes what a GPU computes.

Found in Triton 3.7.1 and 3.9.0; `test_triton_interpreter.py` fails without each:

- float32 -> bfloat16 truncates; GPUs round to nearest even (cvt.rn.bf16.f32).
- bfloat16 -> float32 is wrong for subnormals.
- A Python float argument stays a Python float (double arithmetic between scalars); on a GPU it is a float32.
- Arithmetic on bfloat16 values works on their bit patterns: made an error, since kernels convert to float32 first.
- NumPy warns of overflows and invalid operations; a GPU does not.
"""

import numpy as np

# A NaN of any payload is stored as this one by the instruction.
BFLOAT16_NAN = 0x7FFF


def float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of `x` rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), BFLOAT16_NAN, rounded).astype(np.uint16)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 that bfloat16 bits stand for, exactly."""
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def correct() -> None:
    """Put the corrections in place, once in a process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if hasattr(builder, "corrected"):
        return
    convert, as_argument, binary = interpreter._convert_float, interpreter._implicit_cvt, builder.binary_op
    launch = executor.__call__

    def corrected_convert(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return float32_to_bfloat16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return bfloat16_to_float32(values)
        return convert(values, source, target, rounding)

    def corrected_argument(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return as_argument(argument)

    def corrected_binary(self, left, right, operation):
        bitwise = operation in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar) and not bitwise:
            raise TypeError("kernels do not compute on bfloat16 values: convert them to float32 first")
        return binary(self, left, right, operation)

    def silent_launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    interpreter._convert_float = corrected_convert
    interpreter._implicit_cvt = corrected_argument
    builder.binary_op = corrected_binary
    executor.__call__ = silent_launch
    builder.corrected = True
