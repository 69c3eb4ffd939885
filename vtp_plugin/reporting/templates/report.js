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

// Gallery: which questions and which configurations are shown, in which order.
if ($("gallery")) {
  const cards = [...document.querySelectorAll(".card")];
  const chips = [...document.querySelectorAll(".chips input")];
  const page = 30;
  let shown = page;
  const counted = (card, kinds) => card.shownTiles.filter((tile) => kinds.includes(tile.dataset.flip)).length;
  const orders = {
    document: (a, b) => a.dataset.order - b.dataset.order,
    lost: (a, b) => counted(b, ["lost"]) - counted(a, ["lost"]),
    won: (a, b) => counted(b, ["won"]) - counted(a, ["won"]),
    flips: (a, b) => counted(b, ["lost", "won"]) - counted(a, ["lost", "won"]),
  };
  const kinds = { lost: ["lost"], won: ["won"], flips: ["lost", "won"], changed: ["lost", "won", "changed"] };
  const update = () => {
    const on = new Set(chips.filter((chip) => chip.checked).map((chip) => chip.value));
    const words = $("search").value.trim().toLowerCase();
    const wanted = cards.filter((card) => {
      const tiles = [...card.querySelectorAll("[data-cell]")];
      tiles.forEach((tile) => { tile.hidden = !on.has(tile.dataset.cell); });
      card.shownTiles = tiles.filter((tile) => !tile.hidden);
      const flips = $("flips").value;
      return (!$("task").value || card.dataset.task === $("task").value)
        && (flips === "all" || (flips === "same" ? !counted(card, kinds.changed) : counted(card, kinds[flips])))
        && (!words || card.textContent.toLowerCase().includes(words));
    }).sort((a, b) => orders[$("sort").value](a, b) || orders.document(a, b));
    cards.forEach((card) => { card.hidden = true; });
    wanted.slice(0, shown).forEach((card) => { card.hidden = false; });
    $("cards").append(...wanted);
    $("count").value = `${wanted.length} of ${cards.length} questions`;
    $("more").hidden = wanted.length <= shown;
  };
  const again = () => { shown = page; update(); };
  ["task", "flips", "sort"].forEach((id) => $(id).addEventListener("change", again));
  $("search").addEventListener("input", again);
  chips.forEach((chip) => chip.addEventListener("change", again));
  $("layer").addEventListener("change", () => { $("cards").dataset.layer = $("layer").value; });
  $("more").addEventListener("click", () => { shown += page; update(); });
  update();
}
