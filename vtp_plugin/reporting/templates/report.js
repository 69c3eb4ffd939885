// Gallery: which questions and which configurations are shown, in which order.
if ($("gallery")) {
  const cards = [...document.querySelectorAll(".card")];
  const chips = [...document.querySelectorAll(".chips input")];
  const page = 30;
  let shown = page, wanted = cards;
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
    wanted = cards.filter((card) => {
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
  const layered = (layer) => { $("layer").value = $("gallery").dataset.layer = layer; };
  ["task", "flips", "sort"].forEach((id) => $(id).addEventListener("change", again));
  $("search").addEventListener("input", again);
  chips.forEach((chip) => chip.addEventListener("change", again));
  $("layer").addEventListener("change", () => layered($("layer").value));
  $("more").addEventListener("click", () => { shown += page; update(); });
  update();

  // One picture, enlarged: arrows go from configuration to configuration and from question to question.
  const tilesOf = (card) => [...card.querySelectorAll(".tile")].filter((tile) => !tile.hidden && tile.querySelector(".open"));
  const addressed = (tile) => `#${tile.closest(".card").id}/${tile.dataset.cell || "none"}`;
  const at = (address) => history.replaceState(null, "", address || location.pathname + location.search);
  let big = null;
  const enlarge = (tile) => {
    big = tile;
    const card = tile.closest(".card"), copy = $("big-tile"), pics = document.createElement("div");
    const all = [...tile.querySelectorAll(".pic")];
    pics.className = all.length > 1 ? "pics several" : "pics";
    pics.append(...all.map((pic) => { const one = pic.cloneNode(true); one.classList.remove("other"); return one; }));
    copy.className = tile.className;
    copy.replaceChildren(pics, tile.querySelector("figcaption").cloneNode(true));
    $("big-title").textContent = card.querySelector("h3 span").textContent;
    $("big-what").replaceChildren(...[...card.querySelector(".what").childNodes].map((node) => node.cloneNode(true)));
    $("big-link").href = addressed(tile);
    at(addressed(tile));
    if (!$("big").open) $("big").showModal();
  };
  const step = (across, down) => {
    const card = big.closest(".card"), tiles = tilesOf(card), place = tiles.indexOf(big);
    if (across) return enlarge(tiles[(place + across + tiles.length) % tiles.length]);
    const next = wanted[wanted.indexOf(card) + down];
    if (!next) return undefined;
    const others = tilesOf(next);
    return others.length ? enlarge(others.find((tile) => tile.dataset.cell === big.dataset.cell) || others[0]) : undefined;
  };
  $("cards").addEventListener("click", (event) => {
    const open = event.target.closest(".open");
    if (open) enlarge(open.closest(".tile"));
  });
  $("big-close").addEventListener("click", () => $("big").close());
  $("big-before").addEventListener("click", () => step(-1, 0));
  $("big-next").addEventListener("click", () => step(1, 0));
  $("big").addEventListener("click", (event) => { if (event.target === $("big")) $("big").close(); });
  $("big").addEventListener("close", () => { at(""); if (big.checkVisibility()) big.querySelector(".open").focus(); });

  // Keys.
  const layers = [...$("layer").options].map((option) => option.value);
  const turn = () => layered(layers[(layers.indexOf($("layer").value) + 1) % layers.length]);
  const aim = (card, more) => {  // cards on the way get their real heights only when they are passed
    card.scrollIntoView({ block: "start", behavior: "instant" });
    if (more) requestAnimationFrame(() => aim(card, more - 1));
  };
  const reveal = (card) => {
    while (card.hidden && wanted.includes(card)) { shown += page; update(); }
    aim(card, 4);
    const first = tilesOf(card)[0];
    if (first && !$("big").open) first.querySelector(".open").focus({ preventScroll: true });
  };
  const walk = (down) => {
    const now = document.activeElement.closest(".card");
    const next = now ? wanted[wanted.indexOf(now) + down] : wanted[0];
    if (next) reveal(next);
  };
  const beside = (across) => {
    const tile = document.activeElement.closest(".tile");
    const tiles = tile ? tilesOf(tile.closest(".card")) : [];
    const next = tiles[tiles.indexOf(tile) + across];
    if (next) next.querySelector(".open").focus();
  };
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const keys = { j: () => walk(1), k: () => walk(-1), o: turn, "/": () => $("search").focus() };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const arrow = arrows[event.key], opened = $("big").open;
    if (arrow && opened) step(...arrow);
    else if (arrow && arrow[0] && event.target.closest(".open")) beside(arrow[0]);
    else if (keys[event.key] && (!opened || event.key === "o")) keys[event.key]();
    else return;
    event.preventDefault();
  });

  // A link to a question, or to one picture of it.
  const follow = () => {
    const [id, cell] = decodeURIComponent(location.hash.slice(1)).split("/");
    const card = cards.find((one) => one.id === id);
    if (!card) return;
    if ($("big").open) $("big").close();
    if (!wanted.includes(card)) {
      $("task").value = $("search").value = "";
      $("flips").value = "all";
      update();
    }
    cards.forEach((one) => one.classList.toggle("aimed", one === card));
    reveal(card);
    const tile = tilesOf(card).find((one) => (one.dataset.cell || "none") === cell);
    if (tile) enlarge(tile);
  };
  window.addEventListener("hashchange", follow);
  follow();
}
