// With a live kernel: steps that are taken one after another and taken back, what is measured after each, and all of it as code.
// controls: elements before undo and reset; asked(): what a message says besides its steps; fill(reply, table): shows what was measured and
// returns { names, course }, the columns and rows of the history; more: elements beside the code.
function stepsPanel({ box, kernel, title, controls, asked, fill, none, more = [] }) {
  let steps = [];
  const history = make("table", { "data-what": "history" }), scores = make("table", { "data-what": "scores" });
  const code = make("pre", { "data-what": "code" }), status = make("p", { class: "soft", "data-what": "status", role: "status" });
  const bar = make("div", { class: "bar" }, ...controls, pushButton("undo", "Undo", () => apply(steps.slice(0, -1))), pushButton("reset", "Reset", () => apply([])));
  const element = make("div", { class: "live" }, make("h3", { text: title }), bar, status, make("div", { class: "scroll" }, scores), make("h3", { text: "History" }), make("div", { class: "scroll" }, history), code, make("div", { class: "bar" }, pushButton("copy", "Copy code", copy), ...more));

  function say(text, wrong = false) {
    status.textContent = String(text instanceof Error ? text.message : text);
    status.className = wrong ? "wrong" : "soft";
  }
  async function apply(wanted) {
    box.querySelectorAll(".live button").forEach((one) => { one.disabled = true; });
    say("Running the model …");
    try {
      const reply = await kernel({ kind: "apply", steps: wanted, ...asked() });
      steps = wanted;
      show(reply);
      say(steps.length ? `${steps.length} ${steps.length === 1 ? "edit" : "edits"} in force.` : none);
    } catch (wrong) { say(wrong, true); }
    box.querySelectorAll(".live button").forEach((one) => { one.disabled = false; });
    box.dataset.applied = String(Number(box.dataset.applied ?? 0) + 1);
  }
  function show(reply) {
    const { names, course } = fill(reply, scores);
    const after = (values) => values.filter((value) => value !== null).map((value) => make("td", { class: "n", text: short(value), title: exact(value) }));
    history.replaceChildren(make("thead", {}, make("tr", {}, make("th", { text: "edit, beside those above" }), ...names.map((name) => make("th", { class: "n", text: name })))),
      make("tbody", {}, ...course.map((step) => make("tr", {}, make("td", { text: step.edit }), ...after(step.scores)))));
    code.textContent = reply.code;
  }
  function copy() {
    const chosen = () => { getSelection().selectAllChildren(code); say("The code is selected: copy it."); };
    if (!navigator.clipboard) return chosen();
    return navigator.clipboard.writeText(code.textContent).then(() => say("The code is on the clipboard."), chosen);
  }
  setTimeout(() => apply([]), 0);
  return { element, say, apply, add: (step) => apply([...steps, step]), again: () => apply(steps), steps: () => steps };
}

function pushButton(what, text, onclick) { return make("button", { type: "button", text, onclick, "data-what": what }); }

// Ablate or scale what is ticked, and see refusal move.
// word: "head" or "neuron"; prompt(): the row that is scored; here(): "layer.number" of the chosen one; ticksChanged: redraws the ticks.
function livePanel({ box, kernel, word, prompt, here, ticksChanged }) {
  const ticked = new Set();
  const tickButton = pushButton("tick", `Tick this ${word}`, tick);
  const factor = make("input", { type: "number", step: "0.25", value: "0.5", "aria-label": "factor", "data-what": "factor" });
  const panel = stepsPanel({ box, kernel, title: `Edit ${word}s and see refusal move`, asked: () => ({ prompt: prompt() }), fill, none: "No edit: the model as it is.",
    controls: [tickButton, pushButton("ablate", "Ablate ticked", () => edit("ablate", null)), pushButton("scale", "Scale ticked by", () => edit("scale", Number(factor.value))), factor] });

  function label() { tickButton.textContent = (ticked.has(here()) ? "Untick" : "Tick") + ` this ${word}`; }
  function tick() {
    if (!ticked.delete(here())) ticked.add(here());
    ticksChanged(); label();
  }
  function edit(operation, by) {
    if (!ticked.size) return panel.say(`No ${word} is ticked: choose one above and tick it, then ablate or scale.`, true);
    const chosen = [...ticked].map((name) => name.split(".").map(Number)).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    return panel.add({ operation, [word + "s"]: chosen, factor: by });
  }
  function fill(reply, scores) {
    const head = make("tr", {}, ...["condition", "refusal score (nats)", "as it is", "effect", "likeliest first tokens", "continuation"].map((text, place) => make("th", { text, class: place > 0 && place < 4 ? "n" : null })));
    scores.replaceChildren(make("thead", {}, head), make("tbody", {}, ...reply.conditions.map((one) => {
      const tokens = make("td", { class: "tokens-first" });
      one.tokens.forEach((token, place) => tokens.append(place ? ", " : "", make("code", { text: token.token }), ` ${token.probability.toFixed(3)}`));
      if (one.note) tokens.append(one.note);
      return make("tr", { "data-condition": one.name }, make("td", { text: one.name }), make("td", { class: "n", text: short(one.score ?? NaN), title: exact(one.score ?? NaN), "data-what": "score" }),
        make("td", { class: "n", text: short(one.baseline ?? NaN) }), make("td", { class: "n", text: one.score === null ? "–" : signed(one.score - one.baseline) }), tokens, make("td", { text: one.continuation }));
    })));
    const names = reply.conditions.filter((one) => one.score !== null).map((one) => `score, ${one.name}`);
    return { names, course: [{ edit: "no edit", scores: reply.conditions.map((one) => one.baseline) }, ...reply.history] };
  }
  return { ...panel, ticked, tick, label };
}
