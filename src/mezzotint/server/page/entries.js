// A section of the settings for what a request may have several of, such as ControlNets: a card for each.

import { download, upload, uploadUrl } from "./api.js";
import { complain, el, icon, iconButton, textButton, toast } from "./dom.js";
import { form, set } from "./form.js";
import { newest, on, state } from "./store.js";

const PICTURES = ["image/png", "image/jpeg", "image/webp"];

/** Return the upload ids of the pictures of an entry. */
export const picturesOf = (entry) => [].concat(entry.image ?? []);

const row = (id, label, input, title) => el("div", { class: "field" }, el("label", { for: id, text: label, title }), input);

/**
 * Return the parts of a section: its field, and what the cards are made of.
 *
 * `field` is the field of the request, `id` the beginning of ids, `name` what one is called, `listing` the state's list of
 * files, `without` says how to have some, `card(place)` returns what a card has below its file, `shows(entry)` what it is
 * built for, `several` whether an entry has a list of pictures, `given(entry, ids)` returns the fields of new pictures.
 */
export function entrySection({ field, id, name, listing, without, card, shows, several = false, given = () => ({}), pictureUrl = ({ image }) => uploadUrl(image) }) {
  const entries = () => form.request[field] ?? [];
  let root = null;
  let list = null;
  let shown = ""; // what the cards were built for

  /** Change some fields of an entry; an absent value is its default. */
  function change(place, fields) {
    const changed = entries().map((entry, k) => (k === place ? { ...entry, ...fields } : entry));
    for (const key of Object.keys(fields)) if (fields[key] === undefined) delete changed[place][key];
    set({ [field]: changed });
  }

  function remove(place) {
    const left = entries().filter((_, k) => k !== place);
    set({ [field]: left.length ? left : null });
  }

  function add() {
    set({ [field]: [...entries(), { file: state[listing][0] ?? "" }] });
    root.open = true;
    list.lastElementChild?.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  /** Make a picture one of an entry's: the `number`-th, or a new one. */
  async function give(place, blob, number = 0) {
    if (!PICTURES.includes(blob.type)) return toast("Only PNG, JPEG and WebP pictures can be used.", { kind: "error" });
    const found = await upload(blob);
    const ids = picturesOf(entries()[place]);
    ids[Math.min(number, ids.length)] = found.id;
    return change(place, { image: several ? ids : ids[0], ...given(entries()[place]) });
  }

  /** Use a picture of the history in the first entry, which is added if there is none. */
  async function useIn(picture) {
    const blob = await download(picture);
    if (!entries().length) add();
    await give(0, blob);
    root.open = true;
    root.scrollIntoView({ block: "nearest", behavior: "smooth" });
    toast(`The ${name} uses this picture.`);
  }

  /** Return a button that takes a picture: a file is dropped or chosen, or a picture of the gallery dropped. */
  function plate(place, number, picture) {
    const input = el("input", { type: "file", accept: PICTURES.join(","), class: "hidden", tabIndex: -1, "aria-hidden": "true" });
    input.addEventListener("change", () => input.files[0] && give(place, input.files[0], number).catch(complain));
    const content = picture ? el("img", { class: "control-image", src: pictureUrl({ ...entries()[place], image: picture }), alt: `The picture of the ${name}` })
      : el("span", { class: "control-empty" }, icon(number ? "plus" : "image"), number ? null : el("span", { text: "Drop or choose a picture" }));
    const label = picture ? "Choose another picture" : number ? "Add a picture" : "Choose a picture";
    const button = el("button", { type: "button", class: "control-plate", id: `${id}-picture-${place}${number ? `-${number}` : ""}`, title: label,
      "aria-label": label, onclick: () => input.click() }, content);
    button.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.some((type) => type === "Files" || type === "text/uri-list")) return;
      event.preventDefault();
      event.stopPropagation();
      button.classList.add("over");
      document.getElementById("drop-hint").hidden = true;
    });
    button.addEventListener("dragleave", () => button.classList.remove("over"));
    button.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      button.classList.remove("over");
      take(place, event.dataTransfer, number).catch(complain);
    });
    return [button, input];
  }

  /** Take what was dropped: a file, or a picture of the gallery. */
  async function take(place, data, number) {
    const [, picture] = data.getData("text/uri-list").match(/\/api\/pictures\/([0-9a-f]{32})\//) ?? [];
    const blob = picture ? await download({ id: picture }) : data.files[0];
    if (blob) await give(place, blob, number);
  }

  /** Return the first picture of an entry, and what takes the one that is shown on the stage. */
  function side(place) {
    return el("div", { class: "control-side" }, plate(place, 0, picturesOf(entries()[place])[0]),
      textButton("", "Use shown", () => {
        const picture = state.selected ?? newest();
        if (!picture) return toast("There is no picture yet.");
        return download(picture).then((blob) => give(place, blob)).catch(complain);
      }, { class: "link", id: `${id}-shown-${place}`, title: "Use the picture that is shown on the stage" }));
  }

  /** Return the further pictures of an entry, each with a button that removes it, and a place for another. */
  function further(place) {
    const ids = picturesOf(entries()[place]);
    const drop = (number) => change(place, { image: ids.filter((_, k) => k !== number) });
    return el("div", { class: "control-further" },
      ids.slice(1).map((picture, k) => el("div", { class: "control-small" }, plate(place, k + 1, picture),
        iconButton("close", `Remove picture ${k + 2}`, () => drop(k + 1)))),
      el("div", { class: "control-small" }, plate(place, Math.max(ids.length, 1))));
  }

  function choice(place, key, label, options) {
    const own = `${id}-${key}-${place}`;
    const select = el("select", { id: own }, options.map(([value, text]) => el("option", { value, text })));
    select.value = entries()[place][key] ?? options[0][0];
    select.addEventListener("change", () => change(place, { [key]: select.value === options[0][0] && key !== "file" ? undefined : select.value }));
    return row(own, label, select);
  }

  function slider(place, key, label, { max, usual }, title) {
    const own = `${id}-${key}-${place}`;
    const range = el("input", { type: "range", id: own, min: 0, max, step: 0.05, title });
    const output = el("output", { for: own });
    const show = () => (output.textContent = Number(range.value).toFixed(2));
    range.value = entries()[place][key] ?? usual;
    show();
    range.addEventListener("input", () => (show(), change(place, { [key]: Number(range.value) === usual ? undefined : Number(range.value) })));
    return row(own, label, el("div", { class: "slider" }, range, output), title);
  }

  /** Return the sliders of the steps in which an entry acts. */
  const steps = (place) => el("div", { class: "pair" },
    slider(place, "start", "Starts at", { max: 1, usual: 0 }, "Share of the steps after which it begins to act"),
    slider(place, "end", "Ends at", { max: 1, usual: 1 }, "Share of the steps after which it no longer acts"));

  function buildCard(place) {
    const entry = entries()[place];
    const names = [...new Set([...state[listing], ...(entry.file ? [entry.file] : [])])];
    const title = `${name} ${place + 1}`;
    const [beside, below] = card(place);
    return el("fieldset", { class: "control-card" },
      el("legend", { class: "hidden", text: title }),
      el("div", { class: "control-head" }, side(place), el("div", { class: "control-text" },
        el("div", { class: "control-title" }, el("strong", { text: title }), iconButton("close", `Remove ${title}`, () => remove(place), { id: `${id}-remove-${place}` })),
        choice(place, "file", "File", names.map((each) => [each, each])), beside)), below);
  }

  /** Show the cards anew where something has changed that they do not show by themselves. */
  function show() {
    const key = JSON.stringify([state[listing], Boolean(form.request.image), entries().map((entry) => [entry.file, entry.image, shows(entry)])]);
    if (key === shown) return;
    shown = key;
    const focus = root.contains(document.activeElement) ? document.activeElement.id : "";
    list.replaceChildren(...entries().map((_, place) => buildCard(place)));
    root.querySelector(".control-count").textContent = entries().length ? String(entries().length) : "";
    root.querySelector(".note").hidden = state[listing].length > 0;
    root.querySelector(`#${id}-add`).hidden = !state[listing].length;
    if (focus) document.getElementById(focus)?.focus();
  }

  /** Return the section of the settings. */
  function build() {
    list = el("div", { class: "control-list" });
    root = el("details", { class: "field wide control", id },
      el("summary", {}, name, el("span", { class: "control-count", "aria-hidden": "true" })),
      el("p", { class: "note", text: without }), list,
      textButton("plus", `Add ${/^[AEIOU]/.test(name) ? "an" : "a"} ${name}`, add, { class: "button small", id: `${id}-add` }));
    root.addEventListener("toggle", () => root.open && !entries().length && state[listing].length && add());
    on("form", show);
    on("listings taken", () => {
      shown = "";
      show();
      root.open ||= entries().length > 0;
    });
    show();
    return root;
  }

  return { entries, change, choice, slider, steps, further, row, useIn, build };
}
