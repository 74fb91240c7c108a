// Draws /openapi.json: a card for every route, with a box to try it. No library, nothing from elsewhere.

const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text, never markup. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const anchor = (method, path) => `${method}-${path.replace(/\W+/g, "-")}`;

/** `inline code` in descriptions. */
function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

class Schemas {
  constructor(document) {
    this.all = document.components.schemas;
  }

  resolve(schema) {
    return schema?.$ref ? this.all[schema.$ref.split("/").pop()] : schema;
  }

  typeName(schema) {
    if (!schema) return "";
    if (schema.$ref) return "object";
    if (schema.anyOf) return schema.anyOf.map((option) => this.typeName(option)).join(" | ");
    if (schema.type === "array") return `list of ${this.typeName(schema.items)}`;
    return (schema.type ?? "any") + (schema.nullable ? " | null" : "");
  }

  /** Table rows of an object's fields; nested objects follow their field, indented. */
  rows(schema, depth = 0) {
    const { properties = {}, required = [] } = this.resolve(schema) ?? {};
    return Object.entries(properties).flatMap(([name, field]) => {
      const inner = field.$ref ?? field.allOf?.[0]?.$ref;
      const preset = field.default != null && typeof field.default !== "object" ? `, default ${field.default}` : "";
      const row = element("tr", { class: depth ? "inner" : null },
        element("td", {},
          element("span", { class: "name" }, name),
          required.includes(name) ? element("span", { class: "must", title: "required" }, " *") : null,
          element("span", { class: "type" }, this.typeName(field) + preset)),
        element("td", {}, ...prose(field.description ?? "")));
      return inner ? [row, ...this.rows({ $ref: inner }, depth + 1)] : [row];
    });
  }

  /** A body to start from: the examples of required fields and of a few others. */
  example(schema) {
    const { properties = {}, required = [], examples } = this.resolve(schema) ?? {};
    if (examples) return examples[0];
    const body = {};
    for (const [name, field] of Object.entries(properties)) {
      if (field.examples && (required.includes(name) || name === "max_new_tokens")) body[name] = field.examples[0];
      if (field.$ref) body[name] = this.example(field);
    }
    return body;
  }
}

/** Reads server-sent events of a fetch response; yields the data of each. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5)).join("\n").trim();
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** The text for people in an answer or an event, in TGI's shape or OpenAI's. */
function textOf(data) {
  if (data?.token) return data.token.special ? "" : data.token.text;
  const choice = data?.choices?.[0];
  return data?.generated_text ?? choice?.text ?? choice?.message?.content ?? choice?.delta?.content ?? "";
}

class TryBox {
  constructor(method, path, example) {
    this.method = method;
    this.path = path;
    this.input = example && element("textarea", { spellcheck: "false", "aria-label": "Request body" });
    if (this.input) {
      this.input.value = JSON.stringify(example, null, 2);
      this.input.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.send();
      });
    }
    this.line = element("span", { class: "result-line", role: "status" });
    this.said = element("div", { class: "said" });
    this.raw = element("pre", {});
    this.sendButton = element("button", { class: "send", type: "button", onclick: () => this.send() }, "Send");
    this.stopButton = element("button", { type: "button", hidden: true, onclick: () => this.abort.abort() }, "Stop");
    this.copyButton = element("button", { type: "button", onclick: () => this.copy() }, "Copy as curl");
    this.node = element("div", {},
      element("h3", {}, "Try it"), this.input,
      element("div", { class: "actions" }, this.sendButton, this.stopButton, this.copyButton, this.line),
      this.said, this.raw);
  }

  headers() {
    const key = $("key").value;
    return {
      ...(this.input && { "content-type": "application/json" }),
      ...(key && { authorization: `Bearer ${key}` }),
    };
  }

  async send() {
    this.abort = new AbortController();
    this.said.textContent = this.raw.textContent = "";
    this.show("waiting");
    this.busy(true);
    const started = performance.now();
    const seconds = () => `${((performance.now() - started) / 1000).toFixed(2)} s`;
    try {
      const response = await fetch(this.path, {
        method: this.method, headers: this.headers(), body: this.input?.value, signal: this.abort.signal,
      });
      if (response.headers.get("content-type")?.startsWith("text/event-stream")) await this.follow(response, seconds);
      else await this.whole(response, seconds);
    } catch (error) {
      this.show(error.name === "AbortError" ? `stopped after ${seconds()}` : `no answer: ${error.message}`, error.name !== "AbortError");
    } finally {
      this.busy(false);
    }
  }

  async whole(response, seconds) {
    const text = await response.text();
    this.show(`${response.status} ${response.statusText}, ${seconds()}`, !response.ok);
    try {
      const body = JSON.parse(text);
      const answer = Array.isArray(body) ? body[0] : body;
      this.said.textContent = textOf(answer);
      this.raw.textContent = JSON.stringify(body, null, 2);
    } catch {
      this.raw.textContent = text || "(empty body)";
    }
  }

  async follow(response, seconds) {
    let count = 0;
    for await (const event of events(response)) {
      this.raw.textContent += `${JSON.stringify(event)}\n`;
      if (event.error) return this.show(event.error.message ?? `${event.error_type}: ${event.error}`, true);
      this.said.textContent += textOf(event);
      this.show(`${++count} events, ${seconds()}`);
    }
  }

  async copy() {
    const headers = Object.entries(this.headers()).map(([name, value]) => ` -H '${name}: ${value}'`).join("");
    const body = this.input ? ` -d '${this.input.value.replaceAll("'", "'\\''")}'` : "";
    await navigator.clipboard.writeText(`curl -N -X ${this.method} '${location.origin}${this.path}'${headers}${body}`);
    this.show("copied");
  }

  busy(isBusy) {
    this.sendButton.hidden = isBusy;
    this.stopButton.hidden = !isBusy;
  }

  show(text, isBad = false) {
    this.line.textContent = text;
    this.line.classList.toggle("bad", isBad);
  }
}

