"""Triton kernels of the merge core for GPU tensors, installed as ``pymerge.triton_kernels``."""
