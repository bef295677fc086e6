"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const json = (element) => JSON.parse(element.textContent);
const option = (value, text) => make("option", { value }, text);
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
const make = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "rect", "path", "text", "title"].includes(tag);  // of pictures
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

// Tables: a header's button sorts descending, ascending, then restores the order. Cells without a number come last.
function sortTable(table) {
  const [column, direction] = (table.dataset.sorted ?? "0 none").split(" ");
  const bodies = table.bodies ??= [...table.tBodies];
  all("thead th", table).forEach((th, k) => th.ariaSort = k === Number(column) ? direction : "none");
  const value = (body) => {
    const text = body.rows[0].cells[column]?.textContent.trim() ?? "";
    const [, number, unit] = /^([+-]?\d+(?:\.\d+)?)([kM]?)(?= |$)/.exec(text) ?? [];
    return number === undefined ? text : number * ({ k: 1e3, M: 1e6 }[unit] ?? 1);
  };
  const sign = direction === "ascending" ? 1 : -1;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
    return typeof x === "number" ? sign * (x - y) : sign * x.localeCompare(y);
  };
  const [fixed, free] = [true, false].map((wanted) => bodies.filter((body) => "fixed" in body.dataset === wanted));
  table.append(...(direction === "none" ? free : free.sort(compare)), ...fixed);
}
for (const table of all("table[data-sortable]")) {
  all("thead th", table).forEach((th, column) => th.querySelector("button").addEventListener("click", () => {
    const next = { none: "descending", descending: "ascending", ascending: "none" };
    table.dataset.sorted = `${column} ${next[th.ariaSort]}`;
    sortTable(table);
  }));
}

// Charts are drawn when they come near the viewport, the others when the browser is idle. Colours are the page's CSS variables.
const figures = all("[data-chart]");
function draw(figure) {
  return figure.drawn ??= vegaEmbed(figure.querySelector(".view"), json(figure.querySelector("script")),
    // Interpreted (`ast`), not compiled: the page's policy allows neither eval nor added styles.
    { actions: false, renderer: "svg", ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } }).then(({ view }) => {
    figure.view = view;
    figure.querySelector(".view svg").setAttribute("aria-hidden", "true");
    const select = figure.querySelector("[data-choice]");
    if (select) {
      const choose = () => view.signal("choice", select.value).runAsync();
      select.addEventListener("change", choose);
      if (select.selectedIndex > 0) choose();
    }
    highlight(figure.closest(".plots"));
  }).catch((error) => {
    console.error(error);
    figure.querySelector(".view").textContent = "This chart could not be drawn; its values are below.";
  });
}
function highlight(plots) {
  const row = plots.querySelector(".legend [aria-pressed=true]")?.dataset.row ?? "";
  for (const figure of all("[data-chart]", plots)) figure.view?.signal("highlight", row).runAsync();
}
for (const button of all(".legend button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of all("button", button.parentElement)) other.setAttribute("aria-pressed", String(on && other === button));
    highlight(button.closest(".plots"));
  });
}
const near = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}), { rootMargin: "600px" });
figures.forEach((figure) => near.observe(figure));
const idle = window.requestIdleCallback ?? ((call) => setTimeout(call, 200));
const drawRest = () => { const figure = figures.find((f) => !f.drawn); if (figure) draw(figure).then(() => idle(drawRest)); };
window.addEventListener("load", () => idle(drawRest));

// A chart's values as a table, built when it is opened.
function showValues(details) {
  const place = details.querySelector(".scroll");
  if (!details.open || place.firstChild) return;
  const [keys, ...points] = valuesOf(details.closest("figure"));
  const line = (tag, values) => make("tr", {}, ...values.map((value) => make(tag, {}, value ?? "")));
  place.append(make("table", {}, make("thead", {}, line("th", keys)), make("tbody", {}, ...points.map((point) => line("td", point)))));
}
for (const details of all(".values")) details.addEventListener("toggle", () => showValues(details));
function valuesOf(figure) {
  const points = json(figure.querySelector("script")).data.values;
  const keys = Object.keys(points[0]).filter((key) => !["row", "at", "line", "short", "places"].includes(key));
  return [keys, ...points.map((point) => keys.map((key) => point[key]))];
}

