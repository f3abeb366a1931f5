// The rows of a steering form: beside each value a slider, and fields for it as a multiple of the feature's maximum and as
// a share of the layer's norm; all of them move together. Without this the value fields work as they are.
const HIGH = 0.5, OVER = 1; // shares of the layer's norm from which a text tends to suffer, and to break
const USUAL = 0.5; // where a strength begins, as in concepts.models.usual_strength
const form = document.querySelector("form[data-steer]");
const number = (text) => (text === "" || text === undefined || !Number.isFinite(Number(text)) ? null : Number(text));
const typed = (x) => String(Number(x.toPrecision(4)));
const short = (x) => (x === 0 ? "0" : Number(x.toPrecision(Math.abs(x) >= 1000 ? 4 : 3)).toString().replace("-", "−"));

function range(mode, max, perNorm) {
  if (mode === "scale") return [0, 4];
  if (!max || mode === "ablate") return null;
  const most = Math.max(2 * max, perNorm ? OVER / perNorm : 0);
  return mode === "add" ? [-most, most] : [0, most];
}

function words(mode, value, max, perNorm) {
  if (mode === "ablate") return "z' = 0, no value needed";
  if (value === null) return max ? `maximum ${short(max)}` : "";
  if (mode === "scale") return `z × ${short(value)}`;
  const parts = [max && `${short(value / max)} × max`, perNorm && `${short(value * perNorm * 100)} % of norm`];
  return parts.filter(Boolean).join(" · ");
}

// A strength to begin with: half of the layer's norm, where that is known; to cap at, the maximum.
function usual(mode, max, perNorm) {
  if (mode === "scale") return 2;
  return perNorm && mode !== "cap" ? Number((USUAL / perNorm).toPrecision(4)) : max ? Number(max.toPrecision(4)) : "";
}

class Row {
  constructor(root) {
    this.root = root;
    this.feature = root.querySelector("[name$=-feature]");
    this.mode = root.querySelector("[name$=-mode]");
    this.value = root.querySelector("[name$=-value]");
    this.slider = root.querySelector("[data-slider]");
    this.units = root.querySelector("[data-units]");
    this.name = root.querySelector("[data-name]");
    this.linked = root.querySelector("[data-linked]");
    this.times = root.querySelector("[data-times]");
    this.share = root.querySelector("[data-share]");
    this.sae = root.querySelector("[name$=-sae]");
    this.times.addEventListener("input", () => this.from(this.times, number(this.root.dataset.max)));
    this.share.addEventListener("input", () => this.from(this.share, 0.01 / number(this.root.dataset.perNorm)));
    this.sae?.addEventListener("change", () => this.look());
    this.scope = root.querySelector("[name$=-scope]");
    this.first = root.querySelector("[data-first]");
    this.scope.addEventListener("change", () => this.placed());
    this.options = document.body.appendChild(Object.assign(document.createElement("datalist"), { id: `${this.feature.id}_options` }));
    this.feature.setAttribute("list", this.options.id);
    this.feature.addEventListener("input", () => this.suggest());
    const clear = root.querySelector("[data-clear]");
    clear.hidden = false;
    clear.addEventListener("click", () => this.clear());
    this.slider.addEventListener("input", () => { this.value.value = Number(Number(this.slider.value).toPrecision(4)); this.show(); });
    this.value.addEventListener("input", () => this.show());
    this.mode.addEventListener("change", () => this.switched());
    this.feature.addEventListener("change", () => this.look());
    this.was = this.mode.value;
    this.placed();
    this.show();
  }

  placed() { this.first.hidden = this.scope.value !== "from"; }

  // Labels and concepts that hold what was typed; a choice puts the feature's number, or the concept's name, into the field.
  suggest() {
    clearTimeout(this.waiting);
    const words = this.feature.value.trim(), sae = this.whose();
    if (words.length < 2 || /^\d+$/.test(words) || !sae) return;
    this.waiting = setTimeout(async () => {
      const url = `${form.dataset.suggest}?${new URLSearchParams({ sae, q: words })}`;
      let answer;
      try { answer = await fetch(url, { headers: { Accept: "application/json" } }); } catch { return; }
      if (!answer.ok || answer.redirected || this.feature.value.trim() !== words) return;
      const { found } = await answer.json();
      this.options.replaceChildren(...found.map(({ value, text }) => Object.assign(document.createElement("option"), { value, label: text, textContent: text })));
    }, 150);
  }

