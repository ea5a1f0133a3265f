// What the user has chosen. A slider that was never moved leaves the choice to the server.

const KEPT = "fuserve.settings";
const KEPT_KEY = "fuserve.apiKey"; // gone when the tab is closed

const form = document.getElementById("sampling");
const apiKeyField = document.getElementById("api-key");
const sliders = [...form.querySelectorAll("input[type=range]")];

export const apiKey = () => apiKeyField.value.trim();

/** The fields of a request that the settings give. */
export function requestFields() {
  const fields = {};
  for (const slider of sliders) {
    if ("set" in slider.dataset) fields[slider.name] = Number(slider.value);
  }
  for (const name of ["max_tokens", "seed"]) {
    const field = form.elements[name];
    if (field.value !== "" && field.validity.valid) fields[name] = Number(field.value);
  }
  return fields;
}

export const systemPrompt = () => form.elements.system.value.trim();

/** Bring back what was kept, and keep what is changed. `keyChanged` is called for a new key. */
export function startSettings(keyChanged) {
  restore();
  form.addEventListener("input", (event) => {
    if (event.target.type === "range") event.target.dataset.set = "";
    showSliders();
    keep();
  });
  form.addEventListener("reset", () => {
    for (const slider of sliders) delete slider.dataset.set;
    // The fields have their first values only after this event.
    setTimeout(() => {
      apiKeyField.value = sessionStorage.getItem(KEPT_KEY) ?? "";
      showSliders();
      keep();
    });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  apiKeyField.addEventListener("change", () => {
    sessionStorage.setItem(KEPT_KEY, apiKey());
    keyChanged();
  });
}

function keep() {
  const kept = { ...requestFields(), system: form.elements.system.value };
  localStorage.setItem(KEPT, JSON.stringify(kept));
}

function restore() {
  apiKeyField.value = sessionStorage.getItem(KEPT_KEY) ?? "";
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    localStorage.removeItem(KEPT);
  }
  for (const [name, value] of Object.entries(kept)) {
    const field = form.elements[name];
    if (!field) continue;
    field.value = value;
    if (field.type === "range") field.dataset.set = "";
  }
  showSliders();
}

function showSliders() {
  for (const slider of sliders) {
    const shown = form.querySelector(`output[for=${slider.id}]`);
    shown.textContent = "set" in slider.dataset ? Number(slider.value).toFixed(2) : "default";
  }
}
