// The live page in a real Chromium, step by step.
//
// usage: page.mjs PACKAGE_DIRECTORY URL SCREENSHOT_DIRECTORY
// Reads one step a line, [name, argument] in JSON, and answers each with "ok" or what went wrong.
// Ends with its standard input.

import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [directory, url, screenshots] = process.argv.slice(2);
const { chromium } = createRequire(`${directory}/`)("playwright-core");
const LIMIT_MS = 30000;

mkdirSync(screenshots, { recursive: true });
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
page.setDefaultTimeout(LIMIT_MS);

// What must not happen, at any step.
let daemonIsAway = false;
const wrongs = [];
page.on("request", (request) => {
  const asked = new URL(request.url());
  if (asked.protocol !== "data:" && asked.origin !== new URL(url).origin) wrongs.push(`asks for ${asked}`);
});
page.on("console", (message) => {
  // The browser itself notes that /events cannot be had.
  const lost = daemonIsAway && message.text().includes("net::ERR_");
  if (["error", "warning"].includes(message.type()) && !lost) wrongs.push(`console: ${message.text()}`);
});
page.on("pageerror", (error) => wrongs.push(`error: ${error.message}`));
page.on("dialog", (dialog) => { wrongs.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });

const text = (id) => page.locator(`#${id}`).textContent();
const number = async (id) => Number((await text(id)).replaceAll(",", ""));
const becomes = async (id, wanted) => {
  try {
    await page.waitForFunction(([id, wanted]) => document.getElementById(id).textContent === wanted, [id, wanted]);
  } catch {
    assert.fail(`#${id} is "${await text(id)}", not "${wanted}"; the page says: ${await text("notices")}`);
  }
};
const rises = async (id) => {
  const before = await number(id) || 0;
  await page.waitForFunction(([id, before]) => {
    return Number(document.getElementById(id).textContent.replaceAll(",", "")) > before;
  }, [id, before]);
};
const noticed = async (wanted) => {
  await page.locator(".notice strong", { hasText: wanted }).waitFor();
  // Said to those who do not see it.
  await page.waitForFunction((wanted) => document.getElementById("said").textContent.includes(wanted), wanted);
};

