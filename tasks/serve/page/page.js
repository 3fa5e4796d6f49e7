// The web UI: sends a photo and a prompt to /v1/videos, follows the video, and lists the clips of this browser.

const POLL_MS = 500;
const STORED = 24; // clips that the browser remembers
const LIST = "trip-videos", KEY = "trip-key";
const NUMBERS = ["seed", "steps", "guidance", "num_frames", "fps"];
const EXAMPLES = [
  ["circle", "#e23630", "#f3ead8", "a red circle moving right slowly"],
  ["square", "#3462e8", "#dff0e4", "a blue square moving up quickly"],
  ["triangle", "#f4d02c", "#55536e", "a yellow triangle moving left slowly"],
];

const $ = (id) => document.getElementById(id);
let model = null; // the answer of /v1/model
let photo = null; // {blob, width, height}; without a size if the browser cannot show it
let current = null; // the video that is shown or awaited
let urls = {}; // object URLs by id of a video

class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param;
  }
}

async function api(method, path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers["Authorization"] = "Bearer " + utf8(key);
  let answer;
  try {
    answer = await fetch(path, { method, body, headers });
  } catch {
    throw new ApiError(0, { message: "The service does not answer. Check the connection and try again." });
  }
  if (answer.ok) return answer;
  let error = { message: `The service answered with status ${answer.status}.` };
  try { error = (await answer.json()).error ?? error; } catch { /* a proxy answered */ }
  throw new ApiError(answer.status, error);
}

// A header may contain bytes only.
const utf8 = (text) => String.fromCharCode(...new TextEncoder().encode(text));

// Errors are shown at their field.

const FIELDS = { image: "photo", prompt: "prompt", key: "key", ...Object.fromEntries(NUMBERS.map((name) => [name, name])) };

function showError(field, message) {
  const input = $(field);
  if (input) input.setAttribute("aria-invalid", "true");
  $(`${field}-error`).textContent = message;
  if (NUMBERS.includes(field)) $("settings").open = true;
}

function clearErrors(...fields) {
  for (const field of fields.length ? fields : [...Object.values(FIELDS), "form"]) {
    $(field)?.removeAttribute("aria-invalid");
    $(`${field}-error`).textContent = "";
  }
}

function report(error) {
  if (error.status === 401 || (error.status === 429 && error.message.includes("wrong API keys"))) {
    $("key-field").hidden = false;
    const wrong = error.status === 401 ? "The service does not accept this key." : sentence(error.message);
    showError("key", sessionStorage.getItem(KEY) ? wrong : "Enter the API key of this service.");
    $("key").focus();
    return;
  }
  const field = FIELDS[error.param] ?? "form";
  showError(field, sentence(error.message));
  $(field === "form" ? "animate" : field).focus();
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// The photo and the part of it that is animated: the largest square.

async function choosePhoto(blob) {
  clearErrors("photo", "form");
  photo = null;
  $("preview").hidden = $("move").hidden = true;
  if (!blob) return;
  if (model && blob.size > model.max_photo_bytes) {
    showError("photo", `The file has ${mebibytes(blob.size)} MiB; choose one of at most ${mebibytes(model.max_photo_bytes)} MiB.`);
    return;
  }
  photo = { blob };
  const url = URL.createObjectURL(blob);
  const image = $("shown");
  image.src = url;
  try {
    await image.decode();
  } catch {
    showError("photo", "This browser cannot show the file. If it is a photo, save it as JPEG and choose that.");
    return;
  }
  photo = { blob, width: image.naturalWidth, height: image.naturalHeight };
  $("position").value = 50;
  $("preview").style.setProperty("--ratio", photo.width / photo.height);
  $("preview").hidden = false;
  $("move").hidden = Math.abs(photo.width - photo.height) < 0.02 * photo.width;
  showCrop();
}

function cropBox() {
  const side = Math.min(photo.width, photo.height), part = $("position").value / 100;
  return { side, left: (photo.width - side) * part, top: (photo.height - side) * part };
}

function showCrop() {
  const { side, left, top } = cropBox(), style = $("crop").style;
  style.left = `${(100 * left) / photo.width}%`;
  style.top = `${(100 * top) / photo.height}%`;
  style.width = `${(100 * side) / photo.width}%`;
  style.height = `${(100 * side) / photo.height}%`;
}

async function upload() {
  // The service animates the centre. The file itself is sent unless another part is chosen.
  if (!photo.width || $("position").value === "50") return photo.blob;
  const { side, left, top } = cropBox(), canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.min(side, 1024);
  canvas.getContext("2d").drawImage($("shown"), left, top, side, side, 0, 0, canvas.width, canvas.height);
  return toBlob(canvas);
}

const toBlob = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
const mebibytes = (bytes) => (bytes / 2 ** 20).toFixed(bytes % 2 ** 20 ? 1 : 0);

function drawExample([shape, colour, ground]) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const draw = canvas.getContext("2d");
  draw.fillStyle = ground;
  draw.fillRect(0, 0, 256, 256);
  draw.fillStyle = colour;
  draw.beginPath();
  if (shape === "circle") draw.arc(128, 128, 45, 0, 7);
  else if (shape === "square") draw.rect(86, 86, 84, 84);
  else { draw.moveTo(128, 78); draw.lineTo(180, 168); draw.lineTo(76, 168); }
  draw.fill();
  return canvas;
}

