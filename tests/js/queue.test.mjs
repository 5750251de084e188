// Emitting: answers, order, retries, time-outs, and what a reload leaves.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Clock, comeBack, error, globally, MemoryStorage, open, outcome, reply, settle, start, welcome } from "./fakes.mjs";

const data = (frames) => frames.map((frame) => frame.data);
const SESSION = "s".repeat(22);

function emits(it, ...values) {
  return values.map((value) => {
    const said = it.rt.emit("say", value);
    said.catch(() => {});
    return said;
  });
}

test("an emit is answered with what the handler returned", async () => {
  const it = await open();
  const said = it.rt.emit("say", { text: "hello" }, { id: "one", group: "g" });
  assert.equal(it.rt.pending, 1);
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame, { type: "event", id: "one", event: "say", group: "g", data: { text: "hello" }, ref: frame.ref });
  it.socket.say(reply(frame, { stored: 17 }));
  assert.deepEqual(await said, { stored: 17 });
  assert.equal(it.rt.pending, 0);
});

test("each emit has an id of its own, and data is null where there is none", async () => {
  const it = await open();
  it.rt.emit("a");
  it.rt.emit("b", undefined);
  await settle();
  const frames = it.socket.frames();
  assert.match(frames[0].id, /^[\w-]{22}$/);
  assert.notEqual(frames[0].id, frames[1].id);
  assert.deepEqual(data(frames), [null, null]);
});

test("what was emitted is what was said, whatever becomes of the object afterwards", async () => {
  const it = start();
  const draft = { text: "first" };
  it.rt.emit("say", draft);
  draft.text = "second";
  await settle();
  await welcome(it);
  assert.deepEqual(data(it.socket.frames()), [{ text: "first" }]);
});

test("emits of one moment are one batch, and the next moment does not wait for its answer", async () => {
  const it = await open();
  emits(it, 1, 2, 3);
  await settle();
  emits(it, 4);
  await settle();
  assert.deepEqual(it.socket.messages().map(data), [[1, 2, 3], [4]]);
});

test("answers find their emits in any order, and an answer that nobody waits for is nothing", async () => {
  const it = await open();
  const said = emits(it, 1, 2);
  await settle();
  const [one, two] = it.socket.frames();
  it.socket.say(reply({ ref: 99 }), reply(two, "b"), reply(one, "a"), reply(one, "again"));
  assert.deepEqual(await Promise.all(said), ["a", "b"]);
});

test("a permanent error rejects with its code and says which event it was", async () => {
  const it = await open();
  const said = it.rt.emit("say", 1, { id: "x" });
  await settle();
  it.socket.say(error(it.socket.frames()[0], "unknown_event"));
  await assert.rejects(said, { name: "RealtimeError", code: "unknown_event", temporary: false, event: "say", id: "x" });
  assert.equal(it.rt.pending, 0);
});

test("data that cannot be said rejects at once", async () => {
  const it = await open();
  const loop = {};
  loop.loop = loop;
  await assert.rejects(it.rt.emit("say", loop), TypeError);
  assert.equal(it.rt.pending, 0);
});

test("an event that no message can hold is refused here, and those around it are not", async () => {
  const it = await open({ welcome: { max_size: 300 } });
  let deep = null;
  for (let level = 0; level < 70; level++) deep = [deep];
  const said = emits(it, 1, "x".repeat(400), 2, deep);
  await settle();
  assert.deepEqual(data(it.socket.frames()), [1, 2]);
  assert.equal((await outcome(said[1])).code, "too_large");
  assert.equal((await outcome(said[3])).code, "too_large");
});

test("a batch stays below the bounds of a message: bytes and values", async () => {
  const bytes = await open({ welcome: { max_size: 500 } });
  emits(bytes, ..."abcdef".split("").map((letter) => letter.repeat(100)));
  await settle();
  assert.equal(bytes.socket.sent.length, 1);
  assert.ok(bytes.socket.sent[0].length <= 500);
  assert.equal(bytes.socket.frames().length, 2);

  const values = await open();
  emits(values, ...Array.from({ length: 8 }, () => Array(1500).fill(0)));
  await settle();
  assert.equal(values.socket.frames().length, 3);
});

