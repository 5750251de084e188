/*
 * The client of starlette_rt, protocol version 1, for browsers and Node.js from 22 on.
 *
 * The law of this file: nothing is lost without a word. What was emitted is answered, refused or `outcome_unknown`;
 * what a group said is shown once and in order, or `recovered: false` says that something is missing. Every buffer
 * has a bound, every wait is jittered, and whatever a callback throws stays the callback's.
 *
 * Names that begin with an underscore are not for users. Names from the network live in a Map, never in an object.
 */

const HANDSHAKE = 20_000; // ms from the first step of an attempt to its welcome
const STABLE = 10_000; // ms after which a connection has forgotten the failures before it
const SEEN = 500; // ids of events that a group remembers
const REFUSALS = 32; // refusals in FORGIVEN ms that we risk; the server ends a connection at 50
const FORGIVEN = 10_000;
const ELEMENTS = 10_000; // values in one message
const DEPTH = 64;
const ORPHANED = 7 * 24 * 3_600_000; // ms that the queue of another session stays in the storage
const UNCOUNTED = ["skipped", "busy", "internal"]; // the errors that no server takes amiss
const WHOLE = ["bad_message", "too_large", "unsupported"]; // what a message is refused for as a whole
const UTF8 = new TextEncoder();

const CLOCK = {
  now: () => Date.now(),
  setTimeout: (fn, ms) => setTimeout(fn, ms),
  clearTimeout: (timer) => clearTimeout(timer),
  random: () => Math.random(),
};

export class RealtimeError extends Error {
  constructor(code, message = code, { temporary = false, retryAfter = null, event, id } = {}) {
    super(message);
    this.name = "RealtimeError";
    Object.assign(this, { code, temporary, retryAfter, event, id });
  }
}

/** Open a connection and keep it; see the documentation for the options. `clock` is for tests. */
export function connect(url, options = {}) {
  return new Realtime(url, options);
}

// Small things

const nothing = () => {};

function report(error) {
  if (globalThis.reportError) globalThis.reportError(error);
  else console.error(error);
}

/** Some functions of the user, called one after the other; what one throws is reported and stops no other. */
class Callbacks {
  constructor() {
    this.all = new Set();
  }

  add(fn) {
    const entry = { fn }; // the same function may be added twice
    this.all.add(entry);
    return () => void this.all.delete(entry);
  }

  call(...args) {
    for (const { fn } of [...this.all]) {
      try {
        fn(...args)?.then?.(undefined, report);
      } catch (error) {
        report(error);
      }
    }
  }
}

/** Callbacks by the name of an event. */
class Named {
  constructor() {
    this.names = new Map();
  }

  add(name, fn) {
    if (!this.names.has(name)) this.names.set(name, new Callbacks());
    return this.names.get(name).add(fn);
  }

  call(name, ...args) {
    this.names.get(name)?.call(...args);
  }
}