for (const example of EXAMPLES) {
  const button = document.createElement("button"), canvas = drawExample(example);
  button.type = "button";
  button.append(canvas, example[3]);
  button.addEventListener("click", async () => {
    $("prompt").value = example[3];
    clearErrors("prompt");
    $("photo").value = "";
    await choosePhoto(await toBlob(canvas));
  });
  $("examples").append(button);
}

$("photo").addEventListener("change", () => choosePhoto($("photo").files[0]));
$("position").addEventListener("input", showCrop);
$("prompt").addEventListener("input", () => clearErrors("prompt"));
$("key").addEventListener("input", () => clearErrors("key"));
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((item) => item.type.startsWith("image/"));
  if (file) choosePhoto(file);
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop" && event.dataTransfer.files[0]) choosePhoto(event.dataTransfer.files[0]);
  });
}
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

// One request at a time.

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (current?.pending) return;
  clearErrors();
  if (!$("key-field").hidden) sessionStorage.setItem(KEY, $("key").value);
  const missing = [];
  if (!$("key-field").hidden && !$("key").value) missing.push(["key", "Enter the API key of this service."]);
  if (!photo) missing.push(["photo", "Choose a photo."]);
  if (!$("prompt").value.trim()) missing.push(["prompt", "Describe what should move."]);
  for (const [field, message] of missing) showError(field, message);
  if (missing.length) return $(missing[0][0]).focus();
  current = { pending: true };
  showWaiting("Sending the photo");
  try {
    const body = new FormData();
    body.append("image", await upload(), "photo");
    body.append("prompt", $("prompt").value);
    for (const name of [...NUMBERS, "format"]) if ($(name).value.trim()) body.append(name, $(name).value.trim());
    const video = await (await api("POST", "v1/videos", body)).json();
    remember(video.id);
    await follow(video);
  } catch (error) {
    current = { pending: false };
    stopWaiting();
    if (!(error instanceof ApiError)) throw error;
    report(error);
  }
});

async function follow(video) {
  while (video.status === "queued" || video.status === "in_progress") {
    current = { ...video, pending: true };
    if (video.status === "queued") showWaiting(video.place > 1 ? `Place ${video.place} in the line` : "Next in the line");
    else if (!video.step) showWaiting("Waiting for the model");
    else showWaiting(`Step ${video.step} of ${video.steps_total}`, video.step / video.steps_total);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    video = await (await api("GET", `v1/videos/${video.id}`)).json();
  }
  current = { ...video, pending: false };
  stopWaiting();
  if (video.status === "failed") throw new ApiError(video.error.status, video.error);
  if (video.status === "completed") await showClip(video);
  await showHistory();
}

