// A Copy button in the corner of code and documents (pre.copy) and behind secrets and ids (code.copy), made here because
// without this script it could do nothing. The clipboard asks for https or localhost; elsewhere the old command does it.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function equip(source) {
  if (source.parentElement.matches(".copied")) return;
  const within = source.closest(source.matches("pre") ? ".panel" : ".note");
  const what = within?.querySelector("h2, summary")?.textContent.trim() ?? (source.matches("code") ? source.textContent : "");
  const button = Object.assign(document.createElement("button"), { type: "button", className: "btn small", textContent: "Copy" });
  if (what) button.setAttribute("aria-label", `Copy: ${what}`);
  button.addEventListener("click", async () => {
    const done = await copy(source.textContent);
    button.textContent = done ? "Copied" : "Select it and press Ctrl C";
    document.getElementById("status").textContent = button.textContent;
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const frame = Object.assign(document.createElement(source.matches("pre") ? "div" : "span"), { className: "copied" });
  source.replaceWith(frame);
  frame.append(source, button);
}

const all = () => document.querySelectorAll("pre.copy, code.copy").forEach(equip);
document.addEventListener("htmx:afterSettle", all);
all();
