// What cannot be said, what a server refuses as a whole, and that nothing else suffers from it.
//
// The law of this file: a guilty one is refused alone, an innocent one never; there is an end to it on every way.

import assert from "node:assert/strict";
import { test } from "node:test";

import { connect } from "../../starlette_rt/statics/starlette-rt.js";
import { Clock, comeBack, error, MemoryStorage, open, outcome, reply, seeded, settle, sockets, start, welcome } from "./fakes.mjs";
import { Server } from "./server.mjs";

const HALF = "hi 👋".slice(0, 4); // ends with half of a character
const SESSION = "s".repeat(22);
const data = (frames) => frames.map((frame) => frame.data);
const types = (frames) => frames.map(({ type }) => type);
const numbers = (count) => Array.from({ length: count }, (_, n) => n);
const whole = (code = "bad_message") => ({ type: "error", code, message: "no", temporary: false });

function emits(it, ...values) {
  return values.map((value) => {
    const said = it.rt.emit("say", value);
    said.catch(() => {});
    return said;
  });
}

/** Answers all that is in flight with null; the frames that it has answered. */
async function answer(it) {
  const frames = it.socket.frames();
  it.socket.say(frames.map((frame) => reply(frame)));
  await settle();
  return frames;
}

// What cannot be said as it is

test("half a character is said as the sign for what is broken: in strings, keys and names", async () => {
  const it = await open();
  const said = it.rt.emit(HALF, { [HALF]: [HALF, "\udc4b"] }, { group: HALF });
  await settle();
  assert.doesNotMatch(it.socket.sent.at(-1), /\\ud/);
  const [frame] = it.socket.frames();
  const broken = "hi \ufffd";
  assert.deepEqual([frame.event, frame.group, frame.data], [broken, broken, { [broken]: [broken, "\ufffd"] }]);
  it.socket.say(reply(frame, "ok"));
  assert.equal(await said, "ok");
});

test("what only looks like half a character is said as it is", async () => {
  const it = await open();
  const values = ["👋", "\\ud83d", "\\\\ud83d", '"\\"ud83d', "\ud7ff\ue000", "\\u0041\n\u0007", "C:\\udata"];
  emits(it, ...values, HALF + "\\ud83d\\" + HALF);
  await settle();
  assert.deepEqual(data(it.socket.frames()), [...values, "hi \ufffd\\ud83d\\hi \ufffd"]);
});

test("half a character that a storage has kept is made whole when it is said", async () => {
  const storage = new MemoryStorage();
  storage.setItem(`starlette-rt|ws://test/ws|${SESSION}|5`, JSON.stringify({ event: "say", id: "x", data: HALF }));
  const it = await open({ storage, session: SESSION });
  assert.deepEqual(data(it.socket.frames()), ["hi \ufffd"]);
});

test("whispers, metas and answers are whole as well", async () => {
  const it = await open();
  const group = it.rt.join("g");
  await settle();
  it.socket.say(reply(it.socket.frames()[0], { position: null, recovered: true, events: [] }));
  await settle();
  group.track({ name: HALF }).catch(() => {});
  group.whisper("typing", HALF);
  it.rt.answer("confirm", () => HALF);
  it.socket.say({ type: "event", event: "confirm", ref: 1 });
  await settle();
  assert.equal(it.socket.sent.length, 4);
  for (const message of it.socket.sent) assert.doesNotMatch(message, /\\ud/);
});

test("what cannot be said at all is refused alone, and its neighbours leave and are kept", async () => {
  const loop = {};
  loop.loop = loop;
  const throws = { toJSON: () => { throw new Error("no"); } };
  const storage = new MemoryStorage();
  const it = await open({ storage });
  for (const unfit of [loop, 1n, () => {}, Symbol("s"), throws]) {
    const [before, refused, after] = emits(it, 1, unfit, 2);
    assert.equal(it.rt.pending, 2);
    await assert.rejects(refused, Error);
    assert.equal(storage.length, 2);
    assert.deepEqual(data(await answer(it)), [1, 2]);
    assert.deepEqual(await Promise.all([before, after]), [null, null]);
  }
  assert.equal(storage.length, 0);
});

