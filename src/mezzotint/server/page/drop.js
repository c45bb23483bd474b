// A picture that is dropped, pasted or chosen: its settings are shown, and it can be used.

import { post } from "./api.js";
import { inpaintFile, useFile } from "./actions.js";
import { $, complain, el, openDialog, textButton, toast } from "./dom.js";
import { take } from "./form.js";
import { title } from "./settings.js";

const LEFT_OUT = ["image", "mask", "batch", "count", "lora_folder", "wildcards"]; // a file's paths are another machine's
const fileName = (path) => path.split(/[\\/]/).at(-1).replace(/\.\w+$/, "");
const namedEntry = ({ file, image, mask, more, embeds, encoder, ...settings }) => ({ ...settings, file: fileName(file) });
const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** Show a file's picture with what it was drawn with. */
export async function openFile(file) {
  if (!KINDS.includes(file.type)) return toast("Only PNG, JPEG and WebP pictures can be opened.", { kind: "error" });
  const url = URL.createObjectURL(file);
  const facts = el("div", { class: "info-facts" }, el("p", { class: "note", role: "status", text: "Reading its settings…" }));
  const buttons = el("div", { class: "actions" },
    textButton("image", "Use as image", () => (dialog.close(), useFile(file)), { id: "info-image" }),
    textButton("brush", "Inpaint", () => (dialog.close(), inpaintFile(file)), { id: "info-inpaint" }));
  const image = el("img", { class: "info-image", src: url, alt: file.name || "The picture" });
  image.addEventListener("error", () => (image.remove(), buttons.remove())); // it is none
  const dialog = openDialog("Picture", el("div", { class: "info", id: "info" }, image, el("div", { class: "info-side" }, facts, buttons)),
  { wide: true, onclose: () => URL.revokeObjectURL(url) });
  try {
    const reply = await post("/api/info", file);
    show(facts, buttons, reply, dialog);
  } catch (error) {
    facts.replaceChildren(el("p", { class: "note", text: error.message }));
  }
  return dialog;
}

function show(facts, buttons, reply, dialog) {
  const { request } = reply;
  if (!request) {
    facts.replaceChildren(el("p", { class: "note", text: reply.unreadable ?? reply.message ?? "The file carries no settings." }));
    return;
  }
  const given = Object.entries(request).filter(([name, value]) => value !== null && value !== undefined &&
    !["prompt", "negative_prompt"].includes(name) && !(name === "count" && value === 1));
  const notes = reply.not_supported ?? reply.notes ?? [];
  facts.replaceChildren(
    reply.program ? el("p", { class: "note", text: `Drawn by ${reply.program}${reply.model ? ` with ${reply.model}` : ""}` }) : "",
    el("p", { class: "info-prompt", text: request.prompt }),
    request.negative_prompt ? el("p", { class: "note", text: `Negative prompt: ${request.negative_prompt}` }) : "",
    el("dl", {}, given.map(([name, value]) => [el("dt", { text: title(name) }),
      el("dd", { text: typeof value === "object" ? JSON.stringify(value) : String(value) })])),
    notes.length ? el("p", { class: "note", text: "Not taken over:" }) : "",
    ...notes.map((note) => el("p", { class: "lint", text: typeof note === "string" ? note : JSON.stringify(note) })));
  const kept = Object.fromEntries(Object.entries(request).filter(([name, value]) => value !== null && !LEFT_OUT.includes(name)));
  kept.loras &&= kept.loras.map(([path, ...scales]) => [fileName(path), ...scales]);
  kept.embeddings &&= kept.embeddings.map(fileName);
  for (const name of ["control", "ip_adapter"]) kept[name] &&= kept[name].map(namedEntry);
  if (kept.regions?.some((region) => region.mask)) delete kept.regions; // masks are another machine's too
  buttons.prepend(textButton("settings", "Use settings", () => {
    dialog.close();
    take({ request: kept, model: reply.model });
    toast("The settings are in the form.");
  }, { class: "primary", id: "info-settings" }));
  $("info-settings").focus();
}

/** Listen for pictures that are dropped or pasted. */
export function build() {
  const hint = $("drop-hint");
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    hint.hidden = false;
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && (hint.hidden = true));
  addEventListener("drop", (event) => {
    hint.hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) openFile(file).catch(complain);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (file) (event.preventDefault(), openFile(file).catch(complain));
  });
}

/** Return the input with which a file is chosen. */
export function fileInput() {
  const input = el("input", { type: "file", id: "file", accept: KINDS.join(","), class: "hidden", tabIndex: -1, "aria-hidden": "true" });
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = "";
    if (file) openFile(file).catch(complain);
  });
  return input;
}
