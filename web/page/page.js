/** The page for people: it shows the items in pages, and adds, renames and deletes them. */

const LIMIT = 20; // items on one page
const LONGEST = 16; // characters in a name, counted as the service counts them
const PATIENCE = 30_000; // milliseconds to wait for an answer

const find = (selector, within = document) => within.querySelector(selector);
const byId = (...ids) => ids.map((id) => document.getElementById(id));
const [add, input, news, reveal] = byId("add", "name", "news", "reveal");
const [list, heading, previous, next] = byId("list", "heading", "previous", "next");

let turn = Promise.resolve(); // ends when all that was asked for is done
let trail = [0]; // after which id each page begins that led here, this one last
let shown = new Map(); // the rows on this page, by the id of the item

const quote = (name) => `“\u2068${name ?? ""}\u2069”`; // isolated, whatever its direction
const changed = (name) => `Changed by somebody else meanwhile: now ${quote(name)}.`;

/** Why something was not done, in words for the user; *facts* are status, invalid and stale. */
class Problem extends Error {
  constructor(message, facts) {
    super(message);
    Object.assign(this, facts);
  }
}

/** Make one request: its JSON and its headers, or a Problem. */
async function call(method, path, body, etag) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (etag) headers["If-Match"] = etag;
  const signal = AbortSignal.timeout(PATIENCE);
  const request = { method, headers, body: JSON.stringify(body), signal };
  try {
    const response = await fetch(path, request);
    const content = response.status === 204 ? null : await response.json();
    if (response.ok) return { content, headers: response.headers };
    throw refusal(response.status, content, response.headers);
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw doubtful("The service does not answer.", method);
  }
}

function refusal(status, { error, id }, headers) {
  const unknown = headers.get("Commit-Outcome") === "unknown";
  if (unknown) return doubtful("The service could not finish.");
  const sentences = [`${error.charAt(0).toUpperCase()}${error.slice(1)}.`];
  if (id) sentences.push(`The log has more under ${id}.`);
  const wait = headers.get("Retry-After");
  if (/^\d+$/.test(wait)) sentences.push(`Try again in ${wait} s.`);
  return new Problem(sentences.join(" "), { status, invalid: status === 422 });
}

function doubtful(message, method) {
  if (method === "GET") return new Problem(message);
  return new Problem(`${message} It is not known whether the change was made.`, { stale: true });
}

function checked(name) {
  const { length } = [...name];
  if (length >= 1 && length <= LONGEST) return name;
  const message = `A name has 1 to ${LONGEST} characters, this one has ${length}.`;
  throw new Problem(message, { invalid: true });
}

/** Do *task* after all that was asked for before; what goes wrong is told at *place*. */
function act(place, task) {
  place.ariaBusy = "true";
  turn = turn.then(async () => {
    tell(place, "");
    await task().catch((problem) => report(place, problem));
    place.ariaBusy = "false";
  });
}

/** Do *task* with what is typed when *form* is submitted; a double click is one wish. */
function onSubmit(form, place, task) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = find("input", place).value;
    if (place.ariaBusy !== "true") act(place, () => task(typed));
  });
}

async function report(place, problem) {
  if (!(problem instanceof Problem)) reportError(problem);
  if (problem.stale) await load(trail).catch(() => {}); // then the list stays as it was
  announce("");
  tell(place.isConnected ? place : list, problem.message, problem.invalid);
}

function tell(place, message, invalid = false) {
  find("[role=alert]", place).textContent = message;
  if (place === list) return;
  find("input", place).ariaInvalid = String(invalid);
  if (invalid) moveFocus(place, find("input", place));
}

/** Move the focus on, unless the user has taken it elsewhere meanwhile. */
function moveFocus(from, to) {
  const focused = document.activeElement;
  if (from.contains(focused) || focused === document.body) to.focus();
}

/** Show the page that the last of *keys* begins, or the one before where it has become empty. */
async function load(keys) {
  const after = keys.at(-1) ? `&after=${keys.at(-1)}` : "";
  const { content, headers } = await call("GET", `./?limit=${LIMIT}${after}`);
  if (content.items.length === 0 && keys.length > 1) return load(keys.slice(0, -1));
  trail = keys;
  previous.disabled = keys.length === 1;
  next.disabled = !/\brel="?next\b/.test(headers.get("Link"));
  find("#pages").hidden = previous.disabled && next.disabled;
  show(content.items);
}

