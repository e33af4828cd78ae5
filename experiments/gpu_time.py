"""Where the GPU's time goes in a piece of work: kernel_times."""

from collections.abc import Callable

import torch

GROUPS = {
    "attention": ("attend_kernel", "flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "nvjet", "gemv", "splitK", "cutlass"),
}


def kernel_times(work: Callable[[], object], n: int) -> tuple[dict[str, float], list[dict]]:
    """Microseconds of a call of work, over n calls, by kind of kernel, and for each kernel, the longest first.

    The kinds: attention, matrix products, other. A kernel: name, us, calls.
    """
    cuda = torch.cuda.is_available()  # of what the host does, nothing: that takes longer to list than to run
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA] if cuda else None) as recorded:
        for _ in range(n):
            work()
        if cuda:
            torch.cuda.synchronize()
    kernels = [
        dict(name=event.key[:120], us=event.self_device_time_total / n, calls=event.count / n)
        for event in recorded.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total and "#" not in event.key
    ]
    # "Optimizer.step#AdamW.step" is a mark around kernels, which the profiler lists as one.
    kernels.sort(key=lambda kernel: -kernel["us"])
    groups = dict.fromkeys((*GROUPS, "other"), 0.0)
    for kernel in kernels:  # FlashAttention's names say cutlass, too: the first kind that fits counts
        fitting = (kind for kind, words in GROUPS.items() if any(word in kernel["name"] for word in words))
        groups[next(fitting, "other")] += kernel["us"]
    return groups, kernels
