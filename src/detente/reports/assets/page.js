"use strict";
(function () {
  const stored = JSON.parse(document.getElementById("report-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  const drawings = Array.from(document.querySelectorAll(".drawing"));

  // "@m3" is a colour of the palette, "@m3/0.2" the same with opacity. Only values of keys that hold a
  // colour are looked up, so that a name that starts with @ stays a name.
  function colour(value, palette) {
    if (typeof value !== "string" || value[0] !== "@") return value;
    const [name, opacity] = value.slice(1).split("/");
    const found = palette[name];
    if (!found || !opacity) return found || value;
    const part = (at) => parseInt(found.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }

  function painted(value, palette, key) {
    if (Array.isArray(value)) return value.map((item) => painted(item, palette, key));
    if (value !== null && typeof value === "object") {
      const copy = {};
      for (const name of Object.keys(value)) copy[name] = painted(value[name], palette, name);
      return copy;
    }
    return /color$/i.test(key) ? colour(value, palette) : value;
  }

  function layout(figure, palette) {
    const own = painted(figure.layout, palette, "");
    const axis = (given) => Object.assign({
      gridcolor: palette.grid, linecolor: palette.grid, zeroline: false, automargin: true,
      tickfont: { color: palette.muted }, ticks: "outside", ticklen: 4, tickcolor: palette.grid,
    }, given, { title: Object.assign({ standoff: 6, font: { size: 12, color: palette.muted } }, given && given.title) });
    return Object.assign({
      showlegend: false,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: palette.ink },
      margin: { l: 48, r: 12, t: 10, b: 42 },
      hoverlabel: { bgcolor: palette.card, bordercolor: palette.grid, font: { color: palette.ink }, namelength: -1 },
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    }, own, { xaxis: axis(own.xaxis), yaxis: axis(own.yaxis) });
  }

  function traces(figure, palette) {
    return painted(figure.data, palette, "").map((trace) =>
      Object.assign(trace, { visible: !hidden.has(trace.meta) }));
  }

  function draw(place) {
    const figure = stored.figures[Number(place.dataset.figure)];
    const palette = stored.palette[dark.matches ? "dark" : "light"];
    const options = {
      responsive: true, displayModeBar: false,
    };
    return Plotly.react(place, traces(figure, palette), layout(figure, palette), options);
  }

  // One figure that fails must not take the others with it.
  async function drawAll() {
    for (const place of drawings) {
      try {
        await draw(place);
      } catch (error) {
        console.error(error);
        place.textContent = "This figure could not be drawn.";
      }
    }
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) hidden.add(button.dataset.group); else hidden.delete(button.dataset.group);
      drawAll();
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll().then(() => { document.documentElement.dataset.ready = "yes"; });
})();
