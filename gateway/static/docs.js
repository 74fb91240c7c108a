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
    const options = schema.anyOf ?? schema.oneOf;
    if (options) return [...new Set(options.map((option) => this.typeName(option)))].filter((name) => name !== "null" || this.showsNull).join(" | ");
    if (schema.$ref) return "object";
    if (schema.type === "array") return `list of ${this.typeName(schema.items)}`;
    return schema.type ?? "any";
  }

  /** The objects that a schema can be: itself, or those that it names as alternatives. */
  options(schema) {
    const whole = this.resolve(schema);
    const options = whole?.anyOf ?? whole?.oneOf;
    if (!options) return whole?.type === "array" ? this.options(whole.items) : [whole];
    return options.flatMap((option) => this.options(option)).filter((option) => option?.properties);
  }

  /** What an event's data holds. */
  ofEvent(schema) {
    const data = this.resolve(schema)?.properties?.data;
    return (data?.anyOf?.at(-1) ?? data)?.contentSchema.anyOf[0];
  }

  /** Table rows of an object's fields; nested objects follow their field, indented. What may be left out may be null. */
  rows(schema, { depth = 0, isAnswer = false } = {}) {
    this.showsNull = isAnswer;
    const { properties = {}, required = [] } = this.resolve(schema) ?? {};
    return Object.entries(properties).flatMap(([name, field]) => {
      const inner = field.$ref ?? field.anyOf?.filter((option) => option.type !== "null").map((option) => option.$ref)[0];
      const preset = field.default != null && typeof field.default !== "object" ? `, default ${field.default}` : "";
      const row = element("tr", { class: depth ? "inner" : null },
        element("td", {},
          element("span", { class: "name" }, name),
          required.includes(name) && !isAnswer ? element("span", { class: "must", title: "required" }, " *") : null,
          element("span", { class: "type" }, this.typeName(field) + preset)),
        element("td", {}, ...prose(field.description ?? "")));
      return inner ? [row, ...this.rows({ $ref: inner }, { depth: depth + 1, isAnswer })] : [row];
    });
  }

  /** A body to start from: the examples of required fields and of a few others. */
  example(schema) {
    const { properties = {}, required = [], examples } = this.resolve(schema) ?? {};
    if (examples) return examples[0];
    const body = {};
    for (const [name, field] of Object.entries(properties)) {
      if (field.examples && (required.includes(name) || name === "max_new_tokens")) body[name] = field.examples[0];
      const inner = field.$ref ?? field.anyOf?.find((option) => option.$ref)?.$ref;
      if (inner && name === "parameters") body[name] = this.example({ $ref: inner });
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

/** What a part of a path is, until its field says something else: the page knows better with every answer. */
const known = { request_id: "", model: "" };

function learn(name, value) {
  if (!value) return;
  known[name] = value;
  for (const field of document.querySelectorAll(`input[data-part="${name}"]`)) field.placeholder = value;
}

class TryBox {
  constructor(method, path, example, makesRequest) {
    this.method = method;
    this.makesRequest = makesRequest;
    this.template = path;
    this.parts = [...path.matchAll(/{(\w+)}/g)].map(([, name]) => element("input", {
      "data-part": name, "aria-label": name, placeholder: name, autocomplete: "off", spellcheck: "false",
    }));
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
      element("h3", {}, "Try it"), ...this.parts, this.input,
      element("div", { class: "actions" }, this.sendButton, this.stopButton, this.copyButton, this.line),
      this.said, this.raw);
  }

  get path() {
    const value = (input) => input.value || known[input.dataset.part];
    return this.parts.reduce(
      (path, input) => path.replace(`{${input.dataset.part}}`, encodeURIComponent(value(input))), this.template);
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
      if (this.makesRequest) learn("request_id", response.headers.get("x-request-id"));
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

/** The fields of an object, or of each object that it can be. */
function fields(schemas, title, schema, isAnswer) {
  const options = schema ? schemas.options(schema) : [];
  return options.flatMap((option, index) => {
    const name = options.length > 1 ? `${index ? "or" : title}: ${option.title}` : title;
    return fieldTable(name, schemas.rows(option, { isAnswer }));
  });
}

function headerTable(parameters) {
  const rows = parameters.map(({ name, description, schema }) => element("tr", {},
    element("td", {}, element("span", { class: "name" }, name),
      element("span", { class: "type" }, schema.enum?.join(" | ") ?? schema.type)),
    element("td", {}, ...prose(description))));
  return fieldTable("Headers", rows);
}

function card(schemas, method, path, operation) {
  const body = operation.requestBody?.content["application/json"].schema;
  const content = operation.responses["200"].content ?? {};
  const plain = content["application/json"]?.schema;
  const stream = content["text/event-stream"]?.schema;
  const errors = Object.entries(operation.responses).filter(([status]) => status >= "400");
  const facts = element("div", {},
    element("p", {}, ...prose(operation.description)),
    ...fields(schemas, "Body", body),
    ...headerTable((operation.parameters ?? []).filter((parameter) => parameter.in === "header")),
    ...fields(schemas, plain?.type === "array" ? "Answer, a list of" : "Answer", plain, true),
    ...fields(schemas, "Each event's data", stream && schemas.ofEvent(stream), true),
    ...(errors.length ? [element("h3", {}, "Errors"), element("div", { class: "errors" }, element("ul", {},
      ...errors.map(([status, error]) => element("li", {}, element("code", {}, status), error.description))))] : []));
  const box = new TryBox(method.toUpperCase(), path, body && schemas.example(body), "links" in operation.responses["200"]);
  return element("details", { class: "route", id: anchor(method, path), open: path === "/generate_stream" },
    element("summary", {},
      element("span", { class: `verb ${method}` }, method.toUpperCase()),
      element("span", { class: "path" }, path),
      element("span", { class: "what" }, operation.summary)),
    element("div", { class: `content${body || plain || stream ? "" : " narrow"}` }, facts, box.node));
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
        $("nav").append(element("a", { href: `#${anchor(method, path)}` },
          element("span", { class: `verb ${method}` }, (method === "delete" ? "del" : method).toUpperCase()),
          element("span", {}, ...path.split(/(?=\/)/).flatMap((part) => [element("wbr"), part]))));
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
    learn("model", names[0]);
  } catch {
    $("health").textContent = "no answer";
    $("health").className = "health down";
  }
}

addEventListener("hashchange", openTarget);
draw(await (await fetch("/openapi.json")).json());
watch();
setInterval(watch, 5000);
