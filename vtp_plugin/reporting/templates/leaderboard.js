// Which rows are shown.
const rows = [...document.querySelectorAll("tbody tr")];
const filters = ["task", "budget", "family", "model"];
const update = () => {
  const words = $("search").value.trim().toLowerCase();
  let count = 0;
  rows.forEach((row) => {
    const fits = filters.every((name) => !$(name).value || row.dataset[name] === $(name).value);
    const always = row.classList.contains("unpruned") && filters.every((name) => name === "budget" || !$(name).value || row.dataset[name] === $(name).value);
    const shown = (fits || always) && (!words || row.cells[0].textContent.toLowerCase().includes(words));
    row.hidden = !shown;
    count += shown;
  });
  $("count").value = `${count} of ${rows.length} numbers`;
};
filters.forEach((name) => $(name).addEventListener("change", update));
$("search").addEventListener("input", update);
update();

// How a number was made.
document.querySelector("tbody").addEventListener("click", (event) => {
  const how = event.target.closest(".how");
  if (!how) return;
  $("how-command").textContent = commands[how.dataset.command];
  $("how-record").href = how.dataset.record;
  $("how").showModal();
});
$("how-close").addEventListener("click", () => $("how").close());
$("how").addEventListener("click", (event) => { if (event.target === $("how")) $("how").close(); });
$("how-copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText($("how-command").textContent); $("how-copy").textContent = "Copied"; } catch {
    getSelection().selectAllChildren($("how-command"));
  }
});
