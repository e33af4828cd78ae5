"""Published attentions are settings of ours: the same outputs from the same weights.

Runs where transformers is installed; .ci/run has a job that installs it.
"""

import pytest
import torch
from attentions import difference, states

from mfa import MFAKR, Config

transformers = pytest.importorskip("transformers", minversion="5.10")


def half_split(width: int) -> torch.Tensor:
    """Where our rotated dimensions lie in theirs, which pair neighbours: i and i + w/2 -> 2i, 2i+1."""
    return torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))


@pytest.mark.parametrize("T", [1, 2, 30])
def test_the_core_of_deepseek_v4_s_attention_is_key_reuse_without_a_projection(T):
    """Without its compressed entries, sinks, and low-rank groups in the output projection."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    H, m, C, r, turned = 24, 3, 16, 10, 8
    theirs_cfg = DeepseekV4Config(
        hidden_size=H, num_attention_heads=m, head_dim=C, q_lora_rank=r, num_hidden_layers=1,
        layer_types=["sliding_attention"], partial_rotary_factor=turned / C, sliding_window=64,
        o_groups=1, o_lora_rank=m * C, rope_theta=100.0, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs_cfg._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = v4.DeepseekV4Attention(theirs_cfg, 0)
    ours = MFAKR(
        Config(
            attn="mfa_kr", dim=H, n_head=m, latent_dim=C, q_rank=r, latent_norm=True, qk_norm=True,
            key_reuse="vanilla", key_reuse_rope="inverse", rope_fraction=turned / C,
            rope_base=100.0, norm_eps=1e-6,
        )
    )  # fmt: skip
    order = torch.cat((torch.arange(C - turned), C - turned + half_split(turned)))
    of_heads = (torch.arange(m)[:, None] * C + order).flatten()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.3)
        ours.query_norm.weight.fill_(1)  # theirs has no gain there
        theirs.q_a_proj.weight.copy_(ours.s_q.weight)
        theirs.q_a_norm.weight.copy_(ours.q_norm.weight)
        theirs.q_b_proj.weight[of_heads] = ours.q.weight
        theirs.kv_proj.weight[order] = ours.s_k.weight
        theirs.kv_norm.weight[order] = ours.key_norm.weight
        theirs.o_a_proj.weight.copy_(torch.eye(m * C))
        theirs.o_b_proj.weight[:, of_heads] = ours.o.weight
        theirs.sinks.fill_(-torch.inf)
    x = states(ours.cfg, T=T).float()
    pos = torch.arange(T)[None]
    rotary = v4.DeepseekV4RotaryEmbedding(theirs_cfg)
    angles = {"main": rotary(x, pos, layer_type="main")}
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = theirs(x, angles, pos, mask)
        assert difference(ours(x), expected) < 1e-5
