// The page of the explorer. It draws what Python sends and sends back what is chosen; nothing is computed here.

const make = (tag, options = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};

const svg = (tag, attributes = {}) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const field = (text, control, ...more) => make("label", { className: "field" }, text, control, ...more);
const meter = (share, less = false) =>
  make("span", { className: "meter" }, make("i", { className: less ? "less" : "", style: `width:${100 * Math.min(1, share)}%` }));
const percent = (share) => (share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`);

// A picture cut into cells, of which one or a rectangle is chosen: by mouse, by finger, or with the arrow keys.
function picker({ label, rows, columns, area, lines, choose, hover }) {
  const image = make("img", { alt: "" });
  const [left, top, width, height] = area.map((x) => 100 * x);
  const cells = svg("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  cells.style.cssText = `left:${left}%;top:${top}%;width:${width}%;height:${height}%`;
  for (let i = 1; lines && i < columns; i++) cells.append(svg("line", { x1: i, x2: i, y1: 0, y2: rows }));
  for (let i = 1; lines && i < rows; i++) cells.append(svg("line", { y1: i, y2: i, x1: 0, x2: columns }));
  const [over, under, chosen] = ["hover", "under", "over"].map((name) => svg("rect", { class: name }));
  cells.append(over, under, chosen);
  const mark = make("span", { className: "mark", hidden: true });
  const said = make("span", { className: "unseen", role: "status" });
  const root = make("div", { className: "picker", tabIndex: 0, role: "application", "aria-label": label }, image, cells, mark, said);
  let region = [0, 0, 0, 0], start = null, last = "";

  const outline = (rectangle, [t, l, b, r]) => {
    const place = { x: l, y: t, width: r - l + 1, height: b - t + 1 };
    for (const [name, value] of Object.entries(place)) rectangle.setAttribute(name, value);
  };
  const show = (value) => {
    region = value;
    outline(under, value);
    outline(chosen, value);
    const [t, l, b, r] = value.map((x) => x + 1);
    said.textContent = t === b && l === r ? `row ${t}, column ${l}` : `rows ${t} to ${b}, columns ${l} to ${r}`;
  };
  const cell = (event) => {
    const box = cells.getBoundingClientRect();
    const inside = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
    return [inside((event.clientY - box.top) / box.height, rows), inside((event.clientX - box.left) / box.width, columns)];
  };
  const span = ([a, b], [c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];

  root.addEventListener("pointerdown", (event) => { start = cell(event); show(span(start, start)); });
  root.addEventListener("pointermove", (event) => {
    const now = cell(event);
    outline(over, span(now, now));
    if (start && event.pointerType === "mouse") show(span(start, now));
    if (hover && last !== `${now}`) hover(now);
    last = `${now}`;
  });
  root.addEventListener("pointerup", () => { if (start) choose(region); start = null; });
  root.addEventListener("pointercancel", () => { start = null; });
  root.addEventListener("pointerleave", () => { over.setAttribute("width", 0); last = ""; if (hover) hover([]); });
  root.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const corner = [Math.max(0, Math.min(rows - 1, region[2] + step[0])), Math.max(0, Math.min(columns - 1, region[3] + step[1]))];
    const origin = event.shiftKey ? [Math.min(region[0], corner[0]), Math.min(region[1], corner[1])] : corner;
    show(span(origin, corner));
    choose(region);
  });
  const picture = (source, text) => {
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 160);
    image.src = source;
    image.alt = text;
  };
  const point = (place) => {
    mark.hidden = !place;
    if (place) mark.style.cssText = `left:${left + place[1] / columns * width}%;top:${top + place[0] / rows * height}%`;
  };
  return { root, show, picture, point };
}

function latentList(model, name, set) {
  const list = make("ol", { className: "latents", "aria-label": "Latents, strongest first" });
  const show = () => list.replaceChildren(...model.get("rows").map((row) => make("li", {}, make("label", {},
    make("input", { type: "radio", name, value: row.latent, checked: row.latent === model.get("latent"),
      onchange: () => set({ latent: row.latent }) }),
    make("img", { src: row.picture, alt: "" }),
    make("span", { className: "what" },
      make("span", { className: "title" }, make("b", {}, `${row.latent}`), row.name), meter(row.share, row.less)),
    make("span", { className: "value" }, row.text)))));
  model.on("change:rows", show);
  model.on("change:latent", () => list.querySelectorAll("input").forEach((input) => {
    input.checked = +input.value === model.get("latent");
  }));
  show();
  return list;
}

const bars = (rows) => make("div", { className: "bars" }, ...rows.flatMap(([name, share, text]) => [
  make("span", { className: "name", title: name }, name), meter(share), make("span", { className: "number" }, text)]));

function latentDetail(model) {
  const root = make("div");
  const show = () => {
    const latent = model.get("detail");
    const facts = latent.facts.flatMap(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    root.replaceChildren(
      make("p", {}, make("b", {}, latent.name), make("span", { className: "quiet" }, ` ${latent.note}`)),
      make("ul", { className: "references", "aria-label": "Reference images" }, ...latent.references.map((r) =>
        make("li", {}, make("figure", {}, make("img", { src: r.picture, alt: `reference image, ${r.label}` }),
          make("figcaption", { title: r.label }, r.label))))),
      make("dl", { className: "facts" }, ...facts),
      make("div", { className: "two" },
        make("div", {}, make("h3", {}, "Labels of the references"), bars(latent.labels)),
        make("div", {}, make("h3", {}, "Classes by active tokens"), bars(latent.classes))));
  };
  model.on("change:detail", show);
  show();
  return root;
}

function probabilities(model) {
  const root = make("div");
  const cell = ([before, after]) => make("td", {}, make("div", { className: "pair" }, ...[["before", before], ["after", after]]
    .flatMap(([which, share]) => {
      const bar = meter(share);
      bar.classList.add(which);
      return [bar, make("span", { "data-which": which }, percent(share))];
    })));
  const show = () => {
    const { towers, rows, note } = model.get("probabilities");
    root.replaceChildren(...note ? [make("p", {}, note)] : [
      make("p", { className: "quiet key" }, make("i", { className: "before" }), "as it is", make("i", { className: "after" }), "with the latents changed"),
      make("table", { className: "probabilities" },
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "class"),
          ...towers.map((tower) => make("th", { scope: "col" }, tower)))),
        make("tbody", {}, ...rows.map(([name, ...pairs]) =>
          make("tr", {}, make("th", { scope: "row" }, name), ...pairs.map(cell)))))]);
  };
  model.on("change:probabilities", show);
  show();
  return root;
}

function comparison(model, set) {
  const root = make("section", { className: "wide" });
  const pair = (values, most) => make("td", {}, make("div", { className: "pair" }, ...["before", "after"].flatMap((which, i) => {
    const bar = meter(values[i] / most);
    bar.classList.add(which);
    return [bar, make("span", {}, values[i].toFixed(2))];
  })));
  const show = () => {
    const { towers, pictures, rows, values } = model.get("compared");
    root.hidden = !towers;
    if (root.hidden) return;
    const most = Math.max(...rows.flatMap((row) => row.slice(2)));
    root.replaceChildren(
      make("h2", {}, `${towers[0]} against ${towers[1]}`),
      make("div", { className: "sides" }, ...towers.map((tower, i) => make("figure", {},
        make("img", { src: pictures[i], alt: `mask of the chosen latent with ${tower}` }),
        make("figcaption", {}, `${tower}: latent ${model.get("latent")}, mean ${values[i].toFixed(2)}`)))),
      make("h3", {}, "Latents that adaptation changed most on this image"),
      make("p", { className: "quiet key" }, make("i", { className: "before" }), towers[0], make("i", { className: "after" }), towers[1]),
      make("table", { className: "probabilities" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "latent"),
        make("th", { scope: "col" }, "mean activation"))), make("tbody", {}, ...rows.map(([latent, name, ...both]) =>
        make("tr", {}, make("th", { scope: "row" }, make("button", { type: "button", className: "link",
          onclick: () => set({ latent }) }, `${latent}`), ` ${name}`), pair(both, most))))));
  };
  model.on("change:compared", show);
  show();
  return root;
}

function render({ model, el }) {
  const page = model.get("page"), name = `px${Math.random().toString(36).slice(2)}`;
  // Python answers every question by repeating its number when everything that follows has been sent.
  const root = make("div", { className: "px explorer" });
  // A visit that was ended for want of use never answers again.
  const late = (number) => {
    if (model.get("answered") < number) model.set("message", ["problem", "There is no answer: this visit may have ended; load the page again."]);
  };
  const ask = () => { model.set("asked", model.get("asked") + 1); model.save_changes(); setTimeout(late, 30000, model.get("asked")); };
  const set = (values) => { for (const [k, v] of Object.entries(values)) model.set(k, v); model.save_changes(); ask(); };
  // Runs now and whenever one of the traits changes.
  const follow = (names, show) => { model.on(names.split(" ").map((n) => `change:${n}`).join(" "), show); show(); };
  const text = (node, trait) => { follow(trait, () => { node.textContent = model.get(trait); }); return node; };
  const options = (names) => names.map((n, i) => make("option", { value: i }, n));

  // Which image
  const dataset = make("select", { onchange: () => set({ dataset: dataset.value }) });
  const image = make("input", { type: "number", min: 0, step: 1, onchange: () => set({ image: Math.trunc(+image.value) || 0 }) });
  follow("dataset sizes", () => {
    dataset.replaceChildren(...Object.keys(model.get("sizes")).map((n) => make("option", { value: n }, n)));
    dataset.value = model.get("dataset");
  });
  follow("dataset image sizes", () => {
    const many = model.get("sizes")[model.get("dataset")];
    Object.assign(image, { max: many - 1, value: model.get("image"), disabled: many === 1 });
  });
  const turn = (step) => make("button", { type: "button", onclick: () => set({ image: model.get("image") + step }) },
    step < 0 ? "Previous" : "Next");
  const message = make("p", { className: "message", role: "status" });
  follow("message", () => {
    const [kind, words] = model.get("message");
    message.textContent = words;
    message.classList.toggle("problem", kind === "problem");
  });
  const file = make("input", { type: "file", accept: page.accept, onchange: async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    // A file above the limit never leaves the browser.
    if (chosen.size > page.max_bytes) set({ upload_size: chosen.size });
    else set({ upload: new DataView(await chosen.arrayBuffer()) });
    file.value = "";
  } });
  const choose = make("div", { className: "row" }, field("Data set", dataset), field("Image", image), turn(-1), turn(1),
    make("label", { className: "file" }, "Upload a picture", file),
    make("span", { className: "quiet limits" }, page.limits));

  // The image
  const patches = picker({ label: "Patches of the image; arrow keys move the frame, with shift they widen it", rows: page.grid,
    columns: page.grid, area: [0, 0, 1, 1], lines: true, choose: (region) => set({ region, scope: "patch" }), hover: (at) => set({ hover: at }) });
  follow("picture caption", () => patches.picture(model.get("picture"), model.get("caption")));
  follow("region", () => patches.show(model.get("region")));
  const mask = make("input", { type: "checkbox", onchange: () => set({ mask: mask.checked }) });
  const threshold = make("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => set({ threshold: +threshold.value }) });
  const cut = make("b");
  follow("mask", () => { mask.checked = model.get("mask"); threshold.disabled = !model.get("mask"); });
  follow("threshold", () => { threshold.value = model.get("threshold"); cut.textContent = percent(model.get("threshold")); });
  const own = make("section", {}, make("h2", {}, "Image"), text(make("p"), "caption"), patches.root, text(make("p", { className: "hint" }), "hint"),
    make("label", { className: "check" }, mask, "Mask of the chosen latent"),
    field("Threshold of the mask, share of its highest patch: ", cut, threshold));

  // Latents
  const scopes = make("fieldset", {}, make("legend", {}, "Latents of"), make("div", { className: "chips" },
    ...page.scopes.map(([value, words]) => make("label", { className: "chip" },
      make("input", { type: "radio", name: `${name}scope`, value, onchange: () => set({ scope: value }) }), words))));
  const label = make("select", { onchange: () => set({ label: +label.value }) });
  const query = make("input", { type: "search", placeholder: page.example, oninput: () => set({ query: query.value }) });
  const anchor = make("input", { type: "number", min: 0, max: page.latents - 1, onchange: () => set({ anchor: Math.trunc(+anchor.value) || 0 }) });
  label.replaceChildren(...options(page.classes));
  const fields = { class: field("Class", label), words: field("Words in names, or a number", query), similar: field("Similar to latent", anchor) };
  follow("scope", () => {
    scopes.querySelectorAll("input").forEach((input) => { input.checked = input.value === model.get("scope"); });
    for (const [scope, node] of Object.entries(fields)) node.hidden = scope !== model.get("scope");
  });
  follow("label", () => { label.value = model.get("label"); });
  follow("query", () => { if (query.value !== model.get("query")) query.value = model.get("query"); });
  follow("anchor", () => { anchor.value = model.get("anchor"); });
  const meaning = text(make("p", { className: "quiet" }), "meaning");
  const listed = make("section", {}, make("h2", {}, "Latents"), scopes, ...Object.values(fields), meaning, latentList(model, `${name}latent`, set));

  // One latent
  const number = make("input", { type: "number", min: 0, max: page.latents - 1, onchange: () => set({ latent: Math.trunc(+number.value) || 0 }) });
  const factor = make("input", { type: "range", min: 0, max: 4, step: 0.25, oninput: () => set({ factors: [...others(), [model.get("latent"), +factor.value]] }) });
  const strength = make("b");
  const others = () => model.get("factors").filter(([latent]) => latent !== model.get("latent"));
  const current = () => (model.get("factors").find(([latent]) => latent === model.get("latent")) || [0, 1])[1];
  const off = make("button", { type: "button", onclick: () => set({ factors: current() === 0 ? others() : [...others(), [model.get("latent"), 0]] }) }, "Switch off");
  const similar = make("button", { type: "button", onclick: () => set({ anchor: model.get("latent"), scope: "similar" }) }, "Similar latents");
  follow("latent factors", () => {
    number.value = model.get("latent");
    factor.value = current();
    strength.textContent = current() === 0 ? "off" : `times ${current()}`;
    off.setAttribute("aria-pressed", current() === 0);
  });
  const one = make("section", {}, make("h2", {}, "One latent"),
    make("div", { className: "row" }, field("Latent", number), off, similar),
    field("Strength on every token: ", strength, factor), latentDetail(model));

  // What follows
  const changed = make("p", { className: "chips" });
  follow("factors", () => changed.replaceChildren(...model.get("factors").map(([latent, value]) => make("button", { type: "button",
    "aria-label": `Give latent ${latent} its own strength again`,
    onclick: () => set({ factors: model.get("factors").filter(([s]) => s !== latent) }) },
    `${latent} ${value === 0 ? "off" : `times ${value}`} ✕`))));
  const reset = make("button", { type: "button", onclick: () => set({ factors: [] }) }, "Undo all changes");
  follow("factors", () => { reset.disabled = model.get("factors").length === 0; });
  const says = make("section", { className: "wide" }, make("h2", {}, "What the model says"), changed, probabilities(model), make("p", {}), reset);

  // The scatter
  const scatter = picker({ label: "Scatter of all latents; arrow keys move the frame, with shift they widen it", rows: page.cells[0],
    columns: page.cells[1], area: page.area, lines: false, choose: (box) => set({ box, scope: "scatter" }) });
  scatter.picture(page.scatter, "all latents by frequency and mean activation");
  follow("box", () => scatter.show(model.get("box")));
  follow("place", () => scatter.point(model.get("place")));
  const all = make("section", { className: "wide" }, make("h2", {}, "All latents"), scatter.root,
    make("p", { className: "quiet" }, "Click a point or draw a box: the list shows the latents there. The ring is the chosen latent."));

  // To keep
  const link = make("input", { type: "text", readOnly: true, onfocus: () => link.select() });
  follow("link", () => {
    const here = new URL(window.location);
    here.search = model.get("link");
    link.value = page.own_page ? here.href : `?${model.get("link")}`;
    if (page.own_page) window.history.replaceState(null, "", here);
  });
  const keep = (kind, words) => make("button", { type: "button", onclick: () => model.send({ kind }) }, words);
  model.on("msg:custom", (content, buffers) => {
    const url = URL.createObjectURL(new Blob([buffers[0]], { type: content.type }));
    make("a", { href: url, download: content.name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  const save = make("section", { className: "whole" }, make("h2", {}, "Keep this"), make("div", { className: "row" },
    make("label", { className: "field grow" }, "Link to what is shown", link), keep("figure", "Save the figure (png)"),
    keep("latents", "Save the latents (csv)"), keep("probabilities", "Save the probabilities (csv)")));

  follow("asked answered", () => root.setAttribute("aria-busy", model.get("asked") !== model.get("answered")));
  root.append(make("section", { "aria-label": "Choose an image" }, choose, message),
    make("div", { className: "panels" }, own, listed, one, says, comparison(model, set), all, save));
  el.replaceChildren(root);
}

export default { render };
