// Choose an image, POST it to /inspect, draw the answer. The page's policy forbids inline styles and other origins,
// so what is drawn is made of elements, and lengths are set through element.style.

const RAW_TYPES = ["image/png", "image/jpeg", "image/webp"];
const KEY = "unperturb-api-key"; // in sessionStorage
const UNSURE = 0.5; // a best score below this is said
const TIMES = 8; // that differences are amplified
const SAMPLES = { // whether it is attacked, and what happens to it
  restored: [true, "the attack changes its label, and the purifier brings it back"],
  unrestored: [true, "the attack changes its label, and the purifier does not bring it back"],
  harmed: [false, "its label is right, and the purifier alone makes it wrong"],
};
const [form, drop, file, preview, name, hint, about, often, attack, model, knows, preset, purpose, lacks, advice, access,
  key, run, status, result] = [
  "form", "drop", "file", "preview", "name", "hint", "about", "often", "attack", "model", "knows", "preset", "purpose", "lacks",
  "advice", "access", "key", "run", "status", "result",
].map((id) => document.getElementById(id));

let chosen = null; // the File
let running = null; // the AbortController of the request in progress
let purposes = {}; // what each preset is for, in the service's words
let assessed = null; // the model's card, which says what its presets are worth

// ---- elements, numbers and words

const maker = (namespace) => (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(namespace, tag);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.append(...children);
  return element;
};
const html = maker("http://www.w3.org/1999/xhtml");
const svg = maker("http://www.w3.org/2000/svg");

const percent = (score) => `${(100 * score).toFixed(1)}%`;
const levels = (distance) => `${Number((255 * distance).toFixed(1))}/255`;
const capital = (word) => word[0].toUpperCase() + word.slice(1);

function say(words, kind = "") {
  status.className = kind;
  status.textContent = words;
  if (words) status.scrollIntoView({ block: "nearest" });
}

// ---- choosing an image

function choose(one, words = "") {
  running?.abort();
  chosen = one;
  about.textContent = words;
  about.hidden = !words;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(one);
  preview.hidden = false;
  name.textContent = one.name;
  hint.textContent = "Choose another, or drop it here";
  result.hidden = true;
  say("");
}

async function chooseSample({ currentTarget: button }) {
  const kind = button.dataset.sample;
  const [attacked, fate] = SAMPLES[kind];
  try {
    const [picture, figures] = await Promise.all([fetch(`page/${kind}.png`), fetch("page/samples.json")]);
    if (!picture.ok || !figures.ok) throw new Error(picture.statusText);
    const told = await figures.json();
    const words = `A part of a drawing, chosen to show this: by the model ${told.model} and the purifier transfer, ${fate}.`;
    choose(new File([await picture.blob()], button.textContent, { type: "image/png" }), words);
    tellCounts(told);
  } catch {
    say("The sample could not be loaded.", "error");
    return;
  }
  attack.checked = attacked;
  const usual = preset.querySelector("[value=transfer]");
  if (!usual.disabled) preset.value = usual.value;
  advise();
}

function tellCounts({ model: own, data, counts }) {
  often.hidden = !counts;
  if (!counts) return;
  const { n, right, changed, restored, unrestored, harmed } = counts;
  often.textContent =
    `The samples are chosen. Of the first ${n} test images of ${data}, ${own} has ${right} right at first; the attack changes ` +
    `${changed} of them, of which ${restored} are restored and ${unrestored} are not; ${harmed} are harmed.`;
}

function dropped(event) {
  event.preventDefault(); // anywhere on the page: a file that misses would replace the page
  drop.classList.remove("over");
  const [one] = event.dataTransfer.files;
  if (one) choose(one);
  else say("What was dropped is not a file.", "error");
}

// ---- the models

let models = []; // as GET /models lists them

const authorised = () => (key.value.trim() ? { Authorization: `Bearer ${key.value.trim()}` } : {});

async function listModels() {
  try {
    const response = await fetch("models", { headers: authorised() });
    if (!response.ok) return; // without a key there is no list, and the default model answers
    models = await response.json();
  } catch {
    return; // the request itself will say that the service cannot be reached
  }
  model.replaceChildren(...models.map(({ id, default: first }) => html("option", { value: id, ...(first && { selected: "" }) }, id)));
  model.hidden = model.labels[0].hidden = models.length < 2;
  await describeModel();
}

