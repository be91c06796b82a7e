"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  // Columns as objects again; see harness.report.page.contents.columnar.
  const expand = ({ count, columns }) => {
    const lines = Array.from({ length: count }, () => ({}));
    for (const [name, { names, values }] of Object.entries(columns))
      values.forEach((value, at) => { if (value !== null) lines[at][name] = names ? names[value] : value; });
    return lines;
  };
  const rows = expand(page.data.rows);
  const rowOf = new Map(rows.map((row) => [row.cell, row]));
  const known = (line) => ({ ...line, ...pick(rowOf.get(line.cell)) });
  const pick = (row) => row && { label: row.label, series: row.series, budget: row.budget };
  const data = {};
  const lines = (name) => (data[name] ??= expand(page.data[name]));

  // Figures are drawn when they come near, again when what they show or the theme changes.
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const figures = new Map();
  const draw = async (element) => {
    const { spec, name, values } = figures.get(element)();
    const narrow = innerWidth < 600;
    const theme = page.themes[dark() ? "dark" : "light"];
    const config = narrow ? { ...theme, legend: { ...theme.legend, orient: "bottom", columns: 2 } } : theme;
    element.dataset.drawn = "";
    await vegaEmbed(element, { ...spec, datasets: { [name]: values } },
      { renderer: "svg", config, actions: { export: true, source: false, compiled: false, editor: false } });
    element.dataset.drawn = "yes";
  };
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    near.unobserve(entry.target);
    draw(entry.target);
  }), { rootMargin: "500px" });
  const figure = (id, make) => { figures.set($(id), make); near.observe($(id)); };
  const again = (...ids) => ids.forEach((id) => { near.unobserve($(id)); draw($(id)); });
  const absent = (id) => { $(id).hidden = true; };

  const options = (select, entries, chosen) => {
    for (const [value, text] of entries) select.add(new Option(text, value, false, value === chosen));
  };

  // Quality against size and speed.
  const sides = page.pareto;
  if (sides.length) {
    const named = (key) => [...new Map(sides.map((side) => [side[key].column, side[key].title]))];
    options($("quality"), named("quality"));
    options($("against"), named("against"));
    figure("figure-pareto", () => {
      const side = sides.find((s) => s.quality.column === $("quality").value && s.against.column === $("against").value);
      return { spec: side.spec, name: "rows", values: rows };
    });
    $("quality").onchange = $("against").onchange = () => again("figure-pareto");
  } else absent("trade-off");

  // The table.
  const shown = new Set(page.table.shown);
  let by = null, down = false;
  const text = (row, name) => {
    const value = row[name];
    if (value === undefined) return "";
    if (typeof value !== "number") return value;
    if (Number.isInteger(value)) return String(value);
    return Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toFixed(name.endsWith("bpw") || name.includes("kld") ? 4 : Math.abs(value) >= 100 ? 1 : 2);
  };
  const cell = (row, name) => {
    const td = document.createElement("td");
    td.className = page.table.text.includes(name) ? "text" : "";
    if (name === "label") {
      const dot = document.createElement("span"), link = document.createElement("a");
      dot.className = "dot";
      dot.style.setProperty("--hue", page.colours[row.method]);
      link.href = `cells/${encodeURIComponent(row.cell)}.json`;
      link.textContent = row.label;
      td.append(dot, link);
    } else if (name === "status" && row.status !== "ok" || name === "provisional" && row.provisional) {
      const badge = document.createElement("span");
      badge.className = "badge";
      badge.textContent = row[name];
      td.append(badge);
    } else td.textContent = text(row, name);
    if (name.startsWith("rank_") && row[name.replace("rank_", "tie_")]) {
      const tie = document.createElement("span");
      tie.className = "tie";
      tie.textContent = " tie";
      td.append(tie);
    }
    td.title = name === "reason" || name === "status" ? row.reason || "" : "";
    return td;
  };
  const order = (a, b) => {
    const [x, y] = [a[by], b[by]];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
    return down ? -less : less;
  };
  const haystack = new Map(rows.map((row) => [row, page.table.text.concat(["budget_bpw", "label"]).map((n) => row[n] ?? "").join(" ").toLowerCase()]));
  const fill = () => {
    const names = page.table.columns.filter((name) => shown.has(name));
    const head = document.createElement("tr");
    for (const name of names) {
      const th = document.createElement("th"), button = document.createElement("button");
      th.className = page.table.text.includes(name) ? "text" : "";
      th.ariaSort = by === name ? (down ? "descending" : "ascending") : "none";
      button.type = "button";
      button.title = name;
      button.textContent = (page.table.titles[name] ?? name) + (by === name ? (down ? " ↓" : " ↑") : "");
      button.onclick = () => { down = by === name && !down; by = name; fill(); };
      th.append(button);
      head.append(th);
    }
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => words.every((word) => haystack.get(row).includes(word)));
    if (by) found.sort(order);
    $("table").tHead.replaceChildren(head);
    $("table").tBodies[0].replaceChildren(...found.map((row) => {
      const tr = document.createElement("tr");
      tr.className = row.status === "ok" ? "" : "flagged";
      tr.append(...names.map((name) => cell(row, name)));
      return tr;
    }));
    $("shown").textContent = `${found.length} of ${rows.length} rows`;
  };
  for (const name of page.table.columns) {
    const box = document.createElement("input"), tag = document.createElement("label");
    box.type = "checkbox";
    box.checked = shown.has(name);
    box.onchange = () => { box.checked ? shown.add(name) : shown.delete(name); fill(); };
    tag.append(box, ` ${page.table.titles[name] ?? name}`);
    $("columns").lastElementChild.append(tag);
  }
  $("filter").oninput = fill;
  fill();

  // Every matrix of a row.
  const packed = rows.filter((row) => page.packed.includes(row.cell));
  if (packed.length) {
    options($("layer-row"), packed.map((row) => [row.cell, row.label]), page.best);
    const of = () => lines("layers").filter((line) => line.cell === $("layer-row").value);
    const offer = () => {
      const chosen = $("layer-quantity").value || "bits", has = of();
      $("layer-quantity").replaceChildren();
      options($("layer-quantity"), Object.entries(page.layers.quantities).filter(([name]) => has.some((line) => line[name] !== undefined)), chosen);
    };
    offer();
    figure("figure-layers", () => ({ spec: page.layers.specs[$("layer-quantity").value], name: "layers", values: of() }));
    $("layer-row").onchange = () => { offer(); again("figure-layers"); };
    $("layer-quantity").onchange = () => again("figure-layers");
  } else absent("matrices");

  const plain = (section, id, name) => {
    if (!page.data[name].count) return absent(section);
    figure(id, () => ({ spec: page.specs[name], name, values: lines(name).map(known) }));
  };
  plain("bits", "figure-parts", "parts");
  plain("products", "figure-kernels", "kernels");
  plain("trained", "figure-training", "training");

  // Divergence, token by token.
  if (page.data.tokens.count) {
    options($("token-protocol"), page.protocols.map((name) => [name, name]));
    const budgets = [...new Set(lines("tokens").map((line) => rowOf.get(line.cell).budget))].sort((a, b) => a - b);
    options($("token-budget"), budgets.map((budget) => [String(budget), String(budget)]), String(budgets.includes(3.25) ? 3.25 : budgets[0]));
    const chosen = (name) => lines(name).map(known).filter((line) => line.protocol === $("token-protocol").value && String(line.budget) === $("token-budget").value);
    figure("figure-tokens", () => ({ spec: page.specs.tokens, name: "tokens", values: chosen("tokens") }));
    figure("figure-positions", () => ({ spec: page.specs.positions, name: "positions", values: chosen("positions") }));
    $("token-protocol").onchange = $("token-budget").onchange = () => again("figure-tokens", "figure-positions");
  } else absent("divergence");

  // Zero-shot tasks.
  if (page.data.accuracies.count) {
    options($("task"), page.tasks.map((task) => [task.name, task.name]));
    const go = () => { $("task-page").href = `tasks/${encodeURIComponent($("task").value)}.md`; $("task-page").hidden = false; };
    go();
    figure("figure-accuracies", () => ({
      spec: page.tasks.find((task) => task.name === $("task").value).spec, name: "accuracies",
      values: lines("accuracies").map(known).filter((line) => line.task === $("task").value) }));
    $("task").onchange = () => { go(); again("figure-accuracies"); };
  } else absent("tasks");

  // Light and dark.
  const redraw = () => figures.forEach((_, element) => { if (element.dataset.drawn) draw(element); });
  $("theme").onclick = () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; redraw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
