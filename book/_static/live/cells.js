// The parts "Which cell is defective?" and "Fit it to your own part" of the live page.
"use strict";

{
  const get = id => document.getElementById(id);
  const QUANTILE = 0.95; // share of the leave-one-out scores below the threshold of the cells
  live.takePause = 1000; // milliseconds between two good images of the camera, in which the part can be moved
  const FEWEST = 20, MOST = 40, PER_CLICK = 30; // good images of one's own
  const say = (id, text) => (get(id).textContent = text);
  const highest = values => values.reduce((a, b) => Math.max(a, b));
  const percent = value => `${Math.round(100 * value)} %`;
  const make = (tag, more = {}) => Object.assign(document.createElement(tag), more);
  let isFitting = false;

  // Let a slider select a score.
  const setRange = (id, value, most = 2 * value) => {
    get(id).max = most;
    get(id).step = value / 200;
    get(id).value = value;
  };

  // A small square copy of a canvas.
  const reduce = (canvas, side) => {
    const thumbnail = make("canvas", { width: side, height: side });
    const context = thumbnail.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(canvas, 0, 0, side, side);
    return thumbnail;
  };

  // Draw an image, its map in a colour that is the same for the same distance, and the box of the region above a limit.
  const drawInspection = (canvas, image, { map, score }, limit, largest, opacity) => {
    const { width, height } = image;
    const enlarged = live.upsample(map, IMAGE_SIDE, IMAGE_SIDE, height, width);
    live.drawOverlay(canvas, image, enlarged, opacity, largest);
    const box = score > limit ? live.largestBox(enlarged, width, height, limit / highest(enlarged)) : null;
    if (box) live.drawBox(canvas, box);
    return box;
  };

  // Fit a detector while its button is disabled and its progress bar advances; `more` are further steps of the bar.
  const fitWithProgress = async (detector, images, progress, more = 0) => {
    const total = images.length + detector.levels[0].side + more;
    let done = 0;
    const step = () => (progress.value = ++done / total);
    progress.value = 0;
    progress.hidden = false;
    await live.fit(detector, images, step);
    return step;
  };

  // Run one fit at a time.
  const exclusively = async (run, status) => {
    if (isFitting) return;
    isFitting = true;
    updateButtons();
    try {
      await run();
    } catch (error) {
      say(status, error.message);
    } finally {
      isFitting = false;
      get("live-fit-progress").hidden = get("live-own-progress").hidden = true;
      updateButtons();
    }
  };

  const updateButtons = () => {
    const toLoad = (live.classes ? 0 : live.networkSize()) + (live.cells ? 0 : live.cellsSize);
    say("live-fit", toLoad ? `Load and fit (${live.megabytes(toLoad)})` : "Fit");
    get("live-fit").disabled = isFitting;
    get("live-own-fit").disabled = isFitting || good.length < FEWEST;
    get("live-clear").disabled = isFitting || !good.length;
  };

  // ---- solar cells ------------------------------------------------------------------------------------------------

  let cells = null; // detector, default threshold, unseen cells with their scores

  const fitCells = async () => {
    const progress = get("live-fit-progress"), count = Number(get("live-count").value);
    if (!live.classes) {
      say("live-fit-status", "Loading …");
      progress.hidden = false;
      live.load(share => (progress.value = share)).catch(() => {}); // `start` reports an error
    }
    if (!(await live.start())) throw new Error(get("live-status").textContent);
    await live.loadCells();
    const start = performance.now();
    say("live-fit-status", `Fitting to ${count} functional cells …`);
    const { channels, train, functional, defective } = live.cells;
    const detector = cells?.detector ?? live.createDetector(channels);
    const readers = train.slice(0, count).map(url => async () => live.resize(await live.readUrl(url)));
    const total = functional.length + defective.length;
    const step = await fitWithProgress(detector, readers, progress, total);
    const seconds = (performance.now() - start) / 1000;
    const trainScores = live.leaveOneOutScores(detector);
    const limit = live.quantile(trainScores, QUANTILE);
    say("live-fit-status", `Scoring ${total} unseen cells …`);
    const unseen = [];
    for (const [group, isDefective] of [[defective, true], [functional, false]])
      for (const url of group) {
        const image = await live.readUrl(url);
        const distances = live.measureDistances(detector, live.resize(image));
        const { map, score } = live.anomalyMap(distances);
        const thumbnail = drawThumbnail(image, map, 2 * limit);
        unseen.push({ url, isDefective, distances, score, thumbnail });
        step();
        await live.pause();
      }
    cells = { detector, limit, trainScores, unseen, count };
    showCells();
    say("live-fit-status", `Fitted to ${count} cells in ${seconds.toFixed(1)} s, and scored ${total} others.`);
  };

  const drawThumbnail = (image, map, largest) => {
    const full = make("canvas");
    live.drawOverlay(full, image, map, 0.8, largest);
    return reduce(full, 96);
  };

  const scoresOf = isDefective => cells.unseen.filter(cell => cell.isDefective === isDefective).map(cell => cell.score);

  const showCells = () => {
    for (const part of document.querySelectorAll(".live-unfitted")) part.hidden = true;
    get("live-fitted").hidden = false;
    say("live-auroc", live.auroc(scoresOf(false), scoresOf(true)).toFixed(3));
    say("live-limit-default", cells.limit.toFixed(1));
    say("live-cell-highest", `${(2 * cells.limit).toFixed(0)} or more`);
    const sorted = [...cells.unseen].sort((a, b) => b.score - a.score);
    for (const [id, isDefective] of [["live-defective", true], ["live-functional", false]])
      get(id).replaceChildren(...sorted.filter(cell => cell.isDefective === isDefective).map(cell => {
        cell.button = make("button", { type: "button" });
        cell.button.append(cell.thumbnail, make("span", { textContent: cell.score.toFixed(0) }));
        cell.button.addEventListener("click", async () => {
          await showCell(cell);
          get("live-cell").scrollIntoView({ block: "nearest" }); // on a phone the map may be far above
        });
        return cell.button;
      }));
    setRange("live-limit", cells.limit, Math.max(2 * cells.limit, 1.02 * sorted[0].score));
    cells.shown = sorted.find(cell => cell.isDefective);
    moveLimit();
  };

  // The ROC curve starts above the highest score; each score is one step up or to the right.
  const drawRoc = limit => {
    const functional = scoresOf(false), defective = scoresOf(true);
    const share = (scores, value) => scores.filter(score => score > value).length / scores.length;
    const point = value => `${50 + 240 * share(functional, value)},${240 - 230 * share(defective, value)}`;
    const values = [...functional, ...defective].sort((a, b) => b - a);
    get("live-roc-curve").setAttribute("points", [...values.map(point), "290,10"].join(" "));
    const [x, y] = point(limit).split(",");
    get("live-roc-point").setAttribute("cx", x);
    get("live-roc-point").setAttribute("cy", y);
    const [alarms, falseAlarms] = [share(defective, limit), share(functional, limit)];
    get("live-roc").setAttribute("aria-label", `ROC curve. At the threshold, ${percent(alarms)} of the defective cells and`
      + ` ${percent(falseAlarms)} of the functional cells have an alarm.`);
  };

  const moveLimit = () => {
    const limit = get("live-limit").valueAsNumber;
    const count = (isDefective, isAlarm) =>
      scoresOf(isDefective).filter(score => score > limit === isAlarm).length;
    say("live-limit-value", limit.toFixed(1));
    get("live-limit").setAttribute("aria-valuetext", limit.toFixed(1));
    say("live-true-alarms", count(true, true));
    say("live-misses", count(true, false));
    say("live-false-alarms", count(false, true));
    say("live-true-passes", count(false, false));
    drawRoc(limit);
    for (const cell of cells.unseen) {
      cell.button.classList.toggle("live-alarm", cell.score > limit);
      cell.button.setAttribute("aria-label", describe(cell, limit));
    }
    showCell(cells.shown);
  };

  const describe = ({ isDefective, score }, limit) =>
    `${isDefective ? "Defective" : "Functional"} cell, score ${score.toFixed(0)}, ${score > limit ? "alarm" : "no alarm"}`;

  const showCell = async cell => {
    cells.shown = cell;
    const limit = get("live-limit").valueAsNumber, opacity = get("live-cell-opacity").valueAsNumber / 100;
    for (const { button } of cells.unseen) button.setAttribute("aria-pressed", button === cell.button);
    say("live-cell-opacity-value", percent(opacity));
    const image = await live.readUrl(cell.url);
    if (cells.shown !== cell) return; // another was chosen meanwhile
    const box = drawInspection(get("live-cell"), image, live.anomalyMap(cell.distances), limit, 2 * cells.limit, opacity);
    const place = box ? `The box of the largest region above the threshold: ${live.describeBox(box)}.` : "";
    const text = `${describe(cell, limit)}. ${place}`;
    get("live-cell").setAttribute("aria-label", `Anomaly map. ${text}`);
    say("live-cell-text", text);
  };

  get("live-fit").addEventListener("click", () => exclusively(fitCells, "live-fit-status"));
  get("live-limit").addEventListener("input", moveLimit);
  get("live-limit-reset").addEventListener("click", () => {
    get("live-limit").value = cells.limit;
    moveLimit();
  });
  get("live-cell-opacity").addEventListener("input", () => showCell(cells.shown));

  // ---- one's own part ---------------------------------------------------------------------------------------------

  const good = []; // pixels for the network
  let ownDetector = null;
  let own = null; // the detector and its default threshold, once it is fitted
  let inspected = null; // image, map and score
  let toTake = 0; // images of the camera that are still to be added

  const addGood = image => {
    if (good.length >= MOST) return false;
    good.push(live.resize(image));
    const full = make("canvas", { width: image.width, height: image.height });
    full.getContext("2d").putImageData(image, 0, 0);
    get("live-good-strip").append(reduce(full, 48));
    showGood();
    return true;
  };

  const countGood = () => `${good.length} good image${good.length === 1 ? "" : "s"}`;

  const showGood = () => {
    const enough = good.length < FEWEST ? `${FEWEST} to ${MOST} are needed` : "enough to fit";
    say("live-good-count", `${good.length || "none yet"}; ${enough}.`);
    get("live-good-strip").setAttribute("aria-label", good.length ? countGood() : "No good images yet");
    updateButtons();
  };

  const addGoodFiles = async files => {
    const problems = [];
    for (const file of files)
      try {
        if (good.length >= MOST) {
          problems.push(`Only the first ${MOST} images are used.`);
          break;
        }
        addGood(await live.readFile(file));
        await live.pause();
      } catch (error) {
        problems.push(error.message);
      }
    say("live-own-status", problems.join(" ") || `${countGood()}.`);
  };

  const fitOwn = async () => {
    const start = performance.now();
    await live.loadCells(); // which names the channels
    const detector = (ownDetector ??= live.createDetector(live.cells.channels));
    const images = [...good];
    say("live-own-status", `Fitting to ${images.length} images …`);
    own = null; // no image is inspected during the fit
    await fitWithProgress(detector, images.map(pixels => () => pixels), get("live-own-progress"));
    const scores = live.leaveOneOutScores(detector);
    own = { detector, limit: highest(scores), scores };
    inspected = null;
    setRange("live-own-limit", own.limit);
    get("live-new-row").hidden = false;
    say("live-own-highest", `${(2 * own.limit).toFixed(0)} or more`);
    say("live-own-status", `Fitted to ${images.length} images in ${((performance.now() - start) / 1000).toFixed(1)} s.`
      + ` Threshold: ${own.limit.toFixed(1)}, the highest of their leave-one-out scores. Now show a bad part.`);
  };

  const inspect = (image, name) => {
    const { map, score } = live.anomalyMap(live.measureDistances(own.detector, live.resize(image)));
    inspected = { image, name, map, score };
    get("live-own-view").hidden = get("live-own-result").hidden = get("live-own-scale").hidden = false;
    showInspected();
  };

  const showInspected = () => {
    if (!inspected) return;
    const limit = get("live-own-limit").valueAsNumber, { image, name, score } = inspected;
    const verdict = score > limit ? "Alarm" : "No alarm";
    const box = drawInspection(get("live-own-map"), image, inspected, limit, 2 * own.limit, 0.7);
    say("live-verdict", verdict);
    say("live-own-score", score.toFixed(1));
    say("live-own-limit-value", limit.toFixed(1));
    get("live-own-limit").setAttribute("aria-valuetext", limit.toFixed(1));
    say("live-own-box", box ? `The box of the largest region above the threshold: ${live.describeBox(box)}.` : "");
    get("live-own-map").setAttribute("aria-label", `${name} with its anomaly map: ${verdict}, score ${score.toFixed(1)}`);
  };

  const inspectFile = async file => {
    if (!file) return;
    live.stopCamera();
    try {
      inspect(await live.readFile(file), file.name);
      say("live-own-status", `${file.name}: ${get("live-verdict").textContent}, score ${inspected.score.toFixed(1)}.`);
    } catch (error) {
      say("live-own-status", error.message);
    }
  };

  const showCamera = isOn => {
    get("live-own-camera").hidden = isOn;
    for (const id of ["live-own-stop", "live-take", "live-take-all"]) get(id).hidden = !isOn;
  };

  const startOwnCamera = async () => {
    let camera;
    try {
      camera = await live.startCamera(() => {
        const hadFocus = ["live-own-stop", "live-take", "live-take-all"].includes(document.activeElement.id);
        showCamera(false);
        toTake = 0;
        if (hadFocus) get("live-own-camera").focus();
        say("live-own-status", "The camera is off.");
      });
    } catch (error) {
      say("live-own-status", error.message);
      return;
    }
    showCamera(true);
    get("live-take").focus();
    say("live-own-status", "The camera is running. Its images stay in this page.");
    let last = -Infinity; // when an image was added
    await live.watchCamera(camera, image => {
      if (toTake && performance.now() - last >= live.takePause) {
        last = performance.now();
        toTake = addGood(image) ? toTake - 1 : 0;
        if (!toTake) say("live-own-status", `${countGood()}.`);
      }
      if (own && !toTake) inspect(image, "The camera's image");
      else preview(image);
    });
  };

  const preview = image => {
    get("live-own-view").hidden = false;
    get("live-own-result").hidden = get("live-own-scale").hidden = true;
    const canvas = get("live-own-map");
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", "The camera's image");
  };

  get("live-good").addEventListener("change", async event => {
    const files = [...event.target.files];
    await addGoodFiles(files);
    event.target.value = ""; // so that the same files can be chosen again
  });
  get("live-new").addEventListener("change", event => {
    inspectFile(event.target.files[0]);
    event.target.value = "";
  });
  get("live-own-camera").addEventListener("click", startOwnCamera);
  get("live-own-stop").addEventListener("click", live.stopCamera);
  get("live-take").addEventListener("click", () => (toTake = 1));
  get("live-take-all").addEventListener("click", () => (toTake = PER_CLICK));
  get("live-clear").addEventListener("click", () => {
    good.length = 0;
    get("live-good-strip").replaceChildren();
    showGood();
  });
  get("live-own-fit").addEventListener("click", () => exclusively(fitOwn, "live-own-status"));
  get("live-own-limit").addEventListener("input", showInspected);
  live.acceptDrops(get("live-collect"), () => live.classes, addGoodFiles);
  live.acceptDrops(get("live-inspect"), () => own, ([file]) => inspectFile(file));

  addEventListener("live-started", updateButtons);
  updateButtons();

  // What a test or a curious reader may want to look at.
  live.padim = () => ({ cells, own, inspected, good: good.length });
}
