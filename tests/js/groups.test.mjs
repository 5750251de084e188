// Groups: joining, recovery, leaving.

import assert from "node:assert/strict";
import { test } from "node:test";

import { comeBack, error, globally, open, outcome, reply, settle, start, welcome } from "./fakes.mjs";

const place = (offset, epoch = "e") => ({ epoch, offset, tag: `${epoch}${offset}` });
const said = (offset, fields = {}) => ({
  type: "event",
  event: "said",
  group: "g",
  data: offset,
  ...(offset === undefined ? {} : { offset, tag: `e${offset}` }),
  ...fields,
});
const joined = (frame, offset, fields = {}) =>
  reply(frame, { position: offset === null ? null : place(offset, fields.epoch), recovered: true, events: [], ...fields });

/** A client in the group `g` at an offset, with what its callbacks were told. */
async function inside(offset = 5, options = {}, joining = {}) {
  const it = await open(options);
  it.group = it.rt.join("g", joining);
  listen(it);
  await settle();
  it.socket.say(joined(it.socket.frames()[0], offset));
  await settle();
  it.recoveries.length = 0;
  return it;
}

function listen(it) {
  it.shown = [];
  it.recoveries = [];
  it.lefts = [];
  it.group.on("said", (data, meta) => it.shown.push(meta.recovered ? [data] : data));
  it.group.onRecover((told) => it.recoveries.push(told));
  it.group.onLeft((code) => it.lefts.push(code));
}

test("a join says what was asked for, and is ready when it is answered", async () => {
  const it = await open();
  const group = it.rt.join("g", { last: 50, presence: "count" });
  assert.equal(group.name, "g");
  assert.equal(group.joined, false);
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame, { type: "join", group: "g", last: 50, presence: "count", ref: frame.ref });
  it.socket.say(joined(frame, 7));
  assert.deepEqual(await group.ready, { recovered: true, snapshot: undefined, position: place(7) });
  assert.equal(group.joined, true);
  assert.deepEqual(group.position, place(7));
});

test("a position that was handed in is asked from, as it is", async () => {
  const it = await open();
  const position = { ...place(3), shard: 7 };
  const group = it.rt.join("g", { position, last: 5 });
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame.position, position);
  assert.equal("last" in frame, false);
  group.position.offset = 99;
  assert.equal(group.position.offset, 3, "a position that was handed out is a copy");
});

test("joins of one moment are one batch, and joining twice is joining once", async () => {
  const it = await open();
  assert.equal(it.rt.join("a"), it.rt.join("a"));
  it.rt.join("b");
  assert.equal(it.rt.group("b"), it.rt.join("b"));
  await settle();
  assert.deepEqual(it.socket.messages().map((frames) => frames.map(({ group }) => group)), [["a", "b"]]);
});

test("asking for presence later joins again from the present position", async () => {
  const it = await inside(5);
  assert.equal(it.rt.join("g", { presence: "members" }), it.group);
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame, { type: "join", group: "g", position: place(5), presence: "members", ref: frame.ref });
});

test("asking for presence while a join is under way is not forgotten", async () => {
  const it = await open();
  it.rt.join("g");
  await settle();
  it.rt.join("g", { presence: "members" });
  await settle();
  const [first, ...none] = it.socket.frames();
  assert.deepEqual(none, []);
  it.socket.say(joined(first, 5));
  await settle();
  assert.equal(it.socket.frames()[0].presence, "members");
});

test("events of a group are shown to it and to the whole client, with what there is to know", async () => {
  const it = await inside(5);
  const metas = [];
  it.rt.on("said", (data, meta) => metas.push([data, meta]));
  it.socket.say(said(6, { id: "i6" }));
  it.socket.say({ type: "event", event: "said", data: "push" });
  assert.deepEqual(it.shown, [6]);
  assert.deepEqual(metas, [
    [6, { event: "said", group: "g", id: "i6", offset: 6, recovered: false }],
    ["push", { event: "said", group: undefined, id: undefined, offset: undefined, recovered: false }],
  ]);
  assert.deepEqual(it.group.position, place(6));
});

