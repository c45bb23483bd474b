// What the page knows of the server: the queue, jobs, pictures and listings. Parts of the page subscribe to topics.

import { get, patch, post, remove } from "./api.js";
import { listen } from "./events.js";

export const state = {
  connected: true,
  queue: { paused: false, order: [], running: null, waits_for_disk: null },
  jobs: new Map(), // by id
  preview: null, // {job, url} of the running job
  pictures: [], // the newest first
  latest: null, // a picture that was drawn since the filter was set, which may not pass it
  selected: null, // a picture, or null to follow what is drawn
  filter: { search: "", rating: 0, tag: "" },
  more: true, // whether there are older pictures
  models: [],
  vaes: [],
  controls: [],
  ip_adapters: [],
  image_embeds: [],
  samplers: [],
  spacings: [],
  fields: [],
};

const PAGE = 60; // pictures of one call
const topics = new Map();

/** Call `work` when a topic changes: queue, jobs, progress, pictures, picture, selected, listings, connected. */
export function on(topic, work) {
  for (const name of topic.split(" ")) topics.set(name, [...(topics.get(name) ?? []), work]);
}

export function emit(topic, data) {
  for (const work of topics.get(topic) ?? []) work(data);
}

/** Read everything from the server, and keep up with it. */
export async function start() {
  await Promise.all([loadListings(), reload()]);
  listen(onEvent, onConnection);
}

async function loadListings() {
  const [models, samplers, schema, ...lists] = await Promise.all(
    ["models", "samplers", "schema", "controls", "ip_adapters", "image_embeds"].map((name) => get(`/api/${name}`)));
  state.models = models.models;
  state.vaes = models.vaes;
  state.samplers = samplers.samplers;
  state.spacings = samplers.spacings;
  state.fields = schema.fields;
  Object.assign(state, ...lists);
  emit("listings");
}

/** Read the queue and the newest pictures again. */
export async function reload() {
  const [queue, queued, running, failed] = await Promise.all([
    get("/api/queue"), get("/api/jobs?state=queued&limit=1000"), get("/api/jobs?state=running"),
    get("/api/jobs?state=failed&limit=3"),
  ]);
  state.queue = queue;
  for (const reply of [queued, running, failed]) for (const job of reply.jobs) state.jobs.set(job.id, job);
  emit("queue");
  emit("jobs");
  await loadPictures();
}

function query(before) {
  const values = new URLSearchParams({ limit: PAGE });
  if (state.filter.search) values.set("search", state.filter.search);
  if (state.filter.rating) values.set("rating", state.filter.rating);
  if (state.filter.tag) values.set("tag", state.filter.tag);
  if (before) values.set("before", before);
  return `/api/pictures?${values}`;
}

let asked = 0;

/** Read the newest pictures that the filter passes. */
export async function loadPictures() {
  const number = ++asked;
  const { pictures } = await get(query());
  if (number !== asked) return; // the filter has changed meanwhile
  state.pictures = pictures;
  state.latest = null;
  state.more = pictures.length === PAGE;
  emit("pictures");
}

/** Read older pictures. */
export async function loadMore() {
  if (!state.more || !state.pictures.length) return;
  state.more = false;
  const number = asked;
  const { pictures } = await get(query(state.pictures.at(-1).id)).catch((error) => {
    if (number === asked) state.more = true; // to be tried again
    throw error;
  });
  if (number !== asked) return;
  state.more = pictures.length === PAGE;
  state.pictures.push(...pictures);
  emit("pictures");
}

function onConnection(connected) {
  const back = connected && !state.connected;
  state.connected = connected;
  emit("connected");
  if (back) reload().catch(() => {});
}

const isShown = (data) => (state.queue.running?.job ?? data.job) === data.job;

function onEvent(name, data) {
  if (name === "queue") {
    state.queue = data;
    if (!data.running) setPreview(null);
    emit("queue");
    const unknown = data.order.filter((id) => !state.jobs.has(id));
    if (unknown.length) fetchJobs();
  } else if (name === "job") {
    state.jobs.set(data.id, data);
    if (state.jobs.size > 2000) forgetOldJobs();
    if (data.finished && state.queue.running?.job === data.id) { // the event of the queue comes a moment later
      state.queue.running = null;
      setPreview(null);
    }
    emit("jobs", data);
    emit("queue");
  } else if (name === "step") {
    if (!isShown(data)) return; // another device draws it
    state.queue.running = data;
    emit("progress", data);
  } else if (name === "preview") {
    if (isShown(data)) setPreview(data);
  } else if (name === "picture") {
    addPicture(data);
  }
}

