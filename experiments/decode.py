"""A fast decode step: one token for every sequence of a batch, as CUDA graphs, for any model of mfa.py without experts.

    model.generate(idx, 500, decode=Decoder(model))

mfa.py decodes eagerly: for 20 layers the host launches hundreds of small kernels a token, and at small batches the GPU waits
for it. Here they are compiled, captured once and replayed. The arithmetic stays that of query, remember and output in mfa.py;
only three things are said anew, and tests/test_decode.py compares them with mfa.py:

    attention      One query for each sequence. The n/g heads of a key/value head stand beside each other as rows of one
                   product, so no kernel needs to know about groups; one token attends to all that is kept, so none needs
                   causality. attend_kernel (Triton) finds the filled length on the device, hence one graph serves every
                   length; it reads no more than is filled, and a tensor that is both key and value only once. Keys that
                   are kept unrotated (MFA-KR, "pre") are turned as they pass through it.
    absorbed MLA   (q_c K_c^T) c_j^T = q_c (c_j K_c)^T: the query goes into the latent space, and the values are mixed there,
                   before V_c; the keys and values of the heads are never formed.
    the cache      is written at a position that lies on the device too.

Matrices that multiply the same vector (S_q, S_k and S_v, say) lie side by side in memory and are multiplied at once: for so
few tokens a product costs its launch. Where there is no Triton, attention is PyTorch's own, called between the graphs on
exactly what is filled. Without CUDA there are no graphs: the same steps, run eagerly, which is what the tests on a CPU compare.
"""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfa import GPT, MLA, Attention, Block, KVCache, alibi, rotate, widen
from train import attention_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU or a Mac
    triton = None

# ---------------------------------------------------------------------------------------------------------------------
# Attention of one query per head on what the cache holds

# Bytes of keys and values that one step of the kernel's loop reads, how many warps share it, how many steps overlap, and how
# many such programs one multiprocessor holds at a time: bench_decode.py --part kernels compares them.
TILE, WARPS, STAGES, PER_SM = 32768, 4, 3, 3
SMALL = 1 << 20  # elements of a matrix that a batch of one multiplies by sums; for those of paper-1b cuBLAS is faster

