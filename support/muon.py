"""Muon (Jordan et al. 2024): a matrix's step is orthogonalised, so that all directions move alike.

torch.optim.Muon does the same one matrix at a time, which leaves a GPU idle and cannot become a
CUDA graph. Here matrices of one shape are stacked and take their steps together.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mfa import MFA, MHA, MLA, Attention
from support.machine import has_bfloat16

A, B, C = 3.4445, -4.7750, 2.0315  # the quintic x -> A x + B x^3 + C x^5 of Jordan et al.
SMALL = 1 << 24  # elements up to which a GPU takes longer to launch a step than to run it
AT_ONCE = 1 << 28  # elements that are stacked at most: a GB, where a 7B's experts would take 16


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T for G = U S V^T, (..., r, c): its singular values are moved to about 1.

    Newton-Schulz: each step applies the quintic to the singular values, which products do without
    a decomposition. In bfloat16 on a GPU that has it, where that is fast and good enough.
    """
    X = G.to(torch.bfloat16) if G.is_cuda and has_bfloat16(G.device) else G
    X = X.reshape(-1, *G.shape[-2:])  # (matrices, r, c)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = X @ X.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)  # B gram + C gram gram
        X = torch.baddbmm(X, polynomial, X, beta=A)  # A X + polynomial X
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def heads_apart(x: Tensor, n: int) -> Tensor:
    """A view of n stacked matrices: (..., n*w, r) -> (..., n, w, r), or for -n (..., r, n*w) ->
    (..., n, r, w).
    """
    if n > 0:
        return x.unflatten(-2, (n, -1))
    return x.unflatten(-1, (-n, -1)).transpose(-3, -2) if n < 0 else x


def heads_together(x: Tensor, n: int) -> Tensor:
    """The stacked matrices again: the inverse of heads_apart."""
    if n > 0:
        return x.flatten(-3, -2)
    return x.transpose(-3, -2).flatten(-2) if n < 0 else x


def local(x: Tensor) -> Tensor:
    """Of a sharded matrix the rows that this process keeps; else all of it."""
    return x.to_local() if hasattr(x, "to_local") else x


