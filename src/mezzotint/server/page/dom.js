// Elements, icons, notices. Text always enters through textContent, so that nothing in it becomes markup.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a grid of 16 units
const ICONS = {
  die: "M3 3h10v10H3z M5.6 5.6h.01 M10.4 5.6h.01 M8 8h.01 M5.6 10.4h.01 M10.4 10.4h.01",
  lock: "M4 7.5h8v6H4z M5.5 7.5V5a2.5 2.5 0 0 1 5 0v2.5",
  unlock: "M4 7.5h8v6H4z M5.5 7.5V5a2.5 2.5 0 0 1 4.8-.9",
  swap: "M3 6h10l-2.5-2.5 M13 10H3l2.5 2.5",
  close: "M4 4l8 8 M12 4l-8 8",
  up: "M8 12.5v-9 M4.5 7L8 3.5 11.5 7",
  down: "M8 3.5v9 M4.5 9L8 12.5 11.5 9",
  grip: "M6 4h.01 M10 4h.01 M6 8h.01 M10 8h.01 M6 12h.01 M10 12h.01",
  pause: "M5.5 3.5v9 M10.5 3.5v9",
  play: "M5 3.5l7.5 4.5L5 12.5z",
  again: "M13 8a5 5 0 1 1-1.5-3.6 M13 2.5v3h-3",
  seeds: "M2.5 2.5h5v5h-5z M10 3.5h3.5v3.5H10z M3.5 10H7v3.5H3.5z M9.5 9.5h4v4h-4z",
  hires: "M9.5 2.5h4v4 M13.5 2.5L9 7 M6.5 13.5h-4v-4 M2.5 13.5L7 9",
  settings: "M2.5 5h6 M11.5 5h2 M2.5 11h2 M7.5 11h6 M10 3.5v3 M6 9.5v3",
  image: "M2.5 3h11v10h-11z M2.5 11l3.5-3.5 3 3 2-2 2.5 2.5 M10.5 6h.01",
  edges: "M3 13V5.5L8 2.5l5 3V13 M6.5 13V9h3v4",
  brush: "M13.5 2.5L7.5 9 M7.6 9.1c1.6 1.6.3 4.4-5.1 4.4 1.5-1 1.2-2 1.5-3 .5-1.7 2.3-2.5 3.6-1.4z",
  eraser: "M6 13.5L2.5 10 9.5 3l4 4L7.5 13.5z M5.5 7L9.5 11 M6 13.5h7.5",
  words: "M2.5 4h11 M2.5 8h7 M2.5 12h9",
  verify: "M8 1.8l5 2v4c0 3.2-2 5.4-5 6.4-3-1-5-3.2-5-6.4v-4z M5.7 8l1.7 1.7L10.5 6.5",
  trash: "M3 4.5h10 M6 4.5V3h4v1.5 M4.5 4.5l.6 8.5h5.8l.6-8.5 M6.8 7v3.5 M9.2 7v3.5",
  save: "M8 2.5v7.5 M4.8 7L8 10.2 11.2 7 M3 13.5h10",
  full: "M2.5 6V2.5H6 M10 2.5h3.5V6 M13.5 10v3.5H10 M6 13.5H2.5V10",
  compare: "M8 2v12 M2.5 4H6 M2.5 4v8H6 M10 4h3.5v8H10",
  star: "M8 2.3l1.7 3.6 3.9.5-2.9 2.7.8 3.9L8 11.1 4.5 13l.8-3.9L2.4 6.4l3.9-.5z",
  search: "M7 2.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9z M10.3 10.3l3.2 3.2",
  left: "M10 3L5 8l5 5",
  right: "M6 3l5 5-5 5",
  plus: "M8 3v10 M3 8h10",
  minus: "M3 8h10",
  undo: "M3 6.5h6.5a3.5 3.5 0 0 1 0 7H6 M5.5 4L3 6.5 5.5 9",
  redo: "M13 6.5H6.5a3.5 3.5 0 0 0 0 7H10 M10.5 4L13 6.5 10.5 9",
  invert: "M8 2.5a5.5 5.5 0 1 0 0 11z M8 2.5a5.5 5.5 0 0 1 0 11",
  hand: "M8 2v12 M2 8h12 M6.5 3.5L8 2l1.5 1.5 M6.5 12.5L8 14l1.5-1.5 M3.5 6.5L2 8l1.5 1.5 M12.5 6.5L14 8l-1.5 1.5",
  fit: "M2.5 4.5h11v7h-11z M5.5 7v2 M10.5 7v2",
  grid: "M2.5 2.5h11v11h-11z M6.2 2.5v11 M9.8 2.5v11 M2.5 6.2h11 M2.5 9.8h11",
  keys: "M2 4.5h12v7H2z M4.5 7h.01 M7 7h.01 M9.5 7h.01 M12 7h.01 M5 9.2h6",
  more: "M4 8h.01 M8 8h.01 M12 8h.01",
  tag: "M2.5 3v4.5l6 6 5-5-6-6H3z M5.3 5.3h.01",
  eye: "M1.5 8c3.5-5.5 9.5-5.5 13 0-3.5 5.5-9.5 5.5-13 0z M8 6.2a1.8 1.8 0 1 0 .01 0z",
  warn: "M8 2.5l6 10.5H2z M8 6.5v3 M8 11.3h.01",
  alarm: "M8 5v3.5l2 1.2 M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11z",
};

