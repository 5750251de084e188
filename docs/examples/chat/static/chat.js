// The chat. The connection is the client's work: it comes back after a loss, recovers what was missed, keeps what could
// not be sent yet and has it handled once. What is left for a page is here, in this order: what is known, what comes
// from the server, what one does, and the drawing.
//
// What is shown is also kept in the tab's storage, and a message has an id of its own. So neither a reload nor a server
// that has forgotten everything takes a message away, and none is shown twice.
// Whatever came from a person goes into the page as text, never as markup.

import { connect } from "/rt/starlette-rt.js";
import { $, closeDrawer, dress, el, face, fit, narrow, reading, reconcile, setText } from "./page.js";

// ---------------------------------------------------------------------------------------------- what is known

const LOBBY = "lobby";
const SHOWN = 300; // items per group that stay on the page
const KEPT = 100; // messages per group that survive a reload
const FOLLOWS = 5 * 60_000; // within this time messages of one person share a heading
const SETTLE = 12_000; // after a loss all come back, each in their time; only then is said who came or left
const SLOW = 600; // after this time an unanswered message says that it waits

let rt = null; // the connection
let me = null; // {name, key}
let active = LOBBY;
let broken = null; // {reason, until} from the loss of the connection until it is back
let refused = ""; // what the server has against our name
const groups = new Map(); // name -> what is known of it, in the order of the list

const display = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("-", " ");
const nameOf = (where, key) => where.group.presence.get(key)?.metas[0]?.name ?? "Somebody";
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2);
const seen = () => document.visibilityState === "visible";
const rememberGroups = () => sessionStorage.setItem("groups", JSON.stringify([...groups.keys()]));

function enter(name) {
  const kept = JSON.parse(sessionStorage.getItem(`said ${name}`));
  const where = {
    name,
    said: kept?.said ?? [], // messages and quiet lines, in the order in which the server said them
    waiting: kept?.waiting ?? [], // our own that the server has not said yet, in the order of writing
    told: Boolean(kept), // what comes now is new and not the history
    here: null, // key -> name, as last told in quiet lines
    settled: 0, // when quiet lines may be told again
    unread: 0,
    fresh: 0, // messages below what is in sight
    draft: "",
  };
  groups.set(name, where);
  rememberGroups();
  if (!rt.pending) for (const item of where.waiting) item.problem ??= "Perhaps not sent.";
  where.group = rt.join(name, { last: 50, presence: "members" });
  where.group.track({}).catch(() => {}); // the server says as whom; onLeft says if it does not want us
  where.group.onPresence(() => onPresence(where));
  where.group.onRecover(({ snapshot }) => snapshot?.forEach((message) => take(where, message)));
  where.group.onLeft(() => hint(`The server does not have you in ${display(name)}.`, "problem"));
  where.typing = where.group.typing();
  where.typing.onChange(drawTyping);
}

// Once per turn, however much has come: keep it, and draw what has changed.
const changed = new Set();
function change(where) {
  if (!changed.size) queueMicrotask(redraw);
  changed.add(where);
}

function redraw() {
  for (const where of changed) {
    if (groups.get(where.name) !== where) continue;
    where.said.splice(0, where.said.length - SHOWN);
    const said = where.said.filter((item) => !item.note).slice(-KEPT);
    sessionStorage.setItem(`said ${where.name}`, JSON.stringify({ said, waiting: where.waiting }));
  }
  changed.clear();
  if (me) draw();
}

// ------------------------------------------------------------------------------------- what comes from the server

// A message is known by its own id: it may be in the history, in a snapshot, and be said once more after a restart.
function take(where, message) {
  if (where.said.some((item) => item.id === message.id && item.from === message.from)) return;
  const ours = where.waiting.find((item) => item.id === message.id && item.from === message.from);
  if (ours) where.waiting.splice(where.waiting.indexOf(ours), 1);
  where.said.push(Object.assign(ours ?? {}, message));
  if (!ours && where.told) {
    where.fresh += 1;
    if (where.name !== active || !seen()) where.unread += 1;
  }
  change(where);
}

function onPresence(where) {
  where.told = true; // who is here is told behind the history
  notice(where);
  if (where.name !== active) return;
  drawPeople();
  drawTyping();
  drawEmpty();
}

