"""A fast decode step: one token for every sequence of a batch, as CUDA graphs.

    for new in stream(model, idx, 500, decode=Decoder(model)):      # sample.py's stream

mfa.py decodes eagerly: for 20 layers the host launches hundreds of small kernels a token, and at
small batches the GPU waits for it. Here a step is compiled, captured once and replayed. Its
arithmetic stays that of query, to_cache and output in mfa.py; three things are said anew, and
tests/test_decode.py compares them with mfa.py:

    the cache       is written at a position that lies on the device, so that one graph serves all.
    absorbed MLA    (q_c K_c^T) c_j^T = q_c (c_j K_c)^T: the query goes into the latent space, and
                    the values are mixed there, before V_c. The keys and values of the heads, which
                    from_cache would form, never exist.
    attention       of one query per head. It sees all that is cached, so it needs no causal mask.
                    The n/g heads that share keys are the rows of one matrix product.

Without CUDA there are no graphs: the same functions, run eagerly, are what tests on a CPU compare.

Read on in this order: Decoder, the pieces of a step, attention by PyTorch, attention by Triton,
fused projections.
"""

import copy
import functools
import math
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfa
from mfa import GPT, Attention, Block, KVCache, alibi, at_least_float32
from support.machine import attention_kernels, can_compile

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU or a Mac
    triton = None

# --------------------------------------------------------------------------------------------------
# The decoder


def refusal(model: GPT) -> str | None:
    """Why Decoder cannot decode this model, in one line; None if it can."""
    eagerly = "decode this model eagerly"
    if model.cfg.n_expert:
        return f"experts are routed by the host: {eagerly}"
    for block in model.blocks:
        kind = type(block.attn)
        for name in ("visible", "mask", "attend", "forward"):
            if getattr(kind, name) is not getattr(Attention, name):
                return f"{kind.__name__} has its own {name}(), which the decoder ignores: {eagerly}"
    return None


def fastest_attention(model: GPT) -> str:
    """triton, the kernel below, where it can run and what is cached is what it reads; else sdpa.

    A plug-in's own from_cache would have to go through the whole capacity for it at each step.
    """
    weight = model.embed.weight
    if triton is None or not can_compile(weight.device) or weight.dtype == torch.float64:
        return "sdpa"
    for block in model.blocks:
        if from_cache_computes(block.attn) and not rotates_on_read(block.attn):
            return "sdpa"
    return "triton"


