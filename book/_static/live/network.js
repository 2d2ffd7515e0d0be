// EfficientNet-Lite0 as a list of layers, run by TensorFlow.js. Tensors are (N, height, width, channels).
"use strict";

window.live = {
  data: {}, // what the scripts data_*.js contain; book/_ext/live_page.py writes them
  folder: document.currentScript.src.replace(/[^/]*$/, ""),
};

// One row per stage: kernel, stride of the first block, channels, expansion, blocks.
const LITE0_STAGES = [
  [3, 1, 16, 1, 1],
  [3, 2, 24, 6, 2],
  [5, 2, 40, 6, 2],
  [3, 2, 80, 6, 3],
  [5, 1, 112, 6, 3],
  [5, 2, 192, 6, 4],
  [3, 1, 320, 6, 1],
];

// A layer: name, kind (conv, depthwise or linear), kernel, stride, channels in and
// out, activation. `saves` marks the input of a residual block, `adds` the layer to
// whose output that input is added. The names are those of PyTorch.
live.lite0 = () => {
  const layers = [];
  let channels = 3;
  const add = (name, kind, kernel, stride, out, activation, more = {}) => {
    layers.push({ name, kind, kernel, stride, in: channels, out, activation, ...more });
    channels = out;
  };
  add("conv_stem", "conv", 3, 2, 32, "relu6");
  LITE0_STAGES.forEach(([kernel, firstStride, out, expansion, blocks], stage) => {
    for (let block = 0; block < blocks; block++) {
      const name = `blocks.${stage}.${block}`;
      const stride = block ? 1 : firstStride;
      const residual = stride === 1 && channels === out;
      const wide = expansion * channels;
      const saves = residual;
      if (expansion > 1) add(`${name}.conv_pw`, "conv", 1, 1, wide, "relu6", { saves });
      add(`${name}.conv_dw`, "depthwise", kernel, stride, channels, "relu6");
      const last = expansion > 1 ? "conv_pwl" : "conv_pw";
      add(`${name}.${last}`, "conv", 1, 1, out, "linear", { adds: residual });
    }
  });
  add("conv_head", "conv", 1, 1, 1280, "relu6");
  add("classifier", "linear", 1, 1, 1000, "linear");
  return layers;
};

// Shape of a layer's filter, as TensorFlow.js expects it. The last axis with more than one value is the output channel.
live.filterShape = ({ kind, kernel, in: inputs, out }) =>
  kind === "depthwise" ? [kernel, kernel, out, 1] : [kernel, kernel, inputs, out];

// Bits per stored weight: 8 for the 1×1 layers of the last stages, which hold most of the weights.
live.bits = ({ name, kernel }) => (kernel === 1 && !/^blocks\.[0-3]\./.test(name) ? 8 : 16);

// Read the packed weights: per layer the filter (int8 or int16), a scale per output channel, the biases.
live.unpack = (layers, buffer) => {
  let offset = 0;
  const read = (Kind, count) => {
    const bytes = count * Kind.BYTES_PER_ELEMENT;
    offset += bytes;
    return new Kind(buffer.slice(offset - bytes, offset));
  };
  const weights = {};
  for (const layer of layers) {
    const shape = live.filterShape(layer);
    const integers = read(live.bits(layer) === 8 ? Int8Array : Int16Array, shape.reduce((a, b) => a * b));
    const scales = read(Float32Array, layer.out);
    const values = Float32Array.from(integers, (value, k) => value * scales[k % layer.out]);
    const bias = read(Float32Array, layer.out);
    weights[layer.name] = { filter: tf.tensor(values, shape), bias: tf.tensor1d(bias), values, biases: bias };
  }
  if (offset !== buffer.byteLength) throw new Error(`${buffer.byteLength} bytes of weights; expected ${offset}`);
  return weights;
};

live.applyLayer = (layer, weight, x) => {
  const { filter, bias } = weight;
  if (layer.kind === "linear") x = tf.mean(x, [1, 2], true); // global average pooling
  const convolve = layer.kind === "depthwise" ? tf.fused.depthwiseConv2d : tf.fused.conv2d;
  // With stride 2, "same" pads more below and on the right, as the network was trained.
  return convolve({ x, filter, bias, strides: layer.stride, pad: "same", activation: layer.activation });
};

