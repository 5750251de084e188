// Opening, staying and coming back.

import assert from "node:assert/strict";
import { test } from "node:test";

import { connect, RealtimeError } from "../../starlette_rt/statics/starlette-rt.js";
import { Clock, comeBack, globally, MemoryStorage, open, outcome, reply, seeded, settle, sockets, start, welcome } from "./fakes.mjs";

test("the handshake offers the protocol, the session and the token, and the welcome opens", async () => {
  const it = start({ token: "abc", session: "x".repeat(22) });
  assert.equal(it.rt.state, "connecting");
  await settle();
  assert.deepEqual(it.socket.protocols, ["rt.v1.json", `rt.session.${"x".repeat(22)}`, "rt.token.abc"]);
  it.socket.open();
  assert.equal(it.rt.state, "connecting");
  it.socket.say({ type: "welcome", connection: "c9", identity: "ada", window: 4, max_size: 1000 });
  assert.equal(it.rt.state, "open");
  assert.equal(it.rt.identity, "ada");
  assert.equal(it.rt.connection, "c9");
  assert.equal(it.rt.session, "x".repeat(22));
});


test("an address of a page becomes one of its WebSocket", async (t) => {
  globally(t, "location", new URL("https://shop.example/page?x=1#top"));
  const urls = ["/ws", "ws://a/b", "http://a/b", "https://a/b?ticket=1", "wss://a/b#c"].map((url) => {
    const it = start();
    const rt = connect(url, { WebSocket: it.WebSocket, clock: it.clock });
    return { it, rt };
  });
  await settle();
  const opened = urls.map(({ it }) => it.WebSocket.all.map((socket) => socket.url).find((url) => url !== "ws://test/ws"));
  assert.deepEqual(opened, [
    "wss://shop.example/ws",
    "ws://a/b",
    "ws://a/b",
    "wss://a/b?ticket=1",
    "wss://a/b",
  ]);
});

test("a relative address without a page, a malformed session and a missing WebSocket are told at once", () => {
  const clock = new Clock();
  assert.throws(() => connect("/ws", { WebSocket: sockets(), clock }), TypeError);
  assert.throws(() => connect("ws://a", { WebSocket: sockets(), clock, session: "short" }), /22 to 64/);
});

test("a page without a WebSocket is told so", (t) => {
  globally(t, "WebSocket", undefined);
  assert.throws(() => connect("ws://a", { clock: new Clock() }), /no WebSocket/);
});

test("a session is made once per tab and survives a reload", async (t) => {
  globally(t, "sessionStorage", new MemoryStorage());
  const first = start();
  const second = start();
  assert.match(first.rt.session, /^[\w-]{22}$/);
  assert.equal(second.rt.session, first.rt.session);
  globalThis.sessionStorage.map.clear();
  assert.notEqual(start().rt.session, first.rt.session);
});

test("without a sessionStorage each client is another guest", () => {
  assert.notEqual(start().rt.session, start().rt.session);
});

test("frames before the welcome are not listened to", async () => {
  const it = start();
  const heard = [];
  it.rt.on("notice", (data) => heard.push(data));
  await settle();
  it.socket.open();
  it.socket.say({ type: "event", event: "notice", data: 1 });
  await welcome(it);
  it.socket.say({ type: "event", event: "notice", data: 2 });
  assert.deepEqual(heard, [2]);
});

test("a server that does not echo the protocol is told apart, and not asked again", async () => {
  for (const echoed of ["", "rt.plain", "rt.v1.msgpack"]) {
    const it = start();
    const errors = [];
    it.rt.onError((error) => errors.push(error));
    await settle();
    it.socket.open(echoed);
    assert.equal(it.rt.state, "closed");
    assert.match(it.states.at(-1).reason, /ws:\/\/test\/ws does not speak rt\.v1\.json/);
    assert.match(errors[0].message, /does not speak/);
    await it.clock.pass(120_000);
    assert.equal(it.WebSocket.all.length, 1);
  }
});

test("a socket that cannot be made closes with what it said", async () => {
  class Broken {
    constructor() {
      throw new SyntaxError("bad subprotocol");
    }
  }
  const it = start({ WebSocket: Broken, token: "with space" });
  await settle();
  assert.equal(it.rt.state, "closed");
  assert.match(it.states.at(-1).reason, /bad subprotocol/);
});

