"use strict";
// mfa.py once more, for one sequence and as loops: the model that runs in this page. The names are mfa.py's, and what
// is said there about the formulas is not repeated. A vector is a Float32Array; a matrix has .rows of them; a shape
// stands at the end of a line, in the paper's letters:
//
//     H residual width   n heads   d head width   C latent   r query rank   w width of a query or key   S tokens so far
//
// mfa.py takes all T tokens at once. Here they come one by one, each at position cache.length; without a cache the
// same loop reads the whole text again for every new token. tests/test_live.py holds the two equal.

// ---------------------------------------------------------------------------------------------------------------------
// Vectors and matrices

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function add(a, b) {
  return a.map((value, i) => value + b[i]);
}

// W x, as nn.Linear: a row of W for each number of the result.
function linear(W, x) {
  const y = new Float32Array(W.rows.length);
  for (let i = 0; i < y.length; i++) y[i] = dot(W.rows[i], x);
  return y;
}

function split_heads(x, n) {  // (n*w) -> (n, w)
  const w = x.length / n;
  return Array.from({length: n}, (_, c) => x.subarray(c * w, (c + 1) * w));
}

function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = scores.map((score) => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

function rms_norm(gain, x, eps) {
  const size = Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((value, i) => value / size * gain[i]);
}

// RoPE: number i and number i + w/2 are a point in the plane, turned about 0 by pos * base^(-2i/w) radians.
function rotate(x, pos, base) {
  const half = x.length / 2, y = new Float32Array(x.length);
  for (let i = 0; i < half; i++) {
    const angle = pos * base ** (-i / half);
    const cos = Math.cos(angle), sin = Math.sin(angle);
    y[i] = x[i] * cos - x[i + half] * sin;
    y[i + half] = x[i + half] * cos + x[i] * sin;
  }
  return y;  // (w)
}

// ---------------------------------------------------------------------------------------------------------------------
// The cache

// layers[l] has a list for each thing that layer l keeps (keys, values), and such a list an entry for each token.
class KVCache {
  constructor(model) {
    this.n_layer = model.blocks.length;
    this.clear();
  }

  clear() {
    this.layers = Array.from({length: this.n_layer}, () => []);
    this.length = 0;  // tokens; the model alone advances it
    this.looked = [];  // by position and layer: the attention weights (n, S). Not needed to go on; the page shows them
  }

  append(layer, kept) {  // each (heads, w) -> each (S, heads, w)
    kept.forEach((heads, i) => (this.layers[layer][i] ||= []).push(heads));
    return this.layers[layer];
  }

  numel() {
    const numbers = (heads) => heads.reduce((sum, head) => sum + head.length, 0);
    return this.layers.flat(2).reduce((sum, heads) => sum + numbers(heads), 0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

class Attention {
  constructor(weights, cfg, layer) {
    Object.assign(this, weights);  // q, k, v, o ...
    this.cfg = cfg;
    this.layer = layer;
    this.n_head = cfg.n_head;
    this.scale = this.width(cfg) ** -0.5;
  }

  forward(x, cache) {  // (H) -> (H)
    const pos = cache.length;
    const q = this.query(x, pos);  // (n, w)
    const cached = cache.append(this.layer, this.to_cache(x, pos));  // each (S, heads, w)
    const [k, v] = this.from_cache(...cached);  // (S, g, w) twice
    const y = this.attend(q, k, v);  // (n, w)
    return this.output(y);  // (H)
  }

  attend(q, k, v) {
    const share = this.n_head / k[0].length;  // query heads to a key: 1 in MHA, all of them in MFA
    this.looked = q.map((query, c) => {
      const key = Math.floor(c / share);
      return softmax(k.map((heads) => this.scale * dot(query, heads[key])));  // (S)
    });  // (n, S)
    return this.looked.map((weights, c) => {
      const value = Math.floor(c / share), y = new Float32Array(v[0][0].length);
      weights.forEach((weight, j) => {
        for (let i = 0; i < y.length; i++) y[i] += weight * v[j][value][i];
      });
      return y;  // (w)
    });  // (n, w)
  }

  from_cache(k, v) {
    return [k, v];
  }

  output(y) {  // (n, w) -> (H)
    const w = y[0].length, flat = new Float32Array(this.n_head * w);
    y.forEach((head, c) => flat.set(head, c * w));  // (n*w)
    return linear(this.o, flat);  // (H)
  }

  rotate(heads, pos) {
    return heads.map((x) => rotate(x, pos, this.cfg.rope_base));
  }
}

// W_c = Q_c K_c^T, U_c = V_c O_c^T: every head has a key and a value of its own.
class MHA extends Attention {
  width(cfg) {
    return cfg.head_dim;
  }

  query(x, pos) {
    return this.rotate(split_heads(linear(this.q, x), this.n_head), pos);  // (n, d)
  }

  to_cache(x, pos) {
    const k = this.rotate(split_heads(linear(this.k, x), this.n_head), pos);  // (n, d)
    const v = split_heads(linear(this.v, x), this.n_head);  // (n, d)
    return [k, v];
  }
}

// W_c = S_q Q_c S_k^T, U_c = S_v O_c^T: one key and one value, C wide, for all heads.
class MFA extends Attention {
  width(cfg) {
    return cfg.latent_dim;
  }

  query(x, pos) {
    const latent = linear(this.s_q, x);  // (r)
    return this.rotate(split_heads(linear(this.q, latent), this.n_head), pos);  // (n, C)
  }

  to_cache(x, pos) {
    const k = this.rotate([linear(this.s_k, x)], pos);  // (1, C)
    const v = [linear(this.s_v, x)];  // (1, C)
    return [k, v];
  }
}

// The key alone, kept before its rotation: it is the value too. v_j = k_j + alpha * (N k_j), whose second half acts on
// a head's output y, a sum of v_j, and so once a token instead of once for every token in the cache.
class MFAKR extends MFA {
  to_cache(x, pos) {
    return [[linear(this.s_k, x)]];  // (1, C)
  }

  from_cache(k) {
    const v = k;  // (S, 1, C)
    return [k.map((heads, pos) => this.rotate(heads, pos)), v];  // (S, 1, C) twice
  }

  output(y) {
    return super.output(y.map((head) => this.times_M(head)));  // (H)
  }

  times_M(y) {
    const Ny = linear(this.n, y);  // (C)
    return y.map((value, i) => value + this.alpha[i] * Ny[i]);  // (C)
  }
}

const ATTENTION = {mha: MHA, mfa: MFA, mfa_kr: MFAKR};

// ---------------------------------------------------------------------------------------------------------------------
// The model around it

// W_2 (silu(W_1 x) * W_3 x)
function swiglu({w1, w3, w2}, x) {
  const gate = linear(w1, x), up = linear(w3, x);  // (ffn_dim) twice
  return linear(w2, gate.map((g, i) => g / (1 + Math.exp(-g)) * up[i]));  // (H)
}

class Block {
  constructor(weights, cfg, layer) {
    Object.assign(this, weights);  // attn_norm, ffn_norm, ffn
    this.attn = new ATTENTION[cfg.attn](weights.attn, cfg, layer);
    this.eps = cfg.norm_eps;
  }

  forward(x, cache) {
    x = add(x, this.attn.forward(rms_norm(this.attn_norm, x, this.eps), cache));  // (H)
    return add(x, swiglu(this.ffn, rms_norm(this.ffn_norm, x, this.eps)));  // (H)
  }
}

class GPT {
  constructor({config, weights}) {
    const tree = unpack(weights);
    this.cfg = config;
    this.blocks = Object.values(tree.blocks).map((block, layer) => new Block(block, config, layer));
    this.embed = tree.embed;  // (vocab_size, H), and the head: the two are tied
    this.norm = tree.norm;
  }

  // The logits of what follows one token, itself behind the cache's.
  next_logits(token, cache) {
    let x = this.embed.rows[token];  // (H)
    for (const block of this.blocks) x = block.forward(x, cache);
    cache.looked.push(this.blocks.map((block) => block.attn.looked));
    cache.length++;
    return linear(this.embed, rms_norm(this.norm, x, this.cfg.norm_eps));  // (vocab_size)
  }
}

// {"blocks.0.attn.q.weight": packed, ...} -> {blocks: {0: {attn: {q: matrix, ...}, ...}, ...}, ...}, in float32.
function unpack(weights) {
  const tree = {};
  for (const [name, {shape, scale, int8, float32}] of Object.entries(weights)) {
    const path = name.replace(/\.weight$/, "").split("."), leaf = path.pop();
    const place = path.reduce((node, part) => (node[part] ||= {}), tree);
    if (float32) {
      place[leaf] = new Float32Array(from_base64(float32));  // a gain, or alpha
      continue;
    }
    const whole = new Int8Array(from_base64(int8)), scales = new Float32Array(from_base64(scale)), width = shape[1];
    const row = (_, i) => Float32Array.from(whole.subarray(i * width, (i + 1) * width), (value) => value * scales[i]);
    place[leaf] = {rows: Array.from({length: shape[0]}, row)};
  }
  return tree;
}

function from_base64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// Text

// One id, from softmax(logits / temperature); temperature 0 takes the likeliest. random() is from 0 to 1.
function draw(logits, temperature, random) {
  if (temperature === 0) return logits.indexOf(Math.max(...logits));
  const p = softmax(logits.map((logit) => logit / temperature));  // (vocab_size)
  let left = random();
  return Math.max(0, p.findIndex((share) => (left -= share) < 0));
}

// Yields one id after another, and appends each to idx. Where the context has reached block_size it starts anew from
// its last block_size / 2 tokens. how: temperature, random, use_cache; it may change on the way. cache.start is the
// place in idx of the first token in the cache.
function* generate(model, idx, cache, how) {
  const limit = model.cfg.block_size;
  cache.start = Math.max(0, idx.length - limit);
  while (true) {
    if (idx.length - cache.start > limit) {
      cache.start = idx.length - Math.floor(limit / 2);
      cache.clear();
    }
    if (!how.use_cache) cache.clear();  // and so read the whole context again
    let logits;  // (vocab_size)
    for (const token of idx.slice(cache.start + cache.length)) logits = model.next_logits(token, cache);
    idx.push(draw(logits, how.temperature, how.random));
    yield idx.at(-1);
  }
}

// mulberry32: numbers from 0 to 1, the same ones for the same seed.
function random_numbers(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
