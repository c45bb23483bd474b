// The page: builds its parts, then reads everything from the server.

import * as actions from "./actions.js";
import { $, complain, textButton } from "./dom.js";
import * as drop from "./drop.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import { buildSource } from "./inpaint.js";
import * as keys from "./keys.js";
import * as login from "./login.js";
import * as pickers from "./pickers.js";
import * as queue from "./queue.js";
import * as stage from "./stage.js";
import { on, start, state } from "./store.js";
import * as words from "./words.js";

/** Return a button of the header: a narrow window shows its icon alone. */
function tool(name, label, title, onclick, id) {
  return textButton(name, label, onclick, { class: "button tool", title, id });
}

const MINUTE = 60;

/** Load an image of the server again that did not come, say while the connection was lost: after 1 s, 2 s, 4 s... */
function retry(image) {
  if (!(image instanceof HTMLImageElement) || !image.src.startsWith(`${location.origin}/api/`)) return;
  const tries = Number(image.dataset.tries ?? 0);
  image.dataset.tries = tries + 1;
  setTimeout(() => image.isConnected && (image.src = image.src), 1000 * Math.min(MINUTE, 2 ** tries));
}

const input = drop.fileInput();
$("tools").append(input,
  tool("image", "Open a picture", "Open a picture: take its settings, or start from it", () => input.click(), "open-file"),
  tool("grid", "X/Y grid", "Draw every combination of the values of two settings", () => actions.openGrid(null), "open-grid"),
  tool("keys", "Keys", "The keys of the page (?)", () => keys.openHelp(), "open-help"));
on("connected", () => {
  $("connection").textContent = state.connected ? "" : "Not connected; trying again…";
});
document.addEventListener("error", ({ target }) => retry(target), true);
for (const part of [login, form, queue, stage, gallery, words, drop, keys]) part.build();
buildSource();
try {
  await start();
  await pickers.build();
} catch (error) {
  complain(error);
}
$("draw").disabled = false;
document.documentElement.dataset.ready = "true";
for (const part of ["canvas", "grid", "maps"]) import(`./${part}.js`).catch(() => {}); // a click need not wait for it
