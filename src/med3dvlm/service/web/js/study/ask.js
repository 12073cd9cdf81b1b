// Questions about the study: suggested or one's own, answered word by word, each with its evidence.

import { get, send } from "../api.js";
import { announce, fill, h, icon, iconButton } from "../dom.js";
import * as format from "../format.js";
import { cancel, follow } from "../jobs.js";
import { complain } from "../toast.js";
import { confidence } from "./confidence.js";

export class Ask {
  constructor(study, evidence, { session, signal }) {
    Object.assign(this, { study, evidence, signal });
    this.entries = new Map(); // element by question id
    this.log = h("div", { class: "conversation", role: "log", aria: { label: "Questions and answers" }, tabindex: "0" });
    this.suggestions = h("div", { class: "suggestions", role: "group", aria: { label: "Suggested questions" } });
    this.input = h("textarea", { rows: 2, placeholder: "Ask about this scan", aria: { label: "Question" }, maxlength: "2000", onkeydown: (event) => this.#key(event) });
    this.choices = h("input", { placeholder: "left, right, both", aria: { label: "Choices, separated by commas" } });
    this.offered = h("label", { class: "choices", hidden: true }, "Choices", this.choices);
    const choose = iconButton("list", "Offer choices", () => this.#offer(choose), { "aria-pressed": "false" });
    const may = session.may("studies:ask");
    this.form = h("form", { class: "composer", hidden: !may, onsubmit: (event) => (event.preventDefault(), this.ask(this.input.value)) },
      this.suggestions, this.offered,
      h("div", { class: "compose" }, this.input, h("div", { class: "buttons" }, choose, h("button", { class: "primary", aria: { label: "Ask" } }, icon("send")))));
    this.element = h("div", { class: "ask" }, this.log, this.form);
  }

  async load() {
    const path = `/api/studies/${this.study.id}`;
    const options = { signal: this.signal };
    const [{ questions }, { suggestions }] = await Promise.all([get(`${path}/questions`, options), get(`${path}/suggestions`, options)]);
    if (questions.length === 0) fill(this.log, this.#nothing());
    for (const question of questions) this.#show(question);
    for (const question of questions) if (question.answer === null) this.#follow(question);
    fill(this.suggestions, ...suggestions.map((text) => h("button", { type: "button", class: "suggestion", onclick: () => this.ask(text) }, text)));
    this.#down();
  }

  focus() {
    this.input.focus();
  }

  async ask(text) {
    const choices = this.#offered();
    const words = text.trim();
    if (!words) return;
    try {
      const { question } = await send("POST", `/api/studies/${this.study.id}/questions`, { text: words, ...(choices?.length && { choices }) }, { signal: this.signal });
      if (this.input.value.trim() === words) this.input.value = "";
      this.log.querySelector(".empty")?.remove();
      this.#show(question);
      await this.#follow(question);
    } catch (error) {
      complain(error);
    }
  }

  #offered() {
    if (this.offered.hidden) return null;
    return this.choices.value.split(",").map((choice) => choice.trim()).filter(Boolean);
  }

  async #follow(question) {
    const { job } = question;
    const entry = this.entries.get(question.id);
    const answer = entry.querySelector(".answer");
    const words = h("p", { class: "words streaming" });
    const stop = h("button", { type: "button", class: "quiet", onclick: () => cancel(job).catch(complain) }, "Stop");
    fill(answer, words, h("div", { class: "below" }, stop));
    answer.setAttribute("aria-busy", "true");
    try {
      const done = await follow(job, {
        signal: this.signal,
        onstate: () => words.replaceChildren(),
        ontoken: (text) => (words.append(text), this.#down()),
      });
      this.#answer(answer, done.result);
      announce(`Answer: ${answer.querySelector(".words").textContent}`);
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(answer, h("p", { class: error.cancelled ? "dim" : "problem" }, error.message));
    } finally {
      answer.removeAttribute("aria-busy");
      this.#down();
    }
  }

  #show(question) {
    const answer = h("div", { class: "answer" });
    const entry = h("article", { class: "exchange" },
      h("div", { class: "question" }, h("p", {}, question.text),
        question.choices?.length ? h("p", { class: "dim" }, question.choices.join(" · ")) : null),
      answer);
    this.entries.set(question.id, entry);
    this.log.append(entry);
    if (question.answer !== null) this.#answer(answer, question);
    this.#down();
  }

  #answer(element, question) {
    const { id, text, choices, calibrated, withheld, model, weights, preparation } = question;
    const answer = choices?.find((choice) => question.answer.endsWith(choice)) ?? question.answer; // not "B. right"
    const explain = () => this.evidence.show({ question: id }, `${text} ${answer}`);
    fill(element,
      h("p", { class: "words" }, answer),
      withheld && h("p", { class: "dim" }, "The model is less sure than this server's threshold."),
      this.#shares(question),
      h("div", { class: "below" },
        confidence(question.confidence, calibrated),
        !withheld && h("button", { type: "button", class: "quiet", data: { evidence: id }, aria: { pressed: false }, onclick: explain }, icon("flame"), "Evidence"),
        h("span", { class: "dim figures", title: `Model ${model}, weights ${weights}, preparation ${preparation}` }, `model ${model} · ${format.moment(question.created)}`)));
  }

  /** A figure for each choice: how often such an answer is right, or else the model's own share. */
  #shares({ choices_confidence, choices_likelihood }) {
    const shares = choices_confidence ?? choices_likelihood;
    if (!shares) return null;
    const title = choices_confidence ? "Calibrated" : "The model's own share; not calibrated";
    return h("dl", { class: "shares", title }, Object.entries(shares).map(([choice, share]) =>
      h("div", {}, h("dt", {}, choice), h("dd", { vars: { share: String(share) } }, format.percent(share)))));
  }

  #nothing() {
    return h("div", { class: "empty" }, h("h2", {}, "Ask about this scan"), h("p", {}, "Answers come with their confidence and with what they rest on."));
  }

  #offer(button) {
    this.offered.hidden = !this.offered.hidden;
    button.setAttribute("aria-pressed", String(!this.offered.hidden));
    if (!this.offered.hidden) this.choices.focus();
  }

  #key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), this.form.requestSubmit();
    else if (event.key === "Escape") this.input.blur();
  }

  #down() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Mark the answer whose evidence is shown. */
  mark() {
    for (const button of this.log.querySelectorAll("[data-evidence]"))
      button.setAttribute("aria-pressed", String(this.evidence.current?.key.includes(`"question":"${button.dataset.evidence}"`) ?? false));
  }
}
