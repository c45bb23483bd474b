// The canvas of inpainting and outpainting: the picture with its mask, zoom and pan, and sides to drag.

import { upload, uploadUrl } from "./api.js";
import { complain, el, openDialog, textButton, toast } from "./dom.js";
import { form, set } from "./form.js";
import { buildOptions, buildTools } from "./inpaint.js";
import { blank, Mask } from "./mask.js";

const SIDES = ["left", "top", "right", "bottom"];
const MAX_SIZE = 512; // of the brush
const PIXELS = 10; // screen pixels to one of the picture, from which it is shown without smoothing
const STRIPE = 7; // pixels of the screen: stripes of two tones are seen on any picture

/** Load the picture of an upload. */
async function load(id) {
  const image = new Image();
  image.src = uploadUrl(id);
  await image.decode();
  return image;
}

class Editor {
  constructor(image, mask) {
    this.image = image;
    this.tool = "brush";
    this.size = Math.max(8, Math.round(Math.max(image.naturalWidth, image.naturalHeight) / 10));
    this.sides = [...(form.request.outpaint ?? [0, 0, 0, 0])];
    this.view = { scale: 1, x: 0, y: 0 };
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    this.mask = new Mask(this.width, this.height, mask);
    this.tint = blank(1, 1);
    this.canvas = el("canvas", { class: "canvas", id: "canvas", tabIndex: 0, role: "img",
      "aria-label": "Canvas: paint over what is to be drawn again" });
    this.pointers = new Map();
    this.listen();
  }

  add(stroke) {
    this.mask.add(stroke);
    this.draw();
  }

  /** Return whether there is something to keep. */
  isChanged() {
    const before = form.request.outpaint ?? [0, 0, 0, 0];
    return this.mask.strokes.length > 0 || this.sides.some((side, place) => side !== before[place]);
  }

  undo() {
    this.mask.undo();
    this.draw();
  }

  redo() {
    this.mask.redo();
    this.draw();
  }

  resizeBrush(factor) {
    this.size = Math.round(Math.min(MAX_SIZE, Math.max(2, this.size * factor + (factor > 1 ? 1 : -1))));
    this.onchange?.();
    this.draw();
  }

  // ---- the view ----

