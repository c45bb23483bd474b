// The ControlNets of a request: for each a picture, a file, and how strongly and when it acts.

import { download, uploadUrl, upload } from "./api.js";
import { complain, el, icon, iconButton, textButton, toast } from "./dom.js";
import { form, set } from "./form.js";
import { on, state } from "./store.js";

const MODES = [["balanced", "Balanced"], ["prompt", "My prompt is more important"], ["control", "ControlNet is more important"],
  ["guess", "Guess mode"]];
const RESIZE = [["resize", "Just resize"], ["crop", "Crop and resize"], ["fill", "Resize and fill"]];
const PICTURES = ["image/png", "image/jpeg", "image/webp"];
const LOW = 100; // canny's usual thresholds
const HIGH = 200;

const units = () => form.request.control ?? [];
let root = null;
let list = null;
let shown = ""; // what the cards were built for

/** Change some fields of a ControlNet; an absent value is its default. */
function change(place, fields) {
  const control = units().map((unit, k) => (k === place ? { ...unit, ...fields } : unit));
  for (const name of Object.keys(fields)) if (fields[name] === undefined) delete control[place][name];
  set({ control });
}

function remove(place) {
  const control = units().filter((_, k) => k !== place);
  set({ control: control.length ? control : null });
}

function add(fields = {}) {
  set({ control: [...units(), { file: state.controls[0] ?? "", ...fields }] });
  root.open = true;
  list.lastElementChild?.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

async function give(place, blob) {
  if (!PICTURES.includes(blob.type)) return toast("Only PNG, JPEG and WebP pictures can be used.", { kind: "error" });
  const { id } = await upload(blob);
  return change(place, { image: id });
}

/** Use a picture of the history in the first ControlNet, which is added if there is none. */
export async function controlWith(picture) {
  const blob = await download(picture);
  if (!units().length) add();
  await give(0, blob);
  root.open = true;
  root.scrollIntoView({ block: "nearest", behavior: "smooth" });
  toast("It is the picture of the ControlNet.");
}

/** Return the address of what the network sees. */
function pictureUrl({ image, preprocessor, low = LOW, high = HIGH }) {
  return preprocessor === "canny" ? `${uploadUrl(image)}/canny?low=${low}&high=${Math.max(low, high)}` : uploadUrl(image);
}

/** Return the place for the picture: a file is dropped, chosen or taken from the stage. */
function plate(place) {
  const unit = units()[place];
  const input = el("input", { type: "file", accept: PICTURES.join(","), class: "hidden", tabIndex: -1, "aria-hidden": "true" });
  input.addEventListener("change", () => input.files[0] && give(place, input.files[0]).catch(complain));
  const picture = unit.image ? el("img", { class: "control-image", src: pictureUrl(unit), alt: "The picture of the ControlNet" })
    : el("span", { class: "control-empty" }, icon("image"), el("span", { text: "Drop or choose a picture" }));
  const button = el("button", { type: "button", class: "control-plate", id: `control-picture-${place}`, title: "Choose a picture",
    "aria-label": unit.image ? "Choose another picture" : "Choose a picture", onclick: () => input.click() }, picture);
  const over = (event) => {
    if (!event.dataTransfer?.types.some((type) => type === "Files" || type === "text/uri-list")) return;
    event.preventDefault();
    event.stopPropagation();
    button.classList.add("over");
    document.getElementById("drop-hint").hidden = true;
  };
  button.addEventListener("dragover", over);
  button.addEventListener("dragleave", () => button.classList.remove("over"));
  button.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    button.classList.remove("over");
    take(place, event.dataTransfer).catch(complain);
  });
  return el("div", { class: "control-side" }, button, input,
    textButton("", "Use shown", () => {
      const shownPicture = state.selected ?? state.pictures[0];
      if (!shownPicture) return toast("There is no picture yet.");
      return download(shownPicture).then((blob) => give(place, blob)).catch(complain);
    }, { class: "link", id: `control-shown-${place}`, title: "Use the picture that is shown on the stage" }));
}

