"use strict";
(async () => {
  try {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const library = document.createElement("script");
    library.textContent = await new Response(unpacked).text();
    document.head.append(library);
  } catch {
    document.getElementById("no-figures").hidden = false;
    return;
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const precise = matchMedia("(pointer: fine)").matches;
  const settings = { responsive: true, displayModeBar: false, doubleClick: "reset" };
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const plots = [...document.querySelectorAll("[data-figure]")];

  function colours(layout) {
    const css = getComputedStyle(document.documentElement);
    const [quiet, line, paper, ink] = ["--quiet", "--line", "--paper", "--ink"].map((n) => css.getPropertyValue(n).trim());
    const update = {
      "font.color": quiet, "font.family": getComputedStyle(document.body).fontFamily,
      "hoverlabel.bgcolor": paper, "hoverlabel.bordercolor": line, "hoverlabel.font.color": ink,
    };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      update[axis + ".gridcolor"] = line;
      update[axis + ".linecolor"] = line;
    }
    return update;
  }

  const drawn = plots.map((plot) => {
    const figure = read(plot.dataset.figure);
    figure.layout.dragmode = precise ? "zoom" : false;
    return Plotly.newPlot(plot, figure.data, figure.layout, settings)
      .then(() => Plotly.relayout(plot, colours(figure.layout)));
  });
  dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, colours(plot.layout))));

  const picker = document.getElementById("layer");
  if (!picker) return;
  const spectra = read("spectra-data");
  const plot = document.getElementById("spectrum");
  const scale = document.getElementById("log-components");
  spectra.layers.forEach((layer, i) => picker.add(new Option(layer.name, i)));
  const show = () => {
    const layer = spectra.layers[picker.value];
    const values = layer.traces.map(([, y]) => y.map((v) => (v === null ? null : 10 ** (v / spectra.steps))));
    Plotly.update(plot, { x: layer.traces.map(([x]) => spectra.components[x]), y: values },
      { "xaxis.type": scale.checked ? "log" : "linear", "xaxis.dtick": scale.checked ? 1 : null,
        "xaxis.autorange": true, "yaxis.autorange": true });
    document.getElementById("layer-facts").textContent = layer.facts.join("; ") + ".";
  };
  picker.addEventListener("change", show);
  scale.addEventListener("change", show);
  Promise.all(drawn).then(show);
})();
