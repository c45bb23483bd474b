// Lists of LoRAs, embeddings and wildcards, which write into the prompt.

import { get } from "./api.js";
import { $, complain, el, openDialog, textButton } from "./dom.js";
import { form, insertWords, lastPrompt } from "./form.js";

const KINDS = [
  { kind: "loras", label: "LoRA", write: (name, scale) => `<lora:${name}:${scale}>`, scale: true },
  { kind: "embeddings", label: "Embedding", write: (name) => (form.request.prompt_syntax === "comfy" ? `embedding:${name}` : name) },
  { kind: "wildcards", label: "Wildcard", write: (name) => `__${name}__` },
];

const known = new Map(); // names by kind

async function names(kind) {
  if (!known.has(kind)) {
    const reply = await get(`/api/${kind}`);
    known.set(kind, reply[kind].sort((a, b) => a.localeCompare(b)));
  }
  return known.get(kind);
}

async function open({ kind, label, write, scale }) {
  known.delete(kind); // a file may have been added
  const all = await names(kind);
  const search = el("input", { type: "search", placeholder: `Search ${all.length} names`, "aria-label": `Search ${label} names`, id: "picker-search" });
  const strength = el("input", { type: "number", id: "picker-scale", value: "0.8", step: 0.05, min: -2, max: 2 });
  const list = el("ul", { class: "picker-list" });
  const show = () => {
    const wanted = search.value.toLowerCase().split(/\s+/);
    const found = all.filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
    list.replaceChildren(...found.slice(0, 200).map((name) => el("li", {}, el("button", { type: "button", class: "picker-item", text: name,
      onclick: () => {
        dialog.close();
        insertWords(write(name, Number(strength.value) || 1), kind === "loras" ? $("prompt") : lastPrompt());
      } }))));
    if (!found.length) {
      list.append(el("li", { class: "note", text: all.length ? "No name matches." : `The server lists none. Start it with --${kind} FOLDER to have them here.` }));
    }
  };
  search.addEventListener("input", show);
  show();
  const dialog = openDialog(label, el("div", { class: "picker" },
    el("div", { class: "picker-head" }, search, scale ? el("label", { class: "picker-scale" }, "Weight ", strength) : null), list));
  search.focus();
}

/** Build the buttons of the pickers; those with nothing to pick are left out, unless there is nothing at all. */
export async function build() {
  const counts = await Promise.all(KINDS.map(({ kind }) => names(kind).then((all) => all.length, () => 0)));
  const offered = KINDS.filter((_, place) => place === 0 || counts[place] > 0);
  $("insert").replaceChildren(...offered.map((kind) =>
    textButton("plus", kind.label, () => open(kind).catch(complain), { class: "button small", id: `pick-${kind.kind}` })));
}