/** Take what was dropped: a file, or a picture of the gallery. */
async function take(place, data) {
  const [, id] = data.getData("text/uri-list").match(/\/api\/pictures\/([0-9a-f]{32})\//) ?? [];
  const blob = id ? await download({ id }) : data.files[0];
  if (blob) await give(place, blob);
}

const row = (id, label, input, title) => el("div", { class: "field" }, el("label", { for: id, text: label, title }), input);

function choice(place, name, label, options) {
  const id = `control-${name}-${place}`;
  const select = el("select", { id }, options.map(([value, text]) => el("option", { value, text })));
  select.value = units()[place][name] ?? options[0][0];
  select.addEventListener("change", () => change(place, { [name]: select.value === options[0][0] && name !== "file" ? undefined : select.value }));
  return row(id, label, select);
}

function slider(place, name, label, { max, usual }, title) {
  const id = `control-${name}-${place}`;
  const range = el("input", { type: "range", id, min: 0, max, step: 0.05, title });
  const output = el("output", { for: id });
  const show = () => (output.textContent = Number(range.value).toFixed(2));
  range.value = units()[place][name] ?? usual;
  show();
  range.addEventListener("input", () => (show(), change(place, { [name]: Number(range.value) === usual ? undefined : Number(range.value) })));
  return row(id, label, el("div", { class: "slider" }, range, output), title);
}

function threshold(place, name, label, usual) {
  const id = `control-${name}-${place}`;
  const input = el("input", { type: "number", id, min: 0, max: 10000, step: 1, placeholder: String(usual), inputMode: "numeric" });
  input.value = units()[place][name] ?? "";
  input.addEventListener("change", () => change(place, { [name]: input.value === "" ? undefined : Number(input.value) }));
  return row(id, label, input);
}

/** Return the switch for canny, and its thresholds while it is on. */
function edges(place) {
  const id = `control-canny-${place}`;
  const box = el("input", { type: "checkbox", id });
  box.checked = units()[place].preprocessor === "canny";
  box.addEventListener("change", () => change(place, box.checked ? { preprocessor: "canny" }
    : { preprocessor: undefined, low: undefined, high: undefined }));
  return [el("label", { class: "check", for: id, title: "The network gets the edges of the picture: for networks that were trained on them" },
    box, "Find the edges (canny)"),
  box.checked ? el("div", { class: "pair" }, threshold(place, "low", "Low threshold", LOW), threshold(place, "high", "High threshold", HIGH)) : null];
}

function card(place) {
  const unit = units()[place];
  const names = [...new Set([...state.controls, ...(unit.file ? [unit.file] : [])])];
  const title = `ControlNet ${place + 1}`;
  return el("fieldset", { class: "control-card" },
    el("legend", { class: "hidden", text: title }),
    el("div", { class: "control-head" }, plate(place), el("div", { class: "control-text" },
      el("div", { class: "control-title" }, el("strong", { text: title }), iconButton("close", `Remove ${title}`, () => remove(place), { id: `control-remove-${place}` })),
      choice(place, "file", "File", names.map((name) => [name, name])), edges(place))),
    unit.image ? null : el("p", { class: "note", text: form.request.image
      ? "Without a picture of its own it takes the one to start from." : "It is used once it has a picture." }),
    slider(place, "scale", "Weight", { max: 2, usual: 1 }),
    el("div", { class: "pair" },
      slider(place, "start", "Starts at", { max: 1, usual: 0 }, "Share of the steps after which it begins to act"),
      slider(place, "end", "Ends at", { max: 1, usual: 1 }, "Share of the steps after which it no longer acts")),
    el("div", { class: "pair" }, choice(place, "mode", "Control mode", MODES), choice(place, "resize_mode", "Resize mode", RESIZE)));
}

/** Show the cards anew where something has changed that they do not show by themselves. */
function show() {
  const key = JSON.stringify([state.controls, Boolean(form.request.image), units().map(({ file, image, preprocessor, low, high }) => [file, image, preprocessor, low, high])]);
  if (key === shown) return;
  shown = key;
  const focus = root.contains(document.activeElement) ? document.activeElement.id : "";
  list.replaceChildren(...units().map((_, place) => card(place)));
  root.querySelector(".control-count").textContent = units().length ? String(units().length) : "";
  root.querySelector(".note").hidden = state.controls.length > 0;
  root.querySelector("#control-add").hidden = !state.controls.length;
  if (focus) document.getElementById(focus)?.focus();
}

/** Return the section of the settings. */
export function controlField() {
  list = el("div", { class: "control-list" });
  root = el("details", { class: "field wide control", id: "control" },
    el("summary", {}, "ControlNet", el("span", { class: "control-count", "aria-hidden": "true" })),
    el("p", { class: "note", text: "The server lists no ControlNet. Start it with --controls FOLDER to have them here." }), list,
    textButton("plus", "Add a ControlNet", () => add(), { class: "button small", id: "control-add" }));
  root.addEventListener("toggle", () => root.open && !units().length && state.controls.length && add());
  on("form", show);
  on("listings taken", () => {
    shown = "";
    show();
    root.open ||= units().length > 0;
  });
  show();
  return root;
}
