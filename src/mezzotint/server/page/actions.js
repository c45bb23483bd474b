// What can be done with a picture of the history.

import { download, post, requestOf, upload } from "./api.js";
import { announce, complain, toast } from "./dom.js";
import { draw, form, OF_HIRES, OF_IMAGE, set, take } from "./form.js";
import { deletePicture, ended, rate as setRating, restorePicture, select, state, submit } from "./store.js";

const VARIATIONS = 4;
const VARIATION_STRENGTH = 0.15;
const LARGER_STRENGTH = 0.35; // how much may change at twice the size: what the picture shows stays as it is
const SMALL_MODEL = 256; // a model of smaller pictures draws its object several times into a larger one,
const SMALL_STRENGTH = 0.1; // unless very little may change

/** Return a listener whose errors become notices. */
const guarded = (work) => async (...values) => {
  try {
    return await work(...values);
  } catch (error) {
    complain(error);
    return null;
  }
};

/** Return a function that does nothing while its last call is still running, so that a second click starts nothing. */
const single = (work) => {
  let busy = false;
  return async (...values) => {
    if (busy) return null;
    busy = true;
    try {
      return await work(...values);
    } finally {
      busy = false;
    }
  };
};

const random = () => crypto.getRandomValues(new Uint32Array(1))[0];

async function queue(requests, place, text) {
  await submit(requests, place);
  select(null);
  announce(text);
}

export const anotherSeed = guarded(async (picture) => {
  const { request, ...place } = await requestOf(picture);
  delete request.seed;
  await queue([request], place, "Another seed was added to the queue.");
});

export const variations = guarded(async (picture) => {
  const { request, ...place } = await requestOf(picture);
  const requests = Array.from({ length: VARIATIONS }, () =>
    ({ ...request, variation_seed: random(), variation_strength: VARIATION_STRENGTH }));
  await queue(requests, place, `${VARIATIONS} variations were added to the queue.`);
});

const without = (request, names) => Object.fromEntries(Object.entries(request).filter(([name]) => !names.includes(name)));

/** Return a request for a picture at twice its size: by a second pass, or from its file where it has had one. */
async function enlarged(picture, request) {
  const own = state.models.find((model) => model.name === picture.model)?.settings ?? {};
  const strength = own.width < SMALL_MODEL ? SMALL_STRENGTH : LARGER_STRENGTH;
  const steps = Math.max(request.steps ?? own.steps ?? 20, Math.ceil(2 / strength)); // of which two are run at least
  if (!request.image && !request.hires) return { ...request, hires: 2, hires_upscale: "pixels", hires_strength: strength, hires_steps: steps };
  const { id } = await upload(await download(picture));
  return { ...without(request, [...OF_IMAGE, ...OF_HIRES]), image: id, width: 2 * picture.width, height: 2 * picture.height, strength, steps };
}

export const hires = guarded(single(async (picture) => {
  const { request, ...place } = await requestOf(picture);
  await queue([await enlarged(picture, request)], place, "A larger version was added to the queue.");
}));

export const useSettings = guarded(async (picture) => {
  take(await requestOf(picture));
  toast("The settings are in the form.");
});

/** Take a file as the picture to start from. */
export const useFile = guarded(async (blob) => {
  const { id, width, height } = await upload(blob);
  set({ image: id, mask: null, outpaint: null, strength: form.request.strength ?? 0.6, ...sizeFor(width, height) });
  document.getElementById("source").scrollIntoView({ block: "nearest", behavior: "smooth" });
  return { id, width, height };
});

/** Return the size of the next picture: the image's own, where it is a size that can be drawn. */
function sizeFor(width, height) {
  const round = (value) => Math.max(64, Math.round(value / 8) * 8);
  return Math.max(width, height) <= 1536 ? { width: round(width), height: round(height) } : {};
}

export const useAsImage = guarded(async (picture) => {
  await useFile(await download(picture));
  toast("The next picture starts from this one.");
});

export const useInControl = guarded(single(async (picture) => (await import("./control.js")).controlWith(picture)));

/** Open the canvas over the picture that the form starts from. */
export const openCanvas = guarded(single(async () => (await import("./canvas.js")).openCanvas({ onDraw: draw })));

export const useInAdapter = guarded(single(async (picture) => (await import("./ip_adapter.js")).adaptWith(picture)));

/** Open the canvas over a picture, with its prompt and settings in the form. */
export const inpaint = guarded(single(async (picture) => {
  const blob = await download(picture);
  const settings = await requestOf(picture).catch(() => null);
  if (settings) {
    take({ ...settings, request: without(settings.request, ["image", "mask", "outpaint", "seed", ...OF_HIRES]) });
  }
  if (await useFile(blob)) await openCanvas();
}));

/** Open the canvas over a file. */
export const inpaintFile = guarded(single(async (file) => {
  if (await useFile(file)) await openCanvas();
}));

const askToVerify = single((picture) => post(`/api/pictures/${picture.id}/verify`));

export const verify = guarded(async (picture) => {
  const job = await askToVerify(picture);
  if (!job) return;
  announce("It is drawn again behind the other jobs, and compared.");
  await ended(job.id);
});

/** Rate a picture with 1 to 5 stars; 0, or as many as it has, takes the rating away. */
export const rate = guarded((picture, stars) => setRating(picture, stars || picture.rating));

export const remove = guarded(single(async (picture) => {
  const place = state.pictures.findIndex((known) => known.id === picture.id);
  const chosen = state.selected?.id === picture.id;
  await deletePicture(picture);
  if (chosen) select(state.pictures[Math.min(place, state.pictures.length - 1)] ?? null);
  toast("Deleted.", { action: "Undo", run: guarded(async () => {
    await restorePicture(picture);
    select(state.pictures.find((known) => known.id === picture.id) ?? null);
  }) });
}));

export const showMaps = guarded(single(async (picture) => {
  (await import("./maps.js")).openMaps(picture); // which says itself how far it is
}));

export const openGrid = guarded(single(async (picture) => {
  if (picture) take(await requestOf(picture));
  (await import("./grid.js")).openGrid();
}));

/** Draw the picture of an example. */
export const tryExample = guarded(async () => {
  set({ prompt: "a lemon on a blue background" });
  await draw();
});

let armed = null;

/** Compare a picture with the next one that is chosen in the gallery. */
export function armCompare(picture) {
  armed = picture;
  document.body.classList.add("comparing");
  toast("Now choose the other picture in the gallery.", { action: "Stop", run: disarm });
}

function disarm() {
  armed = null;
  document.body.classList.remove("comparing");
}

/** Return the picture to compare with, once. */
export function takeArmed() {
  const found = armed;
  disarm();
  return found;
}
