// The weights of one head as a table with the words at its sides.

class Matrix {
  constructor({ point, pin }) {
    this.table = make("table", {});
    this.name = make("h3", {});
    this.numbers = make("button", { class: "toggle", type: "button", "aria-pressed": "false" }, "Numbers");
    this.numbers.addEventListener("click", () => {
      press(this.numbers, this.numbers.getAttribute("aria-pressed") !== "true");
    });
    this.legend = make("p", { class: "legend" }, make("i", { class: "gold" }), "gold link");
    this.scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Matrix of weights" });
    this.scroll.append(this.table);
    this.canvas = make("canvas");
    this.picture = make("div", { class: "map", title: "queries down, keys across" });
    this.rooted = make("span", {}, ", shaded by the square root");
    const key = make("span", { class: "scale", "aria-hidden": "true" }, "0", make("i"), "1", this.rooted);
    this.box = make(
      "div",
      { class: "panel matrix" },
      make("div", { class: "caption" }, this.name, this.numbers),
      this.scroll,
      this.picture,
      make("div", { class: "foot" }, key, this.legend),
    );
    this.table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td");
      point(cell ? { query: Number(cell.dataset.query), key: Number(cell.dataset.key) } : null);
    });
    this.table.addEventListener("pointerleave", () => point(null));
    const under = ({ offsetX, offsetY }) => {
      const at = (offset, room, count) => Math.max(0, Math.min(count - 1, Math.floor((offset / room) * count)));
      const { queries, keys } = this.attention;
      const { clientWidth, clientHeight } = this.canvas;
      return { query: at(offsetY, clientHeight, queries.length), key: at(offsetX, clientWidth, keys.length) };
    };
    this.canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(under(event)));
    this.canvas.addEventListener("pointerleave", () => point(null));
    this.canvas.addEventListener("click", (event) => pin({ query: under(event).query }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.current && this.draw(this.current));
  }

  start(attention) {
    this.attention = attention;
    const { queries, keys, gold } = attention;
    this.long = isLong(attention);
    this.scroll.hidden = this.numbers.hidden = this.long;
    this.picture.hidden = this.rooted.hidden = !this.long;
    this.picture.replaceChildren(...(this.long ? [this.canvas] : []));
    this.legend.hidden = gold.length === 0 || this.long;
    this.picture.style.aspectRatio = `${keys.length} / ${queries.length}`;
    this.table.replaceChildren();
    if (this.long) return;
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
  }

  draw(current) {
    this.name.textContent = current.name;
    this.box.style.setProperty("--series", current.color);
    this.current = current;
    const size = this.attention.keys.length;
    if (this.long) {
      const bytes = Uint8Array.from(current.values, (weight) => Math.round(255 * weight));
      paintWeights(this.canvas, bytes, this.attention.queries.length, size, Infinity);
      return;
    }
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
    if (this.long) {
      const { queries, keys } = this.attention;
      for (const [side, words] of [["query", queries], ["key", keys]]) {
        const at = place?.[side];
        this.picture.classList.toggle(side, at !== undefined);
        if (at !== undefined) this.picture.style.setProperty(`--${side}`, `${(100 * (at + 0.5)) / words.length}%`);
      }
      return;
    }
    this.side.forEach((cell, query) => cell.classList.toggle("here", place?.query === query));
    this.top.forEach((cell, key) => cell.classList.toggle("here", place?.key === key));
  }
}