test("callbacks set right after `ready` get the events that came with the join, before those that followed", async () => {
  const it = await open();
  const group = it.rt.join("g", { last: 2 });
  const shown = [];
  const ready = (async () => {
    await group.ready;
    shown.push("ready");
    group.on("said", (data) => shown.push(data));
  })();
  await settle();
  it.socket.say(joined(it.socket.frames()[0], 5, { events: [said(4), said(5)] }), said(6));
  it.socket.say(said(7));
  await ready;
  await settle();
  assert.deepEqual(shown, ["ready", 4, 5, 6, 7]);
});

test("a skip moves the position and shows nothing", async () => {
  const it = await inside(5);
  it.socket.say(said(6, { skip: true }), said(7));
  assert.deepEqual(it.shown, [7]);
  assert.deepEqual(it.group.position, place(7));
});

test("an event whose id was seen in the group is not shown again, also in another epoch, and moves the position", async () => {
  const it = await inside(5);
  it.socket.say(said(6, { id: "x" }), said(7, { id: "x" }), said(8, { id: "y" }));
  assert.deepEqual(it.shown, [6, 8]);
  assert.deepEqual(it.group.position, place(8));
  it.socket.say({ type: "reset", group: "g", position: place(0, "f") });
  it.socket.say({ ...said(1, { id: "x" }), tag: "f1" });
  assert.deepEqual(it.shown, [6, 8]);
  assert.deepEqual(it.group.position, place(1, "f"));
});

test("the same id in two groups is two events, and a group forgets after 500", async () => {
  const it = await inside(null);
  const shown = [];
  it.rt.group("h").on("said", (data) => shown.push(data));
  it.socket.say(said(undefined, { id: "x", data: 1 }), { ...said(undefined, { id: "x", data: 2 }), group: "h" });
  assert.deepEqual([it.shown, shown], [[1], [2]]);
  for (let n = 0; n < 499; n++) it.socket.say(said(undefined, { id: `n${n}`, data: 0 }));
  it.socket.say(said(undefined, { id: "x", data: "again" }));
  assert.ok(!it.shown.includes("again"));
  it.socket.say(said(undefined, { id: "n499", data: 0 }), said(undefined, { id: "x", data: "again" }));
  assert.ok(it.shown.includes("again"));
});

test("an event that is not above the position was here already", async () => {
  const it = await inside(5);
  it.socket.say(said(6), said(6), said(4), said(7));
  assert.deepEqual(it.shown, [6, 7]);
});

test("a gap is closed by asking for what is missing", async () => {
  const it = await inside(5);
  it.socket.say(said(6), said(9));
  assert.deepEqual(it.shown, [6]);
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame.position, place(6));
  it.socket.say(joined(frame, 9, { events: [said(7), said(8), said(9)] }), said(10));
  await settle();
  assert.deepEqual(it.shown, [6, [7], [8], [9], 10]);
});

// Coming back

test("after the welcome all groups are asked for in one batch with their positions, before queued events", async () => {
  const it = await inside(5);
  const other = it.rt.join("h");
  await settle();
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  it.socket.drop();
  assert.deepEqual([it.group.joined, other.joined], [false, false]);
  it.rt.emit("say", 1, { group: "g" }).catch(() => {});
  it.rt.emit("say", 2).catch(() => {});
  await it.clock.pass(20_000);
  await welcome(it);
  const messages = it.socket.messages();
  assert.deepEqual(messages.map((frames) => frames.map(({ ref, ...frame }) => frame)), [
    [
      { type: "join", group: "g", position: place(5) },
      { type: "join", group: "h" },
    ],
  ]);
  it.socket.say(messages[0].map((frame) => joined(frame, frame.position ? 5 : null)));
  await settle();
  assert.deepEqual(it.socket.frames().map(({ data }) => data), [1, 2]);
});