test("a handshake without a welcome is given up in time", async () => {
  const it = start();
  await settle();
  it.socket.open();
  await it.clock.pass(19_999);
  assert.equal(it.rt.state, "connecting");
  await it.clock.pass(1);
  assert.equal(it.rt.state, "waiting");
  assert.match(it.states.at(-1).reason, /no welcome/);
  assert.notEqual(it.WebSocket.all[0].closed, null);
});

test("a token that never comes counts as a handshake that takes too long", async () => {
  const it = start({ token: () => new Promise(() => {}) });
  await it.clock.pass(20_000);
  assert.equal(it.rt.state, "waiting");
});

test("a token function is asked at each connect, and what it throws is a failed attempt", async () => {
  const tokens = ["one", new Error("no network"), "two"];
  const it = start({
    token: async () => {
      const next = tokens.shift();
      if (next instanceof Error) throw next;
      return next;
    },
  });
  await settle();
  assert.ok(it.socket.protocols.includes("rt.token.one"));
  await welcome(it);
  it.socket.drop();
  await it.clock.pass(250);
  assert.equal(it.rt.state, "waiting");
  assert.match(it.states.at(-1).reason, /no token: no network/);
  assert.equal(it.WebSocket.all.length, 1);
  await it.clock.pass(20_000);
  assert.ok(it.socket.protocols.includes("rt.token.two"));
});

test("a fatal error of the token function closes, and a plain one does not", async () => {
  const fatal = start({
    token: () => {
      throw Object.assign(new Error("logged out"), { fatal: true });
    },
  });
  const plain = start({
    token: () => {
      throw new Error("logged out");
    },
  });
  await settle();
  assert.equal(fatal.rt.state, "closed");
  assert.match(fatal.states.at(-1).reason, /logged out/);
  assert.equal(plain.rt.state, "waiting");
});

test("no token, an empty one and a function that has none are guests", async () => {
  for (const token of [undefined, "", null, () => null, async () => undefined]) {
    const it = start({ token });
    await settle();
    assert.equal(it.socket.protocols.length, 2, String(token));
  }
});

test("a token that comes late for an attempt that is over opens nothing", async () => {
  const gates = [];
  const it = start({ token: () => new Promise((resolve) => gates.push(resolve)) });
  await it.clock.pass(20_000);
  await it.clock.pass(20_000);
  gates[0]("late");
  await settle();
  assert.equal(it.WebSocket.all.length, 0);
  gates[1]("right");
  await settle();
  assert.equal(it.WebSocket.all.length, 1);
});

// Waiting between attempts

/** Whether waits are spread over all of what they may be; what one must not do at its cap is to stand still. */
function spread(waits, bound) {
  const parts = new Set(waits.map((wait) => Math.min(3, Math.floor((4 * wait) / bound))));
  return waits.every((wait) => wait >= 0 && wait <= bound) && parts.size === 4;
}

async function waitsAfter(failures, clients, options = {}) {
  const random = seeded(7);
  const waits = [];
  for (let client = 0; client < clients; client++) {
    const it = start({ ...options, clock: new Clock(random) });
    await settle();
    for (let failure = 0; failure < failures; failure++) {
      it.socket.drop();
      if (failure < failures - 1) await it.clock.pass(20_000);
    }
    waits.push(it.states.at(-1).retryIn);
  }
  return waits;
}

test("waits are jittered from the first on, and at the cap as well", async () => {
  assert.ok(spread(await waitsAfter(1, 40), 500));
  assert.ok(spread(await waitsAfter(3, 40), 2000));
  assert.ok(spread(await waitsAfter(9, 40), 20_000));
  assert.ok(spread(await waitsAfter(3, 40, { backoff: { base: 10, cap: 30 } }), 30));
});

test("jitter that is applied before the cap would be found out", () => {
  const random = seeded(7);
  const lockStep = Array.from({ length: 40 }, () => Math.min(20_000, random() * 500 * 2 ** 9));
  assert.ok(!spread(lockStep, 20_000));
});

