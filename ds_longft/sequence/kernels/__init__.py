"""Attention kernels: one interface, a table of implementations, and the choice among them."""

from ds_longft.sequence.kernels.base import AttentionSpec, Job, Kernel, Saved
from ds_longft.sequence.kernels.table import CUDNN_MIN_WORK, KERNELS, choose_kernel, kernel_by_name

__all__ = ["CUDNN_MIN_WORK", "KERNELS", "AttentionSpec", "Job", "Kernel", "Saved", "choose_kernel", "kernel_by_name"]
