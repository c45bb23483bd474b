// The keyboard: Ctrl-Enter draws, Esc cancels, arrows walk through the gallery; the canvas has keys of its own.

import * as actions from "./actions.js";
import { el, openDialog } from "./dom.js";
import { draw } from "./form.js";
import { columns, step } from "./gallery.js";
import { cancelJob } from "./queue.js";
import { shown } from "./stage.js";
import { select, state } from "./store.js";
import { openViewer } from "./viewer.js";

const HELP = [["Ctrl Enter", "Draw"], ["Ctrl ↑ ↓", "Weight of the selected words of the prompt"], ["Esc", "Cancel what is drawn; close what is open"], ["← → ↑ ↓", "Walk through the gallery"],
  ["Enter", "Full screen"], ["1 … 5", "Rate; 0 takes the rating away"], ["Del", "Delete, with undo"], ["/", "Search"], ["P", "To the prompt"], ["L", "Follow what is drawn"],
  ["V", "Verify"], ["S", "Use settings"], ["I", "Inpaint"], ["[ ]", "Smaller or larger brush"], ["B E H", "Brush, eraser, move (canvas)"],
  ["Ctrl Z", "Undo (canvas)"], ["?", "This list"]];

/** Show the keys. */
export function openHelp() {
  openDialog("Keys", el("dl", { class: "keys" }, HELP.map(([keys, text]) =>
    [el("dt", {}, keys.split(" ").map((key) => (key === "…" ? key : el("kbd", { text: key })))), el("dd", { text })])));
}

const writes = (node) => node.closest?.("input:not([type=range]), textarea, select, [contenteditable]");

function onKey(event) {
  if (document.querySelector("dialog:modal")) return;
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    event.preventDefault();
    draw();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return escape(event);
  if (writes(event.target) || (event.target.type === "range" && event.key.startsWith("Arrow"))) return;
  const picture = shown();
  const work = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => step(-columns()), ArrowDown: () => step(columns()),
    "/": () => document.getElementById("search").focus(), p: () => document.getElementById("prompt").focus(),
    l: () => select(null), "?": openHelp,
    ...(picture && {
      Delete: () => actions.remove(picture), v: () => actions.verify(picture), s: () => actions.useSettings(picture), i: () => actions.inpaint(picture),
      ...(!event.target.closest("button, a, summary") && { Enter: () => openViewer(picture) }),
    }),
  }[event.key];
  if (work) (event.preventDefault(), work());
  else if (picture && /^[0-5]$/.test(event.key)) actions.rate(picture, Number(event.key));
}

function escape(event) {
  const menu = document.querySelector("details.menu[open]");
  if (menu) menu.open = false;
  else if (document.body.classList.contains("comparing")) actions.takeArmed();
  else if (writes(event.target)) event.target.blur();
  else if (state.queue.running) {
    const job = state.jobs.get(state.queue.running.job);
    if (job) cancelJob(job);
  } else select(null);
}

/** Listen to the keyboard. */
export function build() {
  addEventListener("keydown", onKey);
}
