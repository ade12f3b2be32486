"use strict";
// All text of a run is written by textContent or createTextNode: nothing of it is ever read as markup.
const runs = JSON.parse(document.getElementById("data").textContent);
const PANELS = [
  ["objective/scores", "Score", "eval/scores"], ["objective/kl", "KL to the reference (nats per sequence)", "eval/kl"],
  ["objective/entropy", "Entropy (nats)"], ["completions/mean_length", "Completion length (tokens)"],
  ["policy/clipfrac_avg", "Clip fraction"], ["loss/value_avg", "Value loss"],
  ["loss/cross_entropy", "Cross-entropy (nats per token)", "eval/loss"], ["eval/accuracy", "Held-out accuracy"],
];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2"], PAGE = 50;
const colour = i => `var(--c${i % 6})`, byId = id => document.getElementById(id);
const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value); else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const short = x => x === null ? "not finite" : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential(2) : String(+x.toPrecision(4));
const score = x => x === null ? "\u2013" : x.toFixed(3);
// Control characters show as their pictures (U+2400 on), halves of a letter as a mark.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]|\p{Surrogate}/gu, "\ufffd");
const text = value => make("div", value.length > 300 ? {class: "text", tabindex: 0} : {class: "text"}, visible(value) || "(empty)");
const choice = (name, values, chosen, change) => {
  const select = make("select", {"aria-label": name, change});
  values.forEach(([value, label]) => select.append(make("option", {value}, label)));
  select.value = chosen;
  return make("label", {}, name + " ", select);
};

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++) found.push(10 ** e);
    return found.length > 1 ? found.filter((_, i) => i % Math.ceil(found.length / 5) === 0) : [low, high];
  }
  const rough = (high - low) / 4, size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find(x => x * size >= rough), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function panel([name, title, other], wantsLog) {
  const lines = runs.flatMap((run, i) => [[name, false], ...(other ? [[other, true]] : [])].flatMap(([metric, heldOut]) =>
    run.curves[metric] ? [{run, i, heldOut, ...run.curves[metric]}] : []));
  if (!lines.length) return null;
  const ends = lines.flatMap(l => l.values.flatMap((v, k) => [v - (l.errors[k] || 0), v + (l.errors[k] || 0)]));
  const values = lines.flatMap(l => l.values), lost = lines.reduce((sum, l) => sum + l.lost.length, 0);
  const log = wantsLog && values.length > 0 && values.every(v => v > 0);
  const least = values.reduce((a, b) => Math.min(a, b), Infinity), fit = log ? ends.filter(v => v > 0) : ends;
  let low = fit.reduce((a, b) => Math.min(a, b), Infinity), high = fit.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!values.length) [low, high] = [0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) / 10 || .5), high + (Math.abs(high) / 10 || .5)];
  const all = lines.flatMap(l => [...l.steps, ...l.lost]);
  const from = all.reduce((a, b) => Math.min(a, b), Infinity), to = Math.max(all.reduce((a, b) => Math.max(a, b), -Infinity), from + 1);
  const f = log ? Math.log10 : v => v, W = 360, H = 210, L = 58, R = 10, T = 10, B = 36;
  const x = s => L + (s - from) / (to - from) * (W - L - R);
  const y = v => H - B - (f(log ? Math.max(v, Math.min(low, least)) : v) - f(low)) / (f(high) - f(low)) * (H - T - B);
  const svg = draw("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} by step`});
  for (const v of ticks(low, high, log)) svg.append(
    draw("line", {class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v)}), draw("text", {x: L - 5, y: y(v) + 4, "text-anchor": "end"}, short(v)));
  for (const s of ticks(from, to, false).filter(Number.isInteger)) svg.append(draw("text", {x: x(s), y: H - B + 15, "text-anchor": "middle"}, String(s)));
  svg.append(draw("text", {x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle"}, "step"));
  for (const l of lines) {
    const group = draw("g", {stroke: colour(l.i), fill: l.heldOut ? "var(--ground)" : "none", "stroke-width": 1.7});
    group.append(draw("polyline", {fill: "none", "stroke-dasharray": DASHES[l.i % 6], "stroke-opacity": l.heldOut ? .45 : 1,
      points: l.steps.map((s, k) => `${x(s).toFixed(1)},${y(l.values[k]).toFixed(1)}`).join(" ")}));
    l.steps.forEach((s, k) => {
      const v = l.values[k], e = l.errors[k];
      if (e) group.append(draw("path", {d: `M${x(s)},${y(v - e)}V${y(v + e)}m-3,0h6M${x(s) - 3},${y(v - e)}h6`}));
      if (l.heldOut) group.append(draw("path", {d: `M${x(s)},${y(v) - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z`}));
      else if (l.steps.length === 1) group.append(draw("circle", {cx: x(s), cy: y(v), r: 2.5}));
    });
    svg.append(group);
    for (const s of l.lost) svg.append(draw("path", {class: "lost", d: `M${x(s) - 3},${H - B - 6}l6,6m0,-6l-6,6`}));
  }
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, event => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * W, py = (event.clientY - box.top) / box.height * H;
    let best = null, distance = Infinity;
    for (const l of lines) l.steps.forEach((s, k) => {
      const d = Math.hypot(x(s) - px, y(l.values[k]) - py);
      if (d < distance) [distance, best] = [d, [l, k]];
    });
    if (best) {
      const [l, k] = best, error = l.errors[k] === null ? "" : ` \u00b1 ${short(l.errors[k])}`;
      byId("point").textContent = `${title}${l.heldOut ? ", held out" : ""}: ${visible(l.run.name)}, step ${l.steps[k]}: ${short(l.values[k])}${error}`;
    }
  });
  const every = Math.max(...lines.map(l => l.every)), notes = [];
  if (lines.some(l => l.heldOut)) notes.push("\u25c7 held out" + (lines.some(l => l.heldOut && l.errors.some(e => e)) ? ", \u00b1 1 standard error" : ""));
  if (every > 1) notes.push(`a point stands for up to ${every} steps`);
  if (lost) notes.push(`\u00d7 ${lost} not finite`);
  if (wantsLog && !log) notes.push("linear: not all values are above 0");
  return make("figure", {}, make("figcaption", {}, title, make("br"), make("small", {}, notes.join("; ") || "\u00a0")), svg);
}

