// Single-key shortcuts, rows that open on a click, and Ctrl+Enter. All of them only press what is on the page anyway:
//   [data-go="s"]    pressed by g s          [data-key="n j"] pressed by n or j (links, buttons) or focused (fields)
//   table[data-keys] j and k move between its rows' .rowlink, x ticks the row's box; Enter is the link's own
const typing = (element) => element?.closest("input:not([type=checkbox], [type=radio], [type=range]), textarea, select, [contenteditable]");
const off = () => localStorage.getItem("keys") === "off";
let went = 0; // when g was pressed

function press(element) {
  if (!element) return false;
  element.focus();
  if (element.matches("a, button, summary")) element.click();
  return true;
}

function move(step) {
  const links = [...document.querySelectorAll("table[data-keys] .rowlink")];
  if (!links.length) return false;
  const row = document.activeElement?.closest("table[data-keys] tbody tr");
  const at = row ? links.indexOf(row.querySelector(".rowlink")) : step > 0 ? -1 : links.length;
  const link = links[Math.min(Math.max(at + step, 0), links.length - 1)];
  link.focus();
  link.closest("tr").scrollIntoView({ block: "nearest" });
  return true;
}

function tick() {
  const box = document.activeElement?.closest("table[data-keys] tbody tr")?.querySelector("input[type=checkbox]");
  box?.click();
  return Boolean(box);
}

function help() {
  const keys = document.getElementById("keys");
  if (!keys) return false;
  keys.open = !keys.open;
  keys.querySelector("summary").focus();
  return true;
}

function single(key) {
  if (Date.now() - went < 1500) {
    went = 0;
    return press(document.querySelector(`[data-go="${CSS.escape(key)}"]`));
  }
  if (key === "g") return Boolean((went = Date.now()));
  const keys = { "/": () => press(document.getElementById("omnibox")), "?": help, j: () => move(1), k: () => move(-1), x: tick };
  return keys[key]?.() || press(document.querySelector(`[data-key~="${CSS.escape(key)}"]`));
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    const form = event.target.closest("form");
    if (form) { event.preventDefault(); form.requestSubmit(); }
  } else if (event.key === "Escape" && typing(event.target)) {
    event.target.blur();
  } else if (event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey && !typing(event.target) && !off()) {
    if (single(event.key)) event.preventDefault();
  }
});

// A click anywhere in a row follows its link, the way a click on the link would; selecting text does not.
document.addEventListener("click", (event) => {
  const row = event.target.closest("table.rows tbody tr");
  if (!row || event.target.closest("a, button, input, label, summary, select") || String(getSelection())) return;
  const link = row.querySelector(".rowlink");
  if (link && (event.ctrlKey || event.metaKey)) window.open(link.href);
  else link?.click();
});

const mark = () => document.querySelectorAll("table.rows").forEach((table) => table.classList.add("js"));
document.addEventListener("htmx:afterSettle", mark);
mark();

const switchOn = document.getElementById("keys-on");
if (switchOn) {
  document.getElementById("keys").hidden = false;
  switchOn.checked = !off();
  switchOn.addEventListener("change", () => localStorage.setItem("keys", switchOn.checked ? "on" : "off"));
}
