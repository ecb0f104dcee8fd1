"use strict";
// Model output only ever becomes text of the page (textContent), never markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Theme: as the system has it, light, or dark
  const themes = [...document.querySelectorAll("input[name=theme]")];
  const remember = (value) => { try { localStorage.setItem("s2d-theme", value); } catch { /* a page that may not store */ } };
  let theme = "auto";
  try { theme = localStorage.getItem("s2d-theme") || theme; } catch { /* the same */ }
  const setTheme = (value) => {
    if (value === "light" || value === "dark") root.dataset.theme = value; else delete root.dataset.theme;
    for (const input of themes) input.checked = input.value === value;
  };
  setTheme(themes.some((input) => input.value === theme) ? theme : "auto");
  for (const input of themes) input.addEventListener("change", () => { setTheme(input.value); remember(input.value); });
  byId("themes").hidden = false;

  // Curves: the value at the step under the pointer, in place of the last one
  const inverse = (text) => {
    const [low, high, start, end] = text.split(" ").map(Number);
    return (position) => low + ((position - start) / (end - start)) * (high - low);
  };
  for (const chart of document.querySelectorAll("svg[data-x]")) {
    const curves = [...chart.querySelectorAll(".curve")].map((each) => each.getAttribute("points")).join(" ");
    const points = curves ? curves.split(" ").map((pair) => pair.split(",").map(Number)) : [];
    const toStep = inverse(chart.dataset.x), toValue = inverse(chart.dataset.y);
    const told = chart.parentNode.querySelector(".last"), last = told.textContent, cursor = chart.querySelector(".cursor");
    const written = (value) => ("rate" in chart.dataset ? `${(100 * value).toPrecision(3)} %` : Number(value.toPrecision(3)).toString());
    chart.addEventListener("pointermove", (event) => {
      if (!points.length) return;
      const box = chart.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const [x, y] = points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.removeAttribute("hidden");
      told.textContent = `step ${Math.round(toStep(x))}: ${written(toValue(y))}`;
    });
    chart.addEventListener("pointerleave", () => {
      cursor.setAttribute("hidden", "");
      told.textContent = last;
    });
  }

  const holder = byId("data");
  if (!holder) return;
  const { results, problems, differences } = JSON.parse(holder.textContent);
  const PAGE = 20; // problems that are shown at first, and more with each click

  const make = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const percent = (rate, digits = 1) => (100 * rate).toFixed(digits);
  const signed = (rate) => (rate < 0 ? "\u2212" : "+") + percent(Math.abs(rate));
  const score = (samples) => samples.filter((sample) => sample[0] === 1).length / samples.length;

  // Math is typeset where KaTeX is in the page; what it cannot read stays as it is written
  const delimiters = [["$$", "$$", true], ["\\[", "\\]", true], ["\\(", "\\)", false], ["$", "$", false]]
    .map(([left, right, display]) => ({ left, right, display }));
  const settings = { output: "html", throwOnError: true, strict: "ignore", trust: false, errorColor: "currentcolor", maxSize: 20, maxExpand: 1000 };
  const typeset = (node, whole) => {
    if (!window.katex) return node;
    if (whole && /[\\^_]/.test(node.textContent)) {
      const source = node.textContent;
      try { window.katex.render(source, node, settings); node.title = source; } catch { node.textContent = source; }
    } else if (!whole) {
      window.renderMathInElement(node, { ...settings, delimiters, errorCallback: () => {} });
    }
    return node;
  };

  const FILTERS = {
    all: () => true,
    right: (sample) => sample[0] === 1,
    wrong: (sample) => sample[0] === 0,
    truncated: (sample) => sample[1] === 1,
    ungraded: (sample) => sample[0] === null,
  };
  const CHANGES = { changed: (a, b) => a !== b, better: (a, b) => b > a, worse: (a, b) => b < a };

  const selectA = byId("a"), selectB = byId("b"), show = byId("show"), search = byId("search");
  const list = byId("problems"), count = byId("count"), more = byId("more"), summary = byId("difference");
  let found = [], shown = 0;

  const option = (value, text) => { const made = make("option", text); made.value = value; return made; };
  const fillB = () => {
    const before = selectB.value;
    const a = results[selectA.value];
    selectB.replaceChildren(option("", "nothing"));
    results.forEach((result, index) => {
      if (index !== Number(selectA.value) && result.column === a.column) selectB.append(option(index, result.name));
    });
    selectB.value = [...selectB.options].some((each) => each.value === before) ? before : "";
  };

  const compare = () => {
    summary.replaceChildren();
    if (selectB.value === "") return;
    const both = differences[`${selectA.value},${selectB.value}`];
    if (!both) return summary.append(make("p", "These two were not compared here: s2d compare does."));
    if (both.impossible) return summary.append(make("p", `These two cannot be compared: ${both.impossible}.`));
    const rows = [
      ["A", `${percent(both.a)} %`],
      ["B", `${percent(both.b)} %`],
      ["B \u2212 A", `${signed(both.difference)} \u00b1 ${percent(both.se)} points`],
    ];
    if (both.ci95) rows.push(["95 % interval", `${signed(both.ci95[0])} to ${signed(both.ci95[1])}`]);
    if (both.p !== null) rows.push(["p", both.p < 0.0001 ? "< 0.0001" : both.p.toPrecision(2)]);
    rows.push(["problems", `${both.wins} better in B, ${both.losses} worse, ${both.ties} equal`]);
    const facts = make("dl");
    for (const [name, value] of rows) {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", value));
      facts.append(pair);
    }
    const better = both.difference > 0 ? "B" : "A";
    const least = both.detectable === null ? "" : ` Smallest difference that they would find: ${percent(both.detectable)} points.`;
    summary.append(facts, make("p", both.resolved ? `${better} is better.` : `Not resolved: these ${both.problems} problems cannot tell the two apart.${least}`, "verdict"));
  };

  const verdictOf = (sample) => (sample[0] === 1 ? "right" : sample[0] === 0 ? "wrong" : "not graded");
  const MARKS = { right: "\u2713", wrong: "\u2717", "not graded": "?" };
  const THINK = "</think>";

  const drawSample = (sample) => {
    const [, truncated, tokens, extracted, text, error, reward] = sample;
    const verdict = verdictOf(sample);
    const details = make("details", undefined, `sample ${verdict.replace(" ", "-")}`);
    const head = make("summary");
    const mark = make("span", MARKS[verdict], "mark");
    mark.setAttribute("aria-hidden", "true");
    head.append(mark, make("span", verdict, "verdict"));
    const answer = make("span", extracted || "no answer", extracted ? "answer" : "answer none");
    head.append(extracted ? typeset(answer, true) : answer);
    const notes = [tokens === null ? "" : `${tokens.toLocaleString("en")} tokens`, truncated ? "truncated" : "", reward === undefined ? "" : `reward ${reward}`].filter(Boolean);
    head.append(make("span", notes.join(", "), "notes"));
    details.append(head);
    details.addEventListener("toggle", () => {
      if (!details.open || details.children.length > 1) return;
      const end = text.lastIndexOf(THINK);
      if (end >= 0) {
        const thought = make("details", undefined, "reasoning");
        thought.append(make("summary", "reasoning"), typeset(make("div", text.slice(0, end + THINK.length), "text")));
        details.append(thought);
      }
      details.append(typeset(make("div", end >= 0 ? text.slice(end + THINK.length).trim() : text, "text")));
      if (error) details.append(make("p", `grader: ${error}`, "notes"));
    });
    return details;
  };

  const drawSide = (letter, index, samples, keep) => {
    const side = make("div", undefined, "side");
    const heading = make("h4");
    heading.append(make("span", letter, "letter"), ` ${results[index].name}`);
    if (!samples) { side.append(heading, make("p", "not measured on this problem", "notes")); return side; }
    heading.append(make("span", `${samples.filter((sample) => sample[0] === 1).length} of ${samples.length} right`, "notes"));
    side.append(heading, ...samples.filter(keep).map(drawSample));
    return side;
  };

  const drawProblem = ({ problem, keep }) => {
    const item = make("li", undefined, "problem");
    const head = make("div", undefined, "asked");
    head.append(make("h3", problem.id));
    for (const [role, content] of problem.prompt) {
      if (role && (role !== "user" || problem.prompt.length > 1)) head.append(make("p", role, "role"));
      head.append(typeset(make("div", content, "text prompt")));
    }
    const gold = make("p", undefined, "gold");
    gold.append(make("span", "gold answer ", "notes"), typeset(make("span", problem.gold || "none", "answer"), true));
    head.append(gold);
    const sides = make("div", undefined, selectB.value === "" ? "sides one" : "sides");
    sides.append(drawSide("A", selectA.value, problem.samples[selectA.value], keep));
    if (selectB.value !== "") sides.append(drawSide("B", selectB.value, problem.samples[selectB.value], keep));
    item.append(head, sides);
    return item;
  };

  const next = () => {
    list.append(...found.slice(shown, shown + PAGE).map(drawProblem));
    shown = Math.min(found.length, shown + PAGE);
    more.hidden = shown === found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more of ${found.length - shown}`;
  };

  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    const two = selectB.value !== "";
    for (const each of show.options) each.disabled = each.value in CHANGES && !two;
    if (show.selectedOptions[0].disabled) show.value = "all";
    const keep = FILTERS[show.value] || FILTERS.all, change = CHANGES[show.value];
    found = [];
    for (const problem of problems) {
      const a = problem.samples[selectA.value], b = two ? problem.samples[selectB.value] : null;
      const samples = [...(a || []), ...(b || [])];
      if (!samples.some(keep)) continue;
      if (change && !(a && b && change(score(a), score(b)))) continue;
      if (wanted) {
        const texts = [problem.id, problem.gold, ...problem.prompt.map((message) => message[1]), ...samples.filter(keep).flatMap((sample) => [sample[3], sample[4]])];
        if (!texts.some((text) => text.toLowerCase().includes(wanted))) continue;
      }
      found.push({ problem, keep });
    }
    shown = 0;
    list.replaceChildren();
    count.textContent = `${found.length} of ${problems.length} problems`;
    next();
  };

  let waiting;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
  show.addEventListener("change", filter);
  selectA.addEventListener("change", () => { fillB(); compare(); filter(); });
  selectB.addEventListener("change", () => { compare(); filter(); });
  more.addEventListener("click", () => {
    const first = shown;
    next();
    const heading = list.children[first].querySelector("h3");
    heading.tabIndex = -1;
    heading.focus();
  });

  fillB();
  if (selectB.dataset.first) selectB.value = selectB.dataset.first;
  byId("viewer").hidden = false;
  compare();
  filter();
})();
