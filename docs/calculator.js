"use strict";
// The KV-cache calculator. counts() is mfa.py's counts() in JavaScript; tests/test_docs.py holds the two equal.

// Elements kept per token and layer, parameters of a layer, and the ranks of Table 1. c has the names of mfa.py's Config, but
// that n_head and mfa_n_head stand side by side, and joint_dim is the latent_dim of the MLA with one latent, which has its
// queries straight from x where q_rank is 0.
function counts(attn, c) {
  const H = c.dim, n = c.n_head, d = c.head_dim, C = c.latent_dim, m = c.mfa_n_head, d_r = c.rope_dim, r = c.q_rank || C;
  const row = (kv_cache, params, heads, rank, shared_dim) => ({kv_cache, params, heads, rank, shared_dim, total_rank: heads * rank});
  if (attn === "fpba") return row(2 * H * H, 2 * H ** 3, H, H, H);
  if (attn === "mla") {  // two latents and compressed queries, as in Table 1
    const rank = Math.min(d, C, r, H);
    return row(2 * C + d_r, H * (2 * C + d_r + n * d + r) + 2 * C * n * d + r * n * (d + d_r), n, rank, Math.min(C, H, n * rank));
  }
  if (attn === "mla_joint") {  // one latent, as in DeepSeek's models
    const L = c.joint_dim, from = c.q_rank || H, rank = Math.min(d, L, from, H);
    const params = H * (L + d_r + n * d + c.q_rank) + 2 * L * n * d + from * n * (d + d_r);
    return row(L + d_r, params, n, rank, Math.min(L, H, n * rank));
  }
  if (attn === "mfa" || attn === "mfa_kr") {
    const rank = Math.min(C, r, H), params = H * (2 * C + r + m * C) + r * m * C;
    const [kv_cache, change] = attn === "mfa" ? [2 * C, 0] : [C, C * C + C - H * C];  // N and alpha come, S_v goes
    return row(kv_cache, params + change, m, rank, Math.min(C, H, m * rank));
  }
  const g = {mha: n, gqa: c.n_kv_head, mqa: 1}[attn];
  return row(2 * g * d, 2 * H * (n + g) * d, n, Math.min(d, H), Math.min(g * d, H));
}

// FLOP for a new token and one cached token, in one layer: a multiplication and an addition for each number of each head's
// score and value. MLA is absorbed, so its heads are as wide as the latents.
function work(attn, c) {
  const n = c.n_head, C = c.latent_dim, L = c.joint_dim, d_r = c.rope_dim;
  const [heads, score, value] = {
    fpba: [c.dim, c.dim, c.dim], mla: [n, C + d_r, C], mla_joint: [n, L + d_r, L], mfa: [c.mfa_n_head, C, C], mfa_kr: [c.mfa_n_head, C, C],
  }[attn] || [n, c.head_dim, c.head_dim];
  return 2 * heads * (score + value);
}

// What Config refuses, in its words; "" for what it takes. An MLA whose rope_dim is 0 has no rotary key.
function impossible(attn, c) {
  const rotary = {fpba: "dim", mla: "rope_dim", mla_joint: "rope_dim", mfa: "latent_dim", mfa_kr: "latent_dim"}[attn] || "head_dim";
  if (c[rotary] % 2) return `${rotary} must be even, since pos='rope' rotates pairs, not ${c[rotary]}`;
  return attn === "gqa" && c.n_head % c.n_kv_head ? `n_head ${c.n_head} must be a multiple of n_kv_head ${c.n_kv_head}` : "";
}

const ROWS = [["fpba", "FPBA"], ["mha", "MHA"], ["gqa", "GQA"], ["mqa", "MQA"], ["mla", "MLA, two latents"],
              ["mla_joint", "MLA, one latent"], ["mfa", "MFA"], ["mfa_kr", "MFA-KR"]];

// name, label, smallest, largest, step of the slider ("log": powers of two)
const FIELDS = [
  ["The model", [["n_layer", "layers", 1, 128, 1], ["dim", "width H", 64, 16384, 64], ["n_head", "heads n", 1, 128, 1],
                 ["head_dim", "head width d", 8, 512, 8], ["n_kv_head", "groups g of GQA", 1, 32, 1]]],
  ["Latents", [["latent_dim", "latent C", 8, 2048, 8], ["mfa_n_head", "heads m of MFA", 1, 128, 1],
               ["q_rank", "query rank of MFA, MLA (0: none given)", 0, 4096, 64], ["rope_dim", "rotary key of MLA", 0, 256, 2],
               ["joint_dim", "MLA's one latent", 8, 4096, 8]]],
  ["Sliding windows", [["local_layers", "layers with a window", 0, 128, 1], ["window", "window, tokens", 128, 131072, "log"],
                       ["local_kept", "kept by such a layer (0: as the others)", 0, 32768, 128]]],
  ["Serving", [["context", "context, tokens", 256, 1048576, "log"], ["batch", "sequences", 1, 1024, "log"],
               ["memory", "memory, GB", 1, 1024, 1], ["bandwidth", "bandwidth, TB/s", 0.1, 10, 0.05],
               ["tflops", "arithmetic, TFLOP/s", 10, 5000, 1]]],
];
const NAMES = FIELDS.flatMap(([, fields]) => fields.map(([name]) => name)).concat("bytes");
const LEAST = {rope_dim: 0, q_rank: 0, local_layers: 0, local_kept: 0, bandwidth: 0.001, tflops: 0.001, bytes: 0.5};  // others: 1
const ANY = ["bandwidth", "memory", "tflops", "bytes"];  // need not be whole
const PRESETS = /*presets*/{};  // docs/build.py writes mfa.py's here,
const MODELS_OF_OTHERS = /*models*/{};  // and docs/published.py's: {attn, fields, source, url, note}
const CARDS = /*cards*/{};  // {memory, bandwidth, tflops: {bytes a number: TFLOP/s}}

