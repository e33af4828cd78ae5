"""A model of mfa.py for transformers: AutoModelForCausalLM loads it with trust_remote_code=True.

This file and mfa.py lie beside an exported model's weights; torch and transformers are all they
need. The attentions run as they stand in mfa.py, on transformers' own cache.
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .mfa import GPT, Attention, Config

# transformers 5.2x calls `cache` what was `past_key_values`
CACHE = {"cache", "past_key_values"} & set(CausalLMOutputWithPast.__dataclass_fields__)


class MFAConfig(PretrainedConfig):
    """`mfa` holds the fields of mfa.Config; the others are what transformers asks every model."""

    model_type = "mfa"

    def __init__(self, mfa: dict | None = None, **kwargs):
        self.mfa = mfa or {}
        cfg = self.of_gpt()
        self.vocab_size, self.hidden_size = cfg.vocab_size, cfg.dim
        self.num_hidden_layers, self.num_attention_heads = cfg.n_layer, cfg.heads
        self.max_position_embeddings = cfg.block_size
        super().__init__(**{**kwargs, "tie_word_embeddings": cfg.tied})

    def of_gpt(self) -> Config:
        return Config(**self.mfa)


class Appended:
    """transformers' cache as mfa's attentions know one: a length, and append().

    A layer of it has keys and values, (B, heads, S, width). What an attention caches first are the
    keys; all else, joined along the width, the values: none of MFA-KR's, which are 0 wide.
    """

    def __init__(self, cache: Cache):
        self.cache, self.length = cache, int(cache.get_seq_length())

    def append(self, attn: Attention, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k, *others = new  # each (B, heads, T, width)
        v = torch.cat(others, dim=-1) if others else k[..., :0]  # (B, heads, T, widths)
        k, v = self.cache.update(k, v, attn.layer)  # (B, heads, S, width), (B, heads, S, widths)
        return k, *v.split([t.shape[-1] for t in others], dim=-1)  # each (B, heads, S, width)


class MFAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MFAConfig
    _tied_weights_keys = {"gpt.head.weight": "gpt.embed.weight"}

    def __init__(self, config: MFAConfig):
        super().__init__(config)
        self.gpt = GPT(config.of_gpt())
        self.post_init()

    def _init_weights(self, module):
        """GPT's own initialisation stays."""

    def get_input_embeddings(self):
        return self.gpt.embed

    def get_output_embeddings(self):
        return self.gpt.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache=None,
                past_key_values=None, use_cache: bool | None = None, labels: Tensor | None = None,
                logits_to_keep: int = 0, **kwargs):  # fmt: skip
        """Logits of input_ids (B, T), which follow what the cache holds.

        The prompts of a batch have one length, and the cache grows: ValueError for an
        attention_mask with padding, or for one that a cache of fixed size needs.
        """
        if attention_mask is not None and not (attention_mask.dim() == 2 and attention_mask.all()):
            what = "give prompts of one length, and no static cache"
            raise ValueError(f"attention_mask must be all ones, (B, S): {what}")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        h = self.gpt.hidden(input_ids, None if cache is None else Appended(cache))  # (B, T, H)
        logits = self.gpt.head(h[:, -logits_to_keep:])  # (B, T, vocab_size); 0 keeps all
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, **dict.fromkeys(CACHE, cache))
