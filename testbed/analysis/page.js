"use strict";
// Draws the figures one after the other, in the colours of the theme, and keeps the time axes of
// all of them together while one is zoomed.
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const root = document.documentElement;
  const drawn = new Map();
  let zooming = false;

  const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function axis(own) {
    const look = {
      gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line"),
      tickfont: { color: style("--soft"), size: 11 }, tickcolor: style("--line"),
    };
    const title = own && own.title ? { title: { ...own.title, font: { size: 11.5, color: style("--soft") } } } : {};
    return { ...look, ...own, ...title };
  }

  function layout(figure) {
    const timed = figure.over_time && figure.data[0] && figure.data[0].type !== "heatmap";
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style("--ink") },
      margin: { l: 8, r: 10, t: 26, b: 8 }, height: figure.height,
      legend: {
        orientation: "h", x: 0, y: 1.01, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)",
        font: { size: 11.5, color: style("--soft") },
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--line"), activecolor: style("--accent") },
      hoverlabel: {
        bgcolor: style("--card"), bordercolor: style("--line"),
        font: { color: style("--ink"), size: 12 }, namelength: 28,
      },
      showlegend: timed || !figure.over_time ? figure.data.length > 1 : false,
      dragmode: "zoom",
      ...figure.layout,
      xaxis: axis({ automargin: true, ...figure.layout.xaxis }),
      yaxis: axis({ automargin: true, ...figure.layout.yaxis }),
    };
  }

  function traces(figure) {
    return figure.data.map((trace) => trace.type !== "heatmap" ? trace : {
      ...trace,
      colorbar: {
        ...trace.colorbar, tickfont: { color: style("--soft"), size: 11 },
        title: { ...trace.colorbar.title, font: { color: style("--soft"), size: 11 } },
      },
    });
  }

  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };

  function draw(place) {
    const figure = figures[place.dataset.figure];
    Plotly.newPlot(place, traces(figure), layout(figure), config);
    drawn.set(place, figure);
    if (!figure.over_time) return;
    place.on("plotly_relayout", (change) => {
      if (zooming) return;
      const start = change["xaxis.range[0]"], end = change["xaxis.range[1]"];
      const whole = change["xaxis.autorange"];
      if (start === undefined && !whole) return;
      zooming = true;
      const others = [...drawn].filter(([other, f]) => other !== place && f.over_time);
      Promise.all(others.map(([other, f]) => Plotly.relayout(other,
        { "xaxis.range": whole ? f.layout.xaxis.range : [start, end] }))).finally(() => { zooming = false; });
    });
  }

  function choose(buttons, place, chosen) {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
    const figure = figures[place.dataset.figure];
    figure.data.forEach((trace, i) => { trace.visible = i === chosen; });
    if (drawn.has(place)) Plotly.react(place, traces(figure), place.layout, config);
  }

  document.querySelectorAll(".choices").forEach((choices) => {
    const place = document.getElementById("figure-" + choices.dataset.of);
    const buttons = [...choices.querySelectorAll("button")];
    buttons.forEach((button, i) => button.addEventListener("click", () => choose(buttons, place, i)));
  });

  document.querySelectorAll("input[data-filters]").forEach((input) => {
    const rows = [...document.querySelectorAll(`#${input.dataset.filters} tbody tr`)];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/);
      rows.forEach((row) => {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      });
    });
  });

  function theme(name) {
    root.dataset.theme = name;
    document.getElementById("theme").textContent = name === "dark" ? "Light" : "Dark";
    drawn.forEach((figure, place) => Plotly.react(place, traces(figure), {
      ...layout(figure), xaxis: { ...axis({ automargin: true, ...figure.layout.xaxis }), range: place.layout.xaxis.range },
    }, config));
  }
  const asked = new URLSearchParams(location.search).get("theme");
  theme(asked || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click",
    () => theme(root.dataset.theme === "dark" ? "light" : "dark"));

  // One at a time, so that the page can be read and scrolled meanwhile.
  const waiting = [...document.querySelectorAll("[data-figure]")];
  function next() {
    if (!waiting.length) { root.dataset.drawn = "all"; return; }
    draw(waiting.shift());
    setTimeout(next, 0);
  }
  next();
})();
