// What stands beside the canvas: its tools, and the settings of inpainting; and the source under the prompt.

import { openCanvas } from "./actions.js";
import { uploadUrl } from "./api.js";
import { $, el, iconButton, textButton } from "./dom.js";
import { bind, form, number, set, watch } from "./form.js";
import { on } from "./store.js";

const PADDING = 32; // pixels around the mask, as in other programs

/** Build the toolbar of the canvas. */
export function buildTools(root, editor, close) {
  const buttons = {};
  editor.choose = (tool) => {
    editor.tool = tool;
    for (const [name, button] of Object.entries(buttons)) button.setAttribute("aria-pressed", String(name === tool));
    editor.draw();
  };
  for (const [tool, name] of [["brush", "Brush (B)"], ["eraser", "Eraser (E)"], ["hand", "Move the view (H, or hold space)"]]) {
    buttons[tool] = iconButton(tool, name, () => editor.choose(tool), { id: `tool-${tool}` });
  }
  const size = el("input", { type: "range", min: 2, max: 256, id: "brush-size", "aria-label": "Brush size", title: "Brush size ([ and ])" });
  const text = el("output", { class: "tool-size", for: "brush-size" });
  const show = () => {
    size.value = editor.size;
    text.textContent = `${editor.size} px`;
  };
  size.addEventListener("input", () => ((editor.size = Number(size.value)), show(), editor.draw()));
  const before = editor.onchange;
  editor.onchange = () => (before?.(), show());
  show();
  root.append(buttons.brush, buttons.eraser, buttons.hand, el("span", { class: "tool-gap" }), size, text, el("span", { class: "tool-gap" }),
    iconButton("undo", "Undo (Ctrl-Z)", () => editor.undo(), { id: "tool-undo" }),
    iconButton("redo", "Redo (Ctrl-Shift-Z)", () => editor.redo(), { id: "tool-redo" }),
    iconButton("invert", "Invert the mask", () => editor.add({ tool: "invert" }), { id: "tool-invert" }),
    iconButton("trash", "Clear the mask", () => editor.add({ tool: "clear" }), { id: "tool-clear" }),
    el("span", { class: "tool-gap" }),
    iconButton("minus", "Zoom out (-)", () => editor.zoom(0.8)),
    iconButton("plus", "Zoom in (+)", () => editor.zoom(1.25)), iconButton("fit", "Fit (0)", () => editor.fit()),
    el("span", { class: "spacer" }), iconButton("close", "Close (Esc)", close));
  editor.choose("brush");
}

const share = (id, name, label, note) => {
  const range = el("input", { type: "range", id, min: 0, max: 1, step: 0.05 });
  const output = el("output", { for: id });
  watch(name, (value) => {
    range.value = value ?? 0.6;
    output.textContent = Number(range.value).toFixed(2);
  });
  range.addEventListener("input", () => set({ [name]: Number(range.value) }));
  return el("div", { class: "field" }, el("label", { for: id, text: label, title: note }), el("div", { class: "slider" }, range, output));
};

function choice(id, name, label, options) {
  const select = el("select", { id }, options.map(([value, text]) => el("option", { value, text })));
  watch(name, (value) => (select.value = value ?? ""));
  select.addEventListener("change", () => set({ [name]: select.value }));
  return el("div", { class: "field" }, el("label", { for: id, text: label }), select);
}

/** Return the choice of the area that is drawn, and the padding around it where that is the mask's alone. */
function areaFields() {
  const area = el("select", { id: "inpaint-area", title: "Only masked: the painted area alone is drawn, at the full size" },
    el("option", { value: "", text: "Whole picture" }), el("option", { value: "masked", text: "Only masked" }));
  area.addEventListener("change", () => set({ only_masked: area.value ? PADDING : null }));
  const input = el("input", { type: "number", id: "only-masked", min: 0, max: 1024, step: 8 });
  bind(input, "only_masked", number);
  const padding = el("div", { class: "field" }, el("label", { for: input.id, text: "Pixels around the masked area" }), input);
  watch("only_masked", (value) => {
    if (document.activeElement === input) return; // which is empty while another number is written
    area.value = value === undefined ? "" : "masked";
    padding.hidden = !area.value;
  });
  return [el("div", { class: "field" }, el("label", { for: area.id, text: "Inpaint area" }), area), padding];
}

