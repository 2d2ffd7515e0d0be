// Images: reading, resizing as PyTorch does, drawing a map over them, boxes.
"use strict";

const LONGEST_SIDE = 1024; // larger images are first reduced by the browser, which saves time and memory

// Draw an image, video or bitmap on white and return its pixels, (height, width, 4).
live.readPixels = source => {
  const width = source.videoWidth || source.naturalWidth || source.width;
  const height = source.videoHeight || source.naturalHeight || source.height;
  if (!width || !height) throw new Error("The image has no pixels.");
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
};

// Weights of a bilinear filter with antialiasing: each output is a mean of the inputs below a triangle.
const triangleWeights = (from, to) => {
  const scale = from / to;
  const support = Math.max(1, scale);
  return Array.from({ length: to }, (_, k) => {
    const centre = (k + 0.5) * scale;
    const start = Math.max(0, Math.floor(centre - support + 0.5));
    const end = Math.min(from, Math.floor(centre + support + 0.5));
    const weights = [];
    for (let j = start; j < end; j++) weights.push(Math.max(0, 1 - Math.abs((j + 0.5 - centre) / support)));
    const sum = weights.reduce((a, b) => a + b);
    return { start, weights: weights.map(weight => weight / sum) };
  });
};

// Resize pixels to size×size×3 values from 0 to 255, first along the rows, then along the columns.
live.resize = ({ data, width, height }, size = 224) => {
  const narrow = new Float32Array(height * size * 3);
  triangleWeights(width, size).forEach(({ start, weights }, x) => {
    for (let y = 0; y < height; y++)
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let j = 0; j < weights.length; j++) sum += weights[j] * data[(y * width + start + j) * 4 + c];
        narrow[(y * size + x) * 3 + c] = sum;
      }
  });
  const resized = new Float32Array(size * size * 3);
  const row = size * 3;
  triangleWeights(height, size).forEach(({ start, weights }, y) => {
    for (let k = 0; k < row; k++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * narrow[(start + j) * row + k];
      resized[y * row + k] = sum;
    }
  });
  return resized;
};

// Enlarge a map (rows, columns) bilinearly to height×width; corners are not aligned.
live.upsample = (map, rows, columns, height, width) => {
  const enlarged = new Float32Array(height * width);
  const between = (k, from, to) => {
    const position = Math.max(0, ((k + 0.5) * from) / to - 0.5);
    const low = Math.floor(position);
    return [low, Math.min(low + 1, from - 1), position - low];
  };
  const across = Array.from({ length: width }, (_, x) => between(x, columns, width));
  for (let y = 0; y < height; y++) {
    const [top, bottom, v] = between(y, rows, height);
    for (let x = 0; x < width; x++) {
      const [left, right, u] = across[x];
      const above = map[top * columns + left] * (1 - u) + map[top * columns + right] * u;
      const below = map[bottom * columns + left] * (1 - u) + map[bottom * columns + right] * u;
      enlarged[y * width + x] = above * (1 - v) + below * v;
    }
  }
  return enlarged;
};

// Colours of values that increase and decrease the class score.
const POSITIVE = [214, 69, 0], NEGATIVE = [0, 92, 204];

