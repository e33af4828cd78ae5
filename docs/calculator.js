"use strict";
// The KV-cache calculator. counts() is mfa.py's counts() in JavaScript; tests/test_docs.py holds the two equal.

// Elements kept per token and layer, parameters of a layer, and the ranks of Table 1. c has the names of mfa.py's Config, but
// that n_head and mfa_n_head stand side by side, and joint_dim is the latent_dim of the MLA with one latent.
function counts(attn, c) {
  const H = c.dim, n = c.n_head, d = c.head_dim, C = c.latent_dim, m = c.mfa_n_head, d_r = c.rope_dim;
  const row = (kv_cache, params, heads, rank, shared_dim) => ({kv_cache, params, heads, rank, shared_dim, total_rank: heads * rank});
  if (attn === "fpba") return row(2 * H * H, 2 * H ** 3, H, H, H);
  if (attn === "mla") {  // two latents and compressed queries, as in Table 1
    const rank = Math.min(d, C, H);
    return row(2 * C + d_r, H * (3 * C + d_r + n * d) + n * C * (3 * d + d_r), n, rank, Math.min(C, H, n * rank));
  }
  if (attn === "mla_joint") {  // one latent, queries straight from x, as in DeepSeek-V2-Lite
    const L = c.joint_dim, rank = Math.min(d, L, H);
    return row(L + d_r, H * (L + d_r + n * d) + 2 * L * n * d + H * n * (d + d_r), n, rank, Math.min(L, H, n * rank));
  }
  if (attn === "mfa" || attn === "mfa_kr") {
    const rank = Math.min(C, H), params = H * (3 * C + m * C) + m * C * C;
    const [kv_cache, change] = attn === "mfa" ? [2 * C, 0] : [C, C * C + C - H * C];  // N and alpha come, S_v goes
    return row(kv_cache, params + change, m, rank, Math.min(C, H, m * rank));
  }
  const g = {mha: n, gqa: c.n_kv_head, mqa: 1}[attn];
  return row(2 * g * d, 2 * H * (n + g) * d, n, Math.min(d, H), Math.min(g * d, H));
}

// What no model can have, in words; "" for what one can.
function impossible(attn, c) {
  const uses = {mla: ["rope_dim"], mla_joint: ["rope_dim", "joint_dim"], mfa: ["latent_dim"], mfa_kr: ["latent_dim"]};
  const odd = (uses[attn] || []).find((name) => name !== "joint_dim" && c[name] % 2);
  if (odd) return `rotary positions turn pairs: ${odd} must be even`;
  return attn === "gqa" && c.n_head % c.n_kv_head ? `${c.n_head} heads do not split into ${c.n_kv_head} groups` : "";
}

const ROWS = [["fpba", "FPBA"], ["mha", "MHA"], ["gqa", "GQA"], ["mqa", "MQA"], ["mla", "MLA, two latents"],
              ["mla_joint", "MLA, one latent"], ["mfa", "MFA"], ["mfa_kr", "MFA-KR"]];

// name, label, smallest, largest, step of the slider ("log": powers of two)
const FIELDS = [
  ["The model", [["n_layer", "layers", 1, 128, 1], ["dim", "width H", 64, 16384, 64], ["n_head", "heads n", 1, 128, 1],
                 ["head_dim", "head width d", 8, 512, 8], ["n_kv_head", "groups g of GQA", 1, 32, 1]]],
  ["Latents", [["latent_dim", "latent C", 8, 2048, 8], ["mfa_n_head", "heads m of MFA", 1, 128, 1],
               ["rope_dim", "rotary key of MLA", 0, 256, 2], ["joint_dim", "MLA's one latent", 8, 4096, 8]]],
  ["Serving", [["context", "context, tokens", 256, 1048576, "log"], ["batch", "sequences", 1, 1024, "log"],
               ["memory", "memory, GB", 1, 1024, "log"], ["bandwidth", "bandwidth, TB/s", 0.1, 10, 0.1]]],
];
const NAMES = FIELDS.flatMap(([, fields]) => fields.map(([name]) => name)).concat("bytes");
const PRESETS = /*presets*/{};  // docs/build.py writes mfa.py's here
const SERVING = {batch: 32, memory: 128, bandwidth: 4.8, bytes: 2};  // at the start; 4.8 TB/s is an H200's data sheet

