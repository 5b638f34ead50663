// Draws the curves of training runs: axis, smoothing, scale, choice of runs and charts, values under the pointer.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 400, HEIGHT = 240, LEFT = 52, RIGHT = 20, TOP = 10, BOTTOM = 40;
  const MAX_ROWS = 14; // runs in the list of values under the pointer
  const AXES = { step: "optimizer steps", seconds: "run time", hours: "hours of audio heard" };

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function draw(parent, tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e5) {
      const unit = [[1e12, ""], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find((pair) => size >= pair[0]);
      if (unit[1]) return `${Number((value / unit[0]).toPrecision(4))}${unit[1]}`;
      return value.toExponential(2);
    }
    if (size > 0 && size < 1e-3) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  }

  // Ticks at 1, 2 or 5 times a power of ten; powers of ten on a logarithmic scale that spans one or more.

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    if (!(raw > 0) || !Number.isFinite(raw)) return [low];
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= raw) ?? raw;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9 && found.length < 20; k++) found.push(k * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    const every = Math.ceil((high - low) / 6);
    for (let k = Math.ceil(low - 1e-9); k <= high + 1e-9; k += Math.max(1, every)) found.push(k);
    return found.length > 1 ? found : ticks(low, high, 4);
  }

  function timeUnit(seconds) {
    if (seconds > 3 * 86400) return [86400, "days"];
    if (seconds > 2 * 3600) return [3600, "hours"];
    return seconds > 180 ? [60, "minutes"] : [1, "seconds"];
  }

  // Exponential moving average without the bias towards 0 at the start; null stays null.

  function smooth(values, weight) {
    if (!weight) return values;
    let mean = 0, share = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      share = weight * share + (1 - weight);
      return mean / share;
    });
  }

  function page(section) {
    const data = JSON.parse(section.querySelector(".curves-data").textContent);
    const shown = data.runs.map(() => true);
    const state = { axis: "step", weight: 0, log: false };
    const xOf = (line) => data.positions[line.positions][state.axis];

    const axis = make("select", { "aria-label": "Horizontal axis" });
    for (const [name, text] of Object.entries(AXES)) axis.append(make("option", { value: name }, text));
    const weight = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "Smoothing" });
    const weightText = make("output", {}, "0");
    const log = make("input", { type: "checkbox" });
    const search = make("input", { type: "search", placeholder: "Search metrics", "aria-label": "Search metrics" });
    const tools = make(
      "div", { class: "tools" }, make("label", {}, "by ", axis), make("label", {}, "smoothing ", weight, weightText),
      make("label", {}, log, " logarithmic"), search,
    );

    const legend = make("div", { class: "legend" });
    const boxes = data.runs.map((run, place) => {
      const box = make("input", { type: "checkbox" });
      box.checked = true;
      box.addEventListener("change", () => { shown[place] = box.checked; redraw(); });
      const swatch = document.createElementNS(SVG, "svg");
      swatch.setAttribute("viewBox", "0 0 30 8");
      draw(swatch, "line", { x1: 0, x2: 30, y1: 4, y2: 4, stroke: run.colour, "stroke-width": 2.5, "stroke-dasharray": run.dash });
      legend.append(make("label", {}, box, swatch, make("span", {}, run.name)));
      return box;
    });
    if (data.runs.length > 1) {
      const choose = (text, wanted) => {
        const button = make("button", { type: "button" }, text);
        button.addEventListener("click", () => {
          boxes.forEach((box, place) => { box.checked = shown[place] = wanted(data.runs[place]); });
          redraw();
        });
        tools.append(button);
      };
      choose("all runs", () => true);
      choose("no runs", () => false);
      const scripts = [...new Set(data.runs.map((run) => run.script))];
      if (scripts.length > 1) {
        for (const script of scripts) if (script) choose(`only ${script}`, (run) => run.script === script);
      }
    }
    const missing = make("p", { class: "note" });

    const visible = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const chart = charts.find((item) => item.box === entry.target);
        chart.visible = entry.isIntersecting;
        if (chart.visible && chart.stale) plot(chart);
      }
    }, { rootMargin: "300px" });
    const groups = new Map();
    const charts = data.charts.map((chart) => {
      if (!groups.has(chart.kind)) {
        const grid = make("div", { class: "charts" });
        const details = make("details", { class: "kind" }, make("summary", {}, chart.kind), grid);
        details.open = chart.open;
        groups.set(chart.kind, { details, grid });
      }
      const values = make("div", { class: "values" });
      const holder = make("div", { class: "plot" });
      const box = make("figure", {}, make("h3", {}, chart.title), holder, values);
      groups.get(chart.kind).grid.append(box);
      const item = { ...chart, box, holder, values, visible: false, stale: true };
      visible.observe(box);
      return item;
    });
    section.prepend(tools, legend, missing, ...[...groups.values()].map((group) => group.details));
    if (!charts.length) legend.append(make("p", { class: "note" }, "No run has a line yet."));

    let frame = 0;
    function redraw() {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => {
        for (const chart of charts) {
          chart.stale = true;
          if (chart.visible) plot(chart);
        }
        const without = new Set();
        for (const chart of charts) for (const line of chart.lines) if (!xOf(line)) without.add(data.runs[line.run].name);
        const reason = `Without a record of ${AXES[state.axis]}: `;
        missing.textContent = without.size ? reason + [...without].join(", ") : "";
      });
    }

    axis.addEventListener("change", () => { state.axis = axis.value; redraw(); });
    weight.addEventListener("input", () => {
      state.weight = Number(weight.value);
      weightText.textContent = weight.value;
      redraw();
    });
    log.addEventListener("change", () => { state.log = log.checked; redraw(); });
    search.addEventListener("input", () => {
      const text = search.value.toLowerCase();
      for (const chart of charts) chart.box.hidden = !chart.title.toLowerCase().includes(text);
      for (const { details, grid } of groups.values()) {
        details.hidden = [...grid.children].every((box) => box.hidden);
        if (text && !details.hidden) details.open = true;
      }
    });

    function plot(chart) {
      chart.stale = false;
      const scale = (value) => {
        if (value === null || value === undefined) return null;
        if (!state.log) return value;
        return value > 0 ? Math.log10(value) : null;
      };
      const lines = chart.lines.filter((line) => shown[line.run] && xOf(line)).map((line) => {
        const mean = smooth(line.mean, state.weight);
        return {
          run: data.runs[line.run], axis: state.axis, x: xOf(line), values: mean, y: mean.map(scale), raw: line.mean.map(scale),
          low: line.low && line.low.map(scale), high: line.high && line.high.map(scale),
        };
      });
      const xs = lines.flatMap((line) => line.x.filter((x, i) => line.raw[i] !== null));
      let left = Infinity, right = -Infinity, low = Infinity, high = -Infinity;
      for (const x of xs) { left = Math.min(left, x); right = Math.max(right, x); }
      for (const line of lines) {
        for (const values of [line.y, line.raw]) {
          for (const y of values) if (y !== null) { low = Math.min(low, y); high = Math.max(high, y); }
        }
      }
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", chart.title);
      chart.values.replaceChildren();
      chart.holder.replaceChildren(svg);
      if (!xs.length || low > high) {
        draw(svg, "text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no values");
        return;
      }
      if (left === right) { left -= 0.5; right += 0.5; }
      const pad = low === high ? Math.abs(low) * 0.05 || 0.5 : (high - low) * 0.05;
      low -= pad;
      high += pad;
      const [unit, unitName] = state.axis === "seconds" ? timeUnit(right) : [1, AXES[state.axis]];
      const px = (x) => LEFT + ((x - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
      // Divided first: the range of a hostile file can exceed the largest number.
      const py = (y) => TOP + (high / (high - low) - y / (high - low)) * (HEIGHT - TOP - BOTTOM);
      for (const y of state.log ? logTicks(low, high) : ticks(low, high, 5)) {
        draw(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y) });
        draw(svg, "text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, short(state.log ? 10 ** y : y));
      }
      for (const x of ticks(left / unit, right / unit, 5)) {
        draw(svg, "line", { class: "tick", x1: px(x * unit), x2: px(x * unit), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 });
        draw(svg, "text", { x: px(x * unit), y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, short(x));
      }
      const xName = state.axis === "seconds" ? `run time, ${unitName}` : unitName;
      draw(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xName);
      draw(svg, "line", { class: "tick", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM });
      const inside = draw(svg, "g", {});
      for (const line of lines) {
        if (line.low) band(inside, line, px, (y) => py(Math.min(high, Math.max(low, y))));
        if (state.weight) path(inside, line.x, line.raw, px, py, { stroke: line.run.colour, class: "raw" });
      }
      for (const line of lines) {
        path(inside, line.x, line.y, px, py, { stroke: line.run.colour, "stroke-dasharray": line.run.dash, class: "line" });
        restarts(inside, line, px, py);
      }
      const cursor = draw(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
      svg.addEventListener("pointermove", (event) => {
        const place = svg.getBoundingClientRect();
        const x = left + ((((event.clientX - place.left) / place.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * (right - left);
        cursor.setAttribute("x1", px(x));
        cursor.setAttribute("x2", px(x));
        list(chart, lines, x, unit);
      });
      svg.addEventListener("pointerleave", () => {
        cursor.setAttribute("x1", -9);
        cursor.setAttribute("x2", -9);
        chart.values.replaceChildren();
      });
    }

    function path(parent, x, y, px, py, attributes) {
      let text = "";
      y.forEach((value, i) => {
        if (value === null) return;
        const start = i === 0 || y[i - 1] === null;
        const alone = start && (i === y.length - 1 || y[i + 1] === null);
        if (alone) draw(parent, "circle", { class: attributes.class, cx: px(x[i]), cy: py(value), r: 2.2, fill: attributes.stroke });
        text += `${start ? "M" : "L"}${px(x[i]).toFixed(1)} ${py(value).toFixed(1)}`;
      });
      draw(parent, "path", { d: text, ...attributes });
    }

    function band(parent, line, px, py) {
      const there = [], back = [];
      const flush = () => {
        if (there.length > 1) draw(parent, "path", { class: "band", fill: line.run.colour, d: `M${there.join("L")}L${back.reverse().join("L")}Z` });
        there.length = back.length = 0;
      };
      line.x.forEach((x, i) => {
        if (line.low[i] === null || line.high[i] === null) return flush();
        there.push(`${px(x).toFixed(1)} ${py(line.high[i]).toFixed(1)}`);
        back.push(`${px(x).toFixed(1)} ${py(line.low[i]).toFixed(1)}`);
      });
      flush();
    }

    function restarts(parent, line, px, py) {
      line.run.restarts[line.axis].forEach((x, i) => {
        let place = -1;
        line.x.forEach((position, k) => { if (position <= x && line.y[k] !== null) place = k; });
        if (place < 0) place = line.y.findIndex((y) => y !== null);
        if (place < 0) return;
        const dot = draw(parent, "circle", { class: "restart", cx: px(line.x[place]), cy: py(line.y[place]), r: 3.6, stroke: line.run.colour });
        draw(dot, "title", {}, `${line.run.name}: restart after step ${line.run.restarts.step[i]}`);
      });
    }

    function list(chart, lines, x, unit) {
      const rows = [];
      for (const line of lines) {
        let best = -1;
        line.x.forEach((position, i) => {
          if (line.y[i] !== null && (best < 0 || Math.abs(position - x) < Math.abs(line.x[best] - x))) best = i;
        });
        if (best >= 0) rows.push([line.values[best], line, best]);
      }
      rows.sort((a, b) => b[0] - a[0]);
      chart.values.replaceChildren(...rows.slice(0, MAX_ROWS).map(([value, line, i]) => {
        const mark = make("i", {});
        mark.style.background = line.run.colour;
        const number = make("b", {}, String(Number(value.toPrecision(6))));
        return make("div", {}, mark, number, ` at ${short(line.x[i] / unit)} `, make("span", {}, line.run.name));
      }));
      if (rows.length > MAX_ROWS) chart.values.append(make("div", {}, `and ${rows.length - MAX_ROWS} more`));
    }
  }

  for (const section of document.querySelectorAll(".curves")) page(section);
})();
