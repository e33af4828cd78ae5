"""Our models in transformers' words: config.json and the names of the weights.

A Llama is our MHA, GQA or MQA: its heads, its half-split rotation, its norms and its SwiGLU are
ours under other names, so that only names change. A DeepSeek-V2 is our MLA with a joint, normed
latent. It differs twice, and both are undone exactly in the weights:

    rotation    pairs neighbours, 2i and 2i + 1, where ours pairs i and i + d_r/2: the rows that
                make rotary queries and keys are reordered.
    norms       of latents have eps 1e-6, whatever rms_norm_eps says: x / sqrt(mean(x^2) + eps) is
                the same for a x and a^2 eps, so the rows that make the latent are scaled by
                a = sqrt(1e-6 / norm_eps).

Everything else is a model of its own, modeling_mfa.py, beside a copy of mfa.py.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from mfa import GPT, MLA, Config

LATENT_EPS = 1e-6  # of DeepSeek-V2's norms on latents

# ours -> a Llama's. {} is the number of the layer.
MODEL = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w3.weight": "mlp.up_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
}
HEADS = {f"attn.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"}
QK_NORM = {  # Qwen3's
    "attn.query_norm.weight": "self_attn.q_norm.weight",
    "attn.key_norm.weight": "self_attn.k_norm.weight",
}


def names(n_layer: int, attn: dict[str, str]) -> dict[str, str]:
    """Our name of each weight -> theirs; attn: those of an attention."""
    found = dict(MODEL)
    for i in range(n_layer):
        for ours, theirs in {**BLOCK, **attn}.items():
            found[f"blocks.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    return found


def kind_of(cfg: Config) -> str:
    """llama, deepseek_v2 or mfa: the model_type under which transformers can run a model."""
    shared = cfg.pos == "rope" and not cfg.n_expert and cfg.dim % cfg.heads == 0
    if cfg.attn in ("mha", "gqa", "mqa"):
        return "llama" if shared and cfg.rope_fraction == 1 and not cfg.qk_norm else "mfa"
    if cfg.attn == "mla":
        return "deepseek_v2" if shared and cfg.joint_kv and cfg.latent_norm else "mfa"
    return "mfa"


def exported(model: GPT, eos: int | None) -> tuple[dict, dict[str, Tensor]]:
    """What config.json says of a model, and its weights by transformers' names."""
    cfg = model.cfg
    kind = kind_of(cfg)
    config, weights = {"llama": llama, "deepseek_v2": deepseek_v2, "mfa": remote}[kind](model)
    if cfg.tied:
        del weights["gpt.head.weight" if kind == "mfa" else "lm_head.weight"]
    shared = dict(
        model_type=kind, dtype="float32", tie_word_embeddings=cfg.tied, use_cache=True,
        bos_token_id=eos, eos_token_id=eos, pad_token_id=None,
    )  # fmt: skip
    return {**shared, **config}, {name: w.contiguous() for name, w in weights.items()}


def shapes(cfg: Config) -> dict:
    """What a Llama's and a DeepSeek-V2's config.json have in common."""
    return dict(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.dim,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.heads, intermediate_size=cfg.ffn,
        rms_norm_eps=cfg.norm_eps, hidden_act="silu", attention_bias=False, mlp_bias=False,
        rope_theta=cfg.rope_base,  # for versions before 5
        rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_base),
    )  # fmt: skip


def renamed(model: GPT, attn: dict[str, str]) -> dict[str, Tensor]:
    weights = model.state_dict()
    return {theirs: weights[ours] for ours, theirs in names(model.cfg.n_layer, attn).items()}


def llama(model: GPT) -> tuple[dict, dict[str, Tensor]]:
    cfg, attn = model.cfg, model.blocks[0].attn
    config = dict(
        architectures=["LlamaForCausalLM"], **shapes(cfg),
        num_key_value_heads=attn.g, head_dim=cfg.head_dim,
    )  # fmt: skip
    return config, renamed(model, HEADS)


def deepseek_v2(model: GPT) -> tuple[dict, dict[str, Tensor]]:
    cfg = model.cfg
    config = dict(
        architectures=["DeepseekV2ForCausalLM"], **shapes(cfg), num_key_value_heads=cfg.heads,
        q_lora_rank=cfg.query_rank if cfg.compress_query else None, kv_lora_rank=cfg.latent,
        qk_nope_head_dim=cfg.head_dim, qk_rope_head_dim=cfg.rope_dim, v_head_dim=cfg.head_dim,
        first_k_dense_replace=cfg.n_layer,  # no layer has experts
    )  # fmt: skip
    weights = renamed(model, {})
    for i, block in enumerate(model.blocks):
        for name, weight in deepseek_v2_attention(block.attn).items():
            weights[f"model.layers.{i}.self_attn.{name}.weight"] = weight
    return config, weights


def deepseek_v2_attention(attn: MLA) -> dict[str, Tensor]:
    cfg, n = attn.cfg, attn.n_head
    a = (LATENT_EPS / cfg.norm_eps) ** 0.5
    w = {name: weight.detach() for name, weight in attn.named_parameters()}
    d_r = cfg.rope_dim
    order = torch.arange(d_r).view(2, -1).mT.flatten()  # 0, d_r/2, 1, d_r/2 + 1, ...
    q_rope = w["q_rope.weight"].unflatten(0, (n, d_r))[:, order]  # (n, d_r, r)
    q = torch.cat((w["q.weight"].unflatten(0, (n, -1)), q_rope), dim=1)  # (n, d + d_r, r)
    k = w["k.weight"].unflatten(0, (n, -1))  # (n, d, C)
    v = w["v.weight"].unflatten(0, (n, -1))  # (n, d, C)
    found = {
        "q_b_proj" if cfg.compress_query else "q_proj": q.flatten(0, 1),
        "kv_a_proj_with_mqa": torch.cat((a * w["s_kv.weight"], w["k_rope.weight"][order])),
        "kv_a_layernorm": w["kv_norm.weight"],
        "kv_b_proj": torch.cat((k, v), dim=1).flatten(0, 1),  # (n (d + d), C)
        "o_proj": w["o.weight"],
    }
    if cfg.compress_query:
        found |= {"q_a_proj": a * w["s_q.weight"], "q_a_layernorm": w["q_norm.weight"]}
    return found


def remote(model: GPT) -> tuple[dict, dict[str, Tensor]]:
    config, language_model = "MFAConfig", "MFAForCausalLM"  # of modeling_mfa.py
    where = {"AutoConfig": config, "AutoModelForCausalLM": language_model}
    config = dict(
        architectures=[language_model],
        auto_map={auto: f"modeling_mfa.{name}" for auto, name in where.items()},
        mfa=asdict(model.cfg),
    )
    return config, {f"gpt.{name}": weight for name, weight in model.state_dict().items()}
