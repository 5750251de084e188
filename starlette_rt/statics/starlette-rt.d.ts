// The types of starlette-rt.js.

/** What a promise of this client rejects with, and what `onError` hands out. */
export class RealtimeError extends Error {
  constructor(
    code: string,
    message?: string,
    options?: { temporary?: boolean; retryAfter?: number | null; event?: string; id?: string },
  );
  /**
   * A code of the protocol, of the application, or of this client: `timeout`, `queue_full`, `too_large`, `closed`,
   * `outcome_unknown`, `identity_changed`, `left`.
   */
  readonly code: string;
  readonly temporary: boolean;
  /** Milliseconds, if the server said so. */
  readonly retryAfter: number | null;
  /** The event that it is about, if it is about one. */
  readonly event: string | undefined;
  readonly id: string | undefined;
}

export type State = "connecting" | "open" | "waiting" | "offline" | "closed";

/** Takes a callback back. */
export type Off = () => void;

/** The place after an event of a group. Opaque: hand it back as it is. */
export interface Position {
  readonly epoch: string;
  readonly offset: number;
  readonly tag: string;
}

export interface Codec {
  encode(value: unknown): Uint8Array;
  decode(bytes: Uint8Array): unknown;
}

/** For tests: time and chance. */
export interface Clock {
  now(): number;
  setTimeout(fn: () => void, ms: number): unknown;
  clearTimeout(timer: unknown): void;
  /** From 0 up to 1, as `Math.random`. */
  random(): number;
}

export interface Options {
  /**
   * Who we are; none is a guest. A function is called at each connect, and before the token runs out. An error of it
   * is a failed attempt, unless it has `fatal: true`: that closes.
   */
  token?: string | (() => string | null | undefined | Promise<string | null | undefined>);
  /** Speak MessagePack with this codec instead of JSON. */
  codec?: Codec;
  /** Keep the queue across a reload and a `close`, for example in `localStorage`. */
  storage?: Storage;
  /** 22 to 64 characters of `A-Z a-z 0-9 _ -`; by default made once per tab. A secret. */
  session?: string;
  /** Milliseconds that each `emit` may take; by default it waits until it is answered. */
  timeout?: number;
  /** How many events may be unanswered or queued; 1000 by default. */
  queue?: number;
  /** Milliseconds: the wait after n failures is random between 0 and min(cap, base * 2 ** n). */
  backoff?: { base?: number; cap?: number };
  /** Another class of sockets than the global one. */
  WebSocket?: new (url: string, protocols: string[]) => WebSocket;
  /** For tests. */
  clock?: Partial<Clock>;
}

export interface EmitOptions {
  group?: string;
  timeout?: number;
  /** 1 to 64 characters; the event is handled once per id. Random by default. */
  id?: string;
}

export interface Meta {
  event: string;
  group: string | undefined;
  id: string | undefined;
  offset: number | undefined;
  /** It was said while we were away. */
  recovered: boolean;
}

export interface StateInfo {
  code: number | null;
  reason: string;
  /** Milliseconds until the next attempt. */
  retryIn: number | null;
}

export function connect(url: string, options?: Options): Realtime;

export interface Realtime {
  readonly state: State;
  readonly identity: string | null;
  readonly session: string;
  readonly connection: string | null;
  /** Milliseconds from a request to its answer, the server's work included, smoothed; null until there was one. */
  readonly latency: number | null;
  /** How many events are queued or unanswered. */
  readonly pending: number;

  /**
   * Resolves with what the server's handler returned; rejects with a RealtimeError, or with what was thrown where the
   * data cannot be said at all. In the state `closed` nothing is taken any more, nor kept: it rejects with `closed`.
   */
  emit(event: string, data?: unknown, options?: EmitOptions): Promise<any>;
  /** Events of any group, and those for this client alone. */
  on(event: string, fn: (data: any, meta: Meta) => unknown): Off;
  /** Answers what the server asks: with what `fn` returns, or with its error. */
  answer(event: string, fn: (data: any, meta: Omit<Meta, "offset">) => unknown): Off;
  onState(fn: (state: State, info: StateInfo) => unknown): Off;
  onLatency(fn: (ms: number) => unknown): Off;
  /** Errors that belong to no call of `emit`. */
  onError(fn: (error: RealtimeError) => unknown): Off;

  /** Joins now and after each reconnect. */
  join(group: string, options?: JoinOptions): Group;
  /** A group that the server joins this client to. The same object as that of `join`. */
  group(name: string): Group;

  /** Try now, also from "closed"; an open connection is given up for a new one. */
  reconnect(): void;
  /** What is not answered rejects with `closed`; with a storage it is kept there and goes on after `reconnect`. */
  close(): void;
}

export interface JoinOptions {
  /** Recover what was said since. */
  position?: Position | null;
  /** So many of the last events; where there is no position. */
  last?: number;
  /** Who is there, or only how many. */
  presence?: "members" | "count";
}

export interface Recovery {
  /** Nothing is missing. If not, take the snapshot or fetch what you need. */
  recovered: boolean;
  snapshot: any;
  position: Position | null;
}

export interface Member {
  metas: Array<{ ref: string; [fact: string]: any }>;
  /** Of one that is gone. */
  reason?: string;
}

export interface Group {
  readonly name: string;
  readonly joined: boolean;
  /** The place after the last event that was shown; null where there is no history. */
  readonly position: Position | null;
  /** Of the first join. Whoever sets callbacks right after it gets the events that came with it. */
  readonly ready: Promise<Recovery>;

  on(event: string, fn: (data: any, meta: Meta) => unknown): Off;
  emit(event: string, data?: unknown, options?: Omit<EmitOptions, "group">): Promise<any>;

  /** May get lost; false if it was not even sent. */
  whisper(event: string, data?: unknown): boolean;
  onWhisper(event: string, fn: (data: any, from: string, stop: boolean) => unknown): Off;
  typing(event?: string, options?: TypingOptions): Typing;

  /** Kept up while the group is of at most 200 members and `presence: "members"` was asked for. */
  readonly presence: Map<string, Member>;
  readonly count: number | null;
  onPresence(
    fn: (change: { joins: Map<string, Member>; leaves: Map<string, Member>; count: number | null }) => unknown,
  ): Off;
  /** Be present with these facts, also after a reconnect. Rejects where that, or the join, is refused. */
  track(meta: Record<string, unknown>): Promise<any>;
  update(meta: Record<string, unknown>): Promise<any>;
  untrack(): Promise<any>;
  /** Who is there, one page after the other. */
  members(options?: { limit?: number }): AsyncGenerator<Map<string, Member>, void>;

  /** After each join, reset and left. */
  onRecover(fn: (recovery: Recovery & { reason: "join" | "reset" | "left" }) => unknown): Off;
  /** Leaves when what was emitted here is answered. */
  leave(): Promise<void>;
  /** Refused (`forbidden`, `too_many_groups`, …), or taken out, for good. */
  onLeft(fn: (code: string) => unknown): Off;
}

export interface TypingOptions {
  data?: unknown;
  /** Milliseconds between two whispers; 2500 by default. */
  every?: number;
  /** Milliseconds without a `start` after which it stops; 4000 by default. */
  idle?: number;
}

export interface Typing {
  /** Call it on each key. */
  start(data?: unknown): void;
  stop(): void;
  /** Who else is typing, and what they said with it. */
  readonly who: Map<string, any>;
  onChange(fn: (who: Map<string, any>) => unknown): Off;
}
