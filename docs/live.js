"use strict";
// What the reader sees of docs/model.js: three models write, their caches grow, a character shows what its heads look at.
{
  const CELL_ROWS = 64;  // tokens of a full context, one line of the drawing each
  const NAMES = {mha: "MHA", mfa: "MFA", mfa_kr: "MFA-KR"};
  const at = (id) => document.getElementById(`live-${id}`);
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const whole = (value) => Math.round(value).toLocaleString("en");
  const shown = (character) => ({"\n": "line end", " ": "space"})[character] || `“${character}”`;
  const visible = (character) => ({"\n": "↵", " ": "·"})[character] || character;

  const writers = {};  // attn -> what one model has written, and where that stands on the page
  let run = 0;  // counts plays; a play ends where this is no longer its number
  let chosen = null;  // {attn, i}: the character looked at
  let keys_wanted = false;

  // -------------------------------------------------------------------------------------------------------------------
  // Play and stop

  // The model's script file, beside the page, read when it is first wanted.
  function load(attn) {
    return new Promise((resolve, reject) => {
      if (globalThis.MODELS?.[attn]) return resolve();
      const file = `models/${attn}.js`;
      const missing = () => reject(Error(`${file} should lie beside this page and cannot be read: python docs/export_model.py makes it`));
      document.head.append(make("script", {src: file, onload: resolve, onerror: missing}));
    });
  }

  const next_frame = () => new Promise((resolve) => setTimeout(resolve, 12));  // time to draw, and for the reader to follow

  function settings() {
    const number = (id, least, most) => Math.min(most, Math.max(least, Number(at(id).value) || 0));
    return {prompt: at("prompt").value || "\n", temperature: number("temperature", 0, 10), seed: number("seed", 0, 2 ** 31), length: number("length", 1, 1000)};
  }

  async function play() {
    const mine = ++run, {prompt, temperature, seed, length} = settings();
    const wanted = Object.keys(NAMES).filter((attn) => ["all", attn].includes(at("models").value));
    say("Loading the models.");
    at("play").textContent = "stop";
    try {
      for (const attn of wanted) await load(attn);
      for (const attn of Object.keys(NAMES)) begin(attn, wanted.includes(attn), prompt, temperature, seed);
    } catch (error) {
      return finish(error.message);
    }
    at("results").hidden = false;
    choose(null);
    say("Writing.");
    for (let made = 0; made < length && mine === run; made++) {
      for (const attn of wanted) {
        if (mine === run) write(writers[attn]);
        await next_frame();
      }
    }
    if (mine === run) finish(`${whole(length)} characters written. Choose one to see what its heads look at.`);
  }

  function finish(words) {
    run++;
    at("play").textContent = "play";
    say(words);
    for (const writer of Object.values(writers)) writer.spoken.textContent = writer.text?.join("") || "";
  }

  function say(words) {
    at("status").textContent = words;
  }

  function begin(attn, wanted, prompt, temperature, seed) {
    const writer = (writers[attn] ||= build(attn));
    writer.section.hidden = !wanted;
    writer.wanted = wanted;
    writer.line.replaceChildren();
    writer.spoken.textContent = "";
    writer.context = null;
    if (!wanted) {
      writer.text = null;
      return;
    }
    const shipped = MODELS[attn], known = shipped.tokenizer.characters;
    const unknown = [...prompt].find((character) => !known.includes(character));
    if (unknown) throw Error(`The models do not know the character ${unknown}: they have read ${known.trim()}, space and line end.`);
    const model = (writer.model ||= new GPT(shipped));
    const idx = [...prompt].map((character) => known.indexOf(character));
    const how = {temperature, random: random_numbers(seed), get use_cache() { return at("cache").checked; }};
    const cache = new KVCache(model);
    Object.assign(writer, {idx, cache, known, looked: [], times: [], text: [], steps: generate(model, idx, cache, how)});
    writer.loss.textContent = `${NAMES[attn]}, loss ${shipped.best_loss.toFixed(2)}`;
    for (const id of idx) append(writer, id, "prompt");
    writer.canvas.getContext("2d").clearRect(0, 0, writer.canvas.width, writer.canvas.height);
  }

  // One token more, timed, and everything that it changes on the page.
  function write(writer) {
    const clock = performance.now(), {value} = writer.steps.next();
    writer.times.push(performance.now() - clock);
    const {cache} = writer;
    for (let pos = 0; pos < cache.length; pos++) {  // of a character that is read again, the first reading counts
      writer.looked[cache.start + pos] ||= {start: cache.start, pos, layers: cache.looked[pos], keys: cache.layers.map(([k]) => k[pos])};
    }
    append(writer, value, "");
    for (const one of Object.values(writers)) {
      if (one !== writer && one.wanted) continue;
      draw_cache(one, cache.length);
      count(one, cache.length);
    }
    draw_times(writer);
  }

  function append(writer, id, className) {
    const character = writer.known[id];
    const span = make("span", {textContent: character, className});
    span.dataset.i = writer.text.push(character) - 1;
    writer.line.append(span);
    writer.line.setAttribute("aria-valuemax", writer.text.length);
    writer.line.scrollTop = writer.line.scrollHeight;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // The page's parts for one model

  function build(attn) {
    const name = NAMES[attn];
    const loss = make("h3", {textContent: name});
    const line = make("div", {className: "text", tabIndex: 0});
    const about = {role: "slider", "aria-label": `${name}'s text: arrow keys choose a character, Enter shows its key`, "aria-valuemin": 1, "aria-valuemax": 1, "aria-valuenow": 1, "aria-valuetext": "none chosen"};
    for (const [key, value] of Object.entries(about)) line.setAttribute(key, value);
    const spoken = make("p", {className: "for-ears"});
    const speed = make("p", {className: "note"});
    const chart = make("canvas", {width: 200, height: 36, className: "times"});
    chart.setAttribute("role", "img");
    const section = make("section", {}, loss, line, spoken, chart, speed);
    section.style.setProperty("--color", `var(--${attn})`);
    at("texts").append(section);
    const canvas = at(`canvas-${attn}`);
    line.addEventListener("pointerover", ({target}) => { if (target.dataset.i) choose({attn, i: +target.dataset.i}); });
    line.addEventListener("click", ({target}) => {
      if (!target.dataset.i) return;
      choose({attn, i: +target.dataset.i});
      show_keys(true);
    });
    line.addEventListener("focus", () => {
      if (chosen?.attn !== attn && writers[attn].text) choose({attn, i: writers[attn].looked.length - 1});
    });
    line.addEventListener("keydown", (event) => {
      const i = chosen?.attn === attn ? chosen.i : writers[attn].text.length;
      const to = {ArrowLeft: i - 1, ArrowDown: i - 1, ArrowRight: i + 1, ArrowUp: i + 1, PageUp: i + 10, PageDown: i - 10, Home: 0, End: Infinity}[event.key];
      if (to !== undefined) choose({attn, i: to});
      else if (event.key === "Enter" || event.key === " ") show_keys(true);
      else return;
      event.preventDefault();
    });
    return {attn, loss, line, spoken, speed, chart, section, canvas};
  }

  // -------------------------------------------------------------------------------------------------------------------
  // The cache, a pixel for each number

  const COLOR = [[0, 114, 178], [213, 94, 0]];  // below zero, above
  const strength = (value) => Math.abs(value) / (1 + Math.abs(value));

  function draw_cache({canvas, cache, wanted}, tokens) {
    const context = canvas.getContext("2d"), kept = at("cache").checked;
    canvas.classList.toggle("none", !kept);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!kept) return;
    if (!wanted) {  // a model that was not chosen: how large its cache would be
      context.fillStyle = "rgb(128 128 128 / 0.4)";
      for (let top = 0; top < canvas.height; top += CELL_ROWS + 2) context.fillRect(0, top, canvas.width, tokens);
      return;
    }
    const image = context.createImageData(canvas.width, canvas.height);
    cache.layers.forEach((lists, layer) => {
      for (let pos = 0; pos < cache.length; pos++) {
        let place = (layer * (CELL_ROWS + 2) + pos) * canvas.width * 4;
        for (const list of lists) {
          for (const head of list[pos]) {
            for (const value of head) {
              image.data.set(COLOR[+(value > 0)], place);
              image.data[place + 3] = 40 + 215 * strength(value);
              place += 4;
            }
          }
        }
      }
    });
    context.putImageData(image, 0, 0);
  }

  function count({attn, cache, canvas, wanted}, tokens) {
    const layers = Math.ceil(canvas.height / (CELL_ROWS + 2));
    const numbers = !at("cache").checked ? 0 : wanted ? cache.numel() : tokens * canvas.width * layers;
    const cells = at(`count-${attn}`).children;
    [tokens, numbers, numbers * 4].forEach((value, i) => { cells[i + 1].textContent = whole(value); });
  }

  const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

  // Milliseconds of every token, as a line from left to right; the median of five, since a machine has other things to do.
  function draw_times({attn, chart, times, speed}) {
    const context = chart.getContext("2d"), line = times.map((_, i) => median(times.slice(Math.max(0, i - 4), i + 1)));
    const most = Math.max(...line, 0.01), last = times.slice(-16);
    context.clearRect(0, 0, chart.width, chart.height);
    context.beginPath();
    line.forEach((time, i) => context.lineTo(chart.width * i / Math.max(60, line.length), chart.height - 2 - (chart.height - 4) * time / most));
    context.lineWidth = 1.5;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${attn}`);
    context.stroke();
    const mean = Math.max(0.01, last.reduce((a, b) => a + b, 0) / last.length);
    speed.textContent = `${mean.toFixed(1)} ms a token, ${whole(1000 / mean)} tokens/s ${at("cache").checked ? "with" : "without"} the cache`;
    chart.setAttribute("aria-label", `milliseconds of each token, at most ${most.toFixed(1)}`);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Looking at a character

  function choose(to) {
    for (const {line} of Object.values(writers)) {
      for (const span of line.children) {
        span.classList.remove("chosen");
        span.style.background = "";
      }
    }
    chosen = to && writers[to.attn].text ? {...to, i: Math.max(0, Math.min(writers[to.attn].text.length - 1, to.i))} : null;
    at("look").hidden = !chosen;
    if (!chosen) return;
    look();
  }

  // What each head of the chosen layer looked at when the model read the chosen character.
  function look() {
    const writer = writers[chosen.attn], {i} = chosen, layer = +at("layer").value, {text, line} = writer;
    const span = line.children[i];
    span.classList.add("chosen");
    if (span.offsetTop < line.scrollTop || span.offsetTop + span.offsetHeight > line.scrollTop + line.clientHeight) line.scrollTop = span.offsetTop - 20;
    line.setAttribute("aria-valuenow", i + 1);
    const found = writer.looked[i], place = `${shown(text[i])}, character ${i + 1} of ${text.length}`;
    at("heads").replaceChildren();
    if (!found) {
      line.setAttribute("aria-valuetext", `${place}, not read yet`);
      at("title").textContent = `${NAMES[chosen.attn]} has not read ${shown(text[i])} yet: it is the last it wrote.`;
      at("keys").hidden = true;
      return;
    }
    const heads = found.layers[layer], n = heads.length, seen = text.slice(found.start, i + 1);
    const mean = seen.map((_, j) => heads.reduce((sum, weights) => sum + weights[j], 0) / n);
    mean.forEach((weight, j) => { line.children[found.start + j].style.background = tint(weight); });
    const best = mean.indexOf(Math.max(...mean));
    line.setAttribute("aria-valuetext", `${place}; its ${n} heads look most at ${shown(seen[best])}, ${i - found.start - best} back`);
    const from = found.start ? `, in a context that starts at character ${found.start + 1}` : "";
    at("title").textContent = `${NAMES[chosen.attn]}, layer ${layer + 1}: what its ${n} heads look at from ${place}${from}`;
    at("heads").append(...heads.map((weights, c) => {
      const top = weights.indexOf(Math.max(...weights));
      const row = make("div", {className: "head"}, make("span", {className: "name", textContent: c + 1}));
      row.setAttribute("role", "img");
      row.setAttribute("aria-label", `head ${c + 1}: ${Math.round(100 * weights[top])}% on ${shown(seen[top])}, ${seen.length - 1 - top} back`);
      row.append(...seen.map((character, j) => {
        const cell = make("i", {textContent: visible(character), title: `${Math.round(100 * weights[j])}%`});
        cell.style.background = tint(weights[j]);
        return cell;
      }));
      return row;
    }));
    at("heads").style.setProperty("--color", `var(--${chosen.attn})`);
    show_keys(keys_wanted);
  }

  function tint(weight) {
    return `color-mix(in srgb, var(--color) ${Math.round(85 * Math.sqrt(weight))}%, transparent)`;
  }

  // The key of the chosen character, before its rotation and after. One of the two is in the cache.
  function show_keys(wanted) {
    keys_wanted = wanted;
    const place = at("keys");
    place.replaceChildren();
    place.hidden = !wanted || !chosen || !writers[chosen.attn].looked[chosen.i];
    at("key").setAttribute("aria-expanded", String(!place.hidden));
    if (place.hidden) return;
    const {attn, i} = chosen, {model, text, looked} = writers[attn], {pos, keys} = looked[i];
    const heads = keys[+at("layer").value];  // (g, w)
    const cached_before = attn === "mfa_kr", turned = (sign) => heads.map((key) => rotate(key, sign * pos, model.cfg.rope_base));
    const before = cached_before ? heads : turned(-1), after = cached_before ? turned(1) : heads;
    const says = (cached) => (cached ? "in the cache" : "not kept");
    const strip = (label, keys) => make("div", {className: "strip"}, make("span", {textContent: label}), ...keys.map((key) => make("b", {}, ...Array.from(key, cell))));
    const shared = heads.length > 1 ? `${heads.length} keys, one for each head` : `one key for all ${model.cfg.n_head} heads`;
    const why = cached_before ? "MFA-KR keeps it unturned, since it is the value too, and turns it whenever it is read." : "It is turned once, and kept so.";
    place.append(
      make("p", {textContent: `The key of ${shown(text[i])} at position ${pos}: ${shared}. ${why}`}),
      strip(`before its rotation (${says(cached_before)})`, before), strip(`after it (${says(!cached_before)})`, after),
    );
  }

  function cell(value) {
    const i = make("i", {title: value.toFixed(2)});
    i.style.background = `rgb(${COLOR[+(value > 0)].join(" ")} / ${0.1 + 0.9 * strength(value)})`;
    return i;
  }

  // -------------------------------------------------------------------------------------------------------------------

  at("form").hidden = false;
  say("Nothing runs before you press play. Then three files of 1.1 MB each are read.");
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (at("play").textContent === "stop") finish("Stopped. Choose a character to see what its heads look at.");
    else play();
  });
  at("layer").addEventListener("input", () => { if (chosen) choose(chosen); });
  at("key").addEventListener("click", () => show_keys(at("keys").hidden));
}
