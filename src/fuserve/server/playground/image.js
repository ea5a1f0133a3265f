// The image tab: a prompt, its settings, and the picture as it comes.
import { ApiError, streamImage } from "./api.js";
import { apiKey } from "./settings.js";

const byId = (id) => document.getElementById(id);
const KEPT = "fuserve.image";
const MAX_PREVIEWS = 20;
const form = byId("image-form");
const tabs = { chat: byId("chat-tab"), image: byId("image-tab") };
const picture = byId("picture");
const status = byId("image-status");
const bar = byId("image-progress");
const save = byId("image-save");

let model = "";
/** @type {?AbortController} of the picture that is coming */
let painting = null;

/** Offer the tab where there is a model that paints; alone, it is all there is. */
export function showImageModel(name, isAlone) {
  model = name;
  byId("tabs").hidden = !name || isAlone;
  if (name && isAlone) choose("image");
  if (!name) choose("chat");
}

function choose(chosen) {
  for (const [name, tab] of Object.entries(tabs)) {
    tab.setAttribute("aria-selected", String(name === chosen));
    tab.tabIndex = name === chosen ? 0 : -1;
  }
  byId("chat-panel").hidden = chosen !== "chat";
  byId("image-panel").hidden = chosen !== "image";
  for (const id of ["new-chat", "settings-button"]) byId(id).hidden = chosen !== "chat";
  document.body.dataset.tab = chosen;
}

/** The fields that were filled in; all else is left to the server. */
function requestFields() {
  const fields = { model, prompt: form.elements.prompt.value.trim() };
  const negative = form.elements.negative_prompt.value.trim();
  if (negative) fields.negative_prompt = negative;
  for (const name of ["steps", "seed", "guidance_scale"]) {
    const { value } = form.elements[name];
    if (value !== "") fields[name] = Number(value);
  }
  const { width, height } = form.elements;
  if (width.value && height.value) fields.size = `${width.value}x${height.value}`;
  return fields;
}

async function paint() {
  const fields = requestFields();
  if (!fields.prompt || painting) return;
  painting = new AbortController();
  const { signal } = painting;
  const beganMs = performance.now();
  setBusy(true);
  save.hidden = true;
  bar.removeAttribute("value"); // how long the queue is, nobody knows
  say("waiting for the first step…");
  try {
    const body = { ...fields, partial_images: MAX_PREVIEWS };
    for await (const event of streamImage(body, apiKey(), signal)) {
      show(event);
      if (event.type === "image_generation.completed") finish(event, beganMs);
    }
  } catch (error) {
    if (signal.aborted) say("cancelled");
    else say(error instanceof ApiError ? error.message : `The page failed: ${error.message}`, true);
  }
  painting = null;
  setBusy(false);
}

function show(event) {
  picture.src = `data:image/png;base64,${event.b64_json}`;
  const [width, height] = event.size.split("x");
  picture.width = Number(width);
  picture.height = Number(height);
  picture.alt = form.elements.prompt.value.trim();
  picture.hidden = false;
  byId("image-empty").hidden = true;
  bar.max = event.steps;
  bar.value = event.step;
  say(`step ${event.step} of ${event.steps}`);
}

function finish(event, beganMs) {
  const seconds = (performance.now() - beganMs) / 1000;
  say(`${event.steps} steps in ${seconds.toFixed(1)} s · seed ${event.seed}`);
  save.href = picture.src;
  save.download = `fuserve-${event.seed}.png`;
  save.hidden = false;
}

function say(text, isError = false) {
  status.textContent = text;
  status.toggleAttribute("data-failed", isError);
}

function setBusy(busy) {
  byId("image-paint").hidden = busy;
  byId("image-cancel").hidden = !busy;
  bar.hidden = !busy;
  picture.classList.toggle("coming-picture", busy);
}

function keep() {
  localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(new FormData(form))));
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    localStorage.removeItem(KEPT);
  }
  for (const [name, value] of Object.entries(kept)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  paint();
});
form.addEventListener("input", keep);
byId("image-cancel").addEventListener("click", () => painting?.abort("cancelled"));
for (const [name, tab] of Object.entries(tabs)) tab.addEventListener("click", () => choose(name));
byId("tabs").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = tabs.chat.getAttribute("aria-selected") === "true" ? "image" : "chat";
  choose(other);
  tabs[other].focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") painting?.abort("cancelled");
});
restore();
choose("chat");
