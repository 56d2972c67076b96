// In a notebook's frame: as tall as what is in it, and dark where the notebook is.
(() => {
  try {
    const frame = window.frameElement;
    const page = frame.ownerDocument.body;
    const { jpThemeLight, vscodeThemeKind } = page.dataset; // JupyterLab, VS Code, and below Colab
    const theme = jpThemeLight ?? vscodeThemeKind ?? page.parentElement.getAttribute("theme") ?? "";
    if (theme) document.documentElement.style.colorScheme = /false|dark/.test(theme) ? "dark" : "light";
    new ResizeObserver(() => {
      frame.style.height = `${Math.ceil(document.body.getBoundingClientRect().height)}px`;
    }).observe(document.body);
  } catch {
    // A notebook that locks its outputs in: the frame keeps its height and scrolls.
  }
})();
