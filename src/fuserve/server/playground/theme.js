// Light, dark, or what the system says. Runs before the first paint, so that nothing flashes.
(() => {
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;
  const show = (theme) => {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) {
      button.title = `Theme: ${theme}`;
      button.setAttribute("aria-label", `Theme: ${theme}`);
    }
  };
  const kept = localStorage.getItem("fuserve.theme");
  show(THEMES.includes(kept) ? kept : "auto");
  addEventListener("DOMContentLoaded", () => {
    show(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", () => {
      const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      localStorage.setItem("fuserve.theme", next);
      show(next);
    });
  });
})();
