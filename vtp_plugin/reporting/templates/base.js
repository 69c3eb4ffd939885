"use strict";
const $ = (id) => document.getElementById(id);

// Theme: the reader's system decides until the button is used.
const root = document.documentElement;
const stored = () => { try { return localStorage.getItem("vtp-theme"); } catch { return null; } };
const system = matchMedia("(prefers-color-scheme: dark)");
const themed = (theme) => {
  root.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
};
themed(stored() || (system.matches ? "dark" : "light"));
system.addEventListener("change", (event) => { if (!stored()) themed(event.matches ? "dark" : "light"); });
$("theme").addEventListener("click", () => {
  themed(root.dataset.theme === "dark" ? "light" : "dark");
  try { localStorage.setItem("vtp-theme", root.dataset.theme); } catch { /* private window */ }
});

// Table: a click on a column's head sorts by it.
document.querySelectorAll("thead button").forEach((button) => button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  const key = (row) => row.cells[head.cellIndex].dataset.value;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return down * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  };
  head.closest("tr").querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
  body.append(...[...body.rows].sort(order));
}));
