"use strict";
// Shows the items where variants disagree. Model output only ever becomes text (textContent), never markup.
(() => {
  const holder = document.getElementById("data");
  if (!holder) return;
  const { variants, tasks, items } = JSON.parse(holder.textContent);
  const byId = (id) => document.getElementById(id);
  const [task, pattern, query, list, count, more] = ["task", "pattern", "query", "items", "count", "more"].map(byId);
  const PAGE = 10;
  let found = [];
  let shown = 0;

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const option = (parent, value, text) => {
    const element = make("option", "", text);
    element.value = value;
    parent.append(element);
  };

  option(task, "", "all");
  for (const { name, title, shown: n } of tasks) option(task, name, `${title} (${n})`);
  option(pattern, "", "every disagreement");
  const base = variants.findIndex((variant) => variant.base);
  variants.forEach((variant, index) => {
    if (index === base) return;
    option(pattern, `lost:${index}`, `${variant.title}: lost`);
    option(pattern, `won:${index}`, `${variant.title}: won`);
  });
  for (const item of items) {
    item.haystack = [item.id, item.prompt, item.gold, ...item.answers.map((a) => a.response)].join("\n").toLowerCase();
  }

  const matches = (item) => {
    if (task.value && item.task !== task.value) return false;
    if (pattern.value) {
      const [what, index] = pattern.value.split(":");
      const before = item.answers[base].correct;
      const after = item.answers[Number(index)].correct;
      if (before === after || after !== (what === "won")) return false;
    }
    return item.haystack.includes(query.value.trim().toLowerCase());
  };

  const card = (item) => {
    const entry = make("li", "item");
    const head = make("h3", "", "");
    head.append(make("span", "badge", tasks.find((one) => one.name === item.task).title), make("span", "id", item.id));
    head.append(make("span", "gold", `right answer: ${item.gold}`));
    entry.append(head, make("p", "prompt", item.prompt));
    item.answers.forEach((answer, index) => {
      const details = make("details", answer.correct ? "right" : "wrong");
      const summary = make("summary");
      summary.append(make("span", "tick", answer.correct ? "✓" : "✗"));
      summary.append(make("span", "hidden", answer.correct ? "right: " : "wrong: "));
      summary.append(make("span", "who", variants[index].title));
      summary.append(make("span", answer.extracted === null ? "unread" : "said", answer.extracted ?? "unparsed"));
      details.append(summary, make("pre", "", answer.response), make("p", "how", `read by ${answer.how}`));
      entry.append(details);
    });
    return entry;
  };

  const extend = () => {
    list.append(...found.slice(shown, shown + PAGE).map(card));
    shown = Math.min(found.length, shown + PAGE);
    count.textContent = found.length ? `${shown} of ${found.length} items` : "No item matches.";
    more.hidden = shown >= found.length;
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
  filter();
})();
