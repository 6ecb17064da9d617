"use strict";

const element = (id) => document.getElementById(id);
let model, key, session, latest, beforeSleep, stopping, polling;

function newSession() {
  show(null);
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  session = "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  latest = beforeSleep = null;
  element("chat").replaceChildren();
  element("sleeps").replaceChildren();
  element("norms").replaceChildren();
  element("fill").textContent = "Nothing has been read yet.";
  element("window").value = 0;
  element("now").disabled = true;
}

async function request(path, options = {}) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw Object.assign(new Error(body.error?.message ?? `status ${response.status}`), { status: response.status });
  }
  return response;
}

function show(error) {
  element("login").hidden = error?.status !== 401;
  element("error").hidden = !error || error.name === "AbortError" || (error.status === 401 && !key);
  element("error").textContent = error?.message ?? "";
}

async function connect() {
  try {
    model = (await (await request("v1/models")).json()).data[0].id;
    element("model").textContent = document.title = model;
    show(null);
  } catch (error) {
    show(error);
  }
}

function say(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  element("chat").append(item);
  item.scrollIntoView();
  return item;
}

async function* deltas(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: {"))) {
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0]?.delta?.content ?? "";
    }
  }
}

async function answer(text) {
  const asked = say("user", text);
  const item = say("assistant", "");
  const body = {
    model, session, append: true, stream: true, messages: [{ role: "user", content: text }],
    temperature: element("temperature").valueAsNumber, max_tokens: element("tokens").valueAsNumber,
  };
  stopping = new AbortController();
  try {
    if (latest) await about();  // a session that the server has forgotten would begin anew
    const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: stopping.signal });
    for await (const delta of deltas(response)) {
      item.textContent += delta;
      item.scrollIntoView({ block: "nearest" });
    }
    show(null);
  } catch (error) {
    if (!item.textContent && error.name !== "AbortError") {
      for (const line of [asked, item]) line.remove();
      element("text").value = text;
    }
    show(error.status === 404 && latest ? new Error("The server no longer has this conversation. Start a new chat.") : error);
  }
  stopping = null;
}

async function about() {
  for (let tries = 0; ; tries++) {
    try {
      return await (await request(`v1/sessions/${session}`)).json();
    } catch (error) {
      if (error.status !== 409 || tries === 50) throw error;  // a stopped answer ends a moment later
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
  }
}

async function refresh() {
  const now = await about(), before = latest;
  latest = now;
  const { tokens, limit } = latest.window;
  element("fill").textContent = limit === null ? `${tokens} tokens. This model never sleeps.` : `${tokens} of ${limit} tokens`;
  element("window").max = limit ?? Math.max(tokens, 1);
  element("window").value = tokens;
  element("now").disabled = limit === null || tokens === 0;
  const sleeps = latest.sleeps.map((sleep) => `after token ${sleep.position}, N = ${sleep.loops}`);
  const fresh = sleeps.slice(before?.sleeps.length ?? 0);
  if (fresh.length) say("slept", fresh.length === 1 ? `slept ${fresh[0]}` : `slept ${fresh.length} times, last ${fresh.at(-1)}`);
  element("sleeps").replaceChildren(...sleeps.reverse().map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  if (fresh.length && before) beforeSleep = before.norms;
  draw(latest.norms, beforeSleep);
}

function draw(norms, before) {
  const most = Math.max(1e-9, ...norms.filter((norm) => norm !== null), ...(before ?? []).filter((norm) => norm !== null));
  const shape = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [field, value] of Object.entries(attributes)) made.setAttribute(field, value);
    return made;
  };
  const rows = norms.flatMap((norm, layer) => {
    if (norm === null) return [];
    const row = Object.assign(document.createElement("div"), { className: "norm" });
    const bar = shape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `norm ${norm}` });
    bar.append(shape("rect", { width: (100 * norm) / most, height: 10 }));
    const old = before?.[layer];
    if (old != null) bar.append(shape("line", { x1: (100 * old) / most, x2: (100 * old) / most, y1: 0, y2: 10 }));
    row.append(`layer ${layer}`, bar, norm.toPrecision(3));
    return [row];
  });
  element("norms").replaceChildren(...rows);
}

function busy(is) {
  for (const id of ["send", "new"]) element(id).disabled = is;
  element("now").disabled = is || !latest?.window.limit || !latest.window.tokens;
  element("stop").disabled = !is;
}

async function during(work) {
  busy(true);
  try {
    await polling;  // a session serves one request at a time
    await work();
    await refresh().catch((error) => error.status === 404 || show(error));
  } finally {
    busy(false);
  }
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("text").value;
  if (!text.trim()) return;
  element("text").value = "";
  during(() => answer(text));
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !element("send").disabled) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
element("sleep").addEventListener("submit", (event) => {
  event.preventDefault();
  const loops = element("loops").valueAsNumber;
  const body = JSON.stringify(Number.isNaN(loops) ? {} : { loops });
  during(() => request(`v1/sessions/${session}/sleep`, { method: "POST", body }).then(() => show(null), show));
});
element("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = element("key").value.trim();
  if (!/^[!-~]+$/.test(key)) return show(Object.assign(new Error("A key is ASCII without spaces."), { status: 401 }));
  element("key").value = "";
  connect();
});
element("stop").addEventListener("click", () => stopping?.abort());
element("new").addEventListener("click", () => {
  if (latest) request(`v1/sessions/${session}`, { method: "DELETE" }).catch(show);
  newSession();
});
setInterval(() => {
  if (!latest || document.hidden || element("send").disabled) return;
  polling ??= refresh().catch(() => {}).finally(() => (polling = null));  // a stream may sleep while idle
}, 3000);
addEventListener("pagehide", () => {
  const options = { method: "DELETE", keepalive: true };
  if (latest) request(`v1/sessions/${session}`, options).catch(() => {});
});
newSession();
connect();
