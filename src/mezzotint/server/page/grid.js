// The X/Y grid: every combination of the values of two fields, queued as jobs and shown as a table while it is drawn.

import { fileUrl, get, thumbnailUrl } from "./api.js";
import { complain, debounce, el, openDialog, textButton } from "./dom.js";
import { veil } from "./flagged.js";
import { current, form, vaeName } from "./form.js";
import { read, title } from "./settings.js";
import { cancel, on, select, state, submit } from "./store.js";

const KEY = "mezzotint.grid";
const LIMIT = 100; // jobs of one call
const EXAMPLES = { seed: "1, 2, 3", steps: "5, 10, 20, 40", guidance_scale: "1, 3, 5, 8", sampler: "euler, dpmpp_2m, unipc",
  prompt: "lemon => apple, cherry", spacing: "karras, trailing" };

/** Read a list of values: commas between them, ranges as 1-5 or 10-40:10. */
function values(name, text) {
  const parts = text.split(",").map((part) => part.trim()).filter(Boolean);
  return parts.flatMap((part) => {
    const range = /^(\d+)\s*-\s*(\d+)(?::(\d+))?$/.exec(part);
    if (!range) return [name === "sampler" || name === "prompt" || name === "spacing" ? part : read(part)];
    const [from, to, by] = [Number(range[1]), Number(range[2]), Number(range[3] ?? 1) || 1];
    return Array.from({ length: Math.min(LIMIT, Math.floor((to - from) / by) + 1) }, (_, place) => from + place * by);
  });
}

/** Return an axis: its field and, for each value, its label and the change of the request. */
function axis(name, text) {
  if (!name) return { name: "", cells: [{ label: "", apply: (request) => request }] };
  if (name === "prompt") {
    const [wanted, rest] = text.includes("=>") ? text.split("=>").map((part) => part.trim()) : ["", text];
    const all = rest.split(",").map((part) => part.trim()).filter(Boolean);
    const words = wanted ? [wanted, ...all] : all;
    return { name, cells: words.map((word) => ({ label: word,
      apply: (request) => ({ ...request, prompt: wanted ? request.prompt.replaceAll(wanted, word) : word }) })) };
  }
  return { name, cells: values(name, text).map((value) => ({ label: `${value}`, apply: (request) => ({ ...request, [name]: value }) })) };
}

function axisRow(letter, saved) {
  const names = ["prompt", "seed", "steps", "guidance_scale", "sampler", "spacing", "strength", "clip_skip", "eta", "guidance_rescale"];
  const others = state.fields.map((field) => field.name).filter((name) => !names.includes(name) && !["image", "mask", "count", "batch"].includes(name));
  const field = el("select", { id: `grid-${letter}`, "aria-label": `Field of ${letter.toUpperCase()}` },
    letter === "y" && el("option", { value: "", text: "nothing" }),
    [...names, ...others].map((name) => el("option", { value: name, text: title(name) })));
  field.value = saved?.name ?? (letter === "x" ? "guidance_scale" : "steps");
  const text = el("input", { id: `grid-${letter}-values`, "aria-label": `Values of ${letter.toUpperCase()}`, value: saved?.text ?? "" });
  const hint = () => (text.placeholder = EXAMPLES[field.value] ?? "values, with commas between them");
  field.addEventListener("change", () => ((text.value = ""), hint()));
  hint();
  const row = el("div", { class: "grid-axis" }, el("span", { class: "axis-name", text: letter.toUpperCase() }), field, text);
  return { row, field, text, get: () => ({ name: field.value, text: text.value || (EXAMPLES[field.value] ?? "") }) };
}

