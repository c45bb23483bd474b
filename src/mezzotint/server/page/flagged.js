// Pictures that the safety checker flagged are blurred until a click; which were shown is forgotten with the page.

import { el, icon } from "./dom.js";
import { emit } from "./store.js";

const revealed = new Set(); // ids

/** Return whether a picture is to be blurred. */
export const isVeiled = (picture) => Boolean(picture.flagged) && !revealed.has(picture.id);

/** Blur an image of a flagged picture. */
export function veil(image, picture) {
  image.classList.toggle("veiled", isVeiled(picture));
  return image;
}

/** Return the button that shows a blurred picture, or null where nothing is blurred. */
export function revealButton(picture) {
  if (!isVeiled(picture)) return null;
  return el("button", { type: "button", class: "button reveal", id: "reveal", onclick: (event) => {
    event.stopPropagation();
    revealed.add(picture.id);
    emit("picture", picture);
  } }, icon("eye"), el("span", { text: "Flagged by the safety checker: show it" }));
}
