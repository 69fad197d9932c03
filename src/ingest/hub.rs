//! Subscribers on this daemon's own socket.
//!
//! Each has a bounded queue; one that does not keep up is cut off and counted, as Redis does, so
//! that it can neither fill the memory nor hold up anyone.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::core::Core;
use super::listener::Client;
use crate::wire::encode::{self, Version};

/// Before a key: the channel that tells its value whenever it changed.
pub const KEY_CHANNEL: &[u8] = b"tallyd:key:";
/// Messages that may wait for one subscriber: a batch of the largest size, for one who watches
/// every key of it.
pub const QUEUE: usize = 128 * 1024;
/// Bytes that may wait for one subscriber, as in Redis.
const QUEUE_BYTES: usize = 32 << 20;

/// An encoded message.
pub type Frame = Rc<[u8]>;

/// Where a subscriber's messages wait.
pub struct Inbox {
    frames: mpsc::Receiver<Frame>,
    bytes: Rc<Cell<usize>>,
}

impl Inbox {
    /// The next message.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame>> {
        let next = self.frames.poll_recv(cx);
        if let Poll::Ready(Some(frame)) = &next {
            self.bytes.set(self.bytes.get() - frame.len());
        }
        next
    }
}

struct Subscriber {
    client: Rc<Client>,
    queue: mpsc::Sender<Frame>,
    /// What waits in the queue.
    bytes: Rc<Cell<usize>>,
    version: Version,
    channels: HashSet<Vec<u8>>,
    patterns: HashSet<Vec<u8>>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Hub {
    subscribers: HashMap<u64, Subscriber>,
}

/// Exact names, or patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// `SUBSCRIBE`
    Channel,
    /// `PSUBSCRIBE`
    Pattern,
}

impl Hub {
    /// Whether this client has a queue already.
    pub fn knows(&self, client: u64) -> bool {
        self.subscribers.contains_key(&client)
    }

    /// Adds a client, which is subscribed to nothing yet; what it is to be sent waits in the inbox.
    pub fn add(&mut self, client: Rc<Client>) -> Inbox {
        let id = client.id;
        let (queue, frames) = mpsc::channel(QUEUE);
        let bytes = Rc::new(Cell::new(0));
        let new = Subscriber {
            client,
            queue,
            bytes: Rc::clone(&bytes),
            version: Version::Resp2,
            channels: HashSet::new(),
            patterns: HashSet::new(),
        };
        self.subscribers.insert(id, new);
        Inbox { frames, bytes }
    }

    /// Subscribes; returns to how much the client is subscribed.
    pub fn subscribe(&mut self, client: u64, by: By, name: &[u8], version: Version) -> usize {
        let Some(subscriber) = self.subscribers.get_mut(&client) else {
            return 0;
        };
        subscriber.version = version;
        subscriber.names(by).insert(name.to_vec());
        subscriber.count()
    }

    /// Unsubscribes; returns to how much the client is still subscribed.
    pub fn unsubscribe(&mut self, client: u64, by: By, name: &[u8]) -> usize {
        let Some(subscriber) = self.subscribers.get_mut(&client) else {
            return 0;
        };
        subscriber.names(by).remove(name);
        subscriber.count()
    }

    /// What the client is subscribed to.
    pub fn names(&self, client: u64, by: By) -> Vec<Vec<u8>> {
        let names = self.subscribers.get(&client).map(|subscriber| match by {
            By::Channel => &subscriber.channels,
            By::Pattern => &subscriber.patterns,
        });
        names
            .map(|names| names.iter().cloned().collect())
            .unwrap_or_default()
    }

    /// Whether anyone may want to know of single keys. Patterns are taken for a yes.
    pub fn watches_keys(&self) -> bool {
        self.subscribers.values().any(|subscriber| {
            !subscriber.patterns.is_empty()
                || subscriber
                    .channels
                    .iter()
                    .any(|name| name.starts_with(KEY_CHANNEL))
        })
    }

    /// Channels with a subscriber that match `pattern`, each once.
    pub fn channels(&self, pattern: Option<&[u8]>) -> BTreeSet<&[u8]> {
        let all = self
            .subscribers
            .values()
            .flat_map(|subscriber| &subscriber.channels);
        all.map(Vec::as_slice)
            .filter(|name| pattern.is_none_or(|p| glob(p, name)))
            .collect()
    }

    /// How many subscribe to exactly this channel.
    pub fn subscribers(&self, channel: &[u8]) -> usize {
        self.subscribers
            .values()
            .filter(|s| s.channels.contains(channel))
            .count()
    }

