// Full screen: one picture with arrows, zoom and pan; or two under a slider.

import { rate, remove } from "./actions.js";
import { fileUrl } from "./api.js";
import { el, icon, iconButton, openDialog } from "./dom.js";
import { revealButton, veil } from "./flagged.js";
import { step } from "./gallery.js";
import { title } from "./settings.js";
import { jobOf, on, select, state } from "./store.js";

let open = null; // the dialog
let shown = null; // its picture

/** Open a picture in full screen. */
export function openViewer(picture) {
  const image = el("img", { class: "viewer-image", draggable: false });
  const caption = el("p", { class: "viewer-caption" });
  const cover = el("div", { class: "viewer-cover" });
  const zoom = { scale: 1, x: 0, y: 0 };
  const place = () => {
    image.style.transform = `translate(${zoom.x}px, ${zoom.y}px) scale(${zoom.scale})`;
    image.classList.toggle("zoomed", zoom.scale > 1);
  };
  const show = (next) => {
    shown = next;
    Object.assign(zoom, { scale: 1, x: 0, y: 0 });
    image.src = fileUrl(next);
    image.alt = next.prompt || "picture";
    veil(image, next);
    cover.replaceChildren(revealButton(next) ?? "");
    image.style.setProperty("--ratio", String(next.width / next.height));
    image.style.setProperty("--most", `${Math.max(next.width * 6, 512)}px`);
    caption.textContent = [next.prompt, `${next.width}×${next.height}`, `seed ${next.seed}`, "★".repeat(next.rating)].filter(Boolean).join("  ·  ");
    place();
  };
  const go = (by) => (state.selected ?? select(shown), step(by));
  const content = el("div", { class: "viewer" },
    el("div", { class: "viewer-plate" }, image, cover),
    el("div", { class: "viewer-bar" }, iconButton("left", "Newer (←)", () => go(-1)), caption,
      iconButton("compare", "Compare with the next older picture", () => {
        const other = state.pictures[state.pictures.findIndex((one) => one.id === shown.id) + 1];
        if (other) openCompare(shown, other);
      }, { id: "compare-next" }),
      iconButton("right", "Older (→)", () => go(1)), iconButton("close", "Close (Esc)", () => open?.close())));
  select(picture);
  show(picture);
  const plate = content.firstChild;
  plate.addEventListener("wheel", (event) => {
    event.preventDefault();
    const scale = Math.min(16, Math.max(1, zoom.scale * Math.exp(-event.deltaY / 400)));
    const { left, top, width, height } = plate.getBoundingClientRect();
    const [x, y] = [event.clientX - left - width / 2, event.clientY - top - height / 2];
    zoom.x = scale === 1 ? 0 : x - ((x - zoom.x) * scale) / zoom.scale;
    zoom.y = scale === 1 ? 0 : y - ((y - zoom.y) * scale) / zoom.scale;
    zoom.scale = scale;
    place();
  }, { passive: false });
  plate.addEventListener("pointerdown", (event) => {
    if (zoom.scale === 1) return;
    plate.setPointerCapture(event.pointerId);
    const [x, y] = [event.clientX - zoom.x, event.clientY - zoom.y];
    const drag = (moved) => (Object.assign(zoom, { x: moved.clientX - x, y: moved.clientY - y }), place());
    plate.addEventListener("pointermove", drag);
    plate.addEventListener("pointerup", () => plate.removeEventListener("pointermove", drag), { once: true });
  });
  plate.addEventListener("click", (event) => event.target === plate && zoom.scale === 1 && open?.close());
  show_ = show;
  open = openDialog("Picture", content, { bare: true, onclose: () => (open = null) });
  open.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "Delete") remove(shown);
    else if (/^[0-5]$/.test(event.key)) rate(shown, Number(event.key));
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

let show_ = null;
on("selected picture", () => open && state.selected && show_?.(state.selected));
on("pictures", () => open && !state.pictures.length && open.close()); // the last one was deleted

/** Write under two pictures what they were drawn with that differs; the prompt alone where nothing does. */
async function sayDifferences(left, right, captions) {
  const pictures = [left, right];
  const requests = await Promise.all(pictures.map(async (picture) => {
    const job = await jobOf(picture);
    return { ...job?.request, model: picture.model, vae: job?.vae, size: `${picture.width}×${picture.height}`, seed: picture.seed, width: null, height: null, count: null };
  }));
  const names = new Set(requests.flatMap(Object.keys));
  const differ = [...names].filter((name) => JSON.stringify(requests[0][name] ?? null) !== JSON.stringify(requests[1][name] ?? null));
  const say = (name, value) => (name === "prompt" ? value : ["image", "mask", "control", "ip_adapter"].includes(name)
    ? `${value ? "with" : "without"} ${title(name).toLowerCase()}` : `${title(name).toLowerCase()} ${value === undefined || value === null ? "auto" : JSON.stringify(value).replaceAll('"', "")}`);
  pictures.forEach((picture, place) => {
    const parts = differ.map((name) => say(name, requests[place][name]));
    captions[place].textContent = parts.join(" · ") || `${picture.prompt} · seed ${picture.seed}`;
    captions[place].title = captions[place].textContent;
  });
}

/** Open two pictures under a slider. */
export function openCompare(left, right) {
  const top = el("img", { class: "compare-image", src: fileUrl(left), alt: `Left: ${left.prompt}` });
  const below = el("img", { class: "compare-image", src: fileUrl(right), alt: `Right: ${right.prompt}` });
  const line = el("div", { class: "compare-line" }, icon("swap"));
  const range = el("input", { type: "range", min: 0, max: 100, step: 0.1, value: 50, class: "compare-range", id: "compare",
    "aria-label": "How much of the left picture is shown" });
  veil(top, left);
  veil(below, right);
  const frame = el("div", { class: "compare-frame" }, below, top, line, range);
  frame.style.setProperty("--ratio", String(left.width / left.height));
  frame.style.setProperty("--most", `${Math.max(left.width, right.width) * 6}px`);
  const show = () => {
    top.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
    line.style.left = `${range.value}%`;
  };
  range.addEventListener("input", show);
  show();
  const captions = [left, right].map((picture, place) => el("p", { class: place ? "viewer-caption end" : "viewer-caption", text: `${picture.prompt} · seed ${picture.seed}` }));
  sayDifferences(left, right, captions);
  openDialog("Compare", el("div", { class: "viewer" }, el("div", { class: "viewer-plate" }, frame),
    el("div", { class: "viewer-bar two" }, captions[0],
      iconButton("close", "Close (Esc)", (event) => event.target.closest("dialog").close()),
      captions[1])), { bare: true });
  range.focus();
}