if triton is not None:

    @triton.jit
    def attend_kernel(
        q, k, k2, v, table, slope, pos, acc, top, total, scale, capacity, G, R,  # R: rows of a product, the n/g heads
        W: tl.constexpr, W2: tl.constexpr, WV: tl.constexpr,  # widths of the key's two parts and of the value
        L: tl.constexpr, L2: tl.constexpr,  # elements from one key to the next, in either part
        BW: tl.constexpr, BW2: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,  # padded; N keys a step
        SAME: tl.constexpr, ALIBI: tl.constexpr, ROTATE: tl.constexpr,
    ):  # fmt: skip
        """Part `split` of the keys of one key/value head: the softmax's numerator, its largest score and its sum.

        SAME: the key's first part is the value. ROTATE: the two parts are the halves that rotate() pairs; the value is both,
        unrotated; table has the cosines and sines of each position.
        """
        pair, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)  # pair: sequence * g + head
        S = tl.load(pos).to(tl.int32) + 1
        share = tl.cdiv(tl.cdiv(S, N), splits) * N
        start = split * share
        end = tl.minimum(start + share, S)
        r, c, c2, cv = tl.arange(0, M), tl.arange(0, BW), tl.arange(0, BW2), tl.arange(0, BV)
        row, kept = pair * R + r, pair.to(tl.int64) * capacity  # 64 bits: a cache has more than 2^31 elements
        queries = q + row[:, None] * (W + W2)
        q1 = tl.load(queries + c[None, :], mask=(r < R)[:, None] & (c < W)[None, :], other=0.0)  # (M, BW)
        if W2 > 0:
            q2 = tl.load(queries + W + c2[None, :], mask=(r < R)[:, None] & (c2 < W2)[None, :], other=0.0)  # (M, BW2)
        if ALIBI:
            bias = tl.load(slope + (pair % G) * R + r, mask=r < R, other=0.0)  # (M,)
        most = tl.full((M,), float("-inf"), tl.float32)
        summed = tl.zeros((M,), tl.float32)
        out = tl.zeros((M, BV), tl.float32)
        out2 = tl.zeros((M, BW2), tl.float32)
        for first in range(start, end, N):
            j = first + tl.arange(0, N)
            filled = j < end
            at = (kept + j)[:, None]
            first_half = filled[:, None] & (c < W)[None, :]
            k1 = tl.load(k + at * L + c[None, :], mask=first_half, other=0.0).to(q1.dtype)  # (N, BW)
            turned = k1
            if W2 > 0:
                more = tl.load(k2 + at * L2 + c2[None, :], mask=filled[:, None] & (c2 < W2)[None, :], other=0.0).to(q1.dtype)
                turned2 = more  # (N, BW2)
                if ROTATE:
                    angle = table + j[:, None] * L + c[None, :]
                    cos = tl.load(angle, mask=first_half, other=0.0).to(tl.float32)
                    sin = tl.load(angle + W, mask=first_half, other=0.0).to(tl.float32)
                    a, b = k1.to(tl.float32), more.to(tl.float32)
                    turned = (a * cos - b * sin).to(q1.dtype)
                    turned2 = (b * cos + a * sin).to(q1.dtype)
            s = tl.dot(q1, tl.trans(turned), input_precision="ieee")  # (M, N)
            if W2 > 0:
                s += tl.dot(q2, tl.trans(turned2), input_precision="ieee")
            s *= scale
            if ALIBI:
                s += bias[:, None] * (j - (S - 1))[None, :].to(tl.float32)
            s = tl.where(filled[None, :], s, float("-inf"))
            now = tl.maximum(most, tl.max(s, 1))
            p = tl.exp(s - now[:, None])
            fade = tl.exp(most - now)
            summed = summed * fade + tl.sum(p, 1)
            if SAME:
                value = k1
            else:
                value = tl.load(v + at * WV + cv[None, :], mask=filled[:, None] & (cv < WV)[None, :], other=0.0).to(q1.dtype)
            out = out * fade[:, None] + tl.dot(p.to(q1.dtype), value, input_precision="ieee")  # (M, BV)
            if ROTATE:
                out2 = out2 * fade[:, None] + tl.dot(p.to(q1.dtype), more, input_precision="ieee")  # (M, BW2)
            most = now
        to = split * tl.num_programs(0) * R + row
        if ROTATE:
            tl.store(acc + to[:, None] * WV + W + c2[None, :], out2, mask=(r < R)[:, None] & (c2 < W2)[None, :])
        tl.store(acc + to[:, None] * WV + cv[None, :], out, mask=(r < R)[:, None] & (cv < (W if ROTATE else WV))[None, :])
        tl.store(top + to, most, mask=r < R)
        tl.store(total + to, summed, mask=r < R)

    @triton.jit
    def merge_kernel(acc, top, total, y, rows, P, WV, BP: tl.constexpr, BV: tl.constexpr):
        """BV columns of one head's output, of the numerator's P parts: acc (P, rows, w_v), top, total (P, rows) -> y."""
        row, p, c = tl.program_id(0), tl.arange(0, BP), tl.program_id(1) * BV + tl.arange(0, BV)
        at = p * rows + row
        tops = tl.load(top + at, mask=p < P, other=float("-inf"))
        share = tl.exp(tops - tl.max(tops, 0))  # (BP,), 0 for a part without keys
        out = tl.load(acc + at[:, None] * WV + c[None, :], mask=(p < P)[:, None] & (c < WV)[None, :], other=0.0)
        whole = tl.sum(share * tl.load(total + at, mask=p < P, other=0.0), 0)
        tl.store(y + row * WV + c, tl.sum(share[:, None] * out, 0) / whole, mask=c < WV)