// Run the layers on a tensor. `visit` sees each layer and its output, and may return true to stop.
live.run = (layers, weights, x, visit = () => false) => {
  // The browser may withdraw the graphics card, for example from a tab in the background. Results are then wrong.
  if (tf.backend().getGPGPUContext?.().gl.isContextLost())
    throw new Error("The browser has withdrawn the graphics card from this page. Reload the page.");
  return tf.tidy(() => {
    let saved;
    for (const layer of layers) {
      if (layer.saves) saved = x;
      x = live.applyLayer(layer, weights[layer.name], x);
      if (layer.adds) x = tf.add(x, saved);
      if (visit(layer, x)) break;
    }
    return x;
  });
};

// The network's input: 224×224×3 values from 0 to 255, scaled as it was trained.
live.prepare = pixels => tf.tensor4d(pixels.map(value => (value - 127) / 128), [1, 224, 224, 3]);

// Classify pixels, a Float32Array of 224×224×3 values from 0 to 255. Returns logits, probabilities and the pooled
// feature map.
live.classify = pixels => {
  const input = live.prepare(pixels);
  let features;
  const output = live.run(live.layers, live.weights, input, (layer, x) => {
    if (layer.name === "conv_head") features = x.dataSync();
  });
  const logits = output.dataSync();
  tf.dispose([input, output]);
  const highest = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map(value => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b);
  return { logits, probabilities: powers.map(value => value / sum), features };
};

// CAM: the sum over channels of the feature map, weighted for one class. Its mean plus the bias is the class score.
live.classActivationMap = (features, target) => {
  const { values, biases } = live.weights.classifier;
  const classes = biases.length, channels = values.length / classes;
  const map = new Float32Array(features.length / channels);
  for (let position = 0; position < map.length; position++) {
    let sum = 0;
    for (let k = 0; k < channels; k++) sum += features[position * channels + k] * values[k * classes + target];
    map[position] = sum;
  }
  return { map, bias: biases[target], mean: map.reduce((a, b) => a + b) / map.length };
};

// ---- loading ----------------------------------------------------------------------------------------------------------

live.loadScript = name =>
  new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = live.folder + name;
    script.onload = resolve;
    script.onerror = () => reject(new Error(`${name} can't be loaded`));
    document.head.append(script);
  });

const fromBase64 = text => {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < bytes.length; k++) bytes[k] = binary.charCodeAt(k);
  return bytes;
};

// Whether the browser runs WebAssembly with SIMD: it accepts a module that contains one such instruction.
live.hasSimd = () => {
  const module = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253,
    98, 11];
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(module));
};

// Whether WebGL 2 runs on a graphics card, not in software, and stores numbers of 32 bits.
live.hasGraphicsCard = () => {
  const gl = document.createElement("canvas").getContext("webgl2");
  if (!gl) return false;
  const names = gl.getExtension("WEBGL_debug_renderer_info");
  const renderer = gl.getParameter(names ? names.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
  const storesFloats = gl.getExtension("EXT_color_buffer_float") !== null;
  return storesFloats && !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(renderer);
};

// Let the browser draw and react.
live.pause = () => new Promise(resolve => setTimeout(resolve));

live.size = files => Object.values(files).reduce((a, b) => a + b);
live.networkSize = () => live.size({ ...live.files, ...live.engines.wasm }); // with WebGL it is a little less
live.megabytes = bytes => `about ${(bytes / 1e6).toPrecision(1)} MB`;

// Load engine and weights once; every `progress` receives the share of the bytes loaded.
const listeners = [];
live.load = progress => {
  listeners.push(progress);
  return (live.loading ??= loadNetwork(share => listeners.forEach(listener => listener(share))));
};

// Load the solar cells once.
live.loadCells = () => (live.loadingCells ??= loadCells());

async function loadCells() {
  await live.loadScript("data_cells.js");
  live.cells = live.data.cells;
  live.data = {};
}

// WebGL must classify an image in this many milliseconds. WebAssembly took 24 on the computer on which it was tried.
live.timeLimit = 25;

// Start an engine; resolves to whether it has started.
const startEngine = {
  webgl: async () => {
    tf.env().set("SOFTWARE_WEBGL_ENABLED", true); // if selected in the address
    return (await tf.setBackend("webgl")) && tf.env().getBool("WEBGL_RENDER_FLOAT32_ENABLED");
  },
  wasm: () => {
    // A page opened from a file can't fetch the engine, so it is a data: URL. It uses one thread.
    tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false);
    // TensorFlow.js wants an address for each of its three variants, although it only uses the one with SIMD here.
    const variants = ["", "-simd", "-threaded-simd"].map(kind => `tfjs-backend-wasm${kind}.wasm`);
    tf.wasm.setWasmPaths(Object.fromEntries(variants.map(name => [name, live.data.wasm])));
    return tf.setBackend("wasm");
  },
};

