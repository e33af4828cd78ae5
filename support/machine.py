"""The machine that a training runs on: device, dtype, kernels, processes and signals.

`Machine` is the one door; the functions below it serve programs that train nothing.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mfa import GPT
from support.cli import BadInput, reader_has_gone
from support.files import WINDOWS

# --------------------------------------------------------------------------------------------------
# Device and dtype


def pick_device(name: str) -> torch.device:
    """The device called name; for "auto", what this machine has: cuda, else mps, else cpu."""
    if name == "auto":
        return working_device()
    device, why = tried(name)
    if device is None:
        what = f"does not work: {why}" if device_is_there(name) else "not on this machine"
        raise BadInput(f"--device {name}: {what}; --device auto takes what there is")
    return device


def device_is_there(name: str) -> bool:
    """Does PyTorch say so of cuda, cuda:1, mps?"""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return there.get(name.partition(":")[0], lambda: False)()


def tried(name: str) -> tuple[torch.device | None, str]:
    """The device, None if nothing can be computed on it, and the first line of why."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        return None, str(e).partition("\n")[0]
    return device, ""


@functools.cache
def working_device() -> torch.device:
    """The first that works; one that is there and does not, as a GPU too old for this torch, is
    passed over, and that is said once.
    """
    for name in filter(device_is_there, ("cuda", "mps")):
        device, why = tried(name)
        if device is not None:
            return device
        print(f"--device auto: {name} is there, but does not work: {why}", file=sys.stderr)
    return torch.device("cpu")


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Does a CUDA GPU compute in it, not by emulation?"""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; for "auto" bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    return getattr(torch, name)


def can_compile(device: torch.device) -> bool:
    """torch.compile always pays on a GPU; it needs capability 7, Triton and Triton's C compiler."""
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    capable = has_triton and torch.cuda.get_device_capability(device) >= (7, 0)
    return capable and (WINDOWS or has_compiler("CC", "gcc", "clang", "cc"))


def require_compiler(device: torch.device) -> None:
    """BadInput if --compile cannot work here."""
    names = ("CXX", "cl") if WINDOWS else ("CXX", "g++", "clang++")
    if device.type == "cpu" and not has_compiler(*names):
        what = f"needs a C++ compiler on a CPU, and there is no {' or '.join(names[1:])}"
        raise BadInput(f"--compile {what}: leave it out")
    if device.type == "cuda" and not can_compile(device):
        what = "needs Triton, a C compiler (gcc or clang) and a GPU of capability 7 or more"
        raise BadInput(f"--compile {what}: give --no-compile")


def has_compiler(variable: str, *names: str) -> bool:
    """Is one of them there, or the one that the environment names?"""
    own = os.environ.get(variable)
    return any(map(shutil.which, (own, *names) if own else names))


def keep_memory(device: torch.device) -> None:
    """Stops glibc from returning memory to the system after every step: a fifth of it on a CPU."""
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
            mallopt(trim_threshold, 1 << 30)
            mallopt(mmap_threshold, 1 << 25)  # the most it takes


def attention_kernels(device: torch.device, decoding: bool = False):
    """On a GPU, cuDNN's attention first: 1.7 times FlashAttention's speed at MFA's width of 256.

    Not in decoding, where it plans anew for every length: 40 ms for each token of a new text.
    PyTorch keeps its plan of a backward pass by the sizes and strides of q, k and v, and reads
    every later gradient of o, whatever its strides, as that of the first (torch 2.11,
    ATen/native/cudnn/MHA.cpp): in one process these strides must be the same in all models, so
    Attention.output must not change the order in memory of what attend() returns.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not decoding:
        order = [SDPBackend.CUDNN_ATTENTION, *order]
    cuda = device.type == "cuda"
    return sdpa_kernel(order, set_priority=True) if cuda else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------
# Signals


PIPE_CLOSED = 13  # SIGPIPE, which Windows does not have: a shell reports 141


class Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP let the step be finished and saved first.

    `caught` is the number of the signal, or 0. A second Ctrl-C ends at once. A SIGHUP that nohup
    ignores stays ignored. In a thread other than the main one Python has no signals: there the end
    of Python itself, which Ctrl-C in the main thread brings about, counts as SIGINT and waits.
    """

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last two: unknown, known to Windows

    def __init__(self):
        self.caught, self.before, self.left = 0, {}, threading.Event()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in self.names:
                number = getattr(signal, name, None)
                if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self.catch)
        else:
            atexit.register(self.python_ends)
        return self

    def catch(self, number, frame) -> None:
        self.caught = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def python_ends(self) -> None:
        self.caught = signal.SIGINT
        self.left.wait()
        time.sleep(0.2)  # for the thread to end, which a join() that was interrupted does not do

    def leave(self) -> None:
        """The last word of the training is said."""
        self.left.set()
        atexit.unregister(self.python_ends)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


