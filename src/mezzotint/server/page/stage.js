// The stage: the picture that is being drawn, with its preview and the time left, or the one that was chosen.

import { fileUrl } from "./api.js";
import { $, el, icon, iconButton, textButton } from "./dom.js";
import * as actions from "./actions.js";
import { isVeiled, revealButton, veil } from "./flagged.js";
import { another, cancelJob, progressText, summary } from "./queue.js";
import { jobOf, newest, on, select, state } from "./store.js";
import { tagRow } from "./tags.js";
import { openViewer } from "./viewer.js";

const MAX_ZOOM = 4; // small pictures are enlarged this far,
const LEAST = 700; // or to this side

const running = () => state.queue.running && state.jobs.get(state.queue.running.job);

/** Return the picture that the stage shows, if it shows a finished one. */
export const shown = () => state.selected ?? (running()?.kind === "draw" ? null : newest());

const live = { box: null, image: null, bar: null, text: null, id: "" };

function showLive(job) {
  if (live.id === job.id && live.box?.isConnected) return updateLive();
  live.id = job.id;
  live.image = el("img", { class: "picture preview", alt: `Preview of ${job.request.prompt}`, hidden: true });
  live.empty = el("div", { class: "empty-plate" }, el("div", { class: "shimmer" }));
  live.bar = el("progress", { max: 1, value: 0, "aria-label": "Steps" });
  live.text = el("span", { class: "progress-text" });
  live.box = el("div", { class: "live", data: { job: job.id } },
    el("div", { class: "plate" }, live.empty, live.image),
    el("div", { class: "progress" }, live.bar, live.text),
    el("p", { class: "caption", text: job.request.prompt }),
    el("p", { class: "facts", text: [summary(job), `seed ${job.request.seed}`].filter(Boolean).join(" · ") }),
    el("div", { class: "actions" },
      textButton("close", "Cancel", () => cancelJob(job), { id: "cancel", title: "Cancel (Esc)" }),
      textButton("again", "Another seed instead", () => another(job, true), { title: "Cancel, and draw it with another seed" })));
  const { width = 512, height = width } = job.request;
  fit(live.box, width, height);
  $("stage").replaceChildren(live.box);
  updateLive();
}

function updateLive() {
  const progress = state.queue.running;
  if (!progress || !live.box) return;
  const { step, steps } = progress;
  live.bar.value = steps ? step / steps : 0;
  live.text.textContent = progressText(progress);
  if (state.preview?.job === live.id) {
    if (live.image.hidden) live.image.onload = () => {
      fit(live.box, live.image.naturalWidth, live.image.naturalHeight);
      live.image.hidden = false;
      live.empty.remove();
    };
    live.image.src = state.preview.url;
  }
}

/** Give an element the largest size of a picture that fits the stage, by CSS variables. */
function fit(node, width, height) {
  const zoom = Math.max(MAX_ZOOM, LEAST / Math.max(width, height));
  node.style.setProperty("--ratio", String(width / height));
  node.style.setProperty("--most", `${Math.round(width * zoom)}px`);
}

function stars(picture) {
  const group = el("div", { class: "stars", role: "group", "aria-label": "Rating" });
  for (let value = 1; value <= 5; value++) {
    const button = iconButton("star", `${value} ${value === 1 ? "star" : "stars"}`, () => actions.rate(picture, value));
    button.setAttribute("aria-pressed", String(picture.rating === value));
    button.classList.toggle("on", picture.rating >= value);
    group.append(button);
  }
  return group;
}

/** Return the job that verifies a picture, if it waits or runs. */
const verifying = (picture) => [...state.jobs.values()].find((job) => job.kind === "verify" && job.target === picture.id &&
  (job.state === "queued" || job.state === "running"));

/** Return what the badge says while a picture is drawn again. */
function progressOf(job) {
  const { job: id, step, steps } = state.queue.running ?? {};
  if (job.state === "queued") return "Waits to be verified";
  return id === job.id && steps ? `Drawing it again: ${Math.round((100 * step) / steps)} %` : "Drawing it again";
}

/** Return the badge that says whether a picture was drawn again with the same bits. */
function badge(picture) {
  const { verified } = picture;
  const job = verifying(picture);
  const label = job ? progressOf(job) : !verified ? "Verify" : verified.identical ? "Verified" : "Differs";
  const kind = job ? "busy" : !verified ? "" : verified.identical ? "good" : "bad";
  const title = job || !verified ? "Draws it again, behind the other jobs, and compares every bit" : "Verify once more";
  const name = kind === "bad" ? "warn" : job ? "alarm" : verified ? "verify" : "again";
  const button = textButton(name, label, () => actions.verify(picture), { class: `button badge ${kind}`, id: "badge", title, disabled: Boolean(job) });
  if (kind === "good") button.lastChild.append(el("span", { class: "detail", text: ": same bits" }));
  return button;
}