/** Return the settings beside the canvas. */
export function buildOptions(editor, sides, end) {
  const prompt = el("textarea", { id: "canvas-prompt", rows: 3, value: form.request.prompt ?? "", spellcheck: false,
    placeholder: "what the whole picture shows" });
  prompt.addEventListener("input", () => set({ prompt: prompt.value }));
  const blur = el("input", { type: "number", id: "mask-blur", min: 0, max: 64, step: 1, placeholder: "0" });
  bind(blur, "mask_blur", number);
  blur.addEventListener("input", () => editor.draw());
  const [area, padding] = areaFields();
  const inputs = sides.map((side, place) => {
    const input = el("input", { type: "number", id: `side-${side}`, min: 0, max: 1024, step: 8, value: editor.sides[place] });
    input.addEventListener("change", () => {
      editor.sides[place] = Math.max(0, Math.round(Number(input.value) / 8) * 8);
      input.value = editor.sides[place];
      editor.fit();
    });
    return input;
  });
  editor.onchange = () => inputs.forEach((input, place) => (input.value = editor.sides[place]));
  return el("div", { class: "canvas-options" },
    el("div", { class: "field" }, el("label", { for: prompt.id, text: "Prompt" }), prompt),
    share("canvas-strength", "strength", "Strength", "How much may change"),
    choice("masked-content", "masked_content", "Starts from", [["", "The picture"], ["fill", "Surrounding colours"], ["noise", "Noise"]]),
    el("div", { class: "pair" },
      el("div", { class: "field" }, el("label", { for: blur.id, text: "Mask blur" }), blur),
      area),
    padding,
    el("fieldset", { class: "sides" }, el("legend", { text: "Outpaint: drag a side, or write pixels" }),
      inputs.map((input, place) => el("label", {}, el("span", { text: sides[place] }), input))),
    end);
}

/** Say by how much a picture is extended, and where. */
function extension(outpaint) {
  const sides = ["left", "top", "right", "bottom"].map((side, place) => outpaint[place] && `${outpaint[place]} px ${side}`);
  return `Extended: ${sides.filter(Boolean).join(", ")}.`;
}

/** Build the part of the form that shows the picture to start from. */
export function buildSource() {
  const root = $("source");
  const image = el("img", { class: "source-image", alt: "The picture to start from" });
  const mask = el("img", { class: "source-mask", alt: "" });
  const note = el("p", { class: "note" });
  root.append(el("div", { class: "source-plate" }, image, mask), el("div", { class: "source-text" },
    el("strong", { text: "Starts from a picture" }), note, share("strength", "strength", "Strength", "How much may change: 0 nothing, 1 everything"),
    el("div", { class: "row" }, textButton("brush", "Inpaint", openCanvas, { class: "button small", id: "source-inpaint" }),
      textButton("close", "Remove", () => set({ image: null, mask: null, outpaint: null, strength: null, mask_blur: null,
        masked_content: null, only_masked: null, invert_mask: null, width: null, height: null }), { class: "button small", id: "source-remove" }))));
  const show = () => {
    const { image: id, mask: maskId, outpaint } = form.request;
    root.hidden = !id;
    if (!id) return;
    if (!image.src.endsWith(id)) image.src = uploadUrl(id);
    mask.hidden = !maskId;
    if (maskId) mask.src = uploadUrl(maskId);
    note.textContent = [maskId && "The marked area is drawn again.", outpaint && extension(outpaint)].filter(Boolean).join(" ");
  };
  on("form taken", show);
  show();
}
