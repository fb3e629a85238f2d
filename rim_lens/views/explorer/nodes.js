// What a node of a circuit looks at or does, in the two runs that are held against each other.
// run(side): a run of the page, or null; choice: { prompt, query: [a, b], member }, kept by whoever shows it.
function nodePanel({ view, stored, colours, showTip, noTip, choice, redraw }) {
  const element = make("div", { "data-what": "reading" });
  const rowsOf = (kept, n) => {
    const start = (query) => (query * (query + 1) - kept.first * (kept.first + 1)) / 2;
    kept.floats ??= floats(stored(kept.values), 0, start(n));
    return (query) => (query < kept.first ? null : kept.floats.subarray(start(query), start(query + 1)));
  };
  const massOf = (run, head, span) => {
    const place = run.spans.indexOf(span);
    return place < 0 || run.masses[head] === undefined ? NaN : floats(stored(run.masses[head]), place, place + 1)[0];
  };

  function table(names, lines, first) {
    const head = make("tr", {}, make("th", { text: first }), ...names.map((text) => make("th", { class: "n", text })));
    return make("div", { class: "scroll" }, make("table", { "data-what": "masses" }, make("thead", {}, head), make("tbody", {}, ...lines.map(([name, values, colour]) =>
      make("tr", { "data-of": name }, make("td", {}, colour ? swatch(colour) : "", document.createTextNode(name)), ...values.map((value) => make("td", { class: "n", text: short(value), title: exact(value) })))))));
  }
  function massTable(runs, pairs, first) {
    const names = [...runs.map((run) => run.told), ...(runs.length > 1 ? ["difference"] : [])];
    const lines = pairs.map(([name, head, span, colour]) => {
      const values = runs.map((run) => massOf(run, head, span));
      return [name, runs.length > 1 ? [...values, values[0] - values[1]] : values, colour];
    });
    return [make("h4", { text: `Attention of the last prompt token, summed over a span; mean of ${runs[0].n} requests` }), table(names, lines, first)];
  }

  // One run's tokens, coloured; arrow keys and clicks choose one.
  function tokenBox(side, of, colour, told, at, pick, label) {
    const into = make("div", { class: "tokens", tabindex: 0, "data-what": "tokens" + side, "aria-label": label });
    const elements = tokenElements(into, view, of);
    elements.forEach((token, key) => {
      const paint = colour(key);
      token.style.backgroundColor = paint ? css(paint) : "transparent"; token.style.color = paint ? inkOn(paint) : colours.soft;
      token.classList.toggle("query", key === at);
    });
    into.addEventListener("mousemove", (event) => { const key = elements.indexOf(event.target.closest(".token")); if (key < 0) noTip(); else showTip(event, `${of.tokens[key]}  (token ${key}, ${of.atoms[key]})\n${told(key)}`); });
    into.addEventListener("mouseleave", noTip);
    const move = (to) => { pick(to); element.querySelector(`[data-what=tokens${side}]`)?.focus({ preventScroll: true }); };
    into.addEventListener("click", (event) => { const key = elements.indexOf(event.target.closest(".token")); if (key >= 0) move(key); });
    into.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      move(Math.min(elements.length - 1, Math.max(0, at + step)));
      event.preventDefault(); event.stopPropagation();
    });
    return into;
  }

  function headBoxes(node, runs) {
    const rows = runs.map((run, side) => {
      const of = run.prompts[choice.prompt], kept = of.rows[node.key], query = Math.min(choice.query[side] ?? of.last, of.tokens.length - 1);
      return { of, query, row: kept ? rowsOf(kept, of.tokens.length)(query) : null };
    });
    const top = Math.max(1e-9, ...rows.flatMap(({ row }) => (row ? [...row] : [])));
    const boxes = rows.map(({ of, query, row }, side) => make("div", {}, make("p", { class: "soft", text: `${runs[side].told}: from ${of.tokens[query]} (token ${query}, ${of.atoms[query]})${row ? "" : "; this row is not in this page"}` }),
      tokenBox(side, of, (key) => (row && key < row.length ? colours.sequential(Math.sqrt(row[key] / top)) : null), (key) => (!row ? "not in this page" : key < row.length ? `attention ${exact(row[key])}` : "after the query: not visible to it"),
        query, (key) => { choice.query[side] = key; redraw(); }, "Tokens; click, or left and right arrow keys, for another query")));
    return [make("p", { class: "soft", text: `Attention from the framed token, 0 to ${short(top)} (square root). Underlines: spans.` }), spanLegend(view, rows.map((one) => one.of)), make("div", { class: boxes.length > 1 ? "pair" : "" }, ...boxes)];
  }

  function neuronBoxes(node, runs) {
    const names = runs[0].prompts[choice.prompt].activations[node.key].names, member = Math.min(choice.member, names.length);
    const read = runs.map((run) => { const of = run.prompts[choice.prompt], n = of.tokens.length; return { of, values: floats(stored(of.activations[node.key].values), member * n, (member + 1) * n) }; });
    const top = Math.max(1e-9, ...read.flatMap(({ values }) => [...values].map(Math.abs)));
    const boxes = read.map(({ of, values }, side) => {
      const at = choice.query[side] ?? values.reduce((best, value, key) => (value > values[best] ? key : best), 0), here = Math.min(at, values.length - 1);
      return make("div", {}, make("p", { class: "soft", "data-what": "at" + side, text: `${runs[side].told}: ${minus(exact(values[here]))} at ${of.tokens[here]} (token ${here}, ${of.atoms[here]})` }),
        tokenBox(side, of, (key) => colours.diverging(0.5 + values[key] / top / 2), (key) => `activation ${minus(exact(values[key]))}`, here, (key) => { choice.query[side] = key; redraw(); }, "Tokens; arrow keys tell the activation of each"));
    });
    const pick = menu("member", "activation of", [["0", `the mean of all ${node.members.length}`], ...names.map((name, place) => [String(place + 1), name])], String(member), (value) => { choice.member = Number(value); redraw(); });
    return [make("div", { class: "bar" }, pick), make("p", { class: "soft", text: `Colour: −${top.toPrecision(3)} (blue) to +${top.toPrecision(3)} (vermillion). Underlines: spans.${names.length < node.members.length ? ` Named: the ${names.length} that differ most between the runs.` : ""}` }),
      spanLegend(view, read.map((one) => one.of)), make("div", { class: boxes.length > 1 ? "pair" : "" }, ...boxes)];
  }

  function draw(node, runs) {
    if (!node || node.kind === "end") return element.replaceChildren();
    if (!runs.length) return element.replaceChildren(make("p", { class: "soft", text: "What it looks at or does was not read: the page was made without a model." }));
    if (node.kind === "span") {
      const heads = view.nodes.filter((one) => one.kind === "head").map((one) => [one.name, one.key, node.key]);
      return element.replaceChildren(...massTable(runs, heads, `mass on ${node.name} of`));
    }
    const prompts = runs[0].prompts, parts = [];
    if (node.kind === "head") {
      const spans = view.atoms.concat(runs[0].spans.filter((span) => !view.atoms.includes(span))).filter((span) => runs.some((run) => run.spans.includes(span)));
      parts.push(...massTable(runs, spans.map((span) => [span, node.key, span, view.palette.spans[span]]), "mass on"));
    }
    if (prompts.length) {
      parts.push(make("div", { class: "bar" }, menu("prompt", "request", prompts.map((one, place) => [String(place), one.id]), String(choice.prompt), (value) => { choice.prompt = Number(value); choice.query = [null, null]; redraw(); })));
      parts.push(...(node.kind === "head" ? headBoxes(node, runs) : neuronBoxes(node, runs)));
    }
    return element.replaceChildren(...parts);
  }
  return { element, draw };
}