// A quiet line for who came or left since the last look. A group too big to be told by name has none.
function notice(where) {
  const { presence, count } = where.group;
  const wait = where.settled - Date.now();
  clearTimeout(where.timer);
  if (where.here && wait > 0) {
    where.timer = setTimeout(notice, wait, where);
    return;
  }
  const others = [...presence.keys()].filter((key) => key !== me?.key);
  const here = count > presence.size ? null : new Map(others.map((key) => [key, nameOf(where, key)]));
  const note = (text) => where.said.push({ note: text, at: Date.now() });
  if (here && where.here) {
    for (const [key, name] of here) if (!where.here.has(key)) note(`${name} joined`);
    for (const [key, name] of where.here) if (!here.has(key)) note(`${name} left`);
    change(where);
  }
  where.here = here;
}

function onState(state, { reason, retryIn }) {
  if (state === "open") {
    for (const where of groups.values()) if (broken) where.settled = Date.now() + SETTLE;
    broken = null;
  } else if (state !== "connecting") {
    broken = { reason, until: Date.now() + (retryIn ?? 0) };
  }
  if (refused) logout(refused);
  else drawState();
}

async function token() {
  const response = await fetch(`/login/${encodeURIComponent(me.name)}`, { method: "POST", signal: AbortSignal.timeout(8000) });
  const answer = await response.text();
  if (response.ok) return answer;
  if (response.status < 500) refused = answer;
  throw Object.assign(new Error(answer), { fatal: Boolean(refused) });
}

// Also of what was written before a reload, whose promise is gone.
function onError(error) {
  if (error.code === "closed") return; // the client keeps it
  for (const where of groups.values()) {
    const item = where.waiting.find(({ ticket }) => ticket === error.id);
    if (!item) continue;
    item.problem = `Not sent: ${error.message}.`;
    return change(where);
  }
  if (!error.event) hint(error.message, "problem");
}

// ------------------------------------------------------------------------------------------------- what one does

function login(name) {
  me = { name, key: name.toLowerCase() };
  broken = null;
  refused = "";
  sessionStorage.setItem("name", name);
  rt = connect("/ws", { token, storage: localStorage });
  rt.onState(onState);
  rt.onError(onError);
  rt.onLatency((ms) => setText($("latency"), `${Math.max(1, Math.round(ms))} ms`));
  rt.on("said", (message, { group }) => groups.has(group) && take(groups.get(group), message));
  for (const group of JSON.parse(sessionStorage.getItem("groups")) ?? [LOBBY, "design", "engineering"]) enter(group);
  $("welcome").hidden = true;
  $("app").hidden = false;
  $("you-name").textContent = name;
  dress($("you-initials"), me.key, name);
  show(LOBBY);
  drawState();
}

function logout(problem = "") {
  if (!problem && rt?.pending && !confirm("Not all that you wrote has been sent. Leave all the same?")) return;
  rt?.close();
  rt = me = null;
  groups.clear();
  sessionStorage.clear(); // whoever comes next in this tab is somebody else
  closeDrawer();
  $("app").hidden = true;
  $("welcome").hidden = false;
  $("login-error").textContent = problem;
  document.title = "Parlour";
  $("name").focus();
}

function leave(where) {
  where.group.leave();
  groups.delete(where.name);
  rememberGroups();
  sessionStorage.removeItem(`said ${where.name}`);
  show(LOBBY);
}

function show(name) {
  const before = groups.get(active);
  before?.typing.stop();
  if (before) before.draft = $("text").value;
  active = name;
  $("text").value = groups.get(name).draft;
  $("text").placeholder = `Write to ${display(name)}`;
  $("title").textContent = display(name);
  $("leave").hidden = name === LOBBY;
  hint();
  closeDrawer();
  draw({ jump: true });
  drawPeople();
  drawTyping();
  fit($("text"));
}

function say(where, item) {
  delete item.problem;
  change(where);
  if (rt.state === "closed") return void (item.problem = "Not sent: the connection has ended.");
  item.ticket = newId(); // of this attempt: the server remembers refusals too
  const sent = where.group.emit("say", { id: item.id, text: item.text }, { id: item.ticket });
  sent.then(({ at }) => where.waiting.includes(item) && take(where, { ...item, at }), onError);
}

function submit(event) {
  event?.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  const where = groups.get(active);
  const item = { id: newId(), from: me.key, name: me.name, text, at: Date.now() };
  where.waiting.push(item);
  where.typing.stop();
  say(where, item);
  $("text").value = "";
  hint();
  fit($("text"));
  draw({ jump: true });
}