function base64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function randomId() {
  const text = base64(crypto.getRandomValues(new Uint8Array(16)));
  return text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

function address(url) {
  const whole = new URL(url, globalThis.location?.href);
  whole.protocol = whole.protocol.replace(/^http/, "ws");
  whole.hash = "";
  return whole;
}

/** The session is a secret of this tab: it lives as long as the tab does, across reloads. */
function sessionOf(given, place) {
  const sound = /^[\w-]{22,64}$/;
  if (given !== undefined) {
    if (!sound.test(given)) throw new TypeError("session: 22 to 64 characters of A-Z a-z 0-9 _ -");
    return given;
  }
  const key = `starlette-rt|session|${place}`;
  const made = randomId();
  try {
    const kept = globalThis.sessionStorage?.getItem(key);
    if (sound.test(kept ?? "")) return kept;
    globalThis.sessionStorage?.setItem(key, made);
  } catch {
    // a page that may not store anything is another guest after a reload
  }
  return made;
}

/** How many values a value holds; Infinity if it is nested deeper than a message may be. */
function elements(value, depth = 1) {
  if (value === null || typeof value !== "object" || ArrayBuffer.isView(value)) return 1;
  if (depth > DEPTH) return Infinity;
  let count = 1;
  for (const part of Object.values(value)) count += elements(part, depth + 1);
  return count;
}

const isRef = (ref) => ref !== undefined && ref !== null;

const comesBack = (code) => !(code === 1000 || code === 1003 || (code >= 4500 && code <= 4999));

const samePlace = (a, b) => a.epoch === b.epoch && a.offset === b.offset && a.tag === b.tag;

/** What to show after the reply to a join: its events and then what was held back, each offset once, in order. */
function merge(events, held, recovered, asked, position) {
  const after = recovered ? (asked?.offset ?? -Infinity) : (position?.offset ?? -Infinity);
  const numbered = new Map();
  for (const frame of held) if (frame.offset > after) numbered.set(frame.offset, frame);
  for (const frame of events) {
    if (frame.offset !== undefined && !(recovered && frame.offset <= after)) numbered.set(frame.offset, frame);
  }
  const ordered = [...numbered.values()].sort((a, b) => a.offset - b.offset);
  return [...ordered, ...held.filter((frame) => frame.offset === undefined)];
}

/**
 * Requests in their order. While all goes well they are sent as they come. As soon as one has to wait, or one met a
 * temporary error, a batch is sent, all of it is awaited, and the next begins with the first that was refused. What a
 * batch may risk is bounded too: behind a refused one all others are `skipped`, and a server counts refusals.
 *
 * An item has `frame()` and `settle(error, data)`; perhaps `held()`: it cannot go yet, nor what is behind it;
 * `expired()`: an error instead of sending it; `sent()`, `refused()` and `lost()`: what became of it; `suspect`: it
 * may be why a message was refused as a whole, and goes alone.
 */
class Lane {
  constructor(client, name) {
    Object.assign(this, { client, name, items: [], flying: 0, careful: false });
    Object.assign(this, { size: Infinity, notBefore: 0, failures: 0 });
  }

  push(item) {
    this.items.push(Object.assign(item, { ref: null, settled: false }));
    this.client._soon();
  }

  remove(item) {
    const at = this.items.indexOf(item);
    if (at >= 0) this.items.splice(at, 1);
    if (!this.items.length) this.careful = false;
  }

  settle(item, error, data) {
    this.remove(item);
    if (item.settled) return undefined;
    item.settled = true;
    return item.settle(error, data);
  }

  pump() {
    const { client } = this;
    const single = client._single;
    if (!client._live || client._doubt || (this.careful && this.flying) || (single && client._unanswered.size)) return;
    const now = client._clock.now();
    const wait = Math.max(this.notBefore, client._breather(now)) - now;
    if (wait > 0) {
      if (this.items.length) this.careful = true;
      client._after(this.name, wait, () => client._pump());
      return;
    }
    let room = client._room();
    if (room < 1 && client._faults.length) {
      client._after(this.name, client._faults[0] + FORGIVEN - now, () => client._pump());
    }
    if (this.careful) room = Math.min(room, single ? 1 : this.size);
    const batch = { left: 0, accepted: 0, refused: false, told: false, careful: this.careful };
    const parts = [];
    let bytes = 2;
    let values = 1;
    for (const item of [...this.items]) {
      if (item.ref !== null) continue;
      if (parts.length >= room || item.held?.()) break;
      const expired = item.expired?.();
      if (expired) {
        this.settle(item, expired);
        continue;
      }
      let made;
      try {
        made = client._made({ ...item.frame(), ref: client._lastRef + 1 });
      } catch (failure) {
        this.settle(item, failure);
        continue;
      }
      // Keys may count as values, so each frame is weighed twice: a batch stays well below the bound.
      if (parts.length && (bytes + made.bytes + 1 > client._maxSize || values + 2 * made.values > ELEMENTS)) break;
      bytes += made.bytes + 1;
      values += 2 * made.values;
      parts.push(made.part);
      item.ref = ++client._lastRef;
      item.batch = batch;
      item.sent?.();
      client._unanswered.set(item.ref, { at: now, lane: this, item });
    }
    this.flying += parts.length;
    batch.left = parts.length;
    if (parts.length) client._write(parts);
    if (this.items.some((item) => item.ref === null)) this.careful = true;
  }

  answered(item, error, data) {
    const { client } = this;
    const { batch } = item;
    let then;
    item.ref = null;
    this.flying -= 1;
    batch.left -= 1;
    if (error?.temporary && !item.settled) {
      batch.refused = this.careful = true;
      if (error.code !== "skipped") {
        batch.told = true;
        this.wait(error.retryAfter ?? client._jitter(this.failures));
      }
      item.refused?.();
    } else {
      if (!batch.refused) batch.accepted += 1;
      then = this.settle(item, error, data);
    }
    if (!batch.left) {
      if (batch.refused) {
        this.size = Math.max(1, batch.accepted);
        if (!batch.told) this.wait(client._jitter(this.failures));
        this.failures += 1;
      } else {
        if (batch.careful) this.size = Math.min(client._window, this.size * 2);
        this.failures = 0;
      }
    }
    client._pump();
    return then;
  }

  wait(ms) {
    this.notBefore = Math.max(this.notBefore, this.client._clock.now() + ms);
  }

  /** What is in flight will not be answered any more: it waits again, at its place. */
  lost() {
    this.flying = 0;
    for (const item of [...this.items]) {
      if (item.ref === null) continue;
      item.ref = null;
      item.lost?.();
      if (item.settled) this.remove(item);
    }
    this.careful = this.items.length > 0;
  }

  /** The server closed because it was asked too much: say less at a time. */
  slower() {
    this.size = Math.max(1, Math.floor(Math.min(this.size, this.client._window) / 4));
    this.careful = this.items.length > 0;
  }
}

class Realtime {
  constructor(url, options) {
    const { token, codec, storage, session, timeout, queue = 1000, backoff, WebSocket, clock } = options;
    this.state = "connecting";
    this.identity = null;
    this.connection = null;
    this.latency = null;
    this._url = address(url);
    this._place = this._url.origin + this._url.pathname; // without a query, which may hold a secret
    this.session = sessionOf(session, this._place);
    this._token = token;
    this._codec = codec;
    this._storage = storage;
    this._timeout = timeout;
    this._queue = queue;
    this._backoff = { base: 500, cap: 20_000, ...backoff };
    this._WebSocket = WebSocket ?? globalThis.WebSocket;
    this._clock = { ...CLOCK, ...clock };
    if (!this._WebSocket) throw new TypeError("no WebSocket here; hand one in as the option `WebSocket`");

    this._socket = null;
    this._live = false; // between a welcome and the end of its connection
    this._turn = 0; // of attempts: what comes back late from an older one is ignored
    this._attempts = 0; // that failed since a connection was stable
    this._hurried = false; // come back at once after 4001, but not twice
    this._notBefore = 0; // the server asked for so much patience
    this._goodbye = null;
    this._window = 32;
    this._maxSize = 65_536;
    this._onceMs = Infinity;
    this._heard = 0;
    this._inbox = [];
    this._paused = false;
    this._flushing = false;
    this._lastRef = 0;
    this._lastKey = 0;
    this._faults = []; // when the server refused something, and counted it
    this._again = 0; // until when it asked for patience
    this._doubt = false; // a message was refused as a whole, and it is not known yet which
    this._unanswered = new Map(); // ref -> what to do with its answer
    this._timers = new Map();
    this._groups = new Map();
    this._answers = new Map();
    this._requests = new Lane(this, "requests"); // joins and what goes with them
    this._events = new Lane(this, "events");
    this._named = new Named();
    this._states = new Callbacks();
    this._latencies = new Callbacks();
    this._errors = new Callbacks();
    this._unsaved = new Set();

    this._restore();
    this._listen();
    this._open();
  }

  // What users call

  get pending() {
    return this._events.items.filter((item) => !item.settled).length;
  }

  emit(event, data = null, { group = null, timeout = this._timeout, id = randomId() } = {}) {
    const item = { event, id, group, first: null, who: this.identity };
    item.promise = new Promise((resolve, reject) => {
      if (this.state === "closed") throw new RealtimeError("closed", "the connection is closed", item);
      if (this.pending >= this._queue) {
        throw new RealtimeError("queue_full", `${this._queue} events are waiting already`, item);
      }
      item.data = this._copy(data); // what the caller changes later is not what was said
      item.until = timeout > 0 && timeout < Infinity ? this._clock.now() + timeout : null;
      this._enqueue(item, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
    return item.promise;
  }

  on(event, fn) {
    return this._named.add(event, fn);
  }

  answer(event, fn) {
    this._answers.set(event, fn);
    return () => void (this._answers.get(event) === fn && this._answers.delete(event));
  }

  onState(fn) {
    return this._states.add(fn);
  }

  onLatency(fn) {
    return this._latencies.add(fn);
  }

  onError(fn) {
    return this._errors.add(fn);
  }

  join(name, { position, last, presence } = {}) {
    const group = this.group(name);
    const asksMore = presence !== undefined && presence !== group._told;
    group._stay();
    if (position && !group._position) group._position = { ...position };
    if (last !== undefined) group._last = last;
    if (presence !== undefined) group._told = presence;
    if (!group._wanted || asksMore) {
      group._wanted = true;
      group._renew();
      group._ask();
    }
    return group;
  }

  group(name) {
    if (!this._groups.has(name)) this._groups.set(name, new Group(this, name));
    return this._groups.get(name);
  }

  reconnect() {
    if (this.state === "connecting") return;
    if (this.state === "closed") {
      this._restore();
      this._listen();
      for (const group of this._groups.values()) group._renew();
    }
    this._cut();
    this._notBefore = 0;
    this._open();
  }

  close() {
    if (this.state === "closed") return;
    this._deaf?.();
    this._end(1000, "closed by this client", true);
  }

  // The connection

  async _open() {
    const turn = ++this._turn;
    this._stop("retry");
    this._goodbye = null;
    // A browser's word that it is offline is shown, and not quite believed.
    if (!(this.state === "offline" && this._offline())) this._become("connecting");
    this._after("handshake", HANDSHAKE, () => this._lost(1006, "no welcome in time"));
    let token;
    try {
      await null; // whoever has just called `connect` may set callbacks first
      if (turn !== this._turn) return;
      token = typeof this._token === "function" ? await this._token() : this._token;
    } catch (error) {
      if (turn !== this._turn) return;
      const reason = `no token: ${error?.message ?? error}`;
      if (error?.fatal) this._end(null, reason);
      else this._lost(null, reason);
      return;
    }
    if (turn !== this._turn) return;
    const spoken = this._codec ? "rt.v1.msgpack" : "rt.v1.json";
    const offered = [spoken, `rt.session.${this.session}`];
    if (token !== undefined && token !== null && token !== "") offered.push(`rt.token.${token}`);
    let socket;
    try {
      socket = new this._WebSocket(this._url.href, offered);
    } catch (error) {
      this._end(null, `no connection is possible: ${error.message}`);
      return;
    }
    this._socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      if (socket.protocol !== spoken) this._end(null, `${this._place} does not speak ${spoken}`);
    };
    socket.onmessage = (message) => this._hear(message.data);
    socket.onclose = ({ code, reason }) => this._lost(code, reason);
    socket.onerror = nothing; // its close follows
  }

  _welcome(frame) {
    this._live = true;
    this._stop("handshake");
    this.identity = frame.identity;
    this.connection = frame.connection;
    this._window = frame.window ?? this._window;
    this._maxSize = frame.max_size ?? this._maxSize;
    this._onceMs = frame.once_ms ?? Infinity;
    this._patience = (frame.ping_interval_ms ?? 0) + (frame.ping_timeout_ms ?? 0);
    this._watch();
    this._renewal(frame.ttl_ms);
    this._after("stable", STABLE, () => {
      this._attempts = 0;
      this._hurried = false;
    });
    // All joins first, then who we are in the groups, then the questions that were open.
    const open = this._requests.items;
    this._requests.items = [];
    for (const group of this._groups.values()) if (group._wanted) group._ask();
    for (const group of this._groups.values()) {
      if (group._tracked === undefined) continue;
      const same = open.filter((item) => item.kind === "track" && item.group === group);
      group._assert((error, data) => same.forEach((item) => item.settle(error, data)));
    }
    for (const item of open) {
      if (item.kind === "presence") this._requests.items.push(item);
      const over = item.kind === "leave" || item.kind === "untrack" || item.group?._tracked === undefined;
      if (over && item.kind !== "presence" && item.kind !== "join") item.settle(null, null); // losing the line did it
    }
    this._pump();
    this._become("open");
  }

  /** Forget the connection, whatever state it is in. */
  _cut(code) {
    this._turn += 1;
    this._live = this._paused = this._doubt = false;
    this._inbox = [];
    this._unanswered.clear();
    for (const name of [...this._timers.keys()]) this._stop(name);
    const socket = this._socket;
    this._socket = null;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      try {
        if (code) socket.close(code);
        else socket.close();
      } catch {
        // it was not open any more
      }
    }
    this._events.lost();
    this._requests.lost();
    for (const group of [...this._groups.values()]) group._lost();
    this._save();
  }

  /** The connection, or the attempt at one, is over; come back unless the code says not to. */
  _lost(code, reason) {
    const goodbye = this._goodbye;
    if (goodbye && (code === 1005 || code === 1006)) code = goodbye.code;
    reason ||= goodbye?.reason ?? "";
    this._cut();
    if (code !== null && !comesBack(code)) {
      this._end(code, reason);
      return;
    }
    if (code === 4002 || code === 4003) {
      this._events.slower();
      this._requests.slower();
    }
    const asked = goodbye?.retry_after_ms ?? 0;
    const atOnce = code === 4001 && !this._hurried;
    if (atOnce) this._hurried = true;
    const wait = asked + (atOnce ? 0 : this._jitter(this._attempts++));
    this._notBefore = this._clock.now() + asked;
    this._after("retry", wait, () => this._open());
    this._become(this._offline() ? "offline" : "waiting", { code, reason, retryIn: wait });
  }

  /** Closed for good, until somebody calls `reconnect`. What is kept in a storage stays there. */
  _end(code, reason, byUs = false) {
    this._cut(byUs ? code : undefined);
    for (const item of [...this._events.items]) {
      const unknown = item.uncertain && !item.key;
      const kept = `${item.key ? "kept in the storage" : "not answered"}: ${reason || `closed with ${code}`}`;
      if (byUs) item.promise?.catch(nothing); // who closes need not listen
      item.keep = true;
      this._events.settle(item, new RealtimeError(unknown ? "outcome_unknown" : "closed", kept, item));
    }
    for (const item of [...this._requests.items]) {
      if (byUs) item.promise?.catch(nothing);
      this._requests.settle(item, new RealtimeError("closed", reason));
    }
    for (const group of this._groups.values()) group._fail(new RealtimeError("closed", reason));
    this._become("closed", { code, reason });
    if (code === null) this._errors.call(new RealtimeError("closed", reason));
  }

  _become(state, { code = null, reason = "", retryIn = null } = {}) {
    if (state === this.state && retryIn === null) return;
    this.state = state;
    this._states.call(state, { code, reason, retryIn });
  }

  /** Full jitter: the bound doubles up to the cap and the wait is drawn below it, also at the cap. */
  _jitter(failures) {
    const { base, cap } = this._backoff;
    return this._clock.random() * Math.min(cap, base * 2 ** failures);
  }

  _watch() {
    if (!this._live || !this._patience) return;
    const left = this._heard + this._patience - this._clock.now();
    if (left <= 0) this._lost(1006, "nothing heard for too long");
    else this._after("watch", left, () => this._watch());
  }

  _offline() {
    return globalThis.navigator?.onLine === false;
  }

  /** Try now, or as soon as the server allows. */
  _try() {
    if (this.state !== "waiting" && this.state !== "offline") return;
    const wait = this._notBefore - this._clock.now();
    if (wait <= 0) this._open();
    else this._after("retry", wait, () => this._open());
  }

  _listen() {
    this._deaf?.();
    const offs = [];
    const listen = (target, event, fn) => {
      target?.addEventListener?.(event, fn);
      offs.push(() => target?.removeEventListener?.(event, fn));
    };
    listen(globalThis, "online", () => this._try());
    listen(globalThis, "offline", () => {
      if (this.state === "waiting") this._become("offline");
    });
    listen(globalThis, "pageshow", (event) => {
      if (event.persisted && this.state !== "closed") {
        this._cut(); // the page slept in the browser's cache, and its socket did not survive that
        this._open();
      }
    });
    listen(globalThis.document, "visibilitychange", () => {
      if (globalThis.document.visibilityState !== "visible") return;
      this._watch();
      this._try();
    });
    this._deaf = () => offs.forEach((off) => off());
  }

  // Tokens

  /** Plan to fetch a new token before this one runs out. */
  _renewal(ttl) {
    if (typeof this._token !== "function" || ttl === null || ttl === undefined) return;
    const early = Math.max(ttl / 10, 5000);
    this._after("refresh", Math.max(ttl - early, ttl / 2), () => this._refresh(0));
  }

  async _refresh(failures) {
    const turn = this._turn;
    try {
      const token = await this._token();
      if (turn !== this._turn) return;
      const data = await new Promise((resolve, reject) => {
        this._request({ type: "refresh", token }, (error, answer) => (error ? reject(error) : resolve(answer)));
      });
      this._renewal(data?.ttl_ms);
    } catch (error) {
      if (turn !== this._turn || error?.fatal) return; // the server closes with 4001 when it is time
      const wait = Math.max(error?.retryAfter ?? 0, 1000) + this._jitter(failures);
      this._after("refresh", wait, () => this._refresh(failures + 1));
    }
  }

  /** Ask outside of the lanes: a refresh must not wait behind a queue. */
  _request(frame, settle) {
    this._say({ ...frame, ref: ++this._lastRef });
    this._unanswered.set(this._lastRef, { at: this._clock.now(), settle });
  }

  // Speaking

  _encode(value) {
    if (this._codec) return this._codec.encode(value);
    const text = JSON.stringify(value, function (key, part) {
      return this[key] instanceof Uint8Array ? base64(this[key]) : part;
    });
    if (text === undefined) throw new TypeError(`a ${typeof value} cannot be said`);
    if (!text.includes("\\ud")) return text;
    // Half of a character has no form in UTF-8: a server refuses the escape that stands for it.
    return text.replace(/\\(ud[89a-f]..|.)/g, (escape, what) => (what[1] ? "\ufffd" : escape));
  }

  /** A frame as it is said, and what it weighs; throws if it cannot be said. */
  _made(frame) {
    const part = this._encode(frame);
    const bytes = this._codec ? part.length : UTF8.encode(part).length;
    const values = elements(frame);
    if (bytes <= this._maxSize && values <= ELEMENTS) return { part, bytes, values };
    throw new RealtimeError("too_large", `more than the server takes: ${bytes} bytes, ${values} values`, frame);
  }

  _decode(data) {
    if (this._codec) return this._codec.decode(new Uint8Array(data));
    return JSON.parse(data);
  }

  _copy(data) {
    const bytes = this._encode(data ?? null);
    return this._codec ? this._codec.decode(bytes) : JSON.parse(bytes);
  }

  /** Send encoded frames as one message. */
  _write(parts) {
    let message = parts[0];
    if (parts.length > 1 && !this._codec) message = `[${parts.join()}]`;
    else if (parts.length > 1) {
      const count = parts.length; // MessagePack says how long an array is in front of it
      const head = count < 16 ? [0x90 | count] : [0xdc, count >> 8, count & 255];
      message = new Uint8Array(parts.reduce((sum, part) => sum + part.length, head.length));
      let at = head.length;
      message.set(head);
      for (const part of parts) {
        message.set(part, at);
        at += part.length;
      }
    }
    try {
      this._socket.send(message);
    } catch {
      // it is closing, and its close follows
    }
  }

  _say(frame) {
    this._write([this._encode(frame)]);
  }

  _soon() {
    if (this._flushing) return;
    this._flushing = true;
    queueMicrotask(() => {
      this._flushing = false;
      this._pump();
    });
  }

  _pump() {
    this._requests.pump();
    this._events.pump();
    this._save();
  }

  /** How many more requests may be unanswered, if all that are should be refused. */
  _room() {
    const flying = this._unanswered.size;
    const room = Math.min(this._window, REFUSALS - this._faults.length) - flying;
    return flying ? room : Math.max(1, room);
  }

  /** When the next request may go, after so many refusals that the server might lose its patience. */
  _breather(now) {
    this._faults = this._faults.filter((at) => at > now - FORGIVEN);
    return this._faults.length < REFUSALS + 12 ? 0 : this._faults[0] + FORGIVEN;
  }

  /** Count a refusal as the server does: not if we waited as long as it had asked for. */
  _fault({ code, retryAfter }) {
    const now = this._clock.now();
    if (UNCOUNTED.includes(code)) return;
    if (retryAfter === null || now < this._again) this._faults.push(now);
    this._again = Math.max(this._again, now + retryAfter);
  }

  /** Whether requests go one by one, nothing beside them, because one of them may be unfit for any message. */
  get _single() {
    return [this._requests, this._events].some((lane) => lane.items.some((item) => item.suspect));
  }

  /**
   * A message was refused as a whole, and an error without a ref does not say which. When a question behind all of them
   * is answered, all is answered that ever will be; the rest is asked again, one by one, until one is refused alone.
   */
  _doubted(error) {
    if (this._doubt) return;
    this._doubt = true;
    // To leave what we are not in is nothing, and answered in its turn.
    this._request({ type: "leave", group: randomId() }, () => {
      this._doubt = false;
      const rest = [...this._unanswered.values()];
      this._unanswered.clear();
      for (const { item, settle } of rest) {
        if (item) item.suspect = true;
        else settle(error);
      }
      this._requests.lost();
      this._events.lost();
      if (!rest.length) this._errors.call(error); // it was nothing that is answered
    });
  }

  _after(name, ms, fn) {
    this._stop(name);
    const run = () => {
      this._timers.delete(name);
      fn();
    };
    this._timers.set(name, this._clock.setTimeout(run, Math.min(Math.max(ms, 0), 0x7fffffff)));
  }

  _stop(name) {
    if (this._timers.has(name)) this._clock.clearTimeout(this._timers.get(name));
    this._timers.delete(name);
  }

  // Hearing

  _hear(data) {
    this._heard = this._clock.now();
    try {
      this._inbox.push(...[].concat(this._decode(data)));
    } catch {
      this._lost(1006, "a message that cannot be read"); // it held something: recover it
      return;
    }
    this._drain();
  }

  _drain() {
    while (!this._paused && this._inbox.length) {
      let then;
      try {
        then = this._take(this._inbox.shift());
      } catch (error) {
        report(error);
      }
      if (!then) continue;
      // Who awaits `ready` goes on now, before the events that came with it.
      const turn = this._turn;
      this._paused = true;
      queueMicrotask(() => {
        if (turn !== this._turn) return;
        this._paused = false;
        then();
        this._drain();
      });
    }
  }

  _take(frame) {
    const { type } = Object(frame);
    if (type === undefined) return undefined;
    if (!this._live && type !== "welcome" && type !== "goodbye" && type !== "error") return undefined;
    const group = this._groups.get(frame.group);
    const left = this._requests.items.some(({ kind, name }) => kind === "leave" && name === frame.group);
    if (left && !isRef(frame.ref)) return undefined; // we have said that we are not there any more
    switch (type) {
      case "welcome":
        return this._welcome(frame);
      case "goodbye":
        this._goodbye = frame;
        return undefined;
      case "ping":
        return this._say({ type: "pong" });
      case "reply":
      case "error":
        return this._answered(frame);
      case "event":
        return this._event(frame, group);
      case "joined":
        return this.group(frame.group)._joined(frame);
      case "left":
        return group?._left(frame);
      case "reset":
        return group?._reset(frame);
      case "presence_state":
        return group?._presenceState(frame);
      case "presence_diff":
        return group?._presenceDiff(frame);
      case "presence_count":
        return group?._presenceCount(frame);
      case "whisper":
        return group?._whisper(frame);
      default:
        return undefined; // that is how version 1 grows
    }
  }

  _event(frame, group) {
    if (group) group._event(frame);
    else if (!frame.skip) this._show(frame, false);
    if (isRef(frame.ref)) this._call(frame);
  }

  _show(frame, recovered, group) {
    const { event, id, offset, data = null } = frame;
    const meta = { event, group: frame.group, id, offset, recovered };
    group?._named.call(event, data, meta);
    this._named.call(event, data, meta);
  }

  /** The server waits for what our function returns. */
  async _call({ event, ref, group, id, data = null }) {
    const turn = this._turn;
    let part;
    try {
      const fn = this._answers.get(event);
      if (!fn) throw new RealtimeError("unknown_event", `nothing here answers ${event}`);
      const answer = await fn(data, { event, group, id, recovered: false });
      ({ part } = this._made({ type: "reply", ref, data: answer ?? null }));
    } catch (error) {
      const code = error instanceof RealtimeError ? error.code : "internal";
      part = this._encode({ type: "error", ref, code, message: String(error?.message ?? error).slice(0, 1000) });
    }
    if (turn === this._turn && this._live) this._write([part]);
  }

  _answered(frame) {
    const { code, message, temporary, retry_after_ms: retryAfter = null } = frame;
    const failed = frame.type === "error";
    const unknown = failed && !isRef(frame.ref);
    const whole = unknown && WHOLE.includes(code) && this._unanswered.size > 0;
    const alone = whole && this._unanswered.size === 1 && this._single && !this._doubt;
    const [ref] = alone ? this._unanswered.keys() : [frame.ref];
    const asked = this._unanswered.get(ref);
    const { event, id } = asked?.item ?? {};
    const about = { temporary: temporary === true, retryAfter, event, id };
    const error = failed ? new RealtimeError(code, message, about) : null;
    if (failed && (asked || unknown)) this._fault(error);
    if (!asked) {
      if (!unknown) return undefined;
      if (retryAfter !== null) for (const lane of [this._requests, this._events]) lane.wait(retryAfter);
      return whole ? this._doubted(error) : this._errors.call(error);
    }
    this._unanswered.delete(ref);
    const trip = this._clock.now() - asked.at;
    this.latency = this.latency === null ? trip : this.latency * 0.8 + trip * 0.2;
    this._latencies.call(this.latency);
    if (asked.lane) return asked.lane.answered(asked.item, error, frame.data ?? null);
    asked.settle(error, frame.data ?? null);
    return this._pump();
  }

  // The queue, and what of it is kept across a reload

  _enqueue(item, settle) {
    const { event, id, group, data } = item;
    const now = this._clock.now;
    const mark = () => this._storage && this._unsaved.add(item);
    let timer;
    Object.assign(item, {
      uncertain: item.first !== null, // it may have been handled
      frame: () => ({ type: "event", id, event, ...(group === null ? {} : { group }), data }),
      held: () => {
        const joining = this._groups.get(group);
        return joining?._wanted && !joining.joined;
      },
      expired: () => {
        const other = item.who !== null && item.who !== this.identity;
        if (item.first !== null && (other || now() - item.first >= this._onceMs)) {
          return new RealtimeError("outcome_unknown", "sent before, and nobody knows any more what became of it", item);
        }
        if (!other || item.who.startsWith("guest:")) return undefined;
        return new RealtimeError("identity_changed", `said as ${item.who}`, item);
      },
      sent: () => {
        item.first ??= now();
        item.who = this.identity;
        mark();
      },
      refused: () => {
        if (!item.uncertain) item.first = null; // it was certainly not handled
        mark();
      },
      lost: () => {
        item.uncertain = true;
      },
      settle: (error, answer) => {
        this._clock.clearTimeout(timer);
        this._unsaved.delete(item);
        if (item.key && !item.keep) this._storage.removeItem(item.key);
        settle(error, answer);
        this._groups.get(group)?._departing();
      },
    });
    if (item.until !== null) {
      timer = this._clock.setTimeout(() => {
        const error = new RealtimeError("timeout", `no answer to ${event} in time`, item);
        if (item.ref === null) this._events.settle(item, error);
        else {
          item.settled = true; // its answer is still to come, and counts for the window
          item.settle(error);
        }
        this._pump();
      }, Math.max(0, item.until - now()));
    }
    this._events.push(item);
    mark();
  }

  get _prefix() {
    return `starlette-rt|${this._place}|${this.session}|`;
  }

  _save() {
    for (const item of this._unsaved) {
      const { event, id, group, data, until, first, who } = item;
      const record = { event, id, group, data, until, first, who };
      this._lastKey = Math.max(this._lastKey + 1, this._clock.now());
      const key = item.key ?? this._prefix + this._lastKey;
      try {
        this._storage.setItem(key, this._codec ? base64(this._codec.encode(record)) : this._encode(record));
        item.key = key;
      } catch (error) {
        if (!this._full) report(error); // once: the queue itself goes on
        this._full = true;
      }
    }
    this._unsaved.clear();
  }

  _restore() {
    if (!this._storage) return;
    const time = (key) => Number(key.slice(key.lastIndexOf("|") + 1));
    const keys = Array.from({ length: this._storage.length }, (_, at) => this._storage.key(at));
    const ours = keys.filter((key) => key.startsWith(`starlette-rt|${this._place}|`));
    for (const key of ours.sort((a, b) => time(a) - time(b))) {
      if (!key.startsWith(this._prefix)) {
        if (time(key) < this._clock.now() - ORPHANED) this._storage.removeItem(key);
        continue;
      }
      try {
        const text = this._storage.getItem(key);
        const record = this._codec
          ? this._codec.decode(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)))
          : JSON.parse(text);
        this._lastKey = Math.max(this._lastKey, time(key));
        const item = { group: null, until: null, first: null, who: null, ...record, key };
        this._enqueue(item, (error) => error && this._errors.call(error));
      } catch (error) {
        report(error);
        this._storage.removeItem(key);
      }
    }
  }
}