// Measure in how many milliseconds the engine classifies the cat: Infinity if it can't, or if PyTorch's result differs.
const timeCat = async () => {
  const pixels = live.resize(await live.readUrl(live.samples.cat));
  const { target, probability } = live.expected;
  let fastest = Infinity;
  try {
    for (let run = 0; run < 4; run++) { // the first one is slow, because it compiles
      const start = performance.now();
      const { probabilities } = live.classify(pixels);
      fastest = Math.min(fastest, performance.now() - start);
      if (!(Math.abs(probabilities[target] - probability) < 0.03)) return Infinity;
      await live.pause();
    }
  } catch {
    return Infinity;
  }
  return fastest;
};

// The engines to try, in this order. `?engine=wasm` or `?engine=webgl` in the address selects one.
const listEngines = hasCard => {
  const selected = new URLSearchParams(location.search).get("engine");
  const automatic = hasCard ? ["webgl", "wasm"] : ["wasm"];
  const engines = Object.hasOwn(live.engines, selected) ? [selected] : automatic;
  return engines.filter(name => name !== "wasm" || live.hasSimd());
};

async function loadNetwork(progress) {
  const hasCard = live.hasGraphicsCard();
  const engines = listEngines(hasCard);
  if (!engines.length) throw new Error("This browser has no WebAssembly with SIMD, which the network needs.");
  const total = live.size({ ...live.files, ...live.engines[engines[0]] });
  let loaded = 0;
  const loadScripts = async files => {
    for (const [name, size] of Object.entries(files)) {
      await live.loadScript(name);
      loaded += size;
      progress(Math.min(1, loaded / total)); // a second engine is not part of the total
    }
  };
  await loadScripts(live.files);
  const parts = Object.keys(live.files).filter(name => name.startsWith("data_weights"))
    .map(name => fromBase64(live.data[name.slice(5, -3)]));
  const buffer = await new Blob(parts).arrayBuffer();
  live.layers = live.lite0();
  live.samples = live.data.samples;
  for (const engine of engines) {
    await loadScripts(live.engines[engine]);
    if (await startEngine[engine]()) {
      live.weights = live.unpack(live.layers, buffer);
      // The last engine may be slow, but not wrong.
      const limit = engine === engines.at(-1) ? Infinity : live.timeLimit;
      if (engine === "wasm" || (await timeCat()) < limit) {
        live.engine = engine;
        break;
      }
      tf.dispose(Object.values(live.weights).flatMap(({ filter, bias }) => [filter, bias]));
    }
    tf.removeBackend(engine);
  }
  if (!live.engine) throw new Error(`TensorFlow.js does not work in this browser (tried: ${engines.join(", ")}).`);
  const webgl = hasCard ? "on the graphics card (WebGL)" : "in WebGL without a graphics card";
  live.place = live.engine === "wasm" ? "on one thread (WebAssembly)" : webgl;
  live.classes = live.data.classes;
  live.data = {}; // the texts are no longer needed
}
