// Keys: right, left, space, page up and down, home, end; n shows the speaker notes.
const frames = [...document.querySelectorAll(".frame")];
let current = 0;

function show(number) {
  current = Math.max(0, Math.min(frames.length - 1, number));
  frames.forEach((frame, i) => frame.classList.toggle("shown", i === current));
  history.replaceState(null, "", "#" + (current + 1));
  fit();
}

function fit() {
  const notes = document.body.classList.contains("speaker") ? 250 : 0;
  const scale = Math.min(innerWidth / 1280, (innerHeight - notes) / 720);
  for (const slide of document.querySelectorAll(".slide")) {
    slide.style.transform = `scale(${scale})`;
    slide.style.marginBottom = `${720 * (scale - 1)}px`;
    slide.style.marginLeft = `${Math.max(0, (innerWidth - 1280 * scale) / 2)}px`;
  }
}

const steps = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in steps) show(current + steps[event.key]);
  else if (event.key === "Home") show(0);
  else if (event.key === "End") show(frames.length - 1);
  else if (event.key === "n") { document.body.classList.toggle("speaker"); fit(); }
  else return;
  event.preventDefault();
});
addEventListener("resize", fit);
addEventListener("hashchange", () => show(parseInt(location.hash.slice(1)) - 1 || 0));
show(parseInt(location.hash.slice(1)) - 1 || 0);
