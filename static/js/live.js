// Keeps what the server swaps in from disturbing whoever is looking: focus, open folds and scrolled logs survive a swap, what is
// pressed is not swapped; [data-say] of a swapped element is read aloud, at most every five seconds; times keep counting;
// errors are told.
const SPOKEN_EVERY = 5000;
const kept = new Map(); // by the id of the swapped element: one answer may swap several, each before the next is restored

function keep(target) {
  const within = (selector) => [...target.querySelectorAll(selector)].filter((element) => element.id);
  kept.set(target.id, {
    focus: target.contains(document.activeElement) ? document.activeElement.id : "",
    open: within("details[open]").map((element) => element.id),
    scrolled: within(".log").map((element) => [element.id, element.scrollTop, element.scrollHeight - element.clientHeight - element.scrollTop < 4]),
  });
}

function restore(id) {
  if (!kept.has(id)) return;
  const { focus, open, scrolled } = kept.get(id);
  kept.delete(id);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const [id, top, atEnd] of scrolled) {
    const log = document.getElementById(id);
    if (log) log.scrollTop = atEnd ? log.scrollHeight : top;
  }
  if (focus && document.activeElement?.id !== focus) document.getElementById(focus)?.focus({ preventScroll: true });
}

let spokenAt = 0, waiting = 0;
function say(text) {
  const status = document.getElementById("status");
  if (!status || status.textContent === text) return;
  clearTimeout(waiting);
  waiting = setTimeout(() => { spokenAt = Date.now(); status.textContent = text; }, Math.max(0, spokenAt + SPOKEN_EVERY - Date.now()));
}

function swapped(target, element) {
  restore(target.id);
  const speaks = element?.matches?.("[data-say]") ? element : element?.querySelector?.("[data-say]");
  if (speaks?.dataset.say) say(speaks.dataset.say);
  else if (target.id === "rows" && filtered) say(left());
  filtered = false;
}

function left() {
  const rows = document.querySelectorAll("#rows tbody tr").length;
  return document.querySelector("#rows .pager > span")?.textContent ?? (rows === 1 ? "1 row" : `${rows} rows`);
}

// A list that somebody filters tells how many rows are left; one that polls does not.
let filtered = false;
document.addEventListener("htmx:beforeRequest", (event) => { if (event.detail.elt.matches(".facets")) filtered = true; });

// While something in it is pressed a part of the page is left as it is: a button that is swapped between press and release
// is never clicked. The part asks again within seconds, so that what is left out here is not lost.
let pressed = null;
const release = () => setTimeout(() => { pressed = null; }); // after the click that the release makes
document.addEventListener("pointerdown", (event) => { pressed = event.target; }, true);
document.addEventListener("keydown", (event) => { if (event.key === " ") pressed = event.target; }, true);
for (const name of ["pointerup", "pointercancel", "keyup", "dragend"]) document.addEventListener(name, release, true);
window.addEventListener("blur", release);

for (const name of ["htmx:beforeSwap", "htmx:oobBeforeSwap"]) document.addEventListener(name, (event) => {
  if (pressed && event.detail.target.contains(pressed)) event.detail.shouldSwap = false;
  else keep(event.detail.target);
});
document.addEventListener("htmx:oobAfterSwap", (event) => swapped(event.detail.target, event.target));
document.addEventListener("htmx:afterSwap", (event) => swapped(event.detail.target, event.detail.elt));

// -- a form that comes back with errors: the first field in question is where one goes on
document.querySelector("main .field.has-error :is(input, select, textarea), main [aria-invalid='true']")?.focus();

// -- times
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
function ago(seconds) {
  if (Math.abs(seconds) < 1) return "just now";
  const [size, unit] = UNITS.find(([size]) => Math.abs(seconds) >= size);
  const shown = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
  return seconds > 0 ? `${shown} ago` : `in ${shown}`;
}
setInterval(() => {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const text = ago((Date.now() - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}, 1000);

// -- what went wrong, said where it can be seen: an error until one tries something else, a lost server until it is back
function clear(kind) { document.querySelectorAll(`#notices [data-told="${kind}"]`).forEach((note) => note.remove()); }
function tell(kind, text) {
  clear(kind);
  const note = Object.assign(document.createElement("p"), { className: "note bad", textContent: text });
  note.dataset.told = kind;
  document.getElementById("notices")?.append(note);
}
const WORDS = { 403: "You may not do this.", 404: "It is not there any more; reload the page." };
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  tell("error", WORDS[status] ?? `The server answered with an error (${status}). Try again, or reload the page.`);
});
document.addEventListener("htmx:sendError", () => tell("lost", "The server cannot be reached. This page shows how things stood before."));
document.addEventListener("htmx:beforeRequest", (event) => { if (event.detail.requestConfig.triggeringEvent) clear("error"); });
document.addEventListener("htmx:afterOnLoad", () => clear("lost"));
