"use strict";
/* The rollout browser. Data: columns, gzipped in base64; the list draws the rows in view only. */
(async () => {
  const holder = document.getElementById("rollout-data");
  if (!holder) return;
  const bytes = Uint8Array.from(atob(holder.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const D = await new Response(stream).json();
  holder.remove();

  const $ = (id) => document.getElementById(id);
  const form = $("filters"), list = $("list"), space = $("space"), detail = $("detail"), count = $("count");
  const n = D.n, ROW = 28, ALL = "";
  const C = {}, V = {};
  for (const [name, { values, codes }] of Object.entries(D.coded)) { V[name] = values; C[name] = Int32Array.from(codes); }
  for (const [name, values] of Object.entries(D.plain)) C[name] = Int32Array.from(values);
  V.arm = [...new Set(D.runs.map((r) => r.arm))];
  const armOf = D.runs.map((r) => V.arm.indexOf(r.arm));
  C.arm = C.run.map((r) => armOf[r]);
  V.run = D.runs.map((r) => r.run);
  V.flagged = ["no", "yes"];
  C.flagged = Int32Array.from(D.flags.flagged, (f) => (f === null ? -1 : f));
  const SELECTS = ["arm", "run", "env_mode", "source", "label", "flagged"];
  const many = D.runs.length > 1;
  const value = (name, i) => (C[name][i] < 0 ? null : V[name][C[name][i]]);
  const number = (x, digits = 2) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  const grouped = (x) => x.toLocaleString("en");

  function element(tag, attributes = {}, ...children) {
    const e = document.createElement(tag);
    for (const [key, v] of Object.entries(attributes)) key === "class" ? (e.className = v) : e.setAttribute(key, v);
    e.append(...children);
    return e;
  }

  /* --- filters --- */
  let view = new Int32Array(n), shown = 0, current = -1;

  function fillControls() {
    for (const name of SELECTS) {
      const select = form.elements[name];
      select.append(new Option("all", ALL));
      const used = new Set(C[name]);
      V[name].forEach((v, code) => used.has(code) && select.append(new Option(v, code)));
      if (used.has(-1)) select.append(new Option("none", -1));
      select.parentElement.hidden = select.options.length < 3;
    }
  }

  function containing(text) {
    if (!text) return null;
    const low = text.toLowerCase();
    return Uint8Array.from(V.completion, (c) => c.toLowerCase().includes(low));
  }

  function apply() {
    const f = form.elements;
    const from = f.from.value === "" ? -Infinity : +f.from.value, to = f.to.value === "" ? Infinity : +f.to.value;
    const wanted = SELECTS.filter((s) => f[s].value !== ALL).map((s) => [C[s], +f[s].value]);
    const has = containing(f.contains.value.trim());
    const step = C.step, completion = C.completion;
    shown = 0;
    next: for (let i = 0; i < n; i++) {
      if (step[i] < from || step[i] > to) continue;
      for (let w = 0; w < wanted.length; w++) if (wanted[w][0][i] !== wanted[w][1]) continue next;
      if (has !== null && !(completion[i] >= 0 && has[completion[i]])) continue;
      view[shown++] = i;
    }
    space.style.height = shown * ROW + "px";
    count.textContent = `${grouped(shown)} of ${grouped(n)} rollouts`;
    drawList();
  }

  /* --- list --- */
  function drawList() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(shown, first + Math.ceil(list.clientHeight / ROW) + 8);
    const rows = [];
    for (let p = first; p < last; p++) {
      const i = view[p], label = value("label", i);
      const arm = many ? [element("span", {}, `${value("arm", i)} s${D.runs[C.run[i]].seed}`)] : [];
      const row = element(
        "div",
        { class: many ? "item many" : "item", role: "option", id: `item-${i}`, "aria-selected": String(i === current), "aria-posinset": p + 1, "aria-setsize": shown },
        element("span", {}, String(C.step[i])), ...arm, element("span", {}, value("env_mode", i) ?? "–"),
        element("span", { class: `l-${label}` }, label ?? "–"), element("span", {}, number(D.numbers.score[i], 1)),
      );
      row.style.top = p * ROW + "px";
      row.onclick = () => select(i);
      rows.push(row);
    }
    space.replaceChildren(...rows);
    current >= 0 ? list.setAttribute("aria-activedescendant", `item-${current}`) : list.removeAttribute("aria-activedescendant");
  }

  function position(i) {
    let low = 0, high = shown - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (view[middle] === i) return middle;
      view[middle] < i ? (low = middle + 1) : (high = middle - 1);
    }
    return -1;
  }

  function select(i, write = true) {
    current = i;
    const p = position(i), top = p * ROW;
    if (p >= 0 && (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight))
      list.scrollTop = Math.max(0, top - list.clientHeight / 2);
    drawList();
    drawDetail(i);
    if (write) history.replaceState(null, "", anchor(i));
  }

  function move(by) {
    if (!shown) return;
    const p = current < 0 ? -1 : position(current);
    select(view[p < 0 ? 0 : Math.min(shown - 1, Math.max(0, p + by))]);
  }

  /* --- anchors: #step-12-row-5, in a study #RUN/step-12-row-5 --- */
  const anchor = (i) => `#${many ? encodeURIComponent(value("run", i)) + "/" : ""}step-${C.step[i]}-row-${C.row[i]}`;

  function open() {
    const found = /^#(?:([^/]+)\/)?step-(\d+)-row-(\d+)$/.exec(location.hash);
    if (!found) return false;
    const run = found[1] === undefined ? 0 : V.run.indexOf(decodeURIComponent(found[1]));
    for (let i = 0; i < n; i++) {
      if (C.step[i] !== +found[2] || C.row[i] !== +found[3] || C.run[i] !== run) continue;
      if (position(i) < 0) { form.reset(); apply(); }
      select(i, false);
      $("rollouts").scrollIntoView();
      return true;
    }
    detail.replaceChildren(element("p", {}, `The rollout ${location.hash} is not in this report.`));
    $("rollouts").scrollIntoView();
    return true;
  }

  /* --- the completion --- */
  const WORDS = "and as assert async await break class continue def del elif else except finally for from global if import in is lambda nonlocal not or pass raise return try while with yield None True False";
  const BUILTINS = "abs all any bool dict enumerate exit filter float int isinstance len list map max min open print quit range reversed round self set sorted str sum super sys tuple type zip";
  const TOKEN = new RegExp(
    `(#[^\\n]*)|("""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?)` +
    `|\\b(?:def|class)\\s+(\\w+)|\\b(${WORDS.split(" ").join("|")})\\b|\\b(${BUILTINS.split(" ").join("|")})\\b|\\b(\\d[\\w.]*)`, "g");
  const KINDS = ["c", "s", "d", "k", "b", "n"];

  function codeLines(text, marked) {
    const lines = [element("div", { "data-n": 1 })];
    const put = (piece, kind) => piece.split("\n").forEach((part, k) => {
      if (k) lines.push(element("div", { "data-n": lines.length + 1 }));
      if (part) lines.at(-1).append(kind ? element("span", { class: `t-${kind}` }, part) : part);
    });
    let at = 0;
    for (const m of text.matchAll(TOKEN)) {
      put(text.slice(at, m.index));
      const which = KINDS.findIndex((_, k) => m[k + 1] !== undefined);
      if (KINDS[which] === "d") {
        const name = m[3], keyword = m[0].slice(0, m[0].length - name.length);
        put(keyword, "k"); put(name, "d");
      } else put(m[0], KINDS[which]);
      at = m.index + m[0].length;
    }
    put(text.slice(at));
    lines.forEach((line, k) => marked.has(k) && line.classList.add("exploit"));
    return lines;
  }

  function exploitLines(text, pattern) {
    const marked = new Set();
    if (!pattern) return marked;
    for (const m of text.matchAll(new RegExp(pattern, "gm"))) {
      const first = text.slice(0, m.index).split("\n").length - 1, extra = m[0].split("\n").length;
      for (let k = 0; k < extra; k++) marked.add(first + k);
    }
    return marked;
  }

  /* --- the scores: each run's own scale, its 99th percentile --- */
  const scales = {};
  function scale(run) {
    if (scales[run] === undefined) {
      const all = [];
      for (let i = 0; i < n && all.length < 200000; i++) if (C.run[i] === run && D.by_layer[i]) all.push(...D.by_layer[i]);
      all.sort((a, b) => a - b);
      scales[run] = all[Math.floor(all.length * 0.99)] || 1;
    }
    return scales[run];
  }

  function heat(i) {
    const values = D.by_layer[i];
    if (!values) return element("p", { class: "caption" }, "No score: the rollout has no gradient (its group's rewards are all alike).");
    const most = scale(C.run[i]), wide = values.length > 12;
    const cells = values.map((v, layer) => {
      const share = Math.max(0, Math.min(1, v / most));
      const cell = element("div", { title: `layer ${layer}: ${v}`, "aria-label": `layer ${layer}: ${v}` }, wide ? "" : number(v));
      cell.style.background = `rgb(${Math.round(255 - 42 * share)} ${Math.round(250 - 156 * share)} ${Math.round(245 - 245 * share)})`;
      return cell;
    });
    return element("div", { class: wide ? "heat many" : "heat" }, ...cells);
  }

  /* --- one rollout --- */
  const yes = (v) => (v === null || v === undefined ? "–" : v ? "yes" : "no");

  function taskText(i) {
    const task = D.tasks[C.task[i]], statement = C.problem_id[i] < 0 ? null : D.statements[C.problem_id[i]];
    const hint = task.hint === null ? "" : task.hint;
    const holder = element("p", { class: "task" });
    const cut = statement === null || statement === undefined ? -1 : statement.indexOf(D.sentence);
    if (cut < 0) holder.append("… ", element("mark", {}, hint), " …");
    else holder.append(statement.slice(0, cut), element("mark", {}, hint), statement.slice(cut + D.sentence.length));
    return holder;
  }

  function verdict(i) {
    const F = D.flags, right = F.gt_correct[i], detailText = value("detail", i);
    const oracle = right ? "right" : `wrong${detailText ? `: ${detailText}` : ""}`;
    const compiled = F.compiles[i] ? 0.5 : 0, reward = D.numbers.reward[i];
    const rows = [
      ["oracle", oracle],
      ["the mode's channel", F.channel[i] ? "reports a pass" : "reports no pass"],
      ["exploit there", yes(F.attempted[i])],
      ["reward", `${number(reward, 1)} = ${number(compiled, 1)} it compiles + ${number(reward === null ? null : reward - compiled, 1)} right or channel`],
      ["advantage", `${number(D.numbers.A[i])}, of which ${number(D.numbers.kept[i])} is kept`],
      ["run ended", `${value("status", i) ?? "–"}; one closed fence: ${yes(F.format_ok[i])}`],
    ];
    if (F.type_mismatch[i]) rows.push(["type", "right only as == has it"]);
    if (F.vacuous_tests[i] !== null) rows.push(["own test function", `vacuous: ${yes(F.vacuous_tests[i])}; rejects the right answer: ${yes(F.rejects_canonical[i])}`]);
    return element("dl", { class: "grade" }, ...rows.flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, v)]));
  }

  function drawDetail(i) {
    const text = value("completion", i) ?? "", task = D.tasks[C.task[i]], label = value("label", i);
    const marked = D.flags.attempted[i] ? exploitLines(text, task.exploit) : new Set();
    const previous = element("button", { type: "button" }, "Previous"), following = element("button", { type: "button" }, "Next");
    previous.onclick = () => move(-1);
    following.onclick = () => move(1);
    const where = `step ${C.step[i]}, row ${C.row[i]}, ${value("source", i) ?? "–"}, ${value("env_mode", i)}, ${value("problem_id", i) ?? "–"}`;
    const run = many ? `${value("run", i)} (${value("arm", i)}, seed ${D.runs[C.run[i]].seed}), ` : "";
    const flag = D.flags.flagged[i];
    detail.replaceChildren(
      element("div", { class: "steps" }, previous, following),
      element("p", { class: `head l-${label}` }, label ?? "–"),
      element("p", { class: "caption" }, run + where + ". ", element("a", { href: anchor(i) }, "Link to it")),
      element("h3", {}, "Task, its hint marked"), taskText(i),
      element("h3", {}, marked.size ? "Completion, the exploit's lines marked" : "Completion"),
      element("div", { class: "code" }, ...codeLines(text, marked)),
      element("h3", {}, "Verdict"), verdict(i),
      element("h3", {}, `Own gradient's score against V by layer, in all ${number(D.numbers.score[i])} (random V ${number(D.numbers.score_random[i])})${flag === null ? "" : flag ? ", flagged" : ", not flagged"}`),
      heat(i),
    );
  }

  /* --- wiring --- */
  const left = D.total - n;
  $("rollouts-told").textContent = left > 0
    ? `${grouped(n)} of ${grouped(D.total)} rollouts, sampled evenly over label, mode and step of each run; ${grouped(left)} were left out. A run's own report holds all of them.`
    : `All ${grouped(n)} rollouts.`;
  form.addEventListener("input", () => { list.scrollTop = 0; apply(); });
  form.addEventListener("reset", () => setTimeout(() => { list.scrollTop = 0; apply(); }));
  list.addEventListener("scroll", drawList);
  addEventListener("resize", drawList);
  addEventListener("hashchange", open);
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
    const inList = document.activeElement === list;
    const by = { j: 1, k: -1, ArrowDown: inList ? 1 : 0, ArrowUp: inList ? -1 : 0 }[e.key];
    if (by) { e.preventDefault(); move(by); }
  });
  fillControls();
  apply();
  if (!open() && shown) select(view[0], false);
  document.body.dataset.ready = "yes";
})();
