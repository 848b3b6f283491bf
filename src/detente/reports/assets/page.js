"use strict";
(function () {
  const stored = JSON.parse(document.getElementById("report-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  // Figures with buttons of their own: number of the figure to the groups it does not show.
  const away = new Map();
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
    return /color(scale)?$/i.test(key) ? colour(value, palette) : value;
  }

  function layout(figure, palette, width) {
    const own = painted(figure.layout, palette, "");
    // On a phone the names around a radar give way to the radar.
    if (own.polar && width < 480) {
      own.margin = { l: 62, r: 62, t: 30, b: 30 };
      own.polar.angularaxis.tickfont.size = 9;
    }
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
    }, own, own.polar ? {} : { xaxis: axis(own.xaxis), yaxis: axis(own.yaxis) });
  }

  function traces(figure, palette, absent) {
    return painted(figure.data, palette, "").map((trace) =>
      Object.assign(trace, { visible: !hidden.has(trace.meta) && !(absent && absent.has(trace.meta)) }));
  }

  // Most of the time that a page takes to open: done for the first figure, when verdict and table can be read already.
  function load() {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }

  function draw(place) {
    load();
    const figure = stored.figures[Number(place.dataset.figure)];
    const palette = stored.palette[dark.matches ? "dark" : "light"];
    const options = {
      responsive: true, displayModeBar: false,
    };
    return Plotly.react(place, traces(figure, palette, away.get(place.dataset.figure)), layout(figure, palette, place.clientWidth), options);
  }

  // A page with many traces draws a figure when the reader comes near it; a small one draws all at once.
  const patient = stored.figures.reduce((sum, figure) => sum + figure.data.length, 0) > 600;
  const waiting = new Set(drawings);

  // One figure that fails must not take the others with it.
  async function attempt(place) {
    waiting.delete(place);
    try {
      await draw(place);
    } catch (error) {
      console.error(error);
      place.textContent = "This figure could not be drawn.";
    }
  }

  async function redraw() {
    for (const place of drawings) if (!waiting.has(place)) await attempt(place);
  }

  async function drawRest() {
    for (const place of drawings) {
      if (waiting.has(place)) await attempt(place);
      await new Promise((next) => setTimeout(next)); // the browser shows what there is
    }
  }

  async function drawNear() {
    const watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        if (waiting.has(target)) attempt(target);
      }
    }, { rootMargin: "400px" });
    for (const place of drawings) {
      const { top, bottom } = place.getBoundingClientRect();
      if (top < innerHeight && bottom > 0) await attempt(place); else watcher.observe(place);
    }
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) hidden.add(button.dataset.group); else hidden.delete(button.dataset.group);
      redraw();
    });
  }

  for (const button of document.querySelectorAll(".own-legend button")) {
    const number = button.closest(".own-legend").dataset.of;
    if (!away.has(number)) away.set(number, new Set());
    const absent = away.get(number);
    if (button.getAttribute("aria-pressed") === "false") absent.add(button.dataset.group);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) absent.add(button.dataset.group); else absent.delete(button.dataset.group);
      draw(drawings.find((place) => place.dataset.figure === number));
    });
  }

  // A press on a heading sorts the rows by its column, a second press turns the order round. Cells without a number
  // stay at the end, and published rows, which stand in a body of their own, where they are.
  for (const button of document.querySelectorAll("table.results thead button")) {
    const heading = button.closest("th");
    const headings = Array.from(heading.parentNode.children);
    const column = headings.indexOf(heading);
    button.addEventListener("click", () => {
      const first = heading.dataset.first || "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((one) => one.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const body = heading.closest("table").tBodies[0];
      const numeric = heading.classList.contains("number");
      const key = (row) => numeric ? row.cells[column].dataset.value : row.cells[column].textContent.trim();
      const compare = (one, two) => {
        const [a, b] = [key(one), key(two)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        const sign = order === "ascending" ? 1 : -1;
        return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      };
      body.append(...Array.from(body.rows).sort(compare));
    });
  }
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => waiting.forEach(attempt)); // it waits for nothing
  if (patient) setTimeout(load, 1000);
  (patient ? drawNear() : drawRest()).then(() => { document.documentElement.dataset.ready = "yes"; });
})();
