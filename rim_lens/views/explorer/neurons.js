// The neuron explorer.
const BEND = 0.5;  // where the spread-out scale begins to bend, in medians of what is not 0

export function mount(root, view, arrays, kernel = null) {
  const { n_layers: nLayers, d_mlp: width } = view.model, count = view.n_neurons - view.left_out;
  const stored = (ref) => arrays(ref);
  const { box, tip, colours, showTip, noTip, canvasOf, hatch, keepDrawn } = frameOf(root, view);
  const integers = (ref, n) => Array.from(floats(stored(ref), 0, n ?? lengthOf(stored(ref))));
  const drawn = view.drawn === null ? null : integers(view.drawn, count);  // places among all neurons, sorted
  const members = integers(view.set), inSet = new Set(members);
  const placeOf = (point) => (drawn ? drawn[point] : point);
  const pointOf = (place) => {
    if (!drawn) return place;
    let low = 0, high = drawn.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (drawn[middle] < place) low = middle + 1; else high = middle; }
    return drawn[low] === place ? low : -1;
  };
  const memo = new Map(), setMemo = new Map(), fetched = new Map();
  const state = { place: view.start, scatter: 0, spread: !view.scatters[0].diagonal, random: view.random.length ? 0 : -1, scored: 0 };
  const layerOf = (place) => Math.floor(place / width), neuronOf = (place) => place % width;
  const nameOf = (place) => `L${layerOf(place)}N${neuronOf(place)}`;
  const here = () => layerOf(state.place) + "." + neuronOf(state.place);
  const live = kernel && livePanel({ box, kernel, word: "neuron", prompt: () => state.scored, here, ticksChanged: () => { drawScatter(); drawStrip(); } });

  // --- numbers ---

  function column(place) {
    if (!memo.has(place)) {
      const one = view.columns[place];
      if (one.minus) { const [first, second] = one.minus.map(column); memo.set(place, first.map((value, point) => value - second[point])); }
      else memo.set(place, floats(stored(one.values), 0, count));
    }
    return memo.get(place);
  }
  const effects = view.effects.map((one) => {
    const places = integers(one.places), values = floats(stored(one.values), 0, places.length);
    return { ...one, of: new Map(places.map((place, rank) => [place, values[rank]])) };
  });
  function randomMembers(number) {
    if (number < 0) return new Set();
    if (!setMemo.has(number)) setMemo.set(number, new Set(integers(view.random[number].members)));
    return setMemo.get(number);
  }
  const groupOf = (place) => (inSet.has(place) ? "set" : randomMembers(state.random).has(place) ? "random" : "other");
  const colourOf = (group) => (group === "set" ? view.palette.found : group === "random" ? view.palette.blue : colours.soft);
  function meanOf(places, values) {
    let sum = 0, n = 0;
    for (const place of places) { const point = pointOf(place); if (point >= 0) { sum += values[point]; n++; } }
    return n === places.size ? sum / n : NaN;
  }

  // --- the scatter ---

  const scatter = make("canvas", { class: "map", tabindex: 0, role: "application", "data-what": "scatter",
    "aria-label": "Neurons. Arrow keys go to the nearest neuron that way, Home to the first of the set; Enter ticks it where a kernel is at hand." });
  const scatterNote = make("p", { class: "soft" }), said = make("p", { "aria-live": "polite", "data-what": "said" }), key = make("div", { class: "legend" });
  let at = { xs: new Float32Array(0), ys: new Float32Array(0) };

  // One axis: from a value to a share of the axis, with ticks. Spread out: linear near 0, logarithmic beyond.
  function axis(values, box_) {
    let low = 0, high = 0;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    if (box_) { low = Math.min(low, box_[0]); high = Math.max(high, box_[1]); }
    if (low === high) high = low + 1;
    let bend = (value) => value, ticks = [];
    if (state.spread) {
      const sizes = Array.from(values.filter((value) => value !== 0), Math.abs).sort((a, b) => a - b);
      const unit = BEND * (sizes[Math.floor(sizes.length / 2)] || 1);
      bend = (value) => Math.asinh(value / unit);
      for (let power = Math.floor(Math.log10(unit)); power <= Math.ceil(Math.log10(Math.max(high, -low))); power++) for (const one of [1, 2, 5]) if (one * 10 ** power >= unit) ticks.push(one * 10 ** power, -one * 10 ** power);
      ticks.push(0);
    } else {
      const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
      for (let tick = Math.ceil(low / step); tick * step <= high; tick++) ticks.push(tick * step);
    }
    const from = bend(low), to = bend(high), pad = 0.04 * (to - from);
    return { share: (value) => (bend(value) - from + pad) / (to - from + 2 * pad), ticks: ticks.filter((tick) => tick >= low && tick <= high).sort((a, b) => a - b) };
  }
  const tickText = (tick) => minus(Number(tick.toPrecision(3)).toString());

  function drawScatter() {
    const one = view.scatters[state.scatter], xs = column(one.x), ys = column(one.y);
    const room = Math.max(240, Math.min(640, scatter.parentElement.clientWidth || 400)), left = 52, bottom = 40, top = 8, right = 10;
    const high = Math.max(260, Math.min(460, room * 0.8)), wide = room - left - right, tall = high - top - bottom;
    const across = axis(xs, one.box?.slice(0, 2)), up = axis(ys, one.box?.slice(2));
    const x = (value) => left + across.share(value) * wide, y = (value) => top + tall - up.share(value) * tall;
    const pen = canvasOf(scatter, room, high);
    pen.lineWidth = 1; pen.fillStyle = colours.soft; pen.textBaseline = "top"; pen.textAlign = "center";
    let free = -Infinity;
    for (const tick of across.ticks) {
      pen.strokeStyle = tick === 0 ? colours.axis : colours.grid;
      pen.beginPath(); pen.moveTo(Math.round(x(tick)) + 0.5, top); pen.lineTo(Math.round(x(tick)) + 0.5, top + tall); pen.stroke();
      const half = pen.measureText(tickText(tick)).width / 2;
      if (x(tick) - half > free + 6) { pen.fillText(tickText(tick), x(tick), top + tall + 5); free = x(tick) + half; }
    }
    pen.textAlign = "right"; pen.textBaseline = "middle"; free = Infinity;
    for (const tick of up.ticks) {
      pen.strokeStyle = tick === 0 ? colours.axis : colours.grid;
      pen.beginPath(); pen.moveTo(left, Math.round(y(tick)) + 0.5); pen.lineTo(left + wide, Math.round(y(tick)) + 0.5); pen.stroke();
      if (y(tick) < free - 13) { pen.fillText(tickText(tick), left - 5, y(tick)); free = y(tick); }
    }
    pen.strokeStyle = colours.axis; pen.strokeRect(left + 0.5, top + 0.5, wide - 1, tall - 1);
    pen.textAlign = "center"; pen.textBaseline = "alphabetic";
    pen.fillText(cut(pen, `${view.columns[one.x].name} (${view.columns[one.x].unit})`, wide), left + wide / 2, high - 6);
    pen.save(); pen.translate(11, top + tall / 2); pen.rotate(-Math.PI / 2);
    pen.fillText(cut(pen, `${view.columns[one.y].name} (${view.columns[one.y].unit})`, tall), 0, 0); pen.restore();
    pen.save(); pen.beginPath(); pen.rect(left, top, wide, tall); pen.clip();
    if (one.diagonal) {
      pen.strokeStyle = colours.soft; pen.setLineDash([2, 4]); pen.beginPath();
      for (let step = 0; step <= 60; step++) { const value = across.ticks[0] + (step / 60) * (across.ticks.at(-1) - across.ticks[0]); pen.lineTo(x(value), y(value)); }
      pen.stroke(); pen.setLineDash([]);
    }
    if (one.box) {
      const [x0, x1, y0, y1] = one.box;
      hatch(pen, x(x0), y(y1), Math.max(3, x(x1) - x(x0)), Math.max(3, y(y0) - y(y1)));
    }
    at = { xs: new Float32Array(count), ys: new Float32Array(count) };
    const random = randomMembers(state.random);
    pen.fillStyle = colours.soft; pen.globalAlpha = count > 5000 ? 0.35 : 0.6;
    for (let point = 0; point < count; point++) {
      at.xs[point] = x(xs[point]); at.ys[point] = y(ys[point]);
      if (!inSet.has(placeOf(point)) && !random.has(placeOf(point))) pen.fillRect(at.xs[point] - 1.5, at.ys[point] - 1.5, 3, 3);
    }
    pen.globalAlpha = 1; pen.lineWidth = 1.5; pen.strokeStyle = view.palette.blue;
    for (const place of random) {
      const point = pointOf(place);
      if (point >= 0 && !inSet.has(place)) pen.strokeRect(at.xs[point] - 3.5, at.ys[point] - 3.5, 7, 7);
    }
    for (const place of members) {
      const point = pointOf(place);
      pen.beginPath(); pen.arc(at.xs[point], at.ys[point], 4.5, 0, 7); pen.fillStyle = view.palette.found; pen.fill();
      pen.strokeStyle = colours.paper; pen.lineWidth = 1; pen.stroke();
    }
    for (const [places, colour] of [[random, view.palette.blue], [inSet, view.palette.found]]) {
      const mx = x(meanOf(places, xs)), my = y(meanOf(places, ys));
      if (!Number.isFinite(mx + my)) continue;
      for (const [ink, thick] of [[colours.paper, 8], [colour, 3.5]]) {
        pen.strokeStyle = ink; pen.lineWidth = thick; pen.beginPath();
        pen.moveTo(mx - 10, my); pen.lineTo(mx + 10, my); pen.moveTo(mx, my - 10); pen.lineTo(mx, my + 10); pen.stroke();
      }
    }
    for (const name of live?.ticked ?? []) {
      const [layer, neuron] = name.split(".").map(Number), point = pointOf(layer * width + neuron);
      if (point < 0) continue;
      pen.strokeStyle = colours.ink; pen.lineWidth = 2; pen.beginPath();
      pen.moveTo(at.xs[point] - 5, at.ys[point] - 5); pen.lineTo(at.xs[point] + 5, at.ys[point] + 5); pen.moveTo(at.xs[point] + 5, at.ys[point] - 5); pen.lineTo(at.xs[point] - 5, at.ys[point] + 5); pen.stroke();
    }
    const chosen = pointOf(state.place);
    if (chosen >= 0) for (const [ink, thick] of [[colours.paper, 5], [colours.ink, 2.5]]) {
      pen.strokeStyle = ink; pen.lineWidth = thick; pen.beginPath(); pen.arc(at.xs[chosen], at.ys[chosen], 8, 0, 7); pen.stroke();
    }
    pen.restore();
    scatterNote.textContent = `${one.note} Crosses: means.${state.spread ? " Scale: linear near 0, logarithmic beyond." : ""}`;
    said.textContent = chosen < 0 ? `Layer ${layerOf(state.place)}, neuron ${neuronOf(state.place)}: among those left out`
      : `Layer ${layerOf(state.place)}, neuron ${neuronOf(state.place)} (${groupOf(state.place)}): ${view.columns[one.x].name} ${minus(exact(xs[chosen]))}, ${view.columns[one.y].name} ${minus(exact(ys[chosen]))}`;
    key.replaceChildren(...[["set", `set (${members.length})`], ...(state.random >= 0 ? [["random", `random set ${state.random + 1} of ${view.n_random} (${random.size})`]] : []), ["other", "other neurons"]].map(([group, text]) => make("span", {}, swatch(colourOf(group)), document.createTextNode(text))),
      ...(one.box ? [make("span", { text: `hatched: ${view.left_out} neurons lie in this box and are not drawn` })] : []));
  }

  function nearest(event, most = 14) {
    const [px, py] = pointed(scatter, event);
    let best = -1, least = most * most;
    for (let point = 0; point < count; point++) {
      const away = (at.xs[point] - px) ** 2 + (at.ys[point] - py) ** 2, rank = away - (inSet.has(placeOf(point)) ? 16 : 0);  // the set's lie on top
      if (rank < least) { least = rank; best = point; }
    }
    return best;
  }
  // The nearest drawn neuron within 45 degrees of a direction.
  function beside(dx, dy) {
    const from = pointOf(state.place);
    if (from < 0) return members[0];
    let best = -1, least = Infinity;
    for (let point = 0; point < count; point++) {
      const ahead = (at.xs[point] - at.xs[from]) * dx + (at.ys[point] - at.ys[from]) * dy, aside = Math.abs((at.xs[point] - at.xs[from]) * dy) + Math.abs((at.ys[point] - at.ys[from]) * dx);
      if (ahead < 0.5 || aside > ahead) continue;
      if (ahead + 2 * aside < least) { least = ahead + 2 * aside; best = point; }
    }
    return best < 0 ? state.place : placeOf(best);
  }
  scatter.addEventListener("click", (event) => { const point = nearest(event); if (point >= 0) select(placeOf(point)); });
  scatter.addEventListener("mousemove", (event) => {
    const point = nearest(event), one = view.scatters[state.scatter];
    if (point < 0) return noTip();
    const same = at.xs.reduce((n, value, other) => n + (value === at.xs[point] && at.ys[other] === at.ys[point]), 0);
    showTip(event, `layer ${layerOf(placeOf(point))}, neuron ${neuronOf(placeOf(point))} (${groupOf(placeOf(point))})\n${[one.x, one.y].map((place) => `${view.columns[place].name}: ${minus(exact(column(place)[point]))}`).join("\n")}${same > 1 ? `\n${same} neurons stand here` : ""}`);
  });
  scatter.addEventListener("mouseleave", noTip);
  scatter.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.key in moves) select(beside(...moves[event.key]));
    else if (event.key === "Home") select(members[0]);
    else if ((event.key === "Enter" || event.key === " ") && live) live.tick();
    else return;
    event.preventDefault(); event.stopPropagation();
  });
  function select(place) { state.place = place; draw(); }

  // --- where the set sits ---

  const strip = make("canvas", { class: "map", tabindex: 0, role: "application", "data-what": "strip", "aria-label": "Layers, with the set's neurons. Left and right arrow keys go through the set, up and down to another layer." });
  const stripSaid = make("p", { class: "soft", "data-what": "strip-said" });
  const inOrder = [...members].sort((a, b) => a - b), perLayer = new Array(nLayers).fill(0);
  for (const place of members) perLayer[layerOf(place)]++;
  const most = Math.max(1, ...perLayer);
  let rows = { left: 34, wide: 100, tall: 10, top: 16 };

  function drawStrip() {
    const room = Math.max(240, Math.min(640, strip.parentElement.clientWidth || 400)), bars = Math.min(110, room * 0.28);
    rows = { left: 34, wide: room - 34 - bars - 14, tall: Math.max(6, Math.min(22, 420 / nLayers)), top: 16 };
    const { left, wide, tall, top } = rows, pen = canvasOf(strip, room, top + tall * nLayers + 4), from = left + wide + 12;
    pen.fillStyle = colours.soft; pen.textBaseline = "alphabetic"; pen.textAlign = "left";
    pen.fillText(`neurons 0 to ${width - 1}`, left, 11); pen.fillText("in the set", from, 11);
    const every = Math.ceil(13 / tall), line = Math.max(1, tall - 2), random = randomMembers(state.random);
    pen.textBaseline = "middle";
    for (let layer = 0; layer < nLayers; layer++) {
      const y = top + layer * tall;
      pen.fillStyle = colours.soft; pen.textAlign = "right";
      if (layer % every === 0) pen.fillText("L" + layer, left - 5, y + tall / 2);
      pen.fillStyle = colours.grid; pen.fillRect(left, y, wide, line);
      if (!perLayer[layer]) continue;
      pen.fillStyle = view.palette.found; pen.fillRect(from, y, Math.max(1, (bars - 34) * (perLayer[layer] / most)), line);
      pen.fillStyle = colours.ink; pen.textAlign = "left";
      if (tall >= 11 || layer % every === 0) pen.fillText(String(perLayer[layer]), from + (bars - 34) * (perLayer[layer] / most) + 4, y + tall / 2);
    }
    const mark = (place, colour, thick, over = 0) => {
      pen.fillStyle = colour;
      pen.fillRect(left + ((neuronOf(place) + 0.5) / width) * wide - thick / 2, top + layerOf(place) * tall - over, thick, line + 2 * over);
    };
    for (const place of random) mark(place, view.palette.blue, 1);
    for (const place of members) mark(place, view.palette.found, Math.max(2, Math.min(4, wide / width)));
    mark(state.place, colours.paper, 6, 2); mark(state.place, colours.ink, 3, 2);
    stripSaid.textContent = `Layer ${layerOf(state.place)} holds ${perLayer[layerOf(state.place)]} of the set's ${members.length}. Layer 0 is at the top.`;
  }
  function inStrip(event) {
    const [x, y] = pointed(strip, event), layer = Math.floor((y - rows.top) / rows.tall), neuron = Math.floor(((x - rows.left) / rows.wide) * width);
    return layer >= 0 && layer < nLayers && neuron >= 0 && neuron < width ? layer * width + neuron : -1;
  }
  const inLayer = (layer) => inOrder.filter((place) => layerOf(place) === layer);
  const closest = (places, neuron) => places.reduce((best, place) => (Math.abs(neuronOf(place) - neuron) < Math.abs(neuronOf(best) - neuron) ? place : best), places[0]);
  strip.addEventListener("click", (event) => {
    const place = inStrip(event);
    if (place >= 0) { const there = inLayer(layerOf(place)); select(there.length ? closest(there, neuronOf(place)) : place); }
  });
  strip.addEventListener("mousemove", (event) => {
    const place = inStrip(event);
    if (place < 0) return noTip();
    const there = inLayer(layerOf(place));
    showTip(event, `layer ${layerOf(place)}: ${there.length} of the set's ${members.length}${there.length ? `\nnearest: ${nameOf(closest(there, neuronOf(place)))}` : ""}`);
  });
  strip.addEventListener("mouseleave", noTip);
  strip.addEventListener("keydown", (event) => {
    const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key], down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!along && !down) return;
    const layer = layerOf(state.place);
    let to;
    if (along) to = along > 0 ? inOrder.find((place) => place > state.place) : inOrder.findLast((place) => place < state.place);
    else {
      const next = down > 0 ? inOrder.find((place) => layerOf(place) > layer) : inOrder.findLast((place) => layerOf(place) < layer);
      to = next === undefined ? next : closest(inLayer(layerOf(next)), neuronOf(state.place));
    }
    if (to !== undefined) select(to);
    event.preventDefault(); event.stopPropagation();
  });

  // --- one neuron ---

  const title = make("h3", { "data-what": "neuron" }), belongs = make("p", { class: "soft" }), facts = make("table", { "data-what": "facts" });
  const prompts = make("div", { "data-what": "prompts" }), tokenSaid = make("p", { class: "soft", "data-what": "token", "aria-live": "polite" });

  function drawFacts() {
    const point = pointOf(state.place), group = groupOf(state.place), rank = members.indexOf(state.place);
    title.textContent = `Layer ${layerOf(state.place)}, neuron ${neuronOf(state.place)}`;
    belongs.replaceChildren(swatch(colourOf(group)), document.createTextNode(group === "set" ? `In the set, ${rank + 1} of ${members.length} in its order.` : group === "random" ? `In random set ${state.random + 1}, not in the set.` : "Neither in the set nor in the random set shown."));
    const line = (name, value, unit, missing, what) => make("tr", { "data-of": what }, make("td", { text: name }), make("td", { class: "n", text: Number.isFinite(value) ? minus(short(value).replace("−", "-")) : missing, title: Number.isFinite(value) ? exact(value) : null }), make("td", { class: "soft", text: Number.isFinite(value) ? unit : "" }));
    const tested = effects.length ? effects : [{ name: "effect of removing it", unit: "", of: new Map() }];
    facts.replaceChildren(make("tbody", {},
      ...tested.map((one) => line(one.name, one.of.get(state.place) ?? NaN, one.unit, "not tested", "effect")),
      ...view.columns.map((one, place) => line(one.name, point < 0 ? NaN : column(place)[point], one.unit, "not in this page", one.name))));
    const usable = view.scatters[0].positive;
    const out = usable && point >= 0 ? ["safety", "reasoning"].filter((_, side) => usable[side].some((place) => column(place)[point] <= 0)) : [];
    if (out.length) facts.append(make("caption", { text: `Left out of the ${out.join(" and the ")} side of RAS: not positive in both models.` }));
  }

  function readOf(place) {
    if (fetched.has(place)) return fetched.get(place);
    const kept = view.read[String(place)];
    if (!kept) return null;
    return kept.map(([prompt, starts]) => {
      const of = view.prompts[prompt];
      return { ...of, values: starts.map((start, role) => floats(stored(view.activations), start, start + of.roles[role].tokens.length)) };
    });
  }

  function drawPrompts() {
    const read = readOf(state.place);
    tokenSaid.textContent = "";
    if (!read || read === true) {
      prompts.replaceChildren(make("p", { class: "soft", text: kernel ? "Reading its activations …" : "This neuron's activations over tokens are not in this page." }));
      if (kernel && read === null) fetchTokens();
      return;
    }
    const top = Math.max(1e-9, ...read.flatMap((one) => one.values.map((values) => Math.max(...values.map(Math.abs)))));
    const parts = [];
    for (const one of read) {
      const boxes = one.roles.map((of, role) => tokenBox(one, of, role, top));
      const withheld = one.roles.some((of) => of.withheld);
      parts.push(make("h4", {}, document.createTextNode(`${one.kind}: `), make("code", { text: one.id })), make("div", { class: boxes.length > 1 ? "pair" : "" }, ...boxes));
      if (withheld) parts.push(make("p", { class: "soft", text: "░: words withheld. Of what a model writes to a harmful request only the first words are shown." }));
    }
    const kinds = view.prompts.length || kernel ? `Colour: activation, −${top.toPrecision(3)} (blue) to +${top.toPrecision(3)} (vermillion), the same for all prompts; hover or click a token for the number. Underlines: spans.` : "";
    prompts.replaceChildren(make("p", { class: "soft", text: kinds }), spanLegend(view, read.flatMap((one) => one.roles)), ...parts);
  }

  function tokenBox(one, of, role, top) {
    const values = one.values[role], peak = values.reduce((best, value, key_) => (value > values[best] ? key_ : best), 0);
    const into = make("div", { class: "tokens", tabindex: 0, "data-what": `tokens-${one.kind}-${view.roles[role].role}`, "aria-label": `Tokens of ${one.id}, ${view.roles[role].role}; arrow keys tell the activation of each` });
    const elements = tokenElements(into, view, of);
    let now = -1;
    elements.forEach((element, key_) => {
      const colour = colours.diverging(0.5 + values[key_] / top / 2);
      element.style.backgroundColor = css(colour); element.style.color = inkOn(colour);
    });
    const told = (key_) => `${of.tokens[key_]}  (token ${key_}, ${of.atoms[key_]}${key_ >= of.tokens.length - of.written ? ", written by the model" : ""})\nactivation ${minus(exact(values[key_]))}`;
    const choose = (key_) => {
      elements[now]?.classList.remove("query");
      now = key_; elements[now].classList.add("query"); elements[now].scrollIntoView({ block: "nearest" });
      tokenSaid.textContent = `${view.roles[role].role}, ${told(now).replace("\n", ": ")}`;
    };
    into.addEventListener("mousemove", (event) => { const key_ = elements.indexOf(event.target.closest(".token")); if (key_ < 0) noTip(); else showTip(event, told(key_)); });
    into.addEventListener("mouseleave", noTip);
    into.addEventListener("click", (event) => { const key_ = elements.indexOf(event.target.closest(".token")); if (key_ >= 0) choose(key_); });
    into.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      choose(Math.min(elements.length - 1, Math.max(0, now < 0 ? peak : now + step)));
      event.preventDefault(); event.stopPropagation();
    });
    return make("div", {}, make("p", { class: "soft", text: `${view.roles.length > 1 ? view.roles[role].role + ": " : ""}${of.tokens.length} tokens, ${of.written} of them written; most ${minus(exact(values[peak]))} at ${of.tokens[peak]} (${peak})` }), into);
  }

  async function fetchTokens() {
    const place = state.place;
    fetched.set(place, true);
    try {
      const reply = await kernel({ kind: "tokens", neuron: [layerOf(place), neuronOf(place)] });
      fetched.set(place, reply.prompts.map((one) => ({ ...one, values: one.values.map((ref, role) => floats(reply.buffers[ref], 0, one.roles[role].tokens.length)) })));
      if (state.place === place) drawPrompts();
    } catch (wrong) { fetched.delete(place); live.say(wrong, true); }
  }

  // --- the set's numbers ---

  function numbers() {
    if (!view.numbers.length) return "";
    const cell = (value) => make("td", { class: "n", text: short(value ?? NaN), title: exact(value ?? NaN) });
    const p = view.numbers.some((one) => "p" in one);
    const names = ["", "set", "all neurons", `random sets: mean (2.5 to 97.5 %)`, "percentile among them", ...(p ? ["p, exchanged labels"] : [])];
    return make("div", { class: "scroll" }, make("table", { "data-what": "numbers" }, make("thead", {}, make("tr", {}, ...names.map((text, place) => make("th", { text, class: place ? "n" : null })))),
      make("tbody", {}, ...view.numbers.map((one) => make("tr", { "data-of": one.metric }, make("td", { text: one.metric }), cell(one.set), cell(one.all),
        make("td", { class: "n", text: one.n_random ? `${short(one.random)} (${short(one.low)} to ${short(one.high)}), n = ${one.n_random}` : "none" }), make("td", { class: "n", text: one.percentile === undefined || one.percentile === null ? "–" : one.percentile.toFixed(1) }),
        ...(p ? [make("td", { class: "n", text: one.p === null ? "–" : one.p.toFixed(3) })] : []))))));
  }

  // --- all of it ---

  const wrong = make("span", { class: "wrong", role: "status" });
  const goto_ = make("input", { "data-what": "goto", placeholder: "L1N57", "aria-label": "layer and neuron, as L1N57", onchange: () => {
    const found = /^\s*L?(\d+)\s*[N., ]\s*(\d+)\s*$/i.exec(goto_.value), there = found && Number(found[1]) < nLayers && Number(found[2]) < width;
    wrong.textContent = there || !goto_.value.trim() ? "" : `no such neuron: L0N0 to L${nLayers - 1}N${width - 1}`;
    if (there) select(Number(found[1]) * width + Number(found[2]));
  } });
  const again = (changed) => (value) => { changed(value); draw(); };
  const ofSet = menu("member", "of the set", [["", "–"], ...members.slice(0, 500).map((place) => [String(place), nameOf(place)])], "", again((value) => { if (value) state.place = Number(value); }));
  const bar = make("div", { class: "bar" },
    ...(view.scatters.length > 1 ? [menu("scatter-of", "scatter", view.scatters.map((one, place) => [String(place), one.name]), "0", again((value) => { state.scatter = Number(value); }))] : []),
    menu("scale-of", "scale", [["spread", "spread out"], ["linear", "linear"]], state.spread ? "spread" : "linear", again((value) => { state.spread = value === "spread"; })),
    ...(view.random.length > 1 ? [menu("random", "random set", view.random.map((_, place) => [String(place), String(place + 1)]), "0", again((value) => { state.random = Number(value); }))] : []),
    ofSet, make("label", {}, document.createTextNode("go to"), goto_), wrong);
  const scoredMenu = live && view.scored.length > 1 ? make("div", { class: "bar" }, menu("scored", "request that is scored", view.scored.map((id, place) => [String(place), id]), "0", (value) => { state.scored = Number(value); live.again(); })) : "";

  function draw() {
    drawScatter(); drawStrip(); drawFacts(); drawPrompts();
    ofSet.querySelector("select").value = inSet.has(state.place) ? String(state.place) : "";
    live?.label();
  }
  box.append(
    make("h2", { text: view.title }), make("p", { class: "soft", text: view.about }), make("p", { text: view.tested }), numbers(), bar,
    make("div", { class: "two wide" },
      make("div", {}, make("h3", { text: "All neurons" }), scatter, key, said, scatterNote, make("h3", { text: "Where the set sits" }), strip, stripSaid),
      make("div", {}, title, belongs, make("div", { class: "scroll" }, facts), tokenSaid, prompts)),
    ...(live ? [live.element] : []), make("p", { class: "soft", text: view.caveat }), tip,
  );
  live?.element.firstChild.after(scoredMenu);
  return keepDrawn(draw);
}

const render = rendering(mount);
export default { render };
