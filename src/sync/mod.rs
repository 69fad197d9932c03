//! What goes to and comes from the other nodes and the store, beside the batches.
//!
//! - [`message`]: the JSON of one message
//! - [`publisher`]: one message a batch, and a heartbeat
//! - [`subscriber`]: what other nodes' messages say, and what they do not
//! - [`loader`]: values that a client waits for, read in batches
//!
//! Writers that are no tallyd are found by a value's age, not by `CLIENT TRACKING`: in broadcast mode
//! two subscribers raised the CPU time of a pipelined `INCRBY` on Redis 7.0 from 1,070 to 1,810 ns
//! (100,000 keys, pipeline 64), which every flush would pay.

pub mod loader;
pub mod message;
pub mod publisher;
pub mod subscriber;