test("what was missed is shown in order, each offset once, together with what came during the join", async () => {
  const it = await inside(5);
  await comeBack(it);
  const [frame] = it.socket.frames();
  it.socket.say(said(9), said(5), said(6));
  assert.deepEqual(it.shown, []);
  it.socket.say(joined(frame, 8, { events: [said(6), said(7), said(8)] }), said(10));
  await settle();
  assert.deepEqual(it.shown, [[6], [7], [8], 9, 10]);
  assert.deepEqual(it.recoveries, [{ recovered: true, snapshot: undefined, position: place(8), reason: "join" }]);
  assert.deepEqual(it.group.position, place(10));
});

test("many missed events may come ahead of the reply", async () => {
  const it = await inside(5);
  await comeBack(it);
  const [frame] = it.socket.frames();
  it.socket.say(said(6), said(7));
  it.socket.say(joined(frame, 8, { events: [said(8)] }));
  await settle();
  assert.deepEqual(it.shown, [[6], [7], [8]]);
});

test("what cannot be recovered is told, and only what follows the new position is shown", async () => {
  const it = await inside(5);
  await comeBack(it);
  const [frame] = it.socket.frames();
  it.socket.say(said(2), said(3), said(4));
  const news = { recovered: false, epoch: "f", snapshot: { title: "Plans" }, events: [said(3, { data: "in the reply" })] };
  it.socket.say(joined(frame, 3, news));
  await settle();
  assert.deepEqual(it.shown, [["in the reply"], 4]);
  assert.deepEqual(it.recoveries, [
    { recovered: false, snapshot: { title: "Plans" }, position: place(3, "f"), reason: "join" },
  ]);
  assert.deepEqual(it.group.position, { epoch: "f", offset: 4, tag: "e4" });
});

test("the snapshot is told before the events that follow it", async () => {
  const it = await inside(5);
  const order = [];
  it.group.onRecover(({ snapshot }) => order.push(snapshot));
  it.group.on("said", (data) => order.push(data));
  await comeBack(it);
  it.socket.say(joined(it.socket.frames()[0], 6, { recovered: false, snapshot: "snapshot", events: [said(6)] }));
  await settle();
  assert.deepEqual(order, ["snapshot", 6]);
});

test("the position is that of what was shown: not ahead of events that came with a reply", async () => {
  const it = await inside(5);
  const places = [];
  it.group.onRecover(() => places.push(it.group.position.offset));
  it.group.on("said", () => places.push(it.group.position.offset));
  await comeBack(it);
  it.socket.say(joined(it.socket.frames()[0], 8, { events: [said(6), said(7)] }));
  await settle();
  assert.deepEqual([...places, it.group.position.offset], [5, 6, 7, 8]);
});

test("a line that drops right after a reply loses nothing of it", async () => {
  const it = await inside(5);
  await comeBack(it);
  it.socket.say(joined(it.socket.frames()[0], 6, { events: [said(6)] }), said(7));
  it.socket.drop();
  await it.clock.pass(20_000);
  await welcome(it);
  const [frame] = it.socket.frames();
  assert.deepEqual([it.shown, frame.position], [[], place(5)]);
  it.socket.say(joined(frame, 7, { events: [said(6), said(7)] }));
  await settle();
  assert.deepEqual(it.shown, [[6], [7]]);
});

test("a group without history is not recovered after a reconnect, and was complete when it was joined first", async () => {
  const it = await open();
  it.group = it.rt.join("g");
  listen(it);
  await settle();
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  await comeBack(it);
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  assert.deepEqual(it.recoveries.map(({ recovered }) => recovered), [true, false]);
  it.rt.join("g", { presence: "count" });
  await settle();
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  assert.equal(it.recoveries.at(-1).recovered, true, "nothing was missed by asking again");
});