test("letters of several bytes are counted as such", async () => {
  const it = await open({ welcome: { max_size: 300 } });
  const [said] = emits(it, "ü".repeat(150));
  await settle();
  assert.equal((await outcome(said)).code, "too_large");
});

// The window

test("no more than the window is unanswered; the rest waits for all of it and goes on as a batch", async () => {
  const it = await open({ welcome: { window: 3 } });
  emits(it, 1, 2, 3, 4, 5, 6, 7);
  await settle();
  let frames = it.socket.frames();
  assert.deepEqual(data(frames), [1, 2, 3]);
  it.socket.say(reply(frames[0]), reply(frames[1]));
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  it.socket.say(reply(frames[2]));
  await settle();
  frames = it.socket.frames();
  assert.deepEqual(data(frames), [4, 5, 6]);
  it.socket.say(frames.map((frame) => reply(frame)));
});

test("joins and other requests count for the window as well", async () => {
  const it = await open({ welcome: { window: 3 } });
  it.rt.join("a");
  it.rt.join("b");
  emits(it, 1, 2, 3);
  await settle();
  const frames = it.socket.frames();
  assert.deepEqual(frames.map(({ type }) => type), ["join", "join", "event"]);
});

test("the queue has an end: the new one is refused, and no old one", async () => {
  const it = start({ queue: 2 });
  const said = emits(it, 1, 2, 3);
  assert.equal((await outcome(said[2])).code, "queue_full");
  await welcome(it);
  assert.deepEqual(data(it.socket.frames()), [1, 2]);
});

// Temporary errors

test("after a temporary error the client waits as long as it was told, and goes on with the first one refused", async () => {
  const it = await open();
  const said = emits(it, 1, 2, 3, 4);
  await settle();
  const [one, two, three, four] = it.socket.frames();
  emits(it, 5);
  await settle();
  const [five] = it.socket.frames();
  it.socket.say(reply(one), error(two, "rate_limited", 800), error(three, "skipped"), error(four, "skipped"));
  assert.equal(await outcome(said[1]), "pending");
  emits(it, 6);
  await it.clock.pass(5000);
  assert.deepEqual(it.socket.frames(), [], "what is in flight is waited for");
  it.socket.say(reply(five));
  await settle();
  const [again, ...none] = it.socket.frames();
  assert.deepEqual([again.data, again.id, none], [2, two.id, []], "as many as were accepted");
});

test("the wait of a temporary error is kept to the millisecond", async () => {
  const it = await open();
  emits(it, 1);
  await settle();
  it.socket.say(error(it.socket.frames()[0], "rate_limited", 800));
  await it.clock.pass(799);
  assert.deepEqual(it.socket.frames(), []);
  await it.clock.pass(1);
  assert.deepEqual(data(it.socket.frames()), [1]);
});

test("a batch grows twofold while all is accepted, up to the window, and after the last one emits go at once again", async () => {
  const it = await open({ welcome: { window: 8 } });
  emits(it, ...Array.from({ length: 30 }, (_, n) => n));
  await settle();
  const sizes = [];
  let frames = it.socket.frames();
  it.socket.say(error(frames[0], "rate_limited", 10), ...frames.slice(1).map((frame) => error(frame, "skipped")));
  for (;;) {
    await it.clock.pass(10);
    frames = it.socket.frames();
    if (!frames.length) break;
    sizes.push(frames.length);
    it.socket.say(frames.map((frame) => reply(frame)));
  }
  assert.deepEqual(sizes, [1, 2, 4, 8, 8, 7]);
  emits(it, "a");
  await settle();
  emits(it, "b");
  await settle();
  assert.equal(it.socket.messages().length, 2);
});

