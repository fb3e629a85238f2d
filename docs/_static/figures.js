// Draws the plotly figures of a page in its theme, and again when the theme changes. The library is loaded where there is one.
(() => {
  const places = [...document.querySelectorAll(".rim-figure")];
  if (!places.length) return;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => {
    const chosen = document.body.dataset.theme || "auto";
    return chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  };
  const draw = () => {
    for (const place of places) {
      place.figure ??= JSON.parse(place.querySelector("script").textContent);
      const layout = { ...place.figure.layout, template: window.rimThemes[theme()], autosize: true };
      delete layout.width;
      Plotly.react(place, place.figure.data, layout, { responsive: true, displaylogo: false }).then(() => {
        place.dataset.drawn = theme();
      });
    }
  };
  const library = document.createElement("script");
  library.src = document.documentElement.dataset.content_root + "_static/plotly.min.js";
  library.onload = () => {
    draw();
    dark.addEventListener("change", draw);
    new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  };
  document.head.append(library);
})();
