// The queue: what waits, in its order; reorder by dragging or buttons, cancel, again with another seed, pause.

import { $, announce, complain, duration, el, icon, iconButton, textButton, toast } from "./dom.js";
import { cancel, move, on, pause, select, state, submit } from "./store.js";

const SHOWN = 100; // rows at once
const dismissed = new Set(JSON.parse(localStorage.getItem("mezzotint.dismissed") ?? "[]"));
const HOUR = 3600;

/** Return what a job draws, in a few words. */
export function summary(job) {
  const { request } = job;
  const size = request.width && request.height ? `${request.width}×${request.height}` : "";
  const kind = { verify: "verify", maps: "word maps" }[job.kind];
  const parts = [kind, request.count > 1 ? `${request.count} pictures` : "", size, request.steps ? `${request.steps} steps` : "",
    request.guidance_scale ? `guidance ${request.guidance_scale}` : "", request.sampler ?? "",
    request.hires ? `hires ×${request.hires}` : "", request.mask ? "inpaint" : request.image ? "from image" : "", request.control ? "ControlNet" : "",
    request.ip_adapter ? "IP-Adapter" : ""];
  return parts.filter(Boolean).join(" · ");
}

const placeOf = ({ model, vae, priority }) => ({ model, vae, priority: priority > 0 ? "bulk" : "interactive" });

/** Cancel a job, and offer to queue it again where it was. */
export async function cancelJob(job) {
  const { order } = state.queue;
  const before = job.state === "queued" ? order[order.indexOf(job.id) + 1] : "first";
  try {
    await cancel(job.id);
    announce("Cancelled.");
    if (job.kind === "draw") toast("Cancelled.", { action: "Undo", run: () => restore(job, before).catch(complain) });
  } catch (error) {
    complain(error);
  }
}

/** Queue a cancelled job again, before another one if that still waits, or "first". */
async function restore(job, before) {
  const [added] = await submit([job.request], placeOf(job));
  if (before === "first" || state.queue.order.includes(before)) await move(added.id, before).catch(ignoreGone);
}

/** Ignore that a job has begun or ended meanwhile. */
function ignoreGone(error) {
  if (error.status !== 404 && error.status !== 409) throw error;
}

/** Queue a job's request with another seed, in front; `instead` cancels the job. */
export async function another(job, instead = false) {
  const { seed: _, ...request } = job.request;
  try {
    const [added] = await submit([request], placeOf(job));
    if (instead) await cancel(job.id).then(() => move(added.id, "first")).catch(ignoreGone);
  } catch (error) {
    complain(error);
  }
}

function waiting() {
  return state.queue.order.map((id) => state.jobs.get(id)).filter((job) => job?.state === "queued");
}

function failures() {
  const recent = Date.now() / 1000 - HOUR;
  return [...state.jobs.values()].filter((job) => job.state === "failed" && !dismissed.has(job.id) &&
    job.finished > recent).sort((a, b) => b.finished - a.finished).slice(0, 3);
}

function row(job, place, jobs) {
  const shift = (by) => {
    const target = jobs[by < 0 ? place - 1 : place + 2];
    moveTo(job, target?.id ?? "last").then(() => document.querySelector(`[data-job="${job.id}"] .${by < 0 ? "up" : "down"}`)?.focus());
  };
  const text = job.request.prompt || "no prompt";
  const item = el("li", { class: "job", data: { job: job.id }, draggable: true },
    el("span", { class: "grip", title: "Drag to reorder" }, icon("grip")),
    el("div", { class: "job-text" }, el("span", { class: "job-prompt", text, title: text }),
      el("span", { class: "job-note", text: summary(job) || "waiting" })),
    el("div", { class: "job-tools" },
      iconButton("up", `Earlier: ${text}`, () => shift(-1), { class: "icon-button up", disabled: place === 0 }),
      iconButton("down", `Later: ${text}`, () => shift(1), { class: "icon-button down", disabled: place === jobs.length - 1 }),
      job.kind === "draw" && iconButton("seeds", `Again with another seed: ${text}`, () => another(job)),
      iconButton("close", `Cancel: ${text}`, () => cancelJob(job), { class: "icon-button cancel" })));
  item.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData("application/x-mezzotint-job", job.id);
    event.dataTransfer.effectAllowed = "move";
    item.classList.add("dragged");
  });
  item.addEventListener("dragend", () => item.classList.remove("dragged"));
  item.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("application/x-mezzotint-job")) return;
    event.preventDefault();
    const below = event.offsetY > item.offsetHeight / 2;
    item.classList.toggle("drop-below", below);
    item.classList.toggle("drop-above", !below);
  });
  const clear = () => item.classList.remove("drop-below", "drop-above");
  item.addEventListener("dragleave", clear);
  item.addEventListener("drop", (event) => {
    const id = event.dataTransfer.getData("application/x-mezzotint-job");
    const below = item.classList.contains("drop-below");
    clear();
    const dragged = state.jobs.get(id);
    if (!dragged || id === job.id) return;
    event.preventDefault();
    moveTo(dragged, below ? jobs[place + 1]?.id ?? "last" : job.id);
  });
  return item;
}