  /** Return the whole picture with its added sides: left, top, right, bottom in pixels of the picture. */
  frame() {
    const [left, top, right, bottom] = this.sides;
    return [-left, -top, this.width + right, this.height + bottom];
  }

  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    const [left, top, right, bottom] = this.frame();
    const room = 36;
    this.view.scale = Math.min((clientWidth - 2 * room) / (right - left), (clientHeight - 2 * room) / (bottom - top), 16);
    this.view.x = (clientWidth - (right - left) * this.view.scale) / 2 - left * this.view.scale;
    this.view.y = (clientHeight - (bottom - top) * this.view.scale) / 2 - top * this.view.scale;
    this.draw();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.min(32, Math.max(0.05, this.view.scale * factor));
    this.view.x = x - ((x - this.view.x) * scale) / this.view.scale;
    this.view.y = y - ((y - this.view.y) * scale) / this.view.scale;
    this.view.scale = scale;
    this.draw();
  }

  draw() {
    cancelAnimationFrame(this.frameId);
    this.frameId = requestAnimationFrame(() => this.render());
  }

  render() {
    const { canvas, view } = this;
    const ratio = devicePixelRatio || 1;
    const [across, down] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== across || canvas.height !== down) Object.assign(canvas, { width: across, height: down });
    if (!across || !down) return; // the dialog is closed
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, across, down);
    context.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    const [left, top, right, bottom] = this.frame();
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    context.fillStyle = accent;
    context.globalAlpha = 0.25;
    context.fillRect(left, top, right - left, bottom - top);
    context.globalAlpha = 1;
    context.imageSmoothingEnabled = view.scale < PIXELS;
    context.drawImage(this.image, 0, 0);
    this.drawMask(context, ratio);
    this.drawHandles(context, left, top, right, bottom, accent);
    if (this.cursor && (this.tool === "brush" || this.tool === "eraser")) {
      for (const [style, extra] of [["#000", 1.5], ["#fff", 0]]) {
        context.strokeStyle = style;
        context.lineWidth = 1.5 / view.scale;
        context.beginPath();
        context.arc(...this.cursor, this.size / 2 + extra / view.scale, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  }

  /** Draw the mask in stripes, with the blur that it will have. */
  drawMask(context, ratio) {
    const { width, height } = context.canvas;
    if (this.tint.width !== width || this.tint.height !== height) this.tint = blank(width, height);
    const tint = this.tint.getContext("2d");
    tint.globalCompositeOperation = "copy";
    tint.setTransform(context.getTransform());
    const blur = form.request.mask_blur ?? 0;
    tint.filter = blur ? `blur(${blur * this.view.scale * ratio}px)` : "none";
    tint.drawImage(this.mask.canvas, 0, 0);
    tint.filter = "none";
    tint.setTransform(1, 0, 0, 1, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = tint.createPattern(stripes(Math.round(STRIPE * ratio)), "repeat");
    tint.fillRect(0, 0, width, height);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = 0.66;
    context.drawImage(this.tint, 0, 0);
    context.restore();
  }

  drawHandles(context, left, top, right, bottom, accent) {
    const line = 1 / this.view.scale;
    context.strokeStyle = accent;
    context.lineWidth = 1.5 * line;
    context.strokeRect(left, top, right - left, bottom - top);
    for (const [x, y, upright] of this.handles(left, top, right, bottom)) {
      const [long, short] = [34 * line, 8 * line];
      const [w, h] = upright ? [short, long] : [long, short];
      context.fillStyle = accent;
      context.beginPath();
      context.roundRect(x - w / 2, y - h / 2, w, h, short / 2);
      context.fill();
    }
  }

  handles(left, top, right, bottom) {
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    return [[left, y, true], [x, top, false], [right, y, true], [x, bottom, false]];
  }

  // ---- pointers ----

  at(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [(event.clientX - left - this.view.x) / this.view.scale, (event.clientY - top - this.view.y) / this.view.scale];
  }

  handleAt([x, y]) {
    const reach = 22 / this.view.scale;
    return this.handles(...this.frame()).findIndex(([hx, hy]) => Math.hypot(hx - x, hy - y) < reach);
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => ((this.cursor = null), this.draw()));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { left, top } = canvas.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 500), event.clientX - left, event.clientY - top);
    }, { passive: false });
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus({ preventScroll: true });
    this.pointers.set(event.pointerId, event);
    const point = this.at(event);
    if (this.pointers.size === 2) return this.cancelStroke();
    const side = this.handleAt(point);
    if (event.button === 1 || this.tool === "hand" || this.space) this.action = { kind: "pan", last: event };
    else if (side >= 0) this.action = { kind: "side", side };
    else {
      this.action = { kind: "paint" };
      this.add({ tool: this.tool, size: this.size, points: [point] });
    }
    return undefined;
  }

  cancelStroke() {
    if (this.action?.kind === "paint") this.undo();
    this.action = { kind: "pinch" };
  }

  moved(event) {
    this.cursor = this.at(event);
    const before = this.pointers.get(event.pointerId);
    if (before && this.action?.kind === "pan") {
      this.view.x += event.clientX - before.clientX;
      this.view.y += event.clientY - before.clientY;
    } else if (before && this.action?.kind === "pinch") {
      this.pinch(event, before);
    } else if (this.action?.kind === "side") {
      this.drag(this.action.side, this.cursor);
    } else if (this.action?.kind === "paint") {
      const between = event.getCoalescedEvents?.() ?? [];
      this.mask.extend([...between.map((each) => this.at(each)), this.cursor]);
    }
    if (before) this.pointers.set(event.pointerId, event);
    else this.canvas.style.cursor = this.tool === "hand" || this.space ? "grab" : this.handleAt(this.cursor) >= 0 ? "move" : "none";
    this.draw();
  }

  pinch(event, before) {
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (!other) return;
    const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    const { left, top } = this.canvas.getBoundingClientRect();
    this.view.x += (event.clientX - before.clientX) / 2;
    this.view.y += (event.clientY - before.clientY) / 2;
    this.zoom(distance(event) / Math.max(1, distance(before)), (event.clientX + other.clientX) / 2 - left, (event.clientY + other.clientY) / 2 - top);
  }

  drag(side, [x, y]) {
    const wanted = [-x, -y, x - this.width, y - this.height][side];
    this.sides[side] = Math.min(1024, Math.max(0, Math.round(wanted / 8) * 8));
    this.onchange?.();
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (!this.pointers.size) this.action = null;
  }
}

