"""Attention kernels, masks and sequence layouts: the foundation. Imports torch and triton only."""
