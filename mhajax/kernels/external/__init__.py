"""Kernels that a platform or another library has: cuDNN's for GPUs, splash attention for TPUs."""
