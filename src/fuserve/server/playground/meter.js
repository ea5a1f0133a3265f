// Time to first token and tokens per second of one answer, while it comes and after.

export class Meter {
  #output;
  #askedMs = performance.now();
  #firstMs = 0;
  #lastMs = 0;
  #tokens = 0;

  constructor(output) {
    this.#output = output;
    this.#output.textContent = "waiting for the first token…";
  }

  /** A piece of text has come; servers send one for nearly every token. */
  count() {
    this.#lastMs = performance.now();
    this.#firstMs ||= this.#lastMs;
    this.#tokens += 1;
  }

  /** The server's own count, which comes with the end of a stream. */
  correct(tokens) {
    if (this.#tokens) this.#tokens = tokens;
  }

  show() {
    if (!this.#tokens) {
      this.#output.textContent = "";
      return;
    }
    const parts = [`first token ${Math.round(this.#firstMs - this.#askedMs)} ms`];
    const seconds = (this.#lastMs - this.#firstMs) / 1000;
    if (this.#tokens > 1 && seconds > 0) {
      parts.push(`${((this.#tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    parts.push(`${this.#tokens} ${this.#tokens === 1 ? "token" : "tokens"}`);
    this.#output.textContent = parts.join(" · ");
  }
}