const codec = {
  encode(value) {
    const text = JSON.stringify(value);
    if (text.includes("unfit")) throw new RangeError("a codec's reason");
    return new TextEncoder().encode(text);
  },
  decode: (bytes) => JSON.parse(new TextDecoder().decode(bytes)),
};

test("what a codec cannot say is refused alone, in the data as well as in a name", async () => {
  const it = start({ codec });
  await settle();
  it.socket.open();
  const say = (frame) => it.socket.onmessage({ data: codec.encode(frame).buffer });
  say({ type: "welcome", identity: "ada", window: 32, max_size: 65_536 });
  await assert.rejects(it.rt.emit("say", "unfit"), RangeError);
  const named = it.rt.emit("unfit", 1);
  const other = it.rt.emit("say", 2);
  const group = it.rt.join("unfit");
  await assert.rejects(named, RangeError);
  await assert.rejects(group.ready, RangeError);
  await assert.rejects(group.track("unfit"), RangeError);
  const [frame] = it.socket.sent.map(codec.decode);
  say(reply(frame, "ok"));
  assert.equal(await other, "ok");
  assert.equal(it.rt.pending, 0);
});

// What the server refuses as a whole

test("a message that is refused as a whole is found by asking: one event alone", async () => {
  const it = await open({ welcome: { window: 1 } });
  const errors = [];
  it.rt.onError((failure) => errors.push(failure.code));
  const [guilty, later] = emits(it, "bad", "good");
  await settle();
  const [first] = it.socket.frames();
  it.socket.say(whole());
  await settle();
  const [question, ...none] = it.socket.frames();
  assert.equal(question.type, "leave");
  assert.deepEqual(none, []);
  assert.equal(await outcome(guilty), "pending", "it might still be answered");
  it.socket.say(reply(question));
  await settle();
  const [again] = it.socket.frames();
  assert.deepEqual([again.id, again.data], [first.id, "bad"]);
  it.socket.say(whole("too_large"));
  await assert.rejects(guilty, { code: "too_large", event: "say", id: first.id });
  await settle();
  assert.deepEqual(data(await answer(it)), ["good"]);
  assert.equal(await later, null);
  assert.deepEqual([errors, it.rt.pending], [[], 0]);
});

test("of a batch only the guilty one is refused; the others are said again, one by one, with their ids", async () => {
  const it = await open();
  const said = emits(it, 1, 2, "bad", 4);
  await settle();
  const first = it.socket.frames();
  it.socket.say(whole());
  await settle();
  emits(it, 5);
  await answer(it);
  const again = [];
  for (;;) {
    const messages = it.socket.messages();
    if (!messages.length) break;
    assert.deepEqual(messages.map((frames) => frames.length), [1], "nothing beside it");
    const [frame] = messages[0];
    again.push(frame);
    it.socket.say(frame.data === "bad" ? whole() : reply(frame, frame.data));
    await settle();
  }
  assert.deepEqual(data(again), [1, 2, "bad", 4, 5]);
  assert.deepEqual(again.slice(0, 4).map(({ id }) => id), first.map(({ id }) => id));
  assert.deepEqual((await Promise.all(said.map(outcome))).map(({ value, code }) => value ?? code), [1, 2, "bad_message", 4]);
  emits(it, 6, 7);
  await settle();
  assert.deepEqual(it.socket.messages().map(data), [[6, 7]], "and then all is as before");
});

test("an event that is answered before the question is innocent, and not said again", async () => {
  const it = await open();
  const errors = [];
  it.rt.onError((failure) => errors.push(failure.code));
  const [slow] = emits(it, "slow");
  await settle();
  const [frame] = it.socket.frames();
  it.socket.say(whole());
  await settle();
  const [question] = it.socket.frames();
  it.socket.say(reply(frame, "done"), reply(question));
  await settle();
  assert.equal(await slow, "done");
  assert.deepEqual(it.socket.frames(), []);
  assert.deepEqual(errors, ["bad_message"], "it was something that nobody waits for");
});

