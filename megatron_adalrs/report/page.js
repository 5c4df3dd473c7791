(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
  const coarsePointer = window.matchMedia("(pointer: coarse)");
  const narrow = window.matchMedia("(max-width: 560px)");
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };

  // Plotly draws text and axes from the layout, so the page's colours are handed to it.
  function fitted(layout) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const result = structuredClone(layout);
    result.font = { family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 12.5, color: color("--ink") };
    result.hoverlabel = { bgcolor: color("--box"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" };
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--ink") };
    for (const key of Object.keys(result)) {
      if (/^[xy]axis\d*$/.test(key)) {
        Object.assign(result[key], { gridcolor: color("--grid"), linecolor: color("--line"), tickcolor: color("--line") });
        if (result[key].title) {
          result[key].title.font = { size: result.font.size, color: color("--soft") };
        }
      }
    }
    if (narrow.matches) {
      Object.assign(result.margin, { l: 44, r: 6 });
    }
    // A drag across a plot must scroll the page on a touch screen; hovering by tap still works.
    if (coarsePointer.matches) {
      result.dragmode = false;
    }
    return result;
  }

  // Markers of a narrow plot are smaller, so that those of several runs stay apart.
  function fittedTrace(trace) {
    if (!narrow.matches || !trace.marker || typeof trace.marker.size !== "number") {
      return trace;
    }
    return { ...trace, marker: { ...trace.marker, size: Math.max(7, 0.7 * trace.marker.size) } };
  }

  function draw() {
    const touch = { displayModeBar: coarsePointer.matches || narrow.matches ? false : "hover" };
    for (const [key, figure] of Object.entries(figures)) {
      Plotly.react("plot-" + key, figure.data.map(fittedTrace), fitted(figure.layout), { ...config, ...touch });
    }
  }

  draw();
  for (const query of [darkScheme, narrow]) {
    query.addEventListener("change", draw);
  }
})();
