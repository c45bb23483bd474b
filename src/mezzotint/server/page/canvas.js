// The canvas of inpainting and outpainting: brush, eraser, size, undo, zoom, pan, invert, blur, and sides to drag.
// What is painted is a list of strokes, drawn again on every change; undo drops the last one.

import { upload, uploadUrl } from "./api.js";
import { complain, el, openDialog, textButton } from "./dom.js";
import { form, set } from "./form.js";
import { buildOptions, buildTools } from "./inpaint.js";

const SIDES = ["left", "top", "right", "bottom"];
const MAX_SIZE = 512;

/** Load the picture of an upload. */
async function load(id) {
  const image = new Image();
  image.src = uploadUrl(id);
  await image.decode();
  return image;
}

/** Return a canvas of a size. */
function blank(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

class Editor {
  constructor(image, mask) {
    this.image = image;
    this.base = mask; // a mask that was painted before
    this.strokes = [];
    this.undone = [];
    this.tool = "brush";
    this.size = Math.max(8, Math.round(Math.max(image.naturalWidth, image.naturalHeight) / 10));
    this.sides = [...(form.request.outpaint ?? [0, 0, 0, 0])];
    this.view = { scale: 1, x: 0, y: 0 };
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    this.mask = blank(this.width, this.height);
    this.tint = blank(this.width, this.height);
    this.canvas = el("canvas", { class: "canvas", id: "canvas", tabIndex: 0, role: "img",
      "aria-label": "Canvas: paint over what is to be drawn again" });
    this.pointers = new Map();
    this.listen();
  }

  // ---- the mask ----

  paint(context, stroke) {
    if (stroke.tool === "invert") return this.invert(context);
    if (stroke.tool === "clear") return context.clearRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = stroke.tool === "eraser" ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = "#fff";
    context.lineWidth = stroke.size;
    context.lineCap = context.lineJoin = "round";
    const [[x, y], ...rest] = stroke.points;
    context.beginPath();
    if (!rest.length) {
      context.arc(x, y, stroke.size / 2, 0, 2 * Math.PI);
      context.fill();
    } else {
      context.moveTo(x, y);
      for (const point of rest) context.lineTo(...point);
      context.stroke();
    }
    context.globalCompositeOperation = "source-over";
    return undefined;
  }

  invert(context) {
    context.globalCompositeOperation = "xor";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "source-over";
  }

  remake() {
    const context = this.mask.getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    if (this.base) context.drawImage(this.base, 0, 0);
    for (const stroke of this.strokes) this.paint(context, stroke);
    this.draw();
  }

  add(stroke) {
    this.strokes.push(stroke);
    this.undone = [];
    this.paint(this.mask.getContext("2d"), stroke);
    this.draw();
  }

  undo() {
    if (this.strokes.length) this.undone.push(this.strokes.pop());
    this.remake();
  }

  redo() {
    if (this.undone.length) this.strokes.push(this.undone.pop());
    this.remake();
  }

  resizeBrush(factor) {
    this.size = Math.round(Math.min(MAX_SIZE, Math.max(2, this.size * factor + (factor > 1 ? 1 : -1))));
    this.onchange?.();
    this.draw();
  }

  isEmpty() {
    const { data } = this.mask.getContext("2d").getImageData(0, 0, this.width, this.height);
    for (let place = 3; place < data.length; place += 4) if (data[place] > 127) return false;
    return true;
  }

  /** Return the mask as a PNG: white is drawn again, black is kept. */
  blob() {
    const out = blank(this.width, this.height);
    const context = out.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.width, this.height);
    context.drawImage(this.mask, 0, 0);
    return new Promise((resolve) => out.toBlob(resolve, "image/png"));
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
    context.imageSmoothingEnabled = view.scale < 6;
    context.drawImage(this.image, 0, 0);
    const tint = this.tint.getContext("2d");
    tint.globalCompositeOperation = "copy";
    tint.drawImage(this.mask, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = accent;
    tint.fillRect(0, 0, this.width, this.height);
    context.globalAlpha = 0.62;
    const blur = form.request.mask_blur ?? 0;
    if (blur) context.filter = `blur(${blur * view.scale * ratio}px)`;
    context.drawImage(this.tint, 0, 0);
    context.filter = "none";
    context.globalAlpha = 1;
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
      const stroke = this.strokes.at(-1);
      for (const each of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(this.at(each));
      if (stroke.points.at(-1) !== this.cursor) stroke.points.push(this.cursor);
      this.paint(this.mask.getContext("2d"), stroke);
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

/** Return a mask without its black. */
function withoutBlack(image) {
  const canvas = blank(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let place = 0; place < pixels.data.length; place += 4) pixels.data[place + 3] = pixels.data[place];
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Open the canvas over the form's picture; `onDraw` queues the form. */
export async function openCanvas({ onDraw }) {
  const image = await load(form.request.image);
  const mask = form.request.mask ? withoutBlack(await load(form.request.mask)) : null;
  const editor = new Editor(image, mask);
  const keep = async () => {
    const empty = editor.isEmpty();
    const id = empty ? null : (await upload(await editor.blob())).id;
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
  const dialog = openDialog("Inpaint", content, { bare: true, onclose: () => observer.disconnect() });
  buildTools(tools, editor, () => dialog.close());
  const observer = new ResizeObserver(() => editor.fit());
  observer.observe(editor.canvas);
  editor.remake();
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
