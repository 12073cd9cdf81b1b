// How sure the model is, where that was calibrated; and a plain word where it was not.

import { h } from "../dom.js";
import * as format from "../format.js";

const NONE = "This names no finding that the model's confidence was calibrated for.";
const MEANING = "Of answers with this confidence, about this share were right when the model was calibrated.";
const UNCALIBRATED = "This model has no calibration: its own figures say nothing of how often it is right.";

export function confidence(value, calibrated) {
  if (!calibrated) return h("span", { class: "confidence none", title: UNCALIBRATED }, "not calibrated");
  if (value === null || value === undefined) return h("span", { class: "confidence none", title: NONE }, h("span", { class: "unseen" }, "No confidence"), h("span", { aria: { hidden: true } }, "–"));
  return h("span", { class: "confidence", title: MEANING },
    h("span", { class: "meter", aria: { hidden: true }, vars: { share: String(value) } }),
    h("span", { class: "unseen" }, "Confidence "), h("span", { class: "share" }, format.percent(value)));
}