async function describeModel() {
  const asked = model.value;
  const { presets } = models.find(({ id }) => id === asked);
  for (const option of preset.options) option.disabled = !presets.includes(option.value);
  if (preset.selectedOptions[0].disabled) preset.value = presets[0];
  const steps = [...preset.options].map(({ value }) => value).filter((value) => !["vote", "restorer"].includes(value));
  lacks.hidden = steps.some((value) => presets.includes(value));
  lacks.textContent = `This model has no head, which ${steps.join(", ")} need; "unperturb train head" makes one.`;
  assessed = null;
  advise();
  const response = await fetch(`models/${encodeURIComponent(asked)}`, { headers: authorised() });
  if (!response.ok || asked !== model.value) return; // another was chosen meanwhile
  const { classes, purposes: told, worth, advice: verdict } = await response.json();
  purposes = told ?? {};
  assessed = verdict && { worth, verdict: verdict.replaceAll("`", "") }; // by `unperturb assess --write-card`, or the harness
  advise();
  const shown = classes.slice(0, 20).join(", ");
  knows.textContent = `This model knows ${classes.length} classes: ${shown}${classes.length > 20 ? " …" : "."}${assessed ? "" : ' Not assessed yet; "unperturb assess" does it.'}`;
  knows.hidden = false;
}

function advise() {
  const words = purposes[preset.value];
  purpose.hidden = !words;
  purpose.textContent = words ? `${capital(words)}.` : "";
  advice.hidden = !assessed;
  if (!assessed) return;
  const found = assessed.worth[preset.value];
  const gains = found && [
    points(found.knows_everything, "against who knows it"),
    points(found.does_not_know, "against who does not"),
    points(found.clean, "on clean images"),
  ].filter(Boolean).join(", ");
  const judged = found && ` (${found.n} images, attacks of up to ${(255 * found.epsilon).toFixed(1).replace(".0", "")}/255, budget ${found.budget})`;
  const own = gains ? `Points gained by ${preset.value}${judged}: ${gains}` : `${capital(preset.value)} was not judged`;
  advice.textContent = `Assessed: ${assessed.verdict}. ${own}.`;
}

function points(gain, against) {
  const signed = (share) => `${share < 0 ? "" : "+"}${(100 * share).toFixed(1)}`;
  if (!gain) return "";
  const [low, high] = gain.interval.map(signed);
  return `${gain.at_most ? `\u2264 ${signed(gain.mean)} (to ${high})` : `${signed(gain.mean)} (${low} to ${high})`} ${against}`;
}

// ---- the request

class Refusal extends Error {} // its message is for people

async function ask(signal) {
  const query = new URLSearchParams({ attack: attack.checked, preset: preset.value });
  if (model.value) query.set("model", model.value);
  const headers = authorised();
  let body = chosen;
  if (RAW_TYPES.includes(chosen.type)) headers["Content-Type"] = chosen.type;
  else (body = new FormData()).append("image", chosen); // the service looks at the bytes, and says what they are not
  let response, answer;
  try {
    response = await fetch(`inspect?${query}`, { method: "POST", headers, body, signal });
    answer = await response.json().catch(() => null); // a proxy's own error page is not JSON
  } catch {
    throw new Refusal("No answer: the service cannot be reached, it hung up on the file, or the file cannot be read.");
  }
  if (response.ok && answer) return answer;
  if (response.status === 401) askForKey();
  throw new Refusal(inWords(response, answer ?? {}));
}

function inWords(response, problem) {
  const after = response.headers.get("Retry-After");
  const title = `${problem.title ?? "The request failed"} (${response.status})`;
  return [title, problem.detail].filter(Boolean).join(": ") + (after ? `. Try again in ${after} s.` : ".");
}

function askForKey() {
  access.open = true;
  key.focus();
}