class Group {
  constructor(client, name) {
    this.name = name;
    this.joined = false;
    this.presence = new Map();
    this.count = null;
    this._client = client;
    this._position = null; // the place after the last event that was shown
    this._wanted = false; // we ask to join it, also after each reconnect
    this._leaving = false;
    this._joining = null; // {asked, held, flying, broken, again, fallback} while a join is not answered
    this._missed = false; // there was a time without us since we were in it
    this._last = undefined;
    this._told = undefined;
    this._tracked = undefined;
    this._version = null; // of the presence; null until a state has come
    this._diffs = [];
    this._seen = new Set();
    this._lefts = 0;
    this._named = new Named();
    this._whispers = new Named();
    this._typings = new Map();
    this._presences = new Callbacks();
    this._recoveries = new Callbacks();
    this._ends = new Callbacks();
    this._renew();
  }

  // What users call

  get position() {
    return this._position && { ...this._position };
  }

  on(event, fn) {
    return this._named.add(event, fn);
  }

  onWhisper(event, fn) {
    return this._whispers.add(event, fn);
  }

  onPresence(fn) {
    return this._presences.add(fn);
  }

  onRecover(fn) {
    return this._recoveries.add(fn);
  }

  onLeft(fn) {
    return this._ends.add(fn);
  }