// What a machine has to hold and to read, for one attention: totals in bytes, seconds and sequences.
function serving(attn, c) {
  const per_token = counts(attn, c).kv_cache * c.n_layer * c.bytes, total = per_token * c.context * c.batch;
  const fit = Math.floor(c.memory * 1e9 / (per_token * c.context));
  return {per_token, total, seconds: total / (c.bandwidth * 1e12), fit};
}

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
  at("calc-preset").append(make("option", {value: "", textContent: "your own"}), ...Object.keys(PRESETS).map((p) => make("option", {value: p, textContent: p})));
  at("calc-preset").addEventListener("input", (event) => set(PRESETS[event.target.value] || {}));
  at("calc-bytes").addEventListener("input", (event) => change("bytes", +event.target.value));

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
      const least = name === "rope_dim" ? 0 : name === "bandwidth" ? 0.001 : 1;
      const whole = name === "bandwidth" || name === "memory" ? value : Math.round(value);
      if (NAMES.includes(name) && Number.isFinite(whole)) config[name] = Math.max(least, whole);
    }
    for (const [name, [number, slider, log]] of Object.entries(inputs)) {
      if (+number.value !== config[name]) number.value = config[name];
      slider.value = log ? Math.log2(config[name]) : config[name];
    }
    at("calc-bytes").value = config.bytes;
    const same = Object.keys(PRESETS).find((p) => Object.entries(PRESETS[p]).every(([name, value]) => config[name] === value));
    at("calc-preset").value = same || "";
    if (write) history.replaceState(null, "", "#" + NAMES.map((name) => `${name}=${config[name]}`).join("&"));
    draw();
  }

  function draw() {
    const rows = ROWS.map(([attn, name]) => ({attn, name, why: impossible(attn, config), ...counts(attn, config), ...serving(attn, config)}));
    const mha = rows.find((row) => row.attn === "mha").total;
    const widest = Math.max(...rows.filter((row) => row.attn !== "fpba" && !row.why).map((row) => row.total));
    at("calc-bars").replaceChildren(...rows.map((row) => {
      const share = row.total / mha, off = row.total > widest;  // FPBA would leave no room for the others
      const bar = make("i", {className: off ? "off" : ""});
      bar.style.width = row.why ? 0 : `${Math.min(100, 100 * row.total / widest)}%`;
      bar.style.backgroundColor = `var(--${row.attn.replace("_joint", "")})`;
      const text = row.why || `${bytes(row.total)} · ${share > 10 ? Math.round(share).toLocaleString("en") + " × MHA" : (100 * share).toPrecision(3) + "%"}`;
      return make("li", {}, make("span", {className: "name", textContent: row.name}), make("span", {className: "track"}, bar), make("span", {className: "value", textContent: text}));
    }));
    const cell = (field, value, text) => {
      const td = make("td", {textContent: text});
      td.dataset.field = field;
      td.dataset.value = value;
      return td;
    };
    const limit = (row) => config.batch / row.seconds, whole = (value) => value.toLocaleString("en");
    const columns = {
      "calc-serving": {kv_cache: whole, per_token: bytes, total: bytes, seconds: duration, limit: large, fit: whole},
      "calc-capacity": {params: large, heads: whole, rank: whole, shared_dim: whole, total_rank: whole},
    };
    for (const [id, shown] of Object.entries(columns)) {
      at(id).replaceChildren(...rows.map((row) => {
        const fields = Object.entries(shown).map(([field, text]) => {
          const value = field === "limit" ? limit(row) : row[field];
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
  set({...SERVING, ...PRESETS["paper-1b"]}, false);
  fromHash();
  addEventListener("hashchange", fromHash);

  const theme = new URLSearchParams(location.search).get("theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  at("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}
