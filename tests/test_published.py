"""Published attentions are settings of ours: the same outputs from the same weights.

Runs where transformers is installed; .ci/run has a job that installs it. Step-3's needs vLLM, too,
which it does not install.
"""

import pytest
import torch
from attentions import difference, states

from mfa import MFA, MFAKR, Config

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


class SoftmaxAttention(torch.nn.Module):
    """The formula, in place of vLLM's paged attention: compiled kernels and a scheduler's cache."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, **paging):
        super().__init__()
        self.width = head_size
        self.scale = scale

    def forward(self, q, k, v):
        """(T, m C), (T, C), (T, C) -> (T, m C)."""
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(0, 1) for t in (q, k, v))
        scores = self.scale * q @ k.mT  # (m, T, T), of one key head
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v  # (m, T, C)
        return y.transpose(0, 1).flatten(1)


@pytest.fixture
def step3(monkeypatch, tmp_path):
    """vLLM's module of Step-3, in one process on a CPU; norm and rotation by its PyTorch code."""
    pytest.importorskip("vllm", minversion="0.33")
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.models import step3_text

    monkeypatch.setattr(step3_text, "Attention", SoftmaxAttention)
    cfg = VllmConfig(
        device_config=DeviceConfig("cpu"), compilation_config=CompilationConfig(custom_ops=["none"])
    )
    with set_current_vllm_config(cfg):
        world = dict(world_size=1, rank=0, local_rank=0, backend="gloo")
        meeting_place = (tmp_path / "world").as_uri()
        parallel_state.init_distributed_environment(**world, distributed_init_method=meeting_place)
        parallel_state.initialize_model_parallel()
        yield step3_text
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@pytest.mark.parametrize("T", [1, 2, 30])
def test_step_3_s_attention_is_mfa_with_a_normed_query_of_rank_8_c(step3, T):
    """vLLM's layer from its configuration: projections, norm, rotation, and scale are its own.

    SoftmaxAttention stands in for the paged attention and is given that scale.
    """
    from vllm.transformers_utils.configs.step3_vl import Step3TextConfig

    published = Step3TextConfig()
    assert published.share_q_dim == 8 * published.head_dim
    H, m, C = 24, 3, 16
    theirs_cfg = Step3TextConfig(
        hidden_size=H, num_attention_heads=m, head_dim=C, share_q_dim=8 * C, intermediate_size=8,
        max_position_embedding=64, moe_layers_enum="1", rope_theta=100.0,
    )  # fmt: skip
    theirs = step3.Step3TextDecoderLayer(theirs_cfg, prefix="layers.0").self_attn
    ours = MFA(
        Config(
            attn="mfa", dim=H, n_head=m, latent_dim=C, q_rank=8 * C, latent_norm=True,
            rope_base=100.0, norm_eps=theirs_cfg.rms_norm_eps,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    x = states(ours.cfg, T=T).float()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.3)
        shared = torch.cat((ours.s_q.weight, ours.s_k.weight, ours.s_v.weight))
        theirs.qkv_proj.weight.copy_(shared)
        theirs.inter_norm.weight.copy_(ours.q_norm.weight)
        theirs.wq.weight.copy_(ours.q.weight)
        theirs.o_proj.weight.copy_(ours.o.weight)
        expected = torch.stack([theirs(torch.arange(T), one) for one in x])
        assert difference(ours(x), expected) < 1e-5
