// Who is here, what they whisper, and that they type.

import assert from "node:assert/strict";
import { test } from "node:test";

import { comeBack, error, open, outcome, reply, settle } from "./fakes.mjs";

const members = (...entries) => JSON.parse(`{${entries.map(([key, ...refs]) => `"${key}": {"metas": ${JSON.stringify(refs.map((ref) => ({ ref })))}}`)}}`);
const state = (version, list, after = null) => ({ type: "presence_state", group: "g", version, members: list, after });
const diff = (version, joins = {}, leaves = {}) => ({ type: "presence_diff", group: "g", version, joins, leaves });
const refs = (map) => [...map].map(([key, { metas }]) => [key, ...metas.map(({ ref }) => ref)]);
const bare = (frames) => frames.map(({ ref, ...frame }) => frame);

async function inside(presence = "members", welcome = {}) {
  const it = await open({ welcome });
  it.group = it.rt.join("g", { presence });
  it.changes = [];
  it.group.onPresence(({ joins, leaves, count }) => it.changes.push({ joins: refs(joins), leaves: refs(leaves), count }));
  await settle();
  await answerJoin(it);
  return it;
}

async function answerJoin(it) {
  const join = it.socket.frames().find(({ type }) => type === "join");
  it.socket.say(reply(join, { position: null, recovered: true, events: [] }));
  await settle();
}

test("a state says who is here, and diffs keep it up", async () => {
  const it = await inside();
  const { presence } = it.group;
  it.socket.say(state(5, members(["ada", "1"], ["bob", "2", "4"])));
  assert.deepEqual(refs(presence), [["ada", "1"], ["bob", "2", "4"]]);
  assert.equal(it.group.count, 2);
  it.socket.say(diff(6, members(["cyd", "5"]), members(["bob", "2", "4"])));
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["cyd", "5"]]);
  assert.equal(it.group.presence, presence, "it is the same Map all the time");
  assert.deepEqual(it.changes, [
    { joins: [["ada", "1"], ["bob", "2", "4"]], leaves: [], count: 2 },
    { joins: [["cyd", "5"]], leaves: [["bob", "2", "4"]], count: 2 },
  ]);
});

test("one of several connections that goes leaves the others, and a key without any is gone", async () => {
  const it = await inside();
  it.socket.say(state(1, members(["bob", "2", "4"])));
  it.socket.say(diff(2, {}, members(["bob", "2"])));
  assert.deepEqual(refs(it.group.presence), [["bob", "4"]]);
  it.socket.say(diff(3, members(["bob", "6"]), members(["bob", "4"])));
  assert.deepEqual(refs(it.group.presence), [["bob", "6"]]);
  it.socket.say(diff(4, {}, members(["bob", "6"])));
  assert.deepEqual(refs(it.group.presence), []);
});

test("why a member is gone is told", async () => {
  const it = await inside();
  const reasons = [];
  it.group.onPresence(({ leaves }) => reasons.push(leaves.get("ada")?.reason));
  it.socket.say(state(1, members(["ada", "1"])));
  it.socket.say(diff(2, {}, { ada: { metas: [{ ref: "1" }], reason: "node_lost" } }));
  assert.deepEqual(reasons, [undefined, "node_lost"]);
});

test("diffs that come before their state are kept, and those that it includes are ignored", async () => {
  const it = await inside();
  it.socket.say(diff(7, members(["dan", "7"])), diff(5, members(["ada", "1"])), diff(6, members(["cyd", "5"])));
  assert.deepEqual(it.changes, []);
  it.socket.say(state(5, members(["ada", "1"])));
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["cyd", "5"], ["dan", "7"]]);
  it.socket.say(diff(6, members(["old", "0"])), diff(7, {}, members(["ada", "1"])));
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["cyd", "5"], ["dan", "7"]]);
});

test("a missing diff makes the client ask for a new state, once", async () => {
  const it = await inside();
  it.socket.say(state(1, members(["ada", "1"])));
  it.socket.say(diff(3, members(["cyd", "5"])), diff(5, members(["dan", "7"])));
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["cyd", "5"], ["dan", "7"]]);
  await settle();
  assert.deepEqual(bare(it.socket.frames()), [{ type: "join", group: "g", presence: "members" }]);
});

test("after a reconnect the new state tells only what has changed", async () => {
  const it = await inside();
  it.socket.say(state(5, members(["ada", "1"], ["bob", "2"])));
  it.changes.length = 0;
  await comeBack(it);
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["bob", "2"]], "known until we know better");
  it.socket.say(diff(3, members(["dan", "7"])));
  await answerJoin(it);
  it.socket.say(state(2, members(["ada", "1"], ["cyd", "5"])));
  assert.deepEqual(it.changes, [
    { joins: [["cyd", "5"]], leaves: [["bob", "2"]], count: 2 },
    { joins: [["dan", "7"]], leaves: [], count: 3 },
  ]);
});

