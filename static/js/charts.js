// Downloads of a chart, made of what the page shows: the SVG itself, and its table as CSV with the exact values.
const save = (name, type, text) => {
  const url = URL.createObjectURL(new Blob([text], { type }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
};
// What begins like a formula gets an apostrophe, as in saehub/spreadsheets.py; a number stays one.
const plain = (text) => (/^'* *[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text);
const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => quote(plain(cell.dataset.v ?? cell.textContent.trim()))).join(",")).join("\n") + "\n";

document.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-save]")?.dataset.save;
  if (!kind) return;
  const chart = event.target.closest(".chart");
  const name = `${chart.dataset.name || "chart"}.${kind}`;
  if (kind === "csv") save(name, "text/csv", csv(chart.querySelector("table")));
  else save(name, "image/svg+xml", new XMLSerializer().serializeToString(chart.querySelector("svg")));
});
const show = () => document.querySelectorAll(".chart .btns[hidden]").forEach((buttons) => (buttons.hidden = false));
document.addEventListener("htmx:afterSettle", show);
show();
