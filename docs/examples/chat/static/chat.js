// The page of the demonstration, on the plain protocol: any WebSocket client could do the same.
//
// Three parts, in this order: what is known (groups, messages, people), the link to the server (a token, a socket,
// and coming back after a loss), and the drawing. Drawing reads what is known and never the other way round.
// Whatever came from a person goes into the page as text, never as markup.

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------------- what is known

const LOBBY = "lobby"; // the server joins everybody to it
const KEPT = 300; // items per group that stay on the page
const FOLLOWS = 5 * 60_000; // within this time messages of one person share a heading
const ANSWER = 6_000; // after this time an unanswered message counts as not sent
const LAST = Number.MAX_SAFE_INTEGER; // the place of what is on its way: after everything that was said

let me = null; // {key, name}
let active = LOBBY;
let limitedUntil = 0;
const groups = new Map(); // name -> group, in the order of the list

function group(name) {
  if (!groups.has(name)) {
    groups.set(name, { name, items: [], people: new Map(), version: 0, count: 0, unread: 0, draft: "", entered: false });
  }
  return groups.get(name);
}

const display = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("-", " ");
const nameOf = (metas) => metas[0]?.name ?? "Somebody";
const others = (count) => (count === 1 ? "1 person" : `${count} people`);

function add(where, item) {
  where.items.push(item);
  if (where.items.length > KEPT + 100) where.items.splice(0, 100);
}

// A quiet line takes the time of what stands before it, so that sorting by the server's clock leaves it there.
function note(where, text) {
  add(where, { kind: "note", text, at: settled(where), sentAt: Date.now() });
  where.items.sort(byTime);
  if (where.name === active) draw();
}

const byTime = (one, two) => one.at - two.at;
const settled = (where) => Math.max(0, ...where.items.filter((item) => item.at !== LAST).map((item) => item.at));

// One message, new or known: our own comes back with the id that we gave it.
function take(message) {
  const where = group(message.group);
  const known = where.items.find((item) => item.id === message.id && item.from === message.from);
  if (known) {
    clearTimeout(known.timer);
    Object.assign(known, message, { status: "sent" });
  } else {
    add(where, { kind: "message", status: "sent", ...message });
  }
  where.items.sort(byTime);
  return !known;
}

const seen = () => document.visibilityState === "visible";

function onMessage(message) {
  const where = groups.get(message.group);
  if (!where) return; // said before the server heard that we left
  if (take(message) && message.from !== me.key && (where.name !== active || !seen())) where.unread += 1;
  drawGroups();
  if (where.name === active) draw({ fresh: true });
}

function onRecent({ group: name, messages }) {
  const where = groups.get(name);
  if (!where) return;
  const first = !where.entered;
  where.entered = true;
  const fresh = messages.filter((message) => take(message) && message.from !== me.key).length;
  if (!first && name !== active) where.unread += fresh;
  drawGroups();
  if (name === active) draw({ jump: first });
}

function onPresence(frame) {
  const where = groups.get(frame.group);
  if (!where) return;
  if (frame.type === "presence_count") {
    where.people.clear();
    where.count = frame.count;
  } else if (frame.type === "presence_state") {
    onState(where, frame);
  } else if (frame.version > where.version) {
    onDiff(where, frame);
  }
  if (where.name === active) drawPeople();
}

// A state replaces what was known; where a group is too big for one, a count follows.
function onState(where, { version, members }) {
  where.people.clear();
  where.version = version;
  for (const [key, { metas }] of Object.entries(members)) where.people.set(key, metas);
  where.count = where.people.size;
}

