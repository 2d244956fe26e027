"use strict";
// What a page of lever does in the browser: charts from the JSON of `data-chart`, tables that sort
// and filter. Texts from the data are only ever set as text.
(() => {
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const FORMATS = {
    percent: (v) => `${+(100 * v).toFixed(2)} %`,
    number: (v) => `${+v.toPrecision(4)}`,
  };
  const WHOLE = [1, 2, 5].flatMap((k) => [...Array(10).keys()].map((e) => k * 10 ** e)).sort((a, b) => a - b);
  const DODGE = 7; // pixels between the intervals of lines that share an x
  const drawn = [];
  let weight = 0; // of the past in a smoothed line

  const make = (tag, attributes = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...inside);
    return element;
  };

  // The mean of the past with weights that fall off by `weight`, without the bias to 0 at the start.
  function smooth(values) {
    let sum = 0, mass = 0;
    return values.map((v) => {
      if (v === null) return v;
      sum = weight * sum + (1 - weight) * v;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  }

  // Series for uPlot: of every line the (smoothed) values, and what else it shows, quietly.
  function parts(spec) {
    const series = [{ label: spec.x_label, value: (u, v) => (v === null ? "–" : spec.ticks?.[spec.x.indexOf(v)] ?? v) }];
    const data = [spec.x], bands = [];
    const format = FORMATS[spec.y];
    for (const line of spec.lines) {
      const stroke = css(line.colour), isSmooth = spec.smooth && weight > 0;
      const known = line.y.filter((v) => v !== null).length;
      series.push({
        label: line.name, stroke, width: 2, dash: line.dash, spanGaps: true,
        value: (u, v) => (v === null ? "–" : format(v)),
        points: { show: known <= spec.dots, size: 6, fill: stroke },
        ...(spec.kind === "bars" ? { fill: stroke, width: 0, paths: uPlot.paths.bars({ size: [0.94, 90] }), points: { show: false } } : {}),
        ...(spec.kind === "interval" ? { paths: () => null, points: { show: false } } : {}),
      });
      data.push(isSmooth ? smooth(line.y) : line.y);
      if (line.low && spec.kind === "line") {
        const at = series.length;
        for (const edge of [line.high, line.low]) {
          series.push({ label: "", class: "quiet", stroke: "transparent", width: 0, points: { show: false } });
          data.push(edge);
        }
        bands.push({ series: [at, at + 1], fill: `${stroke}33` });
      } else if (isSmooth) {
        series.push({ label: "", class: "quiet", stroke: `${stroke}55`, width: 1, points: { show: false } });
        data.push(line.y);
      }
    }
    return { series, data, bands };
  }

  // Lines with an interval at each point, side by side where they share an x.
  function drawIntervals(u, spec) {
    const g = u.ctx, ratio = devicePixelRatio;
    const shown = spec.lines.filter((line, i) => u.series[i + 1].show);
    g.save();
    shown.forEach((line, i) => {
      const shift = (i - (shown.length - 1) / 2) * DODGE * ratio;
      const at = (x, y) => [u.valToPos(x, "x", true) + shift, u.valToPos(y, "y", true)];
      const path = (places) => {
        g.beginPath();
        places.forEach(([x, y], k) => (k ? g.lineTo(x, y) : g.moveTo(x, y)));
        g.stroke();
      };
      const known = spec.x.map((x, k) => k).filter((k) => line.y[k] !== null);
      g.strokeStyle = g.fillStyle = css(line.colour);
      g.lineWidth = 2 * ratio;
      g.setLineDash((line.dash ?? []).map((d) => d * ratio));
      if (spec.joined) path(known.map((k) => at(spec.x[k], line.y[k])));
      g.setLineDash([]);
      g.lineWidth = 1.5 * ratio;
      for (const k of known) {
        if (line.low) path([at(spec.x[k], line.low[k]), at(spec.x[k], line.high[k])]);
        g.beginPath();
        g.arc(...at(spec.x[k], line.y[k]), 4 * ratio, 0, 7);
        g.fill();
      }
    });
    g.restore();
  }

  function bounds(spec) {
    const all = spec.lines.flatMap((l) => [...l.y, ...(l.low ?? []), ...(l.high ?? [])]).filter((v) => v !== null);
    const low = Math.min(...all, ...(spec.from_zero ? [0] : [])), high = Math.max(...all);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [spec.from_zero && low === 0 ? 0 : low - room, high + room];
  }

  function draw(holder) {
    const spec = JSON.parse(holder.dataset.chart);
    const { series, data, bands } = parts(spec);
    const width = () => Math.max(240, holder.clientWidth);
    const axis = { stroke: css("soft"), grid: { stroke: css("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
    const first = spec.x[0], last = spec.x[spec.x.length - 1];
    const side = spec.kind === "line" ? (last > first ? 0 : 1) : spec.step / 2;
    const ticks = spec.ticks && { splits: () => spec.x, values: () => spec.ticks };
    const showLast = (u) => u.setLegend({ idx: spec.x.length - 1 });
    const plot = new uPlot({
      width: width(), height: spec.height, series, bands,
      scales: { x: { time: false, range: (u, a, b) => (a === b || u.data[0].length < 2 ? [first - side, last + side] : a === first && b === last ? [first - side, last + side] : [a, b]) }, y: { range: () => bounds(spec) } },
      axes: [
        { ...axis, label: spec.x_label, labelSize: 18, labelGap: 0, size: 26, space: 40, ...(spec.whole ? { incrs: WHOLE } : {}), ...ticks },
        { ...axis, size: 52, values: (u, splits) => splits.map(FORMATS[spec.y]) },
      ],
      cursor: { y: false, points: { show: spec.kind === "line" } },
      hooks: { ready: [showLast], draw: spec.kind === "interval" ? [(u) => drawIntervals(u, spec)] : [] },
    }, data, holder);
    plot.over.addEventListener("mouseleave", () => showLast(plot));
    const watcher = new ResizeObserver(() => plot.setSize({ width: width(), height: spec.height }));
    watcher.observe(holder);
    drawn.push(() => { watcher.disconnect(); plot.destroy(); });
  }

  function drawAll() {
    drawn.splice(0).forEach((remove) => remove());
    document.querySelectorAll("[data-chart]").forEach(draw);
  }

  function offerSmoothing() {
    const place = document.querySelector("#smoothing");
    if (!place) return;
    const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 });
    slider.addEventListener("input", () => { weight = +slider.value; drawAll(); });
    place.append(make("label", {}, "Smooth the curves of steps: ", slider));
  }

  const sortKey = (row, column) => {
    const cell = row.cells[column];
    const text = cell.textContent.trim();
    const key = cell.dataset.sort ?? (text.replace(/[,%\s]/g, "") || text);
    return key !== "" && isFinite(key) ? +key : text;
  };

  function sort(table, column, isDown) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [sortKey(row, column), row]);
    const rank = (key) => (typeof key === "number" ? 0 : 1); // numbers, then texts and what is missing
    rows.sort(([a], [b]) => rank(a) - rank(b) || (isDown ? -1 : 1) * (typeof a === "number" ? a - b : a.localeCompare(b)));
    body.append(...rows.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  function enhance(table) {
    const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows];
    if (rows.length < 2) return;
    const choice = make("select", {}, make("option", { value: "" }, "sort by …"));
    heads.forEach((head, column) => {
      const toggle = () => sort(table, column, head.getAttribute("aria-sort") !== "descending");
      const button = make("button", { type: "button" }, head.textContent);
      button.addEventListener("click", toggle);
      head.replaceChildren(button);
      choice.append(make("option", { value: column }, button.textContent));
    });
    choice.addEventListener("change", () => choice.value && sort(table, +choice.value, +choice.value > 0));
    const controls = make("div", { className: "controls" }, make("label", { className: "narrow" }, choice));
    if (rows.length > 8) {
      const filter = make("input", { type: "search", placeholder: "filter rows" });
      filter.setAttribute("aria-label", "filter rows");
      filter.addEventListener("input", () => {
        const words = filter.value.toLowerCase().split(/\s+/);
        for (const row of rows) row.hidden = !words.every((w) => row.textContent.toLowerCase().includes(w));
      });
      controls.append(filter);
    }
    table.parentElement.before(controls);
  }

  document.querySelectorAll(".scroll > table:not(.pairs, .asis)").forEach(enhance);
  offerSmoothing();
  drawAll();
  document.addEventListener("lever:figures", drawAll); // who changed a `data-chart` says so
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
