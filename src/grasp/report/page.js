"use strict";
// Sorting of the table, and interactive charts in place of the drawn ones. Without this script the page says the same.
(() => {
  document.documentElement.classList.add("js");
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = [...table.querySelectorAll(".heads th")];

  // A cell's number, or its text; null where a model has no number there: such rows stay last.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (!cell || cell.dataset.key === undefined) return null;
    return column === 0 ? cell.dataset.key : Number(cell.dataset.key);
  };
  const sortBy = (column) => {
    const head = heads[column];
    const falling = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const compare = (a, b) => (column === 0 ? a.localeCompare(b) : a - b) * (falling ? -1 : 1);
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, column) }));
    rows.sort((a, b) => (a.key === null) - (b.key === null) || (a.key === null ? 0 : compare(a.key, b.key)));
    body.append(...rows.map((one) => one.row));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(column));
    head.append(button);
  });

  const data = JSON.parse(document.getElementById("charts").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  // Charts are written in light colours; dark ones are put in their place.
  const coloured = (value) => {
    if (!scheme.matches) return value;
    return JSON.parse(JSON.stringify(value), (key, item) => (typeof item === "string" && data.dark[item]) || item);
  };
  const embed = async (figure) => {
    const name = figure.dataset.chart;
    const spec = coloured({ ...data.charts[name], width: "container" });
    const place = document.createElement("div");
    place.className = "live waiting";
    figure.append(place);
    try {
      const view = await vegaEmbed(place, spec, {
        ast: true,
        config: coloured(data.config),
        renderer: "svg",
        logLevel: 1, // errors only
        tooltip: { theme: scheme.matches ? "dark" : "light" },
        actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
        downloadFileName: `grasp-${name}`,
      });
      const before = views.get(figure);
      views.set(figure, { view, place });
      figure.querySelector(".drawn").hidden = true;
      if (before) {
        before.view.finalize();
        before.place.remove();
      }
      place.classList.remove("waiting");
    } catch (failure) {
      place.remove(); // the drawn chart stays
      console.error(`${name}: ${failure}`);
    }
  };

  // One after the other, so that the page stays usable; those in a closed checkpoint when it is opened.
  const begun = new Set();
  const embedShown = async () => {
    for (const figure of document.querySelectorAll("[data-chart]")) {
      if (begun.has(figure) || figure.getClientRects().length === 0) continue;
      begun.add(figure);
      await embed(figure);
      await new Promise((go) => setTimeout(go));
    }
  };
  document.addEventListener("toggle", embedShown, true);
  scheme.addEventListener("change", async () => {
    for (const figure of [...views.keys()]) await embed(figure);
  });
  embedShown();

  // A link to a checkpoint opens it.
  const openTarget = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  window.addEventListener("hashchange", openTarget);
  openTarget();
})();
