//! What clients hold in memory, in bytes: each one's part and the sum, against one limit.
//!
//! Invariants:
//! 1. The sum is the sum of all parts of all accounts that are open.
//! 2. What is held is charged by its allocation, not by its use, and before it grows further: what one
//!    burst may add to one client is bounded by the sizes of [`connection`](super::connection).
//!
//! As Redis does with `maxmemory-clients`: where the sum is over its limit, the client that holds most
//! is evicted, and everyone else waits until its memory is back.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// What memory is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Bytes read and not yet done with, and where their arguments lie.
    Input,
    /// Commands that wait: of a transaction, or for values.
    Commands,
    /// Answers that the client has not read.
    Answers,
    /// Names of channels and patterns.
    Subscriptions,
    /// Messages that the client has not read.
    Inbox,
    /// What it calls itself and its library.
    Names,
}

const PARTS: usize = 6;
/// Of the limit: kept free for what the clients that are served at this moment add to it.
const SLACK: usize = 8;

/// The sum over all clients.
#[derive(Debug, Default)]
pub struct Accounts {
    held: Cell<usize>,
    bytes_max: usize,
    room: Notify,
}

impl Accounts {
    /// Nobody holds anything; all together may hold `limit` bytes.
    pub fn new(limit: usize) -> Rc<Self> {
        Rc::new(Accounts {
            held: Cell::new(0),
            bytes_max: limit - limit / SLACK,
            room: Notify::new(),
        })
    }

    /// What all clients hold, in bytes.
    pub fn held(&self) -> usize {
        self.held.get()
    }

    /// Whether they hold too much.
    pub fn is_over(&self) -> bool {
        self.excess(0) > 0
    }

    /// By how much they hold too much, without `leaving`, in bytes.
    pub fn excess(&self, leaving: usize) -> usize {
        self.held.get().saturating_sub(leaving + self.bytes_max)
    }

    /// Waits until they no longer hold too much.
    pub async fn room(&self) {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if !self.is_over() {
                return;
            }
            room.await;
        }
    }

    fn change(&self, from: usize, to: usize) {
        let was_over = self.is_over();
        self.held.set(self.held.get() - from + to);
        if was_over && !self.is_over() {
            self.room.notify_waiters();
        }
    }
}

/// What one client holds.
#[derive(Debug)]
pub struct Account {
    accounts: Rc<Accounts>,
    parts: [Cell<usize>; PARTS],
}

impl Account {
    /// Of a client that holds nothing yet.
    pub fn new(accounts: &Rc<Accounts>) -> Self {
        Account {
            accounts: Rc::clone(accounts),
            parts: Default::default(),
        }
    }

    /// It holds so much of this now.
    pub fn set(&self, part: Part, bytes: usize) {
        let from = self.parts[part as usize].replace(bytes);
        if from != bytes {
            self.accounts.change(from, bytes);
        }
    }

    /// It holds so much more.
    pub fn add(&self, part: Part, bytes: usize) {
        self.set(part, self.part(part) + bytes);
    }

    /// It holds so much less.
    pub fn sub(&self, part: Part, bytes: usize) {
        self.set(part, self.part(part).saturating_sub(bytes));
    }

    /// What it holds of this, in bytes.
    pub fn part(&self, part: Part) -> usize {
        self.parts[part as usize].get()
    }

    /// What it holds, in bytes.
    pub fn held(&self) -> usize {
        self.parts.iter().map(Cell::get).sum()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.accounts.change(self.held(), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use proptest::prelude::*;

    use super::*;

    const ALL: [Part; PARTS] = [
        Part::Input,
        Part::Commands,
        Part::Answers,
        Part::Subscriptions,
        Part::Inbox,
        Part::Names,
    ];

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Open,
        Close(usize),
        Set(usize, usize, usize),
        Add(usize, usize, usize),
        Sub(usize, usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let place = || (0..8_usize, 0..PARTS, 0..400_usize);
        prop_oneof![
            Just(Step::Open),
            (0..8_usize).prop_map(Step::Close),
            place().prop_map(|(client, part, bytes)| Step::Set(client, part, bytes)),
            place().prop_map(|(client, part, bytes)| Step::Add(client, part, bytes)),
            place().prop_map(|(client, part, bytes)| Step::Sub(client, part, bytes)),
        ]
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_parts(steps in proptest::collection::vec(step(), 0..200)) {
            let accounts = Accounts::new(800);
            let mut clients: Vec<(Account, [usize; PARTS])> = Vec::new();
            for step in steps {
                let count = clients.len();
                match step {
                    Step::Open => clients.push((Account::new(&accounts), [0; PARTS])),
                    _ if count == 0 => {}
                    Step::Close(at) => drop(clients.swap_remove(at % count)),
                    Step::Set(at, part, bytes) => {
                        let (account, parts) = &mut clients[at % count];
                        account.set(ALL[part], bytes);
                        parts[part] = bytes;
                    }
                    Step::Add(at, part, bytes) => {
                        let (account, parts) = &mut clients[at % count];
                        account.add(ALL[part], bytes);
                        parts[part] += bytes;
                    }
                    Step::Sub(at, part, bytes) => {
                        let (account, parts) = &mut clients[at % count];
                        account.sub(ALL[part], bytes);
                        parts[part] = parts[part].saturating_sub(bytes);
                    }
                }
                let sum: usize = clients.iter().flat_map(|(_, parts)| parts).sum();
                prop_assert_eq!(accounts.held(), sum);
                prop_assert_eq!(accounts.is_over(), sum > 700);
                prop_assert_eq!(accounts.excess(50), sum.saturating_sub(750));
                for (account, parts) in &clients {
                    prop_assert_eq!(account.held(), parts.iter().sum::<usize>());
                }
            }
        }
    }

    #[tokio::test]
    async fn who_waits_for_room_goes_on_when_there_is_some() {
        let accounts = Accounts::new(800);
        let (large, small) = (Account::new(&accounts), Account::new(&accounts));
        small.set(Part::Input, 100);
        accounts.room().await;
        large.set(Part::Answers, 700);
        let mut room = std::pin::pin!(accounts.room());
        let waits =
            std::future::poll_fn(|cx| std::task::Poll::Ready(room.as_mut().poll(cx).is_pending()));
        assert!(waits.await);
        drop(large);
        room.await;
    }
}