// Draw an image and a signed map of the same size; the colour is the more opaque, the larger the absolute value, up to
// `largest`.
live.drawOverlay = (canvas, image, map, opacity, largest = largestAbsolute(map)) => {
  canvas.width = image.width;
  canvas.height = image.height;
  const pixels = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
  map.forEach((value, k) => {
    const share = opacity * Math.min(1, Math.abs(value) / largest);
    const colour = value > 0 ? POSITIVE : NEGATIVE;
    for (let c = 0; c < 3; c++)
      pixels.data[4 * k + c] = (1 - share) * pixels.data[4 * k + c] + share * colour[c];
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
};

const largestAbsolute = map => map.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-12);

// Draw a box on an image, visible on light and on dark.
live.drawBox = (canvas, box) => {
  const context = canvas.getContext("2d");
  context.lineWidth = Math.max(2, canvas.width / 150);
  context.strokeStyle = "#fff";
  context.strokeRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
  context.setLineDash([2 * context.lineWidth, 2 * context.lineWidth]);
  context.strokeStyle = "#000";
  context.strokeRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
};

// Where a box is, in words.
live.describeBox = box => `rows ${box.top} to ${box.bottom - 1}, columns ${box.left} to ${box.right - 1}`;

// The box around the largest region above a share of the maximum; pixels that touch at a corner are connected. Null if
// no value is positive. Right and bottom are outside the box.
live.largestBox = (map, width, height, share) => {
  const limit = share * map.reduce((a, b) => Math.max(a, b));
  if (limit < 0 || !map.some(value => value > limit)) return null;
  const isVisited = new Uint8Array(map.length);
  let best = null;
  for (let seed = 0; seed < map.length; seed++) {
    if (isVisited[seed] || map[seed] <= limit) continue;
    const box = { left: width, top: height, right: 0, bottom: 0, size: 0 };
    const stack = [seed];
    isVisited[seed] = 1;
    while (stack.length) {
      const k = stack.pop();
      const x = k % width, y = (k - x) / width;
      box.left = Math.min(box.left, x);
      box.top = Math.min(box.top, y);
      box.right = Math.max(box.right, x + 1);
      box.bottom = Math.max(box.bottom, y + 1);
      box.size++;
      for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++)
        for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
          const neighbour = v * width + u;
          if (isVisited[neighbour] || map[neighbour] <= limit) continue;
          isVisited[neighbour] = 1;
          stack.push(neighbour);
        }
    }
    if (!best || box.size > best.size) best = box;
  }
  return best;
};

// Read a file in its EXIF orientation.
live.readFile = async file => {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name || "The file"} is not an image that this browser can read.`);
  }
  const pixels = live.readPixels(bitmap);
  bitmap.close();
  return pixels;
};

// Read an image from its data: URL.
live.readUrl = async url => {
  const image = new Image();
  image.src = url;
  await image.decode();
  return live.readPixels(image);
};

// Accept files that are dropped on an element, while `isReady` returns true.
live.acceptDrops = (zone, isReady, useFiles) => {
  const isAccepted = event => event.dataTransfer?.types.includes("Files") && isReady();
  zone.addEventListener("dragover", event => {
    if (!isAccepted(event)) return;
    event.preventDefault();
    zone.classList.add("live-over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("live-over"));
  zone.addEventListener("drop", event => {
    if (!isAccepted(event)) return;
    event.preventDefault();
    zone.classList.remove("live-over");
    useFiles([...event.dataTransfer.files]);
  });
};

// ---- camera ----------------------------------------------------------------------------------------------------------

let camera = null; // the one that runs

// Start the camera; another part that uses it loses it. `onStop` is called once, when it is off.
live.startCamera = async onStop => {
  live.stopCamera();
  if (!navigator.mediaDevices?.getUserMedia)
    throw new Error("This browser offers no camera to this page. Browsers allow it for pages from https or localhost.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640 }, audio: false });
  } catch (error) {
    throw new Error(`The camera can't be used (${error.name}). Allow it in the browser's settings, or choose a file.`);
  }
  const video = document.createElement("video");
  video.srcObject = stream;
  video.muted = video.playsInline = true;
  live.stopCamera(); // one that was started meanwhile
  camera = { stream, video, onStop, isOn: true };
  await video.play();
  return camera;
};

live.stopCamera = () => {
  if (!camera) return;
  const { stream, onStop } = camera;
  camera.isOn = false;
  camera = null;
  stream.getTracks().forEach(track => track.stop());
  onStop();
};
addEventListener("pagehide", live.stopCamera);

// Pass the camera's images to a function, as fast as it uses them, until the camera is off.
live.watchCamera = async (active, useImage) => {
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
  while (active.isOn) {
    if (active.video.videoWidth) await useImage(live.readPixels(active.video));
    // With reduced motion, one image per second.
    await new Promise(resolve => setTimeout(resolve, reducedMotion.matches ? 1000 : 30));
  }
};
