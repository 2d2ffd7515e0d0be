// PaDiM: one Gaussian per position, fitted in the page. Positions are numbered row by row.
"use strict";

const COVARIANCE_EPSILON = 0.01; // added to the variances
const SMOOTHING_SIGMA = 4; // of the Gaussian that smooths anomaly maps, in pixels
const IMAGE_SIDE = 224;

// The layers whose outputs are the features, from coarse to fine. `first` is the number of a layer's first channel in
// the embedding, which begins with the finest layer. The names are those of the last convolution of a stage.
const LEVELS = [
  { layer: "blocks.4.2.conv_pwl", side: 14, first: 64, channels: 112 },
  { layer: "blocks.2.1.conv_pwl", side: 28, first: 24, channels: 40 },
  { layer: "blocks.1.1.conv_pwl", side: 56, first: 0, channels: 24 },
];

// Start of a row in a packed lower triangle.
const rowStart = row => (row * (row + 1)) / 2;

// A detector of some channels. A vector of a coarse layer is repeated at the fine positions that it covers, so it comes
// first in the embedding: the rows of the Cholesky factors that belong to it are then equal at these positions, and are
// computed and stored once. The order of the channels does not change the distance.
live.createDetector = channels => {
  let start = 0, offset = 0;
  const levels = LEVELS.map(({ layer, side, first, channels: count }) => {
    const chosen = channels.filter(c => c >= first && c < first + count).map(c => c - first);
    const end = start + chosen.length;
    const packed = rowStart(end) - rowStart(start);
    const level = {
      layer, side, channels: count, chosen, start, end, offset, packed,
      mean: new Float32Array(side * side * chosen.length),
      factors: new Float32Array(side * side * packed), // rows of the Cholesky factors, per position
    };
    start = end;
    offset += side * side * chosen.length;
    return level;
  });
  return { levels, dimensions: start, size: offset, positions: LEVELS.at(-1).side ** 2, count: 0 };
};

// Write the features of 224×224×3 values from 0 to 255 into an array of detector.size numbers: level by level, and for
// each position its chosen channels.
live.extractFeatures = ({ levels }, pixels, features) => {
  const input = live.prepare(pixels);
  const last = levels[0].layer;
  const output = live.run(live.layers, live.weights, input, (layer, x) => {
    const level = levels.find(({ layer: name }) => name === layer.name);
    if (!level) return false;
    const { offset, chosen, channels, side } = level;
    const values = x.dataSync();
    for (let position = 0, k = offset; position < side * side; position++)
      for (const channel of chosen) features[k++] = values[position * channels + channel];
    return layer.name === last;
  });
  tf.dispose([input, output]);
};

// Memory of a fit, which later fits use again. It grows with the number of images and never shrinks.
const memory = { features: new Float32Array(0), work: new Float64Array(0), triangle: new Float64Array(0) };

const reserve = (name, length) => {
  if (memory[name].length < length) memory[name] = new memory[name].constructor(length);
  return memory[name];
};

// Fit to images, functions that return (a promise of) pixels, and set the leave-one-out distances of these images. The
// page stays responsive, because the fit pauses often; `step` is called before each pause.
live.fit = async (detector, images, step = () => {}) => {
  const count = images.length;
  if (count < 3) throw new Error(`${count} images; expected at least 3.`);
  const features = reserve("features", count * detector.size);
  for (let n = 0; n < count; n++) {
    const pixels = await images[n]();
    live.extractFeatures(detector, pixels, features.subarray(n * detector.size, (n + 1) * detector.size));
    step();
    await live.pause();
  }
  detector.count = count;
  if (detector.distances?.length !== count * detector.positions)
    detector.distances = new Float32Array(count * detector.positions); // (images, positions)
  const { side } = detector.levels[0];
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) fitPosition(detector, features, 0, y, x);
    step();
    await live.pause();
  }
};

// Estimate the Gaussian of the channels of one level at a position, given those of the coarser levels there, then that
// of the finer levels at the positions below it. Rows are channels, columns are images:
//   x is centred, Σ = x xᵀ / (N - 1) + εI = L Lᵀ, and z solves L z = x, so the squares of z sum up to the squared distance.
const fitPosition = (detector, features, k, y, x) => {
  const { levels, count, size, dimensions } = detector;
  const { side, start, end, offset, mean, factors, packed } = levels[k];
  const position = y * side + x, width = end - start;
  const work = reserve("work", (2 * dimensions + levels.length) * count);
  const centred = work.subarray(0, dimensions * count), whitened = work.subarray(dimensions * count);
  const squares = work.subarray((2 * dimensions + k) * count, (2 * dimensions + k + 1) * count);
  const L = reserve("triangle", rowStart(dimensions));
  if (k) squares.set(work.subarray((2 * dimensions + k - 1) * count, (2 * dimensions + k) * count));
  else squares.fill(0);

  for (let i = start; i < end; i++) {
    const row = i * count, Li = rowStart(i);
    let sum = 0;
    for (let n = 0; n < count; n++) {
      const value = features[n * size + offset + position * width + i - start];
      centred[row + n] = value;
      sum += value;
    }
    mean[position * width + i - start] = sum / count;
    for (let n = 0; n < count; n++) centred[row + n] -= sum / count;

    for (let j = 0; j <= i; j++) {
      const other = j * count, Lj = rowStart(j);
      let product = 0;
      for (let n = 0; n < count; n++) product += centred[row + n] * centred[other + n];
      let value = product / (count - 1) + (i === j ? COVARIANCE_EPSILON : 0);
      for (let m = 0; m < j; m++) value -= L[Li + m] * L[Lj + m];
      L[Li + j] = i === j ? Math.sqrt(value) : value / L[Lj + j];
    }

    for (let n = 0; n < count; n++) whitened[row + n] = centred[row + n];
    for (let j = 0; j < i; j++) {
      const factor = L[Li + j], other = j * count;
      for (let n = 0; n < count; n++) whitened[row + n] -= factor * whitened[other + n];
    }
    for (let n = 0; n < count; n++) {
      whitened[row + n] /= L[Li + i];
      squares[n] += whitened[row + n] ** 2;
    }
  }
  factors.set(L.subarray(rowStart(start), rowStart(end)), position * packed);

  if (k === levels.length - 1)
    for (let n = 0; n < count; n++)
      detector.distances[n * detector.positions + position] = leaveOneOut(Math.sqrt(squares[n]), count);
  else visitFiner(levels, k, y, x, (v, u) => fitPosition(detector, features, k + 1, v, u));
};

