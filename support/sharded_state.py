"""What a sharded model and its optimizer say in a checkpoint: whole tensors under plain names.

So one process or many, sharded or not, can go on from what any of them saved. In all the
functions each process takes part; what they return is whole in the first, which writes it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mfa import GPT
from support.muon import Both

TO_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
Optimizer = torch.optim.Optimizer | Both


def is_sharded(model: GPT) -> bool:
    """And if it is, its parameters are the parts again, which they are not after an evaluation."""
    if hasattr(model, "reshard"):
        model.reshard()
    return hasattr(model, "reshard")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def weights_of(model: GPT) -> dict:
    """model.state_dict()."""
    if not is_sharded(model):
        return model.state_dict()
    weights = get_model_state_dict(model, options=TO_FIRST)
    if weights and model.cfg.tied:  # one tensor in the file, too
        weights["head.weight"] = weights["embed.weight"]
    return weights


def load_weights_of(model: GPT, weights: dict) -> None:
    """model.load_state_dict(weights); those of the first process count."""
    if is_sharded(model):
        weights = dict(weights) if dist.get_rank() == 0 else {}
        set_model_state_dict(model, weights, options=FROM_FIRST)
    else:
        model.load_state_dict(weights)


def state_of(model: GPT, optimizer: Optimizer) -> dict:
    """optimizer.state_dict()."""
    if isinstance(optimizer, Both):
        return {kind: state_of(model, part) for kind, part in vars(optimizer).items()}
    # Where there is no state yet, PyTorch would take a step of zeros, which AdamW would count.
    if not (is_sharded(model) and optimizer.state):
        return optimizer.state_dict()
    named = get_optimizer_state_dict(model, optimizer, options=TO_FIRST)
    numbers = {name: i for i, name in enumerate(names_of(model, optimizer))}
    return renamed(named, numbers) if dist.get_rank() == 0 else {}


def load_state_of(model: GPT, optimizer: Optimizer, state: dict) -> None:
    """optimizer.load_state_dict(state); that of the first process counts."""
    if isinstance(optimizer, Both):
        for kind, part in vars(optimizer).items():
            load_state_of(model, part, state[kind])
    elif is_sharded(model) and state["state"]:
        names = dict(enumerate(names_of(model, optimizer)))
        named = renamed(state, names) if dist.get_rank() == 0 else {}
        set_optimizer_state_dict(model, optimizer, named, options=FROM_FIRST)
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group |= {**saved, "params": group["params"]}  # PyTorch has made lists of its tuples
    else:
        optimizer.load_state_dict(state)


def names_of(model: GPT, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters in the order in which its state_dict counts them."""
    name = {p: name for name, p in model.named_parameters()}
    return [name[p] for group in optimizer.param_groups for p in group["params"]]


def renamed(state: dict, new: dict) -> dict:
    """An optimizer's state with other keys for its parameters: new[key] for key."""
    groups = [{**of, "params": [new[p] for p in of["params"]]} for of in state["param_groups"]]
    return dict(state={new[p]: of for p, of in state["state"].items()}, param_groups=groups)