/** Open the grid: the last one, and the fields of the next. */
export function openGrid() {
  const saved = JSON.parse(localStorage.getItem(KEY) ?? "null");
  const [x, y] = [axisRow("x", saved?.x), axisRow("y", saved?.y)];
  const note = el("p", { class: "note", id: "grid-note" });
  const base = el("p", { class: "note grid-base", text: `of “${form.request.prompt ?? ""}”, with the settings of the form` });
  const sheet = el("div", { class: "grid-sheet", tabIndex: 0, role: "region", "aria-label": "Grid" });
  const count = () => axis(x.get().name, x.get().text).cells.length * axis(y.get().name, y.get().text).cells.length;
  const say = () => {
    const number = count();
    note.textContent = number > LIMIT ? `${number} pictures are too many; at most ${LIMIT} are queued at once` : `${number} pictures`;
    drawButton.disabled = number > LIMIT || !number;
  };
  const drawButton = el("button", { type: "button", class: "primary", id: "grid-draw", text: "Draw the grid", onclick: () => queue(x.get(), y.get(), sheet).catch(complain) });
  for (const part of [x.field, x.text, y.field, y.text]) part.addEventListener("input", say);
  openDialog("X/Y grid", el("div", { class: "grid-page" },
    el("div", { class: "grid-form" }, x.row, y.row, el("div", { class: "grid-go" }, base, note, drawButton)), sheet), { wide: true });
  say();
  if (saved?.jobs) showSheet(sheet, saved);
}

async function queue(x, y, sheet) {
  const base = { ...current(), count: 1 };
  base.seed ??= form.request.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]; // the same for all
  const [across, down] = [axis(x.name, x.text), axis(y.name, y.text)];
  const requests = down.cells.flatMap((row) => across.cells.map((column) => row.apply(column.apply(base))));
  const jobs = await submit(requests, { model: form.model, vae: vaeName(), priority: "bulk" });
  const saved = { x, y, columns: across.cells.map((cell) => cell.label), rows: down.cells.map((cell) => cell.label), jobs: jobs.map((job) => job.id) };
  localStorage.setItem(KEY, JSON.stringify(saved));
  showSheet(sheet, saved);
}

function cell(job) {
  const [picture] = job?.pictures ?? [];
  if (picture) {
    return el("button", { type: "button", class: "tile", "aria-label": `${picture.prompt}, seed ${picture.seed}`, onclick: (event) => {
      event.target.closest("dialog").close();
      select(picture);
    } }, veil(el("img", { src: picture.width > 320 ? thumbnailUrl(picture) : fileUrl(picture), alt: "", class: "loaded" }), picture));
  }
  const text = job?.state === "failed" ? job.error?.message : job?.state;
  return el("span", { class: `grid-empty ${job?.state ?? ""}`, text: text ?? "…", title: text ?? "" });
}

async function showSheet(sheet, saved) {
  const jobs = new Map();
  const show = () => {
    const rows = saved.rows.map((name, down) => el("tr", {}, el("th", { scope: "row", text: name }),
      saved.columns.map((_, across) => el("td", {}, cell(jobs.get(saved.jobs[down * saved.columns.length + across]))))));
    const done = saved.jobs.filter((id) => jobs.get(id)?.state === "done").length;
    const open = saved.jobs.filter((id) => ["queued", "running"].includes(jobs.get(id)?.state));
    sheet.replaceChildren(el("div", { class: "part-head" },
      el("p", { class: "note", text: `${title(saved.x.name)} across${saved.y.name ? `, ${title(saved.y.name).toLowerCase()} down` : ""} · ${done} of ${saved.jobs.length}` }),
      open.length ? textButton("close", "Cancel the rest", () => Promise.allSettled(open.map(cancel))) : ""),
    el("table", { class: "grid-table" }, el("thead", {}, el("tr", {}, el("td"), saved.columns.map((name) => el("th", { scope: "col", text: name })))),
      el("tbody", {}, rows)));
  };
  const soon = debounce(show, 50);
  on("jobs", (job) => job && saved.jobs.includes(job.id) && sheet.isConnected && (jobs.set(job.id, job), soon()));
  show();
  await Promise.all(saved.jobs.map(async (id) => {
    const job = await get(`/api/jobs/${id}`).catch(() => null);
    if (job && !jobs.has(id)) jobs.set(id, job);
  }));
  show();
}