test("a thousand failures do not make the wait infinite", async () => {
  const it = start({ backoff: { base: 1, cap: 2 } });
  await settle();
  for (let failure = 0; failure < 1100; failure++) {
    it.socket.drop();
    it.rt.reconnect();
    await settle();
  }
  it.socket.drop();
  assert.equal(it.states.at(-1).retryIn, 1);
});

test("a stable while forgets the failures before it, and a short one does not", async () => {
  const it = start();
  await settle();
  for (let failure = 0; failure < 4; failure++) {
    it.socket.drop();
    await it.clock.pass(20_000);
  }
  await welcome(it);
  await it.clock.pass(9000);
  it.socket.drop();
  assert.equal(it.states.at(-1).retryIn, 0.5 * 500 * 2 ** 4);
  await it.clock.pass(20_000);
  await welcome(it);
  await it.clock.pass(10_000);
  it.socket.drop();
  assert.equal(it.states.at(-1).retryIn, 250);
});

test("states say how a connection was lost and when the next attempt is", async () => {
  const it = await open();
  it.socket.drop(1012, "service restart");
  assert.deepEqual(it.states.at(-1), { state: "waiting", code: 1012, reason: "service restart", retryIn: 250 });
  await it.clock.pass(250);
  assert.equal(it.rt.state, "connecting");
  await welcome(it);
  assert.deepEqual(it.states.map(({ state }) => state), ["open", "waiting", "connecting", "open"]);
});

test("a goodbye says how long to stay away, and jitter is added to it", async () => {
  const it = await open();
  it.socket.say({ type: "goodbye", code: 1012, reason: "service restart", retry_after_ms: 1730 });
  assert.equal(it.rt.state, "open");
  it.socket.drop(1006);
  const { code, reason, retryIn } = it.states.at(-1);
  assert.deepEqual({ code, reason, retryIn }, { code: 1012, reason: "service restart", retryIn: 1730 + 250 });
  await it.clock.pass(1979);
  assert.equal(it.WebSocket.all.length, 1);
  await it.clock.pass(1);
  assert.equal(it.WebSocket.all.length, 2);
});

test("a goodbye does not hold for the connection after the next", async () => {
  const it = await open();
  it.socket.say({ type: "goodbye", code: 1012, reason: "r", retry_after_ms: 5000 });
  await comeBack(it);
  it.socket.drop(1006);
  assert.equal(it.states.at(-1).code, 1006);
  assert.ok(it.states.at(-1).retryIn <= 1000);
});

test("close codes say whether to come back", async () => {
  const back = [1001, 1005, 1006, 1011, 1012, 4000, 4001, 4002, 4003, 4004, 4005, 4006, 4007, 4321, 4499, 3000];
  const stay = [1000, 1003, 4500, 4501, 4502, 4503, 4999];
  for (const code of [...back, ...stay]) {
    const it = await open();
    it.socket.drop(code, "because");
    await it.clock.pass(60_000);
    assert.equal(it.WebSocket.all.length > 1, back.includes(code), String(code));
    if (!stay.includes(code)) continue;
    assert.deepEqual(it.states.at(-1), { state: "closed", code, reason: "because", retryIn: null });
    assert.equal((await outcome(it.rt.emit("say"))).code, "closed");
  }
});

test("a token that has expired is fetched anew at once, but only once in a row", async () => {
  let count = 0;
  const it = await open({ token: () => `t${++count}` });
  it.socket.drop(4001);
  assert.equal(it.states.at(-1).retryIn, 0);
  await it.clock.pass(0);
  assert.ok(it.socket.protocols.includes("rt.token.t2"));
  it.socket.drop(4001);
  assert.equal(it.states.at(-1).retryIn, 250);
  await it.clock.pass(250);
  await welcome(it);
  await it.clock.pass(10_000);
  it.socket.drop(4001);
  assert.equal(it.states.at(-1).retryIn, 0);
});

// Staying

test("a ping is answered with a pong", async () => {
  const it = await open();
  it.socket.say({ type: "ping" });
  assert.deepEqual(it.socket.frames(), [{ type: "pong" }]);
});

test("a server that is not heard for ping_interval and ping_timeout together is given up", async () => {
  const it = await open();
  await it.clock.pass(30_000);
  it.socket.say({ type: "ping" });
  await it.clock.pass(44_999);
  assert.equal(it.rt.state, "open");
  await it.clock.pass(1);
  assert.equal(it.rt.state, "waiting");
  assert.notEqual(it.WebSocket.all[0].closed, null);
});

