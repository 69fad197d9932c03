//! What the token in the store means, given what this node knows. Pure.
//!
//! | token | is | then |
//! | --- | --- | --- |
//! | as known | nothing happened since | go on |
//! | higher, within what was sealed | replies were lost, the batches were not | read them back |
//! | lower | the store lost writes (fail-over, older file) | replay what is retained |
//! | absent, never signed by this node | a new node, or a store that it never reached | go on |
//! | absent, clock lower than known | the store was emptied or lost its data | by the server: replay, or only go on |
//! | absent on another server, and this node is young | the fail-over lost its first batches | replay |
//! | absent, clock as known or higher | the token alone was deleted or evicted | go on, but never resend what may be in |
//! | any, and `store.url` was changed to another store | it has what is not ours | go on there with what is pending, replay nothing |
//! | of an unknown run, higher than anything sealed, or of a former run and a batch of this one | another daemon has this node's id | stop |
//!
//! The clock alone does not tell a lost token from lost batches: after a fail-over other nodes move
//! it on. But what a store loses without being emptied is younger than `flush.retain` (older losses
//! are beyond repair anyway), so it can lack all of a node's batches only while the journal still has
//! the first of them.

use crate::store::{RunId, Standing};

/// What this node knows.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The last batch known to be in the store; 0: none.
    pub applied: u64,
    /// The last batch sealed.
    pub sealed: u64,
    /// Batches up to this one went to another store: this one never had them.
    pub floor: u64,
    /// No former run has used a higher batch number.
    pub numbered: u64,
    /// Whether the batch after `applied` may have been sent without a reply.
    pub uncertain: bool,
    /// Every run of this state directory.
    pub runs: &'a [RunId],
    /// This run.
    pub run: RunId,
    /// Whether this run has signed the token before.
    pub claimed: bool,
    /// Whether any run of this node may have signed it.
    pub ever_claimed: bool,
    /// The server as last seen by this process; before that, the one that is known to have had the
    /// token, or was to get the first one.
    pub server: Option<&'a str>,
    /// The store that has what was applied, if `store.url` was another one then: only who configures it moves a
    /// node. At the same place, another id is that of a store which lost its data, named by whoever came first.
    pub former: Option<&'a str>,
    /// The highest clock that this process has seen.
    pub clock: u64,
    /// Whether every batch of this node, from the first on, is still in the journal.
    pub whole: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The next batch is the one after `applied`.
    Continue,
    /// Everything up to this batch is in the store.
    Applied(u64),
    /// The store has only what came before and with this batch.
    RolledBack(u64),
    /// The token alone is gone. The batch after `applied`, if uncertain, may be in the store.
    TokenLost,
    /// The store was emptied on purpose (the same server, without its clock): what was applied is
    /// gone with everything else and is not brought back.
    Emptied,
    /// It is another store: what is pending goes there, and nothing that was applied is sent again.
    Elsewhere,
    /// Another daemon writes with this node's id.
    Conflict(String),
}