test("a join that was never answered asks again for the last events", async () => {
  const it = await open();
  it.rt.join("g", { last: 5 });
  await settle();
  it.socket.frames();
  await comeBack(it);
  const [frame] = it.socket.frames();
  assert.equal(frame.last, 5);
});

test("what was held back when the line dropped is recovered; without offset it is shown, for nothing brings it again", async () => {
  const it = await inside(5);
  await comeBack(it);
  it.socket.frames();
  it.socket.say(said(6), said(undefined, { data: "once" }));
  await comeBack(it);
  assert.deepEqual(it.shown, ["once"]);
  const [frame] = it.socket.frames();
  assert.deepEqual(frame.position, place(5));
  it.socket.say(joined(frame, 6, { events: [said(6)] }));
  await settle();
  assert.deepEqual(it.shown, ["once", [6]]);
});

test("a reset takes the new position and says that something may be lost", async () => {
  const it = await inside(5);
  it.socket.say({ type: "reset", group: "g", position: place(12, "q") });
  assert.deepEqual(it.recoveries, [{ recovered: false, snapshot: undefined, position: place(12, "q"), reason: "reset" }]);
  assert.deepEqual(it.group.position, place(12, "q"));
});

test("a reset during a join makes its reply one that is not recovered", async () => {
  const it = await inside(5);
  await comeBack(it);
  const [frame] = it.socket.frames();
  it.socket.say(said(6), { type: "reset", group: "g", position: place(2, "q") });
  it.socket.say(said(3));
  it.socket.say(joined(frame, 2, { epoch: "q" }));
  await settle();
  assert.deepEqual(it.recoveries.map(({ recovered, reason }) => [recovered, reason]), [[false, "join"]]);
  assert.deepEqual(it.shown, [3]);
});

test("joins that met a temporary error are asked again, in order, with what they were told to wait", async () => {
  const it = await inside(5);
  it.rt.join("h");
  await settle();
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  await comeBack(it);
  const [g, h] = it.socket.frames();
  it.socket.say(error(g, "unavailable", 300), error(h, "skipped"));
  it.socket.say(said(7), said(undefined, { data: "live" }));
  await it.clock.pass(299);
  assert.deepEqual(it.socket.frames(), []);
  await it.clock.pass(1);
  const [again] = it.socket.frames();
  assert.deepEqual([again.group, again.position], ["g", place(5)]);
  it.socket.say(joined(again, 7, { events: [said(6), said(7)] }));
  await settle();
  assert.deepEqual(it.shown, ["live", [6], [7]]);
  assert.equal(it.socket.frames()[0].group, "h");
});

test("a refusal for good is told once, and the group is not asked for again", async () => {
  const it = await inside(5);
  await comeBack(it);
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  assert.deepEqual(it.lefts, ["forbidden"]);
  assert.equal(it.group.joined, false);
  await comeBack(it);
  assert.deepEqual(it.socket.frames(), []);
});

test("one group too many is refused for good, at the first join and after a reconnect", async () => {
  for (const first of [true, false]) {
    const it = first ? await open() : await inside(5);
    if (first) {
      it.group = it.rt.join("g");
      listen(it);
      await settle();
    } else await comeBack(it);
    it.socket.say(error(it.socket.frames()[0], "too_many_groups"));
    assert.deepEqual(it.lefts, ["too_many_groups"]);
    if (first) await assert.rejects(it.group.ready, { code: "too_many_groups" });
    await it.clock.pass(60_000);
    assert.deepEqual(it.socket.frames().filter(({ type }) => type === "join"), []);
  }
});

test("the first join that is refused rejects `ready`, without noise where nobody looks", async () => {
  const it = await open();
  const group = it.rt.join("g");
  await settle();
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  await settle();
  await assert.rejects(group.ready, { code: "forbidden" });
});

test("a group that was refused can be joined again when the user asks", async () => {
  const it = await open();
  it.rt.join("g");
  await settle();
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  await settle();
  const group = it.rt.join("g");
  await settle();
  it.socket.say(joined(it.socket.frames()[0], 1));
  assert.equal((await group.ready).recovered, true);
});

