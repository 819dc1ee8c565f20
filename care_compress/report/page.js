// Sorting: a click on a column's name, again for the other direction.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const numeric = head.classList.contains("number");
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      if ("key" in cell.dataset) return Number(cell.dataset.key);
      return numeric ? NaN : cell.textContent;
    };
    const compare = (a, b) => {
      const [first, second] = [key(a), key(b)];
      if (typeof first === "string" && typeof second === "string") {
        return first.localeCompare(second, "en", { numeric: true });
      }
      return first - second;
    };
    // Rows without a value stay below the others in both directions.
    const empty = (row) => Number.isNaN(key(row));
    const rows = [...body.rows];
    const filled = rows.filter((row) => !empty(row)).sort(compare);
    if (down) filled.reverse();
    body.append(...filled, ...rows.filter(empty));
  });
}
