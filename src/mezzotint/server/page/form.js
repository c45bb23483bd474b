// The form. Its state is the request itself: the fields of mezzotint's Request, kept for a reload of this tab, and for the
// next new one.

import { $, announce, complain, debounce, el, icon, iconButton } from "./dom.js";
import { emit, newest, on, state, submit } from "./store.js";
import { buildSettings } from "./settings.js";
import { listenToWeights } from "./weights.js";

const KEY = "mezzotint.form";
const saved = JSON.parse(sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "{}");

export const form = { request: saved.request ?? {}, model: saved.model ?? "", vae: saved.vae ?? "", locked: saved.locked ?? false };
const inputs = new Map(); // by field: those who show it, as {show(value), input}

function keep() {
  sessionStorage.setItem(KEY, JSON.stringify(form));
  if (!document.hidden) localStorage.setItem(KEY, JSON.stringify(form)); // a new tab gets that of the tab that is used
}

const save = debounce(keep, 150);
addEventListener("pagehide", keep);

/** Set fields of the request; an absent value is the model's own. */
export function set(fields) {
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null || value === "") delete form.request[name];
    else form.request[name] = value;
    for (const { show } of inputs.get(name) ?? []) show(form.request[name]);
  }
  save();
  emit("form", fields);
}

/** Connect an input to a field: `parse` turns its text into a value. */
export function bind(input, name, parse = (text) => text) {
  const show = (value) => {
    if (document.activeElement !== input || String(parse(input.value) ?? "") !== String(value ?? "")) {
      input.value = value ?? "";
    }
    input.removeAttribute("aria-invalid");
  };
  watch(name, show, input);
  input.addEventListener("input", () => set({ [name]: parse(input.value.trim() === "" ? "" : input.value) }));
  return input;
}

/** Connect something else to a field: `show` is called with each value. */
export function watch(name, show, input = null) {
  inputs.set(name, [...(inputs.get(name) ?? []), { show, input }]);
  show(form.request[name]);
}

export const number = (text) => (text === "" || Number.isNaN(Number(text)) ? "" : Number(text));

/** Take all the settings of a request; fields that it does not have become the model's own. */
export function take({ request, model, vae }, { keepSource = true } = {}) {
  const absent = Object.fromEntries(Object.keys(form.request).map((name) => [name, null]));
  const fields = { ...absent, ...request };
  if (!keepSource) for (const name of ["image", "mask", "outpaint"]) fields[name] = null;
  form.locked = request.seed !== undefined && request.seed !== null;
  set(fields);
  if (model) setModel(model);
  setVae(vae ?? "");
  $("negative-part").open ||= Boolean(request.negative_prompt);
  emit("taken");
  announce("The settings are in the form.");
}

export function setModel(name) {
  if (!state.models.some((model) => model.name === name)) return;
  form.model = name;
  $("model").value = name;
  save();
  emit("form", { model: name });
}

export function setVae(name) {
  form.vae = state.vaes.includes(name) ? name : "";
  $("vae").value = form.vae;
  save();
  emit("form", { vae: form.vae });
}

export const OF_IMAGE = ["mask", "outpaint", "strength", "resize_mode", "fix_steps", "mask_blur", "masked_content", "invert_mask",
  "only_masked", "differential", "tile"];
export const OF_HIRES = ["hires", "hires_upscale", "hires_steps", "hires_strength"];

/** Return the request as it is sent: without the seed when it is not locked, and without what has no effect. */
export function current() {
  const request = { prompt: "", ...form.request };
  const drop = (...names) => names.forEach((name) => delete request[name]);
  if (!form.locked) drop("seed");
  if (!request.image) drop("image", ...OF_IMAGE.filter((name) => name !== "fix_steps" || !request.hires));
  else drop(...OF_HIRES);
  if (!request.mask) drop("invert_mask", "only_masked", "differential");
  if (!request.mask && !request.outpaint) drop("mask_blur", "masked_content");
  if (request.outpaint) drop("only_masked");
  const control = (request.control ?? []).flatMap((unit) => {
    if (!unit.file || !(unit.image || request.image)) return [];
    return [unit.preprocessor && !unit.image ? { ...unit, image: request.image } : unit];
  });
  if (control.length) request.control = control;
  else drop("control");
  const adapters = (request.ip_adapter ?? []).filter((unit) => unit.file && (unit.image?.length || unit.embeds));
  if (adapters.length) request.ip_adapter = adapters;
  else drop("ip_adapter");
  return request;
}

/** The name of the model that is drawn with. */
export const modelName = () => form.model || state.models.find((model) => model.default)?.name || state.models[0]?.name;

