/** The page: it shows the items in pages, and adds, renames and deletes them. */

const LIMIT = 20; // items on one page
const PATIENCE = 30_000; // milliseconds to wait for a response
const PAUSES = [1, 2, 4, 8]; // seconds before a request is retried; the last one from then on
const FIELDS = { name: /./, order: /^newest$/, after: /^\d+$/, before: /^\d+$/ }; // of the address

const find = (selector, within = document) => within.querySelector(selector);
const byId = (...ids) => ids.map((id) => document.getElementById(id));
const [add, input, news, reveal, trouble] = byId("add", "name", "news", "reveal", "trouble");
const [list, heading, previous, next] = byId("list", "heading", "previous", "next");
const [search, prefix, order, empty] = byId("search", "prefix", "order", "empty");

let shown = new Map(); // the rows on this page, by the id of the item
let loading = new AbortController(); // stops loading a page when another is requested
let pending = recall(); // the item being added, and the key that adds it once
const troubled = new Set(); // requests that are being retried

const quote = (name) => `“\u2068${name ?? ""}\u2069”`; // isolated, whatever its direction
const format = (number) => number.toLocaleString("en");
const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

/** Why something failed, in words for the user; *facts* are status, invalid and stale. */
class Problem extends Error {
  constructor(message, facts) {
    super(message);
    Object.assign(this, facts);
  }
}

// Requests

/** Retry a request until it succeeds or is refused: return its JSON and headers, or throw a Problem. */
export async function call(method, path, { body, etag, key, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (etag) headers["If-Match"] = etag;
  if (key) headers["Idempotency-Key"] = key;
  const stopping = new AbortController();
  const ended = AbortSignal.any([stopping.signal, ...(signal ? [signal] : [])]);
  const waiting = { stop: () => stopping.abort(stopped(method)) };
  try {
    for (let repeats = 0; ; repeats++) {
      const request = { method, headers, body: JSON.stringify(body) };
      const { status, content, headers: received } = await attempt(path, request, ended);
      const isDone = status === 204 || (status < 300 && !content.error);
      if (isDone) return { content, headers: received };
      if (status === 404 && method === "DELETE" && repeats) return {}; // an earlier attempt did it
      if (!canRepeat(status, received, key)) throw refusal(status, content);
      waiting.message = content.error ?? content.title;
      await pause(waiting, PAUSES[Math.min(repeats, PAUSES.length - 1)], ended);
    }
  } finally {
    troubled.delete(waiting);
    showTrouble();
  }
}

/** Send a request once; no response counts as a 503. */
async function attempt(path, request, ended) {
  try {
    const signal = AbortSignal.any([ended, AbortSignal.timeout(PATIENCE)]);
    const response = await fetch(path, { ...request, signal });
    const { status, headers } = response;
    const isJSON = /\bjson\b/.test(headers.get("Content-Type"));
    // Something else may respond, such as a proxy or a login page.
    const other = { error: `the server responded ${status}, but not as this service does` };
    return { status, headers, content: isJSON ? await response.json() : other };
  } catch {
    ended.throwIfAborted();
    return { status: 503, content: { error: "the service does not respond" } };
  }
}

/** Whether a retry may succeed, and does no harm if the request has succeeded already. */
function canRepeat(status, headers, key) {
  if (status === 409) return key && headers.has("Retry-After"); // its first attempt still runs
  return [502, 503, 504].includes(status);
}

function refusal(status, { error, title, errors = [], id }) {
  const details = id ? ` The log has more under ${id}.` : "";
  return new Problem(sentence(error ?? title) + details, { status, invalid: errors.some(({ field }) => field === "name") });
}

function stopped(method) {
  if (method === "GET") return new Problem("The service does not respond.");
  return new Problem("The service has not confirmed this. It is safe to try again.");
}

/** Wait before a retry, and tell the user. */
function pause(waiting, seconds, ended) {
  return new Promise((resolve, reject) => {
    waiting.resume = resolve;
    setTimeout(resolve, seconds * 1000);
    ended.addEventListener("abort", () => reject(ended.reason));
    troubled.add(waiting);
    showTrouble();
  });
}

function showTrouble() {
  const messages = new Set([...troubled].map(({ message }) => sentence(message)));
  const text = troubled.size ? `${[...messages].join(" ")} Trying again…` : "";
  if (trouble.textContent !== text) trouble.textContent = text;
}

const resume = () => troubled.forEach((waiting) => waiting.resume());

/** A unique value; `randomUUID` exists on secure sites only. */
function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}

/** The item that was being added before the page was reloaded. */
function recall() {
  try {
    return JSON.parse(sessionStorage.getItem("pending")) ?? {};
  } catch {
    return {}; // the browser stores nothing
  }
}

/** Note the item being added; its key is lost with the page if the browser stores nothing. */
function remember(item) {
  pending = item;
  try {
    sessionStorage.setItem("pending", JSON.stringify(item));
  } catch {}
}

// Messages

