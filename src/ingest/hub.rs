//! Subscribers on this daemon's own socket: who is subscribed to what.
//!
//! A channel's subscribers are found by its hash. A pattern is tested once for each message, whoever has
//! it. Publishing is work of [`slice`](super::slice)s: between two of them a subscriber may come or go,
//! and gets the message or not.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::account::Part;
use super::core::Core;
use super::glob::Glob;
use super::inbox::{self, Frame, Inbox, Outlet};
use super::listener::Client;
use crate::wire::encode::{self, Version};

/// Before a key: the channel that tells its value whenever it changed.
pub const KEY_CHANNEL: &[u8] = b"tallyd:key:";
/// Different patterns of all clients together: each is tested for every message.
pub const PATTERNS_MAX: usize = 1000;
/// What one client's names of channels and patterns may hold, in bytes.
pub const NAMES_BYTES_MAX: usize = 16 << 20;
/// What a name costs besides its bytes: its places in the two indices, and its allocation.
const NAME_BYTES: usize = 256;
/// Steps of a pattern in a unit of work.
const STEPS_A_UNIT: usize = 16;

struct Subscriber {
    client: Rc<Client>,
    outlet: Outlet,
    version: Version,
    channels: HashSet<Rc<[u8]>>,
    patterns: HashSet<Rc<[u8]>>,
}

/// A pattern, and who is subscribed by it.
struct Pattern {
    name: Rc<[u8]>,
    glob: Glob,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Hub {
    subscribers: HashMap<u64, Subscriber>,
    channels: HashMap<Rc<[u8]>, HashSet<u64>>,
    by_pattern: HashMap<Rc<[u8]>, HashSet<u64>>,
    /// The patterns of `by_pattern`, compiled. Whoever goes through them keeps the list of that moment.
    patterns: Rc<Vec<Rc<Pattern>>>,
    /// Channels that tell of single keys.
    key_channels: usize,
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
        let (outlet, inbox) = inbox::queue(Rc::clone(&client));
        let new = Subscriber {
            client,
            outlet,
            version: Version::Resp2,
            channels: HashSet::new(),
            patterns: HashSet::new(),
        };
        self.subscribers.insert(id, new);
        inbox
    }

    /// Subscribes; returns to how much the client is subscribed.
    ///
    /// # Errors
    /// A pattern that is too long, or one more than there may be, or names that hold too much, in words.
    pub fn subscribe(
        &mut self,
        client: u64,
        by: By,
        name: &[u8],
        version: Version,
    ) -> Result<usize, String> {
        let Some(subscriber) = self.subscribers.get_mut(&client) else {
            return Ok(0);
        };
        subscriber.version = version;
        let mine = match by {
            By::Channel => &subscriber.channels,
            By::Pattern => &subscriber.patterns,
        };
        if mine.contains(name) {
            return Ok(subscriber.count());
        }
        let account = &subscriber.client.account;
        if account.part(Part::Subscriptions) + name.len() + NAME_BYTES > NAMES_BYTES_MAX {
            return Err(format!(
                "ERR the names of a client's subscriptions may take {NAMES_BYTES_MAX} bytes"
            ));
        }
        let known = match by {
            By::Channel => self.channels.get_key_value(name),
            By::Pattern => self.by_pattern.get_key_value(name),
        };
        let is_new = known.is_none();
        let name: Rc<[u8]> = known.map_or_else(|| name.into(), |(name, _)| Rc::clone(name));
        match by {
            By::Channel => {
                self.key_channels += usize::from(is_new && name.starts_with(KEY_CHANNEL));
                self.channels
                    .entry(Rc::clone(&name))
                    .or_default()
                    .insert(client);
                account.add(Part::Subscriptions, name.len() + NAME_BYTES);
                subscriber.channels.insert(name);
            }
            By::Pattern => {
                if is_new {
                    if self.patterns.len() >= PATTERNS_MAX {
                        return Err(format!(
                            "ERR all clients together may have {PATTERNS_MAX} different patterns"
                        ));
                    }
                    let glob = Glob::new(&name).map_err(|error| format!("ERR {error}"))?;
                    let name = Rc::clone(&name);
                    Rc::make_mut(&mut self.patterns).push(Rc::new(Pattern { name, glob }));
                }
                self.by_pattern
                    .entry(Rc::clone(&name))
                    .or_default()
                    .insert(client);
                account.add(Part::Subscriptions, name.len() + NAME_BYTES);
                subscriber.patterns.insert(name);
            }
        }
        Ok(subscriber.count())
    }

    /// Unsubscribes; returns to how much the client is still subscribed.
    pub fn unsubscribe(&mut self, client: u64, by: By, name: &[u8]) -> usize {
        let Some(subscriber) = self.subscribers.get_mut(&client) else {
            return 0;
        };
        let was_subscribed = match by {
            By::Channel => subscriber.channels.remove(name),
            By::Pattern => subscriber.patterns.remove(name),
        };
        let left = subscriber.count();
        if was_subscribed {
            let account = &subscriber.client.account;
            account.sub(Part::Subscriptions, name.len() + NAME_BYTES);
            self.forget(client, by, name);
        }
        left
    }

