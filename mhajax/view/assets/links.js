// Queries on the left, keys on the right, and a line for every weight between them.

const ROW = 26; // px, as in the style
const FAINT = 0.03; // weights below it are not drawn until their word is pointed at

class Links {
  // point(place or null): the pointer or the focus is on a word; pin(place): a word was clicked.
  constructor({ point, pin, unit }) {
    this.unit = unit;
    this.act = { point, pin };
    this.columns = make("div", { class: "columns" });
    this.status = make("p", { class: "status", "aria-live": "polite" });
    const heading = make("h3", {}, `${unit[0].toUpperCase()}${unit.slice(1)}s`);
    this.sides = make("span", { class: "sides" });
    this.box = make(
      "div",
      { class: "panel links" },
      make("div", { class: "caption" }, heading, this.sides),
      this.columns,
      this.status,
    );
  }

  start(attention) {
    this.attention = attention;
    this.long = isLong(attention);
    this.columns.classList.toggle("flow", this.long);
    this.sides.textContent = this.long ? "choose a query; the keys are shaded" : "query → key";
    this.gold = new Set(attention.gold.map(([query, key]) => `${query} ${key}`));
    this.words = { query: this.column("query", attention.queries), key: this.column("key", attention.keys) };
    const rows = Math.max(attention.queries.length, attention.keys.length);
    const picture = make("template");
    picture.innerHTML = `<svg viewBox="0 0 100 ${rows * ROW}" preserveAspectRatio="none" aria-hidden="true"></svg>`;
    this.svg = picture.content.firstChild;
    this.svg.style.height = `${rows * ROW}px`;
    this.svg.toggleAttribute("hidden", this.long);
    this.columns.replaceChildren(this.words.query.box, this.svg, this.words.key.box);
  }

  column(side, words) {
    const label = side === "query" ? "Queries: who looks" : "Keys: who is looked at";
    const box = make("div", { class: `words ${side}`, role: "group", "aria-label": label });
    const buttons = words.map((word, index) => {
      const place = { [side]: index };
      const number = make("span", { class: "number" });
      const text = make("span", { class: "word", dir: "auto" }, visible(word));
      const button = make(
        "button",
        {
          type: "button",
          "data-rove": "",
          tabindex: index ? -1 : 0,
          title: word,
          "aria-pressed": "false",
          onclick: () => this.act.pin(place),
          onpointerenter: (event) => event.pointerType === "mouse" && this.act.point(place),
          onpointerleave: () => this.act.point(null),
          onfocus: () => this.act.point(place),
          onblur: () => this.act.point(null),
        },
        ...(side === "query" ? [number, text] : [text, number]),
      );
      return { button, number, text };
    });
    const title = make("p", { class: "side", "aria-hidden": "true" }, side === "query" ? "queries" : "keys");
    box.append(title, ...buttons.map(({ button }) => button));
    rove(box, () => 1);
    return { box, buttons };
  }

  // series: [{values, color}]; current: the one whose numbers are shown; place: {query?, key?} or null; pinned: likewise.
  draw(series, current, place, pinned) {
    const { queries, keys } = this.attention;
    const lines = [];
    const add = (query, key, attributes) => {
      const line = document.createElementNS(this.svg.namespaceURI, "path");
      const [from, to] = [(query + 0.5) * ROW, (key + 0.5) * ROW];
      line.setAttribute("d", `M0 ${from}C45 ${from} 55 ${to} 100 ${to}`);
      line.dataset.link = `${query} ${key}`;
      for (const [name, value] of Object.entries(attributes)) line.style.setProperty(name, value);
      lines.push(line);
      return line;
    };
    const meant = (query, key) => (place?.query ?? query) === query && (place?.key ?? key) === key;
    series.forEach((one, number) => {
      for (let query = 0; query < queries.length && !this.long; query++) {
        for (let key = 0; key < keys.length; key++) {
          const weight = one.values[query * keys.length + key];
          if (weight < (place ? 0.004 : FAINT) || !meant(query, key)) continue;
          const shift = series.length > 1 ? `translateY(${2.5 * (number - (series.length - 1) / 2)}px)` : "none";
          add(query, key, {
            stroke: one.color,
            transform: shift,
            "stroke-width": `${(0.6 + 5 * weight) / (series.length > 1 ? 1.6 : 1)}px`,
            "stroke-opacity": (place ? 0.25 + 0.7 * weight : 0.06 + 0.84 * weight).toFixed(3),
          });
        }
      }
    });
    const gold = this.long ? [] : this.attention.gold;
    for (const [query, key] of gold) if (meant(query, key)) add(query, key, {}).classList.add("gold");
    this.svg.replaceChildren(...lines);
    this.mark("query", current, place, pinned);
    this.mark("key", current, place, pinned);
    this.say(series, current, place);
  }

  // The words of one side: the one pointed at, and how much each is meant by the one pointed at on the other side.
  mark(side, current, place, pinned) {
    const other = side === "query" ? "key" : "query";
    const index = place?.[other];
    this.words[side].buttons.forEach(({ button, number, text }, own) => {
      const [query, key] = side === "query" ? [own, index] : [index, own];
      const meant = index !== undefined && (place[side] ?? own) === own;
      const weight = meant ? current.values[query * this.attention.keys.length + key] : 0;
      number.textContent = meant && weight >= 0.005 ? decimals(weight) : "";
      text.style.setProperty("--weight", `${(100 * (this.long ? shade(weight) : weight)).toFixed(1)}%`);
      text.style.setProperty("--series", current.color);
      text.classList.toggle("gold", meant && this.gold.has(`${query} ${key}`));
      button.classList.toggle("here", place?.[side] === own && index === undefined);
      press(button, pinned?.[side] === own);
    });
  }

  say(series, current, place) {
    const { queries, keys } = this.attention;
    const quoted = (word) => `“${visible(word)}”`;
    const of = series.length > 1 || series[0].heads.length > 1 ? `${current.name}: ` : "";
    if (!place) {
      this.status.textContent = `Point at a ${this.unit} or tap it: where it looks, who looks at it.`;
      this.status.classList.add("hint");
      return;
    }
    this.status.classList.remove("hint");
    if (place.query !== undefined && place.key !== undefined) {
      const weight = current.values[place.query * keys.length + place.key];
      const right = this.gold.has(`${place.query} ${place.key}`) ? ", gold" : "";
      this.status.textContent = `${of}${quoted(queries[place.query])} → ${quoted(keys[place.key])} ${decimals(weight)}${right}`;
      return;
    }
    const asks = place.query !== undefined;
    const others = (asks ? keys : queries).map((word, i) => {
      const at = asks ? place.query * keys.length + i : i * keys.length + place.key;
      return [visible(word), current.values[at]];
    });
    const most = others.filter(([, weight]) => weight >= 0.02).sort((a, b) => b[1] - a[1]).slice(0, 4);
    const list = most.map(([word, weight]) => `${word} ${decimals(weight)}`).join(" · ") || "none above 0.02";
    const own = quoted(asks ? queries[place.query] : keys[place.key]);
    this.status.textContent = `${of}${own} ${asks ? "looks at" : "is looked at by"}  ${list}`;
  }
}