test("a count is told as it is, and above 200 the members are not kept any more", async () => {
  const it = await inside();
  it.socket.say(state(5, members(["ada", "1"])));
  it.socket.say({ type: "presence_count", group: "g", count: 1204 });
  assert.equal(it.group.count, 1204);
  assert.equal(it.group.presence.size, 0);
  it.socket.say(diff(9, members(["dan", "7"])));
  assert.equal(it.group.presence.size, 0, "a diff needs a state to stand on");
  it.socket.say(state(8, members(["ada", "1"])));
  assert.deepEqual(refs(it.group.presence), [["ada", "1"], ["dan", "7"]]);
});

test("who asked for the count has it", async () => {
  const it = await inside("count");
  it.socket.say({ type: "presence_count", group: "g", count: 12 });
  assert.deepEqual(it.changes, [{ joins: [], leaves: [], count: 12 }]);
});

test("the first page of many is no count", async () => {
  const it = await inside();
  it.socket.say(state(1, members(["ada", "1"]), "ada"), { type: "presence_count", group: "g", count: 300 });
  assert.equal(it.group.count, 300);
  assert.deepEqual(refs(it.group.presence), [["ada", "1"]]);
});

test("members whose keys are the names of an object's own things are members like others", async () => {
  const it = await inside();
  it.socket.say(state(1, members(["__proto__", "1"], ["constructor", "2"], ["hasOwnProperty", "3"])));
  assert.deepEqual(refs(it.group.presence), [["__proto__", "1"], ["constructor", "2"], ["hasOwnProperty", "3"]]);
  it.socket.say(diff(2, {}, members(["__proto__", "1"])));
  assert.deepEqual(refs(it.group.presence), [["constructor", "2"], ["hasOwnProperty", "3"]]);
  assert.equal({}.metas, undefined);
});

test("members are fetched page by page, each when it is asked for", async () => {
  const it = await inside("count");
  const pages = it.group.members({ limit: 2 });
  const first = pages.next();
  await settle();
  let [frame] = it.socket.frames();
  assert.deepEqual(bare([frame]), [{ type: "presence", group: "g", limit: 2 }]);
  it.socket.say(reply(frame, { members: members(["ada", "1"], ["bob", "2"]), after: "bob" }));
  assert.deepEqual(refs((await first).value), [["ada", "1"], ["bob", "2"]]);
  assert.deepEqual(it.socket.frames(), []);
  const second = pages.next();
  await settle();
  [frame] = it.socket.frames();
  assert.deepEqual(bare([frame]), [{ type: "presence", group: "g", after: "bob", limit: 2 }]);
  it.socket.say(reply(frame, { members: members(["cyd", "3"]), after: null }));
  assert.deepEqual(refs((await second).value), [["cyd", "3"]]);
  assert.equal((await pages.next()).done, true);
});

test("a page that was asked for before the line dropped is asked for again after the join", async () => {
  const it = await inside();
  const page = it.group.members().next();
  await settle();
  it.socket.frames();
  await comeBack(it);
  const [join, ...none] = it.socket.frames();
  assert.deepEqual(none, []);
  it.socket.say(reply(join, { position: null, recovered: true, events: [] }));
  await settle();
  const [frame] = it.socket.frames();
  assert.equal(frame.type, "presence");
  it.socket.say(reply(frame, { members: {}, after: null }));
  assert.equal((await page).value.size, 0);
});

test("a page that is refused is an error of the loop", async () => {
  const it = await inside();
  const page = it.group.members().next();
  await settle();
  it.socket.say(error(it.socket.frames()[0], "forbidden"));
  await assert.rejects(page, { code: "forbidden" });
});

// Being present

test("track, update and untrack say who we are, and are answered", async () => {
  const it = await inside();
  const said = [it.group.track({ name: "Ada" }), it.group.update({ name: "Ada", away: true }), it.group.untrack()];
  await settle();
  const frames = it.socket.frames();
  assert.deepEqual(bare(frames), [
    { type: "track", group: "g", meta: { name: "Ada" } },
    { type: "update", group: "g", meta: { name: "Ada", away: true } },
    { type: "untrack", group: "g" },
  ]);
  it.socket.say(frames.map((frame) => reply(frame)));
  assert.deepEqual(await Promise.all(said), [null, null, null]);
});

test("after a reconnect we are present again with what we last said, behind the joins", async () => {
  const it = await inside();
  it.group.track({ name: "Ada" });
  it.group.update({ name: "Ada", away: true });
  await settle();
  it.socket.say(it.socket.frames().map((frame) => reply(frame)));
  await comeBack(it);
  assert.deepEqual(bare(it.socket.frames()), [
    { type: "join", group: "g", presence: "members" },
    { type: "track", group: "g", meta: { name: "Ada", away: true } },
  ]);
});

