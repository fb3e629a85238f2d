// The circuit explorer's graph: nodes in layers from the top down, told apart by shape, and edges between them.
const GRAPH_CSS = `
.rlx .graph { display: block; width: 100%; height: auto; max-width: 900px; margin-bottom: 8px; outline-offset: 2px; font: 12px var(--font); cursor: default; }
.rlx .graph .node, .rlx .graph .hit { cursor: pointer; } .rlx .graph .hit { fill: none; stroke: transparent; pointer-events: stroke; }
.rlx .graph text { pointer-events: none; } .rlx .graph .row { fill: var(--soft); font-size: 11px; }
.rlx .graph .port, .rlx .graph .told { fill: var(--ink); font-size: 10.5px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
.rlx td button { padding: 0 7px; font-size: 12.5px; } .rlx tr.chosen td { background: var(--code); } .rlx tr.pick { cursor: pointer; }
.rlx .tall { max-height: 26em; overflow-y: auto; }
.rlx .shape { display: inline-block; width: 26px; height: 14px; vertical-align: -2px; margin-right: 4px; }
`;
const TALL = 24, PORTS = { q: -0.28, k: 0, v: 0.28 };

function drawn(tag, given = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "text") element.textContent = value;
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// The outline of a kind of node around (0, 0).
function outline(kind, wide, tall, given) {
  const x = wide / 2, y = tall / 2, cut = Math.min(9, y);
  const shape = (points) => drawn("polygon", { points: points.map((at) => at.join(",")).join(" "), ...given });
  if (kind === "neurons") return shape([[-x, 0], [-x + cut, -y], [x - cut, -y], [x, 0], [x - cut, y], [-x + cut, y]]);
  if (kind === "end" || kind === "direction") {
    const off = tall / 5;
    return shape([[-x, -y + off], [-x + off, -y], [x - off, -y], [x, -y + off], [x, y - off], [x - off, y], [-x + off, y], [-x, y - off]]);
  }
  return drawn("rect", { x: -x, y: -y, width: wide, height: tall, rx: kind === "span" ? y : 2, ...given });
}

// What a number of an edge looks like; the same numbers give the same picture in every circuit.
const edgeColour = (view, value) => (value < 0 ? view.palette.blue : view.palette.found);
const edgeWidth = (value, most) => (Number.isFinite(value) ? 1 + (9 * Math.abs(value)) / most : 1);