test("frames and fields that nobody knows are ignored, and broken ones break nothing", async (t) => {
  const reported = [];
  globally(t, "reportError", (error) => reported.push(error));
  const it = await open();
  const heard = [];
  it.rt.on("notice", (data) => heard.push(data));
  it.socket.say({ type: "news", x: 1 }, null, 7, "x", { type: "presence_state", group: "g" }, { ref: 1 }, { type: "reply", ref: 99 });
  it.rt.group("g");
  it.socket.say({ type: "presence_state", group: "g" });
  it.socket.say({ type: "event", event: "notice", data: 1, colour: "red" });
  assert.deepEqual(heard, [1]);
  assert.equal(it.rt.state, "open");
  assert.equal(reported.length, 1);
});

test("a message that cannot be read held something: the client comes back to recover it", async () => {
  const it = await open();
  it.socket.onmessage({ data: "{" });
  assert.equal(it.rt.state, "waiting");
});

test("callbacks that throw or reject are reported and disturb nobody", async (t) => {
  const reported = [];
  globally(t, "reportError", (error) => reported.push(error.message));
  const it = await open();
  const heard = [];
  it.rt.on("notice", () => {
    throw new Error("one");
  });
  it.rt.on("notice", async () => {
    throw new Error("two");
  });
  it.rt.on("notice", (data) => heard.push(data));
  it.rt.onState(() => {
    throw new Error("three");
  });
  it.socket.say({ type: "event", event: "notice", data: 5 });
  await settle();
  it.socket.drop();
  assert.deepEqual(heard, [5]);
  assert.deepEqual(reported, ["one", "two", "three"]);
  assert.equal(it.rt.state, "waiting");
});

test("without reportError what is thrown goes to the console", async (t) => {
  const lines = [];
  t.mock.method(console, "error", (error) => lines.push(error.message));
  const it = await open();
  it.rt.on("notice", () => {
    throw new Error("one");
  });
  it.socket.say({ type: "event", event: "notice" });
  assert.deepEqual(lines, ["one"]);
});

test("each on… returns a function that ends it, also where a function was given twice", async () => {
  const it = await open();
  const heard = [];
  const fn = (data) => heard.push(data);
  const off = it.rt.on("notice", fn);
  it.rt.on("notice", fn);
  const say = (data) => it.socket.say({ type: "event", event: "notice", data });
  say(1);
  off();
  off();
  say(2);
  assert.deepEqual(heard, [1, 1, 2]);
});

// The page around it

function page(t) {
  const target = new EventTarget();
  const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  const navigator = { onLine: true };
  globally(t, "addEventListener", target.addEventListener.bind(target));
  globally(t, "removeEventListener", target.removeEventListener.bind(target));
  globally(t, "document", document);
  globally(t, "navigator", navigator);
  const say = (name, fields = {}) => target.dispatchEvent(Object.assign(new Event(name), fields));
  return {
    navigator,
    say,
    online(is) {
      navigator.onLine = is;
      say(is ? "online" : "offline");
    },
    show(state) {
      document.visibilityState = state;
      document.dispatchEvent(new Event("visibilitychange"));
    },
  };
}

test("an offline page says so, and coming online is tried at once", async (t) => {
  const around = page(t);
  const it = await open();
  around.online(false);
  assert.equal(it.rt.state, "open", "a socket that still works is not given up");
  it.socket.drop();
  assert.equal(it.rt.state, "offline");
  around.online(true);
  await settle();
  assert.equal(it.rt.state, "connecting");
  assert.equal(it.WebSocket.all.length, 2);
});

test("a client that waits becomes offline with its page", async (t) => {
  const around = page(t);
  const it = await open();
  it.socket.drop();
  assert.equal(it.rt.state, "waiting");
  around.online(false);
  assert.equal(it.rt.state, "offline");
});

test("a browser that wrongly believes to be offline is tried all the same", async (t) => {
  const around = page(t);
  const it = await open();
  around.navigator.onLine = false;
  it.socket.drop();
  await it.clock.pass(20_000);
  assert.equal(it.rt.state, "offline");
  assert.equal(it.WebSocket.all.length, 2);
  await welcome(it);
  assert.equal(it.rt.state, "open");
});

