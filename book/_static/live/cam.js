// The part "Where does the network look?" of the live page: from an image to a class, its map and its box.
"use strict";

{
  const get = id => document.getElementById(id);
  const percent = value => `${(100 * value).toFixed(1)} %`;
  const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
  const say = text => (get("live-status").textContent = text);
  let current = null; // the image, its result and the chosen class

  const classify = (image, name) => {
    const start = performance.now();
    const result = live.classify(live.resize(image));
    const best = result.logits.indexOf(result.logits.reduce((a, b) => Math.max(a, b)));
    current = { image, name, ...result, best, target: best };
    get("live-class").textContent = live.classes[best];
    get("live-probability").textContent = percent(result.probabilities[best]);
    get("live-search").value = "";
    drawMap();
    get("live-time").textContent = `${(performance.now() - start).toFixed(0)} ms`;
  };

  const drawTop = () => {
    const { probabilities, target } = current;
    const top = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 5);
    const list = get("live-top");
    const focused = list.contains(document.activeElement) && [...list.children].indexOf(document.activeElement);
    list.replaceChildren(
      ...top.map(k => {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", k === target);
        button.style.setProperty("--share", probabilities[k]);
        const share = document.createElement("span");
        share.textContent = percent(probabilities[k]);
        button.append(live.classes[k] + " ", share);
        button.addEventListener("click", () => chooseClass(k));
        return button;
      }),
    );
    if (focused !== false) list.children[focused]?.focus();
  };

  const drawMap = () => {
    const { image, target, features, logits, probabilities } = current;
    const { map, mean, bias } = live.classActivationMap(features, target);
    const enlarged = live.upsample(map, 7, 7, image.height, image.width);
    const canvas = get("live-map");
    live.drawOverlay(canvas, image, enlarged, get("live-opacity").value / 100);
    const share = get("live-threshold").value / 100;
    const box = live.largestBox(enlarged, image.width, image.height, share);
    current = { ...current, map, mean, bias, box };
    if (box) live.drawBox(canvas, box);
    const name = live.classes[target];
    get("live-shown").textContent = name;
    get("live-shown-probability").textContent = percent(probabilities[target]);
    get("live-sum").textContent = `${number(mean, 3)} + ${number(bias, 3)} = ${number(mean + bias)}`;
    get("live-score").textContent = number(logits[target]);
    const largest = map.reduce((a, b) => Math.max(a, Math.abs(b)));
    get("live-lowest").textContent = number(-largest);
    get("live-highest").textContent = number(largest);
    get("live-opacity-value").textContent = `${get("live-opacity").value} %`;
    get("live-threshold-value").textContent = `${get("live-threshold").value} %`;
    const place = box ? live.describeBox(box) : "none, because no value of the map is positive";
    get("live-box").textContent = place;
    canvas.setAttribute("aria-label", `${current.name} with the activation map of the class ${name}; box: ${place}`);
    drawTop();
  };

  const chooseClass = target => {
    current.target = target;
    drawMap();
  };

  const show = async (reading, name) => {
    live.stopCamera();
    try {
      classify(await reading, name);
      say(`Classified ${name}: ${live.classes[current.best]}.`);
    } catch (error) {
      say(error.message);
    }
  };

  live.readSample = name => live.readUrl(live.samples[name]);

  const showFile = file => {
    if (file) show(live.readFile(file), file.name || "the pasted image");
  };

  // ---- camera -----------------------------------------------------------------------------------------------------

  const startCamera = async () => {
    let camera;
    try {
      camera = await live.startCamera(() => {
        const hadFocus = document.activeElement === get("live-stop");
        get("live-stop").hidden = true;
        get("live-camera").hidden = false;
        if (hadFocus) get("live-camera").focus();
        say("The camera is off.");
      });
    } catch (error) {
      say(error.message);
      return;
    }
    get("live-camera").hidden = true;
    get("live-stop").hidden = false;
    get("live-stop").focus();
    say("The camera is running. Its images stay in this page.");
    await live.watchCamera(camera, image => {
      const target = current?.name === "the camera's image" && get("live-keep").checked ? current.target : null;
      classify(image, "the camera's image");
      if (target !== null) chooseClass(target);
    });
  };

  // ---- controls ---------------------------------------------------------------------------------------------------

  get("live-start").textContent = `Load the network (${live.megabytes(live.networkSize())})`;
  get("live-start").disabled = false;
  const start = async () => {
    get("live-start").disabled = true;
    get("live-progress").hidden = false;
    say("Loading …");
    try {
      await live.load(share => (get("live-progress").value = share));
      const options = live.classes.map(name => Object.assign(document.createElement("option"), { value: name }));
      get("live-classes").replaceChildren(...options);
      classify(await live.readSample("cat"), "cat");
      say(`The network is loaded and runs ${live.place}. Its first image is the cat.`);
      for (const part of document.querySelectorAll(".live-after")) part.hidden = false;
      for (const part of document.querySelectorAll(".live-before")) part.hidden = true;
      dispatchEvent(new Event("live-started"));
      return true;
    } catch (error) {
      say(`${error.message} The images on this page still show what it computes.`);
      get("live-progress").hidden = true;
      return false;
    }
  };
  // Load the network once, and show what needs it. Resolves to whether it is loaded.
  let started = null;
  live.start = () => (started ??= start());
  get("live-start").addEventListener("click", async () => {
    if (await live.start()) get("live-class").focus();
  });

  for (const button of document.querySelectorAll("[data-sample]"))
    button.addEventListener("click", () => show(live.readSample(button.dataset.sample), button.dataset.sample));
  get("live-file").addEventListener("change", event => {
    showFile(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  get("live-camera").addEventListener("click", startCamera);
  get("live-stop").addEventListener("click", live.stopCamera);
  for (const id of ["live-opacity", "live-threshold"]) get(id).addEventListener("input", () => current && drawMap());
  get("live-search").addEventListener("change", event => {
    const target = live.classes.indexOf(event.target.value.trim());
    if (target >= 0) chooseClass(target);
    else if (event.target.value.trim()) say(`“${event.target.value}” is not one of the 1,000 classes.`);
  });

  live.acceptDrops(get("live-cam"), () => live.classes, ([file]) => showFile(file));
  addEventListener("paste", event => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file && live.classes) showFile(file);
  });

  // What a test or a curious reader may want to look at.
  live.current = () => current;
  live.say = say;
}