// Downloads: each table and each chart's values as CSV, each chart as SVG.
function download(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
function csv(lines) {
  const cell = (value) => {
    const text = String(value ?? "").replace(/\s+/g, " ").trim();
    return `"${(/^[=@]|^[+-](?![\d.])/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;  // no formula for a spreadsheet
  };
  return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}
const tableLines = (table) => [...table.rows].filter((row) => !row.parentElement.hidden)
  .map((row) => [...row.cells].flatMap((cell) => [cell.innerText, ...Array(cell.colSpan - 1).fill(cell.innerText)]));
function svgText(svg) {
  const copy = svg.cloneNode(true), probe = document.body.appendChild(make("span"));
  const resolved = copy.outerHTML.replace(/var\((--\w+)\)/g, (_, name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; });
  probe.remove();
  return resolved.includes("xmlns=") ? resolved : resolved.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"');
}
const saveButton = (text, save) => {
  const button = make("button", { type: "button", class: "save" }, text);
  button.addEventListener("click", save);
  return button;
};
for (const table of all("table[data-csv]")) {
  const name = [table.closest("[data-name]")?.dataset.name, table.dataset.csv].filter(Boolean).join("-");
  table.closest(".scroll").after(saveButton("CSV", () => download(`${name}.csv`, "text/csv", csv(tableLines(table)))));
}
for (const figure of figures) {
  const name = figure.dataset.chart;
  const buttons = [saveButton("SVG", () => draw(figure).then(() => download(`${name}.svg`, "image/svg+xml", svgText(figure.querySelector(".view svg"))))),
    saveButton("CSV", () => download(`${name}.csv`, "text/csv", csv(valuesOf(figure))))];
  figure.querySelector("figcaption").append(make("span", { class: "saves" }, ...buttons));
}
for (const button of all("[data-toggle]")) button.addEventListener("click", () => button.setAttribute("aria-pressed", String(!pressed(button))));

// Pictures: each is embedded once; boxes and masks are drawn over it.
const pictures = json(document.getElementById("pictures"));
function box(kind, [left, top, width, height], title) {
  const rect = make("rect", { class: kind, x: left, y: top, width, height });
  if (title) rect.append(make("title", {}, title));
  return rect;
}
function outline(kind, d, title) {
  const path = make("path", { class: kind, d });
  if (title) path.append(make("title", {}, title));
  return path;
}
function overlay(place, key, { predictions = [], masks, found = [], truth = false, names = false, colour = 0 } = {}) {
  const picture = pictures[key];
  place.replaceChildren(make("img", { src: picture.src, alt: picture.alt, width: picture.width, height: picture.height, loading: "lazy" }));
  if (!truth && !predictions.length && !masks && !found.length) return;
  const svg = make("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, preserveAspectRatio: "none", "aria-hidden": "true", style: `--row:var(--c${colour})` });
  for (const [x0, y0, x1, y1] of predictions) svg.append(box("under", [x0, y0, x1 - x0, y1 - y0]));
  for (const [k, object] of truth ? picture.truth.entries() : []) {
    const d = picture.masks?.[k];
    if (names && d) svg.append(outline("object", d));
    if (masks && d) svg.append(outline("halo", d), outline("true", d, object[4]));
    else svg.append(box("halo", object), box("true", object, object[4]));
    if (names) svg.append(make("text", { x: object[0], y: Math.max(object[1] - 4, picture.width / 15), "font-size": picture.width / 17 }, object[4]));
  }
  for (const [x0, y0, x1, y1, score] of predictions) svg.append(box("predicted", [x0, y0, x1 - x0, y1 - y0], `score ${score} %`));
  for (const [x0, y0, x1, y1, level, name] of found) {
    const place = [x0 * picture.width, y0 * picture.height, (x1 - x0) * picture.width, (y1 - y0) * picture.height];
    const rect = box(level < 0 ? "unfound" : "level", place, level < 0 ? "not found" : name);
    rect.setAttribute("style", `--row:var(--l${level})`);
    svg.append(box("under", place), rect);
  }
  for (const [d, score] of masks ?? []) svg.append(outline("mask", d, `score ${score} %`));
  place.append(svg);
}
for (const place of all("[data-picture]")) {
  overlay(place, place.dataset.picture, { truth: "truth" in place.dataset, names: "truth" in place.dataset });
}

// The gallery: two rows, image by image.
const FIRST_CARDS = 6;  // before "Show all"
function gallery(root) {
  const content = json(root.querySelector("script"));
  const [a, b] = [root.querySelector("[data-a]"), root.querySelector("[data-b]")];
  for (const select of [a, b]) content.rows.forEach((row, k) => select.append(option(k, row.label)));
  const means = content.rows.map((row) => row.values.reduce((sum, value) => sum + (value ?? 0), 0));
  a.value = means.indexOf(Math.max(...means));
  b.value = Number(a.value) === 0 ? 1 : 0;
  const panel = (row, k, won) => {
    const place = make("span", { class: "picture" });
    overlay(place, content.images[k], { predictions: row.boxes[k], masks: row.masks?.[k], truth: true, colour: row.colour });
    const name = make("span", { class: "name" }, make("span", { class: "swatch", style: `--row:var(--c${row.colour})` }), row.label);
    return make("figure", {}, place, make("figcaption", { class: won ? "" : "lost" }, name, make("b", {}, row.values[k].toFixed(1))));
  };
  const show = () => {
    const [first, second] = [content.rows[a.value], content.rows[b.value]];
    const filter = root.querySelector("[data-filter][aria-pressed=true]").dataset.filter;
    const differences = content.images.map((_, k) => [first.values[k] - second.values[k], k])
      .filter(([, k]) => first.values[k] !== null && second.values[k] !== null);
    const wins = differences.filter(([d]) => d > 0).length, losses = differences.filter(([d]) => d < 0).length;
    const shown = differences.filter(([d]) => filter === "all" || (filter === "a" ? d > 0 : d < 0))
      .sort(([x], [y]) => Math.abs(y) - Math.abs(x));
    const more = root.querySelector("[data-more]"), few = !pressed(more);
    more.hidden = shown.length <= FIRST_CARDS;
    more.textContent = few ? `Show all ${shown.length}` : `Show ${FIRST_CARDS}`;
    root.querySelector(".cards").replaceChildren(...shown.slice(0, few ? FIRST_CARDS : shown.length).map(([d, k]) => make("article", { class: "card" },
      make("div", { class: "pair" }, panel(first, k, d >= 0), panel(second, k, d <= 0)),
      make("p", {}, `${pictures[content.images[k]].alt} · A − B: ${d > 0 ? "+" : ""}${d.toFixed(1)}`))));
    root.querySelector("output").textContent = `A wins ${wins}, B wins ${losses} of these ${differences.length} images; largest difference first`;
  };
  for (const button of all("[data-filter]", root)) button.addEventListener("click", () => {
    for (const other of all("[data-filter]", root)) other.setAttribute("aria-pressed", String(other === button));
    show();
  });
  const more = root.querySelector("[data-more]");
  more.addEventListener("click", () => { more.setAttribute("aria-pressed", String(!pressed(more))); show(); });
  [a, b].forEach((select) => select.addEventListener("change", show));
  root.show = show;
}
all("[data-gallery]").forEach(gallery);

// The pyramid: the levels of two rows side by side. Maps are grey pictures, coloured here.
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const DIVERGING = [[33, 102, 172], [103, 169, 207], [209, 229, 240], [247, 247, 247], [253, 219, 199], [239, 138, 98], [178, 24, 43]];
function blend(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colours.length - 1), low = Math.min(Math.floor(at), colours.length - 2);
  return colours[low].map((side, k) => side + (colours[low + 1][k] - side) * (at - low));
}
const greys = new Map();  // address -> promise of [width, height, values]
function grey(address) {
  if (!greys.has(address)) greys.set(address, (async () => {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = make("canvas", { width: image.width, height: image.height }), context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return [image.width, image.height, context.getImageData(0, 0, image.width, image.height).data.filter((_, k) => k % 4 === 0)];
  })());
  return greys.get(address);
}
function mapCanvas(label, caption, first, second) {
  const [, w, h] = /(\d+) × (\d+)$/.exec(caption);
  const canvas = make("canvas", { role: "img", "aria-label": label, width: w, height: h });
  Promise.all([grey(first), second && grey(second)]).then(([[width, height, values], other]) => {
    const image = new ImageData(width, height);
    values.forEach((value, k) => image.data.set([...(other ? blend(DIVERGING, (value - other[2][k] + 255) / 510) : blend(VIRIDIS, value / 255)), 255], 4 * k));
    canvas.getContext("2d").putImageData(image, 0, 0);
  });
  return canvas;
}
function pyramid(root) {
  const { images } = json(root.querySelector("script"));
  const [image, a, b] = ["image", "a", "b"].map((name) => root.querySelector(`[data-${name}]`));
  images.forEach((entry, k) => image.append(option(k, entry.image)));
  for (const select of [a, b]) images[0].rows.forEach((row, k) => select.append(option(k, row.label)));
  // At first a row with a top-down path, beside a pyramid without one, if there is one.
  const { rows } = images[0], adds = (row) => row.levels.some(([, , , map]) => map);
  const without = rows.findIndex((row) => row.levels.length > 1 && !adds(row));
  a.value = Math.max(0, rows.findIndex(adds));
  b.value = without >= 0 ? without : Math.min(1, rows.length - 1);
  b.closest("label").hidden = rows.length < 2;
  const cell = (map, name, caption) => make("figure", {}, map, make("figcaption", {}, make("b", {}, name), ` ${caption}`));
  // A label, the picture, and a map of each level.
  const line = (label, colour, place, ...maps) => make("div", { class: "levels", style: `--levels:${maps.length}` },
    make("p", {}, ...(colour === null ? [] : [make("span", { class: "swatch", style: `--row:var(--c${colour})` })]), label), place, ...maps);
  const names = [...new Set(images.flatMap((entry) => entry.rows.flatMap((row) => row.levels.map(([name]) => name))))].sort();
  const gap = () => make("span");
  const show = () => {
    const entry = images[image.value] ?? images[0];
    const chosen = [a, b].map((select) => entry.rows.find((row) => row.label === select.selectedOptions[0]?.text)).filter(Boolean);
    const columns = names.filter((name) => chosen.some((row) => row.levels.some(([other]) => other === name)));
    const aligned = (row, make) => columns.map((name) => { const level = row.levels.find(([other]) => other === name); return level ? make(level) : gap(); });
    const lines = [...new Set(chosen)].flatMap((row) => {
      const place = make("span", { class: "picture" });
      const levels = row.levels.map(([name]) => name);
      if (entry.picture) overlay(place, entry.picture, { found: (row.found ?? []).map(([...box]) => [...box.slice(0, 4), names.indexOf(levels[box[4]]), levels[box[4]]]) });
      const maps = aligned(row, ([name, caption, map]) => cell(mapCanvas(`Activation of ${name} of ${row.label}`, caption, map), name, caption));
      const added = aligned(row, ([name, caption, , map]) => map ? cell(mapCanvas(`What the top-down path adds to ${name} of ${row.label}`, caption, map), name, "+ top-down") : gap());
      return [line(row.label, row.colour, place, ...maps), ...(row.levels.some(([, , , map]) => map) ? [line("+ top-down", null, gap(), ...added)] : [])];
    });
    const [first, second] = chosen;
    if (first && second && first !== second) {
      const pairs = columns.map((name) => [first, second].map((row) => row.levels.find(([other]) => other === name)));
      const cells = pairs.map(([x, y]) => x && y && x[1] === y[1] ? cell(mapCanvas(`${x[0]}: A − B`, x[1], x[2], y[2]), x[0], "A − B") : gap());
      lines.push(line("A − B (red: A is stronger)", null, gap(), ...cells));
    }
    root.querySelector(".rows").replaceChildren(...lines);
    const used = new Set(chosen.flatMap((row) => (row.found ?? []).map((box) => row.levels[box[4]]?.[0])));
    root.querySelector(".key").replaceChildren(...names.filter((name) => used.has(name)).map((name) =>
      make("span", {}, make("span", { class: "swatch", style: `--row:var(--l${names.indexOf(name)})` }), name)));
  };
  [image, a, b].forEach((select) => select.addEventListener("change", show));
  root.show = show;
}
all("[data-pyramid]").forEach(pyramid);

// Runs: a search over all, and what the configurations of two of them differ in.
const runsSection = document.getElementById("runs");
function searchRuns() {
  const terms = runsSection.querySelector("[data-search]").value.toLowerCase().split(/\s+/).filter(Boolean);
  const columns = all(".runs thead th", runsSection).map((th) => th.textContent.trim().toLowerCase());
  const bodies = [...runsSection.querySelector(".runs").tBodies];
  for (const body of bodies) {
    const cells = [...body.rows[0].cells].map((cell) => cell.textContent.toLowerCase());
    body.hidden = !terms.every((term) => {
      const wanted = !term.startsWith("-"), word = wanted ? term : term.slice(1);
      const [, column, rest] = /^(\w+):(.+)$/.exec(word) ?? [];
      const place = columns.indexOf(column);
      return (place < 0 ? cells.some((cell) => cell.includes(word)) : cells[place].includes(rest)) === wanted;
    });
  }
  const shown = bodies.filter((body) => !body.hidden).length;
  runsSection.querySelector("output").textContent = `${shown} of ${bodies.length} runs`;
}
function showDifference() {
  const ticked = all("input[type=checkbox]", runsSection).filter((input) => input.checked).sort((x, y) => (x.dataset.at ?? 0) - (y.dataset.at ?? 0));
  ticked.slice(0, -2).forEach((input) => { input.checked = false; });
  const place = runsSection.querySelector("[data-difference]"), pair = ticked.slice(-2);
  if (pair.length < 2) return void place.replaceChildren();
  const { common, runs } = json(runsSection.querySelector("script"));
  const [first, second] = pair.map((input) => ({ ...common, ...runs[input.number] }));
  const names = pair.map((input) => { const cells = input.closest("tr").cells; return `${cells[3].textContent}, seed ${cells[4].textContent}`; });
  const lines = Object.keys(common).filter((key) => first[key] !== second[key]).map((key) => [key, first[key], second[key]]);
  const row = (tag, values) => make("tr", {}, ...values.map((value) => make(tag, {}, value)));
  const table = make("table", { class: "plain" }, make("thead", {}, row("th", ["key", ...names])), make("tbody", {}, ...lines.map((line) => row("td", line))));
  place.replaceChildren(lines.length ? make("div", { class: "scroll" }, table) : make("p", { class: "meta" }, "Their configurations are equal."),
    saveButton("CSV", () => download("difference.csv", "text/csv", csv([["key", ...names], ...lines]))));
}
if (runsSection) {
  let ticks = 0;
  all("input[type=checkbox]", runsSection).forEach((input, number) => {
    input.number = number;
    input.addEventListener("change", () => { input.dataset.at = ++ticks; showDifference(); });
  });
  runsSection.querySelector("[data-search]").addEventListener("input", searchRuns);
  for (const link of all("[data-runs]")) link.addEventListener("click", () => {
    runsSection.querySelector("[data-search]").value = link.dataset.runs;
    searchRuns();
  });
}

// While a sweep is running the page reloads itself, restores its state and keeps what the reader looks at where it is.
const kept = [["details", "open"], ["select", "value"], ["[aria-pressed]", "ariaPressed"], ["[data-search]", "value"], ["#runs input[type=checkbox]", "checked"]];
const keyOf = (element) => `${element.closest("[data-name]")?.dataset.name ?? ""} ${element.closest("[data-chart]")?.dataset.chart ?? ""}`;
const states = () => kept.map(([selector, property]) => all(selector).map((element) => [keyOf(element), element[property]]));
const sorted = all("table[data-sortable]");
const anchors = () => all("main > section, main h3, main figure, main .levels, main tbody");
function anchor() {  // the first element at the top of the window, and how far it is from there
  const first = anchors().findIndex((element) => element.getBoundingClientRect().bottom > 0);
  const element = anchors()[first];
  const same = anchors().filter((other) => keyOf(other) === keyOf(element) && other.tagName === element.tagName);
  return element && { key: keyOf(element), tag: element.tagName, place: same.indexOf(element), top: element.getBoundingClientRect().top };
}
let from = null;
if (history.state) {
  kept.forEach(([selector, property], n) => {
    const before = {};
    for (const [key, value] of history.state.kept[n]) (before[key] ??= []).push(value);
    for (const element of all(selector)) {  // tables and runs may have been added
      element[property] = before[keyOf(element)]?.shift() ?? element[property];
      if (element.selectedIndex < 0) element.selectedIndex = 0;  // its option is no longer there
    }
  });
  sorted.forEach((table, k) => { table.dataset.sorted = history.state.sorted[k] ?? "0 none"; sortTable(table); });
  all("[data-chart]").forEach((figure) => { figure.querySelector(".view").style.minHeight = `${history.state.heights[figure.dataset.chart] ?? 200}px`; });
  from = history.state.anchor;
  history.replaceState(null, "");
}
all(".values").forEach(showValues);
all("[data-gallery], [data-pyramid]").forEach((root) => root.show());
if (runsSection) { searchRuns(); showDifference(); }
if (from) {
  history.scrollRestoration = "manual";
  const element = anchors().filter((other) => keyOf(other) === from.key && other.tagName === from.tag)[from.place];
  if (element) scrollBy({ top: element.getBoundingClientRect().top - from.top, behavior: "instant" });
}
function reload() {
  if (["SELECT", "INPUT"].includes(document.activeElement?.tagName) || String(getSelection())) return void setTimeout(reload, 5000);
  const heights = Object.fromEntries(figures.map((figure) => [figure.dataset.chart, figure.querySelector(".view").offsetHeight]));
  history.replaceState({ kept: states(), sorted: sorted.map((table) => table.dataset.sorted), heights, anchor: anchor() }, "");
  history.scrollRestoration = "manual";
  location.reload();
}
const seconds = Number(document.body.dataset.reload);
if (seconds) setTimeout(reload, seconds * 1000);

// Printing: open the details. The charts have been drawn in idle time.
addEventListener("beforeprint", () => all("details:not(.values):not([open])").forEach((d) => { d.open = d.opened = true; }));
addEventListener("afterprint", () => all("details").forEach((d) => { if (d.opened) d.open = d.opened = false; }));