function submitGroup(event) {
  event.preventDefault();
  const name = $("group").value.trim().toLowerCase().replace(/\s+/g, "-");
  const fits = /^[\p{L}\p{N}_][\p{L}\p{N}_-]{0,39}$/u.test(name);
  const full = groups.size >= 12 && !groups.has(name);
  $("group-error").textContent = !fits ? "Letters, digits and dashes, please." : full ? "Twelve groups are enough; leave one first." : "";
  if (!fits || full) return;
  $("group").value = "";
  if (!groups.has(name)) enter(name);
  show(name);
  $("text").focus();
}

// --------------------------------------------------------------------------------------------------- the drawing

const clock = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const calendar = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });
const dayOf = (item) => new Date(item.at).toDateString();

function draw({ jump = false } = {}) {
  const where = groups.get(active);
  const wanted = [];
  let before = null;
  for (const item of [...where.said, ...where.waiting]) {
    if (!before || dayOf(before) !== dayOf(item)) {
      wanted.push(dayElement(dayOf(item), item));
      before = null;
    }
    wanted.push(elementOf(item, before, where.waiting.includes(item)));
    before = item;
  }
  $("log").setAttribute("aria-busy", String(jump)); // another group is not read out
  reconcile($("log"), wanted);
  reading.atEnd ||= jump;
  reading.stay();
  drawEmpty();
  drawGroups();
  drawNewer();
  tick();
}

const days = new Map();
function dayElement(day, { at }) {
  if (!days.has(day)) days.set(day, el("p", "day"));
  setText(days.get(day), day === new Date().toDateString() ? "Today" : calendar.format(at));
  return days.get(day);
}

// Each item keeps its element, so that a screen reader hears only what is new.
const elements = new WeakMap();
function elementOf(item, before, waiting) {
  if (!elements.has(item)) elements.set(item, item.note ? el("p", "note", item.note) : messageElement(item));
  const element = elements.get(item);
  if (item.note) return element;
  const near = before && !before.note && before.from === item.from && Math.abs(item.at - before.at) < FOLLOWS;
  const failed = Boolean(waiting && item.problem);
  const states = { own: item.from === me.key, follows: Boolean(near), pending: waiting && !failed, failed };
  for (const [name, on] of Object.entries(states)) element.classList.toggle(name, on);
  const [time, waits, trouble] = element.querySelectorAll("time, .waits, .trouble");
  setText(time, clock.format(item.at));
  time.dateTime = new Date(item.at).toISOString();
  if (!states.pending) setText(waits, "");
  trouble.hidden = !failed;
  setText(trouble.firstChild, item.problem ?? "");
  return element;
}

function messageElement(item) {
  const again = el("button", "", "Send again");
  again.type = "button";
  again.onclick = () => say(groups.get(active), item);
  const body = el("div", "body", el("p", "said", item.text), el("p", "waits"), el("p", "trouble", el("span"), again));
  return el("article", "message", face(item.from, item.name), el("p", "byline", el("strong", "", item.name), el("time")), body);
}

function drawEmpty() {
  const { name, said, waiting, told } = groups.get(active);
  $("empty").hidden = said.length + waiting.length > 0;
  const title = told ? `Nothing said in ${display(name)} yet` : `Entering ${display(name)} …`;
  $("empty").replaceChildren(el("strong", "", title), told ? "Yours could be the first word." : "");
}

function drawNewer() {
  const where = groups.get(active);
  if (reading.atEnd) where.fresh = 0;
  $("newer").hidden = where.fresh === 0;
  setText($("newer"), where.fresh === 1 ? "1 new message ↓" : `${where.fresh} new messages ↓`);
}

function drawGroups() {
  if (seen()) groups.get(active).unread = 0;
  $("groups").replaceChildren(...[...groups.values()].map(groupElement));
  const unread = [...groups.values()].reduce((sum, where) => sum + where.unread, 0);
  $("elsewhere").hidden = unread === groups.get(active).unread;
  $("show-rail").setAttribute("aria-label", `Show the groups${$("elsewhere").hidden ? "" : "; there are unread messages"}`);
  document.title = `${unread ? `(${unread}) ` : ""}${display(active)} · Parlour`;
}

function groupElement({ name, unread }) {
  const shown = name === active ? 0 : unread;
  const button = el("button", shown ? "unread" : "", el("span", "name", display(name)));
  button.type = "button";
  button.dataset.group = name;
  if (name === active) button.setAttribute("aria-current", "true");
  if (shown) button.append(el("span", "badge", shown > 99 ? "99+" : String(shown)), el("span", "unseen", " unread"));
  return el("li", "", button);
}