// A diff speaks of metas, one per window; a person comes with the first and goes with the last.
function onDiff(where, { version, joins, leaves }) {
  where.version = version;
  for (const [key, { metas, reason }] of Object.entries(leaves)) {
    const gone = new Set(metas.map((meta) => meta.ref));
    const before = where.people.get(key) ?? [];
    const left = before.filter((meta) => !gone.has(meta.ref));
    if (left.length) where.people.set(key, left);
    else if (where.people.delete(key) && !joins[key] && key !== me.key) {
      note(where, `${nameOf(before)} ${reason === "node_lost" ? "lost the connection" : "left"}`);
    }
  }
  for (const [key, { metas }] of Object.entries(joins)) {
    const before = where.people.get(key);
    const refs = new Set(metas.map((meta) => meta.ref));
    where.people.set(key, [...(before ?? []).filter((meta) => !refs.has(meta.ref)), ...metas]);
    if (!before && !leaves[key] && key !== me.key) note(where, `${nameOf(metas)} joined`);
  }
  where.count = where.people.size;
}

// The plain protocol has no acknowledgements: a refusal concerns the last message that is still unanswered.
function onError({ code, message, retry_after_ms: wait }) {
  const pending = [...groups.values()].flatMap((where) => where.items).filter((item) => item.status === "pending");
  const item = pending.sort((one, two) => one.sentAt - two.sentAt).at(-1);
  const limited = code === "rate_limited";
  if (limited) limitedUntil = Math.max(limitedUntil, performance.now() + (wait ?? 1000));
  if (item) fail(item, limited ? "" : message);
  if (limited) setText($("spoken"), `Slow down, again in ${seconds(limitedUntil - performance.now())} s`);
  else if (!item) hint(message, "problem");
  tick();
}

function fail(item, why) {
  clearTimeout(item.timer);
  const where = [...groups.values()].find((one) => one.items.includes(item));
  if (!where) return;
  Object.assign(item, { status: "failed", why, at: settled(where) });
  where.items.sort(byTime);
  draw();
}

// ------------------------------------------------------------------------------------------------------ the link

const BASE = 500; // milliseconds; doubles with each attempt
const CEILING = 20_000;
const STEADY = 5_000; // a connection that lasted this long starts the count of attempts anew

const link = { socket: null, state: "closed", attempt: 0, until: 0, timer: null, steady: null, reason: "" };

// Full jitter: anywhere between now and the ceiling of this attempt, so that a thousand pages do not come back at once.
const backoff = (attempt) => Math.random() * Math.min(CEILING, BASE * 2 ** attempt);

async function connect() {
  clearTimeout(link.timer);
  setState("connecting");
  const name = me.name;
  try {
    const response = await fetch(`/login/${encodeURIComponent(name)}`, { method: "POST", signal: AbortSignal.timeout(8000) });
    const answer = await response.text();
    if (me?.name !== name || link.state !== "connecting") return;
    if (response.status >= 400 && response.status < 500) return logout(answer);
    if (!response.ok) throw new Error(answer);
    open(answer);
  } catch {
    if (me?.name === name && link.state === "connecting") retryLater();
  }
}

