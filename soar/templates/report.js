"use strict";
const PAGE = 25;
for (const section of document.querySelectorAll("[data-browser]")) {
  const rows = [...section.querySelectorAll("tbody tr")];
  let first = 0;
  const body = section.querySelector("tbody");
  const text = section.querySelector("[data-filter=text]");
  const shown = section.querySelector("[data-shown]");
  const place = section.querySelector("[data-place]");
  const turns = [...section.querySelectorAll("button[data-turn]")];
  const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const show = () => {
    const wanted = text.value.trim().toLowerCase();
    const fits = rows.filter((row) => words.get(row).includes(wanted));
    first = Math.max(0, Math.min(first, PAGE * Math.floor((fits.length - 1) / PAGE)));
    const page = new Set(fits.slice(first, first + PAGE));
    for (const row of rows) row.hidden = !page.has(row);
    shown.textContent = `${fits.length} of ${rows.length} match`;
    place.textContent = fits.length ? `${first + 1}\u2013${first + page.size}` : "none";
    for (const button of turns) {
      const to = first + PAGE * Number(button.dataset.turn);
      button.disabled = to < 0 || to >= fits.length;
    }
  };

  const filter = () => { first = 0; show(); };

  const turn = (button) => {
    first += PAGE * Number(button.dataset.turn);
    show();
    section.querySelector(".scroll").scrollTop = 0;
  };

  const sort = (button) => {
    const head = button.closest("th");
    const key = button.dataset.sort;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of section.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => (row.dataset[key] === "" ? NaN : Number(row.dataset[key]));
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return down ? y - x : x - y;
    });
    body.append(...rows);
    filter();
  };

  text.addEventListener("input", filter);
  for (const b of turns) b.addEventListener("click", () => turn(b));
  for (const b of section.querySelectorAll("button[data-sort]")) b.addEventListener("click", () => sort(b));
  for (const part of section.querySelectorAll(".controls, .pages")) part.hidden = false;
  show();
}