function showWaiting(text, part) {
  $("animate").setAttribute("aria-disabled", "true");
  $("waiting").hidden = false;
  $("state").textContent = text;
  if (part === undefined) $("progress").removeAttribute("value");
  else $("progress").value = part;
  if ($("stage").dataset.scrolled) return;
  $("stage").dataset.scrolled = "yes";
  // On a phone the clip is below the visible part. Not at once: a second tap would hit what comes under the finger.
  if (matchMedia("(max-width: 720px)").matches) setTimeout(() => $("waiting").scrollIntoView({ block: "nearest" }), 500);
}

function stopWaiting() {
  $("animate").removeAttribute("aria-disabled");
  $("waiting").hidden = true;
  delete $("stage").dataset.scrolled;
}

async function contentUrl(video) {
  urls[video.id] ??= URL.createObjectURL(await (await api("GET", `v1/videos/${video.id}/content`)).blob());
  return urls[video.id];
}

async function player(video) {
  const moving = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const element = document.createElement(video.format === "gif" ? "img" : "video");
  element.src = await contentUrl(video);
  if (video.format === "gif") {
    element.alt = `Clip: ${video.prompt}`;
  } else {
    element.setAttribute("aria-label", `Clip: ${video.prompt}`);
    Object.assign(element, { muted: true, loop: true, playsInline: true, controls: true, autoplay: moving });
  }
  return element;
}

// Before and after: the first frame, which is the photo, next to the moving clip.
function compare(on) {
  $("compare").setAttribute("aria-pressed", on);
  $("stage").classList.toggle("compared", on);
  $("stage").querySelector(".before")?.remove();
  if (!on) return;
  const before = document.createElement("video");
  Object.assign(before, { className: "before", muted: true, playsInline: true });
  before.src = $("stage").querySelector("video").src + "#t=0.01";
  before.setAttribute("aria-label", "The photo");
  $("stage").prepend(before);
}

async function showClip(video) {
  $("stage").replaceChildren(await player(video));
  compare(false);
  const size = `${video.width} × ${video.height} pixels`;
  $("facts").textContent = `Seed ${video.seed} · ${video.num_frames} frames of ${size} · ${video.steps} steps · `
    + `guidance ${video.guidance} · ${video.model} version ${video.version} · ${video.seconds.toFixed(1)} s`
    + (video.prompt_truncated ? " · The prompt is longer than the model reads; its end was ignored." : "");
  $("download").href = urls[video.id];
  $("download").download = `trip-${video.seed}.${video.format}`;
  $("last").hidden = $("compare").hidden = video.format === "gif";
  $("actions").hidden = false;
  $("copied").textContent = "";
}

$("cancel").addEventListener("click", async () => {
  if (current?.id) await api("POST", `v1/videos/${current.id}/cancel`).catch(() => {});
});
$("compare").addEventListener("click", () => compare($("compare").getAttribute("aria-pressed") === "false"));
$("keep").addEventListener("click", () => {
  $("seed").value = current.seed;
  $("settings").open = true;
});
$("again").addEventListener("click", () => {
  $("seed").value = "";
  $("form").requestSubmit();
});
$("last").addEventListener("click", async () => {
  const video = $("stage").querySelector("video:not(.before)"), canvas = document.createElement("canvas");
  video.pause();
  await new Promise((resolve) => {
    video.addEventListener("seeked", resolve, { once: true });
    video.currentTime = video.duration - 0.01;
  });
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  $("photo").value = "";
  await choosePhoto(await toBlob(canvas));
  $("prompt").focus();
});
$("share").addEventListener("click", async () => {
  const values = new URLSearchParams({ prompt: current.prompt, video: current.id });
  for (const name of NUMBERS) if (current[name] !== undefined) values.set(name, current[name]);
  const link = location.href.split("#")[0] + "#" + values;
  try {
    await navigator.clipboard.writeText(link);
    $("copied").textContent = "The link is copied. It opens this clip while it is kept, and its prompt and settings.";
  } catch {
    $("copied").textContent = link;
  }
});

// The clips of this browser, by their ids.

const stored = () => { try { return JSON.parse(localStorage.getItem(LIST)) ?? []; } catch { return []; } };
const store = (ids) => localStorage.setItem(LIST, JSON.stringify(ids.slice(0, STORED)));
const remember = (id) => store([id, ...stored().filter((other) => other !== id)]);
const forget = (id) => store(stored().filter((other) => other !== id));