// What the server does

test("a group that the server joins us to is joined without a word of ours", async () => {
  const it = await open();
  it.group = it.rt.group("g");
  listen(it);
  await settle();
  it.socket.say({ type: "joined", group: "g", position: place(5) }, said(6));
  assert.equal(it.group.joined, true);
  assert.equal((await it.group.ready).recovered, true);
  assert.deepEqual(it.shown, [6]);
  assert.deepEqual(it.socket.frames(), []);
});

test("the position of a server's group is kept also before anybody asked for the group", async () => {
  const it = await open();
  it.socket.say({ type: "joined", group: "g", position: place(5) }, said(6));
  assert.deepEqual(it.rt.group("g").position, place(6));
});

test("when the server joins us again we say where we were, and hold back what follows", async () => {
  const it = await open();
  it.group = it.rt.group("g");
  listen(it);
  it.socket.say({ type: "joined", group: "g", position: place(5) });
  await comeBack(it);
  assert.deepEqual(it.socket.frames(), [], "not before the server has joined us");
  it.socket.say({ type: "joined", group: "g", position: place(8) });
  await settle();
  it.socket.say(said(9));
  const [frame] = it.socket.frames();
  assert.deepEqual(frame.position, place(5));
  assert.deepEqual(it.shown, []);
  it.socket.say(joined(frame, 8, { events: [said(6), said(7), said(8)] }));
  await settle();
  assert.deepEqual(it.shown, [[6], [7], [8], 9]);
});

test("when nothing was missed nothing is asked", async () => {
  const it = await open();
  it.group = it.rt.group("g");
  listen(it);
  it.socket.say({ type: "joined", group: "g", position: place(5) });
  await comeBack(it);
  it.socket.say({ type: "joined", group: "g", position: place(5) });
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  assert.equal(it.recoveries.at(-1).recovered, true);
});

test("a server's group without history is not recovered after a reconnect", async () => {
  const it = await open();
  it.group = it.rt.group("g");
  listen(it);
  it.socket.say({ type: "joined", group: "g", position: null });
  await comeBack(it);
  it.socket.say({ type: "joined", group: "g", position: null });
  assert.deepEqual(it.recoveries.map(({ recovered }) => recovered), [true, false]);
});

test("a server that joins us but does not let us ask goes on from where it said, not recovered", async () => {
  const it = await open();
  it.group = it.rt.group("g");
  listen(it);
  it.socket.say({ type: "joined", group: "g", position: place(5) });
  await comeBack(it);
  it.socket.say({ type: "joined", group: "g", position: place(8) });
  await settle();
  it.socket.say(said(9));
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  await settle();
  assert.deepEqual(it.shown, [9]);
  assert.equal(it.recoveries.at(-1).recovered, false);
  assert.deepEqual(it.lefts, []);
  assert.deepEqual(it.group.position, place(9));
});

test("a join that waits asks from where the server has joined us meanwhile", async () => {
  const it = await open();
  it.socket.say({ type: "error", code: "rate_limited", message: "", temporary: true, retry_after_ms: 500 });
  it.group = it.rt.join("g");
  listen(it);
  await settle();
  it.socket.say({ type: "joined", group: "g", position: place(5) }, said(6));
  await it.clock.pass(500);
  const [frame] = it.socket.frames();
  assert.deepEqual(frame.position, place(5));
  it.socket.say(joined(frame, 6, { events: [said(6)] }));
  await settle();
  assert.deepEqual(it.shown, [[6]]);
});

test("who is taken out for good is told so, and does not join again", async () => {
  const it = await inside(5);
  it.socket.say({ type: "left", group: "g", code: "forbidden", rejoin: false });
  assert.deepEqual(it.lefts, ["forbidden"]);
  assert.deepEqual(it.recoveries.map(({ reason, recovered }) => [reason, recovered]), [["left", false]]);
  assert.equal(it.group.joined, false);
  await comeBack(it);
  assert.deepEqual(it.socket.frames(), []);
});