function panels() {
  const log = byId("log").checked, more = byId("more");
  const names = [...new Set(runs.flatMap(run => Object.keys(run.curves)))].sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
  const attempts = names.filter(name => /^eval\/(pass|majority)@/.test(name)).map(name => [name, `Held-out ${name.slice(5)}`]);
  const drawn = [...PANELS, ...attempts].map(p => panel(p, log)).filter(p => p);
  byId("panels").replaceChildren(...(drawn.length ? drawn : ["Nothing is logged yet."]));
  if (more.open) more.lastElementChild.replaceChildren(...names.map(name => panel([name, name], log)).filter(p => p));
}

function time() {
  const colours = {"sampler": 0, "reward": 1, "other models": 3, "learner": 2, "rest": 4};
  const words = {"sampler": "sampler", "reward": "reward", "other models": "other models (reference, critic, reward model), beyond the reward", "learner": "learner",
    "rest": "rest: idle, evaluation, logs, snapshots"};
  for (const run of runs) {
    const parts = Object.entries(run.seconds), total = parts.reduce((sum, [, s]) => sum + s, 0);
    const share = s => (100 * s / (total || 1)).toFixed(1) + " %";
    if (runs.length > 1) byId("time").append(make("h3", {}, visible(run.name)));
    if (!parts.length) { byId("time").append("No seconds are logged."); continue; }
    const swatch = part => make("span", {class: "swatch", style: `background:${colour(colours[part])}`});
    byId("time").append(make("div", {class: "bar", "aria-hidden": "true"}, ...parts.map(([part, s]) =>
      make("span", {style: `width:${100 * s / (total || 1)}%;background:${colour(colours[part])}`, title: `${part} ${share(s)}`}))),
    make("div", {class: "scroll"}, make("table", {}, make("tr", {}, make("th", {}, "part"), ...["seconds", "share", "seconds an iteration"].map(h => make("th", {class: "number"}, h))),
      ...parts.map(([part, s]) => make("tr", {}, make("td", {}, swatch(part), words[part]),
        ...[s.toFixed(total < 100 ? 3 : 1), share(s), (s / Math.max(run.iterations, 1)).toFixed(3)].map(v => make("td", {class: "number"}, v)))))));
  }
}

