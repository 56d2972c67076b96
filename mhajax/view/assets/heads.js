// The heads of one kind of attention as small pictures, layers down and heads across, and the list of the chosen ones.

class Heads {
  // choose(head, add), chooseLayer(layer), show(head): what happens on a click.
  constructor({ choose, chooseLayer, show, setSeveral }) {
    this.act = { choose, chooseLayer, show };
    this.grid = make("div", { class: "grid", role: "group", "aria-label": "Heads: layers down, heads across" });
    this.chosen = make("ul", { class: "chosen" });
    this.several = make("button", { class: "toggle", type: "button", "aria-pressed": "false" }, "Several");
    this.several.title = "Each click adds a head or takes it away (so does a click with Shift or Ctrl)";
    this.several.addEventListener("click", () => {
      press(this.several, this.several.getAttribute("aria-pressed") !== "true");
      setSeveral(this.several.getAttribute("aria-pressed") === "true");
    });
    this.box = make(
      "div",
      { class: "panel heads" },
      make("div", { class: "caption" }, make("h3", {}, "Heads"), this.several),
      this.grid,
      this.chosen,
    );
    this.stop = rove(this.grid, () => this.across);
    new ResizeObserver(() => this.kind && this.fit() && this.build()).observe(this.box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.kind && this.paint());
  }

  // How many pictures fit in a row: all heads of a layer, or half of them, or a third, ...; true if that has changed.
  fit() {
    const room = this.box.clientWidth - 28;
    const before = this.across;
    for (let rows = 1; rows <= this.kind.heads; rows++) {
      this.across = Math.ceil(this.kind.heads / rows);
      if (this.across * 24 <= room) break;
    }
    return this.across !== before;
  }

  start(kind, attention) {
    this.kind = kind;
    this.attention = attention;
    this.noted = new Map(kind.notes.map(([layer, head, text]) => [layer * kind.heads + head, text]));
    this.fit();
    this.build();
  }

  build() {
    const { layers, heads } = this.kind;
    const across = this.across;
    this.grid.style.gridTemplateColumns = `1.75rem repeat(${across}, minmax(0, 2.5rem))`;
    const rows = [make("span", { class: "axis" })];
    for (let column = 0; column < across; column++) rows.push(make("span", { class: "axis" }, String(column)));
    this.pictures = [];
    for (let layer = 0; layer < layers; layer++) {
      for (let first = 0; first < heads; first += across) {
        rows.push(first ? make("span", { class: "axis more" }, `+${first}`) : this.layerButton(layer));
        for (let column = 0; column < across; column++) {
          const head = first + column;
          rows.push(head < heads ? this.picture(layer, head) : make("span"));
        }
      }
    }
    this.grid.replaceChildren(...rows);
    this.paint();
    if (this.selection) this.select(...this.selection);
  }

  layerButton(layer) {
    const label = `All heads of layer ${layer}`;
    const options = { class: "axis layer", type: "button", "aria-label": label, title: label };
    return make("button", { ...options, onclick: () => this.act.chooseLayer(layer) }, String(layer));
  }

  picture(layer, number) {
    const head = layer * this.kind.heads + number;
    const note = this.noted.get(head);
    const name = `layer ${layer} · head ${number}`;
    const canvas = make("canvas");
    const button = make(
      "button",
      {
        class: note ? "picture noted" : "picture",
        type: "button",
        "data-rove": "",
        "data-head": head,
        "aria-label": note ? `${name}: ${note}` : name,
        title: note ? `${name}\n${note}` : name,
        onclick: (event) => this.act.choose(head, event.shiftKey || event.ctrlKey || event.metaKey),
      },
      canvas,
    );
    this.pictures[head] = { button, canvas };
    return button;
  }

  paint() {
    const { queries, keys } = this.attention;
    this.pictures.forEach(({ canvas }, head) => {
      paintWeights(canvas, this.attention.bytes(head), queries.length, keys.length, FINE);
    });
  }

  // series: what is drawn, with the heads it stands for; current: the one of them that the matrix shows.
  select(series, current) {
    this.selection = [series, current];
    const color = new Map(series.flatMap((one) => one.heads.map((head) => [head, one.color])));
    this.pictures.forEach(({ button }, head) => {
      press(button, color.has(head));
      button.style.setProperty("--series", color.get(head) ?? "transparent");
    });
    this.stop(this.pictures[series[0].heads[0]].button);
    this.chosen.replaceChildren(...series.map((one) => this.item(one, one === current, series.length > 1)));
  }

  item(one, current, several) {
    const note = one.heads.length === 1 ? this.noted.get(one.heads[0]) : null;
    const name = make(several ? "button" : "span", { class: "name" }, make("i", { class: "swatch" }), one.name);
    const item = make("li", { class: current && several ? "current" : "" }, name);
    item.style.setProperty("--series", one.color);
    if (several) {
      name.type = "button";
      name.title = "Show in the matrix and in numbers";
      press(name, current);
      name.addEventListener("click", () => this.act.show(one.heads[0]));
      const away = { class: "away", type: "button", "aria-label": `Take ${one.name} away` };
      item.append(make("button", { ...away, onclick: () => this.act.choose(one.heads[0], true) }, "×"));
    }
    if (note) item.append(make("p", { class: "note" }, note));
    return item;
  }
}