test("what the server asked for is waited for also when the page comes online", async (t) => {
  const around = page(t);
  const it = await open();
  it.socket.say({ type: "goodbye", code: 1012, reason: "", retry_after_ms: 5000 });
  it.socket.drop();
  await it.clock.pass(1000);
  around.say("online");
  await it.clock.pass(3999);
  assert.equal(it.WebSocket.all.length, 1);
  await it.clock.pass(1);
  assert.equal(it.WebSocket.all.length, 2);
});

test("a page that is looked at again tries at once, and one that is hidden does not", async (t) => {
  const around = page(t);
  const it = await open();
  it.socket.drop();
  around.show("hidden");
  await settle();
  assert.equal(it.WebSocket.all.length, 1);
  around.show("visible");
  await settle();
  assert.equal(it.WebSocket.all.length, 2);
});

test("a page that is looked at after a long sleep finds its dead connection at once", async (t) => {
  const around = page(t);
  const it = await open();
  it.clock.time += 45_000; // timers do not run in a sleeping machine
  around.show("visible");
  await settle();
  assert.equal(it.WebSocket.all.length, 2);
});

test("a living connection survives that its page is looked at", async (t) => {
  const around = page(t);
  const it = await open();
  it.clock.time += 44_000;
  around.show("visible");
  assert.equal(it.rt.state, "open");
});

test("a page from the browser's cache connects again", async (t) => {
  const around = page(t);
  const it = await open();
  around.say("pageshow", { persisted: false });
  assert.equal(it.rt.state, "open");
  around.say("pageshow", { persisted: true });
  await settle();
  assert.equal(it.rt.state, "connecting");
  assert.equal(it.WebSocket.all.length, 2);
});

test("a closed client hears nothing of its page any more, until it is asked to reconnect", async (t) => {
  const around = page(t);
  const it = await open();
  it.rt.close();
  assert.equal(it.rt.state, "closed");
  assert.equal(it.socket.closed, 1000);
  around.say("online");
  around.show("visible");
  around.say("pageshow", { persisted: true });
  await it.clock.pass(60_000);
  assert.equal(it.WebSocket.all.length, 1);
  it.rt.reconnect();
  await settle();
  await welcome(it);
  assert.equal(it.rt.state, "open");
  it.socket.drop();
  around.say("online");
  await settle();
  assert.equal(it.WebSocket.all.length, 3);
});

test("reconnect tries now, whatever the server asked for", async () => {
  const it = await open();
  it.socket.say({ type: "goodbye", code: 1012, reason: "", retry_after_ms: 60_000 });
  it.socket.drop();
  it.rt.reconnect();
  await settle();
  assert.equal(it.WebSocket.all.length, 2);
  it.rt.reconnect();
  await settle();
  assert.equal(it.WebSocket.all.length, 2, "an attempt is not disturbed");
  await welcome(it);
  it.rt.reconnect();
  await settle();
  assert.equal(it.WebSocket.all.length, 3, "an open connection is given up for a new one");
});

test("closing ends what waits, and makes no noise about promises that nobody looks at", async () => {
  const it = await open();
  const sent = it.rt.emit("say", 1);
  await settle();
  const unsent = it.rt.emit("say", 2);
  it.rt.join("g").track({});
  it.rt.emit("nobody looks");
  it.rt.close();
  assert.equal((await outcome(sent)).code, "outcome_unknown");
  assert.equal((await outcome(unsent)).code, "closed");
  assert.equal(it.rt.pending, 0);
  assert.equal(it.clock.timers.size, 0);
});

// Tokens

const refreshes = (it) => it.socket.frames().filter(({ type }) => type === "refresh");

test("a token is renewed before it runs out, and the next one as well", async () => {
  let count = 0;
  const it = await open({ token: async () => `t${++count}`, welcome: { ttl_ms: 100_000, ping_interval_ms: null, ping_timeout_ms: null } });
  await it.clock.pass(89_999);
  assert.deepEqual(refreshes(it), []);
  await it.clock.pass(1);
  const [refresh] = refreshes(it);
  assert.equal(refresh.token, "t2");
  it.socket.say(reply(refresh, { ttl_ms: 20_000 }));
  await it.clock.pass(15_000);
  assert.equal(refreshes(it)[0].token, "t3");
});