// shown(): { edges: places to draw, values, found, told(place), most, kept, off: names, node, edge, unit }
function circuitGraph({ view, colours, showTip, noTip, shown, choose, chooseEdge, toggle }) {
  const { width, height, rows, curves } = view.picture;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "graph map", tabindex: 0, role: "application", "data-what": "graph",
    "aria-label": "The circuit, layers from the top down. Arrow keys move between nodes, Escape leaves them; where a kernel is at hand, Enter switches the node off or on." });

  function edgeLines(now, place) {
    const [x0, y0, x1, y1, x2, y2, x3, y3] = curves[place], value = now.values[place], found = now.found[place];
    const wide = edgeWidth(value, now.most), colour = edgeColour(view, value), edge = view.edges[place];
    const ends = [edge.sender, edge.receiver], cut = now.off.has(edge.key) || ends.some((end) => now.off.has(view.nodes[end].key));
    const group = drawn("g", { class: found ? "edge found" : "edge", "data-edge": edge.key, "data-width": wide.toFixed(2), opacity: cut ? 0.25 : aside(now, place) ? 0.18 : found ? 0.9 : 0.5 });
    const d = `M${x0} ${y0}C${x1} ${y1} ${x2} ${y2} ${x3} ${y3}`, head = Math.min(9, 3 + wide / 1.6);
    const line = drawn("path", { d, fill: "none", stroke: colour, "stroke-width": found ? wide : Math.min(wide, 2.5), "stroke-dasharray": cut ? "2 5" : found ? null : "5 4" });
    group.append(line, drawn("polygon", { points: `${x3 - head},${y3 - 2} ${x3 + head},${y3 - 2} ${x3},${y3 + 5}`, fill: colour }));
    const hit = drawn("path", { d, class: "hit", "stroke-width": Math.max(12, wide + 4), "data-hit": edge.key });
    hit.addEventListener("mousemove", (event) => showTip(event, now.told(place)));
    hit.addEventListener("mouseleave", noTip);
    hit.addEventListener("click", (event) => { event.stopPropagation(); chooseEdge(place); });
    return { group, hit };
  }

  // A number on each of the circuit's edges where they are few, and the input where it enters.
  // A number beside the middle of its curve, on the side where other edges of the circuit are farther.
  function numberBeside(now, place) {
    const [x0, y0, x1, y1, x2, y2, x3, y3] = curves[place], [x, y] = [(x0 + 3 * x1 + 3 * x2 + x3) / 8, (y0 + 3 * y1 + 3 * y2 + y3) / 8];
    const [dx, dy] = [x2 + x3 - x0 - x1, y2 + y3 - y0 - y1], far = (edgeWidth(now.values[place], now.most) / 2 + 14) / Math.hypot(dx, dy);
    const others = now.edges.filter((other) => other !== place && now.found[other]).flatMap((other) => along(curves[other]));
    const room = (at) => Math.min(60, ...others.map(([ox, oy]) => Math.hypot(ox - at[0], oy - at[1])));
    const [at] = [[x + dy * far, y - dx * far], [x - dy * far, y + dx * far]].sort((a, b) => room(b) - room(a) || b[0] - a[0]);
    return drawn("text", { class: "told", x: at[0].toFixed(1), y: (at[1] + 4).toFixed(1), "text-anchor": at[0] > x + 8 ? "start" : at[0] < x - 8 ? "end" : "middle", dx: at[0] > x + 8 ? -8 : at[0] < x - 8 ? 8 : 0,
      opacity: aside(now, place) ? 0.3 : 1, text: minus(now.values[place].toPrecision(3)) });
  }
  const along = ([x0, y0, x1, y1, x2, y2, x3, y3]) => Array.from({ length: 15 }, (_, step) => {
    const t = step / 14, s = 1 - t, [a, b, c, d] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
    return [a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3];
  });
  const aside = (now, place) => (now.node >= 0 && ![view.edges[place].sender, view.edges[place].receiver].includes(now.node)) || (now.edge >= 0 && now.edge !== place);

  function edgeText(now, place, numbered) {
    const [x3, y3] = curves[place].slice(6), edge = view.edges[place], texts = [];
    if (edge.input in PORTS) texts.push(drawn("text", { class: "port", x: x3 + 6, y: y3 - 4, text: edge.input }));
    if (numbered) texts.push(numberBeside(now, place));
    return texts;
  }

  function nodeShape(now, place) {
    const node = view.nodes[place], off = now.off.has(node.key), plain = node.kind === "span" || node.kind === "end", kept = now.kept[place] || plain;
    const group = drawn("g", { class: "node", transform: `translate(${node.x} ${node.y})`, "data-node": node.key, "data-kind": node.kind });
    if (place === now.node) group.append(outline(node.kind, node.wide + 10, TALL + 10, { fill: "none", stroke: view.palette.blue, "stroke-width": 2.5 }));
    const stroke = node.kind === "span" ? view.palette.spans[node.key] ?? colours.axis : kept ? colours.ink : colours.axis;
    group.append(outline(node.kind, node.wide, TALL, { fill: off ? colours.grid : colours.paper, stroke, "stroke-width": node.kind === "end" ? 3 : kept ? 2 : 1.2, "stroke-dasharray": kept ? null : "4 3" }));
    group.append(drawn("text", { x: 0, y: 4, "text-anchor": "middle", fill: kept && !off ? colours.ink : colours.soft, "text-decoration": off ? "line-through" : null, text: node.label }));
    group.addEventListener("click", (event) => { event.stopPropagation(); choose(place); svg.focus({ preventScroll: true }); });
    group.addEventListener("mousemove", (event) => showTip(event, nodeTip(node, kept, off, plain)));
    group.addEventListener("mouseleave", noTip);
    return group;
  }
  function nodeTip(node, kept, off, plain) {
    const what = { head: "head", neurons: `${node.members.length} neurons of layer ${node.layer}`, span: "span of the prompt", end: "refusal score", direction: "direction" }[node.kind];
    return `${node.name}: ${what}${plain ? "" : kept ? ", kept in the circuit" : ", not kept: no way to the score by edges large enough"}${off ? ", switched off" : ""}`;
  }

  function draw() {
    const now = shown(), numbered = now.edges.filter((place) => now.found[place]).length <= 12;
    const order = [...now.edges].sort((a, b) => now.found[a] - now.found[b] || Math.abs(now.values[a]) - Math.abs(now.values[b]));
    const lines = order.map((place) => edgeLines(now, place));
    svg.replaceChildren(
      ...rows.map((row) => drawn("text", { class: "row", x: 0, y: row.y + 4, text: row.name })),
      ...lines.map((one) => one.group), ...lines.map((one) => one.hit),
      ...view.nodes.map((_, place) => nodeShape(now, place)),
      ...order.filter((place) => now.found[place]).flatMap((place) => edgeText(now, place, numbered)));
  }

  // The nearest node that way, sideways distance counting less than none at all.
  function beside(right, down) {
    if (shown().node < 0) return 0;
    const here = view.nodes[shown().node];
    let best = -1, least = Infinity;
    view.nodes.forEach((node, place) => {
      const dx = node.x - here.x, dy = node.y - here.y, along = right ? right * dx : down * dy, across = Math.abs(right ? dy : dx);
      const same = right ? across < 40 : along > 1;
      if (along > 1 && same && along + (right ? 2 : 0.3) * across < least) { best = place; least = along + (right ? 2 : 0.3) * across; }
    });
    return best;
  }
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.key in moves) { const to = beside(...moves[event.key]); if (to >= 0) choose(to); }
    else if (event.key === "Escape") choose(-1);
    else if ((event.key === "Enter" || event.key === " ") && toggle && shown().node >= 0) toggle(view.nodes[shown().node]);
    else return;
    event.preventDefault(); event.stopPropagation();
  });
  svg.addEventListener("click", () => choose(-1));
  return { svg, draw };
}

