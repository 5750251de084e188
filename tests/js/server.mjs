// A server that keeps the rules of docs/protocol.md, and dies when it is told to.
//
// The law of this file: it is written from the protocol's page and knows nothing of the client. Time is the test's.

const TEMPORARY = new Set(["rate_limited", "busy", "skipped", "unavailable"]);
const UNCOUNTED = new Set(["busy", "skipped"]);

const surrogates = (message) => (/(?<!\\)(\\\\)*\\ud[89a-f]/.test(message) ? "bad_message" : undefined);

export class Server {
  /**
   * `limit` {burst, per}: events that may come at once, and ms until the next may (or `every`: ms after which all may again); `fate(moment)` is asked at each
   * moment whether the server dies now; `delay()` is the way of a message in ms; `unfit(message)` is the code of what
   * is refused as a whole.
   */
  constructor(clock, { limit = null, window = 32, fate = () => false, delay = () => 5, unfit = surrogates } = {}) {
    Object.assign(this, { clock, limit, window, fate, delay, unfit });
    this.ledger = new Map(); // id -> data of the reply
    this.log = []; // what the group said
    this.handled = []; // each run of the handler
    this.connections = new Set();
    this.closed = []; // codes with which the server ended a connection
    this.skipped = 0;
    this.tokens = limit?.burst ?? Infinity;
    this.filled = clock.now();
    this.notBefore = 0; // what the last refusal with retry_after_ms asked for
  }

  /** For a class of fake sockets: take a new one up. */
  accept(socket) {
    const connection = { socket, groups: new Set(), arrives: 0, leaves: 0, alive: true, faults: [] };
    socket.onclosed = () => this.hangUp(connection);
    socket.onsent = (message) => this.later(connection, "arrives", () => this.hear(connection, message));
    this.clock.setTimeout(() => {
      if (!connection.alive) return;
      this.connections.add(connection);
      socket.open();
      this.say(connection, {
        type: "welcome",
        connection: "c",
        session: "s",
        identity: "ada",
        ping_interval_ms: 25_000,
        ping_timeout_ms: 20_000,
        ttl_ms: null,
        once_ms: 3_600_000,
        window: this.window,
        max_size: 65_536,
      });
    }, this.delay());
  }

  /** Messages of one direction take their time, and do not overtake each other. */
  later(connection, way, fn) {
    connection[way] = Math.max(connection[way], this.clock.now() + this.delay());
    this.clock.setTimeout(() => connection.alive && fn(), connection[way] - this.clock.now());
  }

  say(connection, ...frames) {
    if (connection.alive) this.later(connection, "leaves", () => connection.socket.say(...frames));
  }

  hangUp(connection) {
    connection.alive = false;
    this.connections.delete(connection);
  }

  close(connection, code) {
    this.closed.push(code);
    this.hangUp(connection);
    connection.socket.drop(code);
  }

  /** All connections are gone at once; what was on its way is lost. */
  die({ forget = false } = {}) {
    for (const connection of [...this.connections]) {
      this.hangUp(connection);
      connection.socket.drop(1006);
    }
    if (forget) this.ledger.clear();
  }

  dies(moment) {
    const death = this.fate(moment);
    if (death) this.die(death);
    return Boolean(death);
  }

  hear(connection, message) {
    const unfit = this.unfit(message);
    if (unfit) return this.refuse(connection, {}, unfit);
    const frames = [].concat(JSON.parse(message));
    let stopped = false;
    for (const frame of frames) {
      if (!connection.alive) return;
      if (stopped && frame.ref !== undefined) {
        this.skipped += 1;
        this.refuse(connection, frame, "skipped");
        continue;
      }
      if (this.dies("before handling")) return;
      const answer = this.handle(connection, frame);
      if (this.dies("after handling")) return;
      if (answer === undefined) continue;
      if (answer.code) {
        stopped = TEMPORARY.has(answer.code);
        this.refuse(connection, frame, answer.code, answer.retry);
      } else this.say(connection, { type: "reply", ref: frame.ref, data: answer.data });
      if (this.dies("after answering")) return;
    }
  }

  handle(connection, frame) {
    if (frame.type === "join") return this.join(connection, frame);
    if (frame.type === "leave") return { data: void connection.groups.delete(frame.group) ?? null };
    if (frame.type !== "event") return undefined;
    const now = this.clock.now();
    if (this.limit?.every) {
      const slot = Math.floor(now / this.limit.every);
      if (slot !== this.slot) [this.slot, this.tokens] = [slot, this.limit.burst];
      if (this.tokens < 1) return { code: "rate_limited", retry: (slot + 1) * this.limit.every - now };
    } else if (this.limit) {
      this.tokens = Math.min(this.limit.burst, this.tokens + (now - this.filled) / this.limit.per);
      this.filled = now;
      if (this.tokens < 1) return { code: "rate_limited", retry: Math.ceil((1 - this.tokens) * this.limit.per) };
    }
    if (frame.group && !connection.groups.has(frame.group)) return { code: "not_joined" };
    if (this.ledger.has(frame.id)) return { data: this.ledger.get(frame.id) };
    if (this.limit) this.tokens -= 1;
    this.handled.push(frame.data);
    const offset = this.log.length + 1;
    const said = { type: "event", event: "said", group: "g", data: frame.data, offset, tag: `t${offset}`, id: frame.id };
    this.log.push(said);
    this.ledger.set(frame.id, frame.data);
    for (const other of this.connections) if (other.groups.has("g")) this.say(other, said);
    return { data: frame.data };
  }

  join(connection, frame) {
    connection.groups.add(frame.group);
    const offset = this.log.length;
    const events = frame.position ? this.log.slice(frame.position.offset) : [];
    return { data: { position: { epoch: "e", offset, tag: `t${offset}` }, recovered: true, events } };
  }

  /** An error; one too many of those that count ends the connection. */
  refuse(connection, frame, code, retry) {
    const now = this.clock.now();
    if (!UNCOUNTED.has(code) && (retry === undefined || now < this.notBefore)) connection.faults.push(now);
    if (retry !== undefined) this.notBefore = now + retry;
    const temporary = TEMPORARY.has(code);
    const patience = retry === undefined ? {} : { retry_after_ms: retry };
    this.say(connection, { type: "error", ref: frame.ref, code, message: code, temporary, ...patience });
    connection.faults = connection.faults.filter((at) => at > now - 10_000);
    if (connection.faults.length >= 50) this.close(connection, 4502);
  }
}
