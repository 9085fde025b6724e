// The dashboard's two kinds of page: a latent with its masks, and the index with its search.

const node = (tag, options = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
};

// A page of a latent: reference images from one strip, a black veil over what the mask hides.
const references = document.querySelector(".references[data-strip]");
if (references) {
  const { strip, grid, mask } = references.dataset;
  const shares = Uint8Array.from(atob(mask), (letter) => letter.charCodeAt(0));
  const canvases = [...references.querySelectorAll("canvas")];
  const on = document.getElementById("mask"), threshold = document.getElementById("threshold"), cut = document.getElementById("cut");
  const image = new Image();
  const draw = () => canvases.forEach((canvas, i) => {
    const side = canvas.width = canvas.height = image.naturalHeight;
    const pen = canvas.getContext("2d"), step = side / grid;
    canvas.classList.toggle("small", side < 100);
    pen.drawImage(image, i * side, 0, side, side, 0, 0, side, side);
    for (let patch = 0; on.checked && patch < grid * grid; patch++) {
      const share = shares[i * grid * grid + patch] / 255;
      pen.fillStyle = `rgba(0, 0, 0, ${share >= +threshold.value ? 1 - share : 1})`;
      // Veils must not overlap, so their edges lie on whole pixels.
      const [x, y] = [patch % grid, Math.floor(patch / grid)].map((n) => [Math.round(n * step), Math.round((n + 1) * step)]);
      pen.fillRect(x[0], y[0], x[1] - x[0], y[1] - y[0]);
    }
  });
  image.onload = draw;
  image.src = strip;
  on.addEventListener("change", () => { threshold.disabled = !on.checked; draw(); });
  threshold.addEventListener("input", () => { cut.textContent = `${Math.round(100 * threshold.value)} %`; draw(); });
}

// The index: LATENTS has number, name, classes, references, frequency, activation, entropy, place down and across.
if (typeof LATENTS !== "undefined") {
  const page = (latent) => `latents/${latent}.html`;
  const COLUMNS = [["latent", 0], ["name", 1], ["classes", 2], ["frequency", 4], ["activation", 5], ["entropy", 6]];
  const head = document.getElementById("head"), rows = document.getElementById("rows");
  const search = document.getElementById("search"), more = document.getElementById("more");
  let column = 0, down = false, shown = 50;

  const found = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (latent) => words.every((word) => `${latent[0]}` === word || `${latent[1]}, ${latent[2]}`.toLowerCase().includes(word));
    // What has no number comes last, whichever way round.
    const compare = (a, b) => (a === null) - (b === null)
      || (a === null ? 0 : (typeof a === "string" ? a.localeCompare(b) : a - b) * (down ? -1 : 1));
    const called = (latent) => words.every((word) => latent[1].toLowerCase().includes(word) || `${latent[0]}` === word);
    return LATENTS.filter(fits).sort((a, b) => called(b) - called(a) || compare(a[column], b[column]) || a[0] - b[0]);
  };
  const number = (value, digits) => (value === null ? "" : value.toFixed(digits));
  const line = ([latent, name, classes, references, frequency, activation, entropy]) => {
    const thumbs = [0, 1, 2].filter((i) => i < references).map((i) => node("span", { className: "thumb",
      style: `background-image:url(strips/${latent}.jpg);background-position-x:calc(-${i} * var(--side))` }));
    return node("tr", {}, node("th", { scope: "row" }, node("a", { href: page(latent) }, `${latent}`)),
      node("td", {}, node("a", { className: "called", href: page(latent), tabIndex: -1 }, node("span", { className: "thumbs" }, ...thumbs), name)),
      node("td", { className: "classes" }, classes),
      ...[[frequency, 3], [activation, 3], [entropy, 2]].map(([v, digits]) => node("td", { className: "number" }, number(v, digits))));
  };
  const show = () => {
    const all = found();
    rows.replaceChildren(...all.slice(0, shown).map(line));
    document.getElementById("count").textContent = `${all.length} latents found, ${Math.min(shown, all.length)} shown`;
    more.hidden = all.length <= shown;
    head.querySelectorAll("th").forEach((th, i) =>
      th.setAttribute("aria-sort", COLUMNS[i][1] !== column ? "none" : down ? "descending" : "ascending"));
  };
  head.append(...COLUMNS.map(([name, i]) => node("th", { scope: "col", className: i > 3 ? "number" : "" }, node("button", { type: "button",
    onclick: () => { down = i === column && !down; column = i; show(); } }, name))));
  search.addEventListener("input", () => { shown = 50; show(); });
  more.addEventListener("click", () => { shown += 200; show(); });
  show();

  const scatter = document.getElementById("scatter"), near = document.getElementById("near"), mark = scatter.querySelector(".mark");
  const [left, top, width, height] = JSON.parse(scatter.dataset.area), [down_, across] = JSON.parse(scatter.dataset.cells);
  const nearest = (event) => {
    const box = scatter.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width - left) / width * across;
    const y = ((event.clientY - box.top) / box.height - top) / height * down_;
    const distance = (latent) => (latent[7] === null ? Infinity : (latent[7] - y) ** 2 + (latent[8] - x) ** 2);
    return LATENTS.reduce((best, latent) => (distance(latent) < distance(best) ? latent : best));
  };
  scatter.addEventListener("pointermove", (event) => {
    const latent = nearest(event);
    near.textContent = `Latent ${latent[0]}, ${latent[1]}. Click to open its page.`;
    mark.hidden = latent[7] === null;
    mark.style.cssText = `left:${100 * (left + latent[8] / across * width)}%;top:${100 * (top + latent[7] / down_ * height)}%`;
  });
  scatter.addEventListener("click", (event) => { window.location.href = page(nearest(event)[0]); });
}