const visitFiner = (levels, k, y, x, visit) => {
  const ratio = levels[k + 1].side / levels[k].side;
  for (let v = y * ratio; v < (y + 1) * ratio; v++)
    for (let u = x * ratio; u < (x + 1) * ratio; u++) visit(v, u);
};

// The distance that one of N training images would have if it had been left out. Leaving it out changes the covariance
// by one outer product, whose effect on the inverse is known, so nothing is fitted again.
const leaveOneOut = (distance, count) => {
  const share = Math.max(1e-12, 1 - (distance ** 2 * count) / (count - 1) ** 2);
  return ((count / (count - 1)) * Math.sqrt((count - 2) / (count - 1)) * distance) / Math.sqrt(share);
};

// The Mahalanobis distance of an image from the Gaussian of each position.
live.measureDistances = (detector, pixels) => {
  const { levels, dimensions, size, positions } = detector;
  const features = new Float32Array(size), distances = new Float32Array(positions);
  const z = new Float64Array(dimensions);
  live.extractFeatures(detector, pixels, features);
  const measure = (k, y, x, squares) => {
    const { side, start, end, offset, mean, factors, packed } = levels[k];
    const position = y * side + x, width = end - start;
    for (let i = start, entry = position * packed; i < end; i++) {
      const channel = position * width + i - start;
      let value = features[offset + channel] - mean[channel];
      for (let j = 0; j < i; j++) value -= factors[entry++] * z[j];
      z[i] = value / factors[entry++];
      squares += z[i] ** 2;
    }
    if (k === levels.length - 1) distances[position] = Math.sqrt(squares);
    else visitFiner(levels, k, y, x, (v, u) => measure(k + 1, v, u, squares));
  };
  const { side } = levels[0];
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) measure(0, y, x, 0);
  return distances;
};

// Smooth a map (height, width) with a Gaussian of 4σ to each side. The map is reflected at its border.
live.blur = (map, height, width, sigma) => {
  const radius = Math.trunc(4 * sigma + 0.5);
  let taps = Array.from({ length: 2 * radius + 1 }, (_, t) => Math.exp(-0.5 * ((t - radius) / sigma) ** 2));
  const sum = taps.reduce((a, b) => a + b);
  taps = taps.map(tap => tap / sum);
  const smooth = (values, length, step, lines, lineStep) => {
    const result = new Float32Array(values.length);
    const padded = new Float64Array(length + 2 * radius);
    const sources = Array.from(padded, (_, k) => {
      const place = (((k - radius) % (2 * length)) + 2 * length) % (2 * length);
      return Math.min(place, 2 * length - 1 - place);
    });
    for (let line = 0; line < lines; line++) {
      const origin = line * lineStep;
      for (let k = 0; k < padded.length; k++) padded[k] = values[origin + sources[k] * step];
      for (let k = 0; k < length; k++) {
        let total = 0;
        for (let t = 0; t < taps.length; t++) total += taps[t] * padded[k + t];
        result[origin + k * step] = total;
      }
    }
    return result;
  };
  return smooth(smooth(map, height, width, width, 1), width, 1, height, width);
};

// The anomaly map of distances, 224×224, and its maximum, the score.
live.anomalyMap = distances => {
  const side = Math.sqrt(distances.length);
  const enlarged = live.upsample(distances, side, side, IMAGE_SIDE, IMAGE_SIDE);
  const map = live.blur(enlarged, IMAGE_SIDE, IMAGE_SIDE, SMOOTHING_SIGMA);
  return { map, score: map.reduce((a, b) => Math.max(a, b)) };
};

// The scores of the training images, each as if it had been left out.
live.leaveOneOutScores = ({ distances, count, positions }) =>
  Array.from({ length: count }, (_, n) =>
    live.anomalyMap(distances.subarray(n * positions, (n + 1) * positions)).score);

// The value below which a share of the values lies, interpolated between neighbours.
live.quantile = (values, share) => {
  const sorted = [...values].sort((a, b) => a - b);
  const place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
};

// The area under the ROC curve: the share of pairs in which the defective one has the higher score; ties count half.
live.auroc = (functional, defective) => {
  let pairs = 0;
  for (const a of functional) for (const b of defective) pairs += b > a ? 1 : b === a ? 0.5 : 0;
  return pairs / (functional.length * defective.length);
};

live.memoryOfFits = () => Object.values(memory).reduce((sum, array) => sum + array.byteLength, 0);
