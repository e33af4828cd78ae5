"""What support/train_flags.py says of flags. Most of it is tested through train.py's command line."""

from dataclasses import replace

import pytest

from mfa import preset
from support.train_flags import not_used

EXPERTS = dict(n_expert=4, n_expert_active=1, moe_ffn_dim=32, shared_ffn_dim=16, balance_coef=0.1)


@pytest.mark.parametrize(
    "attn, changed, told",
    [
        ("mha", dict(latent_dim=32, head_dim=16), ["latent_dim"]),
        ("mha", dict(n_expert_active=3, dropout=0.1), ["n_expert_active"]),
        ("mha", dict(balance_coef=0.1), ["balance_coef"]),
        ("gqa", dict(n_kv_head=1, latent_norm=True), ["latent_norm"]),
        ("mla", dict(compress_query=False, q_rank=8, joint_kv=True), ["q_rank"]),
        ("mfa", dict(n_head=4, mfa_n_head=8), ["mfa_n_head"]),
        ("mfa", dict(key_reuse="vanilla", q_rank=8, latent_norm=True), ["key_reuse"]),
        ("mfa_kr", dict(key_reuse="vanilla", key_reuse_rope="inverse", rope_fraction=0.5), []),
        ("mfa", EXPERTS | dict(ffn_dim=64, tied=False, vo_std=0.1, norm_eps=1e-6), []),
        ("fpba", dict(dim=16, block_size=8, n_layer=3, vocab_size=9), []),
    ],
)
def test_a_flag_that_the_model_does_not_read_is_told(attn, changed, told):
    start = preset("tiny", attn)
    assert not_used(replace(start, **changed), start) == told