// A card's fields at a precision; numbers of 4 bits are multiplied as 8.
const on_card = ({memory, bandwidth, tflops}, bytes) => ({memory, bandwidth, tflops: tflops[Math.max(1, bytes)]});

// What a machine has to hold, read and compute in a step, for one attention: bytes, seconds, sequences, FLOP per byte.
function serving(attn, c) {
  const {kv_cache} = counts(attn, c), local = Math.min(c.local_layers, c.n_layer), full = c.n_layer - local;
  const in_window = local * (c.local_kept || kv_cache), seen = Math.min(c.context, c.window);
  const per_sequence = (full * kv_cache * c.context + in_window * seen) * c.bytes;
  const per_token = (full * kv_cache + (c.context < c.window ? in_window : 0)) * c.bytes;  // what one more token adds
  const intensity = work(attn, c) / (kv_cache * c.bytes), total = per_sequence * c.batch;
  const seconds = total / (c.bandwidth * 1e12), arithmetic = intensity * total / (c.tflops * 1e12);
  return {per_token, total, seconds, arithmetic, intensity, limit: c.batch / Math.max(seconds, arithmetic), fit: Math.floor(c.memory * 1e9 / per_sequence)};
}

const ridge = (c) => c.tflops / c.bandwidth;  // FLOP that the card does while it reads a byte

function readable(value, units) {  // 1234567 -> "1.23 M"
  let k = 0;
  while (value >= 999.5 && k < units.length - 1) { value /= 1000; k++; }
  return `${k || value % 1 ? value.toPrecision(3) : value} ${units[k]}`.trim();
}
const bytes = (value) => readable(value, ["B", "kB", "MB", "GB", "TB", "PB", "EB"]);
const large = (value) => readable(value, ["", "K", "M", "B", "T", "Q"]);
const duration = (s) => s >= 1 ? `${readable(s, ["s", "ks", "Ms", "Gs"])}` : s >= 1e-3 ? `${(s * 1e3).toPrecision(3)} ms` : `${(s * 1e6).toPrecision(3)} µs`;

