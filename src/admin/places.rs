//! The places of the server's connections: who gets one, and who must give one up.
//!
//! 1. [`CONNECTIONS_MAX`] connections may ask anything. When all these places are taken, a new
//!    connection gets that of the one that has been idle the longest.
//! 2. Where none is idle, it gets one of [`HEALTH_CONNECTIONS_MAX`] places on which nothing but
//!    health may be asked, once: whoever keeps all the others busy does not make a supervisor
//!    restart a daemon that is well.
//! 3. A connection is idle from the last byte of an answer until the first one of a request. One
//!    that has not asked yet is idle only after [`FIRST_WITHIN`], so that a crowd does not push out
//!    clients that are about to ask.
//!
//! All this lives on the admin server's thread. A connection that gives up its place ends when its
//! task runs the next time; until then it is one more.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Connections at the same time that may ask anything: scrapers, probes and a few pages.
pub const CONNECTIONS_MAX: usize = 64;
/// Connections besides these that may ask health.
pub const HEALTH_CONNECTIONS_MAX: usize = 16;
/// Of both kinds, where there are descriptors for them.
pub const PLACES_MAX: usize = CONNECTIONS_MAX + HEALTH_CONNECTIONS_MAX;
/// Of fewer places, health keeps so much.
const HEALTH_PART: usize = 4;
/// A client asks in so long after it has connected, or its place is anybody's.
const FIRST_WITHIN: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Debug)]
pub struct Places {
    any_max: usize,
    health_max: usize,
    any: RefCell<Vec<Rc<Seat>>>,
    health: Cell<usize>,
}

/// A connection's place; free again with its value.
#[derive(Debug)]
pub struct Place {
    places: Rc<Places>,
    seat: Rc<Seat>,
    only_health: bool,
}

/// What one connection does.
#[derive(Debug)]
struct Seat {
    doing: Cell<Doing>,
    given_up: Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Since then, which is in the future for one that is about to ask.
    Idle(Instant),
    /// A request has begun.
    Asking,
    /// The answer is being made: what is read now is the next request, which waits.
    Hearing,
    /// The answer is made; its last bytes may not be written yet.
    Answered,
}

impl Places {
    /// So many of both kinds, at least one of each; all are free.
    pub fn new(places_max: usize) -> Self {
        let health_max = (places_max / HEALTH_PART).clamp(1, HEALTH_CONNECTIONS_MAX);
        Places {
            any_max: places_max
                .saturating_sub(health_max)
                .clamp(1, CONNECTIONS_MAX),
            health_max,
            any: RefCell::default(),
            health: Cell::default(),
        }
    }

    /// A place for a new connection. `None`: there is none at all.
    pub fn take(self: &Rc<Self>) -> Option<Place> {
        let now = Instant::now();
        let mut any = self.any.borrow_mut();
        if any.len() >= self.any_max {
            let idle = any.iter().enumerate().filter_map(|(index, seat)| {
                let since = seat.idle_since()?;
                (since <= now).then_some((since, index))
            });
            if let Some((_, longest)) = idle.min() {
                any.remove(longest).given_up.notify_one();
            }
        }
        let only_health = any.len() >= self.any_max;
        if only_health && self.health.get() >= self.health_max {
            return None;
        }
        let seat = Rc::new(Seat {
            doing: Cell::new(Doing::Idle(now + FIRST_WITHIN)),
            given_up: Notify::new(),
        });
        if only_health {
            self.health.set(self.health.get() + 1);
        } else {
            any.push(Rc::clone(&seat));
        }
        Some(Place {
            places: Rc::clone(self),
            seat,
            only_health,
        })
    }
}

impl Place {
    /// Whether nothing else may be asked.
    pub fn only_health(&self) -> bool {
        self.only_health
    }