test("errors that do not say how long to wait are waited for with jitter that grows", async () => {
  const it = await open();
  emits(it, 1);
  await settle();
  const at = [it.clock.time];
  for (const code of ["busy", "unavailable", "unavailable"]) {
    it.socket.say(error(it.socket.frames()[0], code));
    for (let step = 0; it.socket.heard === it.socket.sent.length && step < 1000; step++) await it.clock.pass(10);
    at.push(it.clock.time);
  }
  assert.deepEqual(at.slice(1).map((time, i) => time - at[i]), [250, 500, 1000]);
});

test("a batch of which all is skipped is not sent again at once", async () => {
  const it = await open();
  emits(it, 1, 2);
  await settle();
  it.socket.say(it.socket.frames().map((frame) => error(frame, "skipped")));
  await it.clock.pass(249);
  assert.deepEqual(it.socket.frames(), []);
  await it.clock.pass(1);
  assert.deepEqual(data(it.socket.frames()), [1]);
});

test("a client that must be careful goes on when its refusals are forgiven, also while something else is slow", async () => {
  const it = await open({ welcome: { window: 100 } });
  it.rt.group("g").track({}).catch(() => {});
  emits(it, ...Array.from({ length: 40 }, (_, n) => n));
  await settle();
  const frames = it.socket.frames().filter(({ type }) => type === "event");
  it.socket.say(frames.map((frame) => error(frame, "not_joined")));
  await it.clock.pass(9000);
  const before = it.socket.frames().length;
  await it.clock.pass(2000);
  assert.ok(it.socket.frames().length > 0, `${before} before`);
});

/** When each of 200 events was answered by a server that answers all of them with one error. */
async function refusedWith(code) {
  const it = await open({ welcome: { window: 200 } });
  emits(it, ...Array.from({ length: 200 }, (_, n) => n));
  const at = [];
  for (let round = 0; round < 3000; round++) {
    await it.clock.pass(20);
    for (const frame of it.socket.frames()) {
      it.socket.say(error(frame, code));
      at.push(it.clock.time);
    }
  }
  return at;
}

test("refusals for good, the protocol's or the application's, stay below what a server bears", async () => {
  for (const code of ["not_joined", "too_many_groups", "declined", "http_404"]) {
    const at = await refusedWith(code);
    assert.equal(at.length, 200);
    for (const time of at) assert.ok(at.filter((other) => other > time - 10_000 && other <= time).length < 50);
  }
});

test("a bug of the server's is no refusal: it slows nothing down", async () => {
  const at = await refusedWith("internal");
  assert.equal(at.length, 200);
  assert.ok(at.at(-1) - at[0] < 1000);
});

test("a server that was asked too much is asked less after the reconnect", async () => {
  const it = await open();
  emits(it, ...Array.from({ length: 32 }, (_, n) => n));
  await settle();
  it.socket.frames();
  await comeBack(it, {}, 4003);
  assert.equal(it.socket.frames().length, 8);
  await comeBack(it, {}, 4003);
  assert.equal(it.socket.frames().length, 2);
  await comeBack(it);
  assert.equal(it.socket.frames().length, 2, "a lost line says nothing about that");
});

// Losing the connection

test("what was emitted while away is sent after the welcome, in order", async () => {
  const it = start();
  emits(it, 1, 2);
  await settle();
  emits(it, 3);
  assert.equal(it.rt.pending, 3);
  await welcome(it);
  assert.deepEqual(it.socket.messages().map(data), [[1, 2, 3]]);
});

test("what was sent and not answered is sent again with the same id, before what came later", async () => {
  const it = await open();
  const said = emits(it, 1, 2);
  await settle();
  const before = it.socket.frames();
  it.socket.say(reply(before[0], "done"));
  it.socket.drop();
  emits(it, 3);
  await it.clock.pass(20_000);
  await welcome(it);
  const after = it.socket.frames();
  assert.deepEqual(data(after), [2, 3]);
  assert.equal(after[0].id, before[1].id);
  assert.notEqual(after[0].ref, before[1].ref);
  it.socket.say(reply({ ref: before[1].ref }, "old"), reply(after[0], "new"));
  assert.deepEqual(await Promise.all(said), ["done", "new"]);
});