/// Decides.
pub fn resolve(known: Known<'_>, standing: &Standing) -> Verdict {
    // A token there is one of an earlier stay. Whatever else it is, the rules below tell.
    let is_earlier = standing
        .token
        .is_none_or(|token| known.runs.contains(&token.run) && token.batch <= known.applied);
    let is_other = standing.store.as_ref();
    if is_earlier && is_other.is_some_and(|store| store.is_other(known.former)) {
        return Verdict::Elsewhere;
    }
    let Some(token) = standing.token else {
        // Also where a first signature did not arrive.
        let nothing_sent = known.applied == 0 && !known.uncertain;
        if !known.ever_claimed || nothing_sent {
            return Verdict::Continue;
        }
        let lost_its_clock = standing.clock < known.clock || standing.clock == 0;
        let same_server = known.server == Some(standing.server.as_str());
        return match (lost_its_clock, same_server) {
            (true, true) => Verdict::Emptied,
            (true, false) => rolled_back(known, 0),
            // Who does not know where the token was cannot tell another server.
            (false, false) if known.whole && known.server.is_some() => rolled_back(known, 0),
            (false, _) => Verdict::TokenLost,
        };
    };
    if !known.runs.contains(&token.run) {
        return Verdict::Conflict(format!(
            "the token is signed by run {}, which is none of this state directory's",
            token.run
        ));
    }
    if known.claimed && token.run != known.run && token.batch > known.applied {
        // Signed by this run, the token shows an older one again only if the store went back.
        return Verdict::Conflict(format!(
            "the token was signed again by run {} while run {} was at work",
            token.run, known.run
        ));
    }
    if token.run != known.run && token.batch > known.numbered {
        // Its number is one of this run's batches: a copy of this directory has used it for its own.
        return Verdict::Conflict(format!(
            "run {} has flushed batch {}, and this directory's last batch of a former run is {}",
            token.run, token.batch, known.numbered
        ));
    }
    if token.batch > known.sealed {
        return Verdict::Conflict(format!(
            "the token names batch {}, and the last one sealed here is {}",
            token.batch, known.sealed
        ));
    }
    match token.batch {
        batch if batch > known.applied => Verdict::Applied(batch),
        batch if batch < known.applied => rolled_back(known, batch),
        _ => Verdict::Continue,
    }
}