  emit(event, data, options) {
    return this._client.emit(event, data, { ...options, group: this.name });
  }

  /** Say something that may get lost; false if it certainly did. */
  whisper(event, data = null) {
    return this._hush({ type: "whisper", group: this.name, event, data });
  }

  typing(event = "typing", options = {}) {
    if (!this._typings.has(event)) this._typings.set(event, new Typing(this, event, options));
    return this._typings.get(event);
  }

  track(meta) {
    return this._request("track", { type: "track", meta });
  }

  update(meta) {
    return this._request("track", { type: "update", meta });
  }

  untrack() {
    this._tracked = undefined;
    return this._request("untrack", { type: "untrack" });
  }

  /** Who is there, page by page: each a Map of key to {metas}. */
  async *members({ limit } = {}) {
    let after = null;
    do {
      const from = after === null ? {} : { after };
      const page = await this._request("presence", { type: "presence", ...from, ...(limit ? { limit } : {}) });
      yield new Map(Object.entries(page.members));
      after = page.after ?? null;
    } while (after !== null);
  }

  /** Leave, as soon as what was emitted here is answered. */
  leave() {
    if (this._client._groups.get(this.name) !== this) return Promise.resolve(); // it was left before
    this._leaving = true;
    const left = new Promise((resolve) => (this._gone ??= []).push(resolve));
    this._departing();
    return left;
  }

