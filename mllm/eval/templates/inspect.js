// Which tokens are there at each place of the model. Stop 0 is the picture, 1 the language model's
// input, then its layers; `data.stops` says which of the kept sets a stop has.
const COLOURS = ["#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#0072B2"];
const [KEPT, MERGED, DROPPED, GONE] = [0, 1, 2, 3];
const slider = document.getElementById("stop"), where = document.getElementById("where");
const strip = document.querySelector(".layers"), views = all(".view");
let heat = -1;

function fates(view, stop) {
  if (stop === 0) return null;
  const now = view.kept[data.stops[stop - 1]];
  const before = stop === 1 ? null : view.kept[data.stops[stop - 2]];
  return [...now].map((there, i) => {
    if (there === "1") return KEPT;
    if (before && before[i] === "0") return GONE;
    const target = stop === 1 && view.into ? view.into[i] : -1;
    return target !== -1 && target !== i ? MERGED : DROPPED;
  });
}

function place(stop) {
  if (stop === 0) return "As the model sees it";
  return stop === 1 ? "Entering the language model" : `Entering decoder layer ${stop - 2}`;
}

function drawView(figure, view, stop) {
  const canvas = figure.querySelector("canvas"), image = figure.querySelector("img");
  const scale = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = image.clientWidth * scale;
  canvas.height = image.clientHeight * scale;
  const pen = canvas.getContext("2d"), kept = fates(view, stop);
  const w = canvas.width / view.cols, h = canvas.height / view.rows;
  const box = i => [(i % view.cols) * w, Math.floor(i / view.cols) * h, w, h];
  const middle = i => [(i % view.cols + .5) * w, (Math.floor(i / view.cols) + .5) * h];
  figure.querySelector(".count").textContent = kept
    ? `${kept.filter(x => x === KEPT).length} of ${kept.length}` : `${view.rows} × ${view.cols}`;
  const line = Math.max(1, Math.min(w, h) / 14);
  if (heat >= 0) {
    const own = view.heat[heat];
    for (let i = 0; i < view.rows * view.cols; i++) {
      const share = own ? own.share[i] : null;
      pen.fillStyle = `rgba(8, 9, 12, ${share === null ? .93 : .86 * (1 - Math.sqrt(share))})`;
      pen.fillRect(...box(i));
      if (share === null) stroke(pen, box(i), "#5b616b", line);
    }
    return;
  }
  if (!kept) return;
  const colour = {};
  kept.forEach((fate, i) => {
    if (fate === KEPT) return;
    pen.fillStyle = fate === GONE ? "rgba(8, 9, 12, .93)" : fate === MERGED ? "rgba(20, 22, 26, .6)" : "rgba(42, 44, 48, .82)";
    pen.fillRect(...box(i));
    if (fate === DROPPED) stroke(pen, box(i), "#8a909a", line);
    if (fate === MERGED) {
      const target = view.into[i];
      if (target >= 0) colour[target] ??= COLOURS[Object.keys(colour).length % COLOURS.length];
      pen.fillStyle = (target >= 0 ? colour[target] : "#9aa1ad") + "59";
      pen.fillRect(...box(i));
    }
  });
  const faint = kept.filter(fate => fate === MERGED).length > 150;
  kept.forEach((fate, i) => {
    if (fate !== MERGED || view.into[i] < 0) return;
    pen.strokeStyle = colour[view.into[i]] + (faint ? "58" : "b0");
    pen.lineWidth = line;
    pen.beginPath();
    pen.moveTo(...middle(i));
    pen.lineTo(...middle(view.into[i]));
    pen.stroke();
  });
  if (kept.every(fate => fate === KEPT)) return;
  kept.forEach((fate, i) => {
    if (fate !== KEPT) return;
    const [x, y] = box(i);
    pen.lineWidth = line * (colour[i] ? 2.2 : 1.2);
    pen.strokeStyle = colour[i] || "#ffffff";
    pen.strokeRect(x + line, y + line, w - 2 * line, h - 2 * line);
  });
}

function stroke(pen, [x, y, w, h], colour, line) {
  pen.strokeStyle = colour;
  pen.lineWidth = line;
  pen.beginPath();
  pen.moveTo(x + w / 3, y + 2 * h / 3);
  pen.lineTo(x + 2 * w / 3, y + h / 3);
  pen.stroke();
}

function draw() {
  const stop = Number(slider.value);
  views.forEach((figure, i) => drawView(figure, data.views[i], stop));
  where.textContent = heat >= 0
    ? data.heat[heat].label
    : `${place(stop)}: ${data.counts[stop]} of ${data.total} visual tokens`;
  slider.setAttribute("aria-valuetext", place(stop));
  [...strip.children].forEach((bar, i) => bar.classList.toggle("at", i === stop));
  document.getElementById("bright").hidden = heat < 0;
}

// A token's story, by finger or pointer.
views.forEach((figure, n) => figure.addEventListener("click", event => {
  const frame = figure.querySelector("img").getBoundingClientRect(), view = data.views[n];
  const row = Math.floor((event.clientY - frame.y) / frame.height * view.rows);
  const col = Math.floor((event.clientX - frame.x) / frame.width * view.cols);
  if (row < 0 || col < 0 || row >= view.rows || col >= view.cols) return;
  const i = row * view.cols + col;
  const left = data.stops.findIndex(state => view.kept[state][i] === "0");
  const target = view.into && left === 0 ? view.into[i] : -1;
  let said = `Row ${row + 1}, column ${col + 1}: `;
  if (left < 0) said += "reaches the last layer";
  else if (target !== -1 && target !== i) said += "merged before the language model";
  else said += left ? `gone from decoder layer ${left - 1} on` : "dropped before the language model";
  data.heat.forEach((read, k) => {
    const own = view.heat[k], share = own && own.share[i];
    if (own && share !== null) said += `; ${read.label}: ${(own.least + share * own.reach).toPrecision(3)}`;
  });
  document.getElementById("said").textContent = said + ".";
}));

slider.max = data.stops.length;
slider.value = 1;
data.counts.forEach((count, i) => {
  const bar = document.createElement("button");
  bar.type = "button";
  bar.tabIndex = -1;
  bar.title = `${place(i)}: ${count}`;
  bar.style.height = `${Math.max(4, 100 * count / data.total)}%`;
  bar.addEventListener("click", () => { slider.value = i; choose(-1); });
  strip.append(bar);
});
const modes = [["tokens", -1], ...data.heat.map((read, i) => [read.label, i])].map(([label, i]) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", () => choose(i));
  if (data.heat.length) document.getElementById("heats").append(button);
  return button;
});
function choose(i) {
  heat = i;
  if (heat >= 0) slider.value = data.heat[heat].stop;
  modes.forEach((button, k) => button.setAttribute("aria-pressed", k - 1 === heat));
  draw();
}
const step = by => { slider.value = Number(slider.value) + by; choose(-1); };
document.getElementById("back").addEventListener("click", () => step(-1));
document.getElementById("on").addEventListener("click", () => step(1));
slider.addEventListener("input", () => choose(-1));
window.addEventListener("resize", draw);
document.querySelector(".controls").hidden = false;
for (const image of all(".view img")) image.complete || image.addEventListener("load", draw);
choose(-1);
