"use strict";
(async () => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const inflate = async (id) => {
    const text = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  // --- theme -------------------------------------------------------------------------------
  const scale = (colours) => colours.map((c, i) => [i / (colours.length - 1), c]);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("lcray-theme"); } catch { /* a file may have no storage */ }
  let printing = false;
  const theme = () => (printing ? "light" : chosen || (dark.matches ? "dark" : "light"));
  const setTheme = () => { document.documentElement.dataset.theme = theme(); };
  setTheme();
  const colour = (role) => {
    const colours = page.themes[theme()];
    if (role === "diverging") return scale(colours.diverging);
    if (role === "contrast") return scale([...colours.diverging].reverse());
    if (/^s\d$/.test(role)) return colours.categories[+role[1]];
    if (role.includes("|")) return role.split("|")[theme() === "dark" ? 1 : 0];
    return colours[role];
  };

  // --- numbers -----------------------------------------------------------------------------
  let page, decoded = [];
  const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array };
  const array = (number) => {
    if (!decoded[number]) {
      const [kind, text] = page.arrays[number];
      const raw = atob(text), bytes = new Uint8Array(raw.length);
      for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
      decoded[number] = new TYPES[kind](bytes.buffer);
    }
    return decoded[number];
  };
  const numbers = (reference) => {
    if (Array.isArray(reference)) return reference;
    let values = array(reference.$);
    if (reference.at) values = values.subarray(reference.at[0], reference.at[0] + reference.at[1]);
    if (!reference.rows) return values;
    const width = values.length / reference.rows;
    return Array.from({ length: reference.rows }, (_, i) => values.subarray(i * width, (i + 1) * width));
  };
  const minus = (text) => text.replace("-", "−");
  const short = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e15) return minus(value.toLocaleString("en"));
    return minus(size < 1e-4 || size >= 1e6 ? value.toExponential(digits - 1) : String(+value.toPrecision(digits)));
  };
  const signed = (value, digits = 3) => (value > 0 ? "+" : "") + short(value, digits);

  // --- charts ------------------------------------------------------------------------------
  const isColour = (text) => typeof text === "string" && text[0] === "@";
  const resolved = (node) => {
    if (isColour(node)) return colour(node.slice(1));
    if (Array.isArray(node)) return node.map(resolved);
    if (node && typeof node === "object") {
      if ("$" in node) return numbers(node);
      return Object.fromEntries(Object.entries(node).map(([k, v]) => [k, resolved(v)]));
    }
    return node;
  };
  const cut = (name, most) => {
    if (name.length <= most) return name;
    const tail = Math.ceil((most - 1) * 0.6);
    return name.slice(0, most - 1 - tail) + "…" + name.slice(-tail);
  };
  const shown = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const labelled = (axis, most, height) => {
    const names = axis.names, every = axis.sparse || names.length * 10 > height ? Math.ceil((names.length * 13) / height) : 1;
    const at = names.map((_, i) => i).filter((i) => i % every === 0);
    const { names: _, rows, sparse, ...rest } = axis;
    return { ...rest, tickmode: "array", tickvals: at, ticktext: at.map((i) => shown(cut(names[i], most))), showgrid: !!rows, zeroline: false };
  };
  const laidOut = (figure, width) => {
    const colours = page.themes[theme()], narrow = width < 560;
    const { half, untimed, ...given } = resolved(figure.layout);
    const axis = { gridcolor: colours.grid, zerolinecolor: colours.zero, zeroline: false, linecolor: colours.zero, tickcolor: colours.zero,
      automargin: true, tickfont: { color: colours.muted, size: narrow || figure.height > 700 ? 10 : 12 }, exponentformat: "power", minexponent: 5, separatethousands: true };
    const layout = { ...given };
    for (const key of Object.keys(given)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      const own = given[key].names ? labelled(given[key], narrow ? 20 : 34, figure.height - 60) : given[key];
      const title = own.title && { ...own.title, font: { color: colours.muted, size: narrow ? 12 : 13 }, standoff: 8 };
      layout[key] = { ...axis, ...own, ...(title && { title }) };
      if (key[0] === "x" && !own.type) layout[key].nticks = narrow ? 5 : 10;
      if (key[0] === "y") layout[key].ticksuffix = " ";
      if (narrow && own.domain && title) layout[key].title.text = own.title.text;
    }
    const lines = half === undefined ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: half, y1: half,
      line: { color: colours.zero, width: 1, dash: "dash" } }];
    return { ...layout, height: figure.height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: figure.traces[0] && figure.traces[0].type === "heatmap" ? colours.missing : "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colours.ink, size: 13 },
      margin: { l: 10, r: 12, t: given.legend ? 34 : 10, b: 44, pad: 0, ...given.margin, ...(narrow && given.margin && given.margin.r ? { r: 74 } : {}) },
      hoverlabel: { bgcolor: colours.page, bordercolor: colours.zero, font: { color: colours.ink, size: 13 }, align: "left", namelength: -1 },
      annotations: (given.annotations || []).map((a) => ({ ...a, font: { size: figure.height > 700 ? 10 : narrow ? 11 : 12, ...a.font } })),
      shapes: lines, legend: { font: { size: narrow ? 11 : 12.5 }, ...given.legend }, hovermode: "closest", dragmode: narrow ? false : "zoom" };
  };
  const config = { responsive: false, displaylogo: false, displayModeBar: false, doubleClick: "reset+autosize", showTips: false };

  const state = { split: 0, window: 0, at: 0 };
  const views = [];
  const key = (view) => {
    const parts = view.section.bySplit ? [state.split] : [];
    return [...parts, ...view.choice].join(".");
  };
  const figureOf = (view) => view.section.figures[key(view)];
  const moment = () => {
    const window = page.windows[state.window];
    return [numbers(window.starts)[state.at], numbers(window.ends)[state.at]];
  };
  const marker = (view, figure) => {
    if (!page.windows || !view.section.time || figure.layout.untimed) return [];
    const [x0, x1] = moment(), colours = page.themes[theme()];
    return [{ type: "rect", xref: "x", yref: "paper", x0, x1, y0: 0, y1: 1, fillcolor: colours.marker, name: "moment",
      line: { color: colours.marker_line, width: 1 }, layer: "above" }];
  };
  const ramp = (colours, trace) => {
    const strip = make("i");
    strip.style.background = `linear-gradient(to right, ${colours.map(([, c]) => c).join(", ")})`;
    return make("div", { class: "scale" }, short(trace.zmin, 2), strip, `${signed(trace.zmax, 2)} ${trace.colorbar.title.text}`);
  };
  const draw = (view) => {
    const figure = figureOf(view);
    const width = printing ? 700 : view.chart.clientWidth;
    const layout = laidOut(figure, width);
    view.chart.style.minHeight = layout.height + "px";
    view.lines = layout.shapes;
    layout.shapes = [...view.lines, ...marker(view, figure)];
    layout.width = width;
    view.drawn = true;
    view.stale = false;
    const traces = resolved(figure.traces);
    const font = { color: page.themes[theme()].muted, size: 12 };
    for (const t of traces) {
      if (!t.colorbar) continue;
      if (t.x.length > t.z[0].length) {
        const steps = Array.from(t.z[0], (_, i) => `${t.x[i].toLocaleString("en")} to ${t.x[i + 1].toLocaleString("en")}`);
        t.customdata = t.z.map(() => steps);
      }
      Object.assign(t.colorbar, { tickfont: font, title: { ...t.colorbar.title, font }, exponentformat: "power" });
      if (figure.height > 420) Object.assign(t.colorbar, { lenmode: "pixels", len: 260, y: 1, yanchor: "top" });
      if (width < 560) t.showscale = false;
    }
    const scaled = figure.traces.find((t) => t.colorbar), root = view.root;
    $(".scale", root)?.remove();
    if (scaled && width < 560) view.chart.before(ramp(colour(scaled.colorscale.slice(1)), scaled));
    return Plotly.react(view.chart, traces, layout, config);
  };
  const mark = (view) => {
    const figure = figureOf(view);
    if (!view.drawn || !view.section.time || figure.layout.untimed) return;
    if (!view.visible) { view.stale = true; return; }
    view.stale = false;
    Plotly.relayout(view.chart, { shapes: [...view.lines, ...marker(view, figure)] });
  };
  const redraw = () => views.filter((view) => view.drawn).forEach(draw);

  // --- tables ------------------------------------------------------------------------------
  const PAGE_ROWS = 100;
  const fill = (view) => {
    const figure = figureOf(view), rows = $(".rows", view.root);
    const columns = figure.columns.map((c) => ({ ...c, data: numbers(c.values) }));
    const cell = (column, row) => {
      const value = column.data[Math.floor(row / column.each) % column.data.length];
      const td = make("td");
      if (typeof value === "string") { td.className = "word"; td.textContent = value; return td; }
      td.textContent = short(value, 6);
      td.dataset.value = value;
      return td;
    };
    const show = (first) => {
      const last = Math.min(first + PAGE_ROWS, figure.rows), body = make("tbody");
      for (let row = first; row < last; row++) body.append(make("tr", {}, ...columns.map((c) => cell(c, row))));
      const head = make("tr", {}, ...columns.map((c) => make("th", { scope: "col" }, c.name, make("small", {}, c.unit))));
      const table = make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), body));
      const pager = make("div", { class: "pager" }, `rows ${figure.rows ? first + 1 : 0} to ${last} of ${figure.rows.toLocaleString("en")}`);
      if (figure.rows > PAGE_ROWS) {
        for (const [text, to] of [["earlier", first - PAGE_ROWS], ["later", first + PAGE_ROWS]]) {
          const button = make("button", { type: "button" }, text);
          button.disabled = to < 0 || to >= figure.rows;
          button.onclick = () => show(to);
          pager.append(button);
        }
      }
      rows.replaceChildren(pager, table);
    };
    show(0);
  };

  // --- one moment --------------------------------------------------------------------------
  let all = false;
  const panel = () => {
    const window = page.windows[state.window], [from, to] = moment(), s = state.split;
    const lc = numbers(window.lc[s]).map((row) => row[state.at]);
    const change = numbers(window.change[s])[state.at], total = numbers(window.total[s])[state.at];
    const order = lc.map((_, i) => i).filter((i) => !Number.isNaN(lc[i])).sort((a, b) => lc[a] - lc[b]);
    const best = order[0], worst = order[order.length - 1];
    const say = [`${page.splits[s]} loss ${signed(change)}, Σ LC ${signed(total)}`];
    if (order.length && lc[best] < 0) say.push(`most help: ${page.layers[best]} ${signed(lc[best])}`);
    if (order.length && lc[worst] > 0) say.push(`most hurt: ${page.layers[worst]} ${signed(lc[worst])}`);
    const steps = `Steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}`;
    $("#bar output").replaceChildren(make("b", {}, steps), " · " + say.join(" · "));
    $("#bar input").setAttribute("aria-valuetext", steps);
    const largest = Math.max(...lc.map((v) => Math.abs(v) || 0)) || 1;
    const most = 24, bySize = [...order].sort((a, b) => Math.abs(lc[b]) - Math.abs(lc[a]));
    const kept = new Set(all || lc.length <= most + 6 ? lc.keys() : bySize.slice(0, most));
    $("#all").hidden = !all && kept.size === lc.length;
    $("#all").textContent = all ? `only the ${most} largest` : `all ${lc.length} layers; these are the ${most} largest`;
    const rows = [...lc.keys()].filter((i) => kept.has(i)).map((i) => {
      const value = lc[i];
      const word = value > 0 ? "hurts" : "helps", size = (50 * Math.abs(value || 0)) / largest;
      const bar = make("i", { class: word });
      bar.style.width = size + "%";
      bar.style.left = (value > 0 ? 50 : 50 - size) + "%";
      const number = make("td", { class: word }, (value > 0 ? "▲ " : "") + signed(value, 4));
      number.dataset.value = value;
      return make("tr", {}, make("th", { scope: "row", title: page.layers[i] }, page.layers[i]), number,
        make("td", { class: "bar" }, make("div", { class: "track" }, bar)));
    });
    $("#moment .says").textContent = `${steps}: ${say.join("; ")}.`;
    $("#moment tbody").replaceChildren(...rows);
  };
  let waiting = false;
  const moved = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; panel(); views.forEach(mark); });
  };
  const select = (name, options, change) => {
    const box = make("select", {}, ...options.map((text, i) => make("option", { value: i }, text)));
    box.onchange = () => change(+box.value);
    return make("label", {}, make("span", {}, name), box);
  };
  const themeButton = () => {
    const button = make("button", { type: "button", id: "theme", "aria-label": "Light or dark" }, "◐");
    button.onclick = () => {
      chosen = theme() === "dark" ? "light" : "dark";
      try { localStorage.setItem("lcray-theme", chosen); } catch { /* as above */ }
      setTheme();
      redraw();
    };
    return button;
  };
  const addBar = () => {
    const inner = make("div", { class: "inner" });
    if (page.splits.length > 1) {
      inner.append(select("Split", page.splits, (to) => {
        state.split = to;
        views.forEach((view) => { if (view.drawn && view.section.bySplit) draw(view); if ($(".table", view.root).open) fill(view); });
        if (page.windows) panel();
      }));
    }
    if (page.windows) {
      const slider = make("input", { type: "range", id: "slider", min: 0, step: 1, "aria-label": "Interval or window of the run" });
      const fit = (keep) => {
        const starts = numbers(page.windows[state.window].starts);
        let at = 0;
        while (at + 1 < starts.length && starts[at + 1] <= keep) at++;
        slider.max = starts.length - 1;
        slider.disabled = starts.length < 2;
        slider.value = state.at = at;
      };
      slider.oninput = () => { state.at = +slider.value; moved(); };
      inner.append(select("Look at", page.windows.map((w) => w.label), (to) => {
        const [from] = moment();
        state.window = to;
        fit(from);
        moved();
      }), slider);
      const all = numbers(page.windows[0].total[0]);
      let deepest = 0;
      all.forEach((value, i) => { if (!(all[deepest] <= value)) deepest = i; });
      fit(numbers(page.windows[0].starts)[deepest]);
    } else inner.append(make("span", { style: "flex:1" }));
    inner.append(themeButton());
    if (page.windows) inner.append(make("output", { for: "slider" }));
    $("#bar").append(inner);
    $("#bar").hidden = false;
  };
  const addPanel = () => {
    const more = make("button", { type: "button", id: "all" });
    more.onclick = () => { all = !all; panel(); };
    const section = make("section", { class: "figure", id: "moment", "aria-labelledby": "moment-title" },
      make("h2", { id: "moment-title" }, "One interval or window at a time"), make("p", { class: "says" }),
      make("p", { class: "reading" }, "LC of each layer in the steps that the slider at the bottom has; a band marks them in the charts along the run."),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"),
        make("th", { scope: "col" }, "LC", make("small", {}, "loss")), make("th", {}))), make("tbody"))), more);
    const before = $("#heat-map") || $("section.figure");
    before.after(section);
    const link = $('nav a[href="#heat-map"]');
    if (link) link.parentNode.after(make("li", {}, make("a", { href: "#moment" }, "One interval at a time")));
  };

  // --- begin -------------------------------------------------------------------------------
  const [source, text] = await Promise.all([inflate("plotly"), inflate("data")]);
  page = JSON.parse(text);
  const script = make("script");
  script.textContent = source;
  document.head.append(script);
  for (const section of page.sections) {
    const root = document.getElementById(section.id);
    const view = { section, root, chart: $(".chart", root), choice: section.controls.map(() => 0), drawn: false, visible: false };
    section.controls.forEach((control, i) => $(".controls", root).append(select(control.label, control.options, (to) => {
      view.choice[i] = to;
      draw(view);
      if ($(".table", root).open) fill(view);
    })));
    $(".table", root).addEventListener("toggle", (event) => { if (event.target.open) fill(view); });
    views.push(view);
  }
  addBar();
  if (page.windows) { addPanel(); panel(); }
  if (views.length) draw(views[0]);
  document.documentElement.dataset.first = Math.round(performance.now());
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const view = views.find((v) => v.chart === entry.target);
      view.visible = entry.isIntersecting;
      if (!view.visible) continue;
      if (!view.drawn) draw(view);
      else if (view.stale) mark(view);
    }
  }, { rootMargin: "300px 0px" });
  views.forEach((view) => seen.observe(view.chart));
  dark.addEventListener("change", () => { setTheme(); redraw(); });
  let resizing = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width || printing) return;
    width = innerWidth;
    clearTimeout(resizing);
    resizing = setTimeout(redraw, 150);
  });
  const print = (on) => { printing = on; setTheme(); if (on) views.forEach(draw); else redraw(); };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  const contents = $("nav details");
  if (innerWidth <= 980) contents.open = false;
  document.documentElement.dataset.ready = "yes";
})().catch((error) => {
  const box = document.getElementById("failure");
  box.textContent = "The charts cannot be drawn: " + error.message + ". The page needs a browser of 2023 or later.";
  box.hidden = false;
  throw error;
});
