/** The panel that `--demo` adds: the outcome of each session, and three ways to fail. */

import { call, load } from "./page.js";

const KEPT = 8;
let [lastKind, lastReads] = ["", 0];

const failures = {
  conflict: "Respond with 409",
  error: "Raise an error",
  commit: "Fail at COMMIT",
};

function make(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

const told = make("p", { role: "status" });
const outcomes = make("ol", { role: "list" });
const buttons = Object.entries(failures).map(([name, text]) => {
  const button = make("button", { type: "button" }, text);
  button.addEventListener("click", () => fail(name));
  return button;
});
const panel = make(
  "section",
  { id: "sessions" },
  make("h2", { id: "sessions-heading" }, "Sessions"),
  make("p", {}, "The outcome of each request’s session. These buttons add an item, then fail:"),
  make("div", { className: "buttons" }, ...buttons),
  told,
  outcomes,
);
panel.setAttribute("aria-labelledby", "sessions-heading");
document.getElementById("list").before(make("div", { className: "beside" }, panel));

/** Make a request that adds an item and fails, and show that the item is not there. */
async function fail(name) {
  const count = async () => (await call("GET", "./count")).content.count;
  const before = await count();
  const response = await fetch(`./demo/${name}`, { method: "POST" }).catch(() => null);
  if (!response) return void (told.textContent = "The service does not respond.");
  const after = await count();
  const list = before === after ? `the list still has ${after}` : `the list has ${after} now`;
  const items = after === 1 ? "item" : "items";
  told.textContent = `${response.status} ${response.statusText}: ROLLBACK, ${list} ${items}.`;
  load();
}

/** Show an outcome; consecutive reads share a line. */
function show({ method, path, status, action, ms, attempts }) {
  const kind = `${method} ${action}`;
  const reads = method === "GET" && lastKind === kind ? lastReads + 1 : 1;
  if (reads > 1) outcomes.firstChild.remove();
  [lastKind, lastReads] = [kind, reads];
  const rest = `${ms} ms, ${attempts} ${attempts === 1 ? "attempt" : "attempts"}`;
  const line = make(
    "li",
    { className: method === "GET" ? "read" : "change" },
    make("span", { className: "request" }, `${method} ${path}${reads > 1 ? ` (${reads} reads)` : ""}`),
    make("span", { className: `action ${action}` }, action.toUpperCase()),
    make("span", { className: "rest" }, `${status.slice(0, 3)}, ${rest}`),
  );
  outcomes.prepend(line);
  while (outcomes.children.length > KEPT) outcomes.lastChild.remove();
}

const source = new EventSource("./demo/outcomes");
source.addEventListener("message", ({ data }) => show(JSON.parse(data)));
