// The head explorer.
export function mount(root, view, arrays, kernel = null) {
  const { n_layers: nLayers, n_heads: nHeads } = view.model;
  const stored = (ref) => arrays(ref);
  const grid = (ref) => floats(stored(ref), 0, nLayers * nHeads);
  const { box, tip, colours, showTip, noTip, canvasOf, hatch, keepDrawn } = frameOf(root, view);
  const state = {
    prompt: 0, a: 0, b: view.conditions.length > 1 ? 1 : 0, stat: "", span: "", layer: 0, head: 0, query: [null, null], mode: "tokens",
  };
  const fetched = new Map(), gridMemo = new Map();
  const here = () => state.layer + "." + state.head;
  const live = kernel && livePanel({ box, kernel, word: "head", prompt: () => state.prompt, here, ticksChanged: () => drawMap() });

  // --- numbers ---

  function massGrid(condition, span) {
    const key = condition + "/" + span;
    if (!gridMemo.has(key)) {
      const { spans, mass } = view.conditions[condition];
      const place = spans.indexOf(span);
      if (place < 0) gridMemo.set(key, new Float32Array(nLayers * nHeads).fill(NaN));
      else gridMemo.set(key, floats(stored(mass), place * nLayers * nHeads, (place + 1) * nLayers * nHeads));
    }
    return gridMemo.get(key);
  }

  function shownGrid() {
    const nameA = view.conditions[state.a].name, nameB = view.conditions[state.b].name;
    const over = view.n_prompts === 1 ? "1 prompt" : `mean of ${view.n_prompts} prompts`;
    if (state.stat.startsWith("effect")) {
      const effect = view.effects[Number(state.stat.slice(6))];
      return { values: grid(effect.values), diverging: true, unit: effect.unit, title: effect.name, missing: "not tested" };
    }
    if (state.stat === "shift") {
      const first = massGrid(state.a, state.span), second = massGrid(state.b, state.span);
      return { values: first.map((value, place) => value - second[place]), diverging: true, unit: "share", missing: `no ${state.span} in one of the conditions`,
        title: `mass on ${state.span}: ${nameA} − ${nameB}, ${over}` };
    }
    const condition = state.stat === "massB" ? state.b : state.a;
    return { values: massGrid(condition, state.span), diverging: false, unit: "share", title: `mass on ${state.span}, ${view.conditions[condition].name}, ${over}`,
      missing: `no ${state.span} in ${view.conditions[condition].name}` };
  }

  const part = (side) => view.prompts[state.prompt].conditions[side === 0 ? state.a : state.b];
  const nameOf = (side) => view.conditions[side === 0 ? state.a : state.b].name;

  // Entry (from, to) of this head's table of groups; the last `from` is the last prompt token.
  function summaryOf(one) {
    const n = one.groups.length, size = (n + 1) * n, at = state.layer * nHeads + state.head;
    return floats(stored(one.summary), at * size, (at + 1) * size);
  }

  // Full rows of this head, where the page or the kernel has them.
  function rowsOf(side) {
    const condition = side === 0 ? state.a : state.b;
    const live = fetched.get([state.prompt, condition, state.layer, state.head].join("."));
    const kept = live || part(side).rows[state.layer + "." + state.head];
    if (!kept) return null;
    const n = part(side).tokens.length, first = kept.first;
    const start = (query) => (query * (query + 1) - first * (first + 1)) / 2;
    kept.floats ??= floats(live ? live.values : stored(kept.values), 0, start(n));
    return { first, n, row: (query) => (query < first ? null : kept.floats.subarray(start(query), start(query + 1))) };
  }

  function chosen(side) {
    const one = part(side);
    const query = state.query[side] ?? one.last;
    const rows = rowsOf(side), row = rows && rows.row(query);
    const masses = new Map();
    if (row) {
      row.forEach((value, key) => masses.set(one.atoms[key], (masses.get(one.atoms[key]) ?? 0) + value));
      return { query, row, masses, exactly: true };
    }
    const table = summaryOf(one), n = one.groups.length, from = query === one.last ? n : one.group_of[query];
    one.groups.forEach((group, to) => masses.set(group.span, (masses.get(group.span) ?? 0) + table[from * n + to]));
    const perGroup = table.subarray(from * n, (from + 1) * n);
    return { query, row: null, perGroup, masses, exactly: query === one.last };
  }

  // --- the map ---

  const map = make("canvas", { class: "map", tabindex: 0, role: "application", "data-what": "map",
    "aria-label": "Layers by heads. Arrow keys move, Enter ticks a head where a kernel is at hand." });
  const mapTitle = make("p", { class: "soft" }), mapLegend = make("canvas"), said = make("p", { "aria-live": "polite", "data-what": "said" });
  let cells = { left: 34, top: 18, width: 10, height: 10 };

  function drawMap() {
    const shown = shownGrid(), finite = [...shown.values].filter(Number.isFinite);
    const most = Math.max(1e-9, ...finite.map(Math.abs));
    const room = Math.max(220, (map.parentElement.clientWidth || 400));
    const width = Math.min(34, (room - 42) / nHeads), height = Math.max(7, Math.min(26, width, 560 / nLayers));
    cells = { left: 34, top: 18, width, height };
    const pen = canvasOf(map, Math.floor(cells.left + width * nHeads + 4), cells.top + height * nLayers + 4);
    pen.fillStyle = colours.soft; pen.textAlign = "center"; pen.textBaseline = "alphabetic";
    const everyHead = Math.ceil(24 / width), everyLayer = Math.ceil(14 / height);
    for (let head = 0; head < nHeads; head += everyHead) pen.fillText(String(head), cells.left + (head + 0.5) * width, 12);
    pen.textAlign = "right"; pen.textBaseline = "middle";
    for (let layer = 0; layer < nLayers; layer += everyLayer) pen.fillText("L" + layer, cells.left - 5, cells.top + (layer + 0.5) * height);
    for (let layer = 0; layer < nLayers; layer++) for (let head = 0; head < nHeads; head++) {
      const value = shown.values[layer * nHeads + head], x = cells.left + head * width, y = cells.top + layer * height;
      const tall = Math.max(1, height - 1), wide = Math.max(1, width - 1);
      if (!Number.isFinite(value)) { hatch(pen, x, y, wide, tall); continue; }
      pen.fillStyle = css(shown.diverging ? colours.diverging(0.5 + value / most / 2) : colours.sequential(value / most));
      pen.fillRect(x, y, wide, tall);
      if (part(0).rows[layer + "." + head] && width > 6) {
        pen.fillStyle = colours.paper; pen.fillRect(x + wide - 5, y + tall - 5, 5, 5);
        pen.fillStyle = colours.ink; pen.fillRect(x + wide - 4, y + tall - 4, 3, 3);
      }
    }
    pen.strokeStyle = colours.grid; pen.lineWidth = 1;
    pen.strokeRect(cells.left - 1.5, cells.top - 1.5, width * nHeads + 2, height * nLayers + 2);
    pen.lineWidth = 2;
    for (const name of live?.ticked ?? []) {
      const [layer, head] = name.split(".").map(Number);
      // A cross inside the cell, so that the frame of the chosen head does not hide it.
      const x = cells.left + (head + 0.5) * width - 0.5, y = cells.top + (layer + 0.5) * height - 0.5, arm = Math.max(2, Math.min(width, height) / 4);
      for (const [colour, thick] of [[colours.paper, 4.5], [view.palette.found, 2]]) {
        pen.strokeStyle = colour; pen.lineWidth = thick; pen.beginPath();
        pen.moveTo(x - arm, y - arm); pen.lineTo(x + arm, y + arm); pen.moveTo(x + arm, y - arm); pen.lineTo(x - arm, y + arm); pen.stroke();
      }
    }
    pen.strokeStyle = colours.paper; pen.lineWidth = 4;
    pen.strokeRect(cells.left + state.head * width - 1, cells.top + state.layer * height - 1, width + 1, height + 1);
    pen.strokeStyle = colours.ink; pen.lineWidth = 2;
    pen.strokeRect(cells.left + state.head * width - 1, cells.top + state.layer * height - 1, width + 1, height + 1);
    mapTitle.textContent = shown.title + ` (${shown.unit})`;
    const value = shown.values[state.layer * nHeads + state.head];
    said.textContent = `Layer ${state.layer}, head ${state.head}: ${Number.isFinite(value) ? minus(exact(value)) + " " + shown.unit : shown.missing}`;
    drawLegend(shown, most, finite.length < shown.values.length);
  }

  function drawLegend(shown, most, missing) {
    const pen = canvasOf(mapLegend, 330, 34), wide = 150;
    for (let x = 0; x < wide; x++) {
      pen.fillStyle = css(shown.diverging ? colours.diverging(x / (wide - 1)) : colours.sequential(x / (wide - 1)));
      pen.fillRect(x, 2, 1, 12);
    }
    pen.strokeStyle = colours.axis; pen.strokeRect(0.5, 2.5, wide - 1, 11);
    pen.fillStyle = colours.soft; pen.textBaseline = "top";
    pen.textAlign = "left"; pen.fillText(shown.diverging ? "−" + most.toPrecision(2) : "0", 0, 19);
    if (shown.diverging) { pen.textAlign = "center"; pen.fillText("0", wide / 2, 19); }
    pen.textAlign = "right"; pen.fillText((shown.diverging ? "+" : "") + most.toPrecision(2), wide, 19);
    pen.textAlign = "left";
    if (missing) { hatch(pen, wide + 16, 2, 14, 12); pen.fillText(shown.missing, wide + 36, 2); }
    if (kernel) return;
    const y = missing ? 19 : 2;
    pen.fillStyle = colours.ink; pen.fillRect(wide + 21, y + 4, 4, 4); pen.fillStyle = colours.soft; pen.fillText("full rows in this page", wide + 36, y);
  }

  function cellAt(event) {
    const [x, y] = pointed(map, event);
    const head = Math.floor((x - cells.left) / cells.width), layer = Math.floor((y - cells.top) / cells.height);
    return head >= 0 && head < nHeads && layer >= 0 && layer < nLayers ? [layer, head] : null;
  }
  map.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) select(...cell); });
  map.addEventListener("mousemove", (event) => {
    const cell = cellAt(event), shown = shownGrid();
    if (!cell) return noTip();
    const value = shown.values[cell[0] * nHeads + cell[1]];
    showTip(event, `layer ${cell[0]}, head ${cell[1]}\n${Number.isFinite(value) ? minus(exact(value)) + " " + shown.unit : shown.missing}`);
  });
  map.addEventListener("mouseleave", noTip);
  map.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      select(Math.min(nLayers - 1, Math.max(0, state.layer + down)), Math.min(nHeads - 1, Math.max(0, state.head + right)));
    } else if ((event.key === "Enter" || event.key === " ") && live) live.tick();
    else return;
    event.preventDefault(); event.stopPropagation();
  });

  function select(layer, head) {
    state.layer = layer; state.head = head;
    draw();
  }

  // --- one condition's side ---

  const sides = [0, 1].map((side) => {
    const one = { title: make("h3"), note: make("p", { class: "soft" }), canvas: make("canvas", { "data-what": "pattern" + side, role: "img" }),
      tokens: make("div", { class: "tokens", tabindex: 0, "data-what": "tokens" + side, "aria-label": "Tokens; left and right arrow keys choose the query" }), spans: [], shown: null, at: null };
    one.box = make("div", {}, one.title, one.canvas, one.note, one.tokens);
    one.tokens.addEventListener("click", (event) => {
      const key = one.spans.indexOf(event.target.closest(".token"));
      if (key >= 0) choose(side, key);
    });
    one.tokens.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      choose(side, Math.min(part(side).tokens.length - 1, Math.max(0, chosen(side).query + step)));
      one.spans[chosen(side).query].scrollIntoView({ block: "nearest" });
      event.preventDefault(); event.stopPropagation();
    });
    one.tokens.addEventListener("mousemove", (event) => {
      const key = one.spans.indexOf(event.target.closest(".token"));
      if (key < 0) return noTip();
      const now = chosen(side), of = part(side), group = of.groups[of.group_of[key]];
      let what = "after the query: not visible to it";
      if (now.row) { if (key < now.row.length) what = `attention ${exact(now.row[key])}`; }
      else if (key <= now.query) what = `all of ${group.name}: ${exact(now.perGroup[of.group_of[key]])}`;
      showTip(event, `${of.tokens[key]}  (token ${key}, ${of.atoms[key]})\n${what}`);
    });
    one.tokens.addEventListener("mouseleave", noTip);
    one.canvas.addEventListener("mousemove", (event) => showTip(event, one.at ? one.at(event) : ""));
    one.canvas.addEventListener("mouseleave", noTip);
    one.canvas.addEventListener("click", (event) => { const query = one.pick && one.pick(event); if (query !== null && query !== undefined) choose(side, query); });
    return one;
  });

  function choose(side, query) {
    state.query[side] = query;
    drawSides();
  }

  function fillTokens(side) {
    const one = sides[side], of = part(side);
    if (one.shown === of) return;
    one.shown = of;
    one.spans = tokenElements(one.tokens, view, of);
  }

  function runsOf(of) {
    const runs = [];
    of.atoms.forEach((atom, key) => {
      if (runs.length && runs.at(-1).atom === atom) runs.at(-1).stop = key + 1;
      else runs.push({ atom, start: key, stop: key + 1 });
    });
    return runs;
  }

  function drawTokensPattern(side, rows) {
    const one = sides[side], of = part(side), n = of.tokens.length, first = rows.first, count = n - first;
    const strip = 9, left = strip + 3, label = 16, room = Math.max(200, one.box.clientWidth);
    const wide = room - left, cell = Math.min(22, wide / n), width = cell * n;
    const height = Math.max(Math.min(count * cell, 420), Math.min(count * 8, 60));
    const pen = canvasOf(one.canvas, left + width, height + strip + label + 3);
    const top = strip + label + 3, ratio = devicePixelRatio || 1;
    const columns = Math.min(n, Math.max(1, Math.floor(width * ratio))), lines = Math.min(count, Math.max(1, Math.floor(height * ratio)));
    const most = new Float32Array(columns * lines).fill(-1);  // the largest entry under each pixel, so that thin stripes stay
    for (let query = first; query < n; query++) {
      const row = rows.row(query), line = Math.floor(((query - first) * lines) / count) * columns;
      for (let key = 0; key < row.length; key++) {
        const place = line + Math.floor((key * columns) / n);
        if (row[key] > most[place]) most[place] = row[key];
      }
    }
    const picture = new ImageData(columns, lines), empty = rgb(colours.grid);
    for (let place = 0; place < most.length; place++) {
      const colour = most[place] < 0 ? empty : colours.sequential(Math.sqrt(most[place]));
      picture.data.set([...colour, most[place] < 0 ? 110 : 255], 4 * place);
    }
    const sheet = make("canvas"); sheet.width = columns; sheet.height = lines;
    sheet.getContext("2d").putImageData(picture, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(sheet, left, top, width, height);
    pen.textBaseline = "alphabetic"; pen.textAlign = "left";
    for (const { atom, start, stop } of runsOf(of)) {
      pen.fillStyle = view.palette.spans[atom];
      pen.fillRect(left + start * cell, label, Math.max(1, (stop - start) * cell - (cell > 4 ? 1 : 0)), strip);
      const from = Math.max(start, first) - first, to = stop - first;
      if (to > 0) pen.fillRect(0, top + (from * height) / count, strip, Math.max(1, ((to - from) * height) / count - (cell > 4 ? 1 : 0)));
    }
    const taken = [];  // long spans are named first; what has no room is in the legend
    for (const { atom, start, stop } of runsOf(of).sort((a, b) => b.stop - b.start - a.stop + a.start)) {
      const long = pen.measureText(atom).width;
      const at = Math.min(Math.max(0, left + ((start + stop) / 2) * cell - long / 2), left + width - long);
      if ((stop - start) * cell < 8 || at < 0 || taken.some(([from, to]) => at < to + 6 && at + long + 6 > from)) continue;
      taken.push([at, at + long]);
      pen.fillStyle = colours.soft; pen.fillText(atom, at, 11);
    }
    const now = chosen(side).query;
    if (now >= first) {
      pen.strokeStyle = colours.ink; pen.lineWidth = 1.5;
      pen.strokeRect(left, top + ((now - first) * height) / count, width, Math.max(2, height / count));
    }
    const placed = (event) => {
      const [x, y] = pointed(one.canvas, event);
      const key = Math.floor((x - left) / cell), query = first + Math.floor(((y - top) * count) / height);
      return query >= first && query < n && key >= 0 && key < n ? [query, key] : null;
    };
    one.at = (event) => {
      const at = placed(event);
      if (!at) return "";
      const [query, key] = at;
      return `from ${of.tokens[query]} (${query}, ${of.atoms[query]})\nto ${of.tokens[key]} (${key}, ${of.atoms[key]})\n` + (key > query ? "after the query" : `attention ${exact(rows.row(query)[key])}`);
    };
    one.pick = (event) => placed(event)?.[0];
    one.canvas.setAttribute("aria-label", `Attention pattern, ${nameOf(side)}, layer ${state.layer} head ${state.head}`);
    const part_ = first === 0 ? "" : ` Rows ${first} to ${n - 1} of ${n} are in this page.`;
    one.note.textContent = `Rows: queries, columns: keys. Colour: square root of attention, 0 to 1.${part_}`;
  }

  function drawGroups(side, reason) {
    const one = sides[side], of = part(side), n = of.groups.length, table = summaryOf(of);
    const names = of.groups.map((group) => group.name), froms = [...names, "last token"];
    const room = Math.max(240, one.box.clientWidth), left = 112, top = 64;
    const width = Math.min(34, (room - left - 8) / n), height = Math.max(12, Math.min(20, width));
    const pen = canvasOf(one.canvas, room, top + height * (n + 1) + 4);
    pen.textBaseline = "middle";
    names.forEach((name, to) => {
      if (width < 9 && to % Math.ceil(11 / width)) return;
      pen.save(); pen.translate(left + (to + 0.5) * width, top - 6); pen.rotate(-0.95);
      pen.fillStyle = colours.soft; pen.textAlign = "left"; pen.fillText(cut(pen, name, 62), 0, 0); pen.restore();
    });
    froms.forEach((name, from) => {
      const y = top + from * height;
      pen.fillStyle = from < n ? view.palette.spans[of.groups[from].span] : colours.ink;
      pen.fillRect(left - 8, y, 6, height - 1);
      pen.fillStyle = colours.soft; pen.textAlign = "right";
      pen.fillText(cut(pen, name, left - 14), left - 12, y + height / 2);
      for (let to = 0; to < n; to++) {
        pen.fillStyle = css(colours.sequential(Math.sqrt(table[from * n + to])));
        pen.fillRect(left + to * width, y, Math.max(1, width - 1), height - 1);
      }
    });
    pen.strokeStyle = colours.grid; pen.lineWidth = 1;
    pen.strokeRect(left - 0.5, top - 0.5, width * n, height * (n + 1));
    const placed = (event) => {
      const [x, y] = pointed(one.canvas, event);
      const to = Math.floor((x - left) / width), from = Math.floor((y - top) / height);
      return from >= 0 && from <= n && to >= 0 && to < n ? [from, to] : null;
    };
    one.at = (event) => {
      const at = placed(event);
      if (!at) return "";
      const [from, to] = at, of_ = (place) => (of.groups[place].sentence ? `${names[place]}: ${of.groups[place].sentence}` : names[place]);
      return `from ${from < n ? of_(from) + " (mean of its rows)" : "the last prompt token"}\nto ${of_(to)}\nmass ${exact(table[from * n + to])}`;
    };
    one.pick = (event) => { const at = placed(event); return !at ? null : at[0] === n ? of.last : of.group_of.indexOf(at[0]); };
    one.canvas.setAttribute("aria-label", `Attention between spans and sentences, ${nameOf(side)}, layer ${state.layer} head ${state.head}`);
    one.note.textContent = `Mean over the row's tokens of the attention summed over the column's. Colour: square root, 0 to 1.${reason}`;
  }

  function drawTokens(side, top) {
    const one = sides[side], of = part(side), now = chosen(side);
    one.spans.forEach((element, key) => {
      const visible = key <= now.query;
      const value = !visible ? 0 : now.row ? now.row[key] : now.perGroup[of.group_of[key]];
      const colour = colours.sequential(Math.sqrt(value / top));
      element.style.backgroundColor = visible ? css(colour) : "transparent";
      element.style.color = visible ? inkOn(colour) : colours.soft;
      element.classList.toggle("query", key === now.query);
    });
  }

  const headTitle = make("h3"), massTable = make("table", { "data-what": "masses" }), tokenNote = make("p", { class: "soft" });

  function drawSides() {
    headTitle.textContent = `Layer ${state.layer}, head ${state.head}`;
    const now = [0, 1].map(chosen);
    const tops = now.map((one) => Math.max(...(one.row ?? one.perGroup)));
    const top = Math.max(1e-9, ...tops);
    sides.forEach((one, side) => {
      one.box.hidden = side === 1 && state.a === state.b;
      if (one.box.hidden) return;
      const rows = rowsOf(side), of = part(side);
      one.title.replaceChildren(swatch(view.conditions[side === 0 ? state.a : state.b].colour), document.createTextNode(`${nameOf(side)}, ${of.tokens.length} tokens`));
      fillTokens(side);
      if (state.mode === "tokens" && rows) drawTokensPattern(side, rows);
      else drawGroups(side, state.mode === "tokens" ? (kernel ? " Fetching the rows …" : " This head's rows are not in this page.") : "");
      drawTokens(side, top);
    });
    if (state.mode === "tokens" && kernel && !rowsOf(0)) fetchRows();
    const whole = now.every((one) => one.row);
    tokenNote.textContent = (whole ? `Token colour: attention from the framed query token, 0 to ${short(top)} (square root); click a token, or use the arrow keys, for another query.`
      : `Rows of this head${now.some((one) => one.row) ? " at one of these queries" : ""} are not in this page: tokens are coloured by the mass of their whole span or sentence.`) + " Underlines: spans.";
    drawMasses(now);
  }

  function drawMasses(now) {
    const both = state.a !== state.b;
    const spans = [...new Set([0, 1].flatMap((side) => part(side).groups.map((group) => group.span)))];
    spans.sort((a, b) => view.atoms.indexOf(a) - view.atoms.indexOf(b));
    const from = (side) => `${nameOf(side)}, from ${part(side).tokens[now[side].query]} (${now[side].query})${now[side].exactly ? "" : ", mean of its span"}`;
    const head = make("tr", {}, make("th", { text: "mass on" }), make("th", { class: "n", text: from(0) }));
    if (both) head.append(make("th", { class: "n", text: from(1) }), make("th", { class: "n", text: "difference" }));
    const line = (name, colour, values) => {
      const row = make("tr", { "data-span": name }, make("td", {}, colour ? swatch(colour) : "", document.createTextNode(name)));
      values.slice(0, both ? 2 : 1).forEach((value) => row.append(make("td", { class: "n", text: short(value), title: exact(value) })));
      if (both) { const gap = values[0] - values[1]; row.append(make("td", { class: "n", text: signed(gap), title: exact(gap) })); }
      return row;
    };
    const value = (side, span) => (part(side).atoms.includes(span) ? now[side].masses.get(span) ?? 0 : NaN);
    const rows = spans.map((span) => line(span, view.palette.spans[span], [value(0, span), value(1, span)]));
    for (const [name, parts] of Object.entries(view.composites)) {
      const sum = (side) => { const held = parts.filter((span) => part(side).atoms.includes(span)); return held.length ? held.reduce((total, span) => total + value(side, span), 0) : NaN; };
      rows.push(line(name, null, [sum(0), sum(1)]));
    }
    massTable.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  }

  // --- controls ---

  const pick = (what, label, options, value, changed) => menu(what, label, options, value, (chosen) => { changed(chosen); draw(); });

  function controls() {
    const names = view.conditions.map((one, place) => [String(place), one.name]);
    const stats = [["massA", "mass, first condition"]];
    if (names.length > 1) stats.push(["massB", "mass, second condition"], ["shift", "mass: first − second"]);
    view.effects.forEach((effect, place) => stats.push(["effect" + place, effect.name]));
    state.stat ||= view.start.stat; state.span ||= view.start.span;
    [state.layer, state.head] = view.start.head;
    const parts = [];
    if (view.prompts.length > 1) parts.push(pick("prompt", "prompt", view.prompts.map((one, place) => [String(place), one.id]), "0", (value) => { state.prompt = Number(value); state.query = [null, null]; live?.again(); }));
    parts.push(pick("a", "condition", names, String(state.a), (value) => { state.a = Number(value); state.query = [null, null]; }));
    if (names.length > 1) parts.push(pick("b", "beside", names, String(state.b), (value) => { state.b = Number(value); state.query = [null, null]; }));
    parts.push(pick("stat", "map", stats, state.stat, (value) => { state.stat = value; }));
    parts.push(pick("span", "span", view.spans.map((name) => [name, name]), state.span, (value) => { state.span = value; }));
    return make("div", { class: "bar" }, ...parts);
  }

  const modes = [["tokens", "Tokens"], ["groups", "Spans and sentences"]].map(([mode, text]) =>
    make("button", { type: "button", text, "data-what": "mode-" + mode, onclick: () => { state.mode = mode; drawSides(); pressed(); } }));
  function pressed() {
    modes.forEach((button, place) => button.setAttribute("aria-pressed", String(state.mode === ["tokens", "groups"][place])));
    live?.label();
  }

  // --- rows that a live kernel fetches ---

  async function fetchRows() {
    const asked = { kind: "rows", prompt: state.prompt, head: [state.layer, state.head] };
    const key = [asked.prompt, state.layer, state.head].join(".");
    if (fetched.has(key)) return;
    fetched.set(key, true);
    try {
      const reply = await kernel(asked);
      reply.conditions.forEach((one, condition) => fetched.set([asked.prompt, condition, ...asked.head].join("."), { first: one.first, values: reply.buffers[one.values] }));
      if (state.layer === asked.head[0] && state.head === asked.head[1]) drawSides();
    } catch (wrong) { fetched.delete(key); live.say(wrong, true); }
  }

  // --- all of it ---

  function draw() { drawMap(); drawSides(); pressed(); }
  const legend = spanLegend(view, view.prompts.flatMap((one) => one.conditions));
  box.append(
    make("h2", { text: view.title }), make("p", { class: "soft", text: view.about }), controls(),
    make("div", { class: "two" },
      make("div", {}, make("h3", { text: "All heads" }), mapTitle, map, mapLegend, said, make("p", { class: "soft", text: "Click a head, or move with the arrow keys. Layer 0 is at the top." })),
      make("div", {}, make("div", { class: "bar" }, headTitle, ...modes, make("button", { type: "button", text: "Query: last prompt token", "data-what": "last", onclick: () => { state.query = [null, null]; drawSides(); } })),
        legend, make("div", { class: "pair" }, ...sides.map((one) => one.box)), tokenNote, make("div", { class: "scroll" }, massTable))),
    live ? live.element : "", make("p", { class: "soft", text: view.caveat }), tip,
  );
  return keepDrawn(draw);
}

const render = rendering(mount);
export default { render };
