// Commands can be copied.
for (const pre of document.querySelectorAll("pre.copy")) {
  const text = pre.textContent, button = document.createElement("button");
  button.className = "copy"; button.textContent = "Copy";
  button.addEventListener("click", async () => { await navigator.clipboard.writeText(text); button.textContent = "Copied"; });
  pre.append(button);
}
// Charts answer to the arrow keys and the pointer: a cursor, and its values in words over the side where it is not.
for (const figure of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(figure.dataset.lines), svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), output = figure.querySelector("output");
  const places = [...new Set(lines.flatMap(([, points]) => points.map(p => p[0])))].sort((a, b) => a - b);
  const unit = figure.dataset.y && ` (${figure.dataset.y})`;
  let at = -1;
  const show = index => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const here = places[at];
    const near = lines.map(([, points]) => points.reduce((a, b) => Math.abs(b[0] - here) < Math.abs(a[0] - here) ? b : a));
    const x = near.find(point => point[0] === here)[1], said = value => value && Math.abs(value) < 1e-3
      ? value.toExponential(2) : value.toLocaleString("en", {maximumSignificantDigits: 6});
    // A line may be shorter, or have fewer points: its nearest value says where it is from.
    const texts = lines.map(([label], i) => `${label}: ${said(near[i][2])}` + (near[i][0] === here ? "" : `, at ${said(near[i][1])}`));
    for (const [key, value] of [["x1", here], ["x2", here], ["y1", 14], ["y2", 196]]) cursor.setAttribute(key, value);
    cursor.style.visibility = "visible";
    output.textContent = [`${figure.dataset.x} ${said(x)}${unit}`, ...texts].join("\n");
    output.parentElement.classList.toggle("left", here < 320);
  };
  const hide = () => { cursor.style.visibility = "hidden"; output.textContent = ""; };
  figure.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20}[event.key];
    if (event.key === "Home") show(0); else if (event.key === "End") show(places.length - 1);
    else if (step) show(at + step); else return;
    event.preventDefault();
  });
  figure.addEventListener("blur", hide);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const x = (event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth * 640;
    show(places.reduce((best, p, i) => Math.abs(p - x) < Math.abs(places[best] - x) ? i : best, 0));
  });
}
