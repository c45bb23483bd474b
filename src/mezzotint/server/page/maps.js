// Word maps: where in the picture each word took effect. Point at a word, or reach it with Tab, to see its map.

import { fileUrl, get, post } from "./api.js";
import { complain, el, iconButton, openDialog } from "./dom.js";
import { veil } from "./flagged.js";
import { ended } from "./store.js";

/** Return the maps of a picture; they are recorded first where they are not known. */
async function load(picture, say) {
  const path = `/api/pictures/${picture.id}`;
  if (!(await get(path)).maps) {
    say("The picture is drawn again to record them…");
    await ended((await post(`${path}/maps`)).id);
  }
  return get(`${path}/maps`);
}

let wanted = null; // the word whose map is laid over the picture as soon as it is decoded

/** Lay a map over the picture: bright where the word took effect, dark elsewhere. */
async function shade(canvas, word) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  wanted = word;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!word) return;
  const image = new Image();
  image.src = `data:image/png;base64,${word.png}`;
  await image.decode();
  if (wanted !== word) return; // another word is pointed at by now, or none
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let place = 0; place < pixels.data.length; place += 4) {
    const heat = pixels.data[place] / 255;
    pixels.data.set([12, 10, 9, Math.round(225 * (1 - heat) ** 1.6)], place);
  }
  context.putImageData(pixels, 0, 0);
}

/** Open the word maps of a picture. */
export async function openMaps(picture) {
  const image = el("img", { class: "compare-image", src: fileUrl(picture), alt: picture.prompt });
  veil(image, picture);
  const canvas = el("canvas", { class: "map-canvas", width: 384, height: Math.round((384 * picture.height) / picture.width), "aria-hidden": "true" });
  const frame = el("div", { class: "compare-frame" }, image, canvas);
  frame.style.setProperty("--ratio", String(picture.width / picture.height));
  frame.style.setProperty("--most", `${Math.max(picture.width * 5, 512)}px`);
  const words = el("div", { class: "map-words", id: "map-words" }, el("p", { class: "note", role: "status", text: "Looking for the maps…" }));
  const dialog = openDialog("Word maps", el("div", { class: "viewer" }, el("div", { class: "viewer-plate" }, frame),
    el("div", { class: "viewer-bar" }, words, iconButton("close", "Close (Esc)", () => dialog.close()))), { bare: true });
  try {
    const reply = await load(picture, (text) => (words.firstChild.textContent = text));
    let kept = null;
    const most = Math.max(...reply.words.map((word) => word.share), 1e-9);
    words.replaceChildren(...reply.words.map((word) => {
      const see = () => shade(canvas, word).catch(complain);
      const button = el("button", { type: "button", class: "map-word", "aria-pressed": "false",
        title: `${(100 * word.share).toFixed(1)} % of the attention`,
        onmouseenter: see, onmouseleave: () => shade(canvas, kept), onfocus: see, onblur: () => shade(canvas, kept),
        onclick: () => {
          kept = kept === word ? null : word;
          for (const other of words.children) other.setAttribute("aria-pressed", String(other === button && kept !== null));
          see();
        } }, el("span", { text: word.text }), el("span", { class: "map-share" }));
      button.lastChild.style.width = `${(100 * word.share) / most}%`;
      return button;
    }));
  } catch (error) {
    words.firstChild.textContent = error.message;
  }
}