/// What the store lacks is what it once had.
fn rolled_back(known: Known<'_>, to: u64) -> Verdict {
    let to = to.max(known.floor);
    if to < known.applied {
        Verdict::RolledBack(to)
    } else {
        Verdict::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{StoreId, Token};

    const OURS: RunId = RunId(1);
    const EARLIER: RunId = RunId(2);
    const FOREIGN: RunId = RunId(3);

    fn known(applied: u64, sealed: u64, uncertain: bool) -> Known<'static> {
        Known {
            applied,
            sealed,
            numbered: sealed,
            uncertain,
            runs: &[EARLIER, OURS],
            run: OURS,
            claimed: true,
            ever_claimed: true,
            server: Some("a"),
            former: None,
            floor: 0,
            clock: 100,
            whole: false,
        }
    }

    fn standing(token: Option<(u64, RunId)>, clock: u64, server: &str) -> Standing {
        Standing {
            token: token.map(|(batch, run)| Token { batch, run }),
            clock,
            server: server.to_owned(),
            store: None,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn a_token_between_applied_and_sealed_tells_what_was_applied() {
        let known = known(4, 6, true);
        assert_eq!(
            resolve(known, &standing(Some((4, OURS)), 100, "a")),
            Verdict::Continue
        );
        assert_eq!(
            resolve(known, &standing(Some((5, OURS)), 101, "a")),
            Verdict::Applied(5)
        );
        assert_eq!(
            resolve(known, &standing(Some((6, OURS)), 102, "a")),
            Verdict::Applied(6)
        );
        assert!(matches!(
            resolve(known, &standing(Some((7, OURS)), 103, "a")),
            Verdict::Conflict(_)
        ));
    }

    #[test]
    fn a_lower_token_is_a_store_that_went_back_even_to_an_earlier_run() {
        let known = known(4, 6, true);
        assert_eq!(
            resolve(known, &standing(Some((2, OURS)), 90, "b")),
            Verdict::RolledBack(2)
        );
        assert_eq!(
            resolve(known, &standing(Some((1, EARLIER)), 90, "b")),
            Verdict::RolledBack(1)
        );
    }

    #[test]
    fn a_foreign_or_overtaken_signature_stops() {
        let known = known(4, 6, false);
        for token in [(4, FOREIGN), (1, FOREIGN), (5, EARLIER)] {
            let verdict = resolve(known, &standing(Some(token), 100, "a"));
            assert!(
                matches!(verdict, Verdict::Conflict(_)),
                "{token:?}: {verdict:?}"
            );
        }
        let unclaimed = Known {
            claimed: false,
            ..known
        };
        let earlier = standing(Some((5, EARLIER)), 100, "a");
        assert_eq!(resolve(unclaimed, &earlier), Verdict::Applied(5));
        let own_batch = Known {
            numbered: 4,
            ..unclaimed
        };
        let verdict = resolve(own_batch, &earlier);
        assert!(matches!(verdict, Verdict::Conflict(_)), "{verdict:?}");
    }

    #[test]
    fn an_absent_token_is_judged_by_clock_and_server() {
        let new = Known {
            ever_claimed: false,
            ..known(0, 3, true)
        };
        assert_eq!(resolve(new, &standing(None, 500, "b")), Verdict::Continue);
        assert_eq!(
            resolve(known(0, 3, false), &standing(None, 500, "a")),
            Verdict::Continue
        );
        assert_eq!(
            resolve(known(4, 6, true), &standing(None, 100, "a")),
            Verdict::TokenLost
        );
        assert_eq!(
            resolve(known(4, 6, true), &standing(None, 101, "b")),
            Verdict::TokenLost
        );
        assert_eq!(
            resolve(known(4, 6, true), &standing(None, 0, "a")),
            Verdict::Emptied
        );
        assert_eq!(
            resolve(known(4, 6, true), &standing(None, 0, "b")),
            Verdict::RolledBack(0)
        );
        assert_eq!(
            resolve(known(4, 6, true), &standing(None, 99, "b")),
            Verdict::RolledBack(0)
        );
    }

    /// Seen to fail when the clock alone was asked.
    #[test]
    fn a_young_nodes_token_that_is_absent_on_another_server_was_lost_with_its_batches() {
        let young = Known {
            whole: true,
            ..known(4, 6, true)
        };
        let elsewhere = standing(None, 500, "b");
        assert_eq!(resolve(young, &elsewhere), Verdict::RolledBack(0));
        assert_eq!(
            resolve(young, &standing(None, 500, "a")),
            Verdict::TokenLost,
            "the same process has lost no write"
        );
        let restarted = Known {
            server: None,
            ..young
        };
        assert_eq!(resolve(restarted, &elsewhere), Verdict::TokenLost);
    }

    fn store(id: &str) -> StoreId {
        StoreId {
            id: id.to_owned(),
            is_new: false,
        }
    }

    #[test]
    fn only_who_was_configured_to_another_store_is_elsewhere() {
        let at = |id: &str, token| Standing {
            store: Some(store(id)),
            ..standing(token, 500, "b")
        };
        let moved = Known {
            former: Some("redis:1"),
            ..known(4, 6, true)
        };
        for token in [None, Some((2, EARLIER)), Some((4, OURS))] {
            assert_eq!(resolve(moved, &at("redis:2", token)), Verdict::Elsewhere);
        }
        assert_eq!(
            resolve(moved, &at("redis:1", Some((2, OURS)))),
            Verdict::RolledBack(2),
            "the same store somewhere else"
        );
        assert_eq!(
            resolve(known(4, 6, true), &at("redis:2", Some((2, OURS)))),
            Verdict::RolledBack(2),
            "nobody has moved this node"
        );
        for token in [(2, FOREIGN), (5, OURS)] {
            let verdict = resolve(moved, &at("redis:2", Some(token)));
            assert_ne!(verdict, Verdict::Elsewhere, "{token:?}");
        }
    }

    /// What a process that died right after it had moved leaves to the next one: a token of an earlier stay.
    #[test]
    fn what_went_to_another_store_is_not_sent_here() {
        let moved = Known {
            floor: 4,
            claimed: false,
            ..known(4, 6, false)
        };
        let earlier = standing(Some((2, EARLIER)), 500, "b");
        assert_eq!(resolve(moved, &earlier), Verdict::Continue);
        let later = Known {
            applied: 6,
            ..moved
        };
        assert_eq!(resolve(later, &earlier), Verdict::RolledBack(4));
        let emptied = standing(None, 0, "c");
        assert_eq!(resolve(later, &emptied), Verdict::RolledBack(4));
    }
}
