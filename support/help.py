"""train.py --help, in groups: tyro puts all flags into one box."""

import re

GROUPS = {
    "the attention and its model": """attn preset n_layer dim n_head head_dim n_kv_head latent_dim
        q_rank mfa_n_head ffn_dim block_size vocab_size tied pos rope_base rope_fraction qk_norm
        dropout norm_eps init_std vo_std match_params""",
    "the run": """dataset file separator tokenizer packing out resume overwrite init_from plugin
        data_dir seed device dtype compile shard checkpoint_blocks threads log""",
    "training": """optimizer max_iters batch_size grad_accum learning_rate min_lr warmup_iters
        weight_decay beta2 grad_clip eval_interval eval_tokens log_interval""",
    "MLA": "joint_kv compress_query rope_dim latent_norm",
    "MFA-KR": "key_reuse key_reuse_rope",
    "experts": "n_expert n_expert_active moe_ffn_dim shared_ffn_dim balance_coef",
}


def grouped(text: str, groups: dict[str, str] = GROUPS) -> str:
    """tyro's help with its flags under the names of the groups; what is in none comes last.

    As it is, if it has none of these flags.
    """
    head, entries, entry = [], {}, None  # entries: flag -> its lines
    for line in text.splitlines():
        inner = re.sub("^[│|╭╰]|[│|╮╯]$", "", line).rstrip()
        flag = re.match(r" +--(\w+)", inner)
        if flag:
            entry = entries.setdefault(flag[1], [])
        if entry is not None and inner.startswith(" "):
            entry.append(inner if inner.startswith("  ") else f" {inner}")  # tyro 1.0 has one blank
        elif entry is None:
            head.append(line)
    if "attn" not in entries:
        return text
    title = next(at for at, line in enumerate(head) if "options" in line and "OPTIONS" not in line)
    out = head[:title]
    for name, flags in (*groups.items(), ("more", " ".join(entries))):
        found = [entries.pop(flag) for flag in flags.split() if flag in entries]
        if found:
            out += [f"{name}:", *(line for entry in found for line in entry), ""]
    return "\n".join(out)