  // A factor is no activation: between scale and the others the value starts anew.
  switched() {
    const mode = this.mode.value, max = number(this.root.dataset.max), perNorm = number(this.root.dataset.perNorm);
    if (mode === "scale" || this.was === "scale") this.value.value = usual(mode, max, perNorm);
    this.was = mode;
    this.show();
  }

  // The value follows what was typed in one of the other units.
  from(field, unit) {
    const count = number(field.value);
    if (count !== null && Number.isFinite(unit)) this.value.value = typed(count * unit);
    this.show(field);
  }

  fill(typing, mode, value, max, perNorm) {
    const activation = mode !== "scale" && mode !== "ablate";
    this.linked.hidden = !activation || !(max || perNorm);
    for (const [field, unit] of [[this.times, max], [this.share, perNorm && 0.01 / perNorm]]) {
      field.hidden = field.nextElementSibling.hidden = !unit;
      if (field !== typing) field.value = value === null || !unit ? "" : typed(value / unit);
    }
  }

  show(typing = null) {
    const mode = this.mode.value, max = number(this.root.dataset.max), perNorm = number(this.root.dataset.perNorm), value = number(this.value.value);
    const ends = range(mode, max, perNorm);
    this.slider.hidden = false;
    this.slider.disabled = ends === null;
    this.value.readOnly = mode === "ablate";
    if (ends) Object.assign(this.slider, { min: ends[0], max: ends[1], step: (ends[1] - ends[0]) / 400 });
    this.slider.value = value ?? (mode === "scale" ? 1 : 0);
    const text = words(mode, value, max, perNorm);
    this.fill(typing, mode, value, max, perNorm);
    this.units.textContent = this.linked.hidden || value === null ? text : "";
    this.slider.setAttribute("aria-valuetext", `${value ?? "no value"} ${text}`);
    const share = value !== null && perNorm && (mode === "add" || mode === "clamp" || mode === "cap") ? Math.abs(value) * perNorm : 0;
    this.root.classList.toggle("high", share > HIGH * 1.001 && share <= OVER);
    this.root.classList.toggle("over", share > OVER);
  }

  whose() { return this.sae?.value || form.elements.sae.value; }

  // What the SAE's view over the most tokens knows of the feature.
  async look() {
    const index = this.feature.value.trim(), sae = this.whose();
    this.know("", "", "");
    if (!/^\d+$/.test(index) || !sae) return;
    const url = `${form.dataset.features.replace("/0/", `/${sae}/`)}${index}/?format=json`;
    let answer;
    try { answer = await fetch(url, { headers: { Accept: "application/json" } }); } catch { return; }
    if (this.feature.value.trim() !== index || this.whose() !== sae) return; // another one was typed meanwhile
    if (answer.status === 404) return this.know("no such feature", "", "");
    if (!answer.ok || answer.redirected) return; // no view of this SAE: values stay plain numbers
    const found = await answer.json();
    const perNorm = found.decoder_norm && found.layer_norm ? found.decoder_norm / found.layer_norm : "";
    if (found.maximum && this.value.value === "") this.value.value = usual(this.mode.value, found.maximum, perNorm);
    this.know(found.name.length ? found.name : "never fired", found.maximum ?? 0, perNorm, found.label);
  }

  know(name, max, perNorm, label = "") {
    const tokens = typeof name === "string" ? [] : name;
    const chip = label ? [Object.assign(document.createElement("span"), { className: "chip label", textContent: label })] : [];
    this.name.replaceChildren(...chip, ...tokens.map((text) => Object.assign(document.createElement("code"), { className: "tok", textContent: text.replaceAll(" ", "␣").replaceAll("\n", "↵") })));
    if (!tokens.length && name) this.name.append(Object.assign(document.createElement("span"), { className: "sub", textContent: name }));
    Object.assign(this.root.dataset, { max, perNorm });
    this.show();
  }

  clear() {
    this.feature.value = this.value.value = "";
    this.root.querySelector(".error")?.remove();
    this.know("", "", "");
    this.feature.focus();
  }
}

if (form) {
  const rows = [...form.querySelectorAll(".edit")].map((root) => new Row(root));
  form.elements.sae.addEventListener("change", () => rows.forEach((row) => row.look()));
  const from = form.elements.scope_from.closest(".field"), scope = form.elements.scope;
  const asked = () => { from.hidden = scope.value !== "from"; };
  scope.addEventListener("change", asked);
  asked();
}
