"""Where the GPU's time goes in a piece of work: kernel_times."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

# FlashAttention's names say cutlass, too: the first kind that fits counts.
KINDS = {
    "attention": ("attend_kernel", "flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "nvjet", "gemv", "splitK", "cutlass"),
}


def kernel_times(work: Callable[[], object], n: int) -> tuple[dict[str, float], list[dict]]:
    """Microseconds of a call of work, over n calls: by kind of kernel, and for each kernel.

    The kinds: attention, matrix products, other. A kernel: name, us, calls; the longest first.
    """
    cuda = torch.cuda.is_available()
    # Nothing of what the host does: that takes longer to list than to run.
    activities = [ProfilerActivity.CUDA] if cuda else None
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(n):
            work()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in recorded.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        # "Optimizer.step#AdamW.step" is a mark around kernels, which the profiler lists as one.
        if on_gpu and event.self_device_time_total and "#" not in event.key:
            us = event.self_device_time_total / n
            kernels.append(dict(name=event.key[:120], us=us, calls=event.count / n))
    kernels.sort(key=lambda kernel: -kernel["us"])
    by_kind = dict.fromkeys((*KINDS, "other"), 0.0)
    for kernel in kernels:
        by_kind[kind_of(kernel["name"])] += kernel["us"]
    return by_kind, kernels


def kind_of(name: str) -> str:
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other"
