// The page: a conversation, its composer and its settings.
import { ApiError, firstModels, streamChat } from "./api.js";
import { showImageModel } from "./image.js";
import { renderMarkdown } from "./markdown.js";
import { Meter } from "./meter.js";
import { apiKey, requestFields, startSettings, systemPrompt } from "./settings.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");
const question = byId("question");
const settings = byId("settings");
const narrow = matchMedia("(max-width: 860px)");
const NEAR_END_PX = 80;

/** @type {{role: string, content: string}[]} what the model is told; failed turns are not in it */
let history = [];
let model = "";
/** @type {?AbortController} of the answer that is coming */
let running = null;

async function connect() {
  const server = byId("server");
  try {
    const models = await firstModels(apiKey());
    model = models.text;
    showImageModel(models.image, !model);
    byId("model").textContent = [model, models.image].filter(Boolean).join(" · ");
    server.dataset.state = "ready";
  } catch (error) {
    model = "";
    showImageModel("", false);
    server.dataset.state = "failed";
    const wantsKey = error.status === 401 || error.status === 403;
    byId("model").textContent = wantsKey ? "needs an API key" : error.message;
    if (wantsKey) {
      showSettings(true);
      byId("api-key").focus();
    }
  }
}

async function ask(text) {
  byId("welcome")?.remove();
  const turn = addTurn(text);
  const messages = [...history, { role: "user", content: text }];
  const meter = new Meter(byId("meter"));
  running = new AbortController();
  const { signal } = running;
  setBusy(true);
  const answer = { text: "", note: "" };
  try {
    if (!model) await connect();
    await receive(messages, signal, answer, meter, turn);
  } catch (error) {
    // Stopped by the user, or begun anew: what has come stays.
    if (signal.aborted) answer.note = "stopped";
    else showError(turn, error, text);
  }
  if (signal.reason === "new chat") return;
  running = null;
  setBusy(false);
  meter.show();
  finish(turn, answer, messages);
}

/** Read an answer to its end; show it no more often than the screen does. */
async function receive(messages, signal, answer, meter, turn) {
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    if (!turn.article.isConnected) return; // a new chat has begun
    const follow = isNearEnd();
    renderMarkdown(turn.answer, answer.text);
    meter.show();
    if (follow) scrollToEnd();
  };
  const system = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  const body = { model, messages: [...system, ...messages], ...requestFields() };
  try {
    for await (const piece of streamChat(body, apiKey(), signal)) {
      if (piece.text) {
        answer.text += piece.text;
        meter.count();
        drawing ||= requestAnimationFrame(draw);
      }
      if (piece.finishReason === "length") answer.note = "cut off at the limit of tokens";
      if (piece.usage) meter.correct(piece.usage.completion_tokens);
    }
  } finally {
    cancelAnimationFrame(drawing);
    draw();
  }
}

function finish(turn, answer, messages) {
  turn.answer.classList.remove("coming");
  if (turn.failed) return;
  if (answer.note) turn.article.append(withClass("p", "note", answer.note));
  history = [...messages, { role: "assistant", content: answer.text }];
  if (isNearEnd()) scrollToEnd();
}

function addTurn(text) {
  const user = withClass("article", "user", text);
  user.setAttribute("aria-label", "You");
  const article = withClass("article", "assistant");
  article.setAttribute("aria-label", "Model");
  const answer = withClass("div", "answer coming");
  article.append(answer);
  log.append(user, article);
  scrollToEnd();
  return { user, article, answer, failed: false };
}

function showError(turn, error, text) {
  turn.failed = true;
  const box = withClass("div", "error");
  box.setAttribute("role", "alert");
  const message = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
  box.append(withClass("p", "message", message));
  if (error.details?.length) box.append(withClass("p", "details", error.details.join(" · ")));
  const again = withClass("button", "plain", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    if (running) return;
    turn.user.remove();
    turn.article.remove();
    ask(text);
    question.focus();
  });
  box.append(again);
  turn.article.append(box);
  if (error.status === 401) {
    showSettings(true);
    byId("api-key").focus();
  }
  scrollToEnd();
}

function setBusy(busy) {
  log.setAttribute("aria-busy", String(busy));
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

function send() {
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  fitQuestion();
  ask(text);
}

function newChat() {
  running?.abort("new chat");
  running = null;
  setBusy(false);
  history = [];
  log.replaceChildren(welcome);
  byId("meter").textContent = "";
  question.focus();
}

function showSettings(open) {
  settings.hidden = !open;
  byId("settings-button").setAttribute("aria-expanded", String(open));
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

const isNearEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
const scrollToEnd = () => log.scrollTo({ top: log.scrollHeight });

function withClass(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

const welcome = byId("welcome");
for (const suggestion of welcome.querySelectorAll("button")) {
  suggestion.addEventListener("click", () => ask(suggestion.textContent));
}
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => {
  running?.abort("stopped");
  question.focus();
});
byId("new-chat").addEventListener("click", newChat);
byId("settings-button").addEventListener("click", () => showSettings(settings.hidden));
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort("stopped");
  else if (narrow.matches && !settings.hidden) {
    showSettings(false);
    byId("settings-button").focus();
  }
});
startSettings(connect);
showSettings(!narrow.matches);
narrow.addEventListener("change", () => showSettings(!narrow.matches));
connect();
