// The part "What does each layer cost?" of the live page: multiply-adds per layer, and milliseconds on this device.
"use strict";

// MobileNetV1 as a list of layers: channels and stride of its 13 blocks.
const MOBILENET_BLOCKS = [
  [64, 1], [128, 2], [128, 1], [256, 2], [256, 1], [512, 2],
  [512, 1], [512, 1], [512, 1], [512, 1], [512, 1], [1024, 2], [1024, 1],
];

live.mobilenet = width => {
  const scaled = channels => Math.trunc(channels * width);
  let channels = scaled(32);
  const layers = [{ name: "stem", kind: "conv", kernel: 3, stride: 2, in: 3, out: channels, activation: "relu" }];
  MOBILENET_BLOCKS.forEach(([outChannels, stride], k) => {
    const block = { in: channels, activation: "relu" };
    const out = scaled(outChannels);
    layers.push({ ...block, name: `block${k + 1}.depthwise`, kind: "depthwise", kernel: 3, stride, out: channels });
    layers.push({ ...block, name: `block${k + 1}.pointwise`, kind: "conv", kernel: 1, stride: 1, out });
    channels = out;
  });
  layers.push({ name: "classifier", kind: "linear", kernel: 1, stride: 1, in: channels, out: 1000, activation: "linear" });
  return layers;
};

// The multiply-adds of each layer for a square image: output values times the size of the kernel. Padding keeps the
// side; a stride of 2 halves it and rounds up.
live.countMacs = (layers, side) =>
  layers.map(layer => {
    const inputSide = side;
    side = layer.kind === "linear" ? 1 : Math.ceil(side / layer.stride);
    const perValue = layer.kernel ** 2 * (layer.kind === "depthwise" ? 1 : layer.in);
    return { ...layer, inputSide, side, macs: perValue * layer.out * side ** 2 };
  });

// Time one layer in milliseconds: the fastest of three batches of runs, because other programs interrupt some. Even the
// fastest fills 8 ms, because browsers round times.
live.timeLayer = layer =>
  tf.tidy(() => {
    const x = tf.fill([1, layer.inputSide, layer.inputSide, layer.in], 0.5);
    const weight = { filter: tf.fill(live.filterShape(layer), 0.01), bias: tf.fill([layer.out], 0) };
    const run = () => live.applyLayer(layer, weight, x);
    const timeBatch = runs => {
      const start = performance.now();
      for (let k = 1; k < runs; k++) tf.dispose(run());
      // A graphics card computes later, but in order: once one value of the last output is read, all runs are over.
      tf.tidy(() => tf.slice(run(), [0, 0, 0, 0], [1, 1, 1, 1]).dataSync());
      return performance.now() - start;
    };
    timeBatch(1); // the first run is slow
    for (let runs = 1; ; runs *= 2) {
      let fastest = Infinity;
      // One batch below 8 ms decides that there are too few runs.
      for (let batch = 0; batch < 3 && fastest >= 8; batch++) fastest = Math.min(fastest, timeBatch(runs));
      if (fastest >= 8) return fastest / runs;
    }
  });

{
  const get = id => document.getElementById(id);
  const TYPES = { standard: "3×3 standard", depthwise: "depthwise", pointwise: "1×1 (pointwise)", linear: "linear" };
  const typeOf = ({ kind, kernel }) => (kind !== "conv" ? kind : kernel === 1 ? "pointwise" : "standard");
  const millions = value => (value / 1e6).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  const percent = (value, total) => (total ? `${((100 * value) / total).toFixed(1)} %` : "–");
  const sum = values => values.reduce((a, b) => a + b, 0);
  let layers = [];
  let times = null; // milliseconds per layer, once measured

  const makeRow = (cells, tag = "td", type = null) => {
    const row = document.createElement("tr");
    cells.forEach((text, k) => {
      const cell = document.createElement(k ? tag : "th");
      if (!k) cell.scope = "row";
      if (!k && type) cell.className = `live-type-${type}`;
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  };

  // One bar per layer; the heights are relative to the largest.
  const drawBars = (id, values, unit) => {
    const largest = Math.max(...values);
    get(id).replaceChildren(
      ...values.map((value, k) => {
        const bar = document.createElement("span");
        bar.className = `live-type-${typeOf(layers[k])}`;
        bar.style.height = `${(100 * value) / largest}%`;
        bar.title = `${layers[k].name}: ${unit(value)}`;
        return bar;
      }),
    );
    const k = values.indexOf(largest);
    get(id).setAttribute("aria-label", `One bar per layer. The largest is ${layers[k].name} with ${unit(largest)}.`);
  };

  const draw = () => {
    const macs = layers.map(layer => layer.macs);
    drawBars("live-bars-macs", macs, value => `${millions(value)} million multiply-adds`);
    if (times) drawBars("live-bars-ms", times, value => `${value.toFixed(2)} ms`);
    get("live-measured").hidden = !times;
    get("live-cost-types").replaceChildren(
      ...[...Object.keys(TYPES), "all"].map(type => {
        const chosen = layers.map((layer, k) => k).filter(k => type === "all" || typeOf(layers[k]) === type);
        const part = sum(chosen.map(k => macs[k]));
        const time = times && sum(chosen.map(k => times[k]));
        return makeRow([
          TYPES[type] ?? "all layers", chosen.length, millions(part), percent(part, sum(macs)),
          times ? time.toFixed(2) : "–", times ? percent(time, sum(times)) : "–",
          times && time ? (part / time / 1e6).toFixed(2) : "–",
        ], "td", type === "all" ? null : type);
      }),
    );
    get("live-cost-layers").replaceChildren(
      ...layers.map((layer, k) =>
        makeRow([layer.name, TYPES[typeOf(layer)], `${layer.side}×${layer.side}×${layer.out}`, millions(layer.macs),
          times ? times[k].toFixed(3) : "–"])),
    );
  };

  const update = () => {
    const isMobilenet = get("live-network").value === "mobilenet";
    const width = get("live-width").value / 100;
    const side = Number(get("live-side").value);
    get("live-width").disabled = !isMobilenet;
    get("live-width-value").textContent = isMobilenet ? width.toFixed(2) : "1.00, fixed for this network";
    get("live-side-value").textContent = `${side}×${side} pixels`;
    layers = live.countMacs(isMobilenet ? live.mobilenet(width) : live.lite0(), side);
    times = null; // they were measured for other sizes
    const total = sum(layers.map(layer => layer.macs));
    get("live-cost-total").textContent = `${millions(total)} million multiply-adds in ${layers.length} layers`;
    draw();
  };

  get("live-measure").addEventListener("click", async () => {
    get("live-measure").disabled = true;
    const measured = layers;
    const results = [];
    for (const layer of measured) {
      results.push(live.timeLayer(layer));
      get("live-cost-status").textContent = `Measured ${results.length} of ${measured.length} layers.`;
      await new Promise(resolve => setTimeout(resolve));
    }
    if (layers === measured) {
      times = results;
      draw();
      get("live-cost-status").textContent =
        `Measured: ${sum(times).toFixed(1)} ms for one image, one layer after the other, ${live.place}.`;
    } else get("live-cost-status").textContent = "The sizes changed during the measurement. Measure again.";
    get("live-measure").disabled = false;
  });
  for (const id of ["live-network", "live-width", "live-side"]) get(id).addEventListener("input", update);
  update();

  live.cost = () => ({ layers, times });
}