/** Do *task*; show a failure at *place*. */
async function act(place, task) {
  place.ariaBusy = "true";
  announce("");
  tell(place, "");
  await task().catch((problem) => report(place, problem));
  place.ariaBusy = "false";
}

/** Do *task* with the input when *form* is submitted; a double click counts once. */
function onSubmit(form, place, task) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = find("input", place).value.trim();
    if (place.ariaBusy !== "true") act(place, () => task(typed));
  });
  form.addEventListener("input", (event) => {
    if (event.target.ariaInvalid === "true") tell(place, "");
  });
}

async function report(place, problem) {
  if (!(problem instanceof Problem)) reportError(problem);
  tell(place, problem.message, problem.invalid);
  if (!problem.stale) return;
  await load();
  if (!place.isConnected) tell(list, problem.message);
}

function tell(place, message, invalid = false) {
  const field = find("input", place);
  find("[role=alert]", place).textContent = message;
  field.ariaInvalid = String(invalid);
  if (invalid) moveFocus(place, field);
}

/** Say what has been done, instead of what was said before. */
function announce(message) {
  news.textContent = message;
  reveal.hidden = true;
}

/** Move the focus on, unless the user has taken it elsewhere in the meantime. */
function moveFocus(from, to) {
  const focused = document.activeElement;
  if (from.contains(focused) || focused === document.body) to.focus();
}

// The list, which follows the address

function address() {
  const given = new URLSearchParams(location.search);
  const entries = Object.entries(FIELDS).map(([name, pattern]) => {
    const value = given.get(name) ?? "";
    return [name, pattern.test(value) ? value : ""];
  });
  return Object.fromEntries(entries);
}

function encode(fields) {
  const entries = Object.entries(fields).filter(([, value]) => value !== "");
  return String(new URLSearchParams(entries));
}

/** Show another page, which these fields describe. */
function go(fields, change = "pushState") {
  const url = new URL(location);
  url.search = encode(fields);
  if (url.href !== location.href) history[change](null, "", url);
  return follow();
}

/** Show what the address says, also in the search form. */
function follow() {
  const { name, order: direction } = address();
  [prefix.value, order.value] = [name, direction];
  return load();
}

/** Show the page that the address names; a row that stays keeps its input. */
export async function load() {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  const fields = address();
  list.ariaBusy = "true";
  try {
    const page = await read(fields, signal);
    if (page.items.length === 0 && (fields.after || fields.before) && page.total.count) {
      const { name, order: direction, after, before } = fields; // the page has been deleted
      const edge = direction === "newest" ? Math.max(before - 1, 0) : Number(after) + 1;
      return await go(await pageBefore(name, direction, edge, signal), "replaceState");
    }
    tell(list, "");
    show(page, fields);
  } catch (problem) {
    if (!signal.aborted) await report(list, problem);
  } finally {
    if (!signal.aborted) list.ariaBusy = "false";
  }
}

/** Load a page, the number of items, and the number of items before the page. */
async function read(fields, signal) {
  const get = (path) => call("GET", path, { signal });
  const { name } = fields;
  const [{ content, headers }, { content: total }] = await Promise.all([
    get(`./?${encode({ limit: LIMIT, ...fields })}`),
    get(`./count?${encode({ name })}`),
  ]);
  const { items } = content;
  let position = { count: 0, exact: true };
  if (items.length && (fields.after || fields.before)) {
    const side = fields.order === "newest" ? "after" : "before";
    position = (await get(`./count?${encode({ name, [side]: items[0].id })}`)).content;
  }
  const isLast = !/\brel="?next\b/.test(headers.get("Link"));
  return { items, total, position, isLast };
}

/** The fields of the page that ends just before the item *id*. */
async function pageBefore(name, direction, id, signal) {
  const [opposite, beyond, key] =
    direction === "newest" ? ["", "after", "before"] : ["newest", "before", "after"];
  const query = encode({ limit: LIMIT + 1, name, order: opposite, [beyond]: id });
  const { items } = (await call("GET", `./?${query}`, { signal })).content;
  const fields = { name, order: direction };
  return items.length > LIMIT ? { ...fields, [key]: items.at(-1).id } : fields;
}

function show({ items, total, position, isLast }, { name }) {
  const focused = document.activeElement;
  const before = shown;
  shown = new Map(items.map(({ id }) => [id, before.get(id) ?? new Row(id)]));
  for (const { id, name } of items) shown.get(id).update(name);
  find("#rows").replaceChildren(...[...shown.values()].map((row) => row.element));
  heading.textContent = describe(total, position, items.length);
  previous.disabled = position.count === 0;
  next.disabled = isLast;
  find("#pages").hidden = previous.disabled && next.disabled;
  empty.hidden = items.length > 0;
  empty.textContent = name
    ? `No name begins with ${quote(name)}.`
    : "There is nothing here yet. Add the first item above.";
  (focused.isConnected ? focused : heading).focus({ preventScroll: true });
}

