// The weights of one head as a table with the words at its sides.

class Matrix {
  constructor({ point }) {
    this.table = make("table", {});
    this.name = make("h3", {});
    this.numbers = make("button", { class: "toggle", type: "button", "aria-pressed": "false" }, "Numbers");
    this.numbers.addEventListener("click", () => {
      press(this.numbers, this.numbers.getAttribute("aria-pressed") !== "true");
    });
    this.legend = make("p", { class: "legend" }, make("i", { class: "gold" }), "gold link");
    const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Matrix of weights" });
    scroll.append(this.table);
    const key = make("span", { class: "scale", "aria-hidden": "true" }, "0", make("i"), "1");
    this.box = make(
      "div",
      { class: "panel matrix" },
      make("div", { class: "caption" }, this.name, this.numbers),
      scroll,
      make("div", { class: "foot" }, key, this.legend),
    );
    this.table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td");
      point(cell ? { query: Number(cell.dataset.query), key: Number(cell.dataset.key) } : null);
    });
    this.table.addEventListener("pointerleave", () => point(null));
  }

  start(attention) {
    this.attention = attention;
    const { queries, keys, gold } = attention;
    const heading = (word, scope) =>
      make("th", { scope, title: word }, make("span", { class: "word", dir: "auto" }, visible(word)));
    this.top = keys.map((word) => heading(word, "col"));
    this.side = queries.map((word) => heading(word, "row"));
    this.cells = queries.map((_, query) => keys.map((_, key) => make("td", { "data-query": query, "data-key": key })));
    for (const [query, key] of gold) this.cells[query][key].classList.add("gold");
    const first = make("tr", {}, make("td", { class: "corner" }), ...this.top);
    const rows = this.cells.map((cells, query) => make("tr", {}, this.side[query], ...cells));
    this.table.replaceChildren(make("thead", {}, first), make("tbody", {}, ...rows));
    this.table.style.setProperty("--keys", keys.length);
    this.legend.hidden = gold.length === 0;
  }

  draw(current) {
    this.name.textContent = current.name;
    this.box.style.setProperty("--series", current.color);
    const size = this.attention.keys.length;
    this.cells.forEach((cells, query) =>
      cells.forEach((cell, key) => {
        const weight = current.values[query * size + key];
        cell.textContent = decimals(weight).replace(/^0/, "").replace("1.00", "1");
        cell.style.setProperty("--weight", `${(100 * weight).toFixed(1)}%`);
        cell.classList.toggle("strong", weight > 0.55);
      }),
    );
  }

  mark(place) {
    this.side.forEach((cell, query) => cell.classList.toggle("here", place?.query === query));
    this.top.forEach((cell, key) => cell.classList.toggle("here", place?.key === key));
  }
}
