//! The subscriber: hears what the other nodes' batches did, and notices what it did not hear.
//!
//! Values move the view only by their clock, so order and repetition do not matter. What matters is
//! loss: a gap in a run's numbers, or a subscription that broke, marks all values held as stale.
//!
//! This node's own messages are passed over: the reply to its batch was faster.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::message::{Head, MessageError, Received};
use crate::flush::ToCounters;
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::store::{Feed, NodeId, RunId, Store, StoreError};
use crate::time::unix_ms;

/// First pause after a failed subscription; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// So many heartbeats may fail to come before the subscription is taken for dead.
const HEARTBEATS_MISSED: u32 = 3;
/// Where nobody is known to send heartbeats, a silent subscription is renewed so often.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A node that was not heard for so long is forgotten.
const PEER_AGE_MAX: Duration = Duration::from_secs(3600);
/// They are counted at most so often while none is new.
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Nodes remembered at a time. A message of one more is taken, but what it lacks is looked for each time.
const PEERS_MAX: usize = 10_000;
/// How often room is looked for among them.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// What the subscriber is built from.
pub struct Subscriber<S> {
    /// Where messages come from.
    pub store: Arc<S>,
    /// Of the messages that are passed over.
    pub head: Head,
    /// Between two messages of this node at most; `None` if it publishes none.
    pub heartbeat: Option<Duration>,
    /// To the ingest thread.
    pub counters: mpsc::Sender<ToCounters>,
    /// Cancelled when the daemon stops.
    pub stop: CancellationToken,
    /// Numbers.
    pub stats: Arc<Stats>,
}

/// What a message means for what was heard before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing is missing.
    InOrder,
    /// Messages before it are missing.
    Gap,
    /// It was heard before, or out of order.
    Again,
}

/// The last message heard of each node: at most [`PEERS_MAX`] of some 100 bytes each.
#[derive(Debug, Default)]
pub struct Peers {
    nodes: HashMap<NodeId, Peer>,
    /// When those that are silent were last looked for, because there was no room.
    tidied: Option<Instant>,
}

#[derive(Debug)]
struct Peer {
    run: RunId,
    seq: u64,
    heard: Instant,
}

impl Peers {
    /// Notes a message. `fresh`: everything held is being read anyway, so that a node that was not
    /// known cannot have been missed.
    pub fn hear(
        &mut self,
        node: NodeId,
        run: RunId,
        seq: u64,
        is_empty: bool,
        fresh: bool,
    ) -> Heard {
        let now = Instant::now();
        // A heartbeat repeats the last number; any other message has the next one.
        let before = if is_empty { seq } else { seq.saturating_sub(1) };
        let Some(peer) = self.nodes.get_mut(&node).filter(|peer| peer.run == run) else {
            // Killed, its last run may have ended between a batch and its message.
            let restarted = self.nodes.contains_key(&node);
            if restarted || self.has_room(now) {
                let heard = now;
                self.nodes.insert(node, Peer { run, seq, heard });
            }
            return if !restarted && (before == 0 || fresh) {
                Heard::InOrder
            } else {
                Heard::Gap
            };
        };
        peer.heard = now;
        let heard = match peer.seq {
            last if before == last => Heard::InOrder,
            last if before > last => Heard::Gap,
            _ => Heard::Again,
        };
        peer.seq = peer.seq.max(seq);
        heard
    }

    /// Whether one more may be remembered. Room is looked for now and then, not for each message.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.nodes.len() >= PEERS_MAX && self.tidied.is_none_or(|at| now - at >= TIDY_EVERY) {
            self.tidied = Some(now);
            self.nodes.retain(|_, peer| now - peer.heard < PEER_AGE_MAX);
        }
        self.nodes.len() < PEERS_MAX
    }

    /// How many nodes were heard of late.
    pub fn count(&self) -> usize {
        self.nodes
            .values()
            .filter(|peer| peer.heard.elapsed() < PEER_AGE_MAX)
            .count()
    }
}