/** Which items are shown, of how many: “21–40 of 2,500”. */
function describe(total, position, length) {
  if (length === 0) return "No items";
  const [first, last] = [position.count + 1, position.count + length];
  const all = total.exact ? format(Math.max(total.count, last)) : `more than ${format(total.count)}`;
  if (!position.exact) return `${length} of ${all}`;
  return `${format(first)}${last > first ? `–${format(last)}` : ""} of ${all}`;
}

/** Show another page; the focus stays on *button* while it is enabled. */
function turn(button, other, fields) {
  act(list, async () => {
    await go(await fields());
    moveFocus(button, [button, other].find((place) => !place.disabled && !place.hidden) ?? heading);
  });
}

// Items

/** An item on the page, with its two forms. */
class Row {
  constructor(id) {
    this.path = `./${id}`;
    this.element = find("#row").content.firstElementChild.cloneNode(true);
    [this.view, this.input] = [".view", "input"].map((part) => find(part, this.element));
    find(".number", this.element).textContent = id;
    find("[role=alert]", this.element).id = `error-${id}`;
    this.input.setAttribute("aria-describedby", `error-${id}`);
    this.offer("rename", "Save again to overwrite.", (form, name) => this.rename(form, name));
    this.offer("delete", "Delete it anyway?", () => this.delete());
  }

  /** Let a button open its form, which does *task* or is cancelled. */
  offer(kind, advice, task) {
    const opener = find(`button.${kind}`, this.element);
    const form = find(`form.${kind}`, this.element);
    const toggle = (open) => {
      this.advice = advice;
      this.view.hidden = open;
      form.hidden = !open;
      this.input.value = this.name;
      tell(this.element, "");
      moveFocus(this.element, open ? find(".first", form) : opener);
      if (open) this.input.select();
    };
    opener.addEventListener("click", () => toggle(true));
    form.addEventListener("reset", () => toggle(false));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) form.reset();
    });
    onSubmit(form, this.element, (typed) => task(form, typed));
  }

  update(name) {
    if (this.view.hidden && name !== this.name) tell(this.element, this.changed(name));
    this.name = name;
    for (const place of this.element.querySelectorAll("bdi")) place.textContent = name;
  }

  changed(name) {
    return `Someone else changed this to ${quote(name)}. ${this.advice}`;
  }

  async rename(form, name) {
    const { content } = await this.change("PATCH", { body: { name }, key: newKey() });
    this.name = content.name;
    form.reset();
    this.update(content.name);
    announce(`Renamed to ${quote(content.name)}.`);
    load();
  }

  async delete() {
    await this.change("DELETE");
    const above = this.element.previousElementSibling;
    moveFocus(this.element, above ? find("button.delete", above) : heading);
    this.element.remove();
    announce(`Deleted ${quote(this.name)}.`);
    load();
  }

  /** Change the item, unless it is no longer what the user sees. */
  async change(method, options) {
    try {
      return await call(method, this.path, { ...options, etag: await this.etag() });
    } catch (problem) {
      if (problem.status === 412) await this.etag(); // which shows its current state
      if (problem.status !== 404) throw problem;
      throw new Problem(`${quote(this.name)} has already been deleted.`, { stale: true });
    }
  }

  async etag() {
    const { content, headers } = await call("GET", this.path);
    if (content.name === this.name) return headers.get("ETag");
    this.update(content.name);
    throw new Problem(this.changed(content.name));
  }
}

onSubmit(add, add, async (name) => {
  if (pending.name !== name) remember({ name, key: newKey() });
  const body = name ? { name } : undefined;
  const { content: item } = await call("POST", "./", { body, key: pending.key });
  remember({});
  if (input.value.trim() === name) input.value = "";
  moveFocus(add, input);
  const message = `Added ${quote(item.name)}, number ${item.id}.`;
  announce(message);
  load().then(() => {
    reveal.hidden = shown.has(item.id) || news.textContent !== message;
    reveal.onclick = () => turn(reveal, heading, () => pageOf(item.id));
  });
});

/** The fields of the page with the newest item, regardless of the search. */
function pageOf(id) {
  const { order: direction } = address();
  return direction === "newest" ? { order: direction } : pageBefore("", "", id + 1);
}

function following() {
  const { name, order: direction } = address();
  const key = direction === "newest" ? "before" : "after";
  return { name, order: direction, [key]: [...shown.keys()].at(-1) };
}

function preceding() {
  const { name, order: direction } = address();
  return pageBefore(name, direction, [...shown.keys()].at(0));
}

/** Show the first page of the search. */
function look() {
  const fields = { name: prefix.value.trim(), order: order.value };
  act(list, () => go(fields));
}

next.addEventListener("click", () => turn(next, previous, following));
previous.addEventListener("click", () => turn(previous, next, preceding));
find("#refresh").addEventListener("click", () => act(list, load));
search.addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
order.addEventListener("change", look);
prefix.addEventListener("input", () => {
  if (!prefix.value) look();
});
find("#again").addEventListener("click", resume);
find("#stop").addEventListener("click", () => {
  troubled.forEach((waiting) => waiting.stop());
  heading.focus({ preventScroll: true }); // the button is about to go
});
addEventListener("online", resume);
addEventListener("popstate", () => act(list, follow));
follow();
