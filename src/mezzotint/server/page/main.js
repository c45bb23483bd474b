// The page: builds its parts, then reads everything from the server.

import * as actions from "./actions.js";
import { $, complain, iconButton } from "./dom.js";
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

const input = drop.fileInput();
$("tools").append(input,
  iconButton("image", "Open a picture: its settings, or to start from it", () => input.click(), { id: "open-file" }),
  iconButton("grid", "X/Y grid", () => actions.openGrid(null), { id: "open-grid" }),
  iconButton("keys", "Keys (?)", () => keys.openHelp(), { id: "open-help" }));
on("connected", () => {
  $("connection").textContent = state.connected ? "" : "Not connected; trying again…";
});
for (const part of [login, form, queue, stage, gallery, words, drop, keys]) part.build();
buildSource();
try {
  await start();
  await pickers.build();
} catch (error) {
  complain(error);
}
document.documentElement.dataset.ready = "true";
