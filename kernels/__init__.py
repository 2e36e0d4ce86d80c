"""Fused update kernels: rules written once, in any format, on any backend. Knows tensors; knows nothing of torch.optim.

| module | what it holds |
|---|---|
| :mod:`~fusedopt.kernels.rules` | the mathematics of every optimizer |
| :mod:`~fusedopt.kernels.rule` | what a rule is, and rules put together |
| :mod:`~fusedopt.kernels.formats` | how numbers are stored |
| :mod:`~fusedopt.kernels.tables`, :mod:`~fusedopt.kernels.plan` | parameters in buckets; plan, validate, run |
| :mod:`~fusedopt.kernels.cpu`, :mod:`~fusedopt.kernels.gpu`, :mod:`~fusedopt.kernels.reference` | the backends |
"""
