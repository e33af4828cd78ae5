"""What the tests of experiments/export.py, import_llama.py and hub/ share."""

from dataclasses import asdict
from pathlib import Path

import torch

from mfa import GPT, Config
from support.run_folder import FORMAT
from support.tokenizers import Tokenizer

SIZES = dict(
    vocab_size=257, block_size=48, n_layer=2, dim=24, n_head=4, n_kv_head=2, head_dim=8, latent_dim=12, rope_dim=4,
    ffn_dim=20, norm_eps=3e-5, rope_base=1000.0,
)  # fmt: skip


def small_gpt(cfg: Config) -> GPT:
    """In float32, all weights drawn anew, norms and gates included; large enough for logits far from flat."""
    model = GPT(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model.eval()


def some_ids(B: int = 2, T: int = 20, below: int = 256) -> torch.Tensor:
    return torch.randint(below, (B, T), generator=torch.Generator().manual_seed(1))


def checkpoint(path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """The model in a file as train.py writes it."""
    contents = dict(
        model=model.state_dict(), optimizer={}, scaler={}, config=asdict(model.cfg), tokenizer=tokenizer.spec(), data={},
        args={}, rng=torch.get_rng_state(), step=1, best_loss=1.0, seconds=1.0,
    )  # fmt: skip
    torch.save(dict(format=FORMAT, **contents), path)
    return path
