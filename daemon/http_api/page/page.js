// The page of a search. Everything that the server sends is shown as text; charts are SVG that the server has drawn.
"use strict";

const EVENTS_SHOWN = 100;
const REFRESH_MILLISECONDS = 1000;
const RECONNECT_MILLISECONDS = 2000;
const LAST_LOOK_MILLISECONDS = 5000;
const TOKEN = "selfpruner-token";

const byId = (id) => document.getElementById(id);
let refreshWanted = true;
let chartsOf = -1;
let status = null;
let overview = null;
let followed = 0;
let lastLook = Infinity;
let shownCandidate = null;

class Refused extends Error {}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) throw new Refused();
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const askJson = async (path, options) => (await ask(path, options)).json();

function text(parent, tag, said, kind) {
  const element = document.createElement(tag);
  element.textContent = said === null || said === undefined ? "–" : String(said);
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}

function facts(list, pairs) {
  list.replaceChildren();
  for (const [name, value] of pairs) {
    const group = document.createElement("div");
    text(group, "dt", name);
    text(group, "dd", value);
    list.append(group);
  }
}

// `columns` are [title, what a row shows, is it text]; what it shows is a value, or an element.
function table(id, columns, rows) {
  const element = byId(id);
  element.replaceChildren();
  if (!rows.length) return;
  const head = element.createTHead().insertRow();
  for (const [title, , isText] of columns) {
    const cell = text(head, "th", title, isText ? "text" : "");
    cell.scope = "col";
  }
  const body = element.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const [, show, isText] of columns) {
      const value = show(row);
      if (value instanceof Node) line.insertCell().append(value);
      else text(line, "td", value, isText ? "text" : "");
    }
  }
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function endsAt(seconds) {
  const end = new Date(Date.now() + 1000 * seconds);
  const day = seconds < 43200 ? "" : `${end.toLocaleDateString("en", { weekday: "short" })} `;
  return `${day}${String(end.getHours()).padStart(2, "0")}:${String(end.getMinutes()).padStart(2, "0")} (in ${duration(seconds)})`;
}

function state() {
  if (status.redis !== "answers") return "Redis does not answer";
  if (status.finished) return "finished";
  if (status.control === "pause") return "paused";
  if (status.control === "stop") return "stopping";
  if (status.awaited) return "waiting for the LLM";
  return status.degraded ? "running, without the LLM" : "running";
}

function showStatus() {
  document.title = `${status.search}: ${state()}`;
  byId("name").textContent = `${status.search}: ${status.model}, ${Math.round(status.rate * 100)} % of the decoder's parameters removed`;
  byId("pause").textContent = status.control === "pause" ? "Resume" : "Pause";
  byId("pause").disabled = byId("stop").disabled = status.finished;
  const best = status.best_to_uniform;
  facts(byId("facts"), [
    ["state", state()],
    ["best ÷ uniform", best === null ? "–" : best.toFixed(3)],
    ["measured", overview ? `${status.measured} of ${overview.planned}` : status.measured],
    ["ends about", status.finished || !overview || overview.seconds_left === null ? "–" : endsAt(overview.seconds_left)],
    ["failed", status.failed],
    ["stopped early", status.stopped],
    ["round", status.round],
    ["in the queue", status.waiting],
    ["LLM tokens", (status.tokens.prompt + status.tokens.completion).toLocaleString("en")],
    ["cost", status.cost ? status.cost.toFixed(2) : "–"],
    [status.finished ? "took" : "running for", duration(status.seconds)],
  ]);
  table("workers", [
    ["worker", (each) => each.consumer, true],
    ["state", (each) => each.stage, true],
    ["step", (each) => (each.total ? `${each.done} of ${each.total}` : "–")],
    ["measured", (each) => each.measured],
    ["per hour", (each) => (each.ready_seconds >= 60 ? ((3600 * each.measured) / each.ready_seconds).toFixed(0) : "–")],
    ["busy", (each) => (each.ready_seconds >= 60 ? `${Math.round((100 * each.busy_seconds) / each.ready_seconds)} %` : "–")],
    ["detail", (each) => each.detail || "", true],
  ], status.workers);
}