function showPicture(picture) {
  const image = el("img", { class: "picture", src: fileUrl(picture), alt: picture.prompt || "picture without a prompt",
    width: picture.width, height: picture.height, draggable: true });
  const plate = el("div", { class: "plate", id: "plate" },
    el("button", { type: "button", class: "plate-button", title: "Full screen (Enter)", "aria-label": `Full screen: ${image.alt}`,
      onclick: () => openViewer(picture) }, veil(image, picture)), revealButton(picture));
  const job = state.jobs.get(picture.job);
  const more = el("details", { class: "menu" }, el("summary", { class: "icon-button", "aria-label": "More", title: "More" }, icon("more")),
    el("div", { class: "menu-items" },
      textButton("grid", "X/Y grid", () => actions.openGrid(picture)),
      state.controls.length ? textButton("edges", "Use in ControlNet", () => actions.useInControl(picture), { id: "use-control" }) : null,
      state.ip_adapters.length ? textButton("image", "Use in IP-Adapter", () => actions.useInAdapter(picture), { id: "use-ip-adapter" }) : null,
      textButton("compare", "Compare with…", () => actions.armCompare(picture)),
      el("a", { class: "button", href: fileUrl(picture), download: `${picture.seed}.png` }, icon("save"), el("span", { text: "Save the file" })),
      textButton("trash", "Delete", () => actions.remove(picture))));
  more.addEventListener("click", (event) => event.target.closest(".menu-items") && (more.open = false));
  more.addEventListener("focusout", (event) => more.contains(event.relatedTarget) || setTimeout(() => (more.open = false), 150));
  const still = el("div", { class: "still", data: { picture: picture.id } },
    plate,
    el("div", { class: "under" }, stars(picture), el("div", { class: "spacer" }), badge(picture),
      textButton("words", "Word maps", () => actions.showMaps(picture), { id: "maps", class: "button badge plain", title: "Where in the picture each word took effect" }),
      iconButton("full", "Full screen (Enter)", () => openViewer(picture)),
      iconButton("trash", "Delete (Del)", () => actions.remove(picture), { id: "delete" }), more),
    el("p", { class: "caption", text: picture.prompt || "No prompt" }),
    el("p", { class: "facts" }, facts(picture, job)),
    picture.verified && !picture.verified.identical && !verifying(picture)
      ? el("p", { class: "warning differs", text: [picture.verified.sentences].flat().join(" ") }) : null,
    tagRow(picture),
    el("div", { class: "actions" },
      textButton("again", "Another seed", () => actions.anotherSeed(picture), { id: "another" }),
      textButton("seeds", "Variations", () => actions.variations(picture), { id: "variations" }),
      textButton("hires", "Hires ×2", () => actions.hires(picture), { id: "hires" }),
      textButton("settings", "Use settings", () => actions.useSettings(picture), { id: "use-settings" }),
      textButton("image", "Use as image", () => actions.useAsImage(picture), { id: "use-image" }),
      textButton("brush", "Inpaint", () => actions.inpaint(picture), { id: "inpaint" })));
  fit(still, picture.width, picture.height);
  $("stage").replaceChildren(still);
  if (!job) jobOf(picture).then((found) => found && still.querySelector(".facts").replaceChildren(...facts(picture, found)));
}

function facts(picture, job) {
  const own = state.models.find((model) => model.name === picture.model)?.settings;
  const request = { ...(job && !job.request.sampler && own), ...job?.request };
  const texts = [`${picture.width}×${picture.height}`, `seed ${picture.seed}`, request.steps && `${request.steps} steps`,
    request.sampler, request.guidance_scale && `guidance ${request.guidance_scale}`, picture.model,
    job?.vae && `VAE ${job.vae}`, picture.flagged ? "flagged by the safety checker" : ""];
  return texts.filter(Boolean).map((text) => el("span", { text }));
}

function showNothing() {
  $("stage").replaceChildren(el("div", { class: "nothing" }, el("div", { class: "nothing-mark" }, icon("image")),
    el("h2", { text: "Nothing drawn yet" }),
    el("p", { text: "Write what you want to see, and press Draw. Or drop a PNG from any program to take its settings." }),
    textButton("", "Try “a lemon on a blue background”", () => actions.tryExample(), { class: "button suggest" })));
}

function show() {
  const job = running();
  document.body.classList.toggle("drawing", Boolean(job));
  document.title = job && state.queue.running.steps
    ? `${Math.round((100 * state.queue.running.step) / state.queue.running.steps)} % · mezzotint` : "mezzotint";
  const picture = shown();
  if (picture) showPicture(picture);
  else if (job) showLive(job);
  else showNothing();
}

let shownKey = "";

/** Show again only what has changed, so that buttons keep their focus. */
function refresh() {
  const job = running();
  const picture = shown();
  const key = picture ? JSON.stringify([picture, isVeiled(picture), verifying(picture)?.state, state.models.length]) : job ? `live ${job.id}` : "nothing";
  if (key === shownKey && $("stage").firstChild) {
    if (!picture && job) updateLive();
    return;
  }
  shownKey = key;
  const focused = $("stage").contains(document.activeElement) ? document.activeElement : null;
  const mark = focused && (focused.id || focused.getAttribute("aria-label"));
  show();
  if (mark) ($("stage").querySelector(`#${CSS.escape(mark)}`) ?? $("stage").querySelector(`[aria-label="${CSS.escape(mark)}"]`))?.focus();
}

/** Build the stage. */
export function build() {
  on("queue jobs pictures picture selected progress listings", refresh);
  on("drawn", () => select(null));
  on("progress", () => {
    const { step, steps } = state.queue.running ?? {};
    const job = running();
    if (job?.kind === "verify" && $("badge") && shown()?.id === job.target) $("badge").lastChild.textContent = progressOf(job);
    if (steps) document.title = `${Math.round((100 * step) / steps)} % · mezzotint`;
  });
  refresh();
}