    /// Takes a client from the index.
    fn forget(&mut self, client: u64, by: By, name: &[u8]) {
        let index = match by {
            By::Channel => &mut self.channels,
            By::Pattern => &mut self.by_pattern,
        };
        let Some(clients) = index.get_mut(name) else {
            return;
        };
        clients.remove(&client);
        if !clients.is_empty() {
            return;
        }
        index.remove(name);
        match by {
            By::Channel => self.key_channels -= usize::from(name.starts_with(KEY_CHANNEL)),
            By::Pattern => Rc::make_mut(&mut self.patterns).retain(|known| *known.name != *name),
        }
    }

    /// What the client is subscribed to.
    pub fn names(&self, client: u64, by: By) -> Vec<Vec<u8>> {
        let names = self.subscribers.get(&client).map(|subscriber| match by {
            By::Channel => &subscriber.channels,
            By::Pattern => &subscriber.patterns,
        });
        names
            .map(|names| names.iter().map(|name| name.to_vec()).collect())
            .unwrap_or_default()
    }

    /// To how many channels and patterns the client is subscribed.
    pub fn counts(&self, client: u64) -> (usize, usize) {
        let subscriber = self.subscribers.get(&client);
        subscriber.map_or((0, 0), |s| (s.channels.len(), s.patterns.len()))
    }

    /// Whether anyone may want to know of single keys. Patterns are taken for a yes.
    pub fn watches_keys(&self) -> bool {
        self.key_channels > 0 || !self.patterns.is_empty()
    }

    /// Channels with a subscriber that match `pattern`.
    pub fn channels(&self, pattern: Option<&Glob>) -> impl Iterator<Item = &[u8]> {
        let all = self.channels.keys().map(|name| &**name);
        all.filter(move |name| pattern.is_none_or(|pattern| pattern.matches(name)))
    }

    /// How many subscribe to exactly this channel.
    pub fn subscribers(&self, channel: &[u8]) -> usize {
        self.channels.get(channel).map_or(0, HashSet::len)
    }

    /// How many different patterns there are.
    pub fn patterns(&self) -> usize {
        self.patterns.len()
    }

    /// Forgets a client.
    pub fn remove(&mut self, client: u64) {
        let Some(subscriber) = self.subscribers.remove(&client) else {
            return;
        };
        for name in &subscriber.channels {
            self.forget(client, By::Channel, name);
        }
        for name in &subscriber.patterns {
            self.forget(client, By::Pattern, name);
        }
    }
}

impl Core {
    /// Hands a message to everyone who is subscribed to `channel`, in slices.
    pub async fn publish(&self, channel: &[u8], message: &[u8]) {
        let (to, patterns) = {
            let hub = self.hub.borrow();
            let to: Vec<u64> = hub
                .channels
                .get(channel)
                .into_iter()
                .flatten()
                .copied()
                .collect();
            (to, Rc::clone(&hub.patterns))
        };
        self.slice.spend(1);
        if !to.is_empty() {
            self.deliver(&to, &[b"message", channel, message]).await;
        }
        for pattern in patterns.iter() {
            self.slice
                .spend(1 + pattern.glob.steps(channel.len()) / STEPS_A_UNIT);
            if pattern.glob.matches(channel) {
                let to: Vec<u64> = {
                    let hub = self.hub.borrow();
                    let clients = hub.by_pattern.get(&pattern.name);
                    clients.into_iter().flatten().copied().collect()
                };
                let parts: [&[u8]; 4] = [b"pmessage", &pattern.name, channel, message];
                self.deliver(&to, &parts).await;
            }
            self.slice.pause_if_due(&self.stats).await;
        }
    }

    /// One encoding for each version, whoever gets it.
    async fn deliver(&self, to: &[u64], parts: &[&[u8]]) {
        let mut frames: [Option<Frame>; 2] = [None, None];
        for &id in to {
            {
                let mut hub = self.hub.borrow_mut();
                let Some(subscriber) = hub.subscribers.get(&id) else {
                    continue;
                };
                let version = subscriber.version;
                let frame = frames[usize::from(version == Version::Resp3)]
                    .get_or_insert_with(|| frame(version, parts));
                if !subscriber.outlet.hand(&subscriber.client, Rc::clone(frame)) {
                    self.stats.subscribers_dropped_total.add(1);
                    self.notices.slow_subscriber(id);
                    subscriber.client.cut_off();
                    hub.remove(id);
                }
            }
            self.slice.spend(1);
            if self.accounts.is_over() {
                self.make_room();
                self.slice.pause(&self.stats).await;
            }
            self.slice.pause_if_due(&self.stats).await;
        }
    }
}

impl Subscriber {
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
