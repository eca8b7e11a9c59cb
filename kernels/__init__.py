"""Attention kernels, masks and sequence layouts: the foundation. Imports torch, triton and numba only."""
