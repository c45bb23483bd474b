// The settings under the prompt: sampler, schedule, size, steps, guidance, seed, and any other field by its name.

import { controlField } from "./control.js";
import { el, iconButton } from "./dom.js";
import { bind, form, number, ownSettings, seedRow, set, watch } from "./form.js";
import { ipAdapterField } from "./ip_adapter.js";
import { on, state } from "./store.js";

const SHAPES = [["1:1", 1, 1], ["4:3", 4, 3], ["3:4", 3, 4], ["3:2", 3, 2], ["2:3", 2, 3], ["16:9", 16, 9], ["9:16", 9, 16]];
// Fields with a place of their own on the page; all others are added by name
const PLACED = new Set(["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "spacing", "seed",
  "count", "image", "mask", "strength", "outpaint", "mask_blur", "invert_mask", "masked_content", "only_masked", "control",
  "ip_adapter"]);

function field(label, input) {
  return el("div", { class: "field" }, el("label", { for: input.id, text: label }), input);
}

function samplerField() {
  const select = el("select", { id: "sampler" });
  const note = el("p", { class: "note", id: "sampler-note" });
  const show = () => {
    const sampler = state.samplers.find((known) => known.name === (select.value || ownSettings().sampler));
    note.textContent = sampler ? sampler.good_for : "";
    note.hidden = !sampler;
    showAuto(select, ownSettings().sampler);
  };
  on("form", show);
  on("listings", () => {
    select.replaceChildren(el("option", { value: "" }),
      ...state.samplers.map((known) => el("option", { value: known.name, text: label(known), title: known.good_for })));
    const value = form.request.sampler;
    if (value && !state.samplers.some((known) => known.name === value)) {
      select.append(el("option", { value, text: value }));
    }
    select.value = value ?? "";
    show();
  });
  bind(select, "sampler");
  watchAnd("sampler", select, show);
  select.addEventListener("input", show);
  select.setAttribute("aria-describedby", note.id);
  return [field("Sampler", select), spacingField(), note];
}

/** Return a sampler's name, with the one that people know it by. */
function label(sampler) {
  const known = (sampler.a1111 || sampler.diffusers || "").split(",")[0];
  return known && known.toLowerCase() !== sampler.name ? `${sampler.name} · ${known}` : sampler.name;
}

/** Say in the first option, which leaves the choice to the model, what it chooses. */
function showAuto(select, own) {
  const [first] = select.options;
  if (first) first.textContent = own ? `Auto: ${own}` : "Auto";
  select.classList.toggle("unset", !select.value);
}

/** Show a value that the select may not have as an option, such as another program's name. */
function watchAnd(name, select, after) {
  watch(name, (value) => {
    if (value && ![...select.options].some((option) => option.value === value)) {
      select.append(el("option", { value, text: value }));
    }
    select.value = value ?? "";
    after();
  });
}

function spacingField() {
  const select = el("select", { id: "spacing" });
  on("listings", () => {
    select.replaceChildren(el("option", { value: "" }),
      ...state.spacings.map((name) => el("option", { value: name, text: name })));
    select.value = form.request.spacing ?? "";
    show();
  });
  const show = () => showAuto(select, form.request.sampler ? null : ownSettings().spacing);
  on("form", show);
  bind(select, "spacing");
  watchAnd("spacing", select, () => {});
  return field("Schedule", select);
}

/** Return the model's own size; 512 where its files are not on the server yet. */
function ownSize() {
  const { width = 512, height = width } = ownSettings();
  return [width, height];
}

/** Return the size of a shape with the area of the model's own size. */
function sizeOf(across, down) {
  const [width, height] = ownSize();
  const side = Math.sqrt(width * height);
  const unit = side >= 512 ? 64 : 8;
  const round = (value) => Math.max(unit, Math.round(value / unit) * unit);
  return [round(side * Math.sqrt(across / down)), round(side * Math.sqrt(down / across))];
}

function sizeField() {
  const width = el("input", { id: "width", type: "number", min: 64, max: 4096, step: 8, inputMode: "numeric" });
  const height = el("input", { id: "height", type: "number", min: 64, max: 4096, step: 8, inputMode: "numeric", "aria-label": "Height" });
  bind(width, "width", number);
  bind(height, "height", number);
  const swap = iconButton("swap", "Swap width and height", () => {
    const [ownWidth, ownHeight] = ownSize();
    set({ width: form.request.height ?? ownHeight, height: form.request.width ?? ownWidth });
  });
  const shapes = el("div", { class: "shapes", role: "group", "aria-label": "Shapes" });
  for (const [name, across, down] of SHAPES) {
    const outline = el("span", { class: "outline" });
    const scale = 12 / Math.max(across, down);
    outline.style.width = `${across * scale}px`;
    outline.style.height = `${down * scale}px`;
    shapes.append(el("button", { type: "button", class: "shape", "aria-pressed": "false", data: { shape: name },
      onclick: () => { const [w, h] = sizeOf(across, down); set({ width: w, height: h }); } },
    el("span", { class: "frame" }, outline), el("span", { text: name })));
  }
  const show = () => {
    const own = ownSize();
    [width.placeholder, height.placeholder] = own.map(String);
    const [w, h] = [form.request.width ?? own[0], form.request.height ?? own[1]];
    for (const button of shapes.children) {
      const [, across, down] = SHAPES.find(([name]) => name === button.dataset.shape);
      const [x, y] = sizeOf(across, down);
      button.setAttribute("aria-pressed", String(x === w && y === h));
    }
  };
  on("form listings taken", show);
  return el("div", { class: "field wide" }, el("label", { for: "width", text: "Size" }),
    el("div", { class: "size" }, width, el("span", { class: "times", text: "×", "aria-hidden": "true" }), height, swap), shapes);
}