test("a short token is renewed half-way", async () => {
  const it = await open({ token: () => "t", welcome: { ttl_ms: 6000 } });
  await it.clock.pass(2999);
  assert.equal(refreshes(it).length, 0);
  await it.clock.pass(1);
  assert.equal(refreshes(it).length, 1);
});

test("a token for ever, and one that is only a string, are not renewed", async () => {
  const quiet = { ping_interval_ms: null, ping_timeout_ms: null };
  const forEver = await open({ token: () => "t", welcome: { ttl_ms: null, ...quiet } });
  const string = await open({ token: "t", welcome: { ttl_ms: 10_000, ...quiet } });
  await forEver.clock.pass(10_000_000);
  await string.clock.pass(10_000_000);
  assert.equal(refreshes(forEver).length + refreshes(string).length, 0);
});

test("a refresh that fails is tried again, with more and more patience", async () => {
  let fails = true;
  const it = await open({ token: async () => "t", welcome: { ttl_ms: 100_000, ping_interval_ms: null, ping_timeout_ms: null } });
  const at = [];
  await it.clock.pass(90_000);
  for (let round = 0; round < 4; round++) {
    let asked = refreshes(it);
    for (let step = 0; !asked.length && step < 400; step++) {
      await it.clock.pass(50);
      asked = refreshes(it);
    }
    at.push(it.clock.time);
    if (round === 3) fails = false;
    if (fails) it.socket.say({ type: "error", ref: asked[0].ref, code: "forbidden", message: "", temporary: false });
    else it.socket.say(reply(asked[0], { ttl_ms: null }));
  }
  assert.deepEqual(at.slice(1).map((time, i) => time - at[i]), [1250, 1500, 2000]);
  await it.clock.pass(100_000);
  assert.equal(refreshes(it).length, 0);
  assert.equal(it.rt.state, "open");
});

test("a token function that fails at a refresh is asked again, unless its error is fatal", async () => {
  for (const fatal of [false, true]) {
    let calls = 0;
    const it = await open({
      token: async () => {
        calls += 1;
        if (calls === 2) throw Object.assign(new Error("x"), { fatal });
        return "t";
      },
      welcome: { ttl_ms: 20_000 },
    });
    await it.clock.pass(19_000);
    assert.equal(refreshes(it).length, fatal ? 0 : 1);
    assert.equal(it.rt.state, "open");
  }
});

// Errors, latency, MessagePack

test("errors without a ref are told, and their patience holds for all", async () => {
  const it = await open();
  const errors = [];
  it.rt.onError((error) => errors.push(error));
  it.socket.say({ type: "error", code: "rate_limited", message: "too many", temporary: true, retry_after_ms: 800 });
  assert.ok(errors[0] instanceof RealtimeError && errors[0] instanceof Error);
  const { code, message, temporary, retryAfter } = errors[0];
  assert.deepEqual({ code, message, temporary, retryAfter }, { code: "rate_limited", message: "too many", temporary: true, retryAfter: 800 });
  it.rt.emit("say");
  await it.clock.pass(799);
  assert.equal(it.socket.frames().length, 0);
  await it.clock.pass(1);
  assert.equal(it.socket.frames().length, 1);
});

test("the latency is that of answered round trips, smoothed", async () => {
  const it = await open();
  const told = [];
  it.rt.onLatency((ms) => told.push(ms));
  assert.equal(it.rt.latency, null);
  for (const ms of [100, 200]) {
    it.rt.emit("say");
    await settle();
    it.clock.time += ms;
    it.socket.say(reply(it.socket.frames()[0]));
    await settle();
  }
  assert.deepEqual(told, [100, 120]);
  assert.equal(it.rt.latency, 120);
});