test("after once_ms an event whose outcome is not known is not sent again, and one that was never sent is", async () => {
  const it = await open({ welcome: { once_ms: 60_000 } });
  const [sent] = emits(it, 1);
  await settle();
  it.socket.drop();
  const [unsent] = emits(it, 2);
  await it.clock.pass(59_999);
  assert.equal(await outcome(sent), "pending");
  await it.clock.pass(1);
  await welcome(it, { once_ms: 60_000 });
  assert.equal((await outcome(sent)).code, "outcome_unknown");
  assert.equal(await outcome(unsent), "pending");
  assert.deepEqual(data(it.socket.frames()), [2]);
});

test("before once_ms it is sent again", async () => {
  const it = await open({ welcome: { once_ms: 60_000 } });
  emits(it, 1);
  await settle();
  it.socket.drop();
  await it.clock.pass(59_000);
  await welcome(it, { once_ms: 60_000 });
  assert.deepEqual(data(it.socket.frames()), [1]);
});

test("an event that was refused for now was certainly not handled, and may wait longer than once_ms", async () => {
  const it = await open({ welcome: { once_ms: 60_000 } });
  emits(it, 1);
  await settle();
  it.socket.say(error(it.socket.frames()[0], "rate_limited", 70_000));
  await it.clock.pass(40_000);
  it.socket.say({ type: "ping" });
  it.socket.frames();
  await it.clock.pass(30_000);
  assert.deepEqual(data(it.socket.frames()), [1]);
});

test("an event that was once lost in flight stays uncertain, also if it is refused for now later", async () => {
  const it = await open({ welcome: { once_ms: 60_000 } });
  const [said] = emits(it, 1);
  await settle();
  await comeBack(it, { once_ms: 60_000 });
  it.socket.say(error(it.socket.frames()[0], "rate_limited", 40_000));
  await it.clock.pass(40_000);
  assert.deepEqual(data(it.socket.frames()), []);
  assert.equal((await outcome(said)).code, "outcome_unknown");
});

test("an event that was sent as somebody else is not sent again, nor is what somebody else has said", async () => {
  const it = await open({ welcome: { identity: "ada" } });
  const [sent] = emits(it, 1);
  await settle();
  it.socket.drop();
  const [unsent] = emits(it, 2);
  await it.clock.pass(20_000);
  await welcome(it, { identity: "bob" });
  assert.equal((await outcome(sent)).code, "outcome_unknown");
  assert.equal((await outcome(unsent)).code, "identity_changed");
  assert.deepEqual(it.socket.frames(), []);
});

test("what a guest wrote is said by whom the guest turns out to be", async () => {
  const it = await open({ welcome: { identity: "guest:1" } });
  it.socket.drop();
  emits(it, 1);
  await it.clock.pass(20_000);
  await welcome(it, { identity: "ada" });
  assert.deepEqual(data(it.socket.frames()), [1]);
});

// Time-outs

test("an emit without a timeout waits for ever", async () => {
  const it = start();
  const [said] = emits(it, 1);
  await it.clock.pass(10_000_000);
  assert.equal(await outcome(said), "pending");
});

test("a timeout takes what was never sent out of the queue", async () => {
  const it = start({ timeout: 100 });
  const said = it.rt.emit("say", 1);
  const other = it.rt.emit("say", 2, { timeout: 60_000 });
  other.catch(() => {});
  said.catch(() => {});
  await it.clock.pass(100);
  assert.equal((await outcome(said)).code, "timeout");
  assert.equal(it.rt.pending, 1);
  await welcome(it);
  assert.deepEqual(data(it.socket.frames()), [2]);
});

