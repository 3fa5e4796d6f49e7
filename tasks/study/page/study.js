"use strict";
// The rating page: shows a pair, plays both clips in step, asks, stores the vote, goes on. No other host is asked.

const byId = (id) => document.getElementById(id);
const study = byId("study").dataset;
const PLACE = `trip-study-${study.study}`; // where this browser keeps the token
const SECTIONS = ["welcome", "task", "done"];
const DRIFT_SECONDS = 0.1; // that one clip may be ahead of the other
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const clips = [byId("left"), byId("right")];
const questions = [...document.querySelectorAll(".question")];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

let token = "";
let pair = null;
let shownAt = 0;
let plays = 0;
let ended = 0;
let sending = false;

function show(section) {
  for (const name of SECTIONS) byId(name).hidden = name !== section;
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

// Some browsers refuse storage, in private windows or inside of a frame: then the token lasts as long as the page.
function remember(value) {
  token = value;
  try { localStorage.setItem(PLACE, value); } catch { /* see above */ }
}

function remembered() {
  const given = new URLSearchParams(location.hash.slice(1)).get("resume");
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    remember(given);
    return given;
  }
  try { return localStorage.getItem(PLACE) || ""; } catch { return ""; }
}

// Repeats a request until the server answers. A vote that was stored before a lost answer is refused as stored: fine.
async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  for (let attempt = 0; ; attempt++) {
    let seconds = RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)] / 1000;
    try {
      const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
      if (answer.status !== 429 && answer.status < 500) {
        trouble("");
        return { status: answer.status, content: await answer.json() };
      }
      seconds = Math.max(seconds, Number(answer.headers.get("Retry-After")) || 0);
    } catch { /* no connection: try again */ }
    trouble("No answer from the server. Nothing is lost; trying again ...");
    await wait(seconds * 1000);
  }
}

async function medium(name) {
  for (let attempt = 0; ; attempt++) {
    try {
      const answer = await fetch(`media/${name}`);
      if (answer.ok) {
        trouble("");
        return URL.createObjectURL(await answer.blob());
      }
    } catch { /* no connection: try again */ }
    trouble("The clips do not load. Trying again ...");
    await wait(RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]);
  }
}

function participant() {
  const query = new URLSearchParams(location.search);
  if (study.platform === "prolific") return { id: query.get("PROLIFIC_PID") || "", session: query.get("SESSION_ID") || "" };
  if (study.platform === "mturk") return { id: query.get("workerId") || "", session: query.get("assignmentId") || "" };
  return null;
}

async function start() {
  byId("start").disabled = true;
  const { status, content } = await ask("api/raters", { consent: true, participant: participant() });
  byId("start").disabled = false;
  if (status !== 201) return trouble(content.error.message);
  remember(content.token);
  await next();
}

async function next() {
  const { status, content } = await ask("api/next");
  if (status === 401) {
    token = "";
    show("welcome");
    return;
  }
  byId("progress").max = content.total;
  byId("progress").value = content.done;
  if (!content.pair) return finish(content.code);
  await present(content);
}

async function present(content) {
  pair = content.pair;
  plays = 0;
  byId("heading").textContent = `Pair ${content.done + 1} of ${content.total}`;
  byId("prompt").textContent = pair.prompt;
  byId("prompt-line").hidden = !pair.prompt;
  byId("answers").reset();
  byId("questions").disabled = true;
  byId("play").disabled = true;
  byId("hint").textContent = "Loading ...";
  byId("resume").href = `${location.pathname}${location.search}#resume=${token}`;
  mark();
  show("task");
  for (const element of [...clips, byId("photo")]) {
    if (element.src.startsWith("blob:")) URL.revokeObjectURL(element.src);
    element.removeAttribute("src");
  }
  const [photo, left, right] = await Promise.all([
    medium(`${pair.photo}.png`), medium(`${pair.left}.mp4`), medium(`${pair.right}.mp4`),
  ]);
  byId("photo").src = photo;
  const ready = clips.map((clip) => new Promise((done) => clip.addEventListener("canplaythrough", done, { once: true })));
  clips[0].src = left;
  clips[1].src = right;
  for (const clip of clips) clip.load();
  await Promise.all(ready);
  shownAt = performance.now();
  byId("heading").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  await play();
}

async function play() {
  ended = 0;
  byId("play").disabled = true;
  byId("play").textContent = "Playing ...";
  if (!plays) byId("hint").textContent = "Watch both clips to the end.";
  for (const clip of clips) clip.currentTime = 0;
  try {
    await Promise.all(clips.map((clip) => clip.play()));
  } catch { // the browser wants a touch first
    for (const clip of clips) clip.pause();
    offer("Play both");
  }
}

