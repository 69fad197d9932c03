// node-redis does its normal things over the daemon's socket.
//
// usage: node_redis.mjs PACKAGE_DIRECTORY SOCKET REDIS_PORT RESP
// Exits 0 when all went as with Redis itself; an assertion says what did not.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [directory, path, port, resp] = process.argv.slice(2);
const require = createRequire(`${directory}/`);
const { createClient } = require("redis");
assert.equal(require("redis/package.json").version.split(".")[0], "6");

const key = (name) => `node-redis-${resp}:${name}`;
const DEEP = 20000;
const connect = async (options) => {
  const client = createClient(options);
  client.on("error", (error) => {
    throw error;
  });
  return client.connect();
};
const local = { socket: { path, reconnectStrategy: false }, RESP: Number(resp), name: "tester" };

const client = await connect(local);

// Plain commands.
assert.equal(await client.ping(), "PONG");
assert.equal(await client.incr(key("a")), 1);
assert.equal(await client.incrBy(key("a"), 10), 11);
assert.equal(await client.decr(key("a")), 10);
assert.equal(await client.decrBy(key("a"), 2), 8);
assert.equal(await client.get(key("a")), "8");
assert.equal(await client.get(key("missing")), null);
assert.deepEqual(await client.mGet([key("a"), key("missing")]), ["8", null]);
assert.equal(await client.exists([key("a"), key("missing")]), 1);
assert.equal(await client.clientGetName(), "tester");
await assert.rejects(client.sendCommand(["INCRBY", key("a"), "x"]), /ERR value is not an integer or out of range/);
await assert.rejects(client.lPush(key("list"), "x"), /unknown command/);

// A transaction, and a pipeline of the same shape.
assert.deepEqual(await client.multi().incr(key("m")).incr(key("m")).get(key("m")).exec(), [1, 2, "2"]);
assert.deepEqual(await client.multi().incr(key("m")).get(key("m")).execAsPipeline(), [3, "3"]);

// Many at once: the client writes all that one turn of its loop brought.
const replies = await Promise.all(Array.from({ length: DEEP }, () => client.incr(key("many"))));
assert.deepEqual(replies, Array.from({ length: DEEP }, (_, n) => n + 1));

// The channel.
const subscriber = await connect(local);
const published = Promise.withResolvers?.() ?? (() => {
  const later = {};
  later.promise = new Promise((resolve) => (later.resolve = resolve));
  return later;
})();
await subscriber.subscribe("tallyd:deltas", (text) => {
  const found = JSON.parse(text).deltas.some(([name, delta]) => name === key("published") && delta === 3);
  if (found) published.resolve();
});
await client.incrBy(key("published"), 3);
assert.equal(await client.sendCommand(["TALLY.FLUSH"]), "OK");
await published.promise;
await subscriber.unsubscribe("tallyd:deltas");
assert.equal(await subscriber.incr(key("after")), 1);

// What arrived.
await client.sendCommand(["TALLY.FLUSH"]);
const store = await connect({ socket: { port: Number(port) } });
const names = ["a", "m", "many", "published", "after"];
assert.deepEqual(await store.mGet(names.map(key)), ["8", "3", `${DEEP}`, "3", "1"]);

await Promise.all([client, subscriber, store].map((connection) => connection.close()));
console.log("ok");