function open(token) {
  const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`;
  const socket = new WebSocket(url, ["rt.plain", `rt.token.${token}`]);
  link.socket = socket;
  socket.onopen = () => {
    link.steady = setTimeout(() => (link.attempt = 0), STEADY);
    setState("open");
    const again = [...groups.keys()].filter((name) => name !== LOBBY);
    if (again.length) send({ kind: "enter", groups: again });
  };
  socket.onmessage = (event) => receive(JSON.parse(event.data));
  socket.onclose = (event) => socket === link.socket && lost(event);
}

function receive(frame) {
  if (frame.type?.startsWith("presence_")) onPresence(frame);
  else if (frame.type === "error") onError(frame);
  else if (frame.event === "recent") onRecent(frame.data);
  else if (frame.group) onMessage(frame);
}

const send = (data) => link.socket.send(JSON.stringify(data));

// Codes from 4500 to 4999 say "do not come back"; after every other loss we return.
function lost({ code, reason }) {
  clearTimeout(link.steady);
  for (const where of groups.values()) {
    for (const item of where.items) if (item.status === "pending") fail(item, "The connection was lost.");
  }
  if (code >= 4500 && code <= 4999) {
    link.reason = reason || "closed by the server";
    setState("ended");
  } else {
    retryLater();
  }
}

function retryLater() {
  const delay = backoff(link.attempt++);
  link.until = performance.now() + delay;
  link.timer = setTimeout(connect, delay);
  setState("lost");
}

function disconnect() {
  const socket = link.socket;
  clearTimeout(link.timer);
  clearTimeout(link.steady);
  link.socket = null;
  link.attempt = 0;
  socket?.close();
  setState("closed");
}

function setState(state) {
  link.state = state;
  drawState();
  tick();
}

const waiting = () => me && (link.state === "lost" || link.state === "ended");
addEventListener("online", () => waiting() && connect());
addEventListener("offline", () => {
  const socket = link.socket;
  if (link.state !== "open") return;
  link.socket = null; // its farewell would come minutes later
  socket.close();
  lost({ code: 1006 });
});

// ------------------------------------------------------------------------------------------------- what one does

function login(name) {
  me = { name, key: name.toLowerCase() };
  groups.clear();
  for (const known of remembered()) group(known);
  sessionStorage.setItem("name", name);
  $("welcome").hidden = true;
  $("app").hidden = false;
  $("you-name").textContent = name;
  dress($("you-initials"), me.key, name);
  show(LOBBY);
  connect();
}

function logout(problem = "") {
  disconnect();
  me = null;
  groups.clear();
  sessionStorage.removeItem("name");
  closeDrawer();
  $("app").hidden = true;
  $("welcome").hidden = false;
  $("login-error").textContent = problem;
  document.title = "Parlour";
  $("name").focus();
}

const remembered = () => JSON.parse(sessionStorage.getItem("groups") ?? "null") ?? [LOBBY, "design", "engineering"];
const remember = () => sessionStorage.setItem("groups", JSON.stringify([...groups.keys()]));

function enter(name) {
  if (!groups.has(name)) {
    group(name);
    remember();
    if (link.state === "open") send({ kind: "enter", groups: [name] });
  }
  show(name);
}

function leave(name) {
  if (link.state === "open") send({ kind: "leave", group: name });
  groups.delete(name);
  remember();
  show(LOBBY);
}

function show(name) {
  if (groups.has(active)) group(active).draft = $("text").value;
  active = name;
  group(name).unread = 0;
  $("text").value = group(name).draft;
  $("text").placeholder = `Write to ${display(name)}`;
  $("title").textContent = display(name);
  $("leave").hidden = name === LOBBY;
  hint();
  closeDrawer();
  draw({ jump: true });
  drawGroups();
  drawPeople();
  fit();
}

function say(text, where = active) {
  const now = Date.now();
  const item = { kind: "message", id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, from: me.key, name: me.name, text };
  add(group(where), item);
  post(item, where);
  draw({ jump: true });
}

function post(item, where) {
  Object.assign(item, { status: "pending", at: LAST, sentAt: Date.now() });
  group(where).items.sort(byTime);
  item.timer = setTimeout(() => fail(item, "No answer came."), ANSWER);
  send({ kind: "say", group: where, id: item.id, text: item.text });
}

function sayAgain(item) {
  if (link.state !== "open" || performance.now() < limitedUntil) return;
  post(item, active);
  draw();
}

// --------------------------------------------------------------------------------------------------- the drawing

function el(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content); // strings become text nodes
  return element;
}

function initials(name) {
  const words = name.trim().split(/\s+/);
  const letters = words.length > 1 ? [[...words[0]][0], [...words.at(-1)][0]] : [...words[0]].slice(0, 2);
  return letters.join("").toUpperCase();
}

function hue(key) {
  let sum = 7;
  for (const letter of key) sum = (sum * 31 + letter.codePointAt(0)) % 9973;
  return (sum * 47) % 360;
}

function dress(element, key, name) {
  element.textContent = initials(name);
  element.style.setProperty("--hue", hue(key));
}

function face(key, name) {
  const element = el("span", "initials");
  element.setAttribute("aria-hidden", "true");
  dress(element, key, name);
  return element;
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const calendar = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });
const timeOf = (item) => (item.status === "sent" ? item.at : item.sentAt);
const dayOf = (item) => new Date(timeOf(item)).toDateString();

function dayName(item) {
  if (dayOf(item) === new Date().toDateString()) return "Today";
  return calendar.format(timeOf(item));
}

function messageElement(item, before) {
  const near = before?.kind === "message" && before.from === item.from && timeOf(item) - timeOf(before) < FOLLOWS;
  const time = el("time", "", clock.format(timeOf(item)));
  time.dateTime = new Date(timeOf(item)).toISOString();
  const body = el("div", "body", el("p", "said", item.text));
  if (item.status === "failed") body.append(trouble(item));
  const element = el("article", "message", face(item.from, item.name), el("p", "byline", el("strong", "", item.name), time), body);
  element.classList.toggle("own", item.from === me.key);
  element.classList.toggle("follows", near);
  element.classList.add(item.status);
  return element;
}

function trouble(item) {
  const again = el("button", "", "Send again");
  again.type = "button";
  again.onclick = () => sayAgain(item);
  const why = el("span", "", item.why || "Slow down a little.");
  if (!item.why) why.dataset.limited = "";
  return el("p", "trouble", why, again);
}

// Each item keeps its element until something about it changes, so that a screen reader hears only what is new.
function elementOf(item, before) {
  const sign = [item.status, item.at, item.why, before?.id, before?.kind].join();
  if (item.sign !== sign) {
    item.sign = sign;
    item.element = item.kind === "note" ? el("p", "note", item.text) : messageElement(item, before);
  }
  return item.element;
}

function draw({ jump = false, fresh = false } = {}) {
  if (!me) return;
  const where = group(active);
  const wanted = [];
  let before = null;
  for (const item of where.items) {
    if (before?.day !== dayOf(item)) {
      wanted.push(dayElement(item));
      before = { day: dayOf(item) };
    }
    wanted.push(elementOf(item, before));
    before = { ...item, day: dayOf(item) };
  }
  reconcile($("log"), wanted, jump);
  drawEmpty(where);
  atEnd ||= jump;
  stay();
  drawNewer(atEnd ? 0 : fresh ? Number($("newer").dataset.count || 0) + 1 : null);
}

// Who reads the newest line keeps seeing it, whatever grows or shrinks; who has scrolled up is left in peace.
let atEnd = true;
function stay() {
  if (atEnd) $("scroll").scrollTop = $("scroll").scrollHeight;
}
new ResizeObserver(stay).observe($("scroll"));

function dayElement(item) {
  item.dayElement ??= el("p", "day", "");
  item.dayElement.textContent = dayName(item);
  return item.dayElement;
}

// Bring the children of the log to the wanted ones and touch nothing that is already right.
function reconcile(log, wanted, whole) {
  if (whole) log.setAttribute("aria-busy", "true");
  const keep = new Set(wanted);
  for (const child of [...log.children]) if (!keep.has(child)) child.remove();
  wanted.forEach((element, place) => log.children[place] === element || log.insertBefore(element, log.children[place] ?? null));
  log.removeAttribute("aria-busy");
}

function drawEmpty(where) {
  const empty = $("empty");
  empty.hidden = where.items.length > 0;
  if (empty.hidden) return;
  const title = where.entered ? `Nothing said in ${display(where.name)} yet` : `Entering ${display(where.name)} …`;
  empty.replaceChildren(el("strong", "", title), where.entered ? "Yours could be the first word." : "");
}

function drawNewer(count) {
  const newer = $("newer");
  if (count === null) return;
  newer.dataset.count = count;
  newer.hidden = count === 0;
  newer.textContent = count === 1 ? "1 new message ↓" : `${count} new messages ↓`;
}

function drawGroups() {
  $("groups").replaceChildren(...[...groups.values()].map(groupElement));
  const unread = [...groups.values()].reduce((sum, where) => sum + where.unread, 0);
  const elsewhere = [...groups.values()].some((where) => where.unread && where.name !== active);
  $("elsewhere").hidden = !elsewhere;
  $("show-rail").setAttribute("aria-label", elsewhere ? "Show the groups; there are unread messages" : "Show the groups");
  document.title = `${unread ? `(${unread}) ` : ""}${display(active)} · Parlour`;
}

function groupElement(where) {
  const shown = where.name === active ? 0 : where.unread;
  const button = el("button", shown ? "unread" : "", el("span", "name", display(where.name)));
  button.type = "button";
  button.dataset.group = where.name;
  if (where.name === active) button.setAttribute("aria-current", "true");
  if (shown) button.append(el("span", "badge", shown > 99 ? "99+" : String(shown)), el("span", "unseen", " unread"));
  return el("li", "", button);
}

function drawPeople() {
  const where = group(active);
  const people = [...where.people].sort(([one, a], [two, b]) => (two === me.key) - (one === me.key) || nameOf(a).localeCompare(nameOf(b)));
  $("persons").replaceChildren(...people.map(([key, metas]) => personElement(key, metas)));
  $("faces").replaceChildren(...people.slice(0, 3).map(([key, metas]) => face(key, nameOf(metas))));
  $("count").textContent = where.count || "";
  $("gathered").textContent = where.count ? `${where.count} here` : "People";
  $("show-people").setAttribute("aria-label", `${others(where.count)} here; show who`);
  const alone = $("alone");
  const uncounted = where.count > people.length; // a big group is told by its number alone
  alone.hidden = !(uncounted || (people.length === 1 && where.people.has(me.key)));
  alone.textContent = uncounted ? "Too many to name them all." : "Only you so far. Open this page in another window and choose a second name.";
}

function personElement(key, metas) {
  const label = key === me.key ? "you" : metas.length > 1 ? `${metas.length} windows` : "";
  const element = el("li", "", face(key, nameOf(metas)), el("span", "name", nameOf(metas)));
  element.dataset.person = key;
  if (label) element.append(el("small", "", label));
  return element;
}

const STATES = { open: "Connected", connecting: "Connecting …", lost: "Reconnecting …", ended: "Disconnected", closed: "" };

function drawState() {
  const state = $("state");
  state.dataset.state = link.state === "ended" ? "lost" : link.state;
  state.textContent = STATES[link.state];
  setText($("spoken"), STATES[link.state]);
  $("app").dataset.state = link.state;
  $("lost").hidden = link.state === "open" || link.state === "closed" || (link.state === "connecting" && link.attempt === 0);
  $("retry").hidden = link.state === "connecting";
  $("say").querySelector("button").disabled = link.state !== "open";
}

function hint(text = "", kind = "") {
  const left = $("text").maxLength - $("text").value.length;
  $("hint").dataset.kind = kind;
  setText($("hint"), text || (left < 200 ? `${left} characters left` : ""));
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // unchanged text is not announced again
}

// What counts down: the next attempt, and the time until one may speak again.
let ticking = null;
const seconds = (wait) => (wait < 10_000 ? (Math.ceil(wait / 100) / 10).toFixed(1) : String(Math.ceil(wait / 1000)));
function tick() {
  clearTimeout(ticking);
  const now = performance.now();
  const wait = limitedUntil - now;
  if (wait <= 0 && limitedUntil) {
    limitedUntil = 0;
    hint();
  }
  for (const why of document.querySelectorAll("[data-limited]")) {
    setText(why, wait > 0 ? `Slow down, again in ${seconds(wait)} s` : "Slow down a little.");
    why.nextElementSibling.hidden = wait > 0;
  }
  if (link.state === "lost") {
    const rest = Math.ceil((link.until - now) / 1000);
    setText($("lost-text"), rest > 1 ? `Connection lost. Trying again in ${rest} s.` : "Connection lost. Trying again …");
  } else if (link.state === "connecting") setText($("lost-text"), "Connection lost. Trying again …");
  else if (link.state === "ended") setText($("lost-text"), `The server has ended this connection: ${link.reason}.`);
  if (wait > 0 || link.state === "lost") ticking = setTimeout(tick, 100);
}

// The textarea grows with its text where the browser cannot do that itself.
function fit() {
  if (CSS.supports("field-sizing", "content")) return;
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

// ------------------------------------------------------------------------------------- drawers, keys and buttons

const narrow = { rail: matchMedia("(max-width: 46rem)"), people: matchMedia("(max-width: 67rem)") };

function openDrawer(name) {
  $("app").dataset.drawer = name;
  drawDrawers();
  $(name).querySelector("[data-close]").focus();
}

function closeDrawer() {
  const name = $("app").dataset.drawer;
  if (!name) return;
  delete $("app").dataset.drawer;
  drawDrawers();
  $(`show-${name}`).focus();
}

function drawDrawers() {
  const open = $("app").dataset.drawer;
  for (const name of ["rail", "people"]) {
    $(name).inert = narrow[name].matches && open !== name;
    $(`show-${name}`).setAttribute("aria-expanded", String(open === name));
  }
  document.querySelector(".talk").inert = Boolean(open && narrow[open].matches);
}

function submit(event) {
  event?.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  if (link.state !== "open") return hint("Not connected; your text stays here.", "problem");
  if (performance.now() < limitedUntil) return hint("Slow down a little; your text stays here.", "problem");
  if (!group(active).entered) return hint("Still entering this group.");
  $("text").value = "";
  hint();
  fit();
  say(text);
}

function submitGroup(event) {
  event.preventDefault();
  const name = $("group").value.trim().toLowerCase().replace(/\s+/g, "-");
  const fits = /^[\p{L}\p{N}_][\p{L}\p{N}_-]{0,39}$/u.test(name);
  const full = groups.size >= 12 && !groups.has(name);
  $("group-error").textContent = !fits ? "Letters, digits and dashes, please." : full ? "Twelve groups are enough; leave one first." : "";
  if (!fits || full) return;
  $("group").value = "";
  enter(name);
  $("text").focus();
}

function step(by) {
  const names = [...groups.keys()];
  show(names[(names.indexOf(active) + by + names.length) % names.length]);
  $("text").focus();
}

function onKey(event) {
  if (event.key === "Escape") closeDrawer();
  else if (me && event.altKey && event.key === "ArrowUp") step(-1);
  else if (me && event.altKey && event.key === "ArrowDown") step(1);
  else return;
  event.preventDefault();
}

function toggleTheme() {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(dark === "dark" ? "light" : "dark");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

$("login").onsubmit = (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  $("login-error").textContent = "";
  if (name) login(name);
  if (me) $("text").focus();
};
$("say").onsubmit = submit;
$("text").onkeydown = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && submit(event);
$("text").oninput = () => {
  hint();
  fit();
};
$("enter").onsubmit = submitGroup;
$("groups").onclick = (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  show(button.dataset.group);
  if (!narrow.rail.matches) $("text").focus();
};
$("leave").onclick = () => leave(active);
$("logout").onclick = () => logout();
$("retry").onclick = connect;
$("theme").onclick = toggleTheme;
$("show-rail").onclick = () => openDrawer("rail");
$("show-people").onclick = () => openDrawer("people");
$("newer").onclick = () => draw({ jump: true });
$("scroll").onscroll = () => {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  atEnd = scrollHeight - scrollTop - clientHeight < 80;
  if (atEnd) drawNewer(0);
};
for (const element of document.querySelectorAll("[data-close]")) element.addEventListener("click", closeDrawer);
for (const query of Object.values(narrow)) query.onchange = () => (closeDrawer(), drawDrawers());
addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => {
  if (!me || !seen()) return;
  group(active).unread = 0;
  drawGroups();
  if (link.state === "lost") connect();
});

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
drawDrawers();
const name = sessionStorage.getItem("name");
if (name) login(name);
else logout();