async function start() {
  if (running) return;
  if (!chosen) return say("Choose an image first.", "error");
  if (/[^!-~]/.test(key.value.trim())) {
    askForKey();
    return say("The API key has a character that no key has.", "error");
  }
  const mine = (running = new AbortController());
  working(true);
  say(attack.checked ? "Attacking, purifying and classifying…" : "Purifying and classifying…", "working");
  try {
    const answer = await ask(mine.signal);
    const cards = await draw(answer);
    if (!mine.signal.aborted) show(answer, cards);
  } catch (error) {
    if (mine.signal.aborted) return; // another image was chosen meanwhile
    result.hidden = true;
    say(error instanceof Refusal ? error.message : "The answer could not be drawn.", "error");
    if (!(error instanceof Refusal)) throw error;
  } finally {
    running = null;
    working(false);
  }
}

function working(yes) {
  run.setAttribute("aria-disabled", yes); // not `disabled`, which would take the focus away
  run.textContent = yes ? "Running…" : "Run";
  result.setAttribute("aria-busy", yes);
}

// ---- the answer

function show(answer, cards) {
  say(verdict(answer));
  result.className = answer.attacked ? "attacked" : "";
  result.replaceChildren(...cards);
  result.hidden = false;
  if (result.getBoundingClientRect().top < 0.75 * innerHeight) return; // it begins in view
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  status.scrollIntoView({ behavior: still ? "auto" : "smooth" });
}

function verdict(answer) {
  const { label, score } = answer.original.predictions[0];
  if (score >= UNSURE) return outcome(answer);
  return `${outcome(answer)} The model is not sure: ${label} has ${percent(score)}. Perhaps the image shows none of its classes.`;
}

function outcome({ original, attacked, purified }) {
  const [before, between, after] = [original, attacked ?? original, purified].map((seen) => seen.predictions[0].label);
  const purification = between === after ? "purification did not change that" : `purification changed that to ${after}`;
  if (!attacked) return `Classified as ${before}; ${purification}.`;
  if (before === between) return `Classified as ${before}, also after the attack; ${purification}.`;
  return `The attack changed ${before} to ${between}; ${purification}${after === before ? " again" : ""}.`;
}

async function draw(answer) {
  const names = ["original", "attacked", "purified"].filter((one) => answer[one]);
  const images = await Promise.all(names.map((one) => load(one, answer[one].image)));
  const same = answer.original.predictions[0].index;
  return [
    ...names.map((one, i) =>
      card(capital(one), "seen", images[i], bars(answer[one].predictions, same), ...below(one, images[i]))),
    ...names.slice(1).map((one, i) => difference(one, names[i], pixels(images[i + 1]), pixels(images[i]))),
    ...(answer.losses.length ? [losses(answer)] : []),
    card("Time", "time", table(Object.entries(answer.timings_ms).map(([part, ms]) => [part, `${ms.toFixed(1)} ms`]))),
    card("Details", "last", table(details(answer, images[0]))),
  ];
}

const card = (title, kind, ...children) => html("section", { class: `card ${kind}` }, html("h2", {}, title), ...children);

async function load(one, base64) {
  const image = html("img", { src: `data:image/png;base64,${base64}`, alt: `The ${one} image, enlarged` });
  await image.decode();
  return image;
}

function bars(predictions, same) {
  return html("ol", { class: "bars" }, ...predictions.map(({ index, label, score }, i) => {
    const bar = html("i");
    bar.style.width = percent(score);
    const kind = `${i ? "" : "first"} ${index === same ? "same" : ""}`; // `same`: the class of the original, to follow it
    const track = html("div", { class: "bar" }, bar);
    return html("li", { class: kind }, html("span", { title: label }, label), track, html("b", {}, percent(score)));
  }));
}

function below(one, image) {
  if (one === "original") return [html("p", { class: "legend" }, html("i", {}), "its first class \u2003", html("i", {}), "others")];
  const link = html("a", { href: image.src, download: `${one}.png` }, "Download");
  return one === "purified" ? [html("p", {}, link)] : [];
}