// Text that stands out less from its background than WCAG's AA asks for.
const pale = () => page.evaluate(() => {
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parse = (colour) => (colour.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length || ["SCRIPT", "STYLE", "title"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    let behind = node;
    while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const [a, b] = [parse(node.namespaceURI.endsWith("svg") ? style.fill : style.color), parse(getComputedStyle(behind ?? document.documentElement).backgroundColor)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`"${node.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
  }
  return found;
});

const steps = {
  async open({ name }) {
    await page.goto(url);
    await becomes("name", name);
    await becomes("verdict", "Keeping up");
    assert.equal(await page.title(), `tallyd ${name}`);
    assert.equal(await page.locator(".notice:visible").count(), 0);
  },

  async moving() {
    for (const id of ["increments_total", "flushed_keys_total", "batches_total", "commands_total"]) await rises(id);
    for (const id of ["rate-in", "rate-out", "ratio", "connections"]) assert.ok(await number(id) > 0, id);
    assert.ok(await number("ratio") > 1, "the page shows that nothing is saved");
    for (const id of ["chart-in", "chart-out"]) {
      await page.locator(`#${id} .stroke`).first().waitFor({ state: "attached" });
      assert.match(await page.locator(`#${id} title`).textContent(), /now [\d,.]+, at least [\d,.]+, at most [\d,.]+/);
    }
  },

  async key({ key }) {
    // By its text, so not as the markup that it pretends to be.
    await page.waitForFunction((key) => [...document.querySelectorAll("#keys .key > span:first-child")].some((cell) => cell.textContent === key), key);
    assert.equal(await page.locator("img").count(), 0);
    assert.equal(await page.evaluate(() => window.hacked), undefined);
    const row = page.locator("#keys tr", { hasText: key });
    assert.match(await row.locator("td.number").first().textContent(), /^[\d,]+$/);
    assert.match(await row.locator(".error").textContent(), /^(exact|± [\d,]+)$/);
    assert.equal(await page.locator("#hot th[scope=col]").count(), 4);
  },

  async pictures() {
    await page.evaluate(() => document.activeElement?.blur());
    for (const [name, colorScheme, width, height] of [["dark", "dark", 1280, 900], ["phone", "dark", 360, 780], ["light-phone", "light", 360, 780], ["light", "light", 1280, 900]]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height });
      await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
      const across = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(across <= width, `${name}: ${across} px wide`);
      assert.deepEqual(await pale(), [], name);
      await page.screenshot({ path: `${screenshots}/${name}.png`, fullPage: true });
    }
  },

  async equal(numbers) {
    const wanted = new Intl.NumberFormat("en-US");
    for (const [id, value] of Object.entries(numbers)) await becomes(id, wanted.format(value));
    await becomes("rate-in", "0");
    await becomes("rate-out", "0");
  },

  async store_away({ error }) {
    await noticed("The store is away.");
    const notice = await page.locator(".notice", { hasText: "The store is away." }).textContent();
    assert.match(notice, /kept in the journal; nothing is lost/);
    assert.match(notice, new RegExp(error));
    await becomes("verdict", "Store away");
    await becomes("store", "Away");
    assert.match(await page.title(), /^Store away: /);
    await page.waitForFunction(() => Number(document.getElementById("pending-keys").textContent) > 0);
    assert.deepEqual(await pale(), []);
    await page.screenshot({ path: `${screenshots}/store-away.png` });
  },

  async well({ name }) {
    await becomes("verdict", "Keeping up");
    await becomes("store", "Connected");
    await becomes("said", "All is well.");
    await becomes("name", name);
    assert.equal(await page.locator(".notice:visible").count(), 0);
    assert.ok(!await page.evaluate(() => document.documentElement.classList.contains("stale")));
    daemonIsAway = false;
  },

  // To be told before the daemon goes.
  async expect_away() {
    daemonIsAway = true;
  },

  async away() {
    await noticed("The daemon does not answer since ");
    await becomes("verdict", "No answer");
    assert.ok(await page.evaluate(() => document.documentElement.classList.contains("stale")));
    assert.match(await page.title(), /^No answer: /);
    await page.screenshot({ path: `${screenshots}/away.png` });
  },

  async rejected({ count }) {
    await noticed(`The store refused ${count} delta`);
    await becomes("rejected_total", String(count));
  },

  async keyboard() {
    // Every control, in order, each with a focus that is seen.
    await page.evaluate(() => document.activeElement?.blur());
    await page.locator("body").click({ position: { x: 2, y: 2 } });
    const reached = [];
    for (let i = 0; i < 4; i += 1) {
      await page.keyboard.press("Tab");
      reached.push(await page.evaluate(() => {
        const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
        const seen = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
        return `${document.activeElement.id || document.activeElement.tagName} ${seen}`;
      }));
    }
    assert.deepEqual(reached, ["pause true", "help true", "charts true", "SUMMARY true"]);

    // Single moments of the charts, and all of them as a table.
    await page.keyboard.press("Enter");
    await page.locator("#moments tr").first().waitFor();
    await page.keyboard.press("Enter");
    await page.locator("#charts").focus();
    await page.keyboard.press("ArrowLeft");
    await page.waitForFunction(() => /^\d\d:\d\d:\d\d: /.test(document.getElementById("moment-in").textContent));
    assert.match(await text("said"), /increments in, [\d,.]+ commands out$/);
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => document.getElementById("moment-in").textContent.startsWith("peak"));

    await page.keyboard.press("?");
    await page.locator("#keys-help[open]").waitFor();
    await page.keyboard.press("Escape");
    await page.locator("#keys-help").waitFor({ state: "hidden" });

    // Paused, the numbers stand, though the daemon is still heard.
    await page.keyboard.press("p");
    assert.equal(await page.locator("#pause").getAttribute("aria-pressed"), "true");
    assert.match(await text("pause"), /^Paused at /);
    const before = await text("increments_total");
    for (let i = 0; i < 2; i += 1) {
      await page.waitForFunction((last) => heard > last, await page.evaluate(() => heard));
    }
    assert.equal(await text("increments_total"), before, "paused, and it moves");
    await page.keyboard.press("p");
    assert.equal(await page.locator("#pause").getAttribute("aria-pressed"), "false");
    await rises("increments_total");
    assert.notEqual(await text("increments_total"), before);
  },

  async still() {
    const moves = () => page.evaluate(() => getComputedStyle(document.querySelector(".bar i")).transitionDuration);
    assert.notEqual(await moves(), "0s");
    await page.emulateMedia({ reducedMotion: "reduce" });
    assert.equal(await moves(), "0s");
    await page.emulateMedia({ reducedMotion: null });
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [name, argument] = JSON.parse(line);
  let answer = "ok";
  try {
    await steps[name](argument ?? {});
    assert.deepEqual(wrongs, []);
  } catch (error) {
    answer = `${name}: ${error.message ?? error}`.replaceAll("\n", " ");
  }
  console.log(answer);
}
await browser.close();
