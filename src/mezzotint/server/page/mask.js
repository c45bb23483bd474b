// A painted mask: a list of strokes, drawn again on every undo. What is opaque is drawn anew.

/** Return a canvas of a size. */
export function blank(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

export class Mask {
  /** `base` is the image of an earlier mask, white where it was painted, or null. */
  constructor(width, height, base) {
    this.canvas = blank(width, height);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.base = base && withoutBlack(base);
    this.strokes = [];
    this.undone = [];
    this.remake();
  }

  remake() {
    const { width, height } = this.canvas;
    this.context.clearRect(0, 0, width, height);
    if (this.base) this.context.drawImage(this.base, 0, 0, width, height);
    for (const stroke of this.strokes) this.paint(stroke);
  }

  /** Add a stroke: {tool: "brush" or "eraser", size, points}, {tool: "invert"} or {tool: "clear"}. */
  add(stroke) {
    this.strokes.push(stroke);
    this.undone = [];
    this.paint(stroke);
  }

  /** Make the last stroke longer. */
  extend(points) {
    const stroke = this.strokes.at(-1);
    stroke.points.push(...points);
    this.paint(stroke);
  }

  undo() {
    if (this.strokes.length) this.undone.push(this.strokes.pop());
    this.remake();
  }

  redo() {
    if (this.undone.length) this.strokes.push(this.undone.pop());
    this.remake();
  }

  paint({ tool, size, points }) {
    const { context } = this;
    const { width, height } = this.canvas;
    if (tool === "clear") return context.clearRect(0, 0, width, height);
    context.globalCompositeOperation = { invert: "xor", eraser: "destination-out" }[tool] ?? "source-over";
    context.strokeStyle = context.fillStyle = "#fff";
    if (tool === "invert") {
      context.fillRect(0, 0, width, height);
    } else if (points.length === 1) {
      context.beginPath();
      context.arc(...points[0], size / 2, 0, 2 * Math.PI);
      context.fill();
    } else {
      Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round" });
      context.beginPath();
      for (const point of points) context.lineTo(...point);
      context.stroke();
    }
    context.globalCompositeOperation = "source-over";
    return undefined;
  }

  isEmpty() {
    const { width, height } = this.canvas;
    const { data } = this.context.getImageData(0, 0, width, height);
    for (let place = 3; place < data.length; place += 4) if (data[place] > 127) return false;
    return true;
  }

  /** Return the mask as a PNG: white is drawn again, black is kept. */
  blob() {
    const out = blank(this.canvas.width, this.canvas.height);
    const context = out.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, out.width, out.height);
    context.drawImage(this.canvas, 0, 0);
    return new Promise((resolve) => out.toBlob(resolve, "image/png"));
  }
}

/** Return a mask's image without its black. */
function withoutBlack(image) {
  const canvas = blank(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let place = 0; place < pixels.data.length; place += 4) pixels.data[place + 3] = pixels.data[place];
  context.putImageData(pixels, 0, 0);
  return canvas;
}
