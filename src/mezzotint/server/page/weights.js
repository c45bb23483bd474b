// Ctrl-Up and Ctrl-Down in a prompt: the weight of what is selected, or of the word or the <lora:…> at the cursor.

const STEP = 0.1; // of a weight
const LORA_STEP = 0.05;
const MOST = 10;
const EDGE = /[\s,.;!?()[\]{}<>|:]/; // where a word ends

const write = (weight) => String(Number(Math.min(MOST, Math.max(0, weight)).toFixed(2)));

/** Return the range of the word at a place. */
function wordAt(text, place) {
  let [start, end] = [place, place];
  while (start > 0 && !EDGE.test(text[start - 1])) start--;
  while (end < text.length && !EDGE.test(text[end])) end++;
  return [start, end];
}

/** Return the first match of a pattern that holds a range, or undefined. */
const around = (text, pattern, start, end) => [...text.matchAll(pattern)].find((found) =>
  found.index <= start && end <= found.index + found[0].length);

/**
 * Return how a prompt changes when the weight at its selection grows by some steps, or null if nothing is there:
 * `from` and `to`, the range that is replaced by `text`, and the selection afterwards.
 */
export function reweigh(text, start, end, steps) {
  const lora = around(text, /<lora:[^<>:]+:(-?[\d.]+)>/g, start, end);
  if (lora) {
    const from = lora.index + lora[0].lastIndexOf(":") + 1;
    const weight = String(Number((Number(lora[1]) + steps * LORA_STEP).toFixed(2)));
    return { from, to: from + lora[1].length, text: weight, select: [start, end].map((place) => Math.min(place, from)) };
  }
  const known = around(text, /\(([^()]+):([\d.]+)\)/g, start, end);
  if (known) {
    const [whole, words, weight] = known;
    return replace(known.index, known.index + whole.length, words, Number(weight) + steps * STEP);
  }
  const [from, to] = start === end ? wordAt(text, start) : [start, end];
  const words = text.slice(from, to);
  const led = words.length - words.trimStart().length;
  if (!words.trim()) return null;
  return replace(from + led, from + led + words.trim().length, words.trim(), 1 + steps * STEP);
}

function replace(from, to, words, weight) {
  const written = write(weight);
  if (written === "1") return { from, to, text: words, select: [from, from + words.length] };
  return { from, to, text: `(${words}:${written})`, select: [from + 1, from + 1 + words.length] };
}

/** Let the keys change the weights in a prompt; `syntax()` returns how it is read. */
export function listenToWeights(area, syntax) {
  area.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!steps || !(event.ctrlKey || event.metaKey) || event.altKey || !["a1111", "comfy"].includes(syntax())) return;
    event.preventDefault();
    const change = reweigh(area.value, area.selectionStart, area.selectionEnd, steps);
    if (!change) return;
    area.setSelectionRange(change.from, change.to);
    document.execCommand("insertText", false, change.text); // unlike setRangeText, Ctrl-Z takes it back
    area.setSelectionRange(...change.select);
  });
}