/** Return a tile of diagonal stripes in two tones, which repeats. */
function stripes(side) {
  const tile = blank(2 * side, 2 * side);
  const context = tile.getContext("2d");
  context.fillStyle = "#4a1fd6";
  context.fillRect(0, 0, 2 * side, 2 * side);
  context.fillStyle = "#b9a5ff";
  for (const shift of [-2 * side, 0, 2 * side]) {
    context.beginPath();
    for (const [x, y] of [[0, 0], [side, 0], [-side, 2 * side], [-2 * side, 2 * side]]) context.lineTo(x + shift + side, y);
    context.fill();
  }
  return tile;
}

/** Open the canvas over the form's picture; `onDraw` queues the form. */
export async function openCanvas({ onDraw }) {
  const image = await load(form.request.image);
  const mask = form.request.mask ? await load(form.request.mask) : null;
  const editor = new Editor(image, mask);
  const source = form.request.image;
  let kept = false;
  const keep = async () => {
    kept = true;
    const id = editor.mask.isEmpty() ? null : (await upload(await editor.mask.blob())).id;
    const extended = editor.sides.some((side) => side > 0);
    const [left, top, right, bottom] = editor.frame();
    const size = extended ? { width: Math.round((right - left) / 8) * 8, height: Math.round((bottom - top) / 8) * 8 } : {};
    set({ mask: id, outpaint: extended ? editor.sides : null, ...(extended && { only_masked: null }), ...size });
    dialog.close();
  };
  const finish = (then) => keep().then(then).catch(complain);
  const tools = el("div", { class: "canvas-tools", role: "toolbar", "aria-label": "Canvas tools" });
  const content = el("div", { class: "canvas-page" }, tools, editor.canvas,
    buildOptions(editor, SIDES, el("div", { class: "canvas-end" },
      textButton("", "Keep the mask", () => finish(() => {}), { id: "canvas-keep" }),
      textButton("brush", "Draw", () => finish(onDraw), { class: "primary", id: "canvas-draw", title: "Ctrl-Enter" }))));
  const onclose = () => {
    observer.disconnect();
    if (kept || !editor.isChanged()) return;
    toast("The canvas was closed without keeping its changes.", { action: "Keep them", run: () => form.request.image === source && finish(() => {}) });
  };
  const dialog = openDialog("Inpaint", content, { bare: true, onclose });
  buildTools(tools, editor, () => dialog.close());
  const observer = new ResizeObserver(() => editor.fit());
  observer.observe(editor.canvas);
  editor.canvas.focus();
  dialog.addEventListener("keydown", (event) => canvasKey(event, editor, () => finish(onDraw)));
  dialog.addEventListener("keyup", (event) => event.key === " " && (editor.space = false));
}

/** Handle a key of the canvas. */
function canvasKey(event, editor, finish) {
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.key !== "Enter") return;
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key === "Enter") finish();
  else if (command && event.key.toLowerCase() === "z") event.shiftKey ? editor.redo() : editor.undo();
  else if (command) return;
  else if (event.key === "[") editor.resizeBrush(1 / 1.15);
  else if (event.key === "]") editor.resizeBrush(1.15);
  else if (event.key === "b") editor.choose("brush");
  else if (event.key === "e") editor.choose("eraser");
  else if (event.key === "h") editor.choose("hand");
  else if (event.key === "+" || event.key === "=") editor.zoom(1.25);
  else if (event.key === "-") editor.zoom(0.8);
  else if (event.key === "0") editor.fit();
  else if (event.key === " " && event.target === editor.canvas) editor.space = true;
  else return;
  event.preventDefault();
  event.stopPropagation();
}
