// The circuit explorer.
const SOME = 15;  // tested edges that are drawn besides the circuit's, at first

export function mount(root, view, arrays, kernel = null) {
  const stored = (ref) => arrays(ref);
  const { box, tip, colours, showTip, noTip, keepDrawn } = frameOf(root, view);
  const style = make("style"); style.textContent = GRAPH_CSS; root.prepend(style);
  const state = { circuit: 0, minus: -1, contrast: view.circuits[0].contrasts[0].key, drawn: "some", node: -1, edge: -1, off: new Set(), alone: false, score: null, choice: { prompt: 0, query: [null, null], member: 0 } };
  const number = (value) => (value === null || value === undefined ? NaN : value);
  const circuit = () => view.circuits[state.circuit];
  const ofContrast = (one, key) => one.contrasts.find((other) => other.key === key);
  const nats = (value) => (Number.isFinite(value) ? minus((value > 0 ? "+" : "") + (Math.abs(value) < 0.005 && value ? value.toPrecision(1) : value.toFixed(2))) : "–");
  const told = (value, low, high) => `${nats(number(value))} [${nats(number(low))}, ${nats(number(high))}]`;
  const between = (low, high) => `${nats(number(low))} to ${nats(number(high))}`;
  const pTold = (p) => (Number.isFinite(p) ? (p < 0.0001 ? "p < 0.0001" : `p = ${p.toPrecision(2)}`) : "not tested");

  // --- numbers ---

  // One row per edge of what is shown: a circuit in a contrast, or the difference of two.
  function numbers() {
    const here = ofContrast(circuit(), state.contrast);
    if (state.minus < 0) {
      const { effect, effect_low: low, effect_high: high, p } = here.columns;
      return { values: effect.map(number), low, high, p, found: here.found, word: "effect", columns: here.columns,
        title: `${circuit().name}, “${here.name}”: what changes in the score when the receiver hears the sender as in ${here.instead} (nats)` };
    }
    const [first, second] = [state.minus, state.circuit].sort((a, b) => a - b), turn = first === state.minus ? 1 : -1;
    const pair = view.differences.find((one) => one.first === first && one.second === second && one.contrast === state.contrast);
    const other = ofContrast(view.circuits[state.minus], state.contrast), by = (values) => values.map((value) => turn * number(value));
    return { values: by(pair.change), low: by(turn > 0 ? pair.change_low : pair.change_high), high: by(turn > 0 ? pair.change_high : pair.change_low), p: pair.p,
      found: here.found.map((one, place) => one || other.found[place]), word: "change", pair: [here, other],
      title: `${circuit().name} − ${view.circuits[state.minus].name}, “${here.name}”: difference of effects (nats); solid where an edge is one of the two circuits’` };
  }
  // Widths mean the same in every circuit of a contrast; differences have a scale of their own.
  function most(now) {
    const all = state.minus >= 0 ? [now.values] : view.circuits.map((one) => ofContrast(one, state.contrast)?.columns.effect.map(number) ?? []);
    return Math.max(1e-9, ...all.flat().filter(Number.isFinite).map(Math.abs));
  }
  function drawnEdges(now) {
    const places = view.edges.map((_, place) => place), found = places.filter((place) => now.found[place]);
    const rest = places.filter((place) => !now.found[place] && Math.abs(now.values[place]) > 0).sort((a, b) => Math.abs(now.values[b]) - Math.abs(now.values[a]));
    return { found, rest: state.drawn === "found" ? [] : state.drawn === "some" ? rest.slice(0, SOME) : rest, all: rest.length };
  }
  // The two runs that are held against each other: both of the contrast, or the one that is read in both circuits.
  function runsShown() {
    const own = circuit().runs ?? [];
    const pair = state.minus < 0 ? [own[0], own.find((run) => run.name === state.contrast)] : [own[0], (view.circuits[state.minus].runs ?? [])[0]];
    const there = pair.filter(Boolean);
    return state.minus < 0 ? there : there.map((run, side) => ({ ...run, told: `${[circuit(), view.circuits[state.minus]][side].name}: ${run.told}` }));
  }

  // --- words of an edge ---

  function edgeTold(now, place) {
    const edge = view.edges[place], lines = [edge.name, `${now.word} ${told(now.values[place], now.low[place], now.high[place])} nats`, `${pTold(number(now.p[place]))}, corrected over ${view.edges.length} edges`];
    if (now.columns) {
      const c = now.columns, share = number(c.share[place]), n = c.n_controls[place];
      if (Number.isFinite(share)) lines.push(`${(100 * share).toFixed(0)} % of the difference between the runs`);
      if (n) lines.push(`percentile ${number(c.percentile[place]).toFixed(0)} among ${n} random senders`);
    } else lines.push(...now.pair.map((one, side) => `${[circuit(), view.circuits[state.minus]][side].name}: ${told(one.columns.effect[place], one.columns.effect_low[place], one.columns.effect_high[place])}${one.found[place] ? ", the circuit’s" : ""}`));
    lines.push(now.found[place] ? (now.pair ? "one of the two circuits’" : "the circuit’s") : "tested, not the circuit’s");
    return lines.join("\n");
  }

  // --- the graph ---

  const live = kernel && switchPanel();
  const graphTitle = make("p", { class: "soft", "data-what": "graph-title" }), graphNote = make("p", { class: "soft", "data-what": "graph-note" }), legend = make("div");
  const scoreNow = make("p", { "data-what": "score-now" }), said = make("p", { "aria-live": "polite", "data-what": "said" });
  const graph = circuitGraph({ view, colours, showTip, noTip, choose, chooseEdge, toggle: live && ((node) => live.toggle(node.key, canSwitch(node))),
    shown: () => {
      const now = numbers(), { found, rest } = drawnEdges(now);
      const edges = [...found, ...rest];
      if (state.edge >= 0 && !edges.includes(state.edge)) edges.push(state.edge);
      return { ...now, edges, most: most(now), kept: circuit().kept, off: state.off, node: state.node, edge: state.edge, told: (place) => edgeTold(now, place) };
    } });
  const canSwitch = (node) => node.kind === "head" || node.kind === "neurons";

  function drawGraph() {
    graph.draw();
    const now = numbers(), { found, rest, all } = drawnEdges(now);
    graphTitle.textContent = now.title + (state.alone ? ". All but the circuit is switched off." : ".");
    scoreNow.textContent = state.score ? `Refusal score of harmful requests: ${nats(state.score.after)} now, ${nats(state.score.full)} with nothing off (nats).` : "";
    graphNote.textContent = `${found.length} of ${view.edges.length} edges are ${state.minus < 0 ? "the circuit’s" : "one of the two circuits’"}; of the others ${rest.length} are drawn${rest.length < all ? `, the largest of ${all}` : ""}. Widest: ${most(now).toPrecision(3)} nats. Click a node or an edge.`;
    legend.replaceChildren(shapeLegend(view, colours));
  }
  function choose(place) {
    state.node = place; state.edge = -1; state.choice.query = [null, null]; state.choice.member = 0;
    draw();
  }
  function chooseEdge(place) { state.edge = place; state.node = -1; draw(); }

  // --- the side panel ---

  const sideTitle = make("h3", { "data-what": "chosen" }), facts = make("div", { "data-what": "facts" });
  const panel = nodePanel({ view, stored, colours, showTip, noTip, choice: state.choice, redraw: () => draw() });

  function drawSide() {
    const now = numbers();
    if (state.edge >= 0) return drawEdgeFacts(now, state.edge);
    const node = view.nodes[state.node];
    if (!node) {
      sideTitle.textContent = "The circuit’s edges, largest first";
      facts.replaceChildren(edgeTable(now, view.edges.map((_, place) => place).filter((place) => now.found[place]), (edge) => edge.name, "edge"));
      said.textContent = `${circuit().name}: ${now.found.filter(Boolean).length} edges found.`;
      return panel.draw(null, []);
    }
    const kind = { head: `head, layer ${node.layer}`, neurons: `${node.members.length} neurons of layer ${node.layer}`, span: "span of the prompt", end: "refusal score", direction: "direction" }[node.kind];
    sideTitle.textContent = `${node.name}: ${kind}`;
    said.textContent = `${node.name}, ${kind}.`;
    const lines = [], minimal = circuit().shares.find((one) => one.name === "minimality" && one.node === node.name);
    if (canSwitch(node)) {
      lines.push(make("p", { class: "soft", text: circuit().kept[state.node] ? `Kept in ${circuit().name}. ${minimal ? minimal.told : ""}` : `Not kept in ${circuit().name}: no way from it to the score by edges large enough on the requests that chose.` }));
      if (node.kind === "neurons") lines.push(make("p", { class: "soft", text: `Neurons: ${node.members.slice(0, 30).join(", ")}${node.members.length > 30 ? " …" : ""}` }));
      if (live) lines.push(make("div", { class: "bar" }, pushButton("toggle", state.off.has(node.key) ? "Switch this node on" : "Switch this node off", () => live.toggle(node.key, true))));
    }
    if (node.kind === "end") lines.push(make("p", { class: "soft", text: `Log-odds, in nats, that the answer opens with a refusal. ${refusedTold()}` }));
    const into = [], out = [];
    view.edges.forEach((edge, place) => { if (edge.receiver === state.node) into.push(place); if (edge.sender === state.node) out.push(place); });
    const inputs = { q: "its queries", k: "its keys", v: "its values", mlp: "its input", logits: "the final norm", projection: "the direction" };
    if (into.length) lines.push(make("h4", { text: "Hears" }), edgeTable(now, into, (edge) => `${view.nodes[edge.sender].name}, by ${inputs[edge.input] ?? edge.input}`, "sender"));
    if (out.length) lines.push(make("h4", { text: "Is heard by" }), edgeTable(now, out, (edge) => view.nodes[edge.receiver].name + (edge.input in PORTS ? `, ${inputs[edge.input]}` : ""), "receiver"));
    facts.replaceChildren(...lines);
    return panel.draw(node, runsShown());
  }
  const refusedTold = () => { const { harmful, harmless } = circuit().refused; return harmful === null || harmful === undefined ? "" : `By score it refuses ${(100 * harmful).toFixed(0)} % of the harmful requests that chose, and ${(100 * number(harmless)).toFixed(0)} % of their twins.`; };

  function edgeTable(now, places, name, first) {
    const few = [...places].sort((a, b) => now.found[b] - now.found[a] || Math.abs(now.values[b]) - Math.abs(now.values[a])), cut = few.slice(0, 60);
    const head = make("tr", {}, ...[first, `${now.word}, nats`, "95 % interval", "p, corrected", "", ...(live ? [""] : [])].map((text, place) => make("th", { text, class: place > 0 && place < 4 ? "n" : null })));
    const rows = cut.map((place) => make("tr", { "data-edge": view.edges[place].key, class: "pick" + (place === state.edge ? " chosen" : "") },
      make("td", {}, make("button", { type: "button", text: name(view.edges[place]), onclick: () => chooseEdge(place) })),
      make("td", { class: "n", text: nats(now.values[place]), title: exact(now.values[place]) }), make("td", { class: "n", text: between(now.low[place], now.high[place]) }), make("td", { class: "n", text: pTold(number(now.p[place])).replace("p = ", "") }),
      make("td", { class: "soft", text: now.found[place] ? "found" : "tested" }), live ? make("td", {}, cutButton(place)) : null));
    const caption = few.length > cut.length ? make("caption", { text: `The largest ${cut.length} of ${few.length}.` }) : null;
    return make("div", { class: "scroll tall" }, make("table", { "data-what": "edges" }, caption, make("thead", {}, head), make("tbody", {}, ...rows)));
  }
  const cutButton = (place) => make("button", { type: "button", text: state.off.has(view.edges[place].key) ? "on" : "off", "aria-label": `Switch ${view.edges[place].name} ${state.off.has(view.edges[place].key) ? "on" : "off"}`, "data-cut": view.edges[place].key, onclick: () => live.toggle(view.edges[place].key, true) });

  function drawEdgeFacts(now, place) {
    const edge = view.edges[place], here = ofContrast(circuit(), state.contrast), c = here.columns;
    sideTitle.textContent = edge.name;
    said.textContent = edgeTold(now, place).replaceAll("\n", "; ") + ".";
    const line = (what, value) => make("tr", { "data-of": what }, make("td", { text: what }), make("td", { class: "n", text: value }));
    const at = (name) => number(c[name]?.[place]), three = (name) => told(at(name), at(name + "_low"), at(name + "_high"));
    const lines = [line(`effect, ${circuit().name} (nats)`, three("effect")), line("the other way round: this run’s words in the other run", three("back")), line("both, which is tested", three("both")), line("p, corrected", pTold(at("p"))),
      line("share of the difference between the runs", short(at("share"))), line("effect on the requests that chose", nats(at("effect_select"))),
      line("among random senders of its layer", c.n_controls[place] ? `percentile ${at("percentile").toFixed(0)} of ${c.n_controls[place]}` : "none drawn"), line("composition of weights", short(at("composition"))), line("verdict", here.found[place] ? "the circuit’s" : "tested, not the circuit’s")];
    if (now.pair) lines.unshift(line(`change, ${circuit().name} − ${view.circuits[state.minus].name} (nats)`, told(now.values[place], now.low[place], now.high[place])), line("p of the change, corrected", pTold(number(now.p[place]))));
    facts.replaceChildren(make("div", { class: "bar" }, ...[edge.sender, edge.receiver].map((end) => pushButton("end", view.nodes[end].name, () => choose(end))), ...(live ? [cutButton(place)] : [])),
      make("div", { class: "scroll" }, make("table", { "data-what": "edge" }, make("tbody", {}, ...lines))), requestStrip(here, place));
    panel.draw(null, []);
  }

  // The edge's effect on each request.
  function requestStrip(here, place) {
    const n = circuit().n, values = [...floats(stored(here.requests), place * n, (place + 1) * n)], finite = values.filter(Number.isFinite);
    const low = Math.min(0, ...finite), high = Math.max(0, ...finite), span = high - low || 1, x = (value) => 12 + (396 * (value - low)) / span;
    const strip = drawn("svg", { viewBox: "0 0 420 46", width: 420, height: 46, role: "img", "data-what": "requests", "aria-label": `Effect on each of ${n} requests`, style: "max-width: 100%" });
    strip.append(drawn("path", { d: `M${x(0)} 2V30`, stroke: colours.axis }), drawn("text", { x: x(0), y: 42, "text-anchor": "middle", fill: colours.soft, "font-size": 11, text: "0" }));
    values.forEach((value, request) => {
      if (!Number.isFinite(value)) return;
      const dot = drawn("circle", { cx: x(value).toFixed(1), cy: 8 + 16 * ((request * 0.618) % 1), r: 3, fill: edgeColour(view, value), opacity: 0.75 });
      dot.addEventListener("mousemove", (event) => showTip(event, `${circuit().requests[request]}: ${minus(exact(value))} nats`));
      dot.addEventListener("mouseleave", noTip);
      strip.append(dot);
    });
    const end = Math.abs(low) > high ? low : high;
    strip.append(drawn("text", { x: x(end), y: 42, "text-anchor": end < 0 ? "start" : "end", fill: colours.soft, "font-size": 11, text: minus(end.toFixed(1)) + " nats" }));
    return make("div", {}, make("h4", { text: `Its effect on each of the ${n} requests` }), strip);
  }

  // --- what the circuit as a whole is worth ---

  const whole = make("div", { "data-what": "shares" });
  function drawWhole() {
    const one = circuit(), line = (share) => make("tr", { "data-of": (share.name + " " + share.node).trim() }, make("td", { text: share.node ? `minimality of ${share.node}` : share.name }), make("td", {}, shareBar(view, colours, share)), make("td", { class: "soft", text: share.told }));
    const parts = one.shares.map(line), elsewhereTold = { faithfulness: "all but the circuit replaced", completeness: "the circuit replaced" };
    const kinds = { harmless: "twins, refusal score", reasoning: "reasoning, refusal score", "reasoning answers": "reasoning, log-probability of the answer" };
    const note = one.shares.length ? `Bars: share of refusal, 0 to 1, with 95 % intervals over families (${one.shares[0].n} requests of ${one.shares[0].n_families} families); grey: 95 % of random circuits.` : one.selected.length ? `Selected by hand, ${one.selected.join("; ")} switched off: not tested.` : "No node is kept, so that there is nothing to test.";
    whole.replaceChildren(make("h3", { text: `Is it enough, is it all, is each part needed? ${one.name}` }), make("p", { class: "soft", text: note }), make("div", { class: "scroll tall" }, make("table", {}, make("tbody", {}, ...parts))),
      one.elsewhere.length ? make("div", { class: "scroll" }, make("table", { "data-what": "elsewhere" }, make("thead", {}, make("tr", {}, ...["on other prompts", "", "change", "95 % interval"].map((text, place) => make("th", { text, class: place > 1 ? "n" : null })))),
        make("tbody", {}, ...one.elsewhere.map((row) => make("tr", {}, make("td", { text: kinds[row.kind] ?? row.kind }), make("td", { text: elsewhereTold[row.measure] ?? row.measure }), make("td", { class: "n", text: nats(number(row.change)) }), make("td", { class: "n", text: between(row.change_low, row.change_high) })))))) : "");
  }

  // --- with a kernel: switches ---

  function switchPanel() {
    const folder = make("input", { "data-what": "folder", placeholder: "folder", "aria-label": "folder for the selection" });
    folder.style.width = "14em";
    const alone = pushButton("alone", "The circuit alone", () => switches.add({ operation: state.alone ? "whole" : "alone" }));
    const switches = stepsPanel({ box, kernel, title: "Switch nodes and edges off and see refusal move", none: "Nothing is off: the model as it is.", controls: [alone],
      asked: () => ({ circuit: state.circuit, contrast: state.contrast }), fill,
      more: [folder, pushButton("save", "Save the selection as a circuit", save)] });
    function fill(reply, scores) {
      state.off = new Set(reply.off); state.alone = reply.alone; state.score = reply.rows[0];
      alone.textContent = state.alone ? "The whole model" : "The circuit alone";
      const names = { harmful: "refusal score, harmful", harmless: "refusal score, twins", reasoning: "refusal score, reasoning", "reasoning answers": "log-probability of the right answer", "reasoning right": "right answers, reasoning" };
      const head = make("tr", {}, ...["", "now", "as it is", "change", "95 % interval", "share that stays", "n"].map((text, place) => make("th", { text, class: place ? "n" : null })));
      scores.replaceChildren(make("thead", {}, head), make("tbody", {}, ...reply.rows.map((row) => make("tr", { "data-kind": row.kind }, make("td", { text: `${names[row.kind] ?? row.kind} (${row.unit})` }),
        make("td", { class: "n", text: short(number(row.after)), title: exact(number(row.after)), "data-what": "score" }), make("td", { class: "n", text: short(number(row.full)) }), make("td", { class: "n", text: row.unit === "share" ? signed(number(row.change)) : nats(number(row.change)) }),
        make("td", { class: "n", text: between(row.change_low, row.change_high) }), make("td", { class: "n", text: short(number(row.share)) }), make("td", { class: "n", text: String(row.n) })))));
      draw();
      return { names: reply.kinds.map((kind) => names[kind] ?? kind), course: reply.history.map((step, place) => (place ? step : { ...step, edit: "no edit" })) };
    }
    async function save() {
      try { const reply = await kernel({ kind: "save", folder: folder.value }); switches.say(`Saved in ${reply.saved}: rl.Circuit.load reads it.`); }
      catch (wrong) { switches.say(wrong, true); }
      box.dataset.saved = String(Number(box.dataset.saved ?? 0) + 1);
    }
    function toggle(key, can) {
      if (can) switches.add({ operation: state.off.has(key) ? "on" : "off", names: [key] });
      else switches.say("Only heads and neurons can be switched off, and edges, one by one.", true);
    }
    return { ...switches, toggle };
  }

  // --- controls, and all of it ---

  const bar = make("div", { class: "bar" });
  function controls() {
    const names = view.circuits.map((one, place) => [String(place), one.name]), parts = [], changed = (what, again) => (value) => { what(value); controls(); draw(); if (again) live?.again(); };
    if (names.length > 1) {
      parts.push(menu("circuit", "circuit", names, String(state.circuit), changed((value) => {
        state.circuit = Number(value);
        if (!ofContrast(circuit(), state.contrast)) state.contrast = circuit().contrasts[0].key;
        state.choice.prompt = 0; state.choice.query = [null, null];
      }, true)));
    }
    const with_ = view.differences.filter((one) => one.contrast === state.contrast && (one.first === state.circuit || one.second === state.circuit)).map((one) => (one.first === state.circuit ? one.second : one.first));
    if (!with_.includes(state.minus)) state.minus = -1;
    if (with_.length) parts.push(menu("minus", "minus", [["-1", "–"], ...with_.map((place) => names[place])], String(state.minus), changed((value) => { state.minus = Number(value); })));
    const contrasts = circuit().contrasts.map((one) => [one.key, one.name]);
    if (contrasts.length > 1) parts.push(menu("contrast", "heard instead", contrasts, state.contrast, changed((value) => { state.contrast = value; }, true)));
    parts.push(menu("drawn", "edges", [["found", "the circuit’s"], ["some", "with the largest tested"], ["all", "all tested"]], state.drawn, changed((value) => { state.drawn = value; })));
    bar.replaceChildren(...parts);
  }

  function draw() { drawGraph(); drawSide(); drawWhole(); }
  controls();
  box.append(
    make("h2", { text: view.title }), make("p", { class: "soft", text: view.about }), bar,
    make("div", { class: "two wide" },
      make("div", {}, graphTitle, legend, graph.svg, graphNote, ...(live ? [scoreNow] : []), said),
      make("div", {}, sideTitle, facts, panel.element)),
    whole, ...(live ? [live.element] : []), ...view.not_compared.map((text) => make("p", { class: "soft", text: `Not compared: ${text}` })), make("p", { class: "soft", text: view.caveat }), tip,
  );
  return keepDrawn(draw);
}

const render = rendering(mount);
export default { render };