def gather(rows: Tensor, like: Tensor) -> Tensor:
    """k matrices (k, r, c) from every process' rows of them, if parameter like (r, c) is sharded.

    Orthogonalizing takes whole matrices. Each process does it to all of them and keeps its rows.
    """
    if not hasattr(like, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    whole = torch.empty(len(rows), *like.shape, device="meta")  # (k, r, c), for its strides
    how = dict(run_check=False, shape=whole.shape, stride=whole.stride())
    return DTensor.from_local(rows, like.device_mesh, stacked(like), **how).full_tensor()


def keep(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of gather, and nothing is sent."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    rows = distribute_tensor(whole, like.device_mesh, stacked(like), src_data_rank=None)
    return rows.to_local()


def stacked(like: Tensor) -> list:
    """How matrices are sharded in a stack, each as like is."""
    return [type(placement)(placement.dim + 1) for placement in like.placements]


def heads_in(attn: Attention) -> dict[str, int]:
    """How many heads a matrix stacks: n on its rows, -n on its columns. A plug-in's is whole."""
    n = attn.n_head
    if isinstance(attn, MHA):  # GQA and MQA, too
        return dict(q=n, k=attn.g, v=attn.g, o=-n)
    if isinstance(attn, MLA):
        return dict(q=n, q_rope=n, k=n, v=n, o=-n)
    return dict(q=n, o=-n) if isinstance(attn, MFA) else {}  # FPBA's W_c are no stack


def groups_of(blocks: Iterable[nn.Module], apart: bool) -> list[dict]:
    """The matrices of the blocks as Muon's groups: one group, or one for each number of heads."""
    groups = defaultdict(list)
    for block in blocks:
        heads = {f"attn.{name}.weight": n for name, n in heads_in(block.attn).items()}
        for name, p in block.named_parameters():
            if p.dim() >= 2:
                groups[heads.get(name, 0) if apart else 0].append(p)
    return [dict(params=params, heads=n) for n, params in groups.items()]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with the RMS of an AdamW step; decoupled weight decay.

    For parameters (..., r, c). An orthogonal (r, c) matrix has entries of about max(r, c)^-0.5, a
    step of AdamW about 0.2 in each: the factor 0.2 max(r, c)^0.5 lets one learning rate serve both
    (Liu et al. 2025, "Muon is scalable for LLM training"). A group with heads=n takes the n
    matrices that are stacked on the rows of its parameters one by one, heads=-n on the columns.
    """

    launch: "Launch | None" = None  # of the class, so that a copy has none
    stepped = False  # in this process, so that its kernels are chosen and loaded

    def __init__(self, params: Iterable, lr=1e-3, weight_decay: float = 0.1, momentum=0.95):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, heads=0)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """closure: of PyTorch's signature, not used."""
        if not (self.stepped and self.fits_one_launch()):
            self.step_all()
            self.stepped = True
            return
        fixed = self.fixed()
        if self.launch is None or self.launch.fixed != fixed:
            self.launch = Launch(self, fixed)
        self.launch()

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def fits_one_launch(self) -> bool:
        """A small model on one GPU, whose state is made, and no graph of others is captured."""
        params = self.params
        plain = all(p.is_cuda and p.grad is not None and self.state.get(p) for p in params)
        whole = not any(hasattr(p, "device_mesh") for p in params)
        small = sum(p.numel() for p in params) <= SMALL
        known = all(isinstance(group["lr"], float) for group in self.param_groups)
        alone = plain and not torch.cuda.is_current_stream_capturing()
        return plain and whole and small and known and alone

    def fixed(self) -> list:
        """What a graph of the step takes as it was: places in memory, and numbers."""
        tensors = [x for p in self.params for x in (p, self.state[p]["momentum"])]
        numbers = [[g[k] for k in ("weight_decay", "momentum", "heads")] for g in self.param_groups]
        return [x.data_ptr() for x in tensors] + numbers

    def step_all(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for some in at_most(params, AT_ONCE):
                self.step_together(some, group)

    def step_together(self, params: list[Tensor], group: dict) -> None:
        """One step of some parameters. Those of one shape are orthogonalized together."""
        lr, momentum, n = group["lr"], group["momentum"], group["heads"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [local(self.state[p]["momentum"]) for p in params]
        grads = [local(p.grad) for p in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, averages, momentum)  # Nesterov
        alike = defaultdict(list)
        for i, p in enumerate(params):
            alike[p.shape].append(i)
        steps = {}
        with side_by_side(params[0].is_cuda) as branch:
            for which in alike.values():
                with branch():
                    like, some = params[which[0]], torch.stack([ahead[i] for i in which])
                    whole = heads_apart(gather(some, like), n)  # (k, ..., r, c)
                    scale = 0.2 * max(whole.shape[-2:]) ** 0.5
                    direction = orthogonalize(whole) * (-lr * scale)
                    steps |= zip(which, keep(heads_together(direction, n), like), strict=True)
        params = [local(p) for p in params]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, [steps[i] for i in range(len(params))])


class Launch:
    """A step of Muon as one CUDA graph, as long as muon.fixed() stays what it is."""

    def __init__(self, muon: Muon, fixed: list):
        self.groups, self.params, self.fixed = muon.param_groups, muon.params, fixed
        self.grads = [torch.empty_like(p) for p in self.params]  # a graph reads the same places
        self.rates = [torch.zeros((), device=self.params[0].device) for _ in self.groups]
        grads, rates = [p.grad for p in self.params], [group["lr"] for group in self.groups]
        self.graph = torch.cuda.CUDAGraph()
        try:
            self.give(self.grads, self.rates)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                muon.step_all()
        finally:
            self.give(grads, rates)

    def give(self, grads: list[Tensor], rates: list) -> None:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        for group, rate in zip(self.groups, rates, strict=True):
            group["lr"] = rate

    def __call__(self) -> None:
        torch._foreach_copy_(self.grads, [p.grad for p in self.params])
        for group, rate in zip(self.groups, self.rates, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()


@contextlib.contextmanager
def side_by_side(on_gpu: bool):
    """branch(): a context; what is called in one runs beside what is called in others, and all
    before what comes next. In a CUDA graph alone, where streams cost nothing; else in turn.
    """
    if not on_gpu or not torch.cuda.is_current_stream_capturing():
        yield contextlib.nullcontext
        return
    main, streams = torch.cuda.current_stream(), []

    def branch():
        streams.append(torch.cuda.Stream())
        streams[-1].wait_stream(main)
        return torch.cuda.stream(streams[-1])

    try:
        yield branch
    finally:
        for stream in streams:
            main.wait_stream(stream)


def at_most(params: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """The parameters in order, in chunks of at most that many elements, or of one parameter."""
    some, size = [], 0
    for p in params:
        if some and size + p.numel() > elements:
            yield some
            some, size = [], 0
        some, size = [*some, p], size + p.numel()
    if some:
        yield some


class Both:
    """Two optimizers that step as one: Muon for matrices, AdamW for the rest."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return dict(muon=self.muon.state_dict(), adamw=self.adamw.state_dict())

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