async function showHistory() {
  const items = [];
  for (const id of stored()) {
    try {
      const video = await (await api("GET", `v1/videos/${id}`)).json();
      if (video.status === "failed" || video.status === "cancelled") { forget(id); continue; }
      items.push(await historyItem(video));
    } catch (error) {
      if (error.status === 404) forget(id);
      else if (error.status === 401) return;
    }
  }
  $("clips").replaceChildren(...items);
  $("history").hidden = !items.length;
}

async function historyItem(video) {
  const item = document.createElement("li"), prompt = document.createElement("p"), facts = document.createElement("p");
  const buttons = document.createElement("div"), remove = document.createElement("button");
  if (video.status === "completed") {
    const element = await player(video);
    element.autoplay = false;
    if (video.format !== "gif") element.src += "#t=0.01"; // shows the first frame before it is played
    item.append(element);
    const link = document.createElement("a");
    Object.assign(link, { className: "button", textContent: "Download", href: urls[video.id], download: `trip-${video.seed}.${video.format}` });
    link.setAttribute("aria-label", `Download the clip of seed ${video.seed}`);
    buttons.append(link);
  } else {
    const none = document.createElement("div");
    Object.assign(none, { className: "none quiet", textContent: "Not done yet" });
    item.append(none);
  }
  prompt.textContent = video.prompt;
  facts.textContent = `Seed ${video.seed}`;
  facts.className = "quiet";
  buttons.className = "buttons";
  Object.assign(remove, { type: "button", textContent: "Delete" });
  remove.setAttribute("aria-label", `Delete the clip of seed ${video.seed}`);
  remove.addEventListener("click", async () => {
    await api("DELETE", `v1/videos/${video.id}`).catch(() => {});
    forget(video.id);
    await showHistory();
  });
  buttons.append(remove);
  item.append(prompt, facts, buttons);
  return item;
}

// The start: the model's own values, the values of a shared link, and what the browser remembers.

function readLink() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of ["prompt", ...NUMBERS]) if (values.get(name)) $(name).value = values.get(name);
  if (values.get("seed")) $("settings").open = true;
  return values.get("video");
}

async function start() {
  try {
    model = await (await api("GET", "v1/model")).json();
    const { defaults, size, bounds } = model;
    for (const name of ["steps", "guidance", "num_frames", "fps"]) {
      $(name).min = bounds[name].minimum;
      $(name).max = bounds[name].maximum;
      if (defaults[name] !== undefined) $(name).placeholder = defaults[name];
    }
    $("prompt").maxLength = model.max_prompt_characters;
    $("photo-hint").textContent = `JPEG, PNG, WebP, GIF, BMP or AVIF, up to ${mebibytes(model.max_photo_bytes)} MiB. Choose, drop or paste it.`;
    const clip = size ? ` A clip has ${defaults.num_frames} frames of ${size} × ${size} pixels, ${defaults.fps} per second.` : "";
    $("about").textContent = model.about + clip;
    $("model").textContent = model.version ? `Model ${model.model}, version ${model.version}` : "No model is loaded yet.";
    const hours = model.keep_seconds / 3600;
    $("kept").textContent = `The service keeps a clip for ${hours >= 1 ? `${Math.round(hours)} h` : `${Math.round(hours * 60)} min`}.`;
    $("key-field").hidden = !model.key_required;
    $("key").value = sessionStorage.getItem(KEY) ?? "";
  } catch (error) {
    report(error);
  }
  const linked = readLink();
  const locked = model?.key_required && !sessionStorage.getItem(KEY);
  if (!locked) await showHistory();
  const [latest] = stored();
  const id = linked ?? latest;
  if (!id || locked) return;
  try {
    await follow(await (await api("GET", `v1/videos/${id}`)).json());
  } catch (error) {
    stopWaiting();
    if (linked && error.status === 404) showError("form", "The linked clip is not kept any more. Its prompt and settings are filled in.");
  }
}

start();
