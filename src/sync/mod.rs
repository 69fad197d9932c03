//! What goes to and comes from the other nodes and the store, beside the batches.
//!
//! - [`message`]: the JSON of one message
//! - [`publisher`]: one message a batch, and a heartbeat
//! - [`subscriber`]: what other nodes' messages say, and what they do not
//! - [`loader`]: values that a client waits for, read in batches

pub mod loader;
pub mod message;
pub mod publisher;
pub mod subscriber;
