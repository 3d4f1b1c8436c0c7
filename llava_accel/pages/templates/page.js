"use strict";
// Escape closes an enlarged image. Without this script another click does.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const box of document.querySelectorAll(".zoom input:checked")) box.checked = false;
});
// The filters of the gallery. Without this script the page shows everything.
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const cards = Array.from(gallery.querySelectorAll("article"), (element) => ({
    element,
    tags: new Set(JSON.parse(element.dataset.tags)),
    text: element.textContent.toLocaleLowerCase(),
  }));
  const buttons = Array.from(document.querySelectorAll("button[data-tag]"));
  const lists = Array.from(document.querySelectorAll("select[data-group]"));
  const search = document.getElementById("search");
  const clear = document.getElementById("clear");
  const shown = document.getElementById("shown");
  const none = document.getElementById("none");
  const chosen = new Map(); // group -> tag

  function update() {
    const words = search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const tags = Array.from(chosen.values());
    let count = 0;
    for (const card of cards) {
      const fits = tags.every((tag) => card.tags.has(tag)) && words.every((word) => card.text.includes(word));
      card.element.hidden = !fits;
      count += fits ? 1 : 0;
    }
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(chosen.get(button.dataset.group) === button.dataset.tag));
    }
    for (const list of lists) list.value = chosen.get(list.dataset.group) ?? "";
    const filtered = tags.length > 0 || words.length > 0;
    shown.textContent = filtered ? `${count} of ${cards.length} shown` : `${cards.length} shown`;
    clear.hidden = !filtered;
    none.hidden = count > 0;
  }

  function choose(group, tag) {
    if (!tag || chosen.get(group) === tag) chosen.delete(group);
    else chosen.set(group, tag);
    update();
  }

  for (const button of buttons) {
    button.addEventListener("click", () => choose(button.dataset.group, button.dataset.tag));
  }
  for (const list of lists) list.addEventListener("change", () => choose(list.dataset.group, list.value));
  search.addEventListener("input", update);
  clear.addEventListener("click", () => {
    chosen.clear();
    search.value = "";
    update();
  });
})();