  // Joining and coming back

  _renew() {
    if (this._pending) return;
    this.ready = new Promise((resolve, reject) => (this._pending = { resolve, reject }));
    this.ready.catch(nothing); // onLeft says it too
  }

  _fail(error) {
    this._pending?.reject(error);
    this._pending = null;
  }

  _tell(reason, recovered, position, snapshot) {
    const told = { recovered, snapshot, position: position ?? null };
    this._recoveries.call({ ...told, reason });
    if (reason !== "join") return;
    this._pending?.resolve(told);
    this._pending = null;
  }

  _ask() {
    const client = this._client;
    if (!client._live) return; // each welcome asks
    if (this._joining) {
      this._joining.again = this._joining.flying;
      return;
    }
    const join = { asked: null, held: [], flying: false, broken: false, again: false, fallback: null };
    this._joining = join;
    join.item = {
      kind: "join",
      group: this,
      frame: () => ({
        type: "join",
        group: this.name,
        ...(this._position ? { position: this._position } : {}),
        ...(this._last !== undefined && !this._position && !this._missed ? { last: this._last } : {}),
        ...(this._told === undefined ? {} : { presence: this._told }),
      }),
      sent: () => {
        join.asked = this._position;
        join.flying = true;
      },
      refused: () => {
        join.flying = false;
        this._release(join);
      },
      settle: (error, data) => (this._joining === join ? this._answered(join, error, data) : undefined),
    };
    client._requests.push(join.item);
  }