// One list of completions for all runs: index, not copies.
const samples = runs.flatMap((run, r) => run.completions.step.map((step, k) => ({
  r, step, prompt: run.completions.prompt[k], completion: run.completions.completion[k], score: run.completions.score[k]})));

function compare() {
  const prompts = new Map();
  for (const s of samples) prompts.set(s.prompt, (prompts.get(s.prompt) || []).concat([s]));
  if (!samples.length) return byId("compare").append("No completions are logged.");
  const places = list => [...new Map(list.map(s => [`${s.r}/${s.step}`, s])).values()].sort((a, b) => a.step - b.step || a.r - b.r);
  const ordered = [...prompts].sort((a, b) => places(b[1]).length - places(a[1]).length).slice(0, 500);
  const promptText = make("div"), panes = make("div", {class: "pair"});
  const show = i => {
    const list = ordered[i][1], at = places(list), options = at.map((s, k) => [k, (runs.length > 1 ? visible(runs[s.r].name) + ", " : "") + `step ${s.step}`]);
    promptText.replaceChildren(...(/^[^\n]{1,80}$/.test(ordered[i][0]) ? [] : [text(ordered[i][0])]));
    panes.replaceChildren(...[["before", 0], ["after", at.length - 1]].map(([name, first]) => {
      const cards = make("div"), update = k => cards.replaceChildren(...list.filter(s => s.r === at[k].r && s.step === at[k].step)
        .sort((a, b) => b.score - a.score).map(s => make("div", {class: "card"}, make("strong", {}, "score " + score(s.score)), text(s.completion))));
      update(first);
      return make("div", {}, choice(name, options, first, event => update(+event.target.value)), cards);
    }));
  };
  byId("compare").append(choice("prompt", ordered.map(([p], i) => [i, visible(p).slice(0, 80) || "(empty)"]), 0, event => show(+event.target.value)), promptText, panes);
  if (prompts.size > ordered.length) byId("compare").prepend(make("p", {class: "faint"}, `The ${ordered.length} of ${prompts.size} prompts with the most steps.`));
  show(0);
}

