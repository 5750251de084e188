// Everything arrives, once and in order: against a server with a tight limit, and against one that dies at random.

import assert from "node:assert/strict";
import { test } from "node:test";

import { connect } from "../../starlette_rt/statics/starlette-rt.js";
import { Clock, seeded, settle, sockets } from "./fakes.mjs";
import { Server } from "./server.mjs";

const numbers = (count) => Array.from({ length: count }, (_, n) => n);

/** A sender and a reader on one server; the reader joins the group and shows what it hears. */
async function pair(clock, options) {
  const server = new Server(clock, options);
  const WebSocket = sockets((socket) => server.accept(socket));
  const reader = connect("ws://test/ws", { WebSocket, clock });
  const shown = [];
  reader.join("g").on("said", (data) => shown.push(data));
  await clock.pass(100);
  const sender = connect("ws://test/ws", { WebSocket, clock });
  return { server, reader, sender, shown };
}

/** Let time pass until the sender has nothing left and the reader has heard all, or the patience is over. */
async function finish(it, clock, count, patience = 3_600_000) {
  const end = clock.now() + patience;
  while (clock.now() < end && (it.sender.pending || it.shown.length < count)) await clock.pass(500);
}

for (const [name, limit] of [
  ["five at once and ten a second", { burst: 5, per: 100 }],
  ["one at once and two a second", { burst: 1, per: 500 }],
  ["ten at once and one in two seconds", { burst: 10, per: 2000 }],
  ["ten in each second", { burst: 10, every: 1000, per: 100 }],
  ["forty in each ten seconds", { burst: 40, every: 10_000, per: 250 }],
  ["a hundred at once and fifty a second", { burst: 100, per: 20 }],
]) {
  test(`500 events from offline reach a server that takes ${name}: all, once, in order, and it never closes`, async () => {
    const clock = new Clock();
    const it = await pair(clock, { limit });
    const answers = numbers(500).map((n) => it.sender.emit("say", n));
    await finish(it, clock, 500);
    assert.deepEqual(it.server.handled, numbers(500));
    assert.deepEqual(it.shown, numbers(500));
    assert.deepEqual(await Promise.all(answers), numbers(500));
    assert.deepEqual(it.server.closed, []);
    const least = (500 - limit.burst) * limit.per;
    assert.ok(clock.now() - 1_000_000 < 1.5 * least + 20_000, `${clock.now() - 1_000_000} ms for ${least}`);
  });
}

test("a client that sent all again at once would be closed by this server", async () => {
  const clock = new Clock();
  const it = await pair(clock, { limit: { burst: 5, per: 100 } });
  await clock.pass(100);
  const WebSocket = sockets((socket) => it.server.accept(socket));
  const socket = new WebSocket("ws://test/ws", ["rt.v1.json"]);
  await clock.pass(100);
  for (let round = 0; round < 10 && socket.closed === null; round++) {
    for (const n of numbers(32)) socket.send(JSON.stringify({ type: "event", event: "say", id: `x${n}`, ref: n }));
    await clock.pass(100);
  }
  assert.deepEqual(it.server.closed, [4502]);
});

test("single events in flight that meet a limit together are fewer than what this server bears", async () => {
  const clock = new Clock();
  const it = await pair(clock, { limit: { burst: 10, per: 20 }, delay: () => 200 });
  const answers = [];
  for (let round = 1; round <= 8; round++) {
    while (answers.length < round * 30) {
      answers.push(it.sender.emit("say", answers.length));
      await clock.pass(1);
    }
    await finish(it, clock, round * 30); // the queue is empty: what comes next goes at once
  }
  assert.deepEqual(await Promise.all(answers), numbers(240));
  assert.deepEqual(it.server.closed, []);
});

test("500 events that are all refused for good are told to their callers, and the connection stays", async () => {
  const clock = new Clock();
  const it = await pair(clock, {});
  const codes = numbers(500).map((n) => it.sender.emit("say", n, { group: "elsewhere" }).catch((error) => error.code));
  await finish(it, clock, 0);
  assert.deepEqual(new Set(await Promise.all(codes)), new Set(["not_joined"]));
  assert.deepEqual(it.server.closed, []);
});

/** One life with a server that dies: emits at random times, deaths at random moments, perhaps with loss of memory. */
async function life(seed, limit) {
  const random = seeded(seed);
  const clock = new Clock(random);
  let deaths = 6;
  const forgetful = seed % 2 === 0;
  const fate = (moment) => {
    if (random() > 0.03 || deaths === 0) return null;
    deaths -= 1;
    return { moment, forget: forgetful };
  };
  const it = await pair(clock, { limit, delay: () => 1 + Math.floor(random() * 40) });
  it.server.fate = fate;
  const answers = [];
  const count = 40;
  while (answers.length < count) {
    const burst = limit ? count : 1 + Math.floor(random() * 5);
    for (let n = 0; n < burst && answers.length < count; n++) {
      answers.push(it.sender.emit("say", answers.length));
      answers.at(-1).catch(() => {}); // looked at below
    }
    await clock.pass(Math.floor(random() * 100));
    if (random() < 0.02) it.server.die({ forget: forgetful });
  }
  await finish(it, clock, count);
  const answered = await Promise.all(answers);
  it.sender.close();
  it.reader.close();
  return { ...it, answered, deaths: 6 - deaths, forgetful };
}

for (const [name, limit, base] of [
  ["without a limit", null, 0],
  ["with a tight limit", { burst: 3, per: 50 }, 10_000],
]) {
  test(`200 servers that die at random, ${name}: everything is answered, and shown once and in order`, async () => {
    let deaths = 0;
    let twice = 0;
    for (let seed = base; seed < base + 200; seed++) {
      const run = await life(seed, limit);
      assert.deepEqual(run.shown, numbers(40), `seed ${seed}`);
      assert.deepEqual(run.answered, numbers(40), `seed ${seed}`);
      assert.deepEqual(run.server.closed, [], `seed ${seed}`);
      if (!run.forgetful) assert.deepEqual(run.server.handled, numbers(40), `seed ${seed}`);
      else if (run.server.handled.length > 40) twice += 1;
      deaths += run.deaths;
    }
    assert.ok(deaths > 400, `${deaths} deaths`);
    assert.ok(twice > 10, `${twice} runs in which the handler ran twice and the reader saw it once`);
  });
}

test("a reader that did not look at ids would have seen some events twice", async () => {
  let doubled = 0;
  for (let seed = 0; seed < 40; seed += 2) {
    const run = await life(seed, null);
    if (new Set(run.server.log.map(({ data }) => data)).size < run.server.log.length) doubled += 1;
  }
  assert.ok(doubled > 0);
});
