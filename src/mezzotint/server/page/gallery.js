// The gallery: the whole history, the newest first; search, rating, older pictures as one scrolls.

import { thumbnailUrl } from "./api.js";
import { takeArmed } from "./actions.js";
import { $, complain, debounce, el, icon } from "./dom.js";
import { veil } from "./flagged.js";
import { shown } from "./stage.js";
import { loadMore, loadPictures, on, select, state } from "./store.js";
import { tagFilter } from "./tags.js";
import { openCompare, openViewer } from "./viewer.js";

const tiles = new Map(); // by id

function tile(picture) {
  const known = tiles.get(picture.id);
  if (known?.picture === picture) return (veil(known.image, picture), known.item);
  const image = known?.image ?? el("img", { src: thumbnailUrl(picture), alt: "", loading: "lazy", decoding: "async", width: picture.width,
    height: picture.height });
  const button = el("button", { type: "button", class: "tile", title: picture.prompt, data: { picture: picture.id },
    "aria-label": describe(picture),
    onclick: (event) => choose(picture, event),
    ondblclick: () => openViewer(picture) },
  veil(image, picture), mark(picture));
  image.onload = () => image.classList.add("loaded");
  const item = el("li", {}, button);
  tiles.set(picture.id, { picture, item, image });
  return item;
}

function describe(picture) {
  const stars = picture.rating ? `, ${picture.rating} of 5 stars` : "";
  return `${picture.prompt || "no prompt"}, seed ${picture.seed}${stars}`;
}

function mark(picture) {
  const parts = [];
  if (picture.rating) parts.push(el("span", { class: "mark-stars" }, icon("star"), el("span", { text: String(picture.rating) })));
  if (picture.verified?.identical) parts.push(el("span", { class: "mark-verified", title: "Verified" }, icon("verify")));
  return parts.length ? el("span", { class: "mark", "aria-hidden": "true" }, parts) : null;
}

function choose(picture, event) {
  const other = takeArmed();
  if (other && other.id !== picture.id) return openCompare(other, picture);
  if (event.shiftKey && state.selected && state.selected.id !== picture.id) return openCompare(state.selected, picture);
  select(picture);
  if (matchMedia("(max-width: 719px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
}

function show() {
  const focused = document.activeElement?.dataset?.picture;
  const items = state.pictures.map(tile);
  const root = $("gallery");
  if (items.length !== root.children.length || items.some((item, place) => root.children[place] !== item)) {
    root.replaceChildren(...items);
    if (focused) tiles.get(focused)?.item.firstChild.focus({ preventScroll: true });
  }
  const known = new Set(state.pictures.map((picture) => picture.id));
  for (const id of tiles.keys()) if (!known.has(id)) tiles.delete(id);
  markSelected();
  const filtered = state.filter.search || state.filter.rating || state.filter.tag;
  $("gallery-end").textContent = items.length ? "" : filtered ? "No picture matches." : "Your pictures will be kept here.";
}

function markSelected() {
  for (const [id, { item }] of tiles) {
    const current = state.selected?.id === id;
    item.firstChild.classList.toggle("selected", current);
    if (current) item.firstChild.setAttribute("aria-current", "true");
    else item.firstChild.removeAttribute("aria-current");
  }
}

/** Choose the picture `by` places further in the gallery. */
export function step(by) {
  const place = state.pictures.findIndex((picture) => picture.id === shown()?.id);
  const next = state.pictures[place < 0 ? 0 : Math.min(Math.max(place + by, 0), state.pictures.length - 1)];
  if (!next) return;
  select(next);
  tiles.get(next.id)?.item.scrollIntoView({ block: "nearest" });
  if (place + by >= state.pictures.length - 10) loadMore().catch(complain);
}

/** Return the number of tiles in a row. */
export function columns() {
  const [first] = $("gallery").children;
  if (!first) return 1;
  return Math.max(1, [...$("gallery").children].findIndex((item) => item.offsetTop !== first.offsetTop));
}

function head() {
  const search = el("input", { type: "search", id: "search", placeholder: "Search prompts", "aria-label": "Search prompts" });
  const load = debounce(() => loadPictures().catch(complain), 200);
  search.addEventListener("input", () => {
    state.filter.search = search.value.trim();
    load();
  });
  const rating = el("select", { id: "rating", "aria-label": "Lowest rating" }, el("option", { value: "0", text: "Any rating" }),
    [1, 2, 3, 4, 5].map((value) => el("option", { value: String(value), text: value === 5 ? "★ 5" : `★ ${value}+` })));
  rating.addEventListener("change", () => {
    state.filter.rating = Number(rating.value);
    load();
  });
  $("gallery-head").append(el("h2", { class: "hidden", text: "Gallery" }), el("span", { class: "search" }, icon("search"), search), rating, tagFilter());
}

/** Build the gallery. */
export function build() {
  head();
  on("pictures picture", show);
  on("selected", markSelected);
  const end = $("gallery-end");
  const observer = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && loadMore().catch(complain),
    { rootMargin: "600px" });
  on("pictures", () => (observer.unobserve(end), observer.observe(end))); // look again: the end of a short gallery stays in sight
}
