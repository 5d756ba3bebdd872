"use strict";
// Sorting and choosing columns. Without this script the page shows everything in the order of the runs.
for (const table of document.querySelectorAll("table")) {
  const tools = document.querySelector(`.tools[data-for="${table.id}"]`);
  if (tools) tools.hidden = false;

  const show = (column, shown) => {
    for (const row of table.rows) {
      const cell = row.cells[column];
      if (cell) { cell.classList.toggle("shown", shown); cell.classList.toggle("off", !shown); }
    }
  };
  for (const box of tools ? tools.querySelectorAll("[data-column]") : []) {
    const apply = () => show(Number(box.dataset.column), box.checked);
    box.addEventListener("change", apply);
    apply();
  }
  const arms = tools && tools.querySelector("[data-arms]");
  if (arms) {
    const apply = () => table.classList.toggle("no-arms", !arms.checked);
    arms.addEventListener("change", apply);
    apply();
  }

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    // The first click puts the large numbers on top, the small ones where they are better, and text in its order.
    const first = head.title.startsWith("lower") || !head.classList.contains("number") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const key = (body) => body.rows[0].cells[column].dataset.order;
    const compare = (one, two) => {
      const [a, b] = [key(one), key(two)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const [x, y] = [Number(a), Number(b)];
      return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y);
    };
    [...table.tBodies].sort(compare).forEach((body) => table.append(body));
  }));
}
