// One view: what is chosen, and who is told when it changes.

function unpack(attention) {
  const bytes = Uint8Array.from(atob(attention.weights), (letter) => letter.charCodeAt(0));
  const size = attention.queries.length * attention.keys.length;
  return { ...attention, bytes: (head) => bytes.subarray(head * size, (head + 1) * size) };
}

class View {
  constructor(root, data) {
    this.data = data;
    this.sentence = 0;
    this.kind = 0;
    this.several = false;
    this.place = this.pinned = null;
    this.choices = data.kinds.map(({ notes, heads }) => {
      const first = notes.length ? notes[0][0] * heads + notes[0][1] : 0;
      return { heads: [first], current: first };
    });
    const point = (place) => this.point(place);
    this.heads = new Heads({
      choose: (head, add) => this.choose(head, add || this.several),
      chooseLayer: (layer) => this.chooseLayer(layer),
      show: (head) => this.show(head),
      setSeveral: (several) => (this.several = several),
    });
    this.links = new Links({ point, pin: (place) => this.pin(place), unit: data.unit });
    this.matrix = new Matrix({ point, pin: (place) => this.pin(place) });
    const body = make("div", { class: "body" }, this.heads.box, this.links.box, this.matrix.box);
    const view = make("section", { class: "view", "aria-label": data.title }, this.bar(), body);
    view.addEventListener("keydown", (event) => event.key === "Escape" && this.pin(null));
    const style = make("style");
    style.textContent = STYLE;
    root.replaceChildren(style, view);
    this.start();
  }

  bar() {
    const { sentences, kinds } = this.data;
    const select = make("select", { "aria-label": "Sentence" });
    select.append(...sentences.map(({ title }, index) => make("option", { value: index }, title)));
    select.addEventListener("change", () => {
      this.sentence = Number(select.value);
      this.start();
    });
    this.tabs = kinds.map(({ name }, index) => {
      const tab = make("button", { type: "button", "aria-pressed": "false" }, name);
      tab.addEventListener("click", () => {
        this.kind = index;
        this.start();
      });
      return tab;
    });
    const bar = make("div", { class: "bar" });
    if (sentences.length > 1) bar.append(select);
    if (kinds.length > 1) bar.append(make("div", { class: "tabs", role: "group", "aria-label": "Attention" }, ...this.tabs));
    bar.hidden = !bar.children.length;
    return bar;
  }

  // Another sentence or another kind of attention.
  start() {
    this.place = this.pinned = null;
    this.tabs.forEach((tab, index) => press(tab, index === this.kind));
    this.attention = unpack(this.data.sentences[this.sentence].attentions[this.kind]);
    this.heads.selection = null;
    this.heads.start(this.data.kinds[this.kind], this.attention);
    this.links.start(this.attention);
    this.matrix.start(this.attention);
    if (isLong(this.attention)) this.pinned = { query: this.attention.queries.length - 1 }; // one row of many
    this.pick();
  }

  // Other heads.
  pick() {
    const { heads, current } = this.choices[this.kind];
    this.series = this.drawn(heads);
    this.current = this.series.find((one) => one.heads.includes(current)) ?? this.series[0];
    this.heads.select(this.series, this.current);
    this.matrix.draw(this.current);
    this.refresh();
  }

  // What is drawn: each of a few heads in its colour, or the mean of many.
  drawn(heads) {
    const across = this.data.kinds[this.kind].heads;
    const values = (head) => Float32Array.from(this.attention.bytes(head), (byte) => byte / 255);
    if (heads.length <= COLORS) {
      return heads.map((head, number) => ({
        heads: [head],
        name: `layer ${Math.floor(head / across)} · head ${head % across}`,
        color: `var(--color-${number})`,
        values: values(head),
      }));
    }
    const mean = values(heads[0]).fill(0);
    for (const head of heads) values(head).forEach((weight, i) => (mean[i] += weight / heads.length));
    const layer = Math.floor(heads[0] / across);
    const whole = heads.length === across && heads.every((head) => Math.floor(head / across) === layer);
    const name = whole ? `layer ${layer} · mean of its ${across} heads` : `mean of ${heads.length} heads`;
    return [{ heads, name, color: "var(--color-0)", values: mean }];
  }

  choose(head, add) {
    const choice = this.choices[this.kind];
    if (!add) choice.heads = [head];
    else if (!choice.heads.includes(head)) choice.heads = [...choice.heads, head];
    else if (choice.heads.length > 1) choice.heads = choice.heads.filter((other) => other !== head);
    choice.current = choice.heads.includes(head) ? head : choice.heads[0];
    this.pick();
  }

  chooseLayer(layer) {
    const across = this.data.kinds[this.kind].heads;
    const heads = Array.from({ length: across }, (_, head) => layer * across + head);
    this.choices[this.kind] = { heads, current: heads[0] };
    this.pick();
  }

  show(head) {
    this.choices[this.kind].current = head;
    this.pick();
  }

  point(place) {
    this.place = place;
    this.refresh();
  }

  pin(place) {
    const same = place && place.query === this.pinned?.query && place.key === this.pinned?.key;
    this.pinned = same ? null : place;
    if (!place || same) this.place = null;
    this.refresh();
  }

  refresh() {
    const place = this.place ?? this.pinned;
    this.links.draw(this.series, this.current, place, this.pinned);
    this.matrix.mark(place);
  }
}

for (const host of document.querySelectorAll(".mhajax-view")) {
  if (host.shadowRoot) continue; // another copy of this script was here
  new View(host.attachShadow({ mode: "open" }), JSON.parse(host.querySelector("script").textContent));
}
