//! Engines' KV events as vLLM and SGLang publish them over ZeroMQ, and as the mock engine does.
//!
//! The parts, from the inside out:
//! - [`wire`] reads and writes a batch of events: every form that an engine has ever published, and nothing of sockets.
//! - [`continuity`] says of each batch whether one is missing before it, and whether its publisher is another one.
//! - [`endpoint`] is where an engine publishes, as the engine says it and as it can be reached.
//! - [`subscribe`] follows a publisher and closes gaps by replay; [`Publisher`] is the other side.
//!
//! Contract: what cannot be understood is left out and counted, never guessed. Memory is bounded: batches wait in the
//! sockets of the system, and one at a time here.
//!
//! Deliberately absent: `ipc://` and `inproc://` endpoints; ZeroMQ's own authentication, which no engine offers. A ZeroMQ
//! connection is neither encrypted nor authenticated: events belong on a network that is trusted.

pub mod continuity;
pub mod endpoint;
mod publish;
mod sockets;
mod subscriber;
pub mod wire;

pub use endpoint::{Endpoint, EndpointError};
pub use publish::{Form, PublishError, Publisher, PublisherOptions};
pub use subscriber::{Source, subscribe};
