"use strict";

// A table is sorted by the column whose heading is pressed, and backwards if pressed again.
// What was not measured comes last either way.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((each) => each.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...body.rows];
      const numeric = rows.some((row) => "value" in row.cells[column].dataset);
      const keyOf = (row) => {
        const cell = row.cells[column];
        if (!numeric) return cell.textContent;
        return "value" in cell.dataset ? Number(cell.dataset.value) : null;
      };
      const order = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      rows
        .map((row) => [keyOf(row), row])
        .sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * order(a, b)))
        .forEach(([, row]) => body.append(row));
    });
  });
}