function drawPeople() {
  const where = groups.get(active);
  const { presence, count } = where.group;
  const people = [...presence].map(([key, { metas }]) => ({ key, name: nameOf(where, key), windows: metas.length }));
  people.sort((one, two) => (two.key === me.key) - (one.key === me.key) || one.name.localeCompare(two.name));
  $("persons").replaceChildren(...people.map(personElement));
  $("faces").replaceChildren(...people.slice(0, 3).map(({ key, name }) => face(key, name)));
  setText($("count"), String(count || ""));
  setText($("gathered"), count ? `${count} here` : "People");
  $("show-people").setAttribute("aria-label", `${count === 1 ? "1 person" : `${count ?? 0} people`} here; show who`);
  const uncounted = count > people.length; // a big group is told by its number alone
  $("alone").hidden = !(uncounted || (people.length === 1 && presence.has(me.key)));
  setText($("alone"), uncounted ? "Too many to name them all." : "Only you so far. Open this page in another window and choose a second name.");
}

function personElement({ key, name, windows }) {
  const label = key === me.key ? "you" : windows > 1 ? `${windows} windows` : "";
  const element = el("li", "", face(key, name), el("span", "name", name));
  element.dataset.person = key;
  if (label) element.append(el("small", "", label));
  return element;
}

function drawTyping() {
  const where = groups.get(active);
  const names = [...where.typing.who.keys()].filter((key) => key !== me?.key).map((key) => nameOf(where, key));
  const who = names.length > 2 ? `${names.length} people are` : `${names.join(" and ")} ${names.length > 1 ? "are" : "is"}`;
  $("typing").hidden = !names.length;
  if (names.length) setText($("typing").firstElementChild, `${who} typing`);
}

const STATES = { open: "Connected", connecting: "Connecting …", waiting: "Reconnecting …", offline: "Offline", closed: "Disconnected" };

function drawState() {
  const state = broken && rt.state === "connecting" ? "waiting" : rt.state;
  $("app").dataset.state = $("state").dataset.state = state;
  for (const id of ["state", "spoken"]) setText($(id), STATES[state]);
  $("lost").hidden = !broken;
  $("retry").hidden = rt.state === "connecting";
  tick();
}

// What changes by itself: the time until the next attempt, and what is said beneath a message that waits.
function tick() {
  if (!me) return;
  const rest = Math.ceil(((broken?.until ?? 0) - Date.now()) / 1000);
  const again = rt.state === "waiting" && rest > 1 ? `Trying again in ${rest} s.` : "Trying again …";
  if (rt.state === "closed") setText($("lost-text"), `The server has ended this connection: ${broken?.reason}.`);
  else setText($("lost-text"), rt.state === "offline" ? "You are offline." : `Connection lost. ${again}`);
  for (const item of groups.get(active).waiting) {
    const late = rt.state === "open" && Date.now() - item.at > SLOW ? "Slow down a little; this waits its turn" : "";
    const waits = item.problem ? null : elements.get(item)?.querySelector(".waits");
    if (waits) setText(waits, broken ? "Waits for the connection" : late);
  }
}
setInterval(tick, 300);

function hint(text = "", kind = "") {
  const left = $("text").maxLength - $("text").value.length;
  $("hint").dataset.kind = kind;
  setText($("hint"), text || (left < 200 ? `${left} characters left` : ""));
}

// ------------------------------------------------------------------------------------------------ keys and buttons

$("login").onsubmit = (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  if (name) login(name);
  $("text").focus();
};
$("say").onsubmit = submit;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
};
$("text").oninput = () => {
  const { typing } = groups.get(active);
  if ($("text").value.trim()) typing.start();
  else typing.stop();
  hint();
  fit($("text"));
};
$("enter").onsubmit = submitGroup;
$("groups").onclick = (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  show(button.dataset.group);
  if (!narrow.rail.matches) $("text").focus();
};
$("leave").onclick = () => leave(groups.get(active));
$("logout").onclick = () => logout();
$("retry").onclick = () => rt.reconnect();
$("newer").onclick = () => draw({ jump: true });
$("scroll").addEventListener("scroll", () => me && drawNewer());
document.addEventListener("visibilitychange", () => me && drawGroups());
addEventListener("keydown", (event) => {
  const by = { ArrowUp: -1, ArrowDown: 1 }[event.altKey && me ? event.key : ""];
  if (!by) return;
  event.preventDefault();
  const names = [...groups.keys()];
  show(names.at((names.indexOf(active) + by) % names.length));
  $("text").focus();
});

if (sessionStorage.getItem("name")) login(sessionStorage.getItem("name"));
else logout();