async function moveTo(job, before) {
  if (before === job.id) return;
  try {
    const queue = await move(job.id, before);
    if (queue?.order) state.queue = queue;
    show();
    announce(`Now number ${state.queue.order.indexOf(job.id) + 1} in the queue.`);
  } catch (error) {
    complain(error);
  }
}

function failure(job) {
  const dismiss = () => {
    dismissed.add(job.id);
    localStorage.setItem("mezzotint.dismissed", JSON.stringify([...dismissed].slice(-200)));
    show();
  };
  return el("li", { class: "job failed", data: { job: job.id } }, icon("warn"),
    el("div", { class: "job-text" }, el("span", { class: "job-prompt", text: job.request.prompt }),
      el("span", { class: "job-error", text: job.error?.message ?? "It failed." })),
    el("div", { class: "job-tools" },
      iconButton("again", "Try again", () => (dismiss(), submit([job.request], placeOf(job)).catch(complain))),
      iconButton("close", "Dismiss", dismiss)));
}

const now = { id: "", box: null, image: null, bar: null, note: null };

/** Return the row of the running job, which is kept from one step to the next. */
function running() {
  const job = state.queue.running && state.jobs.get(state.queue.running.job);
  if (!job) return null;
  if (now.id !== job.id) {
    const text = job.request.prompt || "no prompt";
    Object.assign(now, { id: job.id, image: el("img", { alt: "", hidden: true }), bar: el("progress", { max: 1, "aria-label": "Steps" }),
      note: el("span", { class: "job-note" }) });
    now.box = el("div", { class: "now", data: { running: job.id } },
      el("button", { type: "button", class: "now-plate", title: "Follow it (L)", "aria-label": `Follow what is drawn: ${text}`, onclick: () => select(null) }, now.image),
      el("div", { class: "job-text" }, el("span", { class: "job-prompt", text, title: text }), now.note, now.bar),
      el("div", { class: "job-tools" }, iconButton("close", `Cancel: ${text}`, () => cancelJob(job), { id: "cancel-running" })));
  }
  showProgress();
  return now.box;
}

function showProgress() {
  const progress = state.queue.running;
  if (!progress || progress.job !== now.id) return;
  const { step, steps } = progress;
  const job = state.jobs.get(now.id);
  const doing = { verify: "verifying", maps: "recording word maps" }[job?.kind] ?? "drawing";
  now.bar.value = steps ? step / steps : 0;
  now.note.textContent = steps ? `${doing} · ${progressText(progress)}` : progressText(progress);
  const url = state.preview?.job === now.id ? state.preview.url : "";
  now.image.hidden = !url;
  if (url) now.image.src = url;
}

/** Say how far a run is. */
export function progressText({ step, steps, seconds_left: left, loading }) {
  if (!steps) return loading ? "loading the model" : "first step";
  return `${step} of ${steps}${left === null || left === undefined ? "" : ` · ${duration(left)} left`}`;
}

let drawn = 0;

function show() {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(render);
}

function render() {
  const root = $("queue");
  const jobs = waiting();
  const failed = failures();
  const { paused, waits_for_disk: disk } = state.queue;
  const current = running();
  root.hidden = !current && !jobs.length && !failed.length && !paused && !disk;
  if (root.querySelector(".dragged")) return; // not under the pointer
  const focused = document.activeElement?.closest?.("[data-job]")?.dataset.job;
  const label = root.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  const title = ["Queue", jobs.length || "", paused ? "paused" : ""].filter(Boolean).join(" · ");
  root.replaceChildren(
    el("div", { class: "part-head" }, el("h2", { text: title }),
      textButton(paused ? "play" : "pause", paused ? "Resume" : "Pause", () => pause(!paused).catch(complain), { id: "pause" }),
      jobs.length > 1 && textButton("close", "Clear", () => clearAll(jobs))),
    current ?? "",
    disk ? el("p", { class: "warning", role: "alert", text: disk }) : "",
    el("ol", { class: "jobs" }, failed.map(failure), jobs.slice(0, SHOWN).map(row)),
    jobs.length > SHOWN ? el("p", { class: "note", text: `and ${jobs.length - SHOWN} more` }) : "");
  if (label) {
    const buttons = root.querySelectorAll(focused ? `[data-job="${focused}"] button` : "button");
    [...buttons].find((button) => button.getAttribute("aria-label") === label)?.focus();
  }
}

async function clearAll(jobs) {
  await Promise.allSettled(jobs.map((job) => cancel(job.id)));
  toast(`${jobs.length} jobs cancelled.`, { action: "Undo", run: async () => {
    try {
      for (const job of jobs) if (job.kind === "draw") await submit([job.request], placeOf(job)); // one after the other, in their order
    } catch (error) {
      complain(error);
    }
  } });
}

/** Build the queue. */
export function build() {
  on("queue jobs", show);
  on("progress", showProgress);
  render();
}
