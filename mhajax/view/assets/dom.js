// Small helpers. Words of a sentence reach the page only as text nodes and attributes, never as HTML.

const COLORS = 5; // heads that have a colour of their own; of more than that the mean is shown

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