test("what was sent and timed out still counts for the window until it is answered, and is not sent again", async () => {
  const it = await open({ timeout: 100, welcome: { window: 1 } });
  const said = it.rt.emit("say", 1);
  said.catch(() => {});
  await settle();
  const [frame] = it.socket.frames();
  await it.clock.pass(100);
  assert.equal((await outcome(said)).code, "timeout");
  assert.equal(it.rt.pending, 0);
  emits(it, 2);
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  it.socket.say(reply(frame));
  await settle();
  assert.deepEqual(data(it.socket.frames()), [2]);
});

test("what timed out in flight is not sent again on the next connection, nor after a temporary error", async () => {
  const it = await open({ timeout: 100 });
  emits(it, 1, 2);
  await settle();
  const frames = it.socket.frames();
  await it.clock.pass(100);
  it.socket.say(error(frames[0], "rate_limited", 10));
  await it.clock.pass(1000);
  await comeBack(it);
  assert.deepEqual(it.socket.frames(), []);
});

// Groups

test("an event of a group that is being joined waits for the join, and those behind it wait with it", async () => {
  const it = await open();
  it.rt.join("g").emit("say", 1).catch(() => {});
  emits(it, 2);
  await settle();
  const [join] = it.socket.frames();
  assert.equal(join.type, "join");
  assert.equal(it.socket.sent.length, 1);
  it.socket.say(reply(join, { position: null, recovered: true, events: [] }));
  await settle();
  assert.deepEqual(data(it.socket.frames()), [1, 2]);
});

test("an event of a group that refuses us is answered by the server, not by us", async () => {
  const it = await open();
  const said = it.rt.join("g").emit("say", 1);
  await settle();
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  await settle();
  const [frame] = it.socket.frames();
  assert.equal(frame.type, "event");
  it.socket.say(error(frame, "not_joined"));
  assert.equal((await outcome(said)).code, "not_joined");
});

// Storage

const stored = (storage, extra = {}) => ({ storage, session: SESSION, ...extra });

test("the queue survives a reload, in order, and is empty when all is answered", async () => {
  const storage = new MemoryStorage();
  const before = start(stored(storage));
  emits(before, 1, 2, { three: [3] });
  await settle();
  const after = start(stored(storage));
  assert.equal(after.rt.pending, 3);
  emits(after, 4);
  await settle();
  await welcome(after);
  const frames = after.socket.frames();
  assert.deepEqual(data(frames), [1, 2, { three: [3] }, 4]);
  assert.equal(storage.length, 4);
  after.socket.say(frames.map((frame) => reply(frame)));
  await settle();
  assert.equal(storage.length, 0);
});

test("what was sent and unanswered before a reload is sent again with its id, within once_ms", async () => {
  for (const [age, again] of [[59_000, true], [60_000, false]]) {
    const storage = new MemoryStorage();
    const before = await open(stored(storage, { welcome: { once_ms: 60_000 } }));
    emits(before, 1);
    await settle();
    const [frame] = before.socket.frames();
    const after = start(stored(storage));
    const errors = [];
    after.rt.onError((failure) => errors.push(failure));
    after.clock.time = before.clock.time + age;
    await settle();
    await welcome(after, { once_ms: 60_000 });
    assert.deepEqual(after.socket.frames().map(({ id }) => id), again ? [frame.id] : []);
    assert.deepEqual(errors.map(({ code, id }) => [code, id]), again ? [] : [["outcome_unknown", frame.id]]);
  }
});

test("another session, another address and another key of the page have nothing to do with the queue", async () => {
  const storage = new MemoryStorage();
  storage.setItem("theme", "dark");
  const before = start(stored(storage));
  emits(before, 1);
  await settle();
  const other = start(stored(storage, { session: "t".repeat(22) }));
  assert.equal(other.rt.pending, 0);
  assert.equal(storage.length, 2);
});

