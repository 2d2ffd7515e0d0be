// Draw every formula of the page with KaTeX. Sphinx leaves TeX between \( \) or \[ \], and bare environments, in .math.
for (const element of document.querySelectorAll(".math")) {
  for (const node of [...element.childNodes]) {
    const tex = node.nodeType === Node.TEXT_NODE ? node.data.trim() : "";
    const delimited = tex.match(/^\\([([])([\s\S]*)\\[)\]]$/);
    if (!delimited && !tex.startsWith("\\begin{")) continue;
    const drawn = document.createElement("span");
    // A mistake is shown in red in its place, where a reader and the browser test see it.
    katex.render(delimited ? delimited[2] : tex, drawn, {
      displayMode: !delimited || delimited[1] === "[",
      throwOnError: false,
      strict: "error",
    });
    node.replaceWith(drawn);
  }
}
