"use strict";
const page = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const config = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],  // none that leaves the page
  toImageButtonOptions: { format: "svg" },
};

function draw(theme) {
  for (const [key, figure] of Object.entries(page.figures)) {
    const place = document.getElementById("figure-" + key);
    const layout = { ...figure.layout, template: page.templates[theme] };
    Plotly.react(place, figure.data, layout, config);
    place.setAttribute("data-drawn", theme);
  }
}

const now = () => (dark.matches ? "dark" : "light");
draw(now());
dark.addEventListener("change", () => draw(now()));
// Paper is white.
window.addEventListener("beforeprint", () => {
  draw("light");
});
window.addEventListener("afterprint", () => draw(now()));