test("refusals that cross what is said next refuse nobody but the guilty", async () => {
  const it = await open();
  const said = [];
  for (const value of ["bad 1", 2, "bad 3"]) {
    said.push(...emits(it, value));
    await settle();
  }
  const [, second] = it.socket.frames();
  it.socket.say(whole());
  await settle();
  const [question] = it.socket.frames();
  it.socket.say(whole(), reply(second, 2), reply(question));
  await settle();
  for (const value of ["bad 1", "bad 3"]) {
    assert.deepEqual(data(it.socket.frames()), [value]);
    it.socket.say(whole());
    await settle();
  }
  assert.deepEqual((await Promise.all(said.map(outcome))).map(({ value, code }) => value ?? code), ["bad_message", 2, "bad_message"]);
});

test("what is handled beside the others and unanswered for long is said again, and its one answer counts", async () => {
  const it = await open();
  const [beside, guilty] = emits(it, "beside", "bad");
  await settle();
  const [frame] = it.socket.frames();
  it.socket.say(whole());
  await settle();
  await answer(it);
  const [again] = it.socket.frames();
  assert.equal(again.id, frame.id);
  it.socket.say(reply(frame, "old"), reply(again, "done"));
  await settle();
  assert.equal(await beside, "done");
  it.socket.say(whole());
  assert.equal((await outcome(guilty)).code, "bad_message");
});

test("joins, tracks and refreshes are found as well", async () => {
  const quiet = { ping_interval_ms: null, ping_timeout_ms: null };
  const it = await open({ token: () => "t", welcome: { ttl_ms: 20_000, ...quiet } });
  const lefts = [];
  const bad = it.rt.join("bad");
  bad.onLeft((code) => lefts.push(code));
  const good = it.rt.join("good");
  const tracked = it.rt.group("other").track({});
  tracked.catch(() => {}); // looked at below
  await settle();
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  await answer(it);
  for (const name of ["bad", "good", "other"]) {
    const [frame] = it.socket.frames();
    assert.equal(frame.group, name);
    it.socket.say(name === "good" ? reply(frame, { position: null, recovered: true, events: [] }) : whole());
    await settle();
  }
  assert.equal((await outcome(bad.ready)).code, "bad_message");
  assert.deepEqual(lefts, ["bad_message"]);
  assert.equal((await good.ready).recovered, true);
  assert.equal((await outcome(tracked)).code, "bad_message");

  await it.clock.pass(15_000);
  assert.deepEqual(types(it.socket.frames()), ["refresh"]);
  it.socket.say(whole("too_large"));
  await settle();
  await answer(it);
  await it.clock.pass(3000);
  assert.deepEqual(types(it.socket.frames()), ["refresh"], "it is tried again");
});

test("while it is not known who was guilty nothing else is said, no whisper either", async () => {
  const it = await open();
  const group = it.rt.group("g");
  it.socket.say({ type: "joined", group: "g", position: null });
  assert.equal(group.whisper("typing"), true);
  const [said] = emits(it, "bad");
  await settle();
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  emits(it, 2);
  await settle();
  assert.equal(group.whisper("typing"), false);
  assert.deepEqual(types(it.socket.frames()), ["leave"]);
  it.socket.say(reply({ ref: 2 }));
  await settle();
  assert.equal(group.whisper("typing"), false);
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  assert.equal((await outcome(said)).code, "bad_message");
  assert.equal(group.whisper("typing"), true);
});

test("a suspect has no company: what else is asked waits for it, and it for that", async () => {
  const it = await open();
  const [one] = emits(it, 1, 2);
  await settle();
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  await answer(it);
  it.rt.join("g");
  await settle();
  const [first, ...none] = it.socket.frames();
  assert.deepEqual([first.data, none], [1, []]);
  it.socket.say(reply(first));
  await settle();
  const [join, ...alone] = it.socket.frames();
  assert.deepEqual([join.type, alone], ["join", []]);
  it.socket.say(reply(join, { position: null, recovered: true, events: [] }));
  await settle();
  assert.deepEqual(data(it.socket.frames()), [2]);
  assert.equal(await one, null);
});