test("who is taken out for now joins again from its position, with jitter that grows", async () => {
  const it = await inside(5);
  const at = [];
  for (let round = 0; round < 3; round++) {
    it.socket.say({ type: "left", group: "g", code: "unavailable", rejoin: true });
    const before = it.clock.time;
    while (it.socket.heard === it.socket.sent.length) await it.clock.pass(10);
    at.push(it.clock.time - before);
    const [frame] = it.socket.frames();
    assert.deepEqual(frame.position, place(5));
    it.socket.say(joined(frame, 5));
    await settle();
  }
  assert.deepEqual(at, [250, 500, 1000]);
  assert.deepEqual(it.lefts, []);
});

test("a left that crosses a join leaves the last word to the join's answer", async () => {
  const it = await inside(5);
  it.rt.join("g", { presence: "count" });
  await settle();
  const [frame] = it.socket.frames();
  it.socket.say({ type: "left", group: "g", code: "unavailable", rejoin: false });
  it.socket.say(joined(frame, 6, { events: [said(6)] }));
  await settle();
  assert.equal(it.group.joined, true);
  assert.deepEqual(it.lefts, []);
  assert.deepEqual(it.shown, [[6]]);
});

// Leaving

test("leaving is said, ends what we hear, and is not taken back by a reconnect", async () => {
  const it = await inside(5);
  const left = it.group.leave();
  await settle();
  const [frame] = it.socket.frames();
  assert.deepEqual(frame, { type: "leave", group: "g", ref: frame.ref });
  it.socket.say(said(6));
  it.socket.say(reply(frame));
  await left;
  assert.deepEqual(it.shown, []);
  assert.equal(it.group.joined, false);
  await comeBack(it);
  assert.deepEqual(it.socket.frames(), []);
});

test("what is under way while a leave is not answered is ignored, also after a new join, and what follows is not", async () => {
  for (const rejoins of [false, true]) {
    const it = await inside(null);
    const heard = [];
    it.rt.on("said", (data) => heard.push(data));
    it.rt.on("notice", (data) => heard.push(data));
    it.group.onPresence(() => heard.push("presence"));
    it.group.leave();
    const again = rejoins ? it.rt.join("g") : null;
    again?.onRecover(({ reason }) => heard.push(reason));
    again?.onWhisper("typing", () => heard.push("whisper"));
    await settle();
    const [leave, join] = it.socket.frames();
    it.socket.say(
      said(undefined, { data: "old" }),
      { type: "joined", group: "g", position: null },
      { type: "whisper", group: "g", event: "typing", from: "bob" },
      { type: "presence_count", group: "g", count: 3 },
      { type: "left", group: "g", code: "left", rejoin: false },
      said(undefined, { data: "other", group: "h" }),
      { type: "event", event: "notice", data: "mine" },
    );
    assert.deepEqual(heard, ["other", "mine"]);
    assert.equal(it.rt.group("g").joined, false);
    it.socket.say(reply(leave));
    it.socket.say(said(undefined, { data: "new" }));
    if (rejoins) it.socket.say(joined(join, null));
    await settle();
    assert.deepEqual(heard, rejoins ? ["other", "mine", "join", "new"] : ["other", "mine", "new"]);
  }
});

test("a question of the server is answered also if it names a group that is being left", async () => {
  const it = await inside(5);
  it.rt.answer("confirm", () => true);
  it.group.leave();
  await settle();
  it.socket.frames();
  it.socket.say({ type: "event", event: "confirm", group: "g", ref: 3 });
  await settle();
  assert.deepEqual(it.socket.frames(), [{ type: "reply", ref: 3, data: true }]);
});

