// The tags of a picture: a click on one filters the gallery by it.

import { complain, el, icon, iconButton } from "./dom.js";
import { loadPictures, on, state, tag } from "./store.js";

/** Show only the pictures with a tag; an empty one shows all. */
export function filterByTag(name) {
  state.filter.tag = name;
  loadPictures().catch(complain);
}

const change = (picture, tags) => tag(picture, tags).catch(complain);

/** Return the tags of a picture, with an input for another. */
export function tagRow(picture) {
  const input = el("input", { id: "add-tag", class: "add-tag", placeholder: "Add a tag", "aria-label": "Add a tag", maxLength: 100,
    list: "known-tags", enterKeyHint: "done" });
  const known = new Set(state.pictures.flatMap((one) => one.tags));
  input.addEventListener("change", () => {
    const name = input.value.trim();
    if (name && !picture.tags.includes(name)) change(picture, [...picture.tags, name]);
    input.value = "";
  });
  return el("div", { class: "tags" }, picture.tags.map((name) => el("span", { class: "tag" },
    el("button", { type: "button", class: "tag-name", text: name, title: `Show the pictures with the tag ${name}`, onclick: () => filterByTag(name) }),
    iconButton("close", `Remove the tag ${name}`, () => change(picture, picture.tags.filter((one) => one !== name))))),
  el("span", { class: "tag-input" }, icon("tag"), input),
  el("datalist", { id: "known-tags" }, [...known].map((name) => el("option", { value: name }))));
}

/** Return the mark in the gallery's head that says by which tag it is filtered. */
export function tagFilter() {
  const box = el("div", { class: "tag-filter", hidden: true });
  on("pictures", () => {
    const { tag: name } = state.filter;
    box.hidden = !name;
    if (name) {
      box.replaceChildren(el("span", { class: "tag" }, el("span", { class: "tag-name", text: `Tag: ${name}` }),
        iconButton("close", "Show all tags", () => filterByTag(""), { id: "all-tags" })));
    }
  });
  return box;
}