test("a refusal that comes late, when only the question is open, ends no doubt", async () => {
  const quiet = { ping_interval_ms: null, ping_timeout_ms: null };
  const it = await open({ token: () => "t", welcome: { ttl_ms: 20_000, ...quiet } });
  const [one] = emits(it, 1, 2);
  await settle();
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  await answer(it);
  await it.clock.pass(15_000);
  const [suspect, refresh] = it.socket.frames();
  it.socket.say(whole()); // of one of the two, but of which?
  await settle();
  const [question] = it.socket.frames();
  it.socket.say(reply(suspect, "ok"), reply(refresh, { ttl_ms: null }), whole());
  await settle();
  assert.equal(await one, "ok");
  assert.deepEqual(it.socket.frames(), []);
  it.socket.say(reply(question));
  await settle();
  assert.deepEqual(data(it.socket.frames()), [2]);
});

test("other errors without a ref accuse nobody", async () => {
  const it = await open();
  const errors = [];
  it.rt.onError((failure) => errors.push(failure.code));
  const [said] = emits(it, 1);
  await settle();
  const [frame] = it.socket.frames();
  for (const code of ["unknown_whisper", "not_joined", "invalid"]) it.socket.say(whole(code));
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  assert.deepEqual(errors, ["unknown_whisper", "not_joined", "invalid"]);
  it.socket.say(reply(frame, "ok"));
  assert.equal(await said, "ok");
  it.socket.say(whole());
  await settle();
  assert.deepEqual([errors.at(-1), it.socket.frames()], ["bad_message", []], "nothing was in flight");
});

test("a guilty one that has timed out is not said again", async () => {
  const it = await open();
  const late = it.rt.emit("say", "bad", { timeout: 100 });
  late.catch(() => {});
  await settle();
  it.socket.frames();
  await it.clock.pass(100);
  assert.equal((await outcome(late)).code, "timeout");
  it.socket.say(whole());
  await settle();
  await answer(it);
  emits(it, 2);
  await settle();
  assert.deepEqual(data(it.socket.frames()), [2]);
});

test("a line that drops while the guilty one is looked for does not end the search", async () => {
  const it = await open();
  const [one, guilty] = emits(it, 1, "bad");
  await settle();
  it.socket.say(whole());
  await settle();
  it.socket.frames();
  await comeBack(it); // before the question was answered: all is as after any loss
  assert.deepEqual(data(it.socket.frames()), [1, "bad"]);
  it.socket.say(whole());
  await settle();
  await answer(it);
  assert.deepEqual(data(it.socket.frames()), [1]);
  await comeBack(it); // afterwards: the suspects stay what they are
  assert.deepEqual(data(it.socket.frames()), [1]);
  it.socket.say(reply({ ref: it.socket.sent.map(JSON.parse).at(-1).ref }, "ok"));
  await settle();
  assert.deepEqual(data(it.socket.frames()), ["bad"]);
  it.socket.say(whole());
  assert.deepEqual((await Promise.all([one, guilty].map(outcome))).map(({ value, code }) => value ?? code), ["ok", "bad_message"]);
});

test("a suspect that is refused for now waits as it was told, and is asked again alone", async () => {
  const it = await open();
  const [one] = emits(it, 1, 2);
  await settle();
  it.socket.frames();
  it.socket.say(whole());
  await settle();
  await answer(it);
  it.socket.say(error(it.socket.frames()[0], "rate_limited", 500));
  await it.clock.pass(499);
  assert.deepEqual(it.socket.frames(), []);
  await it.clock.pass(1);
  assert.deepEqual(data(await answer(it)), [1]);
  assert.equal(await one, null);
});

// With a server that keeps count

/** What a server refuses that takes nothing bad: a message that holds the word, as a value of its own. */
const strict = (message) => (message.includes('"bad"') ? "bad_message" : undefined);