/** Say what has been done; what was said before is no more to be shown. */
function announce(message) {
  news.textContent = message;
  reveal.hidden = true;
}

/** Show *items*; a row that stays keeps its open form, what is typed in it, and the focus. */
function show(items) {
  const focused = document.activeElement;
  const before = shown;
  shown = new Map(items.map(({ id }) => [id, before.get(id) ?? new Row(id)]));
  for (const { id, name } of items) shown.get(id).update(name);
  find("#rows").replaceChildren(...[...shown.values()].map((row) => row.element));
  find("#empty").hidden = items.length > 0;
  (focused.isConnected ? focused : heading).focus({ preventScroll: true });
}

/** Show another page; the focus stays on *button* while it is of use there. */
function turnTo(keys, button, other = heading) {
  act(list, async () => {
    await load(keys());
    const ids = [...shown.keys()];
    announce(ids.length ? `Items ${ids.at(0)} to ${ids.at(-1)}.` : "");
    const places = [button, other, heading];
    moveFocus(button, places.find(({ disabled, hidden }) => !disabled && !hidden));
  });
}

const refresh = () => act(list, () => load(trail));

/** An item on the page, with its two forms. */
class Row {
  constructor(id) {
    this.path = `./${id}`;
    this.element = find("#row").content.firstElementChild.cloneNode(true);
    [this.view, this.input] = [".view", "input"].map((part) => find(part, this.element));
    find(".number", this.element).textContent = id;
    find("[role=alert]", this.element).id = `error-${id}`;
    this.input.setAttribute("aria-describedby", `error-${id}`);
    this.offer("rename", (form, typed) => this.rename(form, typed));
    this.offer("delete", () => this.delete());
  }

  /** Let a button open its form, which does *task* or is left as if it had not been opened. */
  offer(kind, task) {
    const opener = find(`button.${kind}`, this.element);
    const form = find(`form.${kind}`, this.element);
    const toggle = (open) => {
      this.view.hidden = open;
      form.hidden = !open;
      this.input.value = this.name;
      tell(this.element, "");
      moveFocus(this.element, open ? find(".first", form) : opener);
    };
    opener.addEventListener("click", () => toggle(true));
    form.addEventListener("reset", () => toggle(false));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) form.reset();
    });
    onSubmit(form, this.element, (typed) => task(form, typed));
  }

  update(name) {
    if (this.view.hidden && name !== this.name) tell(this.element, changed(name));
    this.name = name;
    for (const place of this.element.querySelectorAll("bdi")) place.textContent = name;
  }

  async rename(form, typed) {
    const name = checked(typed);
    await this.change("PUT", { name });
    form.reset();
    this.update(name);
    announce(`Renamed to ${quote(name)}.`);
  }

  async delete() {
    await this.change("DELETE");
    const above = this.element.previousElementSibling;
    moveFocus(this.element, above ? find("button.delete", above) : heading);
    this.element.remove();
    announce(`Deleted ${quote(this.name)}.`);
    refresh();
  }

  /** Change the item, but only while it still is what the user sees. */
  async change(method, body) {
    try {
      await call(method, this.path, body, await this.etag());
    } catch (problem) {
      if (problem.status === 412) await this.etag(); // which says what it has become
      if (problem.status !== 404) throw problem;
      const message = `${quote(this.name)} was deleted by somebody else meanwhile.`;
      throw new Problem(message, { stale: true });
    }
  }

  async etag() {
    const { content, headers } = await call("GET", this.path);
    if (content.name === this.name) return headers.get("ETag");
    this.update(content.name);
    throw new Problem(changed(content.name));
  }
}

onSubmit(add, add, async (typed) => {
  const name = typed && checked(typed);
  const { content: item } = await call("POST", "./", name ? { name } : undefined);
  if (input.value === typed) input.value = "";
  announce(`Added ${quote(item.name)}, number ${item.id}.`);
  act(list, async () => {
    await load(trail);
    reveal.hidden = shown.has(item.id);
    reveal.onclick = () => turnTo(() => [...trail, item.id - 1], reveal);
  });
});
const forward = () => [...trail, [...shown.keys()].at(-1)];
const back = () => trail.slice(0, -1);
next.addEventListener("click", () => turnTo(forward, next, previous));
previous.addEventListener("click", () => turnTo(back, previous, next));
find("#refresh").addEventListener("click", refresh);
refresh();
