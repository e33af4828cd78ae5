"""experiments/paper/hybrids.py: Table 6's attentions agree with Eq. 1, and with their counts."""

import pytest
import torch
from attentions import POSITIONS, config, difference, randomized, states, tokens

from experiments.paper.hybrids import HYBRIDS, hybrid_gpt
from experiments.paper.tables import ranks
from mfa import Config, KVCache

every_hybrid = pytest.mark.parametrize("name", HYBRIDS)
every_position = pytest.mark.parametrize("pos", POSITIONS)


def hybrid_config(pos: str) -> Config:
    return config("mla", pos)


@every_position
@every_hybrid
def test_a_hybrid_has_two_formulations_and_counts_that_are_right(name, pos):
    cfg = hybrid_config(pos)
    attn, x = randomized(HYBRIDS[name](cfg)), states(cfg)
    assert difference(attn(x), attn.factorization(x)) < 1e-12
    counts, measured = attn.counts(cfg), ranks(attn, offset=2)
    assert counts.params == sum(p.numel() for p in attn.parameters())
    assert counts.kv_cache == sum(heads * width for heads, width in attn.cache_shapes)
    assert measured.heads == [counts.rank + attn.rope_dim] * counts.heads
    assert measured.key_side == counts.shared_dim + attn.rope_dim


@every_position
@every_hybrid
def test_a_hybrids_cached_chunks_equal_the_full_pass(name, pos):
    model = randomized(hybrid_gpt(name, hybrid_config(pos))).eval()
    idx, cache = tokens(model.cfg), KVCache(model, 2, 17)
    assert cache.numel() == model.cfg.n_layer * 2 * 17 * HYBRIDS[name].counts(model.cfg).kv_cache
    logits = torch.cat(
        [model(chunk, cache=cache)[0] for chunk in idx.split([5, 1, 1, 7, 1, 2], dim=1)], dim=1
    )
    assert difference(logits, model(idx)[0]) < 1e-12


def test_a_hybrid_that_rotates_whole_heads_needs_an_even_head_dim():
    cfg = Config(attn="mla", head_dim=5)
    HYBRIDS["compressed_key"](cfg)
    with pytest.raises(
        ValueError, match="head_dim must be even, since pos='rope' rotates pairs, not 5"
    ):
        HYBRIDS["single_key"](cfg)
