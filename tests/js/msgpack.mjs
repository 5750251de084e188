// A small MessagePack codec, so that the tests need no package: what JSON has, and bytes.
//
// Source: https://github.com/msgpack/msgpack/blob/master/spec.md

const UTF8 = new TextEncoder();

/** The codec that `connect` takes. */
export const codec = { encode, decode };

export function encode(value) {
  const out = [];
  write(value, out);
  return Uint8Array.from(out);
}

function write(value, out) {
  if (value === null || value === undefined) out.push(0xc0);
  else if (typeof value === "boolean") out.push(value ? 0xc3 : 0xc2);
  else if (typeof value === "number") writeNumber(value, out);
  else if (typeof value === "string") writeSized(UTF8.encode(value), 0xa0, 32, [0xd9, 0xda, 0xdb], out);
  else if (value instanceof Uint8Array) writeSized(value, null, 0, [0xc4, 0xc5, 0xc6], out);
  else if (Array.isArray(value)) {
    writeHead(value.length, 0x90, 16, [null, 0xdc, 0xdd], out);
    for (const item of value) write(item, out);
  } else {
    const entries = Object.entries(value).filter(([, item]) => item !== undefined);
    writeHead(entries.length, 0x80, 16, [null, 0xde, 0xdf], out);
    for (const [key, item] of entries) {
      write(key, out);
      write(item, out);
    }
  }
}

function writeNumber(value, out) {
  if (Number.isInteger(value) && value >= 0 && value < 128) out.push(value);
  else if (Number.isInteger(value) && value < 0 && value >= -32) out.push(value & 0xff);
  else {
    const bytes = new DataView(new ArrayBuffer(8));
    const whole = Number.isSafeInteger(value);
    if (whole) bytes.setBigInt64(0, BigInt(value));
    else bytes.setFloat64(0, value);
    out.push(whole ? 0xd3 : 0xcb, ...new Uint8Array(bytes.buffer));
  }
}

function writeSized(bytes, small, below, heads, out) {
  writeHead(bytes.length, small, below, heads, out);
  for (const byte of bytes) out.push(byte);
}

function writeHead(size, small, below, [one, two, four], out) {
  if (size < below) out.push(small + size);
  else if (one !== null && size < 0x100) out.push(one, size);
  else if (size < 0x10000) out.push(two, size >> 8, size & 0xff);
  else out.push(four, size >>> 24, (size >> 16) & 0xff, (size >> 8) & 0xff, size & 0xff);
}

export function decode(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const take = (size) => ((at += size), at - size);
  const text = (size) => new TextDecoder().decode(bytes.subarray(take(size), at));
  const blob = (size) => bytes.slice(take(size), at);
  const array = (size) => Array.from({ length: size }, read);
  const map = (size) => Object.fromEntries(Array.from({ length: size }, () => [read(), read()]));
  const small = () => view.getUint8(take(1));
  const medium = () => view.getUint16(take(2));
  const large = () => view.getUint32(take(4));
  const heads = new Map([
    [0xc0, () => null], [0xc2, () => false], [0xc3, () => true],
    [0xc4, () => blob(small())], [0xc5, () => blob(medium())], [0xc6, () => blob(large())],
    [0xca, () => view.getFloat32(take(4))], [0xcb, () => view.getFloat64(take(8))],
    [0xcc, small], [0xcd, medium], [0xce, large], [0xcf, () => Number(view.getBigUint64(take(8)))],
    [0xd0, () => view.getInt8(take(1))], [0xd1, () => view.getInt16(take(2))], [0xd2, () => view.getInt32(take(4))],
    [0xd3, () => Number(view.getBigInt64(take(8)))],
    [0xd9, () => text(small())], [0xda, () => text(medium())], [0xdb, () => text(large())],
    [0xdc, () => array(medium())], [0xdd, () => array(large())],
    [0xde, () => map(medium())], [0xdf, () => map(large())],
  ]);
  function read() {
    const head = small();
    if (head < 0x80) return head;
    if (head < 0x90) return map(head & 0x0f);
    if (head < 0xa0) return array(head & 0x0f);
    if (head < 0xc0) return text(head & 0x1f);
    if (head >= 0xe0) return head - 0x100;
    const rest = heads.get(head);
    if (!rest) throw new Error(`0x${head.toString(16)} is no beginning`);
    return rest();
  }
  return read();
}