function slider(id, name, label, { min, max, step, usual }) {
  const input = el("input", { id, inputMode: "decimal" });
  const range = el("input", { type: "range", min, max, step, "aria-label": `${label}, slider`, tabIndex: -1 });
  bind(input, name, (text) => (text.includes(",") ? text.split(",").map(Number) : number(text)));
  range.addEventListener("input", () => set({ [name]: Number(range.value) }));
  const show = () => {
    const value = form.request[name];
    const own = ownSettings()[name] ?? usual;
    input.placeholder = String(own);
    range.value = typeof value === "number" ? value : Number(own);
    range.classList.toggle("unset", typeof value !== "number");
  };
  on("form taken listings", show);
  show();
  return el("div", { class: "field" }, el("label", { for: id, text: label }), el("div", { class: "slider" }, range, input));
}

/** Return the part where any other field of a request can be set. */
function moreFields() {
  const rows = el("div", { class: "more-rows" });
  const choice = el("select", { id: "add-field", "aria-label": "Add a setting" });
  choice.addEventListener("change", () => {
    if (!choice.value) return;
    show([choice.value]);
    rows.querySelector(`[data-field="${choice.value}"] :is(input, select)`)?.focus();
  });
  const known = () => state.fields.filter((one) => !PLACED.has(one.name) && one.name !== "batch");

  function show(added = []) {
    const present = known().filter((one) => form.request[one.name] !== undefined || added.includes(one.name));
    rows.replaceChildren(...present.map((one) => el("div", { class: "more-row", data: { field: one.name } },
      el("label", { for: `field-${one.name}`, text: title(one.name), title: one.help }), control(one),
      iconButton("close", `Remove ${title(one.name)}`, () => (set({ [one.name]: null }), show())))));
    const groups = new Map();
    for (const one of known()) {
      if (!present.includes(one)) groups.set(one.group, [...(groups.get(one.group) ?? []), one]);
    }
    choice.replaceChildren(el("option", { value: "", text: "Add a setting…" }), ...[...groups].map(([group, found]) =>
      el("optgroup", { label: group }, found.map((one) => el("option", { value: one.name, text: title(one.name), title: one.help })))));
  }
  on("listings taken", () => show());
  on("form", (fields) => Object.keys(fields).some((name) => !PLACED.has(name) && name !== "model") &&
    !rows.contains(document.activeElement) && show());
  return el("div", { class: "field wide more" }, rows, choice);
}

export const title = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

/** Return the control of a field: a choice where its schema has one, otherwise a text that is read as JSON. */
function control(one) {
  const id = `field-${one.name}`;
  const parts = [one.schema, ...(one.schema.anyOf ?? [])];
  const pattern = parts.map((part) => part.pattern).find((text) => text?.startsWith("^("));
  const boolean = parts.some((part) => part.type === "boolean");
  const choices = boolean ? ["true", "false"] : pattern?.slice(2, -2).split("|");
  const show = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value ?? ""));
  if (choices) {
    const select = el("select", { id }, el("option", { value: "", text: "default" }), choices.map((text) => el("option", { value: text, text })));
    select.value = show(form.request[one.name]);
    select.addEventListener("change", () => set({ [one.name]: boolean && select.value ? select.value === "true" : select.value }));
    return select;
  }
  const input = el("input", { id, title: one.help, placeholder: one.help });
  input.value = show(form.request[one.name]);
  input.addEventListener("input", () => set({ [one.name]: read(input.value.trim()) }));
  return input;
}

/** Read a value: JSON, or numbers with commas between them, or text. */
export function read(text) {
  for (const attempt of [text, /^[-\d.\s,]+,[-\d.\s,]+$/.test(text) ? `[${text}]` : "."]) {
    try {
      return JSON.parse(attempt);
    } catch {
      // the next form
    }
  }
  return text;
}

/** Build the settings. */
export function buildSettings(root) {
  const seed = seedRow();
  root.append(
    ...samplerField(),
    slider("steps", "steps", "Steps", { min: 1, max: 60, step: 1, usual: 20 }),
    slider("guidance_scale", "guidance_scale", "Guidance", { min: 1, max: 15, step: 0.5, usual: 7.5 }),
    el("div", { class: "field wide" }, seed.label, seed.row),
    sizeField(),
    controlField(),
    ipAdapterField(),
    moreFields(),
  );
}