test("a leave that was skipped is said again, before the join behind it, and is not over until it is answered", async () => {
  const it = await inside(null);
  it.rt.join("h");
  const left = it.group.leave();
  const again = it.rt.join("g");
  await settle();
  const [h, ...rest] = it.socket.frames();
  assert.deepEqual(rest.map(({ type }) => type), ["leave", "join"]);
  it.socket.say(error(h, "rate_limited", 200), ...rest.map((frame) => error(frame, "skipped")));
  it.socket.say(said(undefined, { data: "still ignored" }));
  assert.equal(await outcome(left), "pending");
  await it.clock.pass(200);
  it.socket.say(joined(it.socket.frames()[0], null));
  await settle();
  const [leave, join] = it.socket.frames();
  assert.deepEqual([leave, join].map(({ type, group }) => [type, group]), [["leave", "g"], ["join", "g"]]);
  it.socket.say(reply(leave), joined(join, null));
  await left;
  assert.equal((await again.ready).recovered, true);
});

test("leaving twice is leaving once: it does not end what was joined in between", async () => {
  const it = await inside(5);
  it.group.leave();
  const again = it.rt.join("g");
  await settle();
  const [leave, join] = it.socket.frames();
  it.socket.say(reply(leave), joined(join, 5));
  await settle();
  await it.group.leave();
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  assert.equal(again.joined, true);
});

test("what was emitted in a group is answered before it is left, also across a reconnect", async () => {
  const it = await inside(5);
  const answer = it.group.emit("say", 1);
  it.group.leave();
  await comeBack(it);
  const [join] = it.socket.frames();
  assert.equal(join.type, "join");
  it.socket.say(joined(join, 5));
  await settle();
  const [event] = it.socket.frames();
  assert.equal(event.type, "event");
  it.socket.say(reply(event, "done"));
  assert.equal(await answer, "done");
  await settle();
  assert.equal(it.socket.frames()[0].type, "leave");
});

test("joining again before the leave was said takes it back", async () => {
  const it = await inside(5);
  it.group.emit("say", 1).catch(() => {});
  const left = it.group.leave();
  assert.equal(it.rt.join("g"), it.group);
  await left;
  await settle();
  it.socket.say(reply(it.socket.frames()[0]));
  await settle();
  assert.deepEqual(it.socket.frames(), []);
  assert.equal(it.group.joined, true);
});

test("joining again after the leave is a new start", async () => {
  const it = await inside(5);
  it.group.leave();
  const again = it.rt.join("g");
  assert.notEqual(again, it.group);
  await settle();
  assert.deepEqual(it.socket.frames().map(({ ref, ...frame }) => frame), [
    { type: "leave", group: "g" },
    { type: "join", group: "g" },
  ]);
});

test("leaving while the line is down needs no word, and does not wait for one", async () => {
  const it = await inside(5);
  const unsaid = it.group.leave();
  it.socket.drop();
  await it.rt.group("h").leave();
  await it.clock.pass(20_000);
  await welcome(it);
  await unsaid;
  assert.deepEqual(it.socket.frames(), []);
});

test("closing rejects `ready`, and a reconnect makes a new one", async () => {
  const it = start();
  const group = it.rt.join("g");
  const ready = group.ready;
  it.rt.close();
  assert.equal((await outcome(ready)).code, "closed");
  it.rt.reconnect();
  await settle();
  await welcome(it);
  it.socket.say(joined(it.socket.frames()[0], 1));
  assert.equal((await group.ready).recovered, true);
});

test("a group may have any name", async (t) => {
  const reported = [];
  globally(t, "reportError", (failure) => reported.push(failure));
  const it = await open();
  for (const name of ["__proto__", "constructor", "toString"]) {
    const group = it.rt.join(name);
    const shown = [];
    group.on("__proto__", (data) => shown.push(data));
    await settle();
    it.socket.say(joined(it.socket.frames()[0], null));
    await settle();
    it.socket.say({ type: "event", event: "__proto__", group: name, data: 1, id: "__proto__" });
    assert.deepEqual(shown, [1]);
  }
  assert.deepEqual(reported, []);
});