function pixels(image) {
  const canvas = html("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function difference(after, before, to, from) {
  const change = Array.from(to.data, (value, i) => value - from.data[i]); // 0 at every alpha: both are opaque
  const largest = change.reduce((most, one) => Math.max(most, Math.abs(one)), 0);
  const shown = new ImageData(to.width, to.height); // clamps
  change.forEach((one, i) => (shown.data[i] = i % 4 === 3 ? 255 : 128 + TIMES * one));
  const title = `${capital(after)} minus ${before}`;
  const canvas = html("canvas", { width: to.width, height: to.height, role: "img", "aria-label": `${title}, enlarged` });
  canvas.getContext("2d").putImageData(shown, 0, 0);
  const words = largest ? `${TIMES} times amplified; grey is no change. Largest: ${largest}/255.` : "No change.";
  return card(title, "difference", canvas, html("p", {}, words));
}

function losses(answer) {
  const { losses: values, loss_before: before, loss_after: after } = answer;
  const words = `${before.toFixed(2)} before and ${after.toFixed(2)} after all steps.`;
  return card("InfoNCE loss", "loss", values.length > 1 ? curve(values) : twoBars(before, after), html("p", {}, words));
}

function twoBars(before, after) {
  const most = Math.max(before, after);
  return html("ol", { class: "bars" }, ...Object.entries({ before, after }).map(([name, value]) => {
    const bar = html("i");
    bar.style.width = percent(Math.max(0, value) / (most || 1));
    return html("li", {}, html("span", {}, name), html("div", { class: "bar" }, bar), html("b", {}, value.toFixed(2)));
  }));
}

function curve(values) {
  const [width, height, left, right, top, bottom] = [320, 300, 46, 8, 10, 42];
  const spread = Math.max(...values) - Math.min(...values) || 1;
  const [low, high] = [Math.min(...values) - 0.08 * spread, Math.max(...values) + 0.08 * spread];
  const x = (step) => left + ((step - 1) / Math.max(1, values.length - 1)) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const text = (words, at) => svg("text", at, words);
  const points = values.map((value, i) => [x(i + 1).toFixed(1), y(value).toFixed(1)]);
  const steps = [...new Set([1, ...ticks(1, values.length).filter(Number.isInteger)])];
  const label = `Line chart: InfoNCE before each of ${values.length} steps: ${values.map((v) => v.toFixed(2)).join(", ")}`;
  return svg("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ...ticks(low, high).flatMap((value) => [
      svg("path", { d: `M${left} ${y(value)}H${width - right}` }),
      text(Number(value.toPrecision(4)), { x: left - 6, y: y(value) + 4, "text-anchor": "end" }),
    ]),
    ...steps.map((step) => text(step, { x: x(step), y: height - bottom + 18, "text-anchor": "middle" })),
    text("step", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }),
    text("loss before the step", { transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }),
    svg("path", { class: "line", d: `M${points.join("L")}` }),
    ...points.map(([cx, cy]) => svg("circle", { cx, cy, r: values.length > 12 ? 2 : 3.5 })),
  );
}

function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

function details(answer, image) {
  const digest = html("code", { title: answer.model.digest }, answer.model.digest.slice(0, 12));
  return [
    ["model", answer.model.id],
    ["its SHA-256", digest],
    ["purifier", answer.preset],
    ...(answer.vote ? [["vote", `the mean over ${answer.vote} views`]] : []),
    ["its largest change", `${levels(answer.linf)}, limit ${levels(answer.epsilon)}`],
    ...(answer.attacked ? [["attack", `limit ${levels(answer.epsilon_attack)}`]] : []),
    ["image seen at", `${image.naturalWidth} × ${image.naturalHeight}`],
    ["request", html("code", {}, answer.request_id.slice(0, 12))],
  ];
}

function table(rows) {
  const row = ([term, value]) => html("tr", { class: term }, html("th", { scope: "row" }, term), html("td", {}, value));
  return html("table", {}, html("tbody", {}, ...rows.map(row)));
}

// ---- events

key.value = sessionStorage.getItem(KEY) ?? "";
key.addEventListener("input", () => sessionStorage.setItem(KEY, key.value.trim()));
key.addEventListener("change", listModels);
model.addEventListener("change", describeModel);
preset.addEventListener("change", advise);
listModels();
file.addEventListener("change", () => {
  if (file.files[0]) choose(file.files[0]);
  file.value = ""; // so that the same file can be chosen again
});
preview.addEventListener("error", () => (preview.hidden = true));
for (const button of document.querySelectorAll("[data-sample]")) button.addEventListener("click", chooseSample);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
addEventListener("drop", dropped);