/** Not MessagePack, but like it where it matters here: an array says its length in front and its parts follow. */
const codec = {
  encode(value) {
    const text = new TextEncoder().encode(JSON.stringify(value));
    return Uint8Array.from([0xd9, text.length >> 8, text.length & 255, ...text]);
  },
  decode(bytes) {
    let at = 0;
    let count = 1;
    const many = bytes[0] === 0xdc || (bytes[0] & 0xf0) === 0x90;
    if (bytes[0] === 0xdc) [count, at] = [(bytes[1] << 8) | bytes[2], 3];
    else if (many) [count, at] = [bytes[0] & 15, 1];
    const parts = [];
    while (parts.length < count) {
      const length = (bytes[at + 1] << 8) | bytes[at + 2];
      parts.push(JSON.parse(new TextDecoder().decode(bytes.slice(at + 3, at + 3 + length))));
      at += 3 + length;
    }
    assert.equal(at, bytes.length);
    return many ? parts : parts[0];
  },
};

test("with a codec the client speaks MessagePack in binary messages, batches and storage included", async () => {
  const storage = new MemoryStorage();
  const it = start({ codec, storage, session: "x".repeat(22) });
  await settle();
  assert.equal(it.socket.protocols[0], "rt.v1.msgpack");
  it.socket.open();
  const say = (frame) => it.socket.onmessage({ data: codec.encode(frame).buffer });
  say({ type: "welcome", identity: "ada", window: 32, max_size: 65_536 });
  for (const count of [1, 3, 20]) {
    for (let n = 0; n < count; n++) it.rt.emit("say", n);
    await settle();
    const frames = [].concat(codec.decode(it.socket.sent.at(-1)));
    assert.deepEqual(frames.map(({ data }) => data), [...Array(count).keys()]);
    for (const frame of frames) say(reply(frame));
  }
  assert.equal(storage.length, 0);
  it.rt.emit("keep", { text: "ü" }).catch(() => {});
  await settle();
  assert.equal(storage.length, 1);
  const later = start({ codec, storage, session: "x".repeat(22) });
  assert.equal(later.rt.pending, 1);
});

test("bytes are said as base64 in JSON", async () => {
  const it = await open();
  it.rt.emit("file", { part: Uint8Array.of(1, 2, 255) });
  await settle();
  assert.deepEqual(it.socket.frames()[0].data, { part: "AQL/" });
});

// What the server asks

test("a call of the server is answered with what the function returns, or with its error", async () => {
  const it = await open();
  it.rt.answer("confirm", async (data) => ({ agreed: data.sure }));
  it.rt.answer("decline", () => {
    throw new RealtimeError("declined", "not now");
  });
  it.rt.answer("break", () => {
    throw new Error("oops");
  });
  it.rt.answer("nothing", () => {});
  for (const [ref, event] of ["confirm", "decline", "break", "nothing", "unheard"].entries()) {
    it.socket.say({ type: "event", event, data: { sure: true }, ref });
    await settle();
  }
  assert.deepEqual(it.socket.frames(), [
    { type: "reply", ref: 0, data: { agreed: true } },
    { type: "error", ref: 1, code: "declined", message: "not now" },
    { type: "error", ref: 2, code: "internal", message: "oops" },
    { type: "reply", ref: 3, data: null },
    { type: "error", ref: 4, code: "unknown_event", message: "nothing here answers unheard" },
  ]);
});

test("an answer that is too large, or that cannot be said, is an error instead", async () => {
  const it = await open({ welcome: { max_size: 200 } });
  it.rt.answer("large", () => "x".repeat(300));
  it.rt.answer("loop", () => {
    const loop = {};
    return Object.assign(loop, { loop });
  });
  it.rt.answer("wordy", () => {
    throw new Error("x".repeat(100_000));
  });
  it.socket.say({ type: "event", event: "large", ref: 1 });
  await settle();
  it.socket.say({ type: "event", event: "loop", ref: 2 });
  await settle();
  assert.deepEqual(it.socket.frames().map(({ type, code }) => [type, code]), [["error", "too_large"], ["error", "internal"]]);
  it.socket.say({ type: "event", event: "wordy", ref: 3 });
  await settle();
  assert.ok(it.socket.sent.at(-1).length < 2000);
});

test("an answer is not said on another connection than the one that asked", async () => {
  const it = await open();
  let finish;
  it.rt.answer("confirm", () => new Promise((resolve) => (finish = resolve)));
  it.socket.say({ type: "event", event: "confirm", ref: 1 });
  await settle();
  await comeBack(it);
  finish(1);
  await settle();
  assert.deepEqual(it.socket.frames(), []);
});