function showOverview(found) {
  byId("verdict").textContent = found.verdict;
  byId("kept").textContent = found.kept;
  byId("export").textContent = found.best.length ? `selfpruner export --search ${found.name} --format hf --out DIR` : "";
  const figures = found.columns.map((title, i) => [title, (line) => line.figures[i]]);
  table("figures", [
    ["model", (line) => line.name, true],
    [`${found.columns[0]} ÷ uniform`, (line) => line.ratio],
    ...figures,
    ["parameters", (line) => line.parameters],
  ], found.lines);
  table("agents", [
    ["agent", (row) => row.agent, true],
    ["made", (row) => row.source, true],
    ["endpoint", (row) => row.endpoint, true],
    ["measured", (row) => row.measured],
    ["failed", (row) => row.failed],
    ["new best", (row) => row.improved],
    ["its best", (row) => row.best],
  ], found.agents);
  table("endpoints", [
    ["endpoint", ([name]) => name, true],
    ["state", ([, each]) => (each.reason ? `${each.state}: ${each.reason}` : each.state), true],
    ["requests", ([, each]) => each.requests],
    ["errors", ([, each]) => each.errors],
    ["seconds per answer", ([, each]) => each.answer_seconds],
    ["tokens read", ([, each]) => each.prompt_tokens.toLocaleString("en")],
    ["tokens written", ([, each]) => each.completion_tokens.toLocaleString("en")],
    ["cost", ([, each]) => (each.cost ? each.cost.toFixed(4) : "no price")],
    ["candidates measured", ([, each]) => each.measured],
    ["new best", ([, each]) => each.improved],
    ["its best", ([, each]) => each.best],
  ], Object.entries(found.endpoints));
  table("questions", [
    ["agent", ([name]) => name, true],
    ["questions", ([, each]) => each.asked],
    ["repeated (unusable answer)", ([, each]) => each.asked_again],
    ["not answered", ([, each]) => each.unanswered],
  ], Object.entries(found.questions));
  table("best", [
    ["candidate", (row) => opener(row.id)],
    [found.measure, (row) => row.fitness],
    ...(found.measure === "perplexity" ? [] : [["perplexity", (row) => row.perplexity]]),
    ["agent", (row) => row.agent, true],
    ["made", (row) => [row.source, row.endpoint].filter(Boolean).join(", "), true],
    ["round", (row) => row.round],
  ], found.best.slice(0, 10));
}

// The server draws a chart anew after a while only, so the charts may show fewer outcomes than there are.
async function showCharts() {
  if (chartsOf >= overview.outcomes) return;
  const shown = [];
  for (const name of ["progress", "rates", "population"]) {
    const response = await ask(`/api/charts/${name}`);
    const drawn = new DOMParser().parseFromString(await response.text(), "image/svg+xml");
    byId(name).replaceChildren(document.importNode(drawn.documentElement, true));
    shown.push(Number(response.headers.get("Outcomes")));
  }
  chartsOf = Math.min(...shown);
  if (chartsOf < overview.outcomes) refreshWanted = true;
}

function opener(id) {
  const button = document.createElement("button");
  button.textContent = id;
  button.className = "link";
  button.addEventListener("click", () => openCandidate(id));
  return button;
}

async function openCandidate(id) {
  try {
    shownCandidate = id; // the answers to an earlier click may come later
    const path = `/api/candidates/${encodeURIComponent(id)}`;
    const [found, family] = await Promise.all([askJson(path), askJson(`${path}/family`)]);
    if (shownCandidate !== id) return;
    byId("candidate-title").textContent = `Candidate ${id}`;
    const outcome = found.outcome || { kind: "not measured yet" };
    facts(byId("candidate-facts"), [
      ["outcome", outcome.kind],
      ["perplexity", outcome.perplexity?.toFixed(2)],
      ["KL divergence", outcome.kl?.toFixed(4)],
      ["agent", found.agent],
      ["made", family.made],
      ["endpoint", found.endpoint],
      ["round", found.round],
    ]);
    byId("candidate-record").textContent = JSON.stringify(found, null, 1);
    byId("candidate-family").replaceChildren();
    byId("candidate-questions").replaceChildren();
    if (!byId("candidate").open) byId("candidate").showModal();
    showFamily(family);
    const questions = await askJson(`${path}/questions`);
    if (shownCandidate === id) for (const each of questions) showQuestion(each);
  } catch (error) {
    report(error);
  }
}

const percent = (rate) => `${(100 * rate).toFixed(1)} %`;

function showFamily(family) {
  const place = byId("candidate-family");
  for (const change of family.changes) {
    text(place, "h3", "Share removed, against its parent ").append(opener(change.parent));
    const list = document.createElement("ul");
    for (const { unit, parent, child } of change.units) text(list, "li", `${unit}: ${percent(parent)} → ${percent(child)}`);
    if (change.more) text(list, "li", `and ${change.more} smaller changes`);
    if (!change.units.length) text(list, "li", "no rate differs by 0.05 points or more");
    place.append(list);
  }
  if (!family.parents.length) return;
  text(place, "h3", "Ancestors");
  place.append(ancestors(family.parents));
}