def parts(pairs: int, tiles: int, slots: int) -> int:
    """Into how many parts each of `pairs` heads' keys are cut, so that all `slots` of the GPU have work to the end."""

    def used(n: int) -> float:
        return pairs * n / (math.ceil(pairs * n / slots) * slots)

    choices = range(1, max(4, min(128, tiles // 2)) + 1)  # 4: few keys take as long as a launch, however they are cut
    return next(n for n in choices if used(n) >= 0.9 * max(map(used, choices)))


def rotates(attn: Attention) -> bool:
    """Are the keys kept unrotated, to be rotated on every read?"""
    return attn.cfg.attn == "mfa_kr" and attn.cfg.pos == "rope" and attn.cfg.key_reuse_rope == "pre"


def rotary_table(attn: Attention, capacity: int, like: Tensor) -> Tensor:
    """cos | sin of every position: (capacity, C). 16 bits where the keys have no more."""
    kind = torch.float16 if like.element_size() == 2 else like.dtype  # finer than bfloat16 between -1 and 1
    units = torch.zeros(capacity, attn.cfg.latent, device=like.device)
    units[:, : attn.cfg.latent // 2] = 1  # rotate() turns (1, 0) into (cos, sin)
    return rotate(units, torch.arange(capacity, device=like.device), attn.cfg.rope_base).to(kind)


def attend_triton(attn: Attention, q: Tensor, kept: list[Tensor], pos: Tensor, table: Tensor | None = None) -> Tensor:
    """Attention on the first pos + 1 of what is kept: (B, n, 1, w) -> (B, n, 1, w_v).

    table: rotary_table, for an attention that rotates().
    """
    keys, v = (kept[0].chunk(2, dim=-1), kept[0]) if rotates(attn) else read(attn, kept)
    (B, g, capacity, w), n, wv = keys[0].shape, q.shape[1], v.shape[-1]
    y = q.new_empty(B, n, 1, wv)
    same, w2 = v is keys[0], sum(k.shape[-1] for k in keys[1:])
    row_bytes = (w + w2 + wv * (not same)) * v.element_size()  # with a table, whose rows are as wide, that instead of values
    N = min(128, max(16, 1 << int(math.log2(TILE / row_bytes))))
    slots = PER_SM * (torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2)
    P = parts(B * g, capacity // N, slots)
    acc = q.new_empty(P, B * n, wv, dtype=torch.float32)
    top, total = acc.new_empty(2, P, B * n)
    slope = -alibi(n, pos + 1, pos, torch.float32).flatten() if attn.cfg.pos == "alibi" else acc  # (n,)
    wide = [max(16, triton.next_power_of_2(x)) for x in (w, w2, w if rotates(attn) else wv, n // g)]
    attend_kernel[(B * g, P)](
        q.contiguous(), keys[0], keys[-1], v, acc if table is None else table, slope, pos, acc, top, total, attn.scale,
        capacity, g, n // g, w, w2, wv, keys[0].stride(2), keys[-1].stride(2), *wide, N, same or rotates(attn),
        attn.cfg.pos == "alibi", rotates(attn), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    merge_kernel[(B * n, triton.cdiv(wv, 32))](acc, top, total, y, B * n, P, wv, triton.next_power_of_2(P), 32)
    return y


def attend_sdpa(attn: Attention, q: Tensor, kept: list[Tensor], length: int, read: Callable) -> Tensor:
    """Attention on the first `length` of what is kept, by PyTorch: (B, n, 1, w) -> (B, n, 1, w_v)."""
    keys, v = read(attn, [t[:, :, :length].to(q.dtype) for t in kept])
    k = torch.cat(keys, dim=-1) if len(keys) > 1 else keys[0]  # (B, g, S, w)
    (B, n), g, mask = q.shape[:2], k.shape[1], None
    if attn.cfg.pos == "alibi":
        key = torch.arange(length, device=q.device)
        mask = alibi(n, key[-1:], key, torch.promote_types(q.dtype, torch.float32)).to(q.dtype).view(1, g, n // g, length)
    q = q.reshape(B, g, n // g, -1)  # heads of a group as rows
    return F.scaled_dot_product_attention(q, k, v, mask, scale=attn.scale).reshape(B, n, 1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# What stands around it. Shapes: x (B, 1, H), q (B, n, 1, w), pos (1,), kept: a layer's tensors of the cache.


def read(attn: Attention, kept: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The keys' parts, side by side in width, and the values: (B, g, S, w), ... and (B, g, S, w_v)."""
    if isinstance(attn, MLA):  # the latents are the keys (with the rotary part) and the values, absorbed
        latents = 1 if attn.cfg.joint_kv else 2
        return [kept[0], *kept[latents:]], kept[latents - 1]
    k, v = attn.recall(*kept)
    return [k], v


class Product(nn.Module):
    """x times the transpose of a matrix: a linear map, or what several of one x make together."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1] or self.weight.numel() > SMALL:
            return F.linear(x, self.weight)
        # One vector: written as sums, which the compiler joins to what stands around them; a product is a kernel of its own.
        return (widen(self.weight) * widen(x).flatten()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)


class Share(nn.Module):
    """One map's share of a Product."""

    def __init__(self, first: int, width: int):
        super().__init__()
        self.first, self.width = first, width

    def forward(self, product: Tensor) -> Tensor:
        return product.narrow(-1, self.first, self.width)


def side_by_side(norm: nn.Module, module: nn.Module, run: Callable, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Twins of a norm and of what follows it: the norm takes the products, too, the module its shares of them.

    The module is asked by run(x) which of its linear maps take x itself. Their weights become views of one matrix; the other
    maps become Products of their own.
    """
    twin, found = copy.copy(module), []

    def note(child: nn.Module, args: tuple) -> None:
        if args[0] is x:
            found.append(child)

    linears = {child: name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    hooks = [child.register_forward_pre_hook(note) for child in linears]
    run(x)
    for hook in hooks:
        hook.remove()
    weights = [child.weight for child in found]
    joint, ends = weights[0].data, [w.data_ptr() + w.nbytes for w in weights]
    apart = any(w.data_ptr() != end for w, end in zip(weights[1:], ends, strict=False))
    if apart or joint.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        joint = torch.cat([w.data for w in weights])
        for w, rows in zip(weights, joint.split([len(w) for w in weights]), strict=True):
            w.data = rows
    (rows, H), first, twin._modules = (sum(map(len, weights)), joint.shape[1]), 0, dict(module._modules)
    for child in linears.keys() - set(found):
        twin._modules[linears[child]] = Product(child.weight)
    for child in found:
        twin._modules[linears[child]] = Share(first, len(child.weight))
        first += len(child.weight)
    return nn.Sequential(norm, Product(joint.as_strided((rows, H), (H, 1)))), twin


def joined(block: Block) -> Block:
    """The block with the matrices that follow each of its norms side by side."""
    twin, attn, x = copy.copy(block), block.attn, block.attn_norm.weight.new_zeros(1, 1, block.attn.cfg.dim)
    pos, twin._modules = torch.zeros(1, dtype=torch.long, device=x.device), (parts := dict(block._modules))
    if attn.cfg.attn != "fpba":  # it has no such matrices
        both = side_by_side(block.attn_norm, attn, lambda x: (attn.query(x, pos), attn.remember(x, pos)), x)
        parts["attn_norm"], parts["attn"] = both
    parts["ffn_norm"], parts["ffn"] = side_by_side(block.ffn_norm, block.ffn, block.ffn, x)
    return twin


def begin(block: Block, x: Tensor, pos: Tensor, kept: list[Tensor]) -> Tensor:
    """What comes before attention: write the token's keys and values into the cache at pos, return its queries."""
    attn, x = block.attn, block.attn_norm(x)
    for tensor, new in zip(kept, attn.remember(x, pos), strict=True):
        tensor.index_copy_(2, pos, new.to(tensor.dtype))
    q = attn.query(x, pos)
    if isinstance(attn, MLA):
        d, K = attn.cfg.head_dim, attn.k.weight.unflatten(0, (attn.n_head, -1))  # K: (m, d, C)
        q = torch.cat((torch.einsum("bmtd,mdc->bmtc", q[..., :d], K), q[..., d:]), dim=-1)  # (B, m, 1, C + d_r)
    return q


def finish(block: Block, x: Tensor, y: Tensor, pos: Tensor) -> Tensor:
    """What comes after attention: its output and the FFN, added to the residual."""
    attn = block.attn
    if isinstance(attn, MLA):
        y = torch.einsum("bmtc,mdc->bmtd", y, attn.v.weight.unflatten(0, (attn.n_head, -1)))  # (B, m, 1, d)
    x = x + attn.output(y.transpose(1, 2), pos)
    return x + block.ffn(block.ffn_norm(x))


def between(block: Block, following: Block, x: Tensor, y: Tensor, pos: Tensor, kept: list[Tensor]):
    """All that lies between the attentions of two layers; every pair of layers shares one compilation."""
    x = finish(block, x, y, pos)
    return x, begin(following, x, pos, kept)


def start(embed: nn.Module, first: Block, new: Tensor, pos: Tensor, kept: list[Tensor]):
    x = embed(new)  # (B, 1, H)
    return x, begin(first, x, pos, kept)


def end(last: Block, norm: nn.Module, head: nn.Module, x: Tensor, y: Tensor, pos: Tensor) -> Tensor:
    return widen(head(norm(finish(last, x, y, pos)))[:, -1])  # (B, vocab_size), as sampling wants it


@functools.cache
def fuse(function: Callable) -> Callable:
    """Compiled; dynamic: once for all batches above 1 and all capacities, once more for a batch of 1."""
    return torch.compile(function, dynamic=True, fullgraph=True)


class Decoder:
    """decode(model, new (B, 1), cache) -> logits (B, vocab_size), for GPT.stream; the cache advances by one token.

    The model is in evaluation mode, as stream() sees to.
    attention "triton" makes one graph of the whole step, "sdpa" one of each stretch between two attentions. The graphs
    belong to a cache's tensors: a new cache means a new capture (a fraction of a second), unless it lies where the last
    one lay, as it does when one text is sampled after the other. The logits are overwritten by the next call.
    Compiled, it lays weights side by side: the model's parameters keep their values and become views of larger tensors. Make it
    after the model's last .to() or load_state_dict(assign=True), which put other tensors in their place.
    Raises ValueError for experts, whose routing waits for the host, and when the cache or the context is full.
    """

    def __init__(self, model: GPT, attention: str | None = None, compiled: bool | None = None):
        cfg, cuda = model.cfg, model.embed.weight.is_cuda
        if cfg.n_expert:
            raise ValueError("experts are routed by the host: decode this model eagerly")
        usable = triton is not None and cuda and model.embed.weight.dtype != torch.float64
        self.attention = attention or ("triton" if usable else "sdpa")
        self.model, self.blocks, self.head, self.cuda, self.captures = model, list(model.blocks), model.head, cuda, 0
        self.read, self.start, self.between, self.end = read, start, between, end
        if (cuda and triton is not None) if compiled is None else compiled:
            with torch.no_grad():
                self.blocks, self.head = [joined(block) for block in model.blocks], Product(model.head.weight)
            self.start, self.between, self.end = map(fuse, (start, between, end))
            self.read = fuse(read) if rotates(model.blocks[0].attn) else read
        self.cache, self.lies, self.replay, self.table = None, None, None, None

    @torch.no_grad()
    def __call__(self, model: GPT, new: Tensor, cache: KVCache) -> Tensor:
        room = min(cache.capacity, self.model.cfg.block_size)
        if model is not self.model:
            raise ValueError("this Decoder was made for another model")
        if new.shape != (cache.batch_size, 1) or cache.length >= room:
            what = f"{tuple(new.shape)} behind {cache.length} tokens"
            raise ValueError(f"a step takes ({cache.batch_size}, 1) new ids and room for at most {room} tokens, not {what}")
        if self.cache is None or self.cache() is not cache:
            self.bind(cache)
        self.new.copy_(new)
        self.pos.fill_(cache.length)
        self.length = cache.length + 1
        if self.replay is None:
            with attention_kernels(self.pos.device, decoding=True):
                self.run()  # compiles
                if self.cuda:
                    self.capture()  # computes nothing
        if self.replay is not None:
            self.replay()
        cache.length += 1
        return self.logits

    def bind(self, cache: KVCache) -> None:
        """Make ready for a cache: it lies where the last one lay, or the graphs are captured anew."""
        self.cache = weakref.ref(cache)  # weak: or the next cache could not lie where this one lay
        lies = [(t.data_ptr(), t.shape, t.dtype) for layer in cache.layers for t in layer]
        if lies != self.lies:
            device = cache.layers[0][0].device
            self.lies, self.replay = lies, None
            self.new = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=device)
            self.pos = torch.zeros(1, dtype=torch.long, device=device)
            if self.attention == "triton" and rotates(self.blocks[0].attn):
                self.table = rotary_table(self.blocks[0].attn, cache.capacity, cache.layers[0][0])

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """The step with holes: yields (layer, q) wherever attention is due, is sent its result, leaves self.logits."""
        model, blocks, layers, pos = self.model, self.blocks, self.cache().layers, self.pos
        x, q = self.start(model.embed, blocks[0], self.new, pos, layers[0])
        for i in range(1, len(blocks)):
            y = yield i - 1, q
            x, q = self.between(blocks[i - 1], blocks[i], x, y, pos, layers[i])
        y = yield len(blocks) - 1, q
        self.logits = self.end(blocks[-1], model.norm, self.head, x, y, pos)  # (B, vocab_size)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        attn, kept = self.model.blocks[layer].attn, self.cache().layers[layer]
        if self.attention == "triton":
            return attend_triton(attn, q, kept, self.pos, self.table)
        return attend_sdpa(attn, q, kept, self.length, self.read)

    def run(self) -> None:
        """One step, eagerly."""
        steps, y = self.steps(), None
        while (due := advance(steps, y)) is not None:
            y = self.attend(*due)

    def capture(self) -> None:
        """Turn the step into CUDA graphs; self.replay runs them."""
        self.captures += 1
        pool = torch.cuda.graph_pool_handle()

        def record(work: Callable):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = work()
            return graph, result

        if self.attention == "triton":
            self.replay = record(self.run)[0].replay
            return
        steps, pieces, y = self.steps(), [], None
        while True:
            graph, due = record(lambda: advance(steps, y))  # noqa: B023 (called at once)
            if due is None:
                break
            y = self.attend(*due)  # a place for the result, which is not computed yet
            pieces.append((graph, due, y))

        def replay():
            with attention_kernels(self.pos.device, decoding=True):
                for piece, due, place in pieces:
                    piece.replay()
                    place.copy_(self.attend(*due))
                graph.replay()

        self.replay = replay


def advance(steps: Iterator, y):
    """Send y into the step; returns where attention is due next, None at its end."""
    try:
        return steps.send(y)
    except StopIteration:
        return None
