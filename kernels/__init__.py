"""The RMSprop update, fused: the same bits from Triton, Numba and NumPy."""

from hogstream.kernels.backends import available_backends
from hogstream.kernels.rmsprop import multi_tensor_rmsprop_, rmsprop_
from hogstream.kernels.sparse import sparse_rmsprop_

__all__ = ["available_backends", "multi_tensor_rmsprop_", "rmsprop_", "sparse_rmsprop_"]