  /** Show what was held back and has no offset, for nothing else brings it; what has one comes with the next reply. */
  _release(join) {
    const held = join.held.filter((frame) => frame.offset === undefined);
    join.held = [];
    for (const frame of held) this._show(frame, false, this._position);
  }

  _answered(join, error, data) {
    if (error && this.joined && !this._wanted) {
      // The server has joined us and will not say what we missed: we go on from where it said we are.
      data = { position: join.fallback ?? null };
    } else if (error) {
      this._joining = null;
      this._release(join);
      this._out(error.code, error);
      return undefined;
    }
    const { position = null, events = [], snapshot } = data;
    const recovered = data.recovered === true && !join.broken && !(this._missed && !join.asked);
    this.joined = true;
    this._missed = false;
    if (!events.length) this._position = position;
    this._tell("join", recovered, position, snapshot);
    return () => {
      if (this._joining !== join) return;
      this._joining = null;
      for (const frame of merge(events, join.held, recovered, join.asked, position)) {
        this._show(frame, frame.offset <= position?.offset, position);
      }
      if (!(this._position?.offset > position?.offset)) this._position = position;
      if (join.again) this._ask();
      this._client._soon();
    };
  }

  /** The server has joined us. */
  _joined({ position = null }) {
    const join = this._joining;
    const old = this._position;
    this.joined = true;
    this._client._soon();
    if (join) {
      if (!join.flying && !old) this._position = position;
      return;
    }
    if (old && !(position && samePlace(old, position))) {
      this._ask();
      if (this._joining) this._joining.fallback = position;
      return;
    }
    const recovered = !this._missed || old !== null;
    this._missed = false;
    this._position = position;
    this._tell("join", recovered, position);
  }