function ancestors(members) {
  const list = document.createElement("ul");
  for (const member of members) {
    const item = document.createElement("li");
    const fitness = member.fitness === null ? "not measured" : member.fitness.toPrecision(5);
    const by = [member.made, member.endpoint].filter(Boolean).join(", ");
    item.append(opener(member.id), ` ${fitness}, round ${member.round ?? "–"}, ${member.agent ?? "–"} ${by}`);
    if (member.parents.length) item.append(ancestors(member.parents));
    list.append(item);
  }
  return list;
}

function showQuestion(question) {
  const details = document.createElement("details");
  text(details, "summary", `${question.label}, asked of ${question.endpoint}`);
  for (const message of question.messages) {
    text(details, "h3", message.role);
    text(details, "pre", message.content).tabIndex = 0;
  }
  text(details, "h3", "answer");
  text(details, "pre", question.text ?? question.error).tabIndex = 0;
  byId("candidate-questions").append(details);
}

function showEvent(event) {
  const list = byId("events");
  const { event: name, search: _search, ...fields } = event;
  const said = Object.entries(fields).filter(([, value]) => value !== null && typeof value !== "object");
  const item = document.createElement("li");
  item.textContent = `${name} ${said.map(([key, value]) => `${key}=${value}`).join(" ")}`.slice(0, 500);
  list.prepend(item);
  while (list.children.length > EVENTS_SHOWN) list.lastElementChild.remove();
}

// The server's answers may be a moment old, so after the last event the page looks once more.
async function refresh() {
  if (byId("search").hidden || !(refreshWanted || performance.now() > lastLook)) return;
  lastLook = refreshWanted ? performance.now() + LAST_LOOK_MILLISECONDS : Infinity;
  refreshWanted = false;
  status = await askJson("/api/status");
  overview = await askJson("/api/overview");
  showStatus();
  if (overview !== null) {
    showOverview(overview);
    await showCharts();
  } else {
    byId("verdict").textContent = "The model is being prepared.";
  }
}

// EventSource cannot send the token in a header, so the stream is read here.
async function follow(mine) {
  let rest = "";
  const reader = (await ask("/api/events")).body.pipeThrough(new TextDecoderStream()).getReader();
  byId("connection").textContent = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done || mine !== followed) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      const kind = part.split("\n").find((line) => line.startsWith("event: "));
      if (data && kind !== "event: status") showEvent(JSON.parse(data.slice(6)));
      if (data) refreshWanted = true;
    }
  }
}

function report(error) {
  if (error instanceof Refused) {
    sessionStorage.removeItem(TOKEN);
    followed += 1;
    byId("search").hidden = true;
    byId("login").hidden = false;
    byId("token").focus();
  } else {
    byId("connection").textContent = `${error.message}; trying again`;
  }
}

async function followForEver() {
  const mine = (followed += 1);
  while (mine === followed) {
    try {
      await follow(mine);
      byId("connection").textContent = "the server has ended the stream; trying again";
    } catch (error) {
      report(error);
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MILLISECONDS));
  }
}

async function command(name) {
  try {
    await askJson("/api/control", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ command: name }),
    });
  } catch (error) {
    report(error);
  }
  refreshWanted = true;
}

async function begin() {
  try {
    status = await askJson("/api/status");
  } catch (error) {
    if (error instanceof Refused) {
      if (sessionStorage.getItem(TOKEN)) byId("login-error").textContent = "This is not the token of this search.";
      report(error);
      return;
    }
    status = null;
  }
  byId("login").hidden = true;
  byId("search").hidden = false;
  if (status) showStatus();
  refreshWanted = true;
  refresh().catch(report);
  followForEver();
}

byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("login-error").textContent = "";
  sessionStorage.setItem(TOKEN, byId("token").value.trim());
  byId("token").value = "";
  begin();
});
byId("pause").addEventListener("click", () => command(status.control === "pause" ? "run" : "pause"));
byId("stop").addEventListener("click", () => {
  if (confirm("Stop the search? Its outcomes are kept, and the same command resumes it.")) command("stop");
});

// The part of the address after # is not sent to the server, so the token is in no log. It does not stay there.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem(TOKEN, given);
  history.replaceState(null, "", location.pathname);
}
setInterval(() => refresh().catch(report), REFRESH_MILLISECONDS);
begin();
