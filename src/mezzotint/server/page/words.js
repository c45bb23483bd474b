// Under a prompt: its tokens with their weights and chunks, unknown words, and what looks like a slip.

import { post } from "./api.js";
import { $, debounce, el, icon, iconButton } from "./dom.js";
import { current, form, modelName, ownSettings, vaeName } from "./form.js";
import { on } from "./store.js";

const plain = (token) => token.replace("</w>", "");

/** Return the class of a weight: five levels on either side of 1. */
function level(weight) {
  if (Math.abs(weight - 1) < 0.005) return "";
  const distance = Math.min(5, Math.ceil(Math.abs(Math.log(Math.max(Math.abs(weight), 0.05))) / 0.12));
  return `${weight > 1 ? "strong" : "weak"}-${distance}`;
}

function chip(text, tokens, unknown) {
  const weight = tokens[0].weight;
  const title = [`${tokens.length === 1 ? "1 token" : `${tokens.length} tokens`}: ${tokens.map((one) => plain(one.token)).join(" · ")}`,
    level(weight) && `weight ${Number(weight.toFixed(3))}`, unknown && "the model does not know this word"].filter(Boolean).join("\n");
  return el("span", { class: `word ${level(weight)} ${unknown ? "unknown" : ""}`, title },
    el("span", { text }), level(weight) ? el("sup", { text: String(Number(weight.toFixed(2))) }) : null,
    tokens.length > 1 && !level(weight) ? el("sup", { class: "pieces", text: String(tokens.length) }) : null);
}

/** Return the words of a chunk: tokens that follow each other without a gap belong together, as do an embedding's. */
function wordsOf(tokens, slice) {
  const words = [];
  for (const token of tokens) {
    const last = words.at(-1);
    const follows = last && token.start !== null && token.weight === last.tokens[0].weight &&
      (token.start === last.start || (token.start === last.end && !last.closed));
    if (follows) Object.assign(last, { end: token.end, closed: token.token.endsWith("</w>") }).tokens.push(token);
    else words.push({ start: token.start, end: token.end, tokens: [token], closed: token.token.endsWith("</w>") });
  }
  for (const word of words) {
    word.text = word.start === null || word.start === undefined
      ? word.tokens.map((one) => plain(one.token)).join("") : slice(word.start, word.end);
  }
  return words;
}

/** Return the words of a variant's chunks, with a mark where another window of the text encoder begins. */
function tokenLine(variant, { slice, unknown, size }) {
  const line = el("div", { class: "token-line" });
  variant.clauses.flatMap((clause) => clause.encoders[0]).forEach((chunk, place) => {
    if (place) line.append(el("span", { class: "chunk-mark", title: `Chunk ${place + 1}: another window of ${size} tokens`, text: String(place + 1) }));
    for (const word of wordsOf(chunk, slice)) line.append(chip(word.text, word.tokens, unknown.has(word.text.toLowerCase())));
  });
  return line;
}

/** Return the steps of a variant as people count them: from 1, with ranges. */
function stepsOf(variant) {
  const ranges = variant.steps.map(([first, last]) => (first === last ? `${first + 1}` : `${first + 1}–${last + 1}`));
  return `steps ${ranges.slice(0, 4).join(", ")}${ranges.length > 4 ? ", …" : ""}`;
}

/** Return one part of the prompt (several are joined by AND), with a choice where it changes from step to step. */
function partOf(part, place, parts, { chosen, ...look }) {
  const count = el("div", { class: "token-count", title: "Tokens, and how many one window of the text encoder holds" });
  const box = el("div", { class: "token-part" });
  const show = () => {
    const variant = part.variants[chosen.get(place)] ?? part.variants[0];
    const chunks = variant.clauses.flatMap((clause) => clause.encoders[0]);
    const used = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
    count.textContent = `${used} / ${Math.max(1, chunks.length) * look.size}${chunks.length > 1 ? ` · ${chunks.length} chunks` : ""}`;
    count.classList.toggle("full", chunks.length > 1);
    box.lastChild?.remove();
    box.append(tokenLine(variant, look));
  };
  if (parts.length > 1) {
    box.append(el("span", { class: "part-name", text: place ? `AND${part.weight === 1 ? "" : `, weight ${part.weight}`}` : "First part" }));
  }
  if (part.variants.length > 1) {
    const select = el("select", { class: "variant", "aria-label": "The prompt changes while it is drawn: tokens of" },
      part.variants.map((variant, number) => el("option", { value: String(number), text: `${stepsOf(variant)}: ${variant.text.trim()}` })));
    select.value = String(Math.min(chosen.get(place) ?? 0, part.variants.length - 1));
    select.addEventListener("change", () => (chosen.set(place, Number(select.value)), show()));
    box.append(select);
  }
  box.append(el("span"));
  show();
  return [box, count];
}