  _event(frame) {
    const join = this._joining;
    const { offset } = frame;
    if (join?.flying) join.held.push(frame);
    else if (offset === undefined || !this._position) this._show(frame, false, this._position);
    else if (join || offset <= this._position.offset) return; // the reply will bring it; it was here
    else if (offset > this._position.offset + 1) this._ask(); // something is missing: the reply brings this too
    else this._show(frame, false, this._position);
  }

  /** Move the position, and show an event that was not seen. */
  _show(frame, recovered, base) {
    const { offset, tag, id } = frame;
    if (offset !== undefined && base) this._position = { ...base, offset, tag };
    if (frame.skip) return;
    if (id !== undefined) {
      if (this._seen.has(id)) return;
      this._seen.add(id);
      if (this._seen.size > SEEN) this._seen.delete(this._seen.values().next().value);
    }
    this._client._show(frame, recovered, this);
  }

  _reset({ position = null }) {
    if (this._joining?.flying) {
      this._release(this._joining);
      this._joining.broken = true; // the reply is told as not recovered
      return;
    }
    this._position = position;
    this._tell("reset", false, position);
  }

  _left({ code, rejoin }) {
    const client = this._client;
    this.joined = false;
    this._missed = true;
    this._tell("left", false, this._position);
    if (this._joining?.flying) return; // its answer decides
    if (!rejoin || !this._wanted) {
      this._out(code, new RealtimeError(code ?? "left", `not in ${this.name} any more`));
      return;
    }
    const now = client._clock.now();
    this._lefts = now - this._leftAt < 60_000 ? this._lefts + 1 : 0;
    this._leftAt = now;
    client._after(`rejoin ${this.name}`, client._jitter(this._lefts), () => {
      if (!this._wanted) return;
      this._ask();
      if (this._tracked !== undefined) this._assert();
    });
  }

  /** Out of the group, and not to ask again. */
  _out(code, error) {
    this._forget();
    this._fail(error);
    this._ends.call(code);
    this._client._soon(); // events that waited for the join get the server's word
  }

  _forget() {
    if (this._joining) this._client._requests.remove(this._joining.item);
    this._joining = null;
    this._wanted = this.joined = false;
    this._tracked = undefined;
    this._version = this.count = null;
    this._diffs = [];
    this.presence.clear();
    for (const typing of this._typings.values()) typing._clear();
  }

  _departing() {
    const client = this._client;
    if (!this._leaving) return;
    if (client._events.items.some((item) => item.group === this.name && !item.settled)) return;
    this._leaving = false;
    this._forget();
    this._fail(new RealtimeError("left", `left ${this.name}`));
    client._groups.delete(this.name);
    const { name } = this;
    const frame = () => ({ type: "leave", group: name });
    if (!client._live) this._stay();
    else client._requests.push({ kind: "leave", name, frame, settle: () => this._stay() });
  }

  /** Whoever waits for `leave` need not wait any longer. */
  _stay() {
    this._leaving = false;
    for (const resolve of this._gone ?? []) resolve();
    this._gone = undefined;
  }

  _lost() {
    const join = this._joining;
    this._joining = null;
    if (this.joined) this._missed = true;
    this.joined = false;
    this._version = null;
    this._diffs = [];
    if (join) this._release(join);
  }

