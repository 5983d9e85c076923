// The playground: a page without a build step. Options and their meaning come from /openapi.json.
const byId = (id) => document.getElementById(id);
const STORE = "gptc-playground";
const SHOWN = [
  "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
  "presence_penalty", "frequency_penalty", "penalty_last_n", "logit_bias", "seed", "stop", "regex",
  "grammar", "response_format",
];
const TEXTS = new Set(["logit_bias", "stop", "regex", "grammar", "response_format"]);
const EXAMPLES = { // of options that are JSON
  logit_bias: '{"284": -100}',
  response_format: '{"type": "json_object"}',
};
const ALTERNATIVES = 5;
let running = null; // the AbortController of the text under way
let messages = [];
let samples = []; // those that are shown
let chosen = ""; // the model's name, or an adapter's, once one was chosen

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// ---- options, and the saved session ----

function addField(name, schema) {
  const input = element("input", undefined, { id: `option-${name}`, name });
  if (!TEXTS.has(name)) {
    input.type = "number";
    input.step = schema.type === "integer" ? "1" : "any";
    if (schema.minimum !== undefined) input.min = schema.minimum;
    if (schema.maximum !== undefined) input.max = schema.maximum;
  }
  const first = name === "max_tokens" ? 64 : schema.default;
  input.value = first ?? "";
  input.setAttribute("aria-describedby", `help-${name}`);
  byId("fields").append(
    element("label", name, { for: input.id }),
    input,
    element("p", schema.description, { id: `help-${name}`, class: "help" }),
  );
}

function optionValues() {
  const found = {};
  for (const name of SHOWN) {
    const text = byId(`option-${name}`)?.value ?? "";
    if (text === "") continue;
    if (!TEXTS.has(name)) found[name] = Number(text);
    else if (name === "stop") found[name] = text.replaceAll("\\n", "\n");
    else found[name] = EXAMPLES[name] ? valueOf(name, text) : text;
  }
  return found;
}

