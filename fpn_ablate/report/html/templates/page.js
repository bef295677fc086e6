"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const json = (element) => JSON.parse(element.textContent);
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
const make = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "rect", "path", "text", "title"].includes(tag);
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
for (const details of all(".values")) {
  details.addEventListener("toggle", () => {
    const place = details.querySelector(".scroll");
    if (!details.open || place.firstChild) return;
    const points = json(details.closest("figure").querySelector("script")).data.values;
    const keys = Object.keys(points[0]).filter((key) => !["row", "at", "line", "short", "right"].includes(key));
    const line = (tag, values) => make("tr", {}, ...values.map((value) => make(tag, {}, value ?? "")));
    const body = points.map((point) => line("td", keys.map((key) => point[key])));
    place.append(make("table", {}, make("thead", {}, line("th", keys)), make("tbody", {}, ...body)));
  });
}

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
function overlay(place, key, { predictions = [], masks, truth = false, names = false, colour = 0 } = {}) {
  const picture = pictures[key];
  place.replaceChildren(make("img", { src: picture.src, alt: picture.alt, width: picture.width, height: picture.height, loading: "lazy" }));
  if (!truth && !predictions.length && !masks) return;
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
  for (const [d, score] of masks ?? []) svg.append(outline("mask", d, `score ${score} %`));
  place.append(svg);
}
for (const place of all("[data-picture]")) {
  overlay(place, place.dataset.picture, { truth: "truth" in place.dataset, names: "truth" in place.dataset });
}

// The gallery: two rows, image by image.
const MAX_CARDS = 24, FIRST_CARDS = 6;  // after and before "Show all"
function gallery(root) {
  const content = json(root.querySelector("script"));
  const [a, b] = [root.querySelector("[data-a]"), root.querySelector("[data-b]")];
  for (const select of [a, b]) content.rows.forEach((row, k) => select.append(make("option", { value: k }, row.label)));
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
      .sort(([x], [y]) => Math.abs(y) - Math.abs(x)).slice(0, MAX_CARDS);
    const more = root.querySelector("[data-more]"), few = !pressed(more);
    more.hidden = shown.length <= FIRST_CARDS;
    more.textContent = few ? `Show all ${shown.length}` : `Show ${FIRST_CARDS}`;
    root.querySelector(".cards").replaceChildren(...shown.slice(0, few ? FIRST_CARDS : MAX_CARDS).map(([d, k]) => make("article", { class: "card" },
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

// While a sweep is running the page reloads itself and restores its state; browsers restore the place.
const kept = [["details", "open"], ["select", "selectedIndex"], ["[aria-pressed]", "ariaPressed"]];
const states = () => kept.map(([selector, property]) => all(selector).map((element) => element[property]));
const sorted = all("table[data-sortable]");
if (history.state) {
  kept.forEach(([selector, property], n) => all(selector).forEach((element, k) => {
    element[property] = history.state.kept[n][k] ?? element[property];
    if (element.selectedIndex < 0) element.selectedIndex = 0;  // its options have become fewer
  }));
  sorted.forEach((table, k) => { table.dataset.sorted = history.state.sorted[k] ?? "0 none"; sortTable(table); });
  history.replaceState(null, "");
}
all("[data-gallery]").forEach((root) => root.show());
function reload() {
  if (document.activeElement?.tagName === "SELECT" || String(getSelection())) return void setTimeout(reload, 5000);
  history.replaceState({ kept: states(), sorted: sorted.map((table) => table.dataset.sorted) }, "");
  location.reload();
}
const seconds = Number(document.body.dataset.reload);
if (seconds) setTimeout(reload, seconds * 1000);

// Printing: open the details. The charts have been drawn in idle time.
addEventListener("beforeprint", () => all("details:not(.values):not([open])").forEach((d) => { d.open = d.opened = true; }));
addEventListener("afterprint", () => all("details").forEach((d) => { if (d.opened) d.open = d.opened = false; }));