  _request(kind, frame) {
    const client = this._client;
    const item = { kind, group: this, frame: () => ({ ...frame, group: this.name }) };
    if (kind === "presence") item.held = () => this._wanted && !this.joined;
    item.promise = new Promise((resolve, reject) => {
      if (client.state === "closed") throw new RealtimeError("closed", "the connection is closed");
      if (kind === "track") frame.meta = this._tracked = client._copy(frame.meta);
      item.settle = (error, data) => {
        if (error && frame.meta && frame.meta === this._tracked) this._tracked = undefined;
        if (error) reject(error);
        else resolve(data);
      };
      client._requests.push(item);
    });
    return item.promise;
  }

  /** Say again who we are here, after a reconnect. */
  _assert(settle = nothing) {
    const meta = this._tracked;
    const told = (error, data) => {
      if (error && meta === this._tracked) this._tracked = undefined;
      settle(error, data);
    };
    this._client._requests.push({
      kind: "track",
      group: this,
      frame: () => ({ type: "track", group: this.name, meta }),
      settle: told,
    });
  }

  // Who is here, and what they whisper

  _presenceState({ version, members, after = null }) {
    const next = new Map(Object.entries(members));
    const joins = without(next, this.presence);
    const leaves = without(this.presence, next);
    this.presence.clear();
    for (const [key, who] of next) this.presence.set(key, who);
    this._version = version;
    this._partial = after !== null;
    this._stale = false;
    const diffs = this._diffs.sort((a, b) => a.version - b.version);
    this._diffs = [];
    this._changed(joins, leaves);
    for (const diff of diffs) this._presenceDiff(diff);
  }

  _presenceDiff(diff) {
    if (this._version === null) {
      this._diffs.push(diff); // its state is still to come
      if (this._diffs.length > 100) this._diffs.shift();
      return;
    }
    if (diff.version <= this._version) return;
    if (diff.version > this._version + 1 && !this._stale) {
      this._stale = true; // one is missing: take this one, and ask for a new state
      if (this._wanted) this._ask();
    }
    this._version = diff.version;
    const joins = new Map(Object.entries(diff.joins ?? {}));
    const leaves = new Map(Object.entries(diff.leaves ?? {}));
    for (const [key, { metas }] of leaves) this._metas(key, (kept) => lacking(kept, metas));
    for (const [key, { metas }] of joins) this._metas(key, (kept) => [...lacking(kept, metas), ...metas]);
    this._changed(joins, leaves);
  }

  _presenceCount({ count }) {
    if (count > 200 && this._version !== null) {
      this._version = null; // too many for diffs: what we know of them is not kept up any more
      if (!this._partial) this.presence.clear();
    }
    this.count = count;
    this._presences.call({ joins: new Map(), leaves: new Map(), count });
  }

  _metas(key, change) {
    const metas = change(this.presence.get(key)?.metas ?? []);
    if (metas.length) this.presence.set(key, { metas });
    else this.presence.delete(key);
  }

  _changed(joins, leaves) {
    if (!this._partial) this.count = this.presence.size;
    this._presences.call({ joins, leaves, count: this.count });
  }

  _whisper({ event, data = null, from, stop = false, expires_ms: expires }) {
    this._typings.get(event)?._heard(from, data, stop, expires);
    this._whispers.call(event, data, from, stop);
  }

  _hush(frame) {
    const client = this._client;
    if (!client._live || !this.joined || client._socket.bufferedAmount > 65_536) return false;
    if (client._doubt || client._single) return false; // a refusal must not be a whisper's
    client._write([client._made(frame).part]);
    return true;
  }
}

/** The metas that have none of the refs of others. */
function lacking(metas, others) {
  const refs = new Set(others.map((meta) => meta.ref));
  return metas.filter((meta) => !refs.has(meta.ref));
}

/** What one presence has and another has not. */
function without(these, those) {
  const rest = new Map();
  for (const [key, who] of these) {
    const metas = lacking(who.metas, those.get(key)?.metas ?? []);
    if (metas.length) rest.set(key, { metas });
  }
  return rest;
}

/** Who is typing, and that we are: said on the first key, again before it runs out, and ended when the keys rest. */
class Typing {
  constructor(group, event, { data = null, every = 2500, idle = 4000 }) {
    this.who = new Map();
    Object.assign(this, { _group: group, _event: event, _data: data, _every: every, _idle: idle });
    this._clock = group._client._clock;
    this._on = false;
    this._expiries = new Map();
    this._changes = new Callbacks();
  }

  /** To be called on each key. */
  start(data) {
    if (data !== undefined) this._data = data;
    this._pressed = this._clock.now();
    if (this._on) return;
    this._on = true;
    this._say();
  }

  stop() {
    if (!this._on) return;
    this._on = false;
    this._clock.clearTimeout(this._timer);
    this._group._hush({ type: "whisper", group: this._group.name, event: this._event, stop: true });
  }

  onChange(fn) {
    return this._changes.add(fn);
  }

  _say() {
    this._group.whisper(this._event, this._data);
    this._said = this._clock.now();
    this._wait();
  }

  _wait() {
    const now = this._clock.now();
    const rest = this._pressed + this._idle - now;
    const again = this._said + this._every - now;
    const next = () => (rest <= again ? this._rested() : this._say());
    this._timer = this._clock.setTimeout(next, Math.max(0, Math.min(rest, again)));
  }

  _rested() {
    if (this._pressed + this._idle <= this._clock.now()) this.stop();
    else this._wait();
  }

  _heard(from, data, stop, expires = 5000) {
    this._every = Math.min(this._every, Math.max(expires / 2, 100)); // also ours runs out as fast
    this._clock.clearTimeout(this._expiries.get(from));
    this._expiries.delete(from);
    if (stop) {
      if (this.who.delete(from)) this._changes.call(this.who);
      return;
    }
    const known = this.who.has(from) && this.who.get(from) === data;
    this.who.set(from, data);
    this._expiries.set(from, this._clock.setTimeout(() => this._heard(from, data, true), expires));
    if (!known) this._changes.call(this.who);
  }

  _clear() {
    for (const timer of this._expiries.values()) this._clock.clearTimeout(timer);
    this._expiries.clear();
    if (!this.who.size) return;
    this.who.clear();
    this._changes.call(this.who);
  }
}