test("what was tracked while away is said once, with the last facts, and answers all who asked", async () => {
  const it = await inside();
  it.socket.drop();
  const said = [it.group.track({ n: 1 }), it.group.update({ n: 2 })];
  await it.clock.pass(20_000);
  it.socket.open();
  it.socket.say({ type: "welcome", identity: "ada", window: 32, max_size: 65_536 });
  const frames = it.socket.frames();
  assert.deepEqual(bare(frames), [
    { type: "join", group: "g", presence: "members" },
    { type: "track", group: "g", meta: { n: 2 } },
  ]);
  it.socket.say(reply(frames[0], { position: null, recovered: true, events: [] }), reply(frames[1]));
  assert.deepEqual(await Promise.all(said), [null, null]);
});

test("what was untracked, or refused, is not said again", async () => {
  const it = await inside();
  const h = it.rt.group("h");
  it.group.track({ n: 1 });
  it.group.untrack();
  const refused = h.track({ n: 1 });
  await settle();
  const [one, two, three] = it.socket.frames();
  it.socket.say(reply(one), reply(two), error(three, "forbidden"));
  await assert.rejects(refused, { code: "forbidden" });
  await comeBack(it);
  assert.deepEqual(bare(it.socket.frames()), [{ type: "join", group: "g", presence: "members" }]);
});

test("who tracks in a group that refuses the join is told so", async () => {
  const it = await open();
  const tracked = it.rt.join("g").track({ n: 1 });
  await settle();
  const [join, track] = it.socket.frames();
  it.socket.say(error(join, "forbidden"), error(track, "not_joined"));
  await assert.rejects(tracked, { code: "not_joined" });
});

test("presence that is refused when it is said again after a loss rejects nothing that nobody has", async (t) => {
  const unhandled = [];
  const note = (failure) => unhandled.push(failure);
  process.on("unhandledRejection", note);
  t.after(() => process.off("unhandledRejection", note));
  const refusals = [
    (frames) => [error(frames[0], "forbidden"), error(frames[1], "not_joined")],
    (frames) => [reply(frames[0], { position: null, recovered: true, events: [] }), error(frames[1], "forbidden")],
  ];
  for (const refuse of refusals) {
    const it = await inside();
    it.group.track({ n: 1 });
    await settle();
    it.socket.say(reply(it.socket.frames()[0]));
    await comeBack(it);
    it.socket.say(refuse(it.socket.frames()));
    await settle();
    await comeBack(it);
    assert.ok(!it.socket.frames().some(({ type }) => type === "track"));
    it.rt.close();
  }
  await settle();
  assert.deepEqual(unhandled, []);
});

test("a meta that cannot be said is refused alone, and is not said again", async () => {
  const it = await inside();
  await assert.rejects(it.group.track({ n: 1n }), TypeError);
  await assert.rejects(it.group.update(() => {}), TypeError);
  await comeBack(it);
  assert.deepEqual(it.socket.frames().map(({ type }) => type), ["join"]);
});

test("a track that is refused for now is said again", async () => {
  const it = await inside();
  const said = it.group.track({ n: 1 });
  await settle();
  it.socket.say(error(it.socket.frames()[0], "rate_limited", 100));
  await it.clock.pass(100);
  it.socket.say(reply(it.socket.frames()[0]));
  assert.equal(await said, null);
});

test("untracking while away is answered by the reconnect: nothing is said", async () => {
  const it = await inside();
  it.group.track({ n: 1 });
  await settle();
  it.socket.say(reply(it.socket.frames()[0]));
  it.socket.drop();
  const said = it.group.untrack();
  await it.clock.pass(20_000);
  it.socket.open();
  it.socket.say({ type: "welcome", identity: "ada", window: 32, max_size: 65_536 });
  assert.equal(await said, null);
  assert.equal(it.socket.frames().length, 1);
});

test("who is taken out of a group for now is present again after the next join", async () => {
  const it = await inside();
  it.group.track({ n: 1 });
  await settle();
  it.socket.say(reply(it.socket.frames()[0]));
  it.socket.say({ type: "left", group: "g", code: "unavailable", rejoin: true });
  await it.clock.pass(1000);
  assert.deepEqual(it.socket.frames().map(({ type }) => type), ["join", "track"]);
});

test("a presence that is asked for after closing is refused", async () => {
  const it = await inside();
  it.rt.close();
  assert.equal((await outcome(it.group.track({}))).code, "closed");
});

// Whispers

test("a whisper is said without waiting, and without an answer", async () => {
  const it = await inside();
  assert.equal(it.group.whisper("cursor", { x: 1 }), true);
  assert.deepEqual(it.socket.frames(), [{ type: "whisper", group: "g", event: "cursor", data: { x: 1 } }]);
});

