// The difference of two texts, word by word.

import { h } from "./dom.js";

/** [[kind, text]] with kind "same", "del" or "ins", by the longest common subsequence of words. */
export function words(before, after) {
  const [a, b] = [split(before), split(after)];
  const length = a.map(() => new Uint16Array(b.length + 1));
  length.push(new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const parts = [];
  const add = (kind, word) => {
    if (parts.at(-1)?.[0] === kind) parts.at(-1)[1].push(word);
    else parts.push([kind, [word]]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) add("same", a[i++]), j++;
    else if (j === b.length || (i < a.length && length[i + 1][j] >= length[i][j + 1])) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  return parts.map(([kind, list]) => [kind, list.join(" ")]);
}

function split(text) {
  return text.split(/\s+/).filter(Boolean);
}

/** The difference as elements: what is gone struck out, what is new underlined. */
export function shown(before, after) {
  return words(before, after).map(([kind, text], i) => [i > 0 && " ", kind === "same" ? text : h(kind, {}, text)]);
}

/**
 * Sentence by sentence: [{ kind, before, after, section }] with kind "same", "edited", "added",
 * "rejected" or "removed".
 */
export function sentences(before, after) {
  const old = new Map(before.map((sentence) => [sentence.id, sentence]));
  const result = after.map((sentence) => {
    const was = old.get(sentence.id);
    old.delete(sentence.id);
    const kind = sentence.status === "rejected" ? "rejected" : !was ? "added" : was.text !== sentence.text ? "edited" : "same";
    return { kind, before: was?.text ?? "", after: sentence.text, section: sentence.section };
  });
  for (const sentence of old.values()) result.push({ kind: "removed", before: sentence.text, after: "", section: sentence.section });
  return result;
}
