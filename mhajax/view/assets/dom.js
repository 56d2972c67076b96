// Small helpers. Words of a sentence reach the page only as text nodes and attributes, never as HTML.

const COLORS = 5; // heads that have a colour of their own; of more than that the mean is shown

const LONG = 40; // words; of more, lines and cells cannot be read: text is shaded instead, and the matrix is a picture
const FINE = 64; // rows and columns of a small picture of a head

// How strongly a weight is drawn where it is one of many: a weight of 0.01 can still be seen.
function shade(weight) {
  return Math.sqrt(weight);
}

function isLong({ queries, keys }) {
  return Math.max(queries.length, keys.length) > LONG;
}

// Weights [T, S] of 8 bits as a picture of at most `most` rows and columns, each cell the strongest of those it stands for.
function paintWeights(canvas, weights, rows, columns, most) {
  canvas.height = Math.min(rows, most);
  canvas.width = Math.min(columns, most);
  const [red, green, blue] = getComputedStyle(canvas).color.match(/[\d.]+/g).map(Number);
  const strongest = new Uint8Array(canvas.height * canvas.width);
  for (let row = 0; row < rows; row++) {
    const down = Math.floor((row * canvas.height) / rows) * canvas.width;
    for (let column = 0; column < columns; column++) {
      const cell = down + Math.floor((column * canvas.width) / columns);
      strongest[cell] = Math.max(strongest[cell], weights[row * columns + column]);
    }
  }
  const image = new ImageData(canvas.width, canvas.height);
  strongest.forEach((weight, i) => image.data.set([red, green, blue, 255 * shade(weight / 255)], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

// A word as it can be seen: blanks and line ends have a sign.
function visible(word) {
  return word.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length)) || "∅";
}

function decimals(weight) {
  return weight.toFixed(2);
}

// One stop for the Tab key, arrows inside: `across` buttons stand in a row.
function rove(box, across) {
  const buttons = () => [...box.querySelectorAll("button[data-rove]")];
  box.addEventListener("keydown", (event) => {
    const all = buttons();
    const here = all.indexOf(event.target);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across(), ArrowDown: across() }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : here + step;
    if (here < 0 || !all[next]) return;
    event.preventDefault();
    stop(all[next]);
    all[next].focus();
  });
  const stop = (button) => buttons().forEach((other) => (other.tabIndex = other === button ? 0 : -1));
  box.addEventListener("focusin", (event) => event.target.dataset.rove !== undefined && stop(event.target));
  return stop;
}