    /// Resolves when somebody else has got it.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn given_up(&self) {
        self.seat.given_up.notified().await;
    }

    /// The connection, watched for requests that begin and answers that are written.
    pub fn watch<S>(&self, inner: S) -> Watched<S> {
        Watched {
            inner,
            seat: Rc::clone(&self.seat),
        }
    }

    /// An answer, watched for its end.
    pub fn answer<B>(&self, inner: B) -> Answer<B> {
        self.seat.doing.set(Doing::Hearing);
        Answer {
            inner,
            seat: Rc::clone(&self.seat),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.only_health {
            self.places.health.set(self.places.health.get() - 1);
        } else {
            let mut any = self.places.any.borrow_mut();
            any.retain(|seat| !Rc::ptr_eq(seat, &self.seat));
        }
    }
}

impl Seat {
    fn idle_since(&self) -> Option<Instant> {
        match self.doing.get() {
            Doing::Idle(since) => Some(since),
            Doing::Asking | Doing::Hearing | Doing::Answered => None,
        }
    }

    fn read(&self) {
        if self.doing.get() != Doing::Hearing {
            self.doing.set(Doing::Asking);
        }
    }

    fn written(&self) {
        if self.doing.get() == Doing::Answered {
            self.doing.set(Doing::Idle(Instant::now()));
        }
    }
}

/// A connection whose place knows what it does.
#[derive(Debug)]
pub struct Watched<S> {
    inner: S,
    seat: Rc<Seat>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.inner).poll_read(cx, buf);
        if buf.filled().len() > before {
            this.seat.read();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.inner).poll_flush(cx))?;
        // hyper flushes when it has written all that it had.
        this.seat.written();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// A body whose end its connection's place hears of.
#[derive(Debug)]
pub struct Answer<B> {
    inner: B,
    seat: Rc<Seat>,
}

impl<B> Drop for Answer<B> {
    fn drop(&mut self) {
        self.seat.doing.set(Doing::Answered);
    }
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.get_mut().inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::advance;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    async fn is_given_up(place: &Place) -> bool {
        tokio::time::timeout(MOMENT, place.given_up()).await.is_ok()
    }

    /// A request and its answer, as hyper goes about it.
    async fn exchange(place: &Place) {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut ours = place.watch(ours);
        theirs.write_all(b"?").await.unwrap();
        ours.read_u8().await.unwrap();
        drop(place.answer(()));
        ours.write_all(b"!").await.unwrap();
        assert_eq!(place.seat.idle_since(), None);
        ours.flush().await.unwrap();
        assert_eq!(place.seat.idle_since(), Some(Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_gives_way_and_then_those_who_never_asked() {
        let places = Rc::new(Places::new(PLACES_MAX));
        let mut taken: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| places.take().unwrap())
            .collect();
        assert!(places.take().unwrap().only_health(), "all may yet ask");
        for index in [7, 3] {
            exchange(&taken[index]).await;
            advance(MOMENT).await;
        }
        for index in [7, 3] {
            let place = places.take().unwrap();
            assert!(!place.only_health());
            assert!(is_given_up(&taken[index]).await, "{index}");
            // It may linger: the place is another's already.
            taken.push(place);
        }
        assert!(places.take().unwrap().only_health());
        advance(FIRST_WITHIN).await;
        assert!(!places.take().unwrap().only_health());
        assert!(is_given_up(&taken[0]).await && !is_given_up(&taken[1]).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_busy_keep_their_places_and_leave_health_its_own() {
        let places = Rc::new(Places::new(PLACES_MAX));
        let taken: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| places.take().unwrap())
            .collect();
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut ours = taken[0].watch(ours);
        theirs.write_all(b"?").await.unwrap();
        ours.read_u8().await.unwrap();
        let mut answers: Vec<_> = taken[1..].iter().map(|place| place.answer(())).collect();
        advance(10 * FIRST_WITHIN).await;
        let health: Vec<_> = (0..HEALTH_CONNECTIONS_MAX)
            .map(|_| places.take().unwrap())
            .collect();
        assert!(health.iter().all(Place::only_health));
        assert!(places.take().is_none());
        drop(health);
        assert!(places.take().unwrap().only_health());
        // Made, and not yet written.
        answers.clear();
        assert!(places.take().unwrap().only_health());
        drop(taken);
        assert!(!places.take().unwrap().only_health());
    }
}