function offer(label) {
  byId("play").disabled = false;
  byId("play").textContent = label;
}

function onEnded() {
  ended += 1;
  if (ended < clips.length) return;
  plays += 1;
  offer("Play again");
  if (plays > 1) return;
  byId("questions").disabled = false;
  byId("hint").textContent = "Now answer the questions below.";
  mark();
}

function keepInStep() {
  const [left, right] = clips;
  if (!left.ended && !right.ended && Math.abs(left.currentTime - right.currentTime) > DRIFT_SECONDS) {
    right.currentTime = left.currentTime;
  }
}

const chosen = (question) => question.querySelector("input:checked");

// Marks the question that a number key answers, and lets save what is complete.
function mark() {
  const current = plays ? questions.find((question) => !chosen(question)) : undefined;
  for (const question of questions) question.classList.toggle("current", question === current);
  byId("vote").disabled = sending || !plays || Boolean(current);
}

async function vote(event) {
  event.preventDefault();
  if (byId("vote").disabled) return;
  sending = true;
  mark();
  byId("hint").textContent = "Saving ...";
  const answers = Object.fromEntries(questions.map((question) => [question.dataset.name, chosen(question).value]));
  const milliseconds = Math.round(performance.now() - shownAt);
  const device = matchMedia("(max-width: 600px)").matches ? "phone" : "desktop";
  const { status, content } = await ask("api/votes", { pair: pair.name, answers, milliseconds, plays, device });
  sending = false;
  const stored = status === 201 || ["already_stored", "not_next"].includes(content.error.reason);
  if (!stored && status !== 401) {
    byId("hint").textContent = "";
    trouble(content.error.message);
    return mark();
  }
  await next();
}

function finish(code) {
  show("done");
  byId("code-line").hidden = !code;
  byId("code").textContent = code;
  byId("thanks").focus();
  const query = new URLSearchParams(location.search);
  if (study.platform === "prolific" && code) {
    const link = document.createElement("a");
    link.href = `https://app.prolific.com/submissions/complete?cc=${encodeURIComponent(code)}`;
    link.textContent = "Return to Prolific";
    byId("back").replaceChildren(link);
  }
  if (study.platform === "mturk") byId("back").replaceChildren(mturkForm(query, code));
}

function mturkForm(query, code) {
  const hosts = ["https://www.mturk.com", "https://workersandbox.mturk.com"];
  const form = document.createElement("form");
  let host = hosts[0];
  try {
    const asked = new URL(query.get("turkSubmitTo") || "").origin;
    if (hosts.includes(asked)) host = asked;
  } catch { /* no address: the main host */ }
  form.method = "post";
  form.action = `${host}/mturk/externalSubmit`;
  for (const [name, value] of [["assignmentId", query.get("assignmentId") || ""], ["code", code || "done"]]) {
    const field = Object.assign(document.createElement("input"), { type: "hidden", name, value });
    form.append(field);
  }
  form.append(Object.assign(document.createElement("button"), { textContent: "Submit to MTurk", className: "main" }));
  return form;
}

function onKey(event) {
  if (byId("task").hidden || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const key = event.key.toLowerCase();
  const current = questions.find((question) => !chosen(question));
  if (["1", "2", "3"].includes(key) && plays && current) {
    current.querySelectorAll("input")[Number(key) - 1].checked = true;
  } else if (key === "backspace" && plays) {
    const last = questions.filter(chosen).pop();
    if (last) chosen(last).checked = false;
  } else if (key === "r" && !byId("play").disabled) {
    play();
  } else if (key === "enter" && !["BUTTON", "A", "SUMMARY", "INPUT"].includes(document.activeElement.tagName)) {
    byId("answers").requestSubmit();
  } else return;
  event.preventDefault();
  mark();
}

for (const clip of clips) clip.addEventListener("ended", onEnded);
clips[0].addEventListener("timeupdate", keepInStep);
byId("play").addEventListener("click", play);
byId("answers").addEventListener("change", mark);
byId("answers").addEventListener("submit", vote);
byId("start").addEventListener("click", start);
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => {
  // A hidden page stops its clips; what was not seen to the end does not count.
  if (document.hidden || byId("task").hidden || ended === clips.length || !clips[0].src) return;
  if (clips.some((clip) => clip.paused && !clip.ended)) offer("Play both");
});

token = remembered();
if (study.platform === "mturk" && new URLSearchParams(location.search).get("assignmentId") === "ASSIGNMENT_ID_NOT_AVAILABLE") {
  byId("preview").hidden = false;
  byId("start").disabled = true;
}
if (token) next();
else show("welcome");
