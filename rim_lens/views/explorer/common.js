// What the explorers share: one module for a standalone page and for a Jupyter widget. No text is ever read as HTML.
const CSS = `
.rlx { color: var(--ink); background: var(--paper); font: 14px/1.45 var(--font); padding: 14px 18px; container-type: inline-size; }
.rlx * { box-sizing: border-box; }
.rlx h2 { font-size: 20px; margin: 0 0 2px; overflow-wrap: anywhere; } .rlx h3 { font-size: 15px; margin: 0 0 6px; } .rlx h4 { font-size: 13px; font-weight: 600; margin: 10px 0 2px; overflow-wrap: anywhere; }
.rlx p { margin: 0 0 8px; } .rlx .soft { color: var(--soft); font-size: 13px; }
.rlx .bar { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin: 8px 0 12px; }
.rlx label { display: inline-flex; gap: 6px; align-items: center; color: var(--soft); }
.rlx select, .rlx button, .rlx input { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--axis); border-radius: 5px; padding: 3px 8px; max-width: 22em; }
.rlx button { cursor: pointer; } .rlx button[aria-pressed=true] { background: var(--blue); border-color: var(--blue); color: #fff; }
.rlx button:disabled { opacity: .5; cursor: default; } .rlx input { width: 5.5em; }
.rlx .two { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px; }
.rlx .pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px; }
@container (min-width: 1000px) { .rlx .two { grid-template-columns: minmax(300px, 420px) minmax(0, 1fr); } }
@container (min-width: 1000px) { .rlx .two.wide { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
@container (min-width: 720px) { .rlx .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.rlx canvas { display: block; max-width: 100%; outline-offset: 2px; } .rlx :focus-visible { outline: 2px solid var(--blue); }
.rlx .map { cursor: pointer; }
.rlx .tokens { line-height: 1.75; max-height: 22em; overflow: auto; border: 1px solid var(--grid); border-radius: 6px; padding: 6px 8px; margin: 8px 0; font: 13px/1.75 var(--mono); overflow-wrap: anywhere; }
.rlx .token { unicode-bidi: isolate; white-space: pre-wrap; cursor: pointer; border-bottom: 3px solid transparent; border-radius: 2px; }
.rlx .token.query { outline: 2px solid var(--ink); outline-offset: -1px; }
.rlx table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 4px 0 10px; }
.rlx th, .rlx td { padding: 2px 10px 2px 0; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
.rlx caption { caption-side: bottom; text-align: left; color: var(--soft); padding-top: 4px; } .rlx td.n, .rlx th.n { text-align: right; } .rlx .scroll { overflow-x: auto; }
.rlx .swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
.rlx td:has(> .swatch) { white-space: nowrap; }
.rlx td.tokens-first { min-width: 15em; }
.rlx .legend { margin-bottom: 8px; display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12.5px; color: var(--soft); }
.rlx .tip { position: fixed; z-index: 9; pointer-events: none; background: var(--paper); color: var(--ink); border: 1px solid var(--axis); border-radius: 5px; padding: 4px 8px; font-size: 13px; max-width: 30em; overflow-wrap: anywhere; white-space: pre-line; box-shadow: 0 2px 8px #0003; }
.rlx code, .rlx pre { font-family: var(--mono); font-size: 12.5px; unicode-bidi: isolate; }
.rlx pre { overflow: auto; white-space: pre; word-break: normal; background: var(--code); padding: 8px 10px; border-radius: 6px; max-height: 16em; }
.rlx .live { border-top: 1px solid var(--grid); margin-top: 14px; padding-top: 12px; }
.rlx .wrong { color: var(--found); }
`;
const MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';

// --- small things -------------------------------------------------------------------------------------

function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const exact = (value) => (Number.isFinite(value) ? Number(value.toPrecision(7)).toString() : "–");
const short = (value) => (Number.isFinite(value) ? value.toFixed(4).replace(/^-(?=.*[1-9])/, "−").replace("-", "") : "–");
const signed = (value) => (value >= 0.00005 ? "+" : "") + short(value);
const minus = (text) => text.replace(/^-/, "−");

function decoded(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return bytes;
}

// Floats [start, stop) of an array that came as base64 text or as bytes; only that part is decoded.
function floats(stored, start, stop) {
  if (typeof stored !== "string") {
    const bytes = new Uint8Array(stored.buffer, stored.byteOffset + 4 * start, 4 * (stop - start));
    return new Float32Array(bytes.slice().buffer);
  }
  const first = Math.floor((4 * start) / 3), last = Math.ceil((4 * stop) / 3);
  const bytes = decoded(stored.slice(4 * first, 4 * last));
  const skip = 4 * start - 3 * first;
  return new Float32Array(bytes.slice(skip, skip + 4 * (stop - start)).buffer);
}

// How many floats an array holds.
const lengthOf = (stored) => (typeof stored === "string" ? (3 * stored.length) / 4 - (stored.endsWith("==") ? 2 : stored.endsWith("=") ? 1 : 0) : stored.byteLength) / 4;

