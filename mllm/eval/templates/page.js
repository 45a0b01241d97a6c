"use strict";
// The page is complete without this; it only helps to read it.
const all = (what, from = document) => [...from.querySelectorAll(what)];

// The figures of the mark that a finger or a pointer is nearest to.
for (const figure of all("figure.plot")) {
  const said = figure.querySelector(".said");
  const distance = (dot, event) => {
    const box = dot.getBoundingClientRect();
    return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
  };
  figure.addEventListener("click", event => {
    const near = all(".dot", figure).map(dot => [distance(dot, event), dot]);
    const [far, dot] = near.reduce((a, b) => (b[0] < a[0] ? b : a), [Infinity]);
    said.textContent = far < 24 ? dot.querySelector("title").textContent : "";
  });
}

// Methods of the legend that are brought forward in all plots.
const names = all(".legend button");
for (const button of names) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    const chosen = names.filter(b => b.getAttribute("aria-pressed") === "true").map(b => b.dataset.name);
    document.body.classList.toggle("chosen", chosen.length > 0);
    for (const series of all(".series")) {
      series.classList.toggle("on", chosen.includes(series.dataset.name));
    }
  });
}

// One budget at a time, in all tables.
const bar = document.querySelector(".budgets");
if (bar) {
  const show = budget => {
    for (const button of all("button", bar)) {
      button.setAttribute("aria-pressed", button.dataset.budget === budget);
    }
    for (const part of all("tbody[data-budget]")) {
      part.hidden = !["", "None", part.dataset.budget].includes(budget)
        && part.dataset.budget !== "None";
    }
  };
  for (const button of all("button", bar)) {
    button.addEventListener("click", () => show(button.dataset.budget));
  }
  bar.hidden = false;
  show(bar.dataset.opened);
}

// Columns that sort the rows of every budget.
const value = (row, column) => {
  const cell = row.cells[column], text = cell ? cell.dataset.v ?? cell.textContent.trim() : "";
  const number = parseFloat(text.replace("−", "-").replace(/,(?=\d{3})/g, ""));
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => typeof a === typeof b
  ? (typeof a === "number" ? a - b : a.localeCompare(b))
  : typeof a === "number" ? -1 : 1;
for (const table of all("table.sortable")) {
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      all("thead th", table).forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("group"));
        rows.sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
        body.append(...rows);
      }
    });
  });
}
