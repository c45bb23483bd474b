// Under the prompt: its tokens with their weights and chunks, unknown words, and what looks like a slip.

import { post } from "./api.js";
import { $, debounce, el, icon } from "./dom.js";
import { current, form, modelName } from "./form.js";
import { on } from "./store.js";

let controller = null;

/** Return the tokens of the first text encoder in chunks, whatever parts and variants the prompt has. */
function chunksOf(reply) {
  const clauses = (reply.parts ?? []).flatMap((part) => part.variants?.[0]?.clauses ?? []);
  return clauses.flatMap((clause) => clause.encoders?.[0] ?? []);
}

/** Return the class of a weight: five levels on either side of 1. */
function level(weight) {
  if (Math.abs(weight - 1) < 0.005) return "";
  const distance = Math.min(5, Math.ceil(Math.abs(Math.log(Math.max(Math.abs(weight), 0.05))) / 0.12));
  return `${weight > 1 ? "strong" : "weak"}-${distance}`;
}

function chip(text, tokens, unknown) {
  const weight = tokens[0].weight;
  const title = [`${tokens.length === 1 ? "1 token" : `${tokens.length} tokens`}: ${tokens.map((one) => one.token.replace("</w>", "")).join(" · ")}`,
    level(weight) && `weight ${Number(weight.toFixed(3))}`, unknown && "the model does not know this word"].filter(Boolean).join("\n");
  return el("span", { class: `word ${level(weight)} ${unknown ? "unknown" : ""}`, title },
    el("span", { text }), level(weight) ? el("sup", { text: String(Number(weight.toFixed(2))) }) : null,
    tokens.length > 1 && !level(weight) ? el("sup", { class: "pieces", text: String(tokens.length) }) : null);
}

/** Return the words of a chunk: tokens that follow each other without a gap belong together. */
function wordsOf(tokens, prompt) {
  const words = [];
  for (const token of tokens) {
    const last = words.at(-1);
    const joins = last && token.start !== null && token.start === last.end && !last.closed && token.weight === last.tokens[0].weight;
    if (joins) Object.assign(last, { end: token.end, closed: token.token.endsWith("</w>") }).tokens.push(token);
    else words.push({ start: token.start, end: token.end, tokens: [token], closed: token.token.endsWith("</w>") });
  }
  for (const word of words) {
    word.text = word.start === null || word.start === undefined
      ? word.tokens.map((one) => one.token.replace("</w>", "")).join("") : prompt.slice(word.start, word.end);
  }
  return words;
}

function show(reply, prompt) {
  const chunks = chunksOf(reply);
  const unknown = new Set((reply.unknown ?? []).map((one) => (typeof one === "string" ? one : one.text)).map((text) => text.toLowerCase()));
  const size = reply.window ?? 75;
  const count = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  const points = [...prompt]; // positions are of characters, not of UTF-16 units
  const text = points.length === prompt.length ? prompt : { slice: (start, end) => points.slice(start, end).join("") };
  const line = el("div", { class: "token-line" });
  chunks.forEach((chunk, place) => {
    if (place) line.append(el("span", { class: "chunk-mark", title: `Chunk ${place + 1}: another window of ${size} tokens`, text: String(place + 1) }));
    for (const word of wordsOf(chunk, text)) line.append(chip(word.text, word.tokens, unknown.has(word.text.toLowerCase())));
  });
  const lint = (reply.lint ?? []).map((one) => (typeof one === "string" ? one : one.message));
  const full = chunks.length > 1 || count > size;
  $("words").replaceChildren(line,
    el("div", { class: `token-count ${full ? "full" : ""}`, title: "Tokens, and how many one window of the text encoder holds",
      text: `${count} / ${Math.max(1, chunks.length) * size}${chunks.length > 1 ? ` · ${chunks.length} chunks` : ""}` }),
    ...lint.map((sentence) => el("p", { class: "lint" }, icon("warn"), el("span", { text: sentence }))));
}

async function look() {
  const prompt = form.request.prompt ?? "";
  controller?.abort();
  if (!prompt.trim()) return $("words").replaceChildren();
  controller = new AbortController();
  const body = { prompt, model: modelName() };
  if (form.request.prompt_syntax) body.syntax = form.request.prompt_syntax;
  try {
    show(await post("/api/tokens", body, { signal: controller.signal }), prompt);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("words").replaceChildren(el("p", { class: "lint" }, icon("warn"), el("span", { text: error.message })));
  }
}

let planning = null;

/** Say what memory the run takes, before it is drawn. */
async function plan() {
  planning?.abort();
  planning = new AbortController();
  try {
    const reply = await post("/api/plan", { request: current(), model: modelName() }, { signal: planning.signal });
    $("plan").textContent = reply.sentence.replace(/^needs /, "Needs ");
    $("plan").classList.toggle("bad", !reply.fits);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("plan").textContent = error.message;
    $("plan").classList.add("bad");
  }
}

/** Build the words and the plan. */
export function build() {
  const later = debounce(look, 180);
  const planLater = debounce(plan, 400);
  on("form taken listings", (fields) => {
    if (!fields || "prompt" in fields || "model" in fields || "prompt_syntax" in fields) later();
    if (!fields || Object.keys(fields).some((name) => name !== "prompt" && name !== "negative_prompt" && name !== "seed")) planLater();
  });
}