    /// How many different patterns there are.
    pub fn patterns(&self) -> usize {
        let all = self
            .subscribers
            .values()
            .flat_map(|subscriber| &subscriber.patterns);
        all.collect::<BTreeSet<_>>().len()
    }

    /// Forgets a client.
    pub fn remove(&mut self, client: u64) {
        self.subscribers.remove(&client);
    }

    /// Hands a message to everyone who is subscribed to `channel`.
    pub fn publish(&mut self, channel: &[u8], message: &[u8], core: &Core) {
        // One encoding for each version, whoever gets it.
        let mut plain: [Option<Frame>; 2] = [None, None];
        self.subscribers.retain(|_, subscriber| {
            let mut keeps_up = true;
            if subscriber.channels.contains(channel) {
                let version = subscriber.version;
                let frame = plain[usize::from(version == Version::Resp3)]
                    .get_or_insert_with(|| frame(version, &[b"message", channel, message]));
                keeps_up = subscriber.hand(Rc::clone(frame));
            }
            for pattern in subscriber.patterns.iter().filter(|p| glob(p, channel)) {
                let frame = frame(
                    subscriber.version,
                    &[b"pmessage", pattern, channel, message],
                );
                keeps_up &= subscriber.hand(frame);
            }
            if !keeps_up {
                core.stats.subscribers_dropped_total.add(1);
                core.notices.slow_subscriber(subscriber.client.id);
                subscriber.client.cut_off();
            }
            keeps_up
        });
    }
}

impl Subscriber {
    /// `false`: it has not read for too long.
    fn hand(&self, frame: Frame) -> bool {
        let bytes = self.bytes.get() + frame.len();
        // One message alone may be as large as the store lets it be.
        let room = bytes <= QUEUE_BYTES || self.bytes.get() == 0;
        if room {
            self.bytes.set(bytes);
        }
        room && self.queue.try_send(frame).is_ok()
    }

    fn names(&mut self, by: By) -> &mut HashSet<Vec<u8>> {
        match by {
            By::Channel => &mut self.channels,
            By::Pattern => &mut self.patterns,
        }
    }

    fn count(&self) -> usize {
        self.channels.len() + self.patterns.len()
    }
}

fn frame(version: Version, parts: &[&[u8]]) -> Frame {
    let mut out = Vec::new();
    encode::push(&mut out, parts.len(), version);
    for part in parts {
        encode::bulk(&mut out, part);
    }
    out.into()
}

/// Redis' glob: `*`, `?`, `[a-c]`, `[^x]`, and `\` before a character that means itself.
pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when the last star takes one character more.
    let mut star = None;
    loop {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p + 1, t));
            p += 1;
            continue;
        }
        if t == text.len() {
            return p == pattern.len();
        }
        match one(&pattern[p.min(pattern.len())..], text[t]) {
            Some(len) => {
                p += len;
                t += 1;
            }
            None => match star {
                None => return false,
                Some((after, from)) => {
                    p = after;
                    t = from + 1;
                    star = Some((after, t));
                }
            },
        }
    }
}

/// Whether the first element of the pattern takes `byte`; its length if so.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern {
        [] => None,
        [b'?', ..] => Some(1),
        [b'\\', literal, ..] => (literal == byte).then_some(2),
        [b'[', ref rest @ ..] => {
            let (negated, from) = if rest.first() == Some(&b'^') {
                (true, 1)
            } else {
                (false, 0)
            };
            let mut at = from;
            let mut found = false;
            while at < rest.len() && rest[at] != b']' {
                match rest[at..] {
                    [b'\\', literal, ..] => {
                        found |= literal == byte;
                        at += 2;
                    }
                    [low, b'-', high, ..] if high != b']' => {
                        found |= (low.min(high)..=low.max(high)).contains(&byte);
                        at += 3;
                    }
                    [literal, ..] => {
                        found |= literal == byte;
                        at += 1;
                    }
                    [] => break,
                }
            }
            (found != negated).then_some((at + 2).min(pattern.len()))
        }
        [literal, ..] => (literal == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn globs_match_as_in_redis() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hello", false),
            ("h[a-b]llo", "hbllo", true),
            ("tallyd:*", "tallyd:deltas", true),
            ("tallyd:*", "tally:deltas", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("*a*b*c", "xxaxxbxxc", true),
            ("*a*b*c", "xxaxxcxxb", false),
            ("abc", "abcd", false),
            ("abcd", "abc", false),
            ("[", "a", false),
        ] {
            assert_eq!(
                glob(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }
}
