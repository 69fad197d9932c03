//! What a subscriber is still to be sent: a bounded queue. One that does not keep up is cut off and
//! counted, as Redis does, so that it can neither fill the memory nor hold up anyone.

use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::account::Part;
use super::listener::Client;

/// Messages that may wait for one subscriber: a batch of the largest size, for one who watches
/// every key of it.
pub const QUEUE: usize = 128 * 1024;
/// Bytes that may wait for one subscriber, as in Redis.
const QUEUE_BYTES: usize = 32 << 20;

/// What a message costs besides its bytes: its place in the queue, and its allocation.
const FRAME_BYTES: usize = 48;

/// An encoded message.
pub type Frame = Rc<[u8]>;

/// Where a subscriber's messages wait.
pub struct Inbox {
    frames: mpsc::Receiver<Frame>,
    client: Rc<Client>,
}

/// The other end of an [`Inbox`].
pub struct Outlet {
    queue: mpsc::Sender<Frame>,
}

/// An empty queue of `client`, to which what waits in it is charged, though others may wait for the same
/// message.
pub fn queue(client: Rc<Client>) -> (Outlet, Inbox) {
    let (queue, frames) = mpsc::channel(QUEUE);
    (Outlet { queue }, Inbox { frames, client })
}

impl Inbox {
    /// The next message.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame>> {
        let next = self.frames.poll_recv(cx);
        if let Poll::Ready(Some(frame)) = &next {
            let bytes = frame.len() + FRAME_BYTES;
            self.client.account.sub(Part::Inbox, bytes);
        }
        next
    }
}

impl Outlet {
    /// `false`: it has not read for too long.
    pub fn hand(&self, client: &Client, frame: Frame) -> bool {
        let bytes = frame.len() + FRAME_BYTES;
        let waiting = client.account.part(Part::Inbox);
        // One message alone may be as large as the store lets it be.
        let room = waiting + bytes <= QUEUE_BYTES || waiting == 0;
        let handed = room && self.queue.try_send(frame).is_ok();
        if handed {
            client.account.add(Part::Inbox, bytes);
        }
        handed
    }
}