function table() {
  if (!samples.length) return byId("table").append("No completions are logged.");
  let sorted = "step", down = false, at = 0, rows = samples;
  const several = runs.length > 1, columns = [...(several ? ["run"] : []), "step", "score", "prompt", "completion"];
  const key = {run: s => s.r, step: s => s.step, score: s => s.score ?? -Infinity, prompt: s => s.prompt, completion: s => s.completion};
  const field = (name, type) => make("input", {type, "aria-label": name, placeholder: name, input: () => filter()});
  const words = field("text", "search"), low = field("least score", "number"), high = field("most score", "number");
  low.step = high.step = "any";
  const steps = [...new Set(samples.map(s => s.step))].sort((a, b) => a - b);
  const step = choice("step", [["", "all"], ...steps.map(s => [s, s])], "", () => filter());
  const run = choice("run", [["", "all"], ...runs.map((r, i) => [i, visible(r.name)])], "", () => filter());
  const body = make("tbody"), head = make("tr"), count = make("output", {"aria-live": "polite"});
  const filter = () => {
    const w = words.value.toLowerCase(), s = step.querySelector("select").value, r = run.querySelector("select").value;
    rows = samples.filter(x => (s === "" || x.step === +s) && (r === "" || x.r === +r) && (low.value === "" || x.score >= +low.value && x.score !== null) &&
      (high.value === "" || x.score <= +high.value && x.score !== null) && (!w || x.prompt.toLowerCase().includes(w) || x.completion.toLowerCase().includes(w)));
    order();
  };
  const order = () => {
    const f = key[sorted], sign = down ? -1 : 1;
    rows = rows.slice().sort((a, b) => sign * (f(a) < f(b) ? -1 : f(a) > f(b) ? 1 : 0));
    at = 0;
    show();
  };
  const show = () => {
    body.replaceChildren(...rows.slice(at, at + PAGE).map(s => make("tr", {}, ...columns.map(c =>
      c === "run" ? make("td", {}, visible(runs[s.r].name)) : c === "step" ? make("td", {class: "number"}, String(s.step)) :
      c === "score" ? make("td", {class: "number"}, score(s.score)) : make("td", {}, text(s[c]))))));
    for (const cell of head.children) cell.setAttribute("aria-sort", cell.dataset.name !== sorted ? "none" : down ? "descending" : "ascending");
    for (const button of head.querySelectorAll("button")) button.lastChild.data = button.dataset.name !== sorted ? "" : down ? " \u25bc" : " \u25b2";
    count.textContent = rows.length ? `${at + 1}\u2013${Math.min(at + PAGE, rows.length)} of ${rows.length} completions` : "no completions";
    [back.disabled, next.disabled] = [at === 0, at + PAGE >= rows.length];
  };
  for (const name of columns) {
    const click = () => { [sorted, down] = [name, name === sorted ? !down : name === "score"]; order(); };
    const width = {run: "8em", step: "5em", score: "6em", prompt: "30%"}[name], numbers = name === "step" || name === "score";
    head.append(make("th", {class: numbers ? "number" : "", "data-name": name, scope: "col", style: width ? `width:${width}` : ""},
      make("button", {click, "data-name": name}, name, document.createTextNode(""))));
  }
  const back = make("button", {click: () => { at = Math.max(0, at - PAGE); show(); }}, "back");
  const next = make("button", {click: () => { at += PAGE; show(); }}, "next");
  const missing = runs.reduce((sum, r) => sum + r.completions.left_out, 0);
  if (missing) byId("table").append(make("p", {class: "faint"}, `${missing} completions in the middle of the runs are in samples.jsonl alone.`));
  byId("table").append(make("p", {class: "controls"}, words, step, ...(several ? [run] : []), low, high),
    make("p", {class: "controls"}, back, next, count),
    make("div", {class: "scroll"}, make("table", {class: "completions"}, make("thead", {}, head), body)));
  order();
}

function config() {
  const value = v => v === undefined ? "\u2013" : visible(typeof v === "string" ? v : JSON.stringify(v));
  const list = (title, columns, dicts) => make("details", {open: ""}, make("summary", {}, title), make("div", {class: "scroll"}, make("table", {},
    make("tr", {}, make("th", {}, ""), ...columns.map(c => make("th", {}, visible(c)))), ...[...new Set(dicts.flatMap(Object.keys))].map(name => {
      const cells = dicts.map(d => value(d[name])), same = cells.every(c => c === cells[0]);
      return make("tr", same ? {} : {class: "different"}, make("td", {}, visible(name)), ...cells.map(c => make("td", {class: "text"}, c)));
    }))));
  const starts = runs.flatMap(run => run.versions.map(v => [`${run.name} from step ${v.step}`, Object.fromEntries(Object.entries(v).filter(([k]) => k !== "step"))]));
  byId("config").append(starts.length ? list("Versions", starts.map(s => s[0]), starts.map(s => s[1])) : "No versions are recorded.",
    list("Config", runs.map(run => run.name), runs.map(run => run.config)));
}

runs.forEach((run, i) => byId("runs").append(make("span", {}, draw("svg", {viewBox: "0 0 30 10"}, draw("line",
  {x1: 0, x2: 30, y1: 5, y2: 5, stroke: colour(i), "stroke-width": 2.5, "stroke-dasharray": DASHES[i % 6]})), visible(run.folder))));
byId("log").addEventListener("change", panels);
byId("more").addEventListener("toggle", panels);
panels(); time(); compare(); table(); config();
