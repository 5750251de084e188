// What the tests of the client stand on: a clock that only they move, a socket that they speak for, and some waiting.
//
// The law of this file: no real time passes and nothing is random, unless a test hands in a seed.

import { connect } from "../../starlette_rt/statics/starlette-rt.js";

/** A clock whose time passes when told to; timers run in the order of their times. */
export class Clock {
  constructor(random = () => 0.5) {
    this.time = 1_000_000;
    this.timers = new Map();
    this.next = 1;
    this.now = () => this.time;
    this.random = random;
    this.setTimeout = (fn, ms) => {
      this.timers.set(this.next, { at: this.time + Math.max(0, ms), fn });
      return this.next++;
    };
    this.clearTimeout = (timer) => void this.timers.delete(timer);
  }

  /** Let time pass, and everything happen that was due. */
  async pass(ms) {
    const end = this.time + ms;
    for (;;) {
      await settle();
      const due = [...this.timers].filter(([, timer]) => timer.at <= end).sort((a, b) => a[1].at - b[1].at || a[0] - b[0]);
      if (!due.length) break;
      const [id, timer] = due[0];
      this.timers.delete(id);
      this.time = Math.max(this.time, timer.at);
      timer.fn();
    }
    this.time = end;
    await settle();
  }
}

/** Wait until all microtasks have run. */
export const settle = () => new Promise((resolve) => setImmediate(resolve));

/** Random numbers that are the same for the same seed. */
export function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A class of sockets that remembers its instances; `then(socket)` is called for each new one. */
export function sockets(then = () => {}) {
  class FakeSocket {
    static all = [];

    constructor(url, protocols) {
      Object.assign(this, { url, protocols, protocol: "", sent: [], heard: 0, closed: null, bufferedAmount: 0 });
      FakeSocket.all.push(this);
      then(this);
    }

    send(message) {
      if (this.closed !== null) throw new Error("closed");
      this.sent.push(message);
      this.onsent?.(message);
    }

    close(code = 1005) {
      if (this.closed === null) this.closed = code;
      this.onclosed?.(code);
    }

    // what the test says for the server

    open(protocol = this.protocols[0]) {
      this.protocol = protocol;
      this.onopen?.();
    }

    say(...frames) {
      this.onmessage?.({ data: JSON.stringify(frames.length === 1 ? frames[0] : frames) });
    }

    drop(code = 1006, reason = "") {
      this.closed ??= code;
      this.onclose?.({ code, reason });
    }

    // what it has heard

    /** The frames since the last call, batches taken apart. */
    frames() {
      return this.messages().flat();
    }

    /** The messages since the last call, each a list of frames. */
    messages() {
      const news = this.sent.slice(this.heard);
      this.heard = this.sent.length;
      return news.map((message) => [].concat(JSON.parse(message)));
    }
  }
  return FakeSocket;
}

export const WELCOME = {
  type: "welcome",
  connection: "c1",
  session: "s",
  identity: "ada",
  ping_interval_ms: 25_000,
  ping_timeout_ms: 20_000,
  ttl_ms: null,
  once_ms: 3_600_000,
  window: 32,
  max_size: 65_536,
};

/** A client with a fake clock and fake sockets. */
export function start(options = {}) {
  const clock = options.clock ?? new Clock();
  const WebSocket = options.WebSocket ?? sockets();
  const rt = connect("ws://test/ws", { ...options, clock, WebSocket });
  const states = [];
  rt.onState((state, info) => states.push({ state, ...info }));
  return {
    rt,
    clock,
    states,
    WebSocket,
    get socket() {
      return WebSocket.all.at(-1);
    },
  };
}

/** The same, already welcomed. */
export async function open(options = {}) {
  const it = start(options);
  await settle();
  await welcome(it, options.welcome);
  return it;
}

export async function welcome(it, fields = {}) {
  it.socket.open();
  it.socket.say({ ...WELCOME, ...fields });
  await settle();
}

/** Lose the connection and be welcomed on the next one. */
export async function comeBack(it, fields = {}, code = 1006) {
  it.socket.drop(code);
  await it.clock.pass(20_000);
  await welcome(it, fields);
}

export const reply = (frame, data = null) => ({ type: "reply", ref: frame.ref, data });

export const error = (frame, code, retry) => ({
  type: "error",
  ref: frame.ref,
  code,
  message: code,
  temporary: ["rate_limited", "busy", "skipped", "unavailable"].includes(code),
  ...(retry === undefined ? {} : { retry_after_ms: retry }),
});

/** What a promise has come to: its value, its error's code, or "pending". */
export async function outcome(promise) {
  return Promise.race([
    promise.then(
      (value) => ({ value }),
      (failure) => ({ code: failure.code, message: failure.message }),
    ),
    settle().then(() => "pending"),
  ]);
}

/** Replace a global for one test. */
export function globally(test, name, value) {
  const before = Object.getOwnPropertyDescriptor(globalThis, name);
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  test.after(() => {
    if (before) Object.defineProperty(globalThis, name, before);
    else delete globalThis[name];
  });
}

/** A Storage in memory. */
export class MemoryStorage {
  constructor() {
    this.map = new Map();
  }

  get length() {
    return this.map.size;
  }

  key(at) {
    return [...this.map.keys()][at] ?? null;
  }

  getItem(key) {
    return this.map.get(key) ?? null;
  }

  setItem(key, value) {
    this.map.set(key, String(value));
  }

  removeItem(key) {
    this.map.delete(key);
  }
}
