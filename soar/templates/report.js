"use strict";
for (const section of document.querySelectorAll("[data-browser]")) {
  const rows = [...section.querySelectorAll("tbody tr")];
  const body = section.querySelector("tbody");
  const text = section.querySelector("[data-filter=text]");
  const selects = [...section.querySelectorAll("select[data-filter]")];
  const shown = section.querySelector("[data-shown]");
  const words = rows.map((row) => row.textContent.toLowerCase());

  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let visible = 0;
    rows.forEach((row, i) => {
      const fits = words[i].includes(wanted)
        && selects.every((s) => s.value === "" || row.dataset[s.dataset.filter] === s.value);
      row.hidden = !fits;
      visible += fits;
    });
    shown.textContent = `${visible} of ${rows.length} shown`;
  };

  const sort = (button) => {
    const head = button.closest("th");
    const key = button.dataset.sort;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of section.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => (row.dataset[key] === "" ? NaN : Number(row.dataset[key]));
    const order = [...rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return down ? y - x : x - y;
    });
    body.append(...order);
  };

  text.addEventListener("input", filter);
  for (const s of selects) s.addEventListener("change", filter);
  for (const b of section.querySelectorAll("button[data-sort]")) b.addEventListener("click", () => sort(b));
  section.querySelector(".controls").hidden = false;
  filter();
}
