"use strict";
// The page says everything without this: it makes headings of tables into buttons that sort, and opens what is
// folded before it is printed.

function sortKey(cell) {
  const text = cell.textContent.trim();
  const number = text.replaceAll(",", "").replace(/×$| \(.*\)$/, "").replace(/^(-?)inf$/, "$1Infinity");
  return /^[-+]?(\d|Infinity)/.test(number) && !Number.isNaN(Number(number)) ? Number(number) : text;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
}

function sortBy(table, heading, column) {
  const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const sign = direction === "ascending" ? 1 : -1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => [sortKey(row.cells[column]), row]);
  const missing = ([key]) => key === "–"; // what was not measured stays last, whatever the direction
  keyed.sort((a, b) => missing(a) - missing(b) || sign * compare(a[0], b[0]));
  body.append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table")) {
  Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(table, heading, column));
    heading.append(button);
  });
}

window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
