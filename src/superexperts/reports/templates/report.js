"use strict";
// Two independent parts: values of the pictures on pointing or with arrow keys, and the list of items on which runs
// disagree. Model output is only ever written as text (textContent), never as markup.
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

// ---- pictures ----

for (const plot of document.querySelectorAll(".plot")) {
  const { grids, points } = JSON.parse(plot.querySelector(".spots").textContent);
  const [mark, tip, said] = [make("span", "spot"), make("span", "tip"), make("span", "hidden")];
  if (!grids.length && !points.length) continue;
  mark.hidden = tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  said.setAttribute("role", "status");
  plot.append(mark, tip, said);
  const title = plot.parentElement.getAttribute("aria-label");
  plot.parentElement.removeAttribute("tabindex"); // the picture itself takes the focus, and scrolls its frame
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-label", `${title}. Arrow keys read single values.`);

  const cell = (grid, row, column) => {
    const [left, top, width, height] = grid.box;
    const [w, h] = [width / grid.columns.length, height / grid.rows.length];
    const value = grid.values[row][column];
    const text = `${grid.rows[row]}${grid.columns[column]}: ${value === null ? "none" : value === 0 ? "no token" : value}`;
    return { grid, row, column, box: [left + column * w, top + row * h, w, h], text };
  };
  const point = (index) => ({ index, box: [points[index][0], points[index][1], 0, 0], text: points[index][2] });

  let at = null;
  const show = (spot, aloud) => {
    at = spot;
    mark.hidden = tip.hidden = spot === null;
    said.textContent = spot !== null && aloud ? spot.text : "";
    if (spot === null) return;
    const [left, top, width, height] = spot.box.map((share) => `${100 * share}%`);
    Object.assign(mark.style, { left, top, width, height });
    mark.classList.toggle("round", !spot.box[2]);
    tip.textContent = spot.text;
    if (aloud) mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    const frame = plot.parentElement; // a narrow screen shows a part of the picture, and the words belong into it
    const x = spot.box[0] * plot.clientWidth;
    const beside = spot.box[0] > 0.5 ? x - tip.offsetWidth - 10 : x + 10;
    const last = frame.scrollLeft + frame.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(frame.scrollLeft + 4, Math.min(beside, last))}px`;
    tip.style.top = top;
    tip.classList.toggle("below", spot.box[1] * plot.clientHeight < tip.offsetHeight + 16);
  };

  const under = (event) => {
    const frame = plot.getBoundingClientRect();
    const [x, y] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    for (const grid of grids) {
      const [left, top, width, height] = grid.box;
      const row = Math.floor(((y - top) / height) * grid.rows.length);
      const column = Math.floor(((x - left) / width) * grid.columns.length);
      if (grid.rows[row] !== undefined && grid.columns[column] !== undefined) return cell(grid, row, column);
    }
    let [best, least] = [null, 22]; // pixels that a pointer may be away
    points.forEach(([left, top], index) => {
      const away = Math.hypot((left - x) * frame.width, (top - y) * frame.height);
      if (away < least) [best, least] = [index, away];
    });
    return best === null ? null : point(best);
  };
  const first = () => {
    if (!grids.length) return point(0);
    let best = [0, 0, -Infinity]; // start at the largest value
    grids[0].values.forEach((values, row) =>
      values.forEach((value, column) => {
        if (value !== null && value > best[2]) best = [row, column, value];
      }),
    );
    return cell(grids[0], best[0], best[1]);
  };
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const stepped = (key) => {
    if (at === null) return first();
    if (at.grid) {
      const { grid } = at;
      if (key === "Home" || key === "End") return cell(grid, at.row, key === "Home" ? 0 : grid.columns.length - 1);
      const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
      const [down, right] = STEPS[key];
      return cell(grid, clamp(at.row + down, grid.rows.length), clamp(at.column + right, grid.columns.length));
    }
    const last = points.length - 1;
    if (key === "Home" || key === "End") return point(key === "Home" ? 0 : last);
    const [down, right] = STEPS[key];
    return point(Math.max(0, Math.min(last, at.index + down + right)));
  };
  plot.addEventListener("pointermove", (event) => show(under(event), false));
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") show(null);
    else if (event.key in STEPS || event.key === "Home" || event.key === "End") {
      event.preventDefault();
      show(stepped(event.key), true);
    }
  });
}

// ---- where the runs disagree ----

(() => {
  const holder = document.getElementById("data");
  if (!holder) return;
  const { variants, tasks, items } = JSON.parse(holder.textContent);
  const byId = (id) => document.getElementById(id);
  const names = ["task", "variant", "pattern", "query", "items", "count", "more"];
  const [task, variant, pattern, query, list, count, more] = names.map(byId);
  const PAGE = 10;
  const [TEXT, RIGHT, SAID, HOW] = [0, 1, 2, 3];
  let found = [];
  let shown = 0;

  const option = (parent, value, text) => {
    const element = make("option", "", text);
    element.value = value;
    parent.append(element);
  };
  option(task, "", "all");
  for (const { name, title, shown: n, found: all } of tasks) {
    option(task, name, `${title} (${n}${n < all ? ` of ${all}` : ""})`);
  }
  const base = variants.findIndex((one) => one.base);
  option(variant, "", "any");
  variants.forEach((one, index) => {
    if (index !== base) option(variant, String(index), one.title);
  });
  const baseRight = (item) => item.answers[base].every((run) => run[RIGHT]);
  const PATTERNS = {
    differ: ["every disagreement", () => true],
    lost: ["lost: base right, variant wrong", (item, runs) => baseRight(item) && runs.some((run) => !run[RIGHT])],
    won: ["won: base wrong, variant right", (item, runs) => !baseRight(item) && runs.some((run) => run[RIGHT])],
    unparsed: ["answer unparsed", (item, runs) => runs.some((run) => run[SAID] === null)],
    unstable: ["runs disagree", (item, runs) => runs.some((run) => run[RIGHT] !== runs[0][RIGHT])],
  };
  const several = variants.some((one) => one.runs.length > 1);
  for (const [name, [text]] of Object.entries(PATTERNS)) if (name !== "unstable" || several) option(pattern, name, text);
  for (const item of items) item.haystack = [item.id, item.prompt, item.gold, ...item.texts].join("\n").toLowerCase();

  const matches = (item) => {
    if (task.value && item.task !== task.value) return false;
    const holds = PATTERNS[pattern.value][1];
    const chosen = variant.value ? [Number(variant.value)] : variants.keys();
    if (![...chosen].some((index) => (index !== base || pattern.value === "differ") && holds(item, item.answers[index])))
      return false;
    if (variant.value && pattern.value === "differ") {
      const own = item.answers[Number(variant.value)];
      if (own.every((run) => Boolean(run[RIGHT]) === baseRight(item))) return false;
    }
    return item.haystack.includes(query.value.trim().toLowerCase());
  };

  const answer = (item, index) => {
    const runs = item.answers[index];
    const right = runs.filter((run) => run[RIGHT]).length;
    const state = right === runs.length ? "right" : right ? "mixed" : "wrong";
    const details = make("details", state);
    const summary = make("summary");
    const ticks = make("span", "ticks");
    ticks.setAttribute("aria-hidden", "true");
    for (const run of runs) ticks.append(make("span", run[RIGHT] ? "yes" : "no", run[RIGHT] ? "✓" : "✗"));
    const words = runs.length === 1 ? state : `${right} of ${runs.length} runs right`;
    summary.append(ticks, make("span", "hidden", `${words}: `), make("span", "who", variants[index].title));
    const readings = [...new Set(runs.map((run) => run[SAID] ?? "unparsed"))];
    summary.append(make("span", runs.every((run) => run[SAID] === null) ? "unread" : "said", readings.join(" / ")));
    details.append(summary);
    const kinds = new Map();
    runs.forEach((run, number) => {
      const key = JSON.stringify([run[TEXT], run[SAID], run[HOW]]);
      if (!kinds.has(key)) kinds.set(key, { run, seeds: [] });
      kinds.get(key).seeds.push(variants[index].runs[number]);
    });
    for (const { run, seeds } of kinds.values()) {
      details.append(make("pre", "", item.texts[run[TEXT]]));
      const seedLabel = runs.length > 1 ? `${seeds.join(", ")}: ` : "";
      const reading = run[SAID] === null ? "nothing could be read" : `read as “${run[SAID]}” by ${run[HOW]}`;
      details.append(make("p", "how", `${seedLabel}${reading}`));
    }
    return details;
  };
  const card = (item) => {
    const entry = make("li", "item");
    const head = make("h3");
    head.append(make("span", "badge", tasks.find((one) => one.name === item.task).title), make("span", "id", item.id));
    head.append(make("span", "gold", `right answer: ${item.gold}`));
    entry.append(head, make("p", "prompt", item.prompt));
    variants.forEach((_, index) => entry.append(answer(item, index)));
    return entry;
  };

  const extend = () => {
    list.append(...found.slice(shown, shown + PAGE).map(card));
    shown = Math.min(found.length, shown + PAGE);
    count.textContent = found.length ? `${shown} of ${found.length} items` : "No item matches.";
    more.hidden = shown >= found.length;
    for (const prompt of list.querySelectorAll(".prompt, .item pre"))
      if (prompt.scrollHeight > prompt.clientHeight && prompt.clientHeight) prompt.tabIndex = 0;
  };
  const filter = () => {
    found = items.filter(matches);
    shown = 0;
    list.replaceChildren();
    extend();
  };

  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", filter);
  more.addEventListener("click", () => {
    const first = list.children.length;
    extend();
    list.children[first]?.querySelector("summary")?.focus();
  });
  list.addEventListener(
    "toggle",
    (event) => {
      for (const text of event.target.querySelectorAll("pre")) if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;
    },
    true,
  );
  filter();
})();