if (typeof document !== "undefined") {  // in a page, not in the test's node
  const at = (id) => document.getElementById(id);
  const config = Object.fromEntries(NAMES.map((name) => [name, 0]));
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };

  const inputs = {};  // name -> [number, slider]
  for (const [title, fields] of FIELDS) {
    const group = make("fieldset", {}, make("legend", {textContent: title}));
    for (const [name, label, min, max, step] of fields) {
      const log = step === "log", id = `calc-${name}`;
      const number = make("input", {type: "number", id, min: log || step >= 1 ? Math.min(min, 1) : min, step: "any"});
      const slider = make("input", {type: "range", min: log ? Math.log2(min) : min, max: log ? Math.log2(max) : max, step: log ? 1 : step});
      slider.setAttribute("aria-label", `${label}, slider`);
      number.addEventListener("input", () => { if (number.value !== "" && number.validity.valid) change(name, +number.value); });
      slider.addEventListener("input", () => change(name, log ? 2 ** +slider.value : +slider.value));
      inputs[name] = [number, slider, log];
      group.append(make("label", {htmlFor: id, textContent: label}), number, slider);
    }
    at("calc-fields").append(group);
  }
  const shapes = {...PRESETS, ...Object.fromEntries(Object.entries(MODELS_OF_OTHERS).map(([name, {fields}]) => [name, fields]))};
  const options = (names) => names.map((name) => make("option", {value: name, textContent: name}));
  const own = () => make("option", {value: "", textContent: "your own"});
  at("calc-preset").append(own(), make("optgroup", {label: "published"}, ...options(Object.keys(MODELS_OF_OTHERS))), make("optgroup", {label: "mfa.py's"}, ...options(Object.keys(PRESETS))));
  at("calc-card").append(own(), ...options(Object.keys(CARDS)));
  at("calc-preset").addEventListener("input", (event) => set(shapes[event.target.value] || {}));
  at("calc-card").addEventListener("input", (event) => { if (event.target.value) set(on_card(CARDS[event.target.value], config.bytes)); });
  at("calc-bytes").addEventListener("input", (event) => {
    const bytes = +event.target.value, card = CARDS[card_of(config)];
    set({bytes, ...(card ? on_card(card, bytes) : {})});
  });

  const agree = (fields, c) => Object.entries(fields).every(([name, value]) => c[name] === value);
  const card_of = (c) => Object.keys(CARDS).find((card) => agree(on_card(CARDS[card], c.bytes), c));

  function change(name, value) {
    const c = {[name]: value};
    if (name === "dim") {  // what follows the width unless it is given: mfa.py's defaults
      const even = (x) => 2 * Math.max(1, Math.round(x / 2));
      Object.assign(c, {n_head: Math.max(1, Math.floor(value / config.head_dim)), latent_dim: even(value / 8), joint_dim: even(value / 4)});
    }
    set(c);
  }

  function set(c, write = true) {
    for (const [name, value] of Object.entries(c)) {
      const rounded = ANY.includes(name) ? value : Math.round(value);
      if (NAMES.includes(name) && Number.isFinite(rounded)) config[name] = Math.max(LEAST[name] ?? 1, rounded);
    }
    for (const [name, [number, slider, log]] of Object.entries(inputs)) {
      if (number.value === "" || +number.value !== config[name]) number.value = config[name];
      slider.value = log ? Math.log2(config[name]) : config[name];
    }
    at("calc-bytes").value = config.bytes;
    const same = Object.keys(shapes).find((name) => agree(shapes[name], config));
    at("calc-preset").value = same || "";
    at("calc-card").value = card_of(config) || "";
    const published = MODELS_OF_OTHERS[same];
    itself = published?.attn;
    at("calc-source").replaceChildren(...(published ? [`${same}, by `, make("a", {href: published.url, textContent: published.source}), `. Its own attention has a dot. ${published.note}`] : []));
    if (write) history.replaceState(null, "", "#" + NAMES.map((name) => `${name}=${config[name]}`).join("&"));
    draw();
  }

  let itself;  // the attention of the published model that is shown
  function draw() {
    const rows = ROWS.map(([attn, name]) => ({attn, name: attn === itself ? `${name} •` : name, why: impossible(attn, config), ...counts(attn, config), ...serving(attn, config)}));
    const mha = rows.find((row) => row.attn === "mha").total;
    const widest = Math.max(...rows.filter((row) => row.attn !== "fpba" && !row.why).map((row) => row.total));
    at("calc-bars").replaceChildren(...rows.map((row) => {
      const share = row.total / mha, off = row.total > widest;  // FPBA would leave no room for the others
      const bar = make("i", {className: off ? "off" : ""});
      bar.style.width = row.why ? 0 : `${Math.min(100, 100 * row.total / widest)}%`;
      bar.style.backgroundColor = `var(--${row.attn.replace("_joint", "")})`;
      const text = row.why || `${bytes(row.total)} · ${share > 10 ? Math.round(share).toLocaleString("en") + " ×" : (100 * share).toPrecision(3) + "%"}`;
      return make("li", {className: row.why ? "why" : ""}, make("span", {className: "name", textContent: row.name}), make("span", {className: "track"}, bar), make("span", {className: "value", textContent: text}));
    }));
    const cell = (field, value, text) => {
      const td = make("td", {textContent: text});
      td.dataset.field = field;
      td.dataset.value = value;
      return td;
    };
    const whole = (value) => value.toLocaleString("en"), card = ridge(config);
    const waits = (value) => value > card ? "arithmetic" : "memory";
    at("calc-ridge").textContent = `The card does ${card.toPrecision(3)} FLOP while it reads a byte. An attention that needs fewer for each byte of its cache waits for memory.`;
    const columns = {
      "calc-serving": {kv_cache: whole, per_token: bytes, total: bytes, seconds: duration, limit: large, fit: whole},
      "calc-roofline": {intensity: (value) => value.toPrecision(3), arithmetic: duration, waits},
      "calc-capacity": {params: large, heads: whole, rank: whole, shared_dim: whole, total_rank: whole},
    };
    for (const [id, shown] of Object.entries(columns)) {
      at(id).replaceChildren(...rows.map((row) => {
        const fields = Object.entries(shown).map(([field, text]) => {
          const value = field === "waits" ? row.intensity : row[field];
          return cell(field, value, text(value));
        });
        const tr = make("tr", {}, make("th", {scope: "row", textContent: row.name}));
        tr.dataset.attn = row.attn;
        tr.append(...(row.why ? [make("td", {colSpan: fields.length, textContent: row.why})] : fields));
        return tr;
      }));
    }
  }

  function fromHash() {
    const given = new URLSearchParams(location.hash.slice(1)), c = {};
    for (const [name, value] of given) if (NAMES.includes(name) && value !== "") c[name] = +value;
    if (Object.keys(c).length) set(c, false);
  }
  set({batch: 32, bytes: 2, ...on_card(CARDS.H200, 2), ...PRESETS["paper-1b"]}, false);
  fromHash();
  addEventListener("hashchange", fromHash);
}
