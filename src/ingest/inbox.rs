//! What a subscriber is still to be sent: a bounded queue. One that does not keep up is cut off and
//! counted, as Redis does, so that it can neither fill the memory nor hold up anyone.

use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

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

/// The other end of an [`Inbox`].
pub struct Outlet {
    queue: mpsc::Sender<Frame>,
    /// What waits in the queue.
    bytes: Rc<Cell<usize>>,
}

/// An empty queue.
pub fn queue() -> (Outlet, Inbox) {
    let (queue, frames) = mpsc::channel(QUEUE);
    let bytes = Rc::new(Cell::new(0));
    let outlet = Outlet {
        queue,
        bytes: Rc::clone(&bytes),
    };
    (outlet, Inbox { frames, bytes })
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

impl Outlet {
    /// `false`: it has not read for too long.
    pub fn hand(&self, frame: Frame) -> bool {
        let bytes = self.bytes.get() + frame.len();
        // One message alone may be as large as the store lets it be.
        let room = bytes <= QUEUE_BYTES || self.bytes.get() == 0;
        if room {
            self.bytes.set(bytes);
        }
        room && self.queue.try_send(frame).is_ok()
    }
}
