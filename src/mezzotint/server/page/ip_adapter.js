// The IP-Adapters of a request: for each its pictures, or saved embeddings of some, a file, and how strongly and when it acts.

import { el, textButton } from "./dom.js";
import { entrySection, picturesOf } from "./entries.js";
import { state } from "./store.js";

const section = entrySection({
  field: "ip_adapter", id: "ip-adapter", name: "IP-Adapter", listing: "ip_adapters", card, several: true,
  without: "The server lists no IP-Adapter. Start it with --ip-adapters FOLDER to have them here.",
  shows: ({ embeds, mask, scale }) => [embeds, mask, typeof scale === "object"],
  given: () => ({ embeds: undefined }),
});

export const ipAdapterField = section.build;
export const adaptWith = section.useIn;

/** Return the choice of saved embeddings, which stand in place of pictures. */
function embeddings(place) {
  const { embeds } = section.entries()[place];
  const names = [...new Set([...state.image_embeds, ...(embeds ? [embeds] : [])])];
  if (!names.length) return null;
  const id = `ip-adapter-embeds-${place}`;
  const select = el("select", { id }, el("option", { value: "", text: "None" }), names.map((value) => el("option", { value, text: value })));
  select.value = embeds ?? "";
  select.addEventListener("change", () => section.change(place, select.value ? { embeds: select.value, image: undefined } : { embeds: undefined }));
  return section.row(id, "Saved embeddings", select, "In place of pictures");
}

/** Return what says that a field is set which the card does not show, and unsets it. */
function unset(place, name, text, label) {
  return el("p", { class: "note" }, `${text} `,
    textButton("", label, () => section.change(place, { [name]: undefined }), { class: "link" }));
}

function card(place) {
  const { image, embeds, mask, scale } = section.entries()[place];
  return [embeddings(place), [
    picturesOf({ image }).length ? section.further(place) : null,
    image?.length || embeds ? null : el("p", { class: "note", text: "It is used once it has a picture." }),
    mask ? unset(place, "mask", "It acts within a mask.", "Everywhere") : null,
    typeof scale === "object" ? unset(place, "scale", "Its weight is set for each block or picture.", "One weight")
      : section.slider(place, "scale", "Weight", { max: 2, usual: 1 }),
    section.steps(place)]];
}