# --------------------------------------------------------------------------------------------------
# The door

# DDP would free the group of processes together with itself. That waits for gloo's thread, while
# Python is locked, and gloo's thread may wait for Python.
NEVER_FREED: list[dist.ProcessGroup] = []


class Machine:
    """One process' view of what a training runs on. Entered once; alone unless torchrun started it.

    device, dtype         where, and in what precision products are computed
    scaler                of losses in float16; it does nothing in other dtypes
    rank, world           this process and how many there are
    shard                 does each of them keep only its part of the model?
    signal                what ends the training early, known to all processes alike; 0: nothing
    """

    def __init__(
        self, device: str = "auto", dtype: str = "auto", threads: int = 0, shard: bool = False
    ):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.shard = shard and self.world > 1
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.world > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # where kernels are compiled and launched
        self.dtype = pick_dtype(dtype, self.device)
        if self.shard and self.dtype == torch.float16:
            what = "scales its loss, which is not done here for gradients that are shared out"
            raise BadInput(f"--shard: float16 {what}: give --dtype bfloat16 or float32")
        if shard and not self.shard:
            self.print("--shard: one process alone keeps everything; torchrun starts more")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.signals, self.signal, self.parallel = Signals(), 0, None
        self.threads, self.threads_before = threads, 0

    def __enter__(self) -> "Machine":
        keep_memory(self.device)
        if self.threads:
            self.threads_before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("high")
        if self.world > 1:
            gpu = self.device if self.device.type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
        return self

    def __exit__(self, *_) -> None:
        self.signals.leave()
        if self.threads_before:
            torch.set_num_threads(self.threads_before)
        if self.world > 1:
            NEVER_FREED.append(dist.group.WORLD)
            dist.destroy_process_group()

    @contextlib.contextmanager
    def training(self):
        """Fast attention kernels, and signals that wait for the end of a step."""
        with attention_kernels(self.device), self.signals:
            yield

    def autocast(self):
        """Matrix products in self.dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def first(self) -> bool:
        """Does this process write and print?"""
        return self.rank == 0

    def print(self, line: str) -> None:
        """A line on the terminal, once. A reader that has gone ends training as SIGTERM does."""
        if not self.first:
            return
        try:
            print(line, flush=True)
        except OSError as e:
            if not reader_has_gone(e):
                raise
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            self.signals.caught = self.signals.caught or PIPE_CLOSED

    def once(self, work: Callable):
        """work() in the first process, then in the others, which find it done.

        What goes wrong in the first ends all of them, and is told once.
        """
        if self.world == 1:
            return work()
        result = failed = None
        if self.first:
            try:
                result = work()
            except (BadInput, OSError) as e:
                failed = e
        ended = [failed is not None]
        dist.broadcast_object_list(ended)
        if ended[0]:
            raise failed or SystemExit(2)
        return result if self.first else work()

    def sum(self, x: Tensor) -> Tensor:
        """x (...) summed over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def agree(self) -> None:
        """All processes call this at the same step, and stop there if any of them got a signal."""
        self.signal = self.signals.caught
        if self.world > 1:
            flag = torch.tensor(self.signal, device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = int(flag)

    def place(self, model: GPT, checkpoint_blocks: bool = False) -> GPT:
        """The model on this device, or of a sharded one this process' part. To be called before
        the optimizer is made, which then keeps its state for that part alone.

        checkpoint_blocks: backward computes what is inside a block anew, instead of keeping it.
        """
        if checkpoint_blocks:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return self.sharded(model) if self.shard else model.to(self.device)

    def sharded(self, model: GPT) -> GPT:
        """FSDP2: each process keeps 1/world of each weight, and with it of gradient and optimizer.

        A block's weights are gathered while it runs, in self.dtype, and its gradients are summed
        over the processes in float32. What is no block (embedding and head, which may be one
        tensor, and the last norm) is gathered for the whole step.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes two seconds

        for name, p in model.named_parameters():
            if p.dim() == 0:  # of a plug-in
                what = f"{name} is a number by itself, which cannot be shared out"
                raise BadInput(f"--shard: {what}: make it a vector of one, or leave --shard out")
        low = self.dtype if self.dtype != torch.float32 else None
        how = dict(
            mesh=init_device_mesh(self.device.type, (self.world,)),
            mp_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        )
        for block in model.blocks:
            fully_shard(block, **how)
        return fully_shard(model, **how)

    def loss_function(
        self, model: GPT, compile: bool = False, graphs: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """What a step differentiates: tokens (B, T + 1) -> the mean loss.

        In bfloat16 the residual stream is bfloat16 too. graphs: CUDA graphs, since launching a
        small model's kernels one by one takes twice as long as running them. model itself stays
        plain: it is what is saved and evaluated.
        """
        if self.dtype == torch.bfloat16:
            model.embed.register_forward_hook(residual_in_bfloat16)
            # RMSNorm's gains stay float32.
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        runner = model
        if self.world > 1 and not self.shard:
            ids = [self.device.index] if self.device.type == "cuda" else None
            runner = self.parallel = DistributedDataParallel(model, device_ids=ids)

        def loss_of(tokens: Tensor) -> Tensor:
            ids = tokens[:, :-1].clamp(min=0)  # -1 is a target that does not count
            # Logits that left the compiled graph would get a gradient of zeros.
            return runner(ids, tokens[:, 1:])[1]

        if not compile:
            return loss_of
        if self.shard:  # gathering the weights is no part of a graph, so each block has its own
            for block in model.blocks:
                block.forward = compiled_in_training(block)
            return loss_of
        return torch.compile(loss_of, mode="reduce-overhead" if graphs else None)

    def accumulating(self, more: bool):
        """Around a backward pass after which `more` follow before the step: gradients are averaged
        over the processes once a step. Those of a sharded model are after each: kept whole till
        the last, they would take as much memory as a model that is not sharded.
        """
        wait = self.parallel is not None and more
        return self.parallel.no_sync() if wait else contextlib.nullcontext()


def compiled_in_training(block: torch.nn.Module) -> Callable:
    """block.forward, compiled. Evaluation, with its other shapes, takes the plain one."""
    plain, fast = block.forward, torch.compile(block.forward)
    return lambda *args: (fast if block.training else plain)(*args)


def residual_in_bfloat16(module, ids: Tensor, x: Tensor) -> Tensor:
    """Forward hook of the embedding: under autocast the residual stream is bfloat16."""
    return x.to(torch.bfloat16) if torch.is_autocast_enabled(x.device.type) else x


def leave(signal_number: int) -> None:
    """Ends the process with the exit code that belongs to a signal; 0: as it ends by itself."""
    code = 128 + signal_number if signal_number else 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A thread of gloo may hold a tensor yet: torch 2.13 aborts if Python itself ends.
        sys.stdout.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def is_out_of_memory(e: BaseException) -> bool:
    """Is it that, and not another fault of the device whose message speaks of memory?"""
    words = ("memory: you tried to allocate", "MPS backend out of memory")  # a CPU's, Apple's
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(e, kinds) or any(word in str(e) for word in words)