async function life(seed, { count, share, deaths = 0, storage }) {
  const random = seeded(seed);
  const clock = new Clock(random);
  let left = deaths;
  const fate = () => (left > 0 && random() < 0.02 && left-- > 0 ? {} : null);
  const server = new Server(clock, { unfit: strict, delay: () => 1 + Math.floor(random() * 40), fate });
  const WebSocket = sockets((socket) => server.accept(socket));
  const rt = connect("ws://test/ws", { WebSocket, clock, storage, session: SESSION });
  const good = [];
  const answers = [];
  const first = clock.now();
  while (answers.length < count) {
    for (let burst = 1 + Math.floor(random() * 6); burst > 0 && answers.length < count; burst--) {
      const bad = random() < share;
      if (!bad) good.push(answers.length);
      answers.push(rt.emit("say", bad ? "bad" : answers.length).catch((failure) => failure.code));
    }
    await clock.pass(Math.floor(random() * 60));
  }
  while (clock.now() < first + 600_000 && rt.pending) await clock.pass(500);
  const pending = rt.pending;
  const took = clock.now() - first;
  rt.close();
  return { server, good, pending, took, answers: await Promise.all(answers) };
}

test("300 servers that refuse at random, and die: each guilty one is refused, each other handled once", async () => {
  for (let seed = 0; seed < 300; seed++) {
    const storage = new MemoryStorage();
    const run = await life(seed, { count: 30, share: 0.1, deaths: seed % 3, storage });
    assert.equal(run.pending, 0, `seed ${seed}`);
    const expected = numbers(30).map((n) => (run.good.includes(n) ? n : "bad_message"));
    assert.deepEqual(run.answers, expected, `seed ${seed}`);
    assert.deepEqual(run.server.handled.sort((a, b) => a - b), run.good, `seed ${seed}`);
    assert.deepEqual(run.server.closed, [], `seed ${seed}`);
    assert.equal(storage.length, 0, `seed ${seed}`);
  }
});

test("a client all of whose messages are refused stays below what a server bears, and comes to an end", async () => {
  const run = await life(1, { count: 150, share: 1 });
  assert.deepEqual([run.pending, run.server.closed], [0, []]);
  assert.deepEqual(new Set(run.answers), new Set(["bad_message"]));
  assert.ok(run.took < 120_000, `${run.took} ms`);
});

test("what poisoned a storage is gone after one life", async () => {
  const storage = new MemoryStorage();
  const key = (n) => `starlette-rt|ws://test/ws|${SESSION}|${n}`;
  ["bad", "good"].forEach((text, n) => storage.setItem(key(n), JSON.stringify({ event: "say", id: text, data: text })));
  const clock = new Clock();
  const server = new Server(clock, { unfit: (message) => strict(message) && "too_large" });
  const WebSocket = sockets((socket) => server.accept(socket));
  const rt = connect("ws://test/ws", { WebSocket, clock, storage, session: SESSION });
  const errors = [];
  rt.onError(({ code, id }) => errors.push([code, id]));
  await clock.pass(1000);
  assert.deepEqual([errors, server.handled, storage.length], [[["too_large", "bad"]], ["good"], 0]);
});

test("half a character that is said as an escape would be refused by this server", async () => {
  const clock = new Clock();
  const server = new Server(clock);
  const socket = new (sockets((made) => server.accept(made)))("ws://test/ws", ["rt.v1.json"]);
  const heard = [];
  socket.onmessage = (message) => heard.push(JSON.parse(message.data));
  await clock.pass(100);
  socket.send(JSON.stringify({ type: "event", event: "say", id: "x", ref: 1, data: HALF }));
  await clock.pass(100);
  assert.deepEqual([heard.at(-1).code, heard.at(-1).ref], ["bad_message", undefined]);
  const it = connect("ws://test/ws", { clock, WebSocket: sockets((made) => server.accept(made)) });
  const said = it.emit("say", HALF);
  await clock.pass(100);
  assert.equal(await said, "hi \ufffd");
});