test("a whisper that cannot be said now is dropped, and not queued", async () => {
  const it = await inside();
  it.socket.bufferedAmount = 100_000;
  assert.equal(it.group.whisper("cursor"), false);
  assert.equal(it.rt.group("h").whisper("cursor"), false);
  it.socket.drop();
  assert.equal(it.group.whisper("cursor"), false);
  await it.clock.pass(1000);
  it.socket.open();
  assert.deepEqual(it.socket.frames(), []);
});

test("a whisper that no message can hold is an error of the caller", async () => {
  const it = await inside("members", { max_size: 200 });
  assert.throws(() => it.group.whisper("cursor", "x".repeat(300)), { code: "too_large" });
});

test("whispers of others are heard by their name, with who it is and whether it ended", async () => {
  const it = await inside();
  const heard = [];
  it.group.onWhisper("cursor", (...args) => heard.push(args));
  it.socket.say(
    { type: "whisper", group: "g", event: "cursor", data: { x: 1 }, from: "bob", expires_ms: 5000 },
    { type: "whisper", group: "g", event: "other", from: "bob" },
    { type: "whisper", group: "g", event: "cursor", from: "bob", stop: true },
  );
  assert.deepEqual(heard, [
    [{ x: 1 }, "bob", false],
    [null, "bob", true],
  ]);
});

// Typing

const whispers = (it) => it.socket.frames().filter(({ type }) => type === "whisper").map(({ data, stop }) => (stop ? "stop" : data));

test("typing is said on the first key, again before it runs out, and ends when the keys rest", async () => {
  const it = await inside();
  const typing = it.group.typing();
  for (let key = 0; key < 40; key++) {
    typing.start();
    await it.clock.pass(100);
  }
  assert.deepEqual(whispers(it), [null, null]);
  await it.clock.pass(3899);
  assert.deepEqual(whispers(it), [null, null]);
  await it.clock.pass(1);
  assert.deepEqual(whispers(it), ["stop"]);
  await it.clock.pass(20_000);
  assert.deepEqual(whispers(it), []);
  typing.start();
  assert.deepEqual(whispers(it), [null]);
});

test("typing stops when it is told to, once", async () => {
  const it = await inside();
  const typing = it.group.typing("editing", { data: { where: "title" }, every: 100, idle: 300 });
  typing.stop();
  typing.start();
  await it.clock.pass(250);
  typing.start({ where: "text" });
  await it.clock.pass(100);
  typing.stop();
  typing.stop();
  await it.clock.pass(1000);
  assert.deepEqual(whispers(it), [{ where: "title" }, { where: "title" }, { where: "title" }, { where: "text" }, "stop"]);
  assert.equal(it.group.typing("editing"), typing);
});

test("who types is known until it runs out, is said again, or stops", async () => {
  const it = await inside();
  const typing = it.group.typing();
  const changes = [];
  typing.onChange((who) => changes.push([...who.keys()]));
  const hear = (from, fields = {}) => it.socket.say({ type: "whisper", group: "g", event: "typing", from, expires_ms: 5000, ...fields });
  hear("bob");
  await it.clock.pass(4000);
  hear("bob");
  hear("__proto__");
  await it.clock.pass(4000);
  assert.deepEqual([...typing.who.keys()], ["bob", "__proto__"]);
  hear("__proto__", { stop: true });
  hear("nobody", { stop: true });
  await it.clock.pass(1000);
  assert.deepEqual(changes, [["bob"], ["bob", "__proto__"], ["bob"], []]);
});

test("what somebody types in is known, and a change of it is told", async () => {
  const it = await inside();
  const typing = it.group.typing();
  const changes = [];
  typing.onChange((who) => changes.push(who.get("bob")));
  for (const data of ["title", "title", "text"]) it.socket.say({ type: "whisper", group: "g", event: "typing", from: "bob", data, expires_ms: 5000 });
  assert.deepEqual(changes, ["title", "text"]);
});

test("where whispers run out faster, ours are said more often", async () => {
  const it = await inside();
  const typing = it.group.typing();
  it.socket.say({ type: "whisper", group: "g", event: "typing", from: "bob", expires_ms: 1000 });
  typing.start();
  await it.clock.pass(2000);
  assert.equal(whispers(it).length, 5);
});

test("who leaves a group knows nobody in it any more", async () => {
  const it = await inside();
  const typing = it.group.typing();
  it.socket.say(state(1, members(["ada", "1"])));
  it.socket.say({ type: "whisper", group: "g", event: "typing", from: "bob", expires_ms: 5000 });
  it.group.leave();
  assert.deepEqual([typing.who.size, it.group.presence.size, it.group.count], [0, 0, null]);
});
