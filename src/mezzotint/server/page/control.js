// The ControlNets of a request: for each a picture, a file, and how strongly and when it acts.

import { uploadUrl } from "./api.js";
import { el } from "./dom.js";
import { entrySection } from "./entries.js";
import { form } from "./form.js";

const MODES = [["balanced", "Balanced"], ["prompt", "My prompt is more important"], ["control", "ControlNet is more important"],
  ["guess", "Guess mode"]];
const RESIZE = [["resize", "Just resize"], ["crop", "Crop and resize"], ["fill", "Resize and fill"]];
const TYPES = [["", "None"], ...["openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "repaint"].map((type) => [type, type])];
const LOW = 100; // canny's usual thresholds
const HIGH = 200;

/** Return the address of what the network sees. */
function pictureUrl({ image, preprocessor, low = LOW, high = HIGH }) {
  return preprocessor === "canny" ? `${uploadUrl(image)}/canny?low=${low}&high=${Math.max(low, high)}` : uploadUrl(image);
}

const section = entrySection({
  field: "control", id: "control", name: "ControlNet", listing: "controls", card, pictureUrl,
  without: "The server lists no ControlNet. Start it with --controls FOLDER to have them here.",
  shows: ({ preprocessor, low, high, more }) => [preprocessor, low, high, more],
});

export const controlField = section.build;
export const controlWith = section.useIn;

function threshold(place, name, label, usual) {
  const id = `control-${name}-${place}`;
  const input = el("input", { type: "number", id, min: 0, max: 10000, step: 1, placeholder: String(usual), inputMode: "numeric" });
  input.value = section.entries()[place][name] ?? "";
  input.addEventListener("change", () => section.change(place, { [name]: input.value === "" ? undefined : Number(input.value) }));
  return section.row(id, label, input);
}

/** Return the switch for canny, and its thresholds while it is on. */
function edges(place) {
  const id = `control-canny-${place}`;
  const box = el("input", { type: "checkbox", id });
  box.checked = section.entries()[place].preprocessor === "canny";
  box.addEventListener("change", () => section.change(place, box.checked ? { preprocessor: "canny" }
    : { preprocessor: undefined, low: undefined, high: undefined }));
  return [el("label", { class: "check", for: id, title: "The network gets the edges of the picture: for networks that were trained on them" },
    box, "Find the edges (canny)"),
  box.checked ? el("div", { class: "pair" }, threshold(place, "low", "Low threshold", LOW), threshold(place, "high", "High threshold", HIGH)) : null];
}

function card(place) {
  const { image, type, file, more } = section.entries()[place];
  const union = type !== undefined || /union|promax/i.test(file);
  return [edges(place), [
    image ? null : el("p", { class: "note", text: form.request.image
      ? "Without a picture of its own it takes the one to start from." : "It is used once it has a picture." }),
    more ? el("p", { class: "note", text: `It reads ${more.length} more ${more.length > 1 ? "pictures" : "picture"} in the same pass.` }) : null,
    union ? section.choice(place, "type", "What the picture is (ControlNet Union)", TYPES) : null,
    section.slider(place, "scale", "Weight", { max: 2, usual: 1 }),
    section.steps(place),
    el("div", { class: "pair" }, section.choice(place, "mode", "Control mode", MODES), section.choice(place, "resize_mode", "Resize mode", RESIZE))]];
}