test("the queue of a tab that is gone is cleared away after a week", async () => {
  const storage = new MemoryStorage();
  const before = start(stored(storage));
  emits(before, 1);
  await settle();
  const clock = new Clock();
  clock.time += 6 * 24 * 3_600_000;
  start(stored(storage, { session: "t".repeat(22), clock }));
  assert.equal(storage.length, 1);
  clock.time += 2 * 24 * 3_600_000;
  start(stored(storage, { session: "t".repeat(22), clock }));
  assert.equal(storage.length, 0);
});

test("a reload does not lengthen a timeout", async () => {
  const storage = new MemoryStorage();
  const before = start(stored(storage, { timeout: 1000 }));
  emits(before, 1);
  await settle();
  const after = start(stored(storage));
  const codes = [];
  after.rt.onError((failure) => codes.push(failure.code));
  await after.clock.pass(999);
  assert.deepEqual(codes, []);
  await after.clock.pass(1);
  assert.deepEqual(codes, ["timeout"]);
  assert.equal(storage.length, 0);
});

test("a storage that is full or broken costs the reload and not the event", async (t) => {
  const reported = [];
  globally(t, "reportError", (failure) => reported.push(failure.message));
  const storage = new MemoryStorage();
  storage.setItem = () => {
    throw new Error("quota");
  };
  const it = await open(stored(storage));
  const said = emits(it, 1, 2);
  await settle();
  const frames = it.socket.frames();
  it.socket.say(frames.map((frame) => reply(frame, "ok")));
  assert.deepEqual(await Promise.all(said), ["ok", "ok"]);
  assert.deepEqual(reported, ["quota"]);
});

test("an entry of the storage that cannot be read is dropped and told", async (t) => {
  const reported = [];
  globally(t, "reportError", (failure) => reported.push(failure));
  const storage = new MemoryStorage();
  storage.setItem(`starlette-rt|ws://test/ws|${SESSION}|5`, "{");
  const it = start(stored(storage));
  assert.equal(it.rt.pending, 0);
  assert.equal(storage.length, 0);
  assert.equal(reported.length, 1);
});

test("closed takes nothing any more: it is refused, not kept, and not said after a reconnect", async () => {
  for (const extra of [stored(new MemoryStorage()), {}]) {
    const it = await open(extra);
    const [before] = emits(it, "before");
    it.rt.close();
    const [after] = emits(it, "after");
    const tracked = it.rt.group("g").track({});
    assert.deepEqual([(await outcome(before)).code, (await outcome(after)).code], ["closed", "closed"]);
    assert.equal((await outcome(tracked)).code, "closed");
    assert.equal(it.rt.pending, 0);
    assert.equal(extra.storage?.length, extra.storage && 1);
    it.rt.reconnect();
    await settle();
    await welcome(it);
    assert.deepEqual(data(it.socket.frames()), extra.storage ? ["before"] : []);
  }
});

test("what a full storage did not take is not called kept", async (t) => {
  globally(t, "reportError", () => {});
  const storage = new MemoryStorage();
  storage.setItem = () => {
    throw new Error("quota");
  };
  const it = await open(stored(storage));
  const [sent] = emits(it, 1);
  await settle();
  const [unsent] = emits(it, 2);
  it.rt.close();
  assert.equal((await outcome(sent)).code, "outcome_unknown");
  assert.match((await outcome(unsent)).message, /not answered/);
});

test("what is closed with a storage is kept in it, and goes on after a reconnect", async () => {
  const storage = new MemoryStorage();
  const it = await open(stored(storage));
  const [sent] = emits(it, 1);
  await settle();
  const [unsent] = emits(it, 2);
  it.rt.close();
  assert.equal((await outcome(sent)).code, "closed");
  assert.match((await outcome(unsent)).message, /kept in the storage/);
  assert.equal(it.rt.pending, 0);
  it.rt.reconnect();
  await settle();
  await welcome(it);
  assert.deepEqual(data(it.socket.frames()), [1, 2]);
});