function valueOf(name, text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${name} is not JSON, such as ${EXAMPLES[name]}`);
  }
}

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function setMode(chat) {
  document.querySelector(`input[name=mode][value="${chat ? "chat" : "completion"}"]`).checked = true;
}

function save() {
  const options = Object.fromEntries(SHOWN.map((n) => [n, byId(`option-${n}`)?.value ?? ""]));
  const theme = document.documentElement.dataset.theme ?? "";
  const [prompt, system] = [byId("prompt").value, byId("system").value];
  const kept = { mode: mode(), prompt, system, options, messages, theme, chosen };
  const shown = samples.map(({ box, ...rest }) => rest);
  if (running && messages.at(-1)?.role === "user") { // not answered: it can be sent again
    Object.assign(kept, { messages: messages.slice(0, -1), prompt: prompt || messages.at(-1).content });
  }
  for (const more of [{ shown }, {}]) { // many tokens may be more than the browser keeps
    try {
      localStorage.setItem(STORE, JSON.stringify({ ...kept, ...more }));
      return;
    } catch { /* the browser keeps nothing, or not so much */ }
  }
}

function restore() {
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(STORE));
  } catch { /* the browser keeps nothing, or something else */ }
  if (!kept) return;
  byId("prompt").value = kept.prompt ?? "";
  byId("system").value = kept.system ?? "";
  setMode(kept.mode === "chat");
  for (const name of SHOWN) {
    const input = byId(`option-${name}`);
    if (input && kept.options?.[name] !== undefined) input.value = kept.options[name];
  }
  if (typeof kept.chosen === "string") chosen = kept.chosen;
  if (Array.isArray(kept.messages)) messages = kept.messages;
  if (Array.isArray(kept.shown)) restoreSamples(kept.shown);
  if (kept.theme) document.documentElement.dataset.theme = kept.theme;
}

// ---- a request ----

function headers() {
  const found = { "Content-Type": "application/json" };
  if (byId("key").value) found.Authorization = `Bearer ${byId("key").value}`;
  return found;
}

// Shows the names that a request may have, if there are several.
async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return; // the key is missing, or another one
  const names = (await response.json()).data.map((model) => model.id);
  if (!names.includes(chosen)) chosen = names[0];
  byId("name").replaceChildren(...names.map((name) => element("option", name, { value: name })));
  byId("name").value = chosen;
  byId("models").hidden = names.length < 2;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function tokensOf(choice) {
  const scores = choice.logprobs;
  if (!scores) return [];
  if (scores.content) {
    return scores.content.map((one) => ({
      text: one.token, logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return scores.tokens.map((text, i) => ({
    text, logprob: scores.token_logprobs[i], top: Object.entries(scores.top_logprobs[i] ?? {}),
  }));
}

// before: a conversation whose answer begins with `begun`; without it, the prompt is a new message.
async function run(prompt, before = [], begun = "") {
  if (running) return;
  const chat = mode() === "chat";
  let options = {};
  try {
    options = optionValues();
  } catch (error) {
    say(error.message, true);
    return;
  }
  const body = { ...options, stream: true, stream_options: { include_usage: true } };
  if (chosen) body.model = chosen;
  if (chat) {
    if (begun) {
      messages = [...before, { role: "assistant", content: begun }];
      body.continue_final_message = true;
    } else {
      messages.push({ role: "user", content: prompt });
      byId("prompt").value = "";
    }
    const system = byId("system").value;
    const first = system ? [{ role: "system", content: system }] : [];
    Object.assign(body, { messages: [...first, ...messages], logprobs: true, top_logprobs: ALTERNATIVES });
  } else {
    Object.assign(body, { prompt, logprobs: ALTERNATIVES });
  }
  running = new AbortController();
  setRunning(true);
  showMessages();
  const asked = begun ? messages.slice(0, -1) : [...messages];
  const answers = makeSamples(Array(options.n ?? 1).fill({ chat, prompt, asked, begun }));
  const since = performance.now();
  let usage = null;
  try {
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) addPiece(answers[choice.index], choice);
    }
    if (!usage) throw new Error("the answer was cut off");
    const seconds = (performance.now() - since) / 1000;
    say(`${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    running = null;
    setRunning(false);
    if (chat && begun) messages.at(-1).content = begun + answers[0].text;
    else if (chat && answers[0].text) messages.push({ role: "assistant", content: answers[0].text });
    else if (chat) { // no answer: the message can be sent again
      messages.pop();
      if (!byId("prompt").value) byId("prompt").value = prompt;
    }
    if (chat) showMessages();
    save();
  }
}

function setRunning(on) {
  byId("run").disabled = on;
  byId("stop").disabled = !on;
  byId("clear").disabled = on;
  if (on) say("running …");
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").className = isError ? "error" : "";
}

// ---- samples and tokens ----

// Shows samples without tokens. asked: the conversation before the answer; begun: what it begins with.
function makeSamples(origins) {
  byId("samples").replaceChildren();
  byId("alternatives").hidden = true;
  samples = origins.map(({ chat, prompt, asked, begun }, i) => {
    const box = element("article", undefined, { class: "sample", "aria-label": `Sample ${i + 1}` });
    box.append(element("h2", `Sample ${i + 1}`), begun);
    byId("samples").append(box);
    return { box, chat, prompt, asked, begun, text: "", tokens: [], finish: null };
  });
  return samples;
}

function restoreSamples(shown) {
  makeSamples(shown);
  shown.forEach(({ text, tokens, finish }, i) => add(samples[i], text, tokens, finish));
}

function addPiece(sample, choice) {
  const piece = sample.chat ? (choice.delta.content ?? "") : choice.text;
  add(sample, piece, tokensOf(choice), choice.finish_reason);
}

