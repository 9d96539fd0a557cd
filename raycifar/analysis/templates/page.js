for (const figure of document.querySelectorAll("figure:has(svg[data-figures])")) {
  const svg = figure.querySelector("svg"), data = JSON.parse(svg.dataset.figures), area = svg.querySelector(".plot");
  let above = figure.previousElementSibling;
  while (above && !/^H[1-3]$/.test(above.tagName)) above = above.previousElementSibling;
  const heading = above?.textContent ?? "chart";
  const tools = document.createElement("p"), output = document.createElement("output"), cursor = document.createElement("i");
  tools.className = "tools", cursor.className = "cursor", output.className = "values";
  cursor.hidden = output.hidden = true;
  figure.tabIndex = 0;
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-label", `${heading}: values by arrow keys`);
  figure.append(cursor, output);
  figure.after(tools);
  const button = (words, act) => {
    const made = document.createElement("button");
    made.textContent = words, made.type = "button", made.onclick = act;
    made.setAttribute("aria-label", `${words} of ${heading}`);
    tools.append(made);
  };
  const name = `${document.title} ${heading}`.replace(/[^\w.-]+/g, "-").toLowerCase();
  button("SVG", () => save(`${name}.svg`, new Blob([standalone(svg)], { type: "image/svg+xml" })));
  button("PNG", () => savePng(`${name}.png`, svg));
  button("CSV", () => save(`${name}.csv`, new Blob([toCsv(data)], { type: "text/csv" })));

  const down = data.along === "y", size = data.matrix?.length;
  const number = value => value === null ? "unknown" : `${+value.toPrecision(4)}`;
  let at = [0, 0]; // an index of `x`; of a matrix, row and column
  const show = () => {
    const box = area.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const left = box.left - outer.left + figure.scrollLeft, top = box.top - outer.top;
    let place, words;
    if (size) {
      const [row, column] = at, cell = [box.width / size, box.height / size];
      place = [left + column * cell[0], top + row * cell[1], ...cell];
      const images = data.matrix[row][column], of = data.matrix[row].reduce((a, b) => a + b, 0);
      words = row === column ? `${data.names[row]}, answered rightly` : `${data.names[row]}, taken for ${data.names[column]}`;
      words += `: ${images.toLocaleString("en")} of ${of.toLocaleString("en")} images`;
    } else {
      const [low, high] = data.range, k = at[0], scale = data.log ? Math.log : value => value;
      const fraction = (scale(data.x[k]) - scale(low)) / (scale(high) - scale(low));
      place = down ? [left, top + (1 - fraction) * box.height, box.width, 1] : [left + fraction * box.width, top, 1, box.height];
      words = data.names ? data.names[k] : `${data.xlabel} ${number(data.x[k])}`;
      words += ": " + Object.entries(data.series).map(([label, values]) => `${label} ${number(values[k])}`).join("; ");
    }
    ["left", "top", "width", "height"].forEach((side, k) => cursor.style[side] = `${place[k]}px`);
    if (output.textContent !== words) output.textContent = words;
    output.style.left = `${figure.scrollLeft}px`;
    cursor.hidden = output.hidden = false;
  };
  const clip = (value, most) => Math.min(most, Math.max(0, value));
  figure.onpointermove = event => {
    const box = area.getBoundingClientRect();
    const across = clip((event.clientX - box.left) / box.width, 1), deep = clip((event.clientY - box.top) / box.height, 1);
    if (size) at = [deep, across].map(fraction => clip(Math.floor(fraction * size), size - 1));
    else {
      const [low, high] = data.range, fraction = down ? 1 - deep : across;
      const aim = data.log ? low * (high / low) ** fraction : low + fraction * (high - low);
      const distances = data.x.map(x => Math.abs(x - aim));
      at[0] = distances.indexOf(Math.min(...distances));
    }
    show();
  };
  figure.onpointerleave = figure.onblur = () => { cursor.hidden = output.hidden = true; };
  figure.onfocus = () => { if (figure.matches(":focus-visible")) show(); };
  figure.onkeydown = event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (size) at = at.map((value, k) => clip(value + step[k], size - 1));
    else at[0] = clip(at[0] + (down ? -step[0] : step[1]), data.x.length - 1);
    show();
  };
}

function standalone(svg) {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.body);
  copy.removeAttribute("data-figures");
  copy.setAttribute("style", `color: ${style.color}; background: ${style.backgroundColor}`);
  return new XMLSerializer().serializeToString(copy);
}

function savePng(name, svg) {
  const image = new Image(), { width, height } = svg.viewBox.baseVal;
  image.onload = () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 3 * width, height: 3 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(blob => save(name, blob));
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(standalone(svg));
}

function toCsv(data) {
  const cell = value => /[",\n]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : value ?? "";
  const rows = data.matrix
    ? [["", ...data.names], ...data.matrix.map((row, k) => [data.names[k], ...row])]
    : [[data.xlabel, ...Object.keys(data.series)],
       ...data.x.map((x, k) => [data.names ? data.names[k] : x, ...Object.values(data.series).map(values => values[k])])];
  return rows.map(row => row.map(cell).join(",") + "\n").join("");
}

function save(name, blob) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const command of document.querySelectorAll("pre")) {
  const copy = Object.assign(document.createElement("button"), { type: "button", textContent: "Copy", className: "copy" });
  copy.onclick = async () => {
    const words = command.textContent.trim();
    try { await navigator.clipboard.writeText(words); }
    catch { getSelection().selectAllChildren(command); document.execCommand("copy"); }
    copy.textContent = "Copied";
    setTimeout(() => copy.textContent = "Copy", 2000);
  };
  command.after(copy);
}

for (const box of document.querySelectorAll(".scroll")) box.tabIndex = 0;