function fieldTable(title, rows) {
  return rows.length ? [element("h3", {}, title), element("table", { class: "fields" }, element("tbody", {}, ...rows))] : [];
}

function card(schemas, method, path, operation) {
  const body = operation.requestBody?.content["application/json"].schema;
  const content = operation.responses["200"].content ?? {};
  const plain = content["application/json"]?.schema;
  const stream = content["text/event-stream"]?.schema;
  const errors = Object.entries(operation.responses).filter(([status]) => status !== "200");
  const facts = element("div", {},
    element("p", {}, ...prose(operation.description)),
    ...fieldTable("Body", body ? schemas.rows(body) : []),
    ...fieldTable("Answer", plain ? schemas.rows(plain.items ?? plain) : []),
    ...fieldTable("Each event", stream ? schemas.rows(stream) : []),
    ...(errors.length ? [element("h3", {}, "Errors"), element("div", { class: "errors" }, element("ul", {},
      ...errors.map(([status, error]) => element("li", {}, element("code", {}, status), error.description))))] : []));
  const box = new TryBox(method.toUpperCase(), path, body && schemas.example(body));
  return element("details", { class: "route", id: anchor(method, path), open: path === "/generate_stream" },
    element("summary", {},
      element("span", { class: `verb ${method}` }, method.toUpperCase()),
      element("span", { class: "path" }, path),
      element("span", { class: "what" }, operation.summary)),
    element("div", { class: `content${body ? "" : " narrow"}` }, facts, box.node));
}

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target) target.open = true;
}

function draw(document) {
  const schemas = new Schemas(document);
  $("version").textContent = document.info.version;
  $("description").append(...prose(document.info.description));
  $("keybox").hidden = !document.components.securitySchemes;
  for (const { name } of document.tags) {
    $("nav").append(element("h2", {}, name));
    for (const [path, operations] of Object.entries(document.paths)) {
      for (const [method, operation] of Object.entries(operations)) {
        if (!operation.tags.includes(name)) continue;
        $("nav").append(element("a", { href: `#${anchor(method, path)}` }, path));
        $("routes").append(card(schemas, method, path, operation));
      }
    }
  }
  openTarget();
}

async function watch() {
  try {
    const [health, models] = await Promise.all([fetch("/health"), fetch("/v1/models")]);
    const names = (await models.json()).data.map((model) => model.id);
    $("health").textContent = health.ok ? "ready" : "no worker is ready";
    $("health").className = `health ${health.ok ? "ok" : "down"}`;
    $("models").textContent = names.join(", ");
  } catch {
    $("health").textContent = "no answer";
    $("health").className = "health down";
  }
}

addEventListener("hashchange", openTarget);
draw(await (await fetch("/openapi.json")).json());
watch();
setInterval(watch, 5000);