function rgb(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

function scaleOf(stops) {
  const table = new Uint8ClampedArray(3 * 257);
  for (let step = 0; step <= 256; step++) {
    const at = step / 256;
    let right = stops.findIndex(([place]) => place >= at);
    right = Math.max(1, right);
    const [low, from] = stops[right - 1], [high, to] = stops[right];
    const share = (at - low) / (high - low), a = rgb(from), b = rgb(to);
    for (let channel = 0; channel < 3; channel++) table[3 * step + channel] = a[channel] + share * (b[channel] - a[channel]);
  }
  return (share) => {
    const step = 3 * Math.round(256 * Math.min(1, Math.max(0, share)));
    return [table[step], table[step + 1], table[step + 2]];
  };
}

const css = ([red, green, blue]) => `rgb(${red},${green},${blue})`;
const inkOn = ([red, green, blue]) => (0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#111" : "#fff");

function swatch(colour) {
  const mark = make("span", { class: "swatch" });
  mark.style.backgroundColor = colour;
  return mark;
}

function cut(pen, text, most) {
  let shown = text;
  while (shown.length > 2 && pen.measureText(shown).width > most) shown = shown.slice(0, -2) + "…";
  return shown;
}

function menu(what, label, options, value, changed) {
  const choice = make("select", { "data-what": what, onchange: () => changed(choice.value) }, ...options.map(([key, text]) => make("option", { value: key, text })));
  choice.value = value;
  return make("label", {}, document.createTextNode(label), choice);
}

// Where the pointer is on a canvas, in the units it is drawn in.
function pointed(canvas, event) {
  const place = canvas.getBoundingClientRect(), zoom = place.width / parseFloat(canvas.style.width);
  return [(event.clientX - place.left) / zoom, (event.clientY - place.top) / zoom];
}

function spanLegend(view, parts) {
  const there = view.atoms.filter((atom) => parts.some((one) => one.atoms.includes(atom)));
  return make("div", { class: "legend" }, ...there.map((atom) => make("span", {}, swatch(view.palette.spans[atom]), document.createTextNode(atom))));
}

// One element per token, put into a box; nothing in it is read as HTML.
function tokenElements(into, view, of) {
  const elements = of.tokens.map((token, key) => {
    const element = make("span", { class: "token", dir: "auto", text: token });
    element.style.borderBottomColor = view.palette.spans[of.atoms[key]];
    return element;
  });
  const pieces = [];
  of.tokens.forEach((token, key) => pieces.push(elements[key], make(token.endsWith("\\n") ? "br" : "wbr")));
  into.replaceChildren(...pieces);
  return elements;
}

// --- the frame an explorer stands in ----------------------------------------------------------------------

function frameOf(root, view) {
  root.replaceChildren();
  const style = make("style"); style.textContent = CSS;
  const box = make("div", { class: "rlx", "data-lm-suppress-shortcuts": true });  // JupyterLab's keys are not meant here
  const tip = make("div", { class: "tip", hidden: true, role: "status" });
  root.append(style, box);
  const colours = {};

  function theme() {
    const jupyter = document.body.dataset.jpThemeLight;
    const dark = jupyter ? jupyter === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
    const palette = view.palette[dark ? "dark" : "light"];
    const named = { ink: palette.ink, paper: palette.paper, grid: palette.grid, axis: palette.axis, soft: dark ? "#a3abb5" : "#57606a",
      code: dark ? "#2a2f36" : "#eef0f3", blue: view.palette.blue, found: view.palette.found, font: view.palette.font, mono: MONO };
    for (const [name, value] of Object.entries(named)) box.style.setProperty("--" + name, value);
    Object.assign(colours, palette, { sequential: scaleOf(palette.sequential), diverging: scaleOf(palette.diverging), soft: named.soft });
    box.dataset.theme = dark ? "dark" : "light";
  }

  function showTip(event, text) {
    if (!text) { tip.hidden = true; return; }
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const top = event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = top + "px";
  }
  const noTip = () => { tip.hidden = true; };

  function canvasOf(canvas, width, height) {
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px " + view.palette.font;
    return pen;
  }

  function hatch(pen, x, y, width, height) {
    pen.save();
    pen.beginPath(); pen.rect(x, y, width, height); pen.clip();
    pen.strokeStyle = colours.axis; pen.lineWidth = 1; pen.beginPath();
    for (let place = -height; place < width; place += 5) { pen.moveTo(x + place, y + height); pen.lineTo(x + place + height, y); }
    pen.stroke(); pen.restore();
  }

  // Draws at once, and again when the theme or the room changes; returns what ends that.
  function keepDrawn(draw) {
    draw();
    const again = () => { theme(); draw(); };
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", again);
    let seen = box.clientWidth;
    const watch = new ResizeObserver(() => { if (Math.abs(box.clientWidth - seen) > 8) { seen = box.clientWidth; draw(); } });
    watch.observe(box);
    box.dataset.drawn = "yes";
    return () => { media.removeEventListener("change", again); watch.disconnect(); };
  }

  theme();
  return { box, tip, colours, showTip, noTip, canvasOf, hatch, keepDrawn };
}

// --- in Jupyter, through anywidget ------------------------------------------------------------------------

const rendering = (mount) => ({ model, el }) => {
  const waiting = new Map();
  let count = 0;
  const heard = (message, buffers) => {
    const answer = waiting.get(message.id);
    if (!answer) return;
    waiting.delete(message.id);
    if (message.error) answer.reject(new Error(message.error));
    else answer.resolve({ ...message, buffers });
  };
  model.on("msg:custom", heard);
  const kernel = (message) => new Promise((resolve, reject) => {
    const id = ++count;
    waiting.set(id, { resolve, reject });
    model.send({ id, ...message });
  });
  const arrays = model.get("arrays");
  const leave = mount(el, model.get("view"), (ref) => arrays[ref], kernel);
  return () => { model.off("msg:custom", heard); leave(); };
};