async function fetchJobs() {
  const { jobs } = await get("/api/jobs?state=queued&limit=1000");
  for (const job of jobs) state.jobs.set(job.id, job);
  emit("queue");
}

function forgetOldJobs() {
  for (const job of state.jobs.values()) {
    if (state.jobs.size <= 1000) return;
    if (job.state === "done" || job.state === "cancelled") state.jobs.delete(job.id);
  }
}

function setPreview(data) {
  state.preview = data && { job: data.job, url: `data:image/jpeg;base64,${data.jpeg}` };
  emit("progress", state.queue.running);
}

function passes(picture) {
  const text = picture.prompt.toLowerCase();
  const words = state.filter.search.toLowerCase().split(/\s+/);
  return picture.rating >= state.filter.rating && (!state.filter.tag || picture.tags.includes(state.filter.tag)) && words.every((word) => text.includes(word));
}

function addPicture(picture) {
  const place = state.pictures.findIndex((known) => known.id === picture.id);
  if (picture.deleted) return (place >= 0 || state.latest?.id === picture.id) && forget(picture);
  if (place >= 0) return replacePicture(picture);
  if (!(newest()?.created > picture.created)) state.latest = picture;
  if (!passes(picture)) return emit("pictures", picture);
  const older = state.pictures.findIndex((known) => known.created < picture.created);
  state.pictures.splice(older < 0 ? state.pictures.length : older, 0, picture);
  emit("pictures", picture);
}

/** Return the newest picture, even if it does not pass the filter: somebody has just drawn it. */
export const newest = () => state.latest ?? state.pictures[0] ?? null;

function forget(picture) {
  if (state.latest?.id === picture.id) state.latest = null;
  state.pictures = state.pictures.filter((known) => known.id !== picture.id);
  if (state.selected?.id === picture.id) state.selected = null;
  emit("pictures");
}

function replacePicture(picture) {
  const place = state.pictures.findIndex((known) => known.id === picture.id);
  if (place >= 0) state.pictures[place] = picture;
  if (state.latest?.id === picture.id) state.latest = picture;
  if (state.selected?.id === picture.id) state.selected = picture;
  emit("picture", picture);
}

/** Show a picture on the stage; null follows what is drawn. */
export function select(picture) {
  state.selected = picture;
  emit("selected");
}

/** Queue requests; each becomes a job. `model`, `vae` and `priority` may be given. */
export async function submit(requests, { model, vae, priority } = {}) {
  const { jobs } = await post("/api/jobs", { requests, ...(model && { model }), ...(vae && { vae }), ...(priority && { priority }) });
  for (const job of jobs) if (!state.jobs.has(job.id)) state.jobs.set(job.id, job);
  state.queue.order.push(...jobs.map((job) => job.id).filter((id) => !state.queue.order.includes(id)));
  emit("queue");
  return jobs;
}

export const cancel = (id) => remove(`/api/jobs/${id}`);
export const move = (id, before) => post(`/api/jobs/${id}/move`, { before });
export const pause = (paused) => post(`/api/queue/${paused ? "pause" : "resume"}`);

/** Rate a picture; the same rating again takes it away. */
export async function rate(picture, rating) {
  replacePicture(await patch(`/api/pictures/${picture.id}`, { rating: picture.rating === rating ? 0 : rating }));
}

/** Set the tags of a picture. */
export async function tag(picture, tags) {
  replacePicture(await patch(`/api/pictures/${picture.id}`, { tags }));
}

/** Return the job of a picture, from the server if it is not known here; null if it is not known there either. */
export async function jobOf(picture) {
  if (!state.jobs.has(picture.job)) {
    const job = await get(`/api/jobs/${picture.job}`).catch(() => null);
    if (job) state.jobs.set(job.id, job);
  }
  return state.jobs.get(picture.job) ?? null;
}

/** Delete a picture; it can be restored for an hour. */
export async function deletePicture(picture) {
  await remove(`/api/pictures/${picture.id}`);
  forget(picture);
}

/** Restore a deleted picture. */
export async function restorePicture(picture) {
  addPicture(await post(`/api/pictures/${picture.id}/restore`));
}

/** Resolve with a job when it has ended. */
export function ended(id) {
  const isEnd = (job) => ["done", "failed", "cancelled"].includes(job?.state);
  return new Promise((resolve, reject) => {
    let open = true;
    const look = (job) => {
      if (!open || job?.id !== id || !isEnd(job)) return;
      open = false;
      if (job.state === "done") resolve(job);
      else reject(new Error(job.error?.message ?? "The job was cancelled."));
    };
    on("jobs", look);
    get(`/api/jobs/${id}`).then(look, reject); // it may have ended before
  });
}