/** The name of the VAE that is drawn with, or null for the model's own. */
export const vaeName = () => (state.vaes.includes(form.vae) ? form.vae : null);

/** What the model draws with where the form says nothing. */
export const ownSettings = () => state.models.find((model) => model.name === modelName())?.settings ?? {};

/** Queue what the form says. */
export async function draw() {
  try {
    const jobs = await submit([current()], { model: form.model, vae: vaeName() });
    emit("drawn", jobs);
    announce("Added to the queue.");
  } catch (error) {
    const input = inputs.get(error.param)?.find((entry) => entry.input?.isConnected)?.input;
    if (input) {
      input.setAttribute("aria-invalid", "true");
      input.focus();
    }
    complain(error);
  }
}

export function lockSeed(locked) {
  form.locked = locked;
  save();
  emit("form", { locked });
}

let written = "prompt";

/** Return the prompt, or the negative one if that was the last to be written in and is open. */
export const lastPrompt = () => $(written === "prompt" || $("negative-part").open ? written : "prompt");

/** Put text into a prompt, in the place of the selection. */
export function insertWords(text, prompt) {
  const { selectionStart: start, selectionEnd: end, value } = prompt;
  const space = start && !/\s/.test(value[start - 1]) ? " " : "";
  prompt.focus();
  prompt.setSelectionRange(start, end);
  document.execCommand("insertText", false, space + text); // which Ctrl-Z takes back
}

function growWithText(area) {
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
  };
  area.addEventListener("input", grow);
  on("taken listings", grow);
  grow();
}

function buildCount() {
  const count = el("input", { id: "count", type: "number", min: 1, max: 100, placeholder: "1", inputMode: "numeric" });
  bind(count, "count", number);
  $("count-part").append(el("label", { for: "count", text: "Pictures" }), count);
}

function buildModel() {
  const select = $("model");
  select.addEventListener("change", () => setModel(select.value));
  on("listings", () => {
    select.replaceChildren(...state.models.map((model) => el("option", { value: model.name, text: model.name })));
    if (!state.models.some((model) => model.name === form.model)) form.model = "";
    select.value = modelName() ?? "";
    $("vae").replaceChildren(el("option", { value: "", text: "Model's own VAE" }),
      ...state.vaes.map((name) => el("option", { value: name, text: `VAE: ${name}` })));
    $("vae").value = vaeName() ?? "";
    $("vae").parentElement.hidden = !state.vaes.length;
  });
  $("vae").addEventListener("change", () => setVae($("vae").value));
}

/** Build the form. */
export function build() {
  bind($("prompt"), "prompt");
  bind($("negative_prompt"), "negative_prompt");
  if (form.request.negative_prompt) $("negative-part").open = true;
  growWithText($("prompt"));
  growWithText($("negative_prompt"));
  for (const name of ["prompt", "negative_prompt"]) {
    listenToWeights($(name), () => form.request.prompt_syntax ?? "a1111");
    $(name).addEventListener("focus", () => (written = name));
  }
  buildModel();
  buildSettings($("settings"));
  buildCount();
  $("draw").querySelector("kbd").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  $("form").addEventListener("submit", (event) => (event.preventDefault(), draw()));
}

/** Return the label of the seed, and its row: number, die, lock. */
export function seedRow() {
  const input = el("input", { id: "seed", inputMode: "numeric", placeholder: "random", maxLength: 20 });
  bind(input, "seed", (text) => text.replace(/\D/g, ""));
  const note = el("span", { class: "seed-note" });
  const lock = el("button", { type: "button", class: "icon-button", id: "seed-lock" });
  const show = () => {
    lock.replaceChildren(icon(form.locked ? "lock" : "unlock"));
    lock.title = form.locked ? "The seed stays; unlock for a new one each time" : "A new seed each time; lock to keep this one";
    lock.setAttribute("aria-label", "Keep the seed");
    lock.setAttribute("aria-pressed", String(form.locked));
    note.textContent = form.locked ? "kept" : "a new one each time";
    input.classList.toggle("quiet", !form.locked);
  };
  lock.onclick = () => {
    if (!form.locked && form.request.seed === undefined) set({ seed: String(newest()?.seed ?? roll()) });
    lockSeed(!form.locked);
  };
  input.addEventListener("input", () => lockSeed(input.value !== ""));
  on("form taken", show);
  on("pictures", (picture) => picture && !form.locked && set({ seed: String(picture.seed) }));
  show();
  const die = iconButton("die", "Another random seed", () => (set({ seed: roll() }), lockSeed(true)), { id: "seed-die" });
  return { label: el("label", { for: "seed" }, "Seed ", note), row: el("div", { class: "joined" }, input, die, lock) };
}

const roll = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