function add(sample, piece, tokens, finish) {
  sample.text += piece;
  if (!tokens.length) sample.box.append(piece);
  for (const token of tokens) {
    const at = sample.tokens.length;
    sample.tokens.push(token);
    const percent = Math.round(100 * Math.exp(token.logprob));
    const span = element("span", readable(token.text), {
      class: "token", role: "button", tabindex: at ? "-1" : "0",
      title: `${percent} %`, "aria-label": `token ${token.text}, ${percent} percent`,
    });
    const mark = markOf(span.textContent);
    if (mark) span.dataset.mark = mark; // without which there is nothing to point at
    span.style.backgroundColor = `color-mix(in srgb, orange ${Math.round((100 - percent) * 0.45)}%, transparent)`;
    const show = () => showAlternatives(sample, at);
    span.addEventListener("mouseenter", show);
    span.addEventListener("focus", show);
    span.addEventListener("click", show);
    span.addEventListener("keydown", (event) => moveFocus(event, span));
    sample.box.append(span);
  }
  if (!finish) return;
  sample.finish = finish;
  sample.box.querySelector("h2").textContent += ` (${finish})`;
}

// The mark of a token of line ends, or of characters that are not drawn.
function markOf(text) {
  if (/^\n+$/.test(text)) return "\u21B5";
  return /^[^\P{C}\t]*$/u.test(text) ? "\u00B7" : "";
}

function readable(text) {
  return text.startsWith("bytes:") ? "\uFFFD" : text;
}

function moveFocus(event, span) {
  const steps = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
  if (event.key === "Enter") byId("alternatives").querySelector("button")?.focus();
  const next = steps[event.key] && span[steps[event.key]];
  if (!next?.classList.contains("token")) return;
  event.preventDefault();
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function showAlternatives(sample, at) {
  const panel = byId("alternatives");
  panel.replaceChildren(element("h2", `Instead of ${JSON.stringify(sample.tokens[at].text)}`));
  for (const [text, logprob] of [...sample.tokens[at].top].sort((a, b) => b[1] - a[1])) {
    const button = element("button", `${JSON.stringify(text)} ${(100 * Math.exp(logprob)).toFixed(1)} %`, { type: "button" });
    button.disabled = text.startsWith("bytes:");
    button.addEventListener("click", () => {
      if (running) return;
      const before = sample.tokens.slice(0, at).map((token) => readable(token.text)).join("");
      const begun = sample.begun + before + text;
      setMode(sample.chat);
      if (sample.chat) {
        run(sample.prompt, sample.asked, begun);
      } else {
        byId("prompt").value = sample.prompt + begun;
        run(byId("prompt").value);
      }
    });
    panel.append(button);
  }
  panel.hidden = false;
}

function showMessages() {
  const chat = mode() === "chat";
  byId("messages").hidden = !chat;
  byId("chat-system").hidden = !chat;
  byId("prompt-label").textContent = chat ? "Message" : "Prompt";
  byId("messages").replaceChildren(
    ...messages.map((message) => {
      const item = element("li", undefined);
      item.append(element("strong", `${message.role}: `), message.content);
      return item;
    }),
  );
}

// ---- the page ----

async function begin() {
  const document_ = await (await fetch("/openapi.json")).json();
  const path = document_.paths["/v1/completions"].post;
  const fields = path.requestBody.content["application/json"].schema.properties;
  for (const name of SHOWN) addField(name, fields[name]);
  byId("model").textContent = document_.info.title.replace("gptc serve: ", "");
  restore();
  await listModels();
  showMessages();
  byId("run").addEventListener("click", () => run(byId("prompt").value));
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", () => {
    messages = [];
    makeSamples([]);
    showMessages();
    save();
  });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme ?? dark) === "dark" ? "light" : "dark";
    save();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(byId("prompt").value);
    if (event.key === "Escape") running?.abort();
  });
  document.addEventListener("change", (event) => {
    if (event.target.id === "name") chosen = event.target.value;
    if (event.target.id === "key") listModels();
    showMessages();
    save();
  });
  window.addEventListener("pagehide", save); // a field that still has the focus has not changed yet
  byId("options").addEventListener("submit", (event) => event.preventDefault());
  document.body.dataset.ready = "yes";
}

begin();