function shapeLegend(view, colours) {
  const shape = (kind, text, thick = 1.5) => make("span", {}, drawn("svg", { class: "shape", viewBox: "-14 -8 28 16" }, outline(kind, 24, 12, { fill: "none", stroke: colours.ink, "stroke-width": thick })), document.createTextNode(text));
  const line = (colour, dash, text) => make("span", {}, drawn("svg", { class: "shape", viewBox: "-14 -8 28 16" }, drawn("path", { d: "M-13 0H13", stroke: colour, "stroke-width": dash ? 2 : 4, "stroke-dasharray": dash })), document.createTextNode(text));
  return make("div", { class: "legend" }, shape("span", "span"), shape("head", "head"), shape("neurons", "neurons of a layer"), shape("end", "refusal score", 3),
    line(view.palette.blue, null, "lowers the score"), line(view.palette.found, null, "raises it"), line(colours.soft, "5 4", "tested, not the circuit’s"));
}

// A share as a bar from 0, with its interval, before the range of random circuits in grey.
function shareBar(view, colours, one) {
  const value = (x) => 20 + 180 * Math.min(1.15, Math.max(-0.1, x)), at = (x) => value(x).toFixed(1);
  const bar = drawn("svg", { class: "share", viewBox: "0 0 230 16", width: 230, height: 16, role: "img", "aria-label": `${one.name} ${one.node} ${exact(one.share ?? NaN)}` });
  for (const x of [0, 0.5, 1]) bar.append(drawn("path", { d: `M${at(x)} 0V16`, stroke: colours.grid }));
  if (one.n_random) bar.append(drawn("rect", { class: "random", x: at(one.random_low), y: 1, width: Math.max(2, value(one.random_high) - value(one.random_low)).toFixed(1), height: 14, fill: view.palette.control, opacity: 0.6 }));
  if (Number.isFinite(one.share)) {
    bar.append(drawn("rect", { class: "own", x: at(Math.min(0, one.share)), y: 4, width: Math.max(1, Math.abs(value(one.share) - value(0))).toFixed(1), height: 8, fill: view.palette.blue }),
      drawn("path", { d: `M${at(one.low)} 8H${at(one.high)}`, stroke: colours.ink, "stroke-width": 1.5 }));
  }
  return bar;
}