class Decoder:
    """decoder(model, new (B, 1), cache) -> logits (B, vocab_size); the cache advances by a token.

    attention is "triton", then the whole step is one CUDA graph, or "sdpa", PyTorch's own, which
    runs between one graph and the next on exactly what is filled. The graphs belong to a cache's
    tensors. A new cache means a new capture, a fraction of a second, unless it lies where the last
    one lay, as it does when one text is sampled after the other.

    The model must be in evaluation mode. The logits are overwritten by the next call. `compiled`
    fuses projections: the model's parameters keep their values and become views of larger tensors,
    so make the Decoder after the model's last .to() or load_state_dict(assign=True), which put
    other tensors in their place.

    Raises ValueError for a model that it cannot decode (see refusal), and when the cache or the
    context is full.
    """

    def __init__(self, model: GPT, attention: str | None = None, compiled: bool | None = None):
        why = refusal(model)
        if why:
            raise ValueError(why)
        self.model = model
        self.blocks = list(model.blocks)
        self.head = model.head
        self.cuda = model.embed.weight.is_cuda
        self.attention = attention or fastest_attention(model)
        self.embed_to_query = embed_to_query
        self.attention_to_query = attention_to_query
        self.attention_to_logits = attention_to_logits
        self.keys_and_values = keys_and_values
        if compiled is None:
            compiled = triton is not None and can_compile(model.embed.weight.device)
        if compiled:
            self.compile()
        self.cache = None  # a weak reference: the next cache can lie where this one lay
        self.addresses = None  # of the cache's tensors
        self.tables = {}  # Config -> rotary_table
        self.replay = None  # runs the captured graphs
        self.captures = 0

    @torch.no_grad()
    def compile(self) -> None:
        self.blocks = [with_fused_projections(block) for block in self.model.blocks]
        self.head = Projection(self.model.head.weight)
        self.embed_to_query = compile_once(embed_to_query)
        self.attention_to_query = compile_once(attention_to_query)
        self.attention_to_logits = compile_once(attention_to_logits)
        if any(rotates_on_read(block.attn) for block in self.model.blocks):
            self.keys_and_values = compile_once(keys_and_values)

    @torch.no_grad()
    def __call__(self, model: GPT, new: Tensor, cache: KVCache) -> Tensor:
        if model is not self.model:
            raise ValueError("this Decoder was made for another model")
        B, room = cache.batch_size, min(cache.capacity, self.model.cfg.block_size)
        if new.shape != (B, 1) or cache.length >= room:
            got = f"{tuple(new.shape)} behind {cache.length} tokens"
            most = f"({B}, 1) new ids and room for at most {room} tokens"
            raise ValueError(f"a step takes {most}, not {got}")
        if self.cache is None or self.cache() is not cache:
            self.bind(cache)
        self.new.copy_(new)
        self.pos.fill_(cache.length)
        self.length = cache.length + 1
        if self.replay is None:
            with attention_kernels(self.pos.device, decoding=True):
                self.step()  # compiles
                if self.cuda:
                    self.capture()  # computes nothing
        if self.replay is not None:
            self.replay()
        cache.length += 1
        return self.logits

    def bind(self, cache: KVCache) -> None:
        """Decode into this cache from now on; forget the graphs if it lies elsewhere."""
        self.cache = weakref.ref(cache)
        addresses = [(t.data_ptr(), t.shape, t.dtype) for layer in cache.layers for t in layer]
        if addresses == self.addresses:
            return
        self.addresses, self.replay = addresses, None
        like = cache.layers[0][0]
        self.new = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=like.device)
        self.pos = torch.zeros(1, dtype=torch.long, device=like.device)
        self.tables = {}
        if self.attention == "triton":
            for block in self.model.blocks:
                attn = block.attn
                if rotates_on_read(attn) and attn.cfg not in self.tables:
                    self.tables[attn.cfg] = rotary_table(attn, cache.capacity, like)

    def step(self) -> None:
        """One token, without graphs: self.new and self.pos -> self.logits."""
        x = y = None
        for layer in range(len(self.blocks)):
            x, q = self.query(layer, x, y)
            y = self.attend(layer, q)
        self.logits = self.last(x, y)

    def query(self, layer: int, x: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the attention of the layer before, or from the ids, to this layer's queries."""
        block, cached = self.blocks[layer], self.cache().layers[layer]
        if layer == 0:
            return self.embed_to_query(self.model.embed, block, self.new, self.pos, cached)
        return self.attention_to_query(self.blocks[layer - 1], block, x, y, self.pos, cached)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """(B, n, 1, w) -> (B, n, 1, w_v)."""
        attn, cached = self.model.blocks[layer].attn, self.cache().layers[layer]
        if self.attention == "triton":
            return attend_triton(attn, q, cached, self.pos, self.tables.get(attn.cfg))
        return attend_sdpa(attn, q, cached, self.length, self.keys_and_values)

    def last(self, x: Tensor, y: Tensor) -> Tensor:
        """From the last layer's attention to the logits: (B, vocab_size)."""
        norm, head = self.model.norm, self.head
        return self.attention_to_logits(self.blocks[-1], norm, head, x, y, self.pos)

    def capture(self) -> None:
        """Record the step as CUDA graphs, which self.replay runs."""
        self.captures += 1
        pool = torch.cuda.graph_pool_handle()

        def record(work: Callable):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = work()
            return graph, result

        if self.attention == "triton":
            graph, _ = record(self.step)
            self.replay = graph.replay
            return

        recorded = []
        x = y = None
        for layer in range(len(self.blocks)):
            graph, (x, q) = record(functools.partial(self.query, layer, x, y))
            y = self.attend(layer, q)  # a place for what replay() computes there
            recorded.append((graph, q, y))
        last_graph, self.logits = record(functools.partial(self.last, x, y))

        def replay() -> None:
            with attention_kernels(self.pos.device, decoding=True):
                for layer, (graph, q, y) in enumerate(recorded):
                    graph.replay()
                    y.copy_(self.attend(layer, q))
                last_graph.replay()

        self.replay = replay


@functools.cache
def compile_once(function: Callable) -> Callable:
    """dynamic: once for all batches above 1 and all capacities, once more for a batch of 1."""
    return torch.compile(function, dynamic=True, fullgraph=True)


# --------------------------------------------------------------------------------------------------
# The pieces of a step: new (B, 1), x (B, 1, H), pos (1,), cached: a layer's tensors of the cache


def embed_to_query(embed: nn.Module, block: Block, new: Tensor, pos: Tensor, cached: list[Tensor]):
    x = embed(new)  # (B, 1, H)
    return x, before_attention(block, x, pos, cached)


def attention_to_query(
    block: Block, following: Block, x: Tensor, y: Tensor, pos: Tensor, cached: list[Tensor]
):
    """All that lies between the attentions of two layers; all layers share one compilation."""
    x = after_attention(block, x, y, pos)  # (B, 1, H)
    return x, before_attention(following, x, pos, cached)


def attention_to_logits(
    block: Block, norm: nn.Module, head: nn.Module, x: Tensor, y: Tensor, pos: Tensor
) -> Tensor:
    x = norm(after_attention(block, x, y, pos))  # (B, 1, H)
    return at_least_float32(head(x)[:, -1])  # (B, vocab_size), as sampling wants it


def before_attention(block: Block, x: Tensor, pos: Tensor, cached: list[Tensor]) -> Tensor:
    """Write the token into the cache at pos and return its queries: (B, n, 1, w)."""
    attn = block.attn
    x = block.attn_norm(x)
    for tensor, new in zip(cached, attn.to_cache(x, pos), strict=True):
        tensor.index_copy_(2, pos, new.to(tensor.dtype))
    q = attn.query(x, pos)  # (B, n, 1, w)
    if not absorbs(attn):
        return q
    d = attn.cfg.head_dim
    K = attn.k.weight.unflatten(0, (attn.n_head, -1))  # (m, d, C)
    latent = torch.einsum("bmtd,mdc->bmtc", q[..., :d], K)  # (B, m, 1, C)
    return torch.cat((latent, q[..., d:]), dim=-1)  # (B, m, 1, C + d_r)


def after_attention(block: Block, x: Tensor, y: Tensor, pos: Tensor) -> Tensor:
    """Add the attention's output and the FFN to the residual: y (B, n, 1, w_v) -> (B, 1, H)."""
    attn = block.attn
    if absorbs(attn):
        V = attn.v.weight.unflatten(0, (attn.n_head, -1))  # (m, d, C)
        y = torch.einsum("bmtc,mdc->bmtd", y, V)  # (B, m, 1, d)
    x = x + attn.output(y.transpose(1, 2), pos)  # (B, 1, H)
    return x + block.ffn(block.ffn_norm(x))  # (B, 1, H)


def absorbs(attn: Attention) -> bool:
    """Are K_c and V_c taken into the query and the output? Not for a plug-in, which may differ."""
    return type(attn) is mfa.MLA


def keys_and_values(attn: Attention, cached: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The keys in parts, side by side in width, (B, g, S, .) each, and the values (B, g, S, w_v).

    MLA's keys are the latents, and the rotary key that all heads share.
    """
    if absorbs(attn):
        n_latent = len(attn.latents)
        rotary = cached[n_latent:]
        return [cached[0], *rotary], cached[n_latent - 1]
    k, v = attn.from_cache(*cached)
    if k.shape[1] != v.shape[1]:  # a plug-in's, each shared by other heads
        k, v = (t.repeat_interleave(attn.n_head // t.shape[1], dim=1) for t in (k, v))
    return [k], v


# --------------------------------------------------------------------------------------------------
# Attention by PyTorch


def attend_sdpa(
    attn: Attention, q: Tensor, cached: list[Tensor], length: int, read: Callable = keys_and_values
) -> Tensor:
    """Attention on the first `length` cached tokens: (B, n, 1, w) -> (B, n, 1, w_v)."""
    B, n = q.shape[:2]
    filled = [t[:, :, :length].to(q.dtype) for t in cached]
    parts, v = read(attn, filled)
    k = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]  # (B, g, S, w)
    g = k.shape[1]
    mask = None
    if attn.cfg.pos == "alibi":
        last = torch.arange(length, device=q.device)[-1:]
        mask = attn.mask(q, length, last).view(1, g, n // g, length)
    q = q.reshape(B, g, n // g, -1)  # heads that share keys, as if they were positions
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=attn.scale)  # (B, g, n/g, w_v)
    return y.reshape(B, n, 1, -1)


# --------------------------------------------------------------------------------------------------
# Attention by Triton: flash-decoding
#
# The keys of a head are cut into splits, so that few sequences, too, occupy the whole GPU. Each
# program goes through one split with the online softmax, and merge_kernel adds up the splits. The
# filled length is found on the device, hence one CUDA graph serves every length; no more than is
# filled is read, and a tensor that is both key and value is read once. Keys that are cached
# unrotated (MFA-KR, "pre") are rotated as they pass through.

# How the kernel is cut; experiments/bench/decoding.py --part kernels compares others.
BYTES_PER_STEP = 32768  # of keys and values, in one step of the loop
NUM_WARPS = 4
NUM_STAGES = 3  # steps of the loop that overlap
PROGRAMS_PER_SM = 3


def rotates_on_read(attn: Attention) -> bool:
    """Are the keys cached unrotated? A plug-in's from_cache does with them what it likes."""
    return type(attn) is mfa.MFAKR and attn.cfg.pos == "rope" and attn.key_reuse_rope == "pre"


def from_cache_computes(attn: Attention) -> bool:
    """Are the keys and values other than what is cached? Of a plug-in's from_cache nobody knows."""
    if type(attn) is mfa.MFAKR:
        return rotates_on_read(attn)
    return not absorbs(attn) and type(attn).from_cache is not Attention.from_cache


def unrotated_width(attn: Attention) -> int:
    """Of the latent key's C dimensions so many, the first, do not turn: Config.rope_fraction."""
    C = attn.cfg.latent
    return C - int(attn.rotated_width(attn.cfg, C))


def rotary_pairs(attn: Attention, device=None) -> tuple[Tensor, Tensor]:
    """The two dimensions of each of the C/2 pairs that the kernel rotates: (C/2,) twice.

    RoPE is half-split within what turns. What does not turn comes first and is paired likewise, to
    be rotated by an angle of 0. The kernel's column1 and column2 are the same two lists.
    """
    half = attn.cfg.latent // 2
    unrotated = unrotated_width(attn) // 2
    pair = torch.arange(half, device=device)
    first = pair + torch.where(pair < unrotated, 0, unrotated)
    second = pair + torch.where(pair < unrotated, unrotated, half)
    return first, second


def rotary_table(attn: Attention, capacity: int, like: Tensor) -> Tensor:
    """cos of all pairs, then sin, at every position: (capacity, C).

    In 16 bits where the keys have no more: float16, finer than bfloat16 between -1 and 1.
    """
    first, second = rotary_pairs(attn, like.device)
    units = torch.zeros(capacity, attn.cfg.latent, device=like.device)
    units[:, first] = 1  # which rotate() turns into the cosine there, and the sine in `second`
    turned = attn.rotate(units, torch.arange(capacity, device=like.device))
    kind = torch.float16 if like.element_size() == 2 else like.dtype
    return turned[:, torch.cat((first, second))].to(kind)


def number_of_splits(heads: int, steps: int, programs: int) -> int:
    """Into how many splits the keys of each head are cut, so that all programs work to the end.

    heads: key/value heads of all sequences; steps: of the loop, for all keys of one head; programs:
    how many the GPU runs at once.
    """

    def occupancy(splits: int) -> float:
        rounds = math.ceil(heads * splits / programs)
        return heads * splits / (rounds * programs)

    # 4: few keys take as long as a launch, however they are cut.
    choices = range(1, max(4, min(128, steps // 2)) + 1)
    best = max(map(occupancy, choices))
    return next(splits for splits in choices if occupancy(splits) >= 0.9 * best)


def attend_triton(
    attn: Attention, q: Tensor, cached: list[Tensor], pos: Tensor, table: Tensor | None = None
) -> Tensor:
    """Attention on the first pos + 1 cached tokens: (B, n, 1, w) -> (B, n, 1, w_v).

    table: rotary_table of an attention that rotates_on_read; without it from_cache rotates.
    """
    rotate = table is not None
    capacity = cached[0].shape[2]
    if rotate:
        k1 = v = cached[0]
        w1 = w2 = attn.cfg.latent // 2
        k2, stride2 = k1[..., w1:], k1.shape[-1]
        value_is_key = True
    else:
        if from_cache_computes(attn):
            cached = [t.to(q.dtype) for t in cached]  # where the kernel alone would read any
        parts, v = keys_and_values(attn, cached)
        value_is_key = v is parts[0]
        k1, k2 = parts[0].contiguous(), parts[-1].contiguous()
        v = v.contiguous()
        w1 = k1.shape[-1]
        stride2 = k2.shape[-1]
        w2 = stride2 if len(parts) > 1 else 0
    B, g, S, wv = v.shape
    if k1.shape[2] != capacity or S != capacity:
        name = type(attn).__name__
        raise ValueError(f"{name}.from_cache gives fewer tokens than it gets: use attention='sdpa'")
    n = q.shape[1]

    row_bytes = w1 + w2 + (0 if value_is_key and not rotate else wv)  # or the table's row, as wide
    row_bytes *= v.element_size()
    keys_per_step = 2 ** int(math.log2(BYTES_PER_STEP / row_bytes))
    keys_per_step = min(128, max(16, keys_per_step))
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    splits = number_of_splits(B * g, capacity // keys_per_step, PROGRAMS_PER_SM * sms)

    split_out = q.new_empty(splits, B * n, wv, dtype=torch.float32)
    split_max, split_sum = split_out.new_empty(2, splits, B * n)
    slope = table = split_out if table is None else table  # where there is none, it is not read
    if attn.cfg.pos == "alibi":
        slope = -alibi(n, pos + 1, pos, torch.float32).flatten()  # (n,): one step's bias
    attend_kernel[(B * g, splits)](
        q.contiguous(), k1, k2, v, table, slope, pos, split_out, split_max, split_sum, attn.scale,
        capacity, g, n // g,
        W1=w1, W2=w2, WV=wv, STRIDE1=k1.shape[-1], STRIDE2=stride2,
        BLOCK1=padded(w1), BLOCK2=padded(w2), BLOCKV=padded(w1 if rotate else wv),
        ROWS=padded(n // g), KEYS=keys_per_step, VALUE_IS_KEY=value_is_key,
        ALIBI=attn.cfg.pos == "alibi", ROTATE=rotate,
        UNROTATED=unrotated_width(attn) // 2 if rotate else 0,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    y = q.new_empty(B, n, 1, wv)
    merge_kernel[(B * n, triton.cdiv(wv, 32))](
        split_out, split_max, split_sum, y, B * n, splits, wv,
        SPLITS=triton.next_power_of_2(splits), BLOCKV=32,
    )  # fmt: skip
    return y


def padded(width: int) -> int:
    """The least power of two that a matrix product of Triton's takes."""
    return max(16, triton.next_power_of_2(width))


if triton is not None:

    @triton.jit
    def attend_kernel(
        q, k1, k2, v, table, slope, pos, split_out, split_max, split_sum, scale,
        capacity, G, R,  # G key/value heads, each shared by R query heads
        W1: tl.constexpr, W2: tl.constexpr, WV: tl.constexpr,  # widths of key parts and of value
        STRIDE1: tl.constexpr, STRIDE2: tl.constexpr,  # elements from one key to the next
        BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, BLOCKV: tl.constexpr, ROWS: tl.constexpr,
        KEYS: tl.constexpr, VALUE_IS_KEY: tl.constexpr, ALIBI: tl.constexpr,
        ROTATE: tl.constexpr, UNROTATED: tl.constexpr,
    ):  # fmt: skip
        """One split of one head's keys: the unnormalised output, the largest score, the exp's sum.

        The key has one part, or two: MLA's latent and rotary key, or with ROTATE the two lists of
        rotary_pairs, UNROTATED of which have an angle of 0; the value is both, unrotated. With
        VALUE_IS_KEY the value is the first part.
        """
        head = tl.program_id(0)  # sequence * G + key/value head
        split = tl.program_id(1)
        n_splits = tl.num_programs(1)
        length = tl.load(pos).to(tl.int32) + 1
        split_length = tl.cdiv(tl.cdiv(length, KEYS), n_splits) * KEYS
        start = split * split_length
        end = tl.minimum(start + split_length, length)
        first_key = head.to(tl.int64) * capacity  # a cache can have more than 2^31 elements

        r = tl.arange(0, ROWS)
        c1 = tl.arange(0, BLOCK1)
        c2 = tl.arange(0, BLOCK2)
        cv = tl.arange(0, BLOCKV)
        in_r = r < R
        in_1 = c1 < W1
        in_2 = c2 < W2
        column1 = c1
        column2 = c2  # counted from W1 on
        if UNROTATED > 0:  # rotary_pairs
            column1 = c1 + tl.where(c1 < UNROTATED, 0, UNROTATED)
            column2 = c2 + tl.where(c2 < UNROTATED, UNROTATED - W1, 0)
            if UNROTATED % 8 == 0 and W1 % 8 == 0:  # which the compiler does not see
                column1 = tl.max_contiguous(tl.multiple_of(column1, 8), 8)  # 16 bytes a load
                column2 = tl.max_contiguous(tl.multiple_of(column2, 8), 8)
        columnv = cv
        in_v = cv < WV
        if ROTATE:
            columnv = column1
            in_v = in_1

        row = head * R + r
        queries = q + row[:, None] * (W1 + W2)
        q1 = tl.load(queries + column1[None, :], mask=in_r[:, None] & in_1[None, :], other=0.0)
        if W2 > 0:
            of_q2 = in_r[:, None] & in_2[None, :]
            q2 = tl.load(queries + W1 + column2[None, :], mask=of_q2, other=0.0)  # (ROWS, BLOCK2)
        if ALIBI:
            bias = tl.load(slope + (head % G) * R + r, mask=in_r, other=0.0)  # (ROWS,)

        running_max = tl.full((ROWS,), float("-inf"), tl.float32)
        running_sum = tl.zeros((ROWS,), tl.float32)
        out = tl.zeros((ROWS, BLOCKV), tl.float32)
        out2 = tl.zeros((ROWS, BLOCK2), tl.float32)
        for first in range(start, end, KEYS):
            j = first + tl.arange(0, KEYS)
            filled = j < end
            at = (first_key + j)[:, None]
            mask1 = filled[:, None] & in_1[None, :]
            part1 = tl.load(k1 + at * STRIDE1 + column1[None, :], mask=mask1, other=0.0)
            part1 = part1.to(q1.dtype)  # (KEYS, BLOCK1)
            key1 = part1
            if W2 > 0:
                mask2 = filled[:, None] & in_2[None, :]
                part2 = tl.load(k2 + at * STRIDE2 + column2[None, :], mask=mask2, other=0.0)
                part2 = part2.to(q1.dtype)  # (KEYS, BLOCK2)
                key2 = part2
                if ROTATE:
                    angle = table + j[:, None] * STRIDE1 + c1[None, :]
                    cos = tl.load(angle, mask=mask1, other=0.0).to(tl.float32)
                    sin = tl.load(angle + W1, mask=mask1, other=0.0).to(tl.float32)
                    a = part1.to(tl.float32)
                    b = part2.to(tl.float32)
                    key1 = (a * cos - b * sin).to(q1.dtype)
                    key2 = (b * cos + a * sin).to(q1.dtype)
            s = tl.dot(q1, tl.trans(key1), input_precision="ieee")  # (ROWS, KEYS)
            if W2 > 0:
                s += tl.dot(q2, tl.trans(key2), input_precision="ieee")
            s *= scale
            if ALIBI:
                s += bias[:, None] * (j - (length - 1))[None, :].to(tl.float32)
            s = tl.where(filled[None, :], s, float("-inf"))

            new_max = tl.maximum(running_max, tl.max(s, 1))
            rescale = tl.exp(running_max - new_max)
            p = tl.exp(s - new_max[:, None])  # (ROWS, KEYS)
            running_sum = running_sum * rescale + tl.sum(p, 1)
            running_max = new_max
            if VALUE_IS_KEY:
                value = part1
            else:
                maskv = filled[:, None] & in_v[None, :]
                value = tl.load(v + at * WV + columnv[None, :], mask=maskv, other=0.0)
                value = value.to(q1.dtype)  # (KEYS, BLOCKV)
            weighted = tl.dot(p.to(q1.dtype), value, input_precision="ieee")  # (ROWS, BLOCKV)
            out = out * rescale[:, None] + weighted
            if ROTATE:
                weighted2 = tl.dot(p.to(q1.dtype), part2, input_precision="ieee")  # (ROWS, BLOCK2)
                out2 = out2 * rescale[:, None] + weighted2

        to = split * tl.num_programs(0) * R + row
        out_row = split_out + to[:, None] * WV
        tl.store(out_row + columnv[None, :], out, mask=in_r[:, None] & in_v[None, :])
        if ROTATE:
            tl.store(out_row + W1 + column2[None, :], out2, mask=in_r[:, None] & in_2[None, :])
        tl.store(split_max + to, running_max, mask=in_r)
        tl.store(split_sum + to, running_sum, mask=in_r)

    @triton.jit
    def merge_kernel(
        split_out, split_max, split_sum, y, rows, n_splits, WV,
        SPLITS: tl.constexpr, BLOCKV: tl.constexpr,
    ):  # fmt: skip
        """BLOCKV columns of one row of y (rows, w_v).

        From split_out (n_splits, rows, w_v), split_max and split_sum (n_splits, rows).
        """
        row = tl.program_id(0)
        c = tl.program_id(1) * BLOCKV + tl.arange(0, BLOCKV)
        split = tl.arange(0, SPLITS)
        at = split * rows + row
        here = split < n_splits
        in_v = c < WV
        maxima = tl.load(split_max + at, mask=here, other=float("-inf"))  # (SPLITS,)
        sums = tl.load(split_sum + at, mask=here, other=0.0)  # (SPLITS,)
        mask = here[:, None] & in_v[None, :]
        out = tl.load(split_out + at[:, None] * WV + c[None, :], mask=mask, other=0.0)
        rescale = tl.exp(maxima - tl.max(maxima, 0))  # 0 for a split without keys
        total = tl.sum(rescale * sums, 0)
        tl.store(y + row * WV + c, tl.sum(rescale[:, None] * out, 0) / total, mask=in_v)


# --------------------------------------------------------------------------------------------------
# Fused projections: matrices that multiply the same vector (S_q, S_k and S_v, say) lie side by side
# in memory and are multiplied at once. For so few tokens a product costs its launch.

FUSED = (mfa.MHA, mfa.GQA, mfa.MQA, mfa.MLA, mfa.MFA, mfa.MFAKR)  # not plug-ins, see fused
GEMV_LIMIT = 1 << 20  # elements; a larger matrix, as of paper-1b, is cuBLAS's also for one vector


class Projection(nn.Module):
    """x W^T, where W may be several matrices, side by side."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        one_vector = x.numel() == x.shape[-1]
        if not one_vector or self.weight.numel() > GEMV_LIMIT:
            return F.linear(x, self.weight)
        # As sums the compiler fuses it with what stands around it; a product is a kernel by itself.
        products = at_least_float32(self.weight) * at_least_float32(x).flatten()
        return products.sum(-1).to(x.dtype).view(*x.shape[:-1], -1)


class Slice(nn.Module):
    """One matrix's share of a Projection's output."""

    def __init__(self, start: int, width: int):
        super().__init__()
        self.start, self.width = start, width

    def forward(self, projected: Tensor) -> Tensor:
        return projected.narrow(-1, self.start, self.width)


def with_fused_projections(block: Block) -> Block:
    """A copy of the block that shares its parameters, with its projections fused."""
    twin, attn = copy.copy(block), block.attn
    twin._modules = dict(block._modules)
    x = block.attn_norm.weight.new_zeros(1, 1, attn.cfg.dim)
    pos = torch.zeros(1, dtype=torch.long, device=x.device)

    def project(x: Tensor) -> None:
        attn.query(x, pos)
        attn.to_cache(x, pos)

    if type(attn) in FUSED:
        twin.attn_norm, twin.attn = fused(block.attn_norm, attn, project, x)
    twin.ffn_norm, twin.ffn = fused(block.ffn_norm, block.ffn, block.ffn, x)
    return twin


def fused(
    norm: nn.Module, module: nn.Module, project: Callable, x: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Copies of a norm and of the module behind it: the norm projects, too, the module slices.

    project(x) calls the module's projections, to see which of them take x itself. The others, of a
    latent or of a head's output, become Projections of their own. A plug-in might use a matrix for
    two things, or add a bias.
    """
    names = {child: name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    of_x = linears_of(x, list(names), project)
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for child, name in names.items():
        twin._modules[name] = Projection(child.weight)
    start = 0
    for child in of_x:
        twin._modules[names[child]] = Slice(start, child.out_features)
        start += child.out_features
    weight = side_by_side([child.weight for child in of_x])
    return nn.Sequential(norm, Projection(weight)), twin


def linears_of(x: Tensor, linears: list[nn.Linear], project: Callable) -> list[nn.Linear]:
    """Those of the linears that project(x) calls with x itself, in this order."""
    found = []

    def note(child: nn.Module, args: tuple) -> None:
        if args[0] is x:
            found.append(child)

    hooks = [child.register_forward_pre_hook(note) for child in linears]
    project(x)
    for hook in hooks:
        hook.remove()
    return found


def side_by_side(weights: list[nn.Parameter]) -> Tensor:
    """One matrix of all rows, of which the weights become views, if they are not views already."""
    rows = [len(w) for w in weights]
    columns = weights[0].shape[1]
    first, last = weights[0].data, weights[-1].data
    ends = [w.data_ptr() + w.nbytes for w in weights]
    adjacent = all(w.data_ptr() == end for w, end in zip(weights[1:], ends, strict=False))
    if adjacent and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr():
        return first.as_strided((sum(rows), columns), (columns, 1))
    matrix = torch.cat([w.data for w in weights])
    for w, view in zip(weights, matrix.split(rows), strict=True):
        w.data = view
    return matrix
