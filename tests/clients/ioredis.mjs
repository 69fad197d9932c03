// ioredis does its normal things over the daemon's socket.
//
// usage: ioredis.mjs PACKAGE_DIRECTORY SOCKET REDIS_PORT PACKAGE VERSION
// Exits 0 when all went as with Redis itself; an assertion says what did not.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createRequire } from "node:module";

const [directory, path, port, packageName, version] = process.argv.slice(2);
const require = createRequire(`${directory}/`);
const { Redis } = require(packageName);
assert.equal(require(`${packageName}/package.json`).version.split(".")[0], version);

const key = (name) => `${packageName}:${name}`;
const DEEP = 20000;
const connections = [];
const connect = (options = {}) => {
  // Without retries a lost connection is an error, not a second attempt.
  const redis = new Redis({ path, retryStrategy: null, maxRetriesPerRequest: 0, ...options });
  redis.on("error", (error) => {
    throw error;
  });
  connections.push(redis);
  return redis;
};

const redis = connect({ connectionName: "tester" });
await once(redis, "ready");

// Plain commands.
assert.equal(await redis.ping(), "PONG");
assert.equal(await redis.incr(key("a")), 1);
assert.equal(await redis.incrby(key("a"), 10), 11);
assert.equal(await redis.decr(key("a")), 10);
assert.equal(await redis.decrby(key("a"), 2), 8);
assert.equal(await redis.get(key("a")), "8");
assert.equal(await redis.get(key("missing")), null);
assert.deepEqual(await redis.mget(key("a"), key("missing")), ["8", null]);
assert.equal(await redis.exists(key("a"), key("missing")), 1);
assert.equal(await redis.client("GETNAME"), "tester");
await assert.rejects(redis.incrby(key("a"), "x"), /ERR value is not an integer or out of range/);
await assert.rejects(redis.lpush(key("list"), "x"), /unknown command/);

// A pipeline, and transactions.
assert.deepEqual(await redis.pipeline().incr(key("p")).get(key("p")).exec(), [
  [null, 1],
  [null, "1"],
]);
assert.deepEqual(await redis.multi().incr(key("m")).incr(key("m")).get(key("m")).exec(), [
  [null, 1],
  [null, 2],
  [null, "2"],
]);
await redis.multi({ pipeline: false });
assert.equal(await redis.incr(key("m")), "QUEUED");
assert.deepEqual(await redis.exec(), [[null, 3]]);

// Many at once on one connection, and with automatic pipelining.
const count = (client, name) => Promise.all(Array.from({ length: DEEP }, () => client.incr(key(name))));
const numbers = Array.from({ length: DEEP }, (_, n) => n + 1);
assert.deepEqual(await count(redis, "many"), numbers);
const automatic = connect({ enableAutoPipelining: true });
assert.deepEqual(await count(automatic, "automatic"), numbers);

// The channel.
const subscriber = connect();
const published = new Promise((resolve) => {
  subscriber.on("message", (channel, text) => {
    const found = JSON.parse(text).deltas.some(([name, delta]) => name === key("published") && delta === 3);
    if (channel === "tallyd:deltas" && found) resolve();
  });
});
assert.equal(await subscriber.subscribe("tallyd:deltas"), 1);
await redis.incrby(key("published"), 3);
assert.equal(await redis.call("TALLY.FLUSH"), "OK");
await published;
assert.equal(await subscriber.unsubscribe("tallyd:deltas"), 0);
assert.equal(await subscriber.incr(key("after")), 1);

// What arrived.
await redis.call("TALLY.FLUSH");
const store = new Redis({ port: Number(port) });
connections.push(store);
const names = ["a", "p", "m", "many", "automatic", "published", "after"];
assert.deepEqual(await store.mget(names.map(key)), ["8", "1", "3", `${DEEP}`, `${DEEP}`, "3", "1"]);

for (const connection of connections) assert.equal(await connection.quit(), "OK");
console.log("ok");