/** Return what shows under a prompt how it is read: `name` is its field, `root` the element. */
function reader(name, root) {
  let controller = null;
  let choiceSeed = 0;
  let last = "";
  let chosen = new Map(); // by part: the variant whose tokens are shown

  function show(reply, prompt) {
    const points = [...(reply.choice ?? prompt)]; // positions are of characters, not of UTF-16 units
    const look = { slice: (start, end) => points.slice(start, end).join(""), unknown: new Set(reply.unknown.map((text) => text.toLowerCase())),
      size: reply.window, chosen };
    const choice = reply.choice && el("p", { class: "choice" },
      el("span", { text: form.locked ? "What this seed chooses:" : "One of the choices, which each seed draws anew:" }),
      form.locked ? null : iconButton("die", "Show another choice", () => (choiceSeed++, read()), { id: `other-choice${name === "prompt" ? "" : "-negative"}` }));
    root.replaceChildren(choice || "", ...reply.parts.flatMap((part, place) => partOf(part, place, reply.parts, look)),
      ...reply.lint.map((one) => el("p", { class: "lint" }, icon("warn"), el("span", { text: one.message }))));
  }

  async function read() {
    const prompt = form.request[name] ?? "";
    controller?.abort();
    if (prompt !== last) chosen = new Map();
    last = prompt;
    if (!prompt.trim()) return root.replaceChildren();
    controller = new AbortController();
    const body = { prompt, model: modelName(), negative: name === "negative_prompt", seed: form.locked ? form.request.seed : choiceSeed };
    if (form.request.prompt_syntax) body.syntax = form.request.prompt_syntax;
    const steps = form.request.steps ?? ownSettings().steps;
    if (Number.isInteger(steps) && steps > 0) body.steps = Math.min(150, steps);
    try {
      show(await post("/api/tokens", body, { signal: controller.signal }), prompt);
    } catch (error) {
      if (error.name === "AbortError") return;
      root.replaceChildren(el("p", { class: "lint" }, icon("warn"), el("span", { text: error.message })));
    }
  }

  return read;
}

let planning = null;

/** Say what memory the run takes, before it is drawn. */
async function plan() {
  planning?.abort();
  planning = new AbortController();
  const body = { request: current(), model: modelName(), ...(vaeName() && { vae: vaeName() }) };
  try {
    const reply = await post("/api/plan", body, { signal: planning.signal });
    $("plan").textContent = reply.fits ? reply.sentence.replace(/^needs (.+?) of ([^,]+)/, "Memory: $1 of $2") : reply.sentence;
    $("plan").classList.toggle("bad", !reply.fits);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("plan").textContent = error.message;
    $("plan").classList.add("bad");
  }
}

const OF_WORDS = ["model", "prompt_syntax", "steps", "locked"];

/** Build the words and the plan. */
export function build() {
  const readers = [["prompt", "words"], ["negative_prompt", "negative-words"]].map(([name, root]) =>
    [name, debounce(reader(name, $(root)), 180)]);
  const planLater = debounce(plan, 400);
  on("form taken listings", (fields) => {
    const names = Object.keys(fields ?? {});
    const all = !fields || names.some((name) => OF_WORDS.includes(name)) || (form.locked && names.includes("seed"));
    for (const [name, later] of readers) if (all || names.includes(name)) later();
    if (!fields || names.some((name) => !["prompt", "negative_prompt", "seed", "locked"].includes(name))) planLater();
  });
}
