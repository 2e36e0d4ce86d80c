"""What generated Triton kernels of codes are made of: the operations that the functions of fusedopt.kernels.codes name."""

import triton
import triton.language as tl


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def word(x):
    return x.to(tl.uint32)


@triton.jit
def real(x):
    return x.to(tl.float32)


@triton.jit
def truncate(x):
    return x.to(tl.uint32)


@triton.jit
def float32(x: tl.constexpr):
    return tl.full((), x, tl.float32)