impl<S: Store> Subscriber<S> {
    /// Runs until told to stop.
    pub async fn run(self) {
        let stop = self.stop.clone();
        // Nothing is under way that would have to be finished.
        let _ = stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(self) {
        let mut pause = PAUSE_MIN;
        let mut failing = Repeats::default();
        let mut malformed = Repeats::default();
        loop {
            let error = match self.store.subscribe().await {
                Ok(feed) => {
                    if let Some(told) = failing.over() {
                        info!(
                            tries = told.count,
                            seconds = told.seconds(),
                            "subscribed again"
                        );
                    }
                    pause = PAUSE_MIN;
                    self.stats.subscribed.set(1);
                    let error = self.hear(feed, &mut malformed).await;
                    self.stats.subscribed.set(0);
                    error
                }
                Err(error) => Some(error),
            };
            if let Some(error) = error
                && let Some(told) = failing.again()
            {
                warn!(
                    tries = told.count,
                    %error,
                    "not subscribed: other nodes' values are read when asked for"
                );
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Hears messages until the subscription breaks (`Some`) or has been silent for too long.
    async fn hear(&self, mut feed: S::Feed, malformed: &mut Repeats) -> Option<StoreError> {
        let silence_max = self
            .heartbeat
            .map_or(SILENCE_MAX, |heartbeat| heartbeat * HEARTBEATS_MISSED);
        let mut peers = Peers::default();
        let since = Instant::now();
        let mut counted = (0, since);
        // Whatever was published while nobody listened.
        if self.counters.send(ToCounters::Stale).await.is_err() {
            return None;
        }
        loop {
            let text = match timeout(silence_max, feed.next()).await {
                Ok(Ok(text)) => text,
                Ok(Err(error)) => return Some(error),
                Err(_) => return None,
            };
            let fresh = since.elapsed() < silence_max;
            if let Err(error) = self.message(&text, &mut peers, fresh).await {
                self.stats.malformed_total.add(1);
                if let Some(told) = malformed.again() {
                    warn!(count = told.count, %error, "messages on the channel are not used");
                }
                if let MessageError::Version(_) = error {
                    // Who listens on this node's socket may know more than it does.
                    let _ = self.counters.send(ToCounters::Message(text)).await;
                }
            }
            let (known, at) = counted;
            if known != peers.nodes.len() || at.elapsed() >= COUNT_EVERY {
                self.stats.peers.set(peers.count() as u64);
                counted = (peers.nodes.len(), Instant::now());
            }
        }
    }

    async fn message(
        &self,
        text: &Bytes,
        peers: &mut Peers,
        fresh: bool,
    ) -> Result<(), MessageError> {
        if self.head.begins(text) {
            return Ok(());
        }
        let message = Received::decode(text)?;
        // Who sent it on may have written it anew.
        if self.head.is_of(&message) {
            return Ok(());
        }
        let (node, run) = message.sender()?;
        let announced = message.announced()?;
        self.stats.messages_total.add(1);
        self.stats
            .announced_total
            .add(announced.values.len() as u64);
        self.stats.lag_ms.set(unix_ms().saturating_sub(message.at));
        let heard = peers.hear(node, run, message.seq, message.is_empty(), fresh);
        if !announced.values.is_empty() {
            // If the counters are gone, the daemon is stopping.
            let message = ToCounters::Announced {
                node,
                values: announced,
            };
            let _ = self.counters.send(message).await;
        }
        if heard == Heard::Gap {
            self.stats.gaps_total.add(1);
            let _ = self.counters.send(ToCounters::Stale).await;
        }
        let _ = self.counters.send(ToCounters::Message(text.clone())).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(
        peers: &mut Peers,
        node: char,
        run: u64,
        seq: u64,
        is_empty: bool,
        fresh: bool,
    ) -> Heard {
        peers.hear(NodeId(node as u128), RunId(run), seq, is_empty, fresh)
    }

    #[test]
    fn nodes_without_number_take_bounded_room_and_no_search_for_each() {
        let mut peers = Peers::default();
        for node in 0..PEERS_MAX as u128 * 2 {
            peers.hear(NodeId(node), RunId(1), 1, false, false);
        }
        assert_eq!(peers.nodes.len(), PEERS_MAX);
        let tidied = peers.tidied;
        peers.hear(NodeId(u128::MAX), RunId(1), 1, false, false);
        assert!(
            tidied.is_some() && peers.tidied == tidied,
            "looked for once"
        );
        // Who is known stays so.
        assert_eq!(
            peers.hear(NodeId(0), RunId(1), 2, false, false),
            Heard::InOrder
        );
    }

    #[test]
    fn numbers_without_a_gap_are_in_order_and_heartbeats_repeat_the_last() {
        let mut peers = Peers::default();
        assert_eq!(hear(&mut peers, 'a', 1, 1, false, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'a', 1, 2, false, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'a', 1, 2, true, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'a', 1, 3, false, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'b', 1, 0, true, false), Heard::InOrder);
        assert_eq!(peers.count(), 2);
    }

    #[test]
    fn a_loss_is_noticed_by_the_next_message_or_heartbeat() {
        let mut peers = Peers::default();
        hear(&mut peers, 'a', 1, 1, false, false);
        assert_eq!(hear(&mut peers, 'a', 1, 3, false, false), Heard::Gap);
        assert_eq!(hear(&mut peers, 'a', 1, 4, true, false), Heard::Gap);
        assert_eq!(hear(&mut peers, 'a', 1, 4, true, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'a', 1, 2, false, false), Heard::Again);
        assert_eq!(hear(&mut peers, 'a', 1, 5, false, false), Heard::InOrder);
    }

    #[test]
    fn a_new_node_begins_at_one_and_a_new_run_may_have_lost_the_end_of_the_old_one() {
        let mut peers = Peers::default();
        hear(&mut peers, 'a', 1, 9, false, true);
        assert_eq!(hear(&mut peers, 'a', 2, 1, false, false), Heard::Gap);
        assert_eq!(hear(&mut peers, 'a', 2, 2, false, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'd', 1, 1, false, false), Heard::InOrder);
        assert_eq!(hear(&mut peers, 'b', 1, 7, true, false), Heard::Gap);
        assert_eq!(hear(&mut peers, 'c', 1, 7, true, true), Heard::InOrder);
    }
}