/** Return an icon. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Return a new element: properties and attributes, listeners as `onclick`, then its children. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.includes("-") && name !== "list" && name !== "form") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Return a button of an icon, with its name as tooltip and for screen readers. */
export function iconButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...props },
    icon(name));
}

/** Return a button of an icon and a word. */
export function textButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", class: "button", onclick, ...props }, name && icon(name), el("span", { text: label }));
}

export const $ = (id) => document.getElementById(id);

/** Return a function that runs `work` when it has not been called for a while. */
export function debounce(work, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), milliseconds);
  };
}

/** Tell screen readers something that is seen elsewhere. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Show a notice for a few seconds, with an action such as Undo. */
export function toast(text, { action, run, kind = "" } = {}) {
  const node = el("div", { class: `toast ${kind}`, role: kind === "error" ? "alert" : "status" }, el("span", { text }));
  const end = () => node.remove();
  if (action) node.append(el("button", { type: "button", class: "link", text: action, onclick: () => (end(), run()) }));
  node.append(iconButton("close", "Dismiss", end));
  const open = [...document.querySelectorAll("dialog:modal")].at(-1);
  (open ?? document.body).append(toasts(open));
  toasts(open).append(node);
  setTimeout(end, action ? 10000 : kind === "error" ? 12000 : 4000);
}

/** Return the list of notices of the page, or of an open dialog, which covers the page's own. */
function toasts(owner) {
  const found = (owner ?? document.body).querySelector(":scope > .toasts");
  return found ?? el("div", { class: "toasts" });
}

/** Show an error as a notice. */
export function complain(error) {
  if (error?.name !== "AbortError") toast(error?.message ?? String(error), { kind: "error" });
}

/** Open a modal dialog with a title; it leaves the document when it closes. */
export function openDialog(title, content, { wide = false, onclose, bare = false } = {}) {
  const dialog = el("dialog", { class: bare ? "sheet" : wide ? "wide" : "", "aria-label": title });
  if (!bare) {
    dialog.append(el("header", {}, el("h2", { text: title }), iconButton("close", "Close", () => dialog.close())));
  }
  dialog.append(content);
  dialog.addEventListener("close", () => (onclose?.(), dialog.remove()));
  dialog.addEventListener("click", (event) => event.target === dialog && !bare && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Return a duration as people say it. */
export function duration(seconds) {
  if (seconds < 1) return "under 1 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
